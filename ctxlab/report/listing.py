"""The table of runs: a row each, made of plain values, so that thousands are filtered and sorted while one types."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ctxlab.records.schema import METRICS
from ctxlab.report.groups import shown, telling
from ctxlab.report.markup import Html, cell, join, tag
from ctxlab.report.results import by_context, number, training_speed
from ctxlab.report.subjects import Subject
from ctxlab.units import format_count, format_length, format_seconds

_SETTINGS = 6  # columns that are settings


@dataclass(frozen=True)
class Listed:
    """A row of the table of runs: plain values, so that thousands are made in no time."""

    id: str
    status: str
    settings: Mapping[str, Any]
    results: Mapping[str, float]  # at the trained context
    trained: int | None = None
    whose: str | None = None
    reason: str = ""
    parameters: int | None = None
    seconds: float | None = None
    started: str = ""
    note: str = ""


def listed(one: Subject) -> Listed:
    """A subject as a row."""
    rows = by_context([m for m in one.measurements if not {"from", "task"} & m.axes.keys()]).get(one.trained or -1, {})
    results = {name: m.value for name, m in rows.items() if m.value is not None}
    answers = [m.value for m in one.measurements if m.name == "accuracy" and m.value is not None]
    if answers:
        results["accuracy"] = statistics.fmean(answers)
    if one.run is None:
        return Listed(one.id, "saved", one.settings, results, one.trained)
    speed = training_speed(one.run) if one.own is None else None
    if speed is not None:
        results["tokens_per_second"] = speed
    record = one.run.record
    return Listed(
        one.id, record.status, one.settings, results, one.trained, one.whose, record.reason, record.parameters.get("all"),
        record.wall_seconds, record.started or "", noted(record.tags, record.note),
    )  # fmt: skip


def noted(tags: Sequence[str], note: str) -> str:
    """What somebody has said of a run."""
    return " ".join([*(f"#{word}" for word in tags), note]).strip()


_Cell = tuple[str, float | None]  # its text, and the number that it is sorted by
_RESULTS = {
    "perplexity": "perplexity", "bits_per_byte": "bits/byte", "accuracy": "accuracy", "peak_memory_bytes": "memory",
    "step_seconds": "step", "tokens_per_second": "tokens/s",
}  # fmt: skip
_NOTHING: _Cell = ("-", None)


@dataclass(frozen=True)
class Table:
    """The table of runs and, of all that it could show, the ids that its filter finds, in its order."""

    html: Html
    found: list[str]


def runs_table(
    rows: Sequence[Listed],
    chosen: Sequence[str],
    *,
    words: str = "",
    sort: str = "",
    most: int | None = None,
    differ: Sequence[str] | None = None,
) -> Table:
    """The runs that have all of these words, sorted by a column (`perplexity`, `started:descending`), at most so many.

    Those that are chosen come first where nothing else is said. Beneath a run's name is why it has no results.
    """
    keys = [key for key in telling(rows, differ) if key != "run" and not key.startswith("eval.")][:_SETTINGS]
    if len({repr(row.settings.get("seed")) for row in rows}) > 1:
        keys.append("seed")
    heads = ["status", *(key.rpartition(".")[2] if len(key) > 18 else key for key in keys), "at", *_RESULTS.values()]
    heads += ["parameters", "took", "started", "note"]
    cells = {n: _cells_of(row, keys) for n, row in enumerate(rows)}
    kept = [n for n in range(len(heads)) if any(texts[n][0] not in ("-", "") for texts in cells.values())]
    picked = set(chosen)
    asked = words.lower().split()
    order = (
        [n for n, row in enumerate(rows) if all(word in _text(row, cells[n]) for word in asked)]
        if asked
        else list(cells)
    )
    column, _, direction = sort.partition(":")
    if column == "run":
        order.sort(key=lambda n: rows[n].id, reverse=direction == "descending")
    elif column in heads:
        place = heads.index(column)
        having = [n for n in order if cells[n][place][0] not in ("-", "")]
        having.sort(key=lambda n: _rank(cells[n][place]), reverse=direction == "descending")
        order = having + [n for n in order if cells[n][place][0] in ("-", "")]
    elif len(picked) < len(rows):
        order.sort(key=lambda n: rows[n].id not in picked)
    shown_rows = order[:most]

    def titled(name: str, **more: str) -> Html:
        is_sorted = (direction or "ascending") if name == column else "none"
        return tag("th", tag("button", name, type="button"), scope="col", aria_sort=is_sorted, **more)

    head = tag("tr", titled("run", class_="word"), *(titled(heads[n]) for n in kept))
    body = []
    for n in shown_rows:
        row = rows[n]
        name = [
            row.id if not row.whose else f"{row.id} of {row.whose}",
            tag("small", row.reason) if row.reason else None,
        ]
        body.append(tag("tr", tag("th", *name, scope="row", class_="word"), *(cell(*cells[n][k]) for k in kept), data_run=row.id,
                        class_="chosen" if row.id in picked and len(picked) < len(rows) else None))  # fmt: skip
    find = tag(
        "label", "Filter ",
        tag("input", type="search", id="filter", placeholder="alibi done", autocomplete="off", value=words or None),
    )  # fmt: skip
    first = f", the first {len(shown_rows)} shown" if len(shown_rows) < len(order) else ""
    count = tag("output", f"{len(order)} of {len(rows)}{first}", id="found", for_="filter")
    wide = tag(
        "div", tag("table", tag("thead", head), tag("tbody", *body), id="runs-table"), class_="wide tall", tabindex="0",
        role="region", aria_label="Table of runs",
    )  # fmt: skip
    note = tag(
        "p", "Results at the context that is named under at: the trained one. A head sorts by its column.", class_="soft"
    )  # fmt: skip
    return Table(join([note, tag("p", find, " ", count, class_="find"), wide]), [rows[n].id for n in order])


def _text(row: Listed, cells: Sequence[_Cell]) -> str:
    """What a filter looks for its words in."""
    return "\n".join([row.id, row.whose or "", row.reason, *(text for text, _ in cells)]).lower()


def _rank(one: _Cell) -> tuple[bool, float, str]:
    """Numbers by their value, before texts by the alphabet."""
    text, value = one
    return value is None, value or 0.0, text


def _cells_of(row: Listed, keys: Sequence[str]) -> list[_Cell]:
    cells: list[_Cell] = [(row.status.replace("_", " "), None)]
    for key in keys:
        value = row.settings.get(key)
        plain = isinstance(value, int | float) and not isinstance(value, bool)
        cells.append((shown(row, key), value if plain else None))
    cells.append(_NOTHING if row.trained is None else (format_length(row.trained), row.trained))
    for name in _RESULTS:
        found = row.results.get(name)
        cells.append(_NOTHING if found is None else (number(found, METRICS[name].unit, name=name), found))
    cells.append(_NOTHING if row.parameters is None else (format_count(row.parameters), row.parameters))
    cells.append(_NOTHING if row.seconds is None else (format_seconds(row.seconds), row.seconds))
    cells.append((row.started[:16].replace("T", " ") or "-", None))
    cells.append((row.note, None))
    return cells
