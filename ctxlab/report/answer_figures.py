"""Figures of answers: the share that is right by length, and by depth and length."""

from __future__ import annotations

import statistics
from dataclasses import replace

from ctxlab.records.schema import Measurement
from ctxlab.report import vega
from ctxlab.report.drawing import ANSWERS, Drawing, Figure, plain, slug, trained_at, with_interval
from ctxlab.report.groups import Group, averaged
from ctxlab.report.subjects import Subject
from ctxlab.report.vega import Axis
from ctxlab.units import format_length


def answers(drawing: Drawing, task: str) -> Figure | None:
    """Lines by length with what chance gives, or dots in rows where each run was asked at one length."""
    series = []
    for group in drawing.groups:
        each = [_by_length(one, task) for one in group.members]
        series.append((group, averaged(each)))
    chances = [
        m.facts["chance"]
        for group in drawing.groups
        for one in group.members
        for m in one.measurements
        if m.axes.get("task") == task and isinstance(m.facts.get("chance"), float)
    ]
    name = f"{slug(task)}-by-length"
    chance = [(max(chances), f"chance {max(chances):.2g}")] if chances and max(chances) > 0.005 else []
    figure = drawing.lines(
        name, ANSWERS, f"{task}: share of right answers by length", series,
        Axis("length (tokens, log scale)", "length", 2), Axis("share of right answers"),
        x_text=lambda x: format_length(int(x)), y_text=lambda y: f"{y:.3f}", caption=["more is better"], marks=trained_at,
        levels=chance,
    )  # fmt: skip
    if figure is not None:
        return figure
    rows = [
        (group.label, f"at {format_length(int(p.x))}", p, with_interval(p, lambda y: f"{y:.3f}"))
        for group, points in series
        for p in points
    ]
    dotted = drawing.dots(
        name,
        f"{task}: share of right answers",
        rows,
        Axis("share of right answers"),
        ["more is better"],
        falling=True,
    )
    return None if dotted is None else replace(dotted, section=ANSWERS)


def depths(drawing: Drawing, task: str) -> Figure | None:
    """A map a group: how long the text was, and where in it the answer stood."""
    panels, table = [], []
    for group in drawing.groups[:24]:
        cells = _cells(group, task)
        if cells:
            spec = vega.score_map(cells, across="length (tokens)", down="depth of the answer (%)")
            panels.append((group.label, spec))
            table += [(group.label, format_length(a), f"{d:g}%", text) for a, d, _, text in cells]
    if not panels:
        return None
    return Figure(
        drawing.name(f"{slug(task)}-by-depth"), ANSWERS, f"{task}: share of right answers by depth and length{drawing.said}",
        ("where in the text the answer stands, and how long the text is",), tuple(panels),
        ("what", "length", "depth", "share right"), tuple(table),
    )  # fmt: skip


def _by_length(one: Subject, task: str) -> list[tuple[float, Measurement]]:
    """Scores by length: those over all depths, or the mean of those by depth."""
    flat: list[tuple[float, Measurement]] = []
    deep: dict[int, list[Measurement]] = {}
    for m in one.measurements:
        if m.name == "accuracy" and m.axes.get("task") == task and m.context and m.value is not None:
            if "depth" in m.axes:
                deep.setdefault(m.context, []).append(m)
            else:
                flat.append((m.context, m))
    if flat:
        return flat
    return [(context, plain("accuracy", statistics.fmean(m.value or 0.0 for m in at))) for context, at in deep.items()]


def _cells(group: Group, task: str) -> list[tuple[int, float, float | None, str]]:
    found: dict[tuple[int, float], list[Measurement]] = {}
    for one in group.members:
        for m in one.measurements:
            if m.name == "accuracy" and m.axes.get("task") == task and "depth" in m.axes and m.context:
                found.setdefault((m.context, round(100 * m.axes["depth"], 1)), []).append(m)
    cells: list[tuple[int, float, float | None, str]] = []
    for (context, depth), at in sorted(found.items()):
        values = [m.value for m in at if m.value is not None]
        if not values:
            cells.append((context, depth, None, at[0].status.replace("_", " ")))
            continue
        mean = statistics.fmean(values)
        only = at[0] if len(at) == 1 else None
        spread = (
            f" ({only.low:.2f} to {only.high:.2f})" if only and only.low is not None and only.high is not None else ""
        )
        cells.append(
            (context, depth, mean, f"{mean:.2f}{spread}" + (f", mean of {len(values)}" if len(values) > 1 else ""))
        )
    return cells
