"""The page of some runs: figures, every run in a table, what differs, where the numbers come from, how to do it again.

One file that needs nothing else: its styles, its script and Vega stand in it, and the page may fetch nothing. Everything but the
figures is there without a script, their numbers as tables too.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from ctxlab.records.run import Run
from ctxlab.records.schema import Provenance
from ctxlab.report import vega
from ctxlab.report.figures import SECTIONS, Figure
from ctxlab.report.groups import shown
from ctxlab.report.listing import listed, runs_table
from ctxlab.report.markup import Html, join, table, tag
from ctxlab.report.results import settings
from ctxlab.report.subjects import Subject
from ctxlab.units import format_bytes, format_length, format_seconds

_TEMPLATE, _STYLE, _SCRIPT = "page.html", "page.css", "page.js"
_DETAILS = 60  # runs that are told in full: more are a list, not a page
_ITEMS = 6  # answers of a run that are shown
_NONE = Html("")
# What a browser may do with a page: nothing is fetched, and what is drawn needs no `eval`.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"
_MOST_PICTURE = 4 << 20  # bytes of a picture that is taken into a page


@dataclass(frozen=True)
class Told:
    """A page's inside: its HTML, and the specifications of the figures in it by name, a panel each."""

    main: Html
    figures: dict[str, list[vega.Spec]]


def tell(subjects: Sequence[Subject], figures: Sequence[Figure], *, table_of_runs: Html | None = None) -> Told:
    """What there is to see of some subjects. `table_of_runs`: of all that could be chosen; else it is of the same."""
    runs = list({one.run.id: one.run for one in subjects if one.run is not None}.values())
    parts = [_figures(section, [f for f in figures if f.section == section]) for section in SECTIONS]
    if table_of_runs is None:
        table_of_runs = runs_table([listed(one) for one in subjects], [one.id for one in subjects]).html
    parts += [_attention(runs), _samples(subjects), _section("runs", "Runs", table_of_runs)]
    parts += [_differences(subjects), _provenance(runs), _again(runs)]
    return Told(join(parts), {figure.name: [spec for _, spec in figure.panels] for figure in figures})


def page(told: Told, *, heading: str, facts: Sequence[str], script: str) -> str:
    """The self-contained page. `script` is what draws: `vega.bundle`."""
    policy = f"{_POLICY}; script-src 'unsafe-inline'"
    return fill(told, heading=heading, facts=facts, scripts=[script, file_text(_SCRIPT)], policy=policy)


def fill(
    told: Told, *, heading: str, facts: Sequence[str], scripts: Sequence[str], policy: str | None, nonce: str | None = None,
    controls: Html = _NONE,
) -> str:  # fmt: skip
    """The template with everything in it. `policy` is what the browser may do; `controls` stand above the figures."""
    data = {"figures": told.figures, **themes()}
    inside = {
        "POLICY": tag("meta", http_equiv="Content-Security-Policy", content=policy) if policy else _NONE,
        "CONTROLS": controls,
        "DATA": tag("script", Html(as_json(data)), type="application/json", id="data"),
        "SCRIPTS": join([tag("script", Html(f"\n{text}\n"), nonce=nonce) for text in scripts], "\n"),
        "TITLE": tag("title", heading),
        "STYLE": Html(file_text(_STYLE)),
        "HEADER": join([tag("h1", heading), *(tag("p", fact, class_="soft") for fact in facts)]),
        "MAIN": told.main,
    }
    text = file_text(_TEMPLATE)
    parts = text.split("%%")
    return "".join(inside.get(part, part) for part in parts)


def themes() -> dict[str, Any]:
    """How figures look on light and dark paper, for the script."""
    return {
        "themes": {
            "light": {"config": vega.LIGHT.config(), "swaps": {}},
            "dark": {"config": vega.DARK.config(), "swaps": dict(vega.DARK.swaps)},
        },
        "narrow": vega.AT_THE_END,
    }


def as_json(data: Any) -> str:
    """JSON that may stand in a script element: no text ends the element that it is in."""
    return json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")


def summary(subjects: Sequence[Subject]) -> list[str]:
    """What a page is about, in a line or two: how many runs, how they ended, when, on what."""
    runs = list({one.run.id: one.run for one in subjects if one.run is not None}.values())
    saved = sum(one.run is None for one in subjects)
    statuses = [run.record.status.replace("_", " ") for run in runs]
    counts = ", ".join(f"{statuses.count(status)} {status}" for status in dict.fromkeys(statuses))
    lines = [f"{len(runs)} run{'' if len(runs) == 1 else 's'}: {counts}"] if runs else []
    lines += [f"{saved} file{'' if saved == 1 else 's'} of saved results, without their records"] if saved else []
    times = sorted(run.record.started[:10] for run in runs if run.record.started)
    spent = sum(run.record.wall_seconds or 0 for run in runs)
    if times:
        when = times[0] if times[0] == times[-1] else f"{times[0]} to {times[-1]}"
        lines.append(f"{when}, {format_seconds(spent)} of computing")
    return lines


def _figures(section: str, figures: Sequence[Figure]) -> Html | None:
    if not figures:
        return None
    return _section(section, SECTIONS[section], tag("div", *map(_figure, figures), class_="figures"))


def _figure(figure: Figure) -> Html:
    panels = [
        tag("div", tag("h4", name) if name else None,
            tag("div", class_="plot", role="img", data_figure=figure.name, data_panel=str(n),
                aria_label=f"{figure.heading}{': ' if name else ''}{name}. The numbers are in the table below."))
        for n, (name, _) in enumerate(figure.panels)
    ]  # fmt: skip
    caption = "; ".join(figure.caption)
    return tag(
        "figure", tag("h3", figure.heading), tag("p", f"{caption[:1].upper()}{caption[1:]}.", class_="soft") if caption else None,
        tag("div", *panels, class_="panels many" if len(panels) > 1 else "panels"),
        tag("details", tag("summary", "The numbers"), table(figure.head, figure.rows, name=f"{figure.heading}, in numbers")),
        id=f"figure-{figure.name}", class_="broad" if len(panels) > 2 else None,
    )  # fmt: skip


def _attention(runs: Sequence[Run]) -> Html | None:
    """Pictures of what heads attend to, where somebody has left them in a run's folder."""
    shown = []
    for run in runs:
        for picture in sorted(run.path.glob("attention*.png")):
            if picture.is_symlink() or picture.stat().st_size > _MOST_PICTURE:
                continue
            source = "data:image/png;base64," + base64.b64encode(picture.read_bytes()).decode()
            text = f"what the heads of {run.id} attend to"
            shown.append(tag("figure", tag("h3", text), tag("img", src=source, alt=text), class_="broad"))
    return _section("attention", "Attention", tag("div", *shown, class_="figures")) if shown else None


def _samples(subjects: Sequence[Subject]) -> Html | None:
    """Some answers as they were generated, right and wrong ones."""
    rows = []
    for one in subjects[:_DETAILS]:
        items = [item for item in one.run.items() if item.answer is not None] if one.run is not None else []
        if one.whose and one.own is not None and len(one.own) > 1:
            items = [item for item in items if item.axes.get("run", one.whose) == one.whose]
        wrong, right = ([item for item in items if (item.score >= 0.5) == good] for good in (False, True))
        for item in [*right[: _ITEMS // 2], *wrong[: _ITEMS // 2]]:
            depth = "-" if item.depth is None else f"{item.depth:.0%}"
            wanted = ", ".join(item.wanted)
            rows.append(
                (
                    one.whose or one.id,
                    item.task,
                    format_length(item.context),
                    depth,
                    wanted,
                    item.answer or "",
                    f"{item.score:g}",
                )
            )
    if not rows:
        return None
    head = ("run", "task", "length", "depth", "wanted", "answered", "score")
    text = tag("p", "What was generated: of each run some that were right and some that were wrong.", class_="soft")
    return _section("samples", "Samples", text, table(head, rows, name="Table of samples", keys=7))


def _differences(subjects: Sequence[Subject]) -> Html | None:
    """The settings in which runs differ, a column each; what all have alike can be opened."""
    subjects = [one for one in subjects if one.run is not None]
    flats = [one.settings for one in subjects]
    keys = list(dict.fromkeys(key for flat in flats for key in flat))
    texts = {key: [json.dumps(flat.get(key), sort_keys=True, default=str) for flat in flats] for key in keys}
    differ = [key for key in keys if len(set(texts[key])) > 1]
    same = [(key, shown(subjects[0], key)) for key in keys if key not in differ]
    if not flats or (not differ and not same):
        return None
    parts: list[Html] = []
    if differ:
        rows: dict[tuple[str, ...], list[str]] = {}
        for one in subjects:
            rows.setdefault(tuple(shown(one, key) for key in differ), []).append(one.whose or one.id)
        some = list(rows.items())[:200]
        turned = [[key, *(values[n] for values, _ in some)] for n, key in enumerate(differ)]
        head = ["setting", *(ids[0] if len(ids) == 1 else f"{ids[0]} and {len(ids) - 1} more" for _, ids in some)]
        parts.append(table(head, turned, name="Settings in which runs differ"))
    if same:
        alike = table(("setting", "value"), same, name="Settings that all runs have", keys=2)
        parts.append(tag("details", tag("summary", f"{len(same)} settings that all have alike"), alike))
    return _section("differences", "What differs between their settings", *parts)


def _provenance(runs: Sequence[Run]) -> Html | None:
    """Code, libraries, data and machine: what is the same for all said once."""
    runs = [run for run in runs if run.record.status not in ("waiting", "skipped")]  # they have come from nowhere yet
    found = [_facts(run.record.provenance) for run in runs]
    keys = list(dict.fromkeys(key for facts in found for key in facts))
    rows = []
    for key in keys:
        by_value: dict[str, list[str]] = {}
        for run, facts in zip(runs, found, strict=True):
            by_value.setdefault(facts.get(key, "-"), []).append(run.id)
        for value, ids in by_value.items():
            few = f"{ids[0]} and {len(ids) - 1} more" if len(ids) > 1 else ids[0]
            rows.append((key, value, "all" if len(by_value) == 1 else few))
    if not rows:
        return None
    return _section("provenance", "Provenance", table(("what", "is", "of"), rows, name="Table of provenance", keys=3))


def _facts(where: Provenance) -> dict[str, str]:
    machine = where.hardware
    memory = (
        f", {format_bytes(machine['memory_bytes'])}" if isinstance(machine.get("memory_bytes"), int | float) else ""
    )
    said = {
        "ctxlab": where.ctxlab,
        "commit": where.commit or "",
        "python": where.python,
        "libraries": ", ".join(f"{name} {version}" for name, version in where.libraries.items()),
        "machine": f"{machine.get('processor', '')}, {machine.get('usable_cores', '?')} cores{memory}"
        if machine
        else "",
        "system": str(machine.get("system", "")),
        "host": str(machine.get("host", "")),
        "threads": str(where.threads or ""),
        "device": where.device or "",
        "precision": where.precision or "",
        "memory is": where.memory_source or "",
        "data": _data(where.data),
        "plugins": ", ".join(f"{path} {digest[:12]}" for path, digest in where.plugins),
    }
    return {key: value for key, value in said.items() if value}


def _data(data: dict[str, Any]) -> str:
    flat = settings(data)
    return ", ".join(
        f"{key} {value[:12] if 'sha' in key and isinstance(value, str) else value}" for key, value in flat.items()
    )


def _again(runs: Sequence[Run]) -> Html | None:
    """The line that does each run again, and where its record is."""
    if not runs:
        return None
    lines = []
    for run in runs[:_DETAILS]:
        record = run.record
        facts = f"{record.status.replace('_', ' ')}; seed {record.provenance.seed if record.provenance.seed is not None else '-'}"
        name = tag("dt", run.id, tag("small", facts))
        text = tag("code", record.line, tabindex="0")
        button = tag(
            "button",
            "Copy",
            type="button",
            class_="copy",
            data_copy=record.line,
            aria_label=f"Copy the line of {run.id}",
        )
        lines.append(join([name, tag("dd", text, button)]))
    more = (
        [tag("p", f"and {len(runs) - _DETAILS} more: ctxlab runs show RUN", class_="soft")]
        if len(runs) > _DETAILS
        else []
    )
    return _section("again", "To do it again", tag("dl", *lines, class_="again"), *more)


def _section(name: str, heading: str, *children: Html) -> Html:
    return tag("section", tag("h2", heading, id=f"{name}-head"), *children, id=name, aria_labelledby=f"{name}-head")


def file_text(name: str) -> str:
    """A file beside this one."""
    return Path(str(files("ctxlab.report").joinpath(name))).read_text(encoding="utf-8")
