"""Figures of cost by context: memory and time on log axes, the fitted laws, the machine's limit."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from ctxlab.records.schema import METRICS, Measurement
from ctxlab.report.costs import exponent_line
from ctxlab.report.drawing import COSTS, Drawing, Figure
from ctxlab.report.groups import Group, Point, by_context
from ctxlab.report.results import number
from ctxlab.report.vega import Axis
from ctxlab.units import format_bytes, format_count, format_length

# What a step and generation cost by context: metric, title with unit, how numbers are written.
BY_CONTEXT = (
    ("peak_memory_bytes", "memory", "peak memory of a training step at batch 1", "bytes"),
    ("step_seconds", "time", "time of a training step at batch 1", "seconds"),
    ("cache_bytes", "cache", "key-value cache", "bytes"),
    ("prefill_seconds", "prefill", "time to read a prompt", "seconds"),
    ("decode_seconds_per_token", "decode", "time of a generated token", "seconds"),
)


def cost(drawing: Drawing, metric: str, name: str, heading: str, kind: str) -> Figure | None:
    """One of BY_CONTEXT: a line a group, its fitted law dashed, and of memory how far the machine's own reaches."""
    series = [(group, [p for p in by_context(group, metric, log=True) if p.y > 0]) for group in drawing.groups]
    unit = METRICS[metric].unit
    of = {"peak_memory_bytes": "activation memory", "step_seconds": "time"}.get(metric)
    limit = _machine_limit(drawing) if metric == "peak_memory_bytes" else None
    highest = max((p.y for _, points in series for p in points), default=0.0)
    if not highest:
        return None
    near = limit is not None and highest * 256 >= limit
    caption = ["log scales, less is better"]
    laws = {}
    by_label = {group.label: points for group, points in series}
    for group, points in series if of else ():
        law = _exponent(group, of or "")
        if law is not None and len(points) > 1:
            laws[group.label] = law
    several = len(series) > 1
    caption += [
        (f"{label}: " if several else "") + exponent_line(law) + _reach(law, points, limit)
        for group, points in series
        for label, law in laws.items()
        if label == group.label and law.value is not None
    ][:8]
    if limit is not None and not near:
        caption.append(f"the machine has {format_bytes(limit)}, {limit / highest:,.0f} times the most that is drawn")
    return drawing.lines(
        f"{name}-by-context", COSTS, f"{heading} by context", series,
        Axis("context (tokens)", "length", 2),
        Axis({"bytes": "bytes", "seconds": "seconds"}[kind], kind, 10 if kind == "seconds" else 2),
        x_text=lambda x: format_length(int(x)), y_text=lambda y: number(y, unit, name=metric), caption=caption,
        levels=[(limit, f"this machine's {format_bytes(limit)}")] if near and limit else [],
        fits=lambda group: _fitted(laws.get(group.label), by_label[group.label]),
    )  # fmt: skip


def _machine_limit(drawing: Drawing) -> float | None:
    """The memory of the machine that the runs were on, where it is one machine."""
    found = {
        one.run.record.provenance.hardware.get("memory_bytes")
        for group in drawing.groups
        for one in group.members
        if one.run is not None
    }
    return float(value) if len(found) == 1 and isinstance(value := found.pop(), int | float) and value > 0 else None


def _exponent(group: Group, of: str) -> Measurement | None:
    """The fitted law of a group: recorded of one of its members, that of the middle exponent."""
    found = [
        m
        for one in group.members
        for m in one.measurements
        if m.name == "scaling_exponent" and m.axes.get("of") == of and m.value is not None and m.facts.get("factor")
    ]
    found.sort(key=lambda m: m.value or 0)
    return found[len(found) // 2] if found else None


def _standing(law: Measurement, points: Sequence[Point]) -> float:
    """What does not depend on the context, beside a law of what does: the least that keeps the rest positive, or nothing."""
    if law.axes.get("of") == "time":
        return 0.0
    rest = [p.y - law.facts["factor"] * p.x ** (law.value or 0) for p in points]
    return max(0.0, statistics.median(rest))


def _fitted(law: Measurement | None, points: Sequence[Point]) -> list[Point]:
    if law is None:
        return []
    least, most = points[0].x, points[-1].x
    standing = _standing(law, points)
    xs = [least * (most / least) ** (n / 24) for n in range(25)]
    return [Point(x, standing + law.facts["factor"] * x ** (law.value or 0)) for x in xs]


def _reach(law: Measurement, points: Sequence[Point], limit: float | None) -> str:
    """At which context the law meets the machine's memory."""
    if limit is None or not law.value or limit <= (standing := _standing(law, points)):
        return ""
    context = ((limit - standing) / law.facts["factor"]) ** (1 / law.value)
    return f"; by that {format_bytes(limit)} are reached at about {format_count(context)} tokens"
