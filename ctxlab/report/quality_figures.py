"""Figures of quality: loss and perplexity by context, by scheme, beyond the trained length, by position; curves of training."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from typing import Any

from ctxlab.records.schema import METRICS
from ctxlab.report.drawing import QUALITY, TRAINING, Drawing, Figure, plain, slug, trained_at, with_interval
from ctxlab.report.groups import Group, Point, average_curve, averaged, by_context, mapped, smoothed, thinned
from ctxlab.report.results import number, title, way_of
from ctxlab.report.vega import Axis
from ctxlab.report.ways import way_text
from ctxlab.units import format_count, format_length

_POINTS = 300  # of a curve of training that is drawn
_MULTIPLES = (1, 2, 4)  # of the trained length, side by side
_QUALITY = {
    "perplexity": "perplexity (per token)", "nats_per_token": "loss (nats/token)",
    "bits_per_byte": "bits per byte", "word_perplexity": "perplexity (per word)",
}  # fmt: skip


def _points_of(drawing: Drawing, group: Group, metric: str, way: Mapping[str, Any]) -> list[Point]:
    """A metric by context; a perplexity is that of the mean loss, which has the interval of a mean."""
    under = {"perplexity": "nats_per_token", "word_perplexity": "nats_per_word"}.get(metric, metric)
    points = by_context(group, under, way)
    return mapped(points, _exp) if under != metric else points


def quality(drawing: Drawing, way: Mapping[str, Any]) -> Figure | None:
    """The metric that the reader chose by context, as one way of scoring has it."""
    metric = drawing.view.metric
    how = f", {way_text(way)}" if way else ""
    ending = "-".join(f"{key}-{value}" for key, value in way.items())
    title_of = _QUALITY[metric]
    several = {str(one.settings.get("tokenizer")) for group in drawing.groups for one in group.members}
    note = ["their tokenizers differ: per token they do not compare, per byte they do"] if len(several) > 1 else []
    return drawing.lines(
        f"{slug(metric)}-by-context{'-' if ending else ''}{slug(ending)}",
        QUALITY,
        f"{_words(metric)} by context{how}",
        [(group, _points_of(drawing, group, metric, way)) for group in drawing.groups],
        Axis("context (tokens, log scale)", "length", 2),
        Axis(f"{title_of}{', log scale' if drawing.view.log_y else ''}", log=10 if drawing.view.log_y else 0),
        x_text=lambda x: format_length(int(x)),
        y_text=lambda y: number(y, METRICS[metric].unit, name=metric),
        caption=["on the test text, less is better", *note],
        marks=trained_at,
    )


def by_scheme(drawing: Drawing) -> Figure | None:
    """The same at the trained length and its multiples, a row a group."""
    metric = drawing.view.metric
    rows: list[tuple[str, str, Point, str]] = []
    for group in drawing.groups:
        trained = group.trained
        points = {p.x: p for p in _points_of(drawing, group, metric, {})}
        for multiple in _MULTIPLES if trained else ():
            p = points.get((trained or 0) * multiple)
            if p is not None:
                text = with_interval(p, lambda y: number(y, METRICS[metric].unit, name=metric))
                rows.append((group.label, f"{multiple}×", p, text))
    return drawing.dots(
        f"{slug(metric)}-by-scheme", f"{_words(metric)} at the trained length and beyond", rows,
        Axis(f"{_QUALITY[metric]}{', log scale' if drawing.view.log_y else ''}", log=10 if drawing.view.log_y else 0),
        ["best at the trained length first"], legend="trained length",
    )  # fmt: skip


def ratio(drawing: Drawing) -> Figure | None:
    """The extrapolation ratios that were measured, a row a group."""
    rows = []
    for group in drawing.groups:
        values = [m.value for one in group.members for m in one.measurements if m.name == "extrapolation_ratio"]
        there = [value for value in values if value is not None]
        if there:
            middle = Point(0, statistics.median(there), min(there), max(there), len(there))
            text = f"{middle.y:g}×" + (f" ({min(there):g} to {max(there):g})" if len(there) > 1 else "")
            rows.append((group.label, "ratio", middle, text))
    rows.sort(key=lambda row: -row[2].y)
    several = any(p.n > 1 for _, _, p, _ in rows)
    return drawing.dots(
        "extrapolation-ratio", "extrapolation ratio", rows, Axis("trained lengths", "x"),
        ["the most trained lengths whose last tokens lose no more than epsilon, more is better",
         *(["median, least and most of the runs"] if several else [])],
        falling=True,
    )  # fmt: skip


def extrapolation(drawing: Drawing) -> Figure | None:
    """Perplexity against that at the trained length, of each run for itself; then the means."""
    series = []
    for group in drawing.groups:
        each = []
        for one in group.members:
            at = {
                m.context: m.value for m in one.measurements
                if m.name == "nats_per_token" and m.context and m.value is not None and not way_of(m.axes)
                and not {"from", "task", "top", "late"} & m.axes.keys()
            }  # fmt: skip
            start = at.get(one.trained or 0)
            if one.trained and start is not None:
                each.append([
                    (context / one.trained, plain("nats_per_token", value - start)) for context, value in at.items()
                    if context is not None
                ])  # fmt: skip
        series.append((group, mapped(averaged(each), _exp)))
    if not any(p.x > 1 for _, points in series for p in points):
        return None
    return drawing.lines(
        "extrapolation", QUALITY, "perplexity against that at the trained length", series,
        Axis("context over trained length (log scale)", "x", 2), Axis("ratio of perplexities", "plain"),
        x_text=lambda x: f"{x:g}×", y_text=lambda y: f"{y:.3f}", levels=[(1.0, "as at the trained length")],
        caption=["the same target tokens at every length; below 1 more context helps"],
    )  # fmt: skip


def positions(drawing: Drawing) -> Figure | None:
    """Loss by how many tokens of the window were seen."""
    series = []
    for group in drawing.groups:
        each = [
            [(float(m.axes["to"]), m) for m in one.measurements if m.name == "nats_per_token" and "from" in m.axes]
            for one in group.members
        ]
        series.append((group, averaged(each)))
    return drawing.lines(
        "loss-by-position", QUALITY, "loss by position in the window", series,
        Axis("tokens seen in the window (log scale)", "length", 2), Axis("loss (nats/token)"),
        x_text=lambda x: format_length(int(x)), y_text=lambda y: f"{y:.3f}", marks=trained_at,
        caption=["each bin at its last position"],
    )  # fmt: skip


def training(drawing: Drawing, split: str) -> Figure | None:
    """Loss of a split by tokens seen."""
    view = drawing.view
    series = []
    for group in drawing.groups:
        curves = [
            thinned(smoothed(one.curves[split], view.smooth), _POINTS) for one in group.members if split in one.curves
        ]
        points = average_curve(curves)
        series.append((group, [p for p in points if p.x > 0] if view.log_x else points))
    smooth = [f"smoothed by an exponential average of weight {view.smooth:g}"] if view.smooth else []
    longest = max((len(points) for _, points in series), default=0)
    return drawing.lines(
        f"{split}-loss", TRAINING, f"{'training' if split == 'train' else split} loss by tokens seen", series,
        Axis(f"tokens seen{' (log scale)' if view.log_x else ''}", "count", 10 if view.log_x else 0),
        Axis(f"loss (nats/token{', log scale' if view.log_y else ''})", log=10 if view.log_y else 0),
        x_text=format_count, y_text=lambda y: f"{y:.3f}", caption=smooth, dots=longest <= 24,
    )  # fmt: skip


def _words(metric: str) -> str:
    return {"nats_per_token": "loss", "word_perplexity": "perplexity per word"}.get(
        metric, title(metric).replace("/", " per ")
    )


def _exp(value: float) -> float:
    return math.exp(min(value, 700.0))
