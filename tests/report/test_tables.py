"""The closing screens, as text at 80 and at 120 columns."""

from __future__ import annotations

import io
import shlex
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from ctxlab.config.overrides import split
from ctxlab.evaluation.perplexity import DocumentScores
from ctxlab.records.schema import Measurement, TaskItem
from ctxlab.report.screens import difference_table, show_difference, show_run
from ctxlab.report.tables import (
    comparison_table,
    cost_tables,
    counting_notes,
    footnotes,
    lengths_table,
    show_evaluation,
    show_sweep,
    show_training,
    way_table,
)
from tests.records.builders import costs, make_run, missing, result, scores
from tests.report.builders import CURVES, same_ids, text_of, trained_run, written


@pytest.fixture(autouse=True)
def _ids(monkeypatch: pytest.MonkeyPatch) -> None:
    same_ids(monkeypatch)
    monkeypatch.setenv("TZ", "UTC")


def test_the_table_of_lengths_fits_80_columns() -> None:
    rows = [
        *scores(128, 3.9), *scores(256, 3.8), *missing(512, "undefined", "the learned table has 256 rows"),
        *missing(1024, "no_document", "fewer than 8 test documents have 1025 tokens"),
        *costs(128, 100 * 2**20, 0.0256), *costs(256, 200 * 2**20, 0.0512), *costs(512, 2**30, 0.5),
        *(
            result(name, None, 1024, status="out_of_memory", reason="killed by the system")
            for name in ("peak_memory_bytes", "step_seconds")
        ),
    ]  # fmt: skip
    assert text_of(lengths_table(rows, 256)) == (
        "context  trained    nats/token  perplexity     bits/byte         memory     step\n"
        "128         0.5x  3.900 ±0.050       49.40  1.876 ±0.020        100 MiB  25.6 ms\n"
        "256           1x  3.800 ±0.050       44.70  1.827 ±0.020        200 MiB  51.2 ms\n"
        "512           2x     undefined           -             -          1 GiB   500 ms\n"
        "1k            4x       no text           -             -  out of memory        -"
    )
    assert footnotes(rows) == [
        "test split, non-overlapping windows: the same 190,000 tokens of 9 documents at every context, "
        "each scored once; ± is 95% over documents",
        "memory and step: one training step, batch 1; peak over the idle process (VmHWM), median time",
        "undefined at 512: the learned table has 256 rows",
        "no text at 1k: fewer than 8 test documents have 1025 tokens",
        "out of memory at 1k: killed by the system",
    ]


def test_the_trained_row_is_bold_in_a_terminal_and_plain_in_a_pipe() -> None:
    table = lengths_table([*scores(128, 3.9), *scores(256, 3.8)], 256)
    terminal = Console(width=80, file=io.StringIO(), force_terminal=True, color_system="standard", no_color=False)
    terminal.print(table)
    lines = written(terminal).splitlines()
    assert ["\x1b[1m" in line for line in lines] == [True, False, True]
    assert "\x1b" not in text_of(table)


def test_a_comparison_stacks_at_80_columns_and_loses_nothing(tmp_path: Path) -> None:
    runs = [trained_run(tmp_path, name) for name in CURVES]
    assert text_of(comparison_table(runs)) == (
        "nats/token by context, trained at 256\n"
        "position    128    256        512         1k         2k  rise 1x-4x  bits/byte\n"
        "rope      3.900  3.800      4.100      4.500      4.900      +0.700      1.827\n"
        "alibi     3.800  3.750      3.740      3.740      3.730      -0.010      1.803\n"
        "learned   3.950  3.900  undefined  undefined  undefined   undefined      1.876\n"
        "\n"
        "position   memory     step  run\n"
        "rope      164 MiB  51.2 ms  nano-rope-256-aaaa\n"
        "alibi     164 MiB  51.2 ms  nano-alibi-256-aaab\n"
        "learned   164 MiB  51.2 ms  nano-learned-256-aaac"
    )
    wide = text_of(comparison_table(runs), width=120).splitlines()
    assert len(wide) == 2 + len(runs)
    assert wide[2].split() == [
        "rope", "3.900", "3.800", "4.100", "4.500", "4.900", "+0.700", "1.827", "164", "MiB", "51.2", "ms",
        "nano-rope-256-aaaa",
    ]  # fmt: skip


def test_a_comparison_says_how_runs_ended_when_some_did_not(tmp_path: Path) -> None:
    runs = [trained_run(tmp_path, name, with_costs=False) for name in ("rope", "alibi")]
    dead = make_run(tmp_path, status="waiting", config={"position": {"name": "t5"}})
    dead.finish("out_of_memory", "too big")
    table = text_of(comparison_table([*runs, dead], metric="perplexity"), width=120).splitlines()
    assert table[1].split()[:2] == ["position", "status"]
    assert table[2].split()[:2] == ["rope", "done"]
    assert table[4].split() == ["t5", "out_of_memory", *"-" * 7, "nano-t5-256-aaac"]
    assert table[2].split()[-2] == "44.70"


def test_runs_that_differ_in_nothing_are_told_by_id(tmp_path: Path) -> None:
    runs = [trained_run(tmp_path, "alibi", with_costs=False) for _ in range(2)]
    assert [line.split()[0] for line in text_of(comparison_table(runs)).splitlines()[1:]] == [
        "run", "nano-alibi-256-aaaa", "nano-alibi-256-aaab",
    ]  # fmt: skip


def test_lines_to_type_next_say_where_a_run_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = trained_run(tmp_path / "other runs")
    for runs, start in ((None, f"CTXLAB_RUNS='{run.path.parent}' ctxlab"), (str(run.path.parent), "ctxlab")):
        monkeypatch.delenv("CTXLAB_RUNS", raising=False)
        if runs is not None:
            monkeypatch.setenv("CTXLAB_RUNS", runs)
        console = Console(width=80, file=io.StringIO(), color_system=None)
        show_training(run, console)
        assert all(line.strip().startswith(start) for line in written(console).splitlines()[-3:])


def test_what_train_ends_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CTXLAB_RUNS", str(tmp_path / "runs"))
    run = trained_run(tmp_path / "runs")
    console = Console(width=80, file=io.StringIO(), color_system=None)
    show_training(run, console)
    text = written(console)
    lines = text.splitlines()
    assert lines[1] == ("nano-rope-256: 3.5M parameters (3M without embeddings), fp32 on cpu, 3:20 min")
    assert lines[2].split() == ["context", "trained", "nats/token", "perplexity", "bits/byte", "memory", "step"]
    assert [line.split()[0] for line in lines[3:8]] == ["128", "256", "512", "1k", "2k"]
    beside = next(line for line in lines if "nats/token by context" in line)
    assert "memory of a training step by context" in beside
    assert lines[-4].startswith(f"run nano-rope-256-aaaa in {run.path}")
    assert [line.split("#")[0].strip() for line in lines[-3:]] == [
        'ctxlab generate nano-rope-256-aaaa "To be, or not to be"',
        "ctxlab train -m model=nano position=rope,alibi context=256,512",
        "ctxlab runs show nano-rope-256-aaaa",
    ]
    assert (run.path / "loss_by_length.png").read_bytes().startswith(b"\x89PNG")
    tabular = [line for line in lines[:-4] if not line.startswith("run ")]
    assert max(map(len, tabular)) <= 80


SENTENCES = [
    (["Der Hund schläft heute gar nicht.", "Gut!", "L'un dit: \"c'est $5 `là` \\ !\"", "Où est \x1b[2J-il ?"], 2),
    (["Wo ist er denn heute?", "- Hier bin ich!"], 1),
    (["Wo ist er denn heute?", "x = y"], 1),
    (["你好", "我不会说法语。"], 0),
    ([], None),
]


@pytest.mark.parametrize(("sentences", "chosen"), SENTENCES)
def test_a_translator_is_given_a_sentence_of_its_test_set_next(
    sentences: list[str], chosen: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Typed into a shell, it is the sentence, to be translated as the test set was."""
    monkeypatch.setenv("CTXLAB_RUNS", str(tmp_path))
    run = make_run(tmp_path, status="done", config={"data": {"name": "parallel", "path": "some.tsv"}})
    run.measure(
        Measurement(name="bleu", value=30.0, unit="1", split="test", facts={"num_beams": 4, "length_penalty": 0.6})
    )
    run.write_items(
        [
            TaskItem(task="translation", context=9, item=number, score=0.5, wanted=(sentence, "wanted"), answer="said")
            for number, sentence in enumerate(sentences)
        ]
    )
    console = Console(width=80, file=io.StringIO(), color_system=None)
    show_training(run, console)
    words = shlex.split(written(console).splitlines()[-3].partition("  # ")[0])
    line = split("generate", words[2:])
    assert words[:2] == ["ctxlab", "generate"]
    assert line.selectors == {"run": (run.id,)}
    assert line.free_text == {"prompt": "a sentence" if chosen is None else sentences[chosen]}
    assert line.overrides == ("decoding.num_beams=4",)


def test_what_a_sweep_ends_with(tmp_path: Path) -> None:
    runs = [trained_run(tmp_path, name) for name in CURVES]
    console = Console(width=120, file=io.StringIO(), color_system=None)
    show_sweep(runs, console, metric="bits_per_byte")
    text = written(console)
    assert "bits/byte, memory and step at the trained context" in text
    assert "undefined at 512, 1k, 2k: the learned table has 256 rows" in text
    assert "±" not in text  # no interval is shown, so none is explained
    assert [line.split()[-1] for line in text.splitlines() if line.endswith(("● rope", "■ alibi", "▲ learned"))] == [
        "rope", "learned", "alibi",
    ]  # fmt: skip


def test_what_eval_of_one_and_of_several_runs_ends_with(tmp_path: Path) -> None:
    parents = [trained_run(tmp_path, name) for name in ("rope", "alibi")]
    again = make_run(tmp_path, stem="eval-one", status="waiting")
    again.measure(*scores(256, 3.5))
    console = Console(width=100, file=io.StringIO(), color_system=None)
    show_evaluation(again, parents[:1], console)
    assert written(console).splitlines()[:3] == [
        "nano-rope-256-aaaa, evaluated again",
        "context  trained    nats/token  perplexity     bits/byte",
        "256           1x  3.500 ±0.050       33.12  1.683 ±0.020",
    ]
    both = make_run(tmp_path, stem="eval-both", status="waiting")
    for parent, nats in zip(parents, (3.5, 3.25), strict=True):
        both.measure(*(m.model_copy(update={"axes": {"run": parent.id}}) for m in scores(512, nats)))
    console = Console(width=100, file=io.StringIO(), color_system=None)
    show_evaluation(both, parents, console)
    assert written(console).splitlines()[:6] == [
        "nats/token by context, windows that follow one another",
        "run                           512",
        "nano-rope-256-aaaa   3.500 ±0.050",
        "nano-alibi-256-aaab  3.250 ±0.050",
        "bits/byte by context, windows that follow one another",
        "run                           512",
    ]


def test_one_run_shown(tmp_path: Path) -> None:
    run = trained_run(tmp_path, tags=["long"], note="why", experiment="extrapolation")
    for step in range(1, 30):
        run.log({"split": "train", "step": step, "tokens": 4096 * step, "seconds": 1.0, "loss": 7.0 - step / 10})
    child = make_run(tmp_path, stem="eval-it", status="waiting", parent=run.id)
    console = Console(width=100, file=io.StringIO(), color_system=None)
    show_run(run, [run, child], console)
    lines = written(console).splitlines()
    said = dict(line.split(maxsplit=1) for line in lines[2:10])
    assert said["run"] == run.id
    assert said["status"] == "done"
    assert said["started"] == "2026-11-24 15:00, 3:20 min"
    assert (said["tags"], said["note"], said["experiment"]) == ("long", "why", "extrapolation")
    assert any(line.split() == ["followed", "by", child.id] for line in lines)
    assert "loss by tokens seen (nats/token)" in lines
    assert any(line.split() == ["position", "rope"] for line in lines[lines.index("settings") :])


def test_two_runs_compared(tmp_path: Path) -> None:
    rope, alibi = (trained_run(tmp_path, name) for name in ("rope", "alibi"))
    lines = text_of(difference_table(rope, alibi)).splitlines()
    rows = {line.split("  ")[0]: line.split() for line in lines[2:]}
    assert rows["nats/token at 256"][-3:] == ["3.800", "3.750", "-0.050"]
    assert rows["memory at 256"][-1] == "+0.0%"
    console = Console(width=80, file=io.StringIO(), color_system=None)
    show_difference([rope, alibi], console)
    assert written(console).splitlines()[:3] == [
        "settings that differ",
        "setting   nano-rope-256-aaaa  nano-alibi-256-aaab",
        "position  rope                alibi",
    ]


def test_three_runs_compared_are_a_comparison(tmp_path: Path) -> None:
    console = Console(width=120, file=io.StringIO(), color_system=None)
    show_difference([trained_run(tmp_path, name) for name in CURVES], console)
    assert "rise 1x-4x" in written(console)


def test_runs_that_measured_cost_alone_are_compared_at_every_context(tmp_path: Path) -> None:
    runs = []
    for position, factor in (("rope", 1.0), ("t5", 1.5)):
        run = make_run(tmp_path, config={"position": {"name": position}}, status="waiting")
        run.measure(*costs(1024, factor * 2**30, 0.5 * factor), *costs(2048, factor * 2**31, factor))
        run.update(status="done")
        runs.append(run)
    ids = [run.id for run in runs]
    memory, seconds = cost_tables(runs)
    assert text_of(memory, width=100).splitlines() == [
        "peak memory of a step by context",
        "position               1k             2k  run",
        f"rope                1 GiB          2 GiB  {ids[0]}",
        f"t5        1.5 GiB (1.50x)  3 GiB (1.50x)  {ids[1]}",
    ]
    assert text_of(seconds, width=100).splitlines()[-1].split() == [
        "t5",
        "750",
        "ms",
        "(1.50x)",
        "1.5",
        "s",
        "(1.50x)",
        ids[1],
    ]


def counted(nats: float, bits: float, difference: float, **axes: Any) -> list[Measurement]:
    """What `eval=ngram` leaves of one run at 2,048 tokens."""
    facts = {
        "difference": difference, "difference_low": difference - 0.1, "difference_high": difference + 0.1,
        "difference_context": 2048,
    }  # fmt: skip
    axes = {"baseline": "ngram", **axes}
    common: dict[str, Any] = {"protocol": "modified Kneser-Ney, order 5", "axes": axes, "facts": facts}
    return [
        Measurement(name="nats_per_token", value=nats, unit="nats/token", **common),
        Measurement(name="bits_per_byte", value=bits, unit="bits/byte", **common),
    ]


def test_counting_is_said_beneath_the_table_with_every_runs_distance_from_it() -> None:
    said = "modified Kneser-Ney, order 5, on the same tokens: 3.451 nats/token, 1.985 bits/byte"
    rows = counted(3.451, 1.985, 0.158)
    assert counting_notes([("the run", rows)]) == [f"{said}; the run at 2k is 0.158 ±0.100 above it"]
    other = counted(3.451, 1.985, -0.02)
    assert counting_notes([("rope", rows), ("alibi", other)]) == [
        f"{said}; rope at 2k is 0.158 ±0.100 above it; alibi at 2k is 0.020 ±0.100 below it"
    ]
    apart = counting_notes([("bytes", counted(1.1, 1.5, 0.2)), ("pieces", rows)])
    assert [line.split(": ")[1].split(" is")[0] for line in apart] == [
        "1.100 nats/token, 1.500 bits/byte; bytes at 2k", "3.451 nats/token, 1.985 bits/byte; pieces at 2k",
    ]  # fmt: skip
    together = counted(1.1, 1.5, 0.2, run="a") + counted(3.451, 1.985, 0.1, run="b")  # one record of two runs
    assert [line.split(": ")[1].split(" is")[0] for line in counting_notes([("the run", together)])] == [
        "1.100 nats/token, 1.500 bits/byte; a at 2k", "3.451 nats/token, 1.985 bits/byte; b at 2k",
    ]  # fmt: skip


def test_compared_runs_have_rows_of_their_own_for_overlapping_windows_and_counting(tmp_path: Path) -> None:
    """Sums by document are kept of windows side by side alone: no other row has an interval from them."""
    runs = []
    for name, shift in (("rope", 0.0), ("alibi", -0.5)):
        run = make_run(tmp_path, config={"position": {"name": name}})
        sums = DocumentScores(["a", "b"], [400.0 + shift * 100, 300.0 + shift * 90], [100, 100], [250, 250])
        run.write_documents({64: sums})
        run.measure(
            result("nats_per_token", 3.5 + shift, 64, split="test"),
            result("nats_per_token", 3.2 + shift, 64, split="test", axes={"stride": 16}),
            *counted(3.0, 1.7, 0.5),
        )
        runs.append(run)
    lines = {row[0]: row[3] for row in difference_table(*runs).rows}
    assert list(lines) == [
        "nats/token, ngram", "nats/token at 64", "nats/token at 64, windows that move on by 16", "bits/byte, ngram",
    ]  # fmt: skip
    assert lines["nats/token at 64"].startswith("-0.500 ±")
    assert lines["nats/token at 64, windows that move on by 16"] == "-0.500"
    assert lines["nats/token, ngram"] == "+0.000"


def test_overlapping_windows_have_a_table_of_their_own() -> None:
    def row(value: float, **more: Any) -> Measurement:
        return Measurement(name="nats_per_token", value=value, unit="nats/token", context=64, **more)

    facts = {"difference": -0.25, "difference_low": -0.3, "difference_high": -0.2}
    rows = [row(4.0), row(3.75, axes={"stride": 16}, facts=facts)]
    assert [row[-1] for row in lengths_table(rows, None).rows] == ["4.000"]
    assert [list(row) for row in way_table(rows, {"stride": 16}).rows] == [["64", "3.750", "-0.250 ±0.050"]]
