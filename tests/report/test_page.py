"""Figures and the page: their numbers, only what there are data for, nothing of a record that could run, nothing from outside."""

from __future__ import annotations

import io
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from PIL import Image

from ctxlab.records.run import Run
from ctxlab.records.schema import TaskItem
from ctxlab.records.store import RunStore
from ctxlab.report import vega
from ctxlab.report.figures import Figure, figures, save_figures
from ctxlab.report.groups import Point, View
from ctxlab.report.markup import table, tag
from ctxlab.report.page import as_json, page, tell
from ctxlab.report.subjects import Subject, subjects_of
from tests.records.builders import costs, make_run, result, scores
from tests.report.builders import repetitions, trained_run

EVIL = '"><img src=x onerror=alert(1)></script><script>alert(2)</script><!--'


def by_name(found: list[Figure]) -> dict[str, Figure]:
    return {figure.name: figure for figure in found}


def values(figure: Figure, field: str) -> list[Any]:
    """What is drawn as points, panel by panel."""
    return [
        row[field]
        for _, spec in figure.panels
        for layer in spec["layer"]
        if layer.get("name") == "points"
        for row in layer["data"]["values"]
    ]


def with_everything(root: Path) -> list[Run]:
    """Runs with whatever a page draws: three schemes, curves, positions, costs with a law, answers by depth, an evaluation."""
    runs = [trained_run(root, position) for position in ("rope", "alibi")]
    for number, run in enumerate(runs):
        for step in range(1, 6):
            for split in ("train", "validation"):
                run.log({"step": step, "tokens": 100 * step, "seconds": 1.0, "attempt": 1, "split": split,
                         "nats_per_token": 5.0 - step / 2 - number / 10})  # fmt: skip
        for at in (1, 2, 4):
            axes = {"from": at, "to": at, "length": 256}
            run.measure(result("nats_per_token", 4.0 - at / 10, None, low=3.5, high=4.0, axes=axes))
        run.measure(
            result("extrapolation_ratio", 2.0 + number, None, axes={"trained": 256}),
            result("scaling_exponent", 1.0, None, low=0.9, high=1.1, axes={"of": "activation memory"},
                   facts={"factor": 2.0**18, "n_points": 5}),
        )  # fmt: skip
        where = run.record.provenance.model_copy(update={"hardware": {"memory_bytes": 2**31, "processor": "x"}})
        run.update(provenance=where)
        for depth in (0.0, 1.0):
            for context in (128, 256):
                facts = {"items": 4, "chance": 0.1, "oracle": 1.0}
                run.measure(result("accuracy", depth, context, axes={"task": "needle", "depth": depth}, facts=facts))
        run.write_items([TaskItem(task="needle", context=128, item=1, score=1, wanted=("7",), answer="7 of them")])
    again = RunStore(root).create("eval", "again", config={"run": [runs[0].id]}, line="ctxlab eval", parent=runs[0].id)
    again.measure(*scores(256, 3.5), *scores(512, 3.6))
    again.finish("done")
    return [*runs, again]


def test_every_figure_there_are_data_for_and_no_other(tmp_path: Path) -> None:
    found = figures(subjects_of(with_everything(tmp_path)))
    assert [figure.name for figure in found] == [
        "perplexity-by-context", "perplexity-by-scheme", "extrapolation", "extrapolation-ratio", "loss-by-position",
        "eval-perplexity-by-context", "eval-extrapolation", "train-loss", "validation-loss", "memory-by-context",
        "time-by-context", "needle-by-length", "needle-by-depth",
    ]  # fmt: skip
    assert figures(subjects_of([make_run(tmp_path / "empty")])) == []


def test_a_perplexity_is_that_of_the_mean_loss(tmp_path: Path) -> None:
    """3.0, 3.2, 3.4 nats: e^3.2, which is less than the mean of e^3.0, e^3.2 and e^3.4."""
    found = by_name(figures(subjects_of(repetitions(tmp_path))))
    drawn = values(found["perplexity-by-context"], "y")
    assert drawn[:2] == [pytest.approx(math.exp(3.2)), pytest.approx(math.exp(3.3))]
    assert "means over 3 runs, with 95% intervals" in found["perplexity-by-context"].caption
    # 0.1 nats more at twice the trained length, in every run: no seed can be seen in the ratio.
    assert values(found["extrapolation"], "y") == pytest.approx([1.0, math.exp(0.1)] * 2)
    row = next(row for row in found["extrapolation"].rows if row[0] == "rope")
    assert row[1:] == ("1.000 (1.000 to 1.000)", "1.105 (1.105 to 1.105)")


def test_the_trained_length_is_marked_and_names_stand_at_the_ends(tmp_path: Path) -> None:
    runs = [trained_run(tmp_path, position) for position in ("rope", "alibi", "learned")]
    ((_, spec),) = by_name(figures(subjects_of(runs)))["perplexity-by-context"].panels
    rules = [layer for layer in spec["layer"] if layer.get("mark") == {"type": "rule", "style": "mark"}]
    assert [row["x"] for rule in rules for row in rule["data"]["values"]] == [256]
    (names,) = (layer for layer in spec["layer"] if layer.get("name") == vega.AT_THE_END)
    texts = [layer for layer in names["layer"] if layer["mark"]["type"] == "text"]
    assert {t["data"]["values"][0]["text"] for t in texts} == {"rope", "alibi", "learned (to 256)"}
    places = sorted(t["encoding"]["y"]["value"] for t in texts)
    assert all(b - a >= 14.999 for a, b in zip(places, places[1:], strict=False))
    assert 0 <= places[0] <= places[-1] <= vega.HEIGHT


def test_a_law_says_where_it_meets_the_memory_of_the_machine(tmp_path: Path) -> None:
    """100 MiB and 256 KiB a token: 2 GiB are met at (2048 - 100) * 4 = 7792 tokens."""
    memory = by_name(figures(subjects_of(with_everything(tmp_path))))["memory-by-context"]
    said = [line for line in memory.caption if "context^1.00" in line]
    assert len(said) == 2
    assert all("2 GiB are reached at about 7.79k tokens" in line for line in said)
    ((_, spec),) = memory.panels
    assert any(row.get("y") == 2**31 for layer in spec["layer"] for row in layer.get("data", {}).get("values", ()))


def test_outliers_are_out_of_sight_only_when_asked_and_said_to_be() -> None:
    series = [vega.Series("a", "a", [Point(x, y) for x, y in enumerate([1.0, 1.1, 1.2, 1.1, 1.0, 1.2, 50.0])])]
    shown = vega.domain(series, log=False, outliers=True)
    hidden = vega.domain(series, log=False, outliers=False)
    assert shown.high > 50
    assert shown.beyond == 0
    assert hidden.high < 2
    assert hidden.beyond == 1


@pytest.mark.parametrize(
    ("low", "high", "kind", "ticks"),
    [
        (2**20, 2**28, "bytes", (2.0**20, 2.0**22, 2.0**24, 2.0**26, 2.0**28)),
        (23 * 2**20, 39 * 2**20, "bytes", tuple(n * 2.0**20 for n in (25, 30, 35))),
        (0.05, 0.4, "seconds", (0.05, 0.1, 0.2)),
    ],
)
def test_ticks_are_round_in_their_unit(low: float, high: float, kind: str, ticks: tuple[float, ...]) -> None:
    assert vega.log_ticks(low, high, kind) == pytest.approx(ticks)


def test_every_figure_is_drawn_without_a_browser(tmp_path: Path) -> None:
    folder = tmp_path / "figures"
    folder.mkdir()
    found = figures(subjects_of(with_everything(tmp_path / "runs")), View(log_y=True, smooth=0.5))
    paths = save_figures(found, folder)
    assert sorted(path.name for path in folder.iterdir()) == sorted(path.name for path in paths)
    for figure in found:
        root = ElementTree.parse(folder / f"{figure.name}.svg").getroot()
        texts = " ".join(root.itertext())
        assert figure.heading in texts
        assert "NaN" not in ElementTree.tostring(root, encoding="unicode")
        image = Image.open(io.BytesIO((folder / f"{figure.name}.png").read_bytes()))
        assert image.width > 400
        assert len(set(image.convert("RGB").resize((64, 64)).tobytes())) > 8


class Elements(HTMLParser):
    """Every element with its attributes, and the text of scripts, as a browser's parser finds them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self._inside = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append("")
            self._inside = True

    def handle_endtag(self, tag: str) -> None:
        self._inside = self._inside and tag != "script"

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.scripts[-1] += data


def hostile(root: Path) -> list[Run]:
    """Runs that say HTML and script wherever somebody can write something into a record."""
    runs = with_everything(root)
    for number, run in enumerate(runs[:2]):
        config = {**run.record.config, "position": {"name": f"{EVIL}{number}"}, EVIL: EVIL, "data": {"path": EVIL}}
        where = run.record.provenance.model_copy(
            update={"data": {EVIL: EVIL}, "libraries": {EVIL: EVIL}, "commit": EVIL}
        )
        run.update(config=config, note=EVIL, tags=(EVIL,), reason=EVIL, line=EVIL, name=EVIL, provenance=where)
        run.measure(
            *(result("accuracy", 0.5, context, axes={"task": EVIL, "depth": 0.5}) for context in (128, 256)),
            result("step_seconds", None, 9, status="failed", reason=EVIL),
        )
        run.write_items([TaskItem(task=EVIL, context=1, item=1, score=0, wanted=(EVIL,), answer=EVIL)])
    return runs


def written(subjects: list[Subject], heading: str = "title") -> str:
    return page(tell(subjects, figures(subjects)), heading=heading, facts=["a fact"], script="/* vega */")


def test_nothing_of_a_record_becomes_an_element_or_a_script(tmp_path: Path) -> None:
    plain = Elements(written(subjects_of(with_everything(tmp_path / "plain"))))
    text = written(subjects_of(hostile(tmp_path / "evil")), heading=EVIL)
    evil = Elements(text)
    assert text.count("&lt;script&gt;alert(2)") > 10  # it is there, as text
    assert len(evil.scripts) == len(plain.scripts) == 3
    assert evil.scripts[1:] == plain.scripts[1:]
    assert EVIL in json.dumps(json.loads(evil.scripts[0]), ensure_ascii=False).replace('\\"', '"')
    assert {tag for tag, _ in evil.elements} == {tag for tag, _ in plain.elements}
    for _, attributes in evil.elements:
        assert not [name for name in attributes if name.startswith("on")]
        assert not (attributes.get("src") or attributes.get("href") or "").startswith(("javascript:", "x"))


def test_the_page_asks_nothing_of_anybody(tmp_path: Path) -> None:
    text = written(subjects_of(with_everything(tmp_path)))
    elements = Elements(text).elements
    assert not [tag for tag, _ in elements if tag in ("link", "iframe", "object", "embed", "form", "base")]
    assert not [a for _, a in elements if "srcset" in a or (a.get("src") or "data:").partition(":")[0] != "data"]
    (policy,) = (a["content"] for _, a in elements if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert policy.startswith("default-src 'none'")
    assert "unsafe-eval" not in policy
    assert "connect-src" not in policy  # default-src holds: nothing is fetched


def test_every_run_is_in_the_table_with_its_line_and_what_differs(tmp_path: Path) -> None:
    runs = with_everything(tmp_path)
    text = written(subjects_of(runs))
    for run in runs:
        assert text.count(run.id) >= 3
        assert f'data-copy="{run.record.line}"' in text
    assert 'data-v="' in text  # numbers are sorted as numbers
    differing = text[text.index('id="differences"') :]
    assert re.search(r"<th[^>]*>position</th><td>rope</td><td>alibi</td>", differing)
    assert "7 of them" in text


def test_a_picture_of_attention_is_taken_in_and_a_link_is_not(tmp_path: Path) -> None:
    run = make_run(tmp_path, status="done")
    other = tmp_path / "secret.png"
    Image.new("RGB", (3, 3), "red").save(other)
    (run.path / "attention-evil.png").symlink_to(other)
    assert "data:image/png" not in written(subjects_of([run]))
    Image.new("RGB", (3, 3), "blue").save(run.path / "attention.png")
    assert written(subjects_of([run])).count("data:image/png") == 1


def test_json_cannot_end_the_script_that_it_is_in() -> None:
    data = {"a": "</script><!-- \u2028"}
    assert "<" not in as_json(data)
    assert json.loads(as_json(data)) == data


def test_markup_escapes_text_and_attributes() -> None:
    assert (
        tag("p", "a<b>&", title='"x"', hidden=True, class_=None)
        == '<p title="&quot;x&quot;" hidden>a&lt;b&gt;&amp;</p>'
    )
    assert '<th scope="row"' not in table(["a"], [], name="<")
    assert 'aria-label="&lt;"' in table(["a"], [["<"]], name="<")


def test_costs_alone_are_a_page_too(tmp_path: Path) -> None:
    run = RunStore(tmp_path).create("profile", "nano", config={"context": 256}, line="ctxlab profile")
    run.measure(*costs(256, 2**26, 0.1), *costs(512, 2**27, 0.2))
    run.finish("done")
    assert [figure.name for figure in figures(subjects_of([run]))] == [
        "profile-memory-by-context",
        "profile-time-by-context",
    ]
