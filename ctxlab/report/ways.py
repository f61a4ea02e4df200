"""Every way in which a text was scored: tables of one run, several runs in pairs, and what context was worth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.text import Text

from ctxlab.records.run import Run, axes_key
from ctxlab.records.schema import DocumentSums, Measurement
from ctxlab.report.grid import Grid
from ctxlab.report.plots import position_chart
from ctxlab.report.results import cell, paired, signed, way_of
from ctxlab.units import format_length


def ways(measurements: Sequence[Measurement]) -> list[dict[str, Any]]:
    """The ways in which a text was scored at some context, in the order in which they were."""
    found = {
        axes_key(way): way
        for m in measurements
        if m.name == "nats_per_token" and m.context is not None
        for way in (way_of(m.axes),)
    }
    return list(found.values())


def way_text(way: Mapping[str, Any]) -> str:
    """A way of scoring in words."""
    text = "windows that follow one another"
    if "stride" in way:
        text = f"windows that move on by {format_length(way['stride'])}"
    if "sinks" in way:
        text = f"streaming over a moving cache, {way['sinks']} sinks in it"
    return f"{text}, bos first" if way.get("bos") else text


def side_by_side(measurements: Sequence[Measurement], runs: Sequence[Run]) -> list[Grid]:
    """Of each way of scoring: nats per token of several runs by context, and beneath what each has more than the first.

    A measurement's axis `run` says whose it is. Differences are of the same targets, with 95% intervals paired over
    documents; where runs did not score the same targets there are none, and bits per byte stand beside.
    """
    grids = []
    for way in ways(measurements):
        rows = {(m.axes.get("run"), m.context, m.name): m for m in measurements if way_of(m.axes) == way}
        contexts = sorted({n for _, n, name in rows if name == "nats_per_token" and n is not None})
        titles = list(map(format_length, contexts))
        compared = {run.id: [rows.get((run.id, n, "nats_per_token")) for n in contexts] for run in runs[1:]}
        paired_with_first = any(m is not None and "less" in m.facts for of in compared.values() for m in of)
        units = {"nats_per_token": "nats/token"} | ({} if paired_with_first else {"bits_per_byte": "bits/byte"})
        for name, unit in units.items():
            grid = Grid(["run", *titles], heading=f"{unit} by context, {way_text(way)}")
            for run in runs:
                grid.add([run.id, *(cell(rows.get((run.id, n, name)), interval=True) for n in contexts)])
            grids.append(grid)
        if paired_with_first:
            grid = Grid(["run", *titles], heading=f"less {runs[0].id}, on the same targets")
            for whose, of in compared.items():
                grid.add([whose, *(_less(m) for m in of)])
            grids.append(grid)
    return grids


def _less(m: Measurement | None) -> str:
    if m is None or "less" not in m.facts:
        return "-"
    return signed(m.facts["less"], m.facts.get("less_low"), m.facts.get("less_high"))


def difference_cell(ours: DocumentSums | None, theirs: DocumentSums | None) -> str:
    """By how many nats per token one is above the other, with half of the interval paired over documents."""
    if ours is None or theirs is None or (ours.names, ours.targets) != (theirs.names, theirs.targets):
        return "-"
    return signed((sum(ours.nats) - sum(theirs.nats)) / sum(ours.targets), *(paired(ours, theirs) or ()))


def position_grid(first: Run, second: Run) -> Grid | None:
    """nats per token by index of two runs, and the second less the first in pairs; None where one was not so scored."""
    ours, theirs = (
        {(d.axes["from"], d.axes["to"]): d for d in run.documents() if d.axes.keys() == {"from", "to"}}
        for run in (first, second)
    )
    both = [bounds for bounds in ours if bounds in theirs]
    if not both:
        return None
    grid = Grid(["index", first.id, second.id, "difference"], heading="nats/token by tokens seen in the window")
    for bounds in both:
        pair = ours[bounds], theirs[bounds]
        values = (f"{sum(d.nats) / sum(d.targets):.3f}" for d in pair)
        grid.add([_indices(*bounds), *values, difference_cell(pair[1], pair[0])])
    return grid


def show_context_use(measurements: Sequence[Measurement], trained: int | None, console: Console) -> None:
    """Loss by position as a picture, and a line for each number that is made of it and of the lengths."""
    rows = [m for m in measurements if "from" in m.axes and m.value is not None]
    curves: dict[str, list[tuple[int, float]]] = {}
    for m in rows:
        assert m.value is not None
        curves.setdefault(m.axes.get("run", "nats/token"), []).append((m.axes["to"], m.value))
    chart = position_chart(curves, trained=trained)
    if chart is not None:
        console.print()
        console.print(chart)
    lines = context_notes(measurements)
    if rows:
        lines.insert(
            0, f"by position: {rows[0].split} split, windows of {format_length(rows[0].axes['length'])} that follow one another, "
            f"{sum(m.n_targets or 0 for m in rows if m.axes.get('run') == rows[0].axes.get('run')):,} tokens",
        )  # fmt: skip
    for line in lines:
        console.print(Text(line, style="dim"))


def context_notes(measurements: Sequence[Measurement]) -> list[str]:
    """What the numbers say of context, a line each."""
    lines = []
    for m in measurements:
        if m.name in _TEXTS and m.value is not None:
            whose = f"{m.axes['run']}: " if "run" in m.axes else ""
            lines.append(whose + _TEXTS[m.name](m))
    group = [m for m in measurements if m.name == "relative_effective_context" and m.value is not None]
    for whose in dict.fromkeys(m.axes["run"] for m in group):
        reached = ", ".join(f"{cell(m)} ({m.axes['top']:.0%})" for m in group if m.axes["run"] == whose)
        lines.append(
            f"{whose}: relative effective context {reached} on the hardest so many tokens, among {len(group[0].facts['group'])} "
            f"runs at {_list(group[0].facts['lengths'])}"
        )
    words: dict[str, list[str]] = {}
    for m in measurements:
        if m.name == "word_perplexity" and m.context is not None and m.value is not None and not way_of(m.axes):
            words.setdefault(m.axes.get("run", ""), []).append(f"{cell(m)} at {format_length(m.context)}")
    for whose, texts in words.items():
        lines.append(f"{whose}{': ' if whose else ''}perplexity per word of the text: {', '.join(texts)}")
    return lines


def _in_context(m: Measurement) -> str:
    scaled = f" (50 and 500 of {m.facts['scaled_from']}, scaled to the context)" if "scaled_from" in m.facts else ""
    return (
        f"in-context learning score {cell(m, interval=True)} nats/token: index {m.axes['late']} less index "
        f"{m.axes['early']}{scaled} in windows of {format_length(m.axes['length'])}"
    )


def _extrapolation(m: Measurement) -> str:
    assert m.value is not None
    longest = m.facts["longest"] == m.value * m.axes["trained"]
    changes = ", ".join(
        f"{signed(change['change'], change['low'], change['high'])} at {format_length(int(length))}"
        for length, change in m.facts["changes"].items()
    )
    or_more = " or more" if longest and changes else ""
    return (
        f"extrapolation ratio {m.value:g}{or_more} (ε = {m.axes['epsilon']:g} nats): the last {m.axes['last']} tokens of a "
        f"window, against the same at {format_length(m.axes['trained'])}"
        + (f": {changes}" if changes else "; no longer window was scored")
    )


def _effective(m: Measurement) -> str:
    return (
        f"effective context {format_length(int(m.value or 0))}: the shortest of {_list(m.facts['lengths'])} within 1% of the "
        f"perplexity at the longest, {way_text(way_of(m.axes))}"
    )


_TEXTS = {
    "in_context_score": _in_context, "extrapolation_ratio": _extrapolation, "effective_context": _effective,
}  # fmt: skip


def _list(lengths: Sequence[int]) -> str:
    return ", ".join(map(format_length, lengths))


def _indices(first: int, last: int) -> str:
    return str(first) if first == last else f"{first}-{last}"
