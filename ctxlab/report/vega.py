"""Panels as Vega-Lite: lines by context, dots with intervals, maps of scores. Plain dictionaries, so a page is made in no time.

A panel's colours and its height are fixed, its width is the page's. What people see is drawn in the browser by the bundle that
vl-convert carries, and by vl-convert itself as SVG and PNG.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ctxlab.report.groups import Point
from ctxlab.report.plots import PALETTE

Spec = dict[str, Any]

HEIGHT = 300  # pixels of a panel, its axes not counted
_ROW = 26  # pixels of a row of dots
_LABEL = 15  # pixels that a name at a line's end needs
_SHAPES = ("circle", "square", "triangle-up", "diamond", "triangle-down", "cross", "triangle-right")
AT_THE_END = "names"  # the layer that a narrow page leaves out for a legend
_SCHEMA = "https://vega.github.io/schema/vega-lite/v6.json"  # a name, which nothing is fetched from

_LENGTH = "datum.value >= 1024 && datum.value % 1024 == 0 ? datum.value / 1024 + 'k' : format(datum.value, '~r')"
_COUNT = "datum.value == 0 ? '0' : format(datum.value, '~s')"
_BYTES = (
    "datum.value >= 1099511627776 ? format(datum.value / 1099511627776, '~r') + ' TiB' : "
    "datum.value >= 1073741824 ? format(datum.value / 1073741824, '~r') + ' GiB' : "
    "datum.value >= 1048576 ? format(datum.value / 1048576, '~r') + ' MiB' : format(datum.value / 1024, '~r') + ' KiB'"
)
_SECONDS = (
    "datum.value >= 1 ? format(datum.value, '~r') + ' s' : datum.value >= 0.001 ? "
    "format(datum.value * 1000, '~r') + ' ms' : format(datum.value * 1000000, '~r') + ' us'"
)
_PLAIN = "format(datum.value, '~r')"
LABELS = {
    "length": _LENGTH,
    "count": _COUNT,
    "bytes": _BYTES,
    "seconds": _SECONDS,
    "plain": _PLAIN,
    "x": _PLAIN + " + '×'",
}


@dataclass(frozen=True)
class Axis:
    """A quantitative axis: its title with the unit, how its numbers are written (of LABELS), its base where it is logarithmic."""

    title: str
    kind: str = "plain"
    log: int = 0
    ticks: tuple[float, ...] = ()


@dataclass(frozen=True)
class Series:
    """A line: its name, what it is known by in colour, its points, and what is said of each when it is pointed at."""

    name: str
    colour: str
    points: Sequence[Point]
    texts: Sequence[tuple[str, str]] = ()  # (x, y with its interval) in words


@dataclass(frozen=True)
class Colours:
    """Which colour and shape a name has, the same on a whole page."""

    names: tuple[str, ...]

    def scale(self, kind: str) -> dict[str, Any]:
        several = PALETTE if kind == "colour" else _SHAPES
        return {"domain": list(self.names), "range": [several[n % len(several)] for n in range(len(self.names))]}


@dataclass(frozen=True)
class Domain:
    """What of an axis is drawn, and how many points lie beyond it."""

    low: float
    high: float
    beyond: int = 0
    cut: bool = False  # some intervals go on beyond


def domain(series: Sequence[Series], *, log: bool, outliers: bool, also: Sequence[float] = ()) -> Domain:
    """Every value, and intervals as far again as the values lie apart; without `outliers` what Tukey calls far out is left out.

    Far out is beyond the quartiles by three times the distance between them (Tukey 1977, Exploratory Data Analysis, 2D).
    """
    to, back = (math.log, math.exp) if log else (float, float)
    values = [to(p.y) for one in series for p in one.points if not log or p.y > 0]
    inside = values if outliers else _not_far_out(values)
    low, high = min(inside), max(inside)
    apart = high - low or abs(high) * 0.02 or 1.0
    ends = [
        to(end)
        for one in series
        for p in one.points
        for end in (p.low, p.high)
        if end is not None and (not log or end > 0)
    ]
    low = max(min([low, *ends]), low - apart)
    high = min(max([high, *ends]), high + apart)
    low, high = min([low, *map(to, also)]), max([high, *map(to, also)])
    room = 0.06 * (high - low) or 0.5
    beyond = sum(not low - room <= value <= high + room for value in values)
    cut = any(not low - room <= end <= high + room for end in ends)
    return Domain(back(low - room), back(high + room), beyond, cut)


def _not_far_out(values: Sequence[float]) -> list[float]:
    ordered = sorted(values)
    quarter, three = (ordered[round(part * (len(ordered) - 1))] for part in (0.25, 0.75))
    reach = 3 * (three - quarter)
    return [value for value in ordered if quarter - reach <= value <= three + reach]


def lines(
    series: Sequence[Series],
    x: Axis,
    y: Axis,
    colours: Colours,
    *,
    within: Domain,
    marks: Sequence[tuple[float, str]] = (),
    levels: Sequence[tuple[float, str]] = (),
    fits: Sequence[Series] = (),
    dots: bool = True,
    labelled: bool = True,
) -> Spec:
    """Lines with their intervals, each named at its end. marks: upright rules, levels: level ones; fits: dashed lines."""
    data: list[dict[str, Any]] = [
        {"line": one.name, "colour": one.colour, "x": p.x, "y": p.y, "low": p.low, "high": p.high, "at": at, "is": what}
        for one in series
        for p, (at, what) in zip(one.points, one.texts or [("", "")] * len(one.points), strict=True)
        if not (y.log and p.y <= 0)
    ]
    xs = [row["x"] for row in data] + [p.x for one in fits for p in one.points]
    here = [
        (value, text)
        for value, text in marks
        if min(xs) / (1.05 if x.log else 1) <= value <= max(xs) * (1.05 if x.log else 1)
    ]
    encoded_x = {"field": "x", "type": "quantitative", "scale": _x_scale(xs, x), "axis": _axis(x, grid=False)}
    scale = {"domain": [within.low, within.high], "nice": False, **_kind(y)}
    encoded_y = {"field": "y", "type": "quantitative", "scale": scale, "axis": _axis(y, grid=True)}
    colour = {"field": "colour", "type": "nominal", "scale": colours.scale("colour"), "legend": None}
    shape = {"field": "colour", "type": "nominal", "scale": colours.scale("shape"), "legend": None}
    base = {"x": encoded_x, "y": encoded_y, "color": colour, "detail": {"field": "line"}}
    layers: list[Spec] = []
    for value, text in here:
        at = {"data": {"values": [{"x": value, "text": text}]}}
        layers.append({**at, "mark": {"type": "rule", "style": "mark"}, "encoding": {"x": encoded_x}})
        words = {"type": "text", "style": "note", "baseline": "bottom", "dy": -4}
        layers.append({**at, "mark": words, "encoding": {"x": encoded_x, "y": {"value": 0}, "text": {"field": "text"}}})
    for value, text in levels:
        at = {"data": {"values": [{"y": value, "text": text}]}}
        layers.append({**at, "mark": {"type": "rule", "style": "mark"}, "encoding": {"y": encoded_y}})
        words = {"type": "text", "style": "note", "align": "left", "baseline": "bottom", "dx": 3, "dy": -2}
        layers.append({**at, "mark": words, "encoding": {"x": {"value": 0}, "y": encoded_y, "text": {"field": "text"}}})
    spans = [row for row in data if row["low"] is not None and row["high"] is not None]
    if y.log:
        spans = [{**row, "low": max(row["low"], within.low)} for row in spans]
    if spans:
        edges = {**base, "y": {**encoded_y, "field": "low"}, "y2": {"field": "high"}}
        layers.append(
            {"data": {"values": spans}, "mark": {"type": "area", "opacity": 0.16, "clip": True}, "encoding": edges}
        )
        if dots:
            layers.append(
                {"data": {"values": spans}, "mark": {"type": "rule", "opacity": 0.55, "clip": True}, "encoding": edges}
            )
    if fits:
        drawn = [{"line": one.name, "colour": one.colour, "x": p.x, "y": p.y} for one in fits for p in one.points]
        dashed = {"type": "line", "strokeDash": [2, 3], "strokeWidth": 1.5, "clip": True}
        layers.append({"data": {"values": drawn}, "mark": dashed, "encoding": base})
    layers.append(
        {"data": {"values": data}, "mark": {"type": "line", "strokeWidth": 2, "clip": True}, "encoding": base}
    )
    said = [
        {"field": "line", "title": "what"}, {"field": "at", "title": x.title.partition(" (")[0]},
        {"field": "is", "title": y.title.partition(" (")[0]},
    ]  # fmt: skip
    point = {"type": "point", "filled": True, "size": 60 if dots else 90, "opacity": 1 if dots else 0, "clip": True}
    layers.append(
        {
            "data": {"values": data},
            "mark": point,
            "encoding": {**base, "shape": shape, "tooltip": said},
            "name": "points",
        }
    )
    several = len(series) > 1 and labelled
    if several:
        layers += _names(series, within, y, colour)
    return {
        "$schema": _SCHEMA, "width": "container", "height": HEIGHT, "layer": layers,
        "usermeta": {"names": [one.colour for one in series]},
    }  # fmt: skip


def _names(series: Sequence[Series], within: Domain, y: Axis, colour: Spec) -> list[Spec]:
    """A name at each line's end, pushed apart where they would meet, joined to it by a stroke of its colour."""
    to = math.log if y.log else float
    low, high = to(within.low), to(within.high)

    def pixel(value: float) -> float:
        return HEIGHT * (1 - (to(max(value, within.low)) - low) / (high - low))

    ends = sorted(
        ((min(max(pixel(one.points[-1].y), 0), HEIGHT), one) for one in series if one.points), key=lambda end: end[0]
    )
    gap = min(_LABEL, HEIGHT / max(1, len(ends)))
    last = max(one.points[-1].x for _, one in ends)
    places: list[float] = []
    for place, _ in ends:
        places.append(max(place, places[-1] + gap) if places else place)
    bottom = float(HEIGHT)
    for n in range(len(places) - 1, -1, -1):
        places[n] = min(places[n], bottom)
        bottom = places[n] - gap
    layers: list[Spec] = []
    for place, (end, one) in zip(places, ends):
        early = f" (to {one.texts[-1][0]})" if one.texts and one.points[-1].x < last else ""
        row = {"data": {"values": [{"colour": one.colour, "text": _cut(one.colour) + early}]}}
        stroke = {"x": {"value": "width"}, "x2": {"value": "width"}, "y": {"value": end}, "y2": {"value": place}}
        mark = {"type": "rule", "strokeWidth": 2, "xOffset": 2, "x2Offset": 13}
        layers.append({**row, "mark": mark, "encoding": {**stroke, "color": colour}})
        text = {"x": {"value": "width"}, "y": {"value": place}, "text": {"field": "text"}}
        words = {"type": "text", "style": "name", "align": "left", "baseline": "middle", "dx": 17}
        layers.append({**row, "mark": words, "encoding": text})
    return [{"layer": layers, "name": AT_THE_END}]


def dots(
    rows: Sequence[tuple[str, str, Point, str]], x: Axis, colours: Colours, *, within: Domain, legend: str = ""
) -> Spec:
    """(row, colour, point, its words): a value and its interval a dot, one row of them a name, in the order given."""
    data: list[dict[str, Any]] = [
        {"row": row, "colour": colour, "x": p.y, "low": p.low, "high": p.high, "is": text}
        for row, colour, p, text in rows
    ]
    names = list(dict.fromkeys(row for row, *_ in rows))
    several = len(colours.names) > 1
    scale = {"domain": [within.low, within.high], "nice": False, **_kind(x)}
    encoded_x = {"field": "x", "type": "quantitative", "scale": scale, "axis": _axis(x, grid=True)}
    y = {
        "field": "row", "type": "nominal", "sort": names, "scale": {"paddingInner": 0.2},
        "axis": {"title": None, "labelLimit": 250, "domain": False, "ticks": False, "labelPadding": 8},
    }  # fmt: skip
    offset = {"yOffset": {"field": "colour", "type": "nominal", "sort": list(colours.names)}} if several else {}
    key = {"title": legend or None, "titleOrient": "left", "orient": "top"} if several else None
    colour = {"field": "colour", "type": "nominal", "scale": colours.scale("colour"), "legend": key}
    shape = {"field": "colour", "type": "nominal", "scale": colours.scale("shape"), "legend": key}
    base = {"y": y, "color": colour, **offset}
    said = [{"field": "row", "title": "what"}, {"field": "is", "title": x.title.partition(" (")[0]}]
    spans = [row for row in data if row["low"] is not None]
    layers: list[Spec] = []
    if spans:
        edges = {**base, "x": {**encoded_x, "field": "low"}, "x2": {"field": "high"}}
        layers.append(
            {"data": {"values": spans}, "mark": {"type": "rule", "strokeWidth": 2, "clip": True}, "encoding": edges}
        )
    layers.append({
        "data": {"values": data}, "mark": {"type": "point", "filled": True, "size": 70, "opacity": 1, "clip": True},
        "encoding": {**base, "x": encoded_x, "shape": shape, "tooltip": said},
    })  # fmt: skip
    return {
        "$schema": _SCHEMA, "width": "container", "layer": layers,
        "height": max(90, _ROW * len(names) if not several else (10 + 14 * len(colours.names)) * len(names)),
    }  # fmt: skip


def score_map(cells: Sequence[tuple[int, float, float | None, str]], *, across: str, down: str) -> Spec:
    """(length, depth in %, score from 0 to 1, its words): a square each, its number in it, grey where there is none."""
    data: list[dict[str, Any]] = [{"length": a, "depth": d, "score": s, "is": text} for a, d, s, text in cells]
    lengths, depths = sorted({row["length"] for row in data}), sorted({row["depth"] for row in data})
    x = {
        "field": "length", "type": "ordinal", "sort": lengths,
        "axis": {"title": across, "labelAngle": 0, "labelExpr": _LENGTH, "domain": False, "ticks": False},
    }  # fmt: skip
    y = {"field": "depth", "type": "ordinal", "sort": depths, "axis": {"title": down, "domain": False, "ticks": False}}
    scale = {"domain": [0, 1], "scheme": "viridis"}
    ink = {"condition": {"test": "datum.score > 0.55", "value": "black"}, "value": "white"}
    said = [
        {"field": "length", "title": "length"}, {"field": "depth", "title": "depth (%)"},
        {"field": "is", "title": "share right"},
    ]  # fmt: skip
    there, gone = {"filter": "datum.score != null"}, {"filter": "datum.score == null"}
    words = {"field": "words"}
    data = [{**row, "words": row["is"] if row["score"] is None else f"{row['score']:.2f}"} for row in data]
    return {
        "$schema": _SCHEMA, "width": "container", "height": max(120, 34 * len(depths)), "data": {"values": data},
        "encoding": {"x": x, "y": y},
        "layer": [
            {"transform": [there], "mark": {"type": "rect"},
             "encoding": {"color": {"field": "score", "type": "quantitative", "scale": scale, "legend": None}, "tooltip": said}},
            {"transform": [gone], "mark": {"type": "rect", "style": "gap"}, "encoding": {"tooltip": said}},
            {"transform": [there], "mark": {"type": "text", "fontSize": 12}, "encoding": {"text": words, "color": ink}},
            {"transform": [gone], "mark": {"type": "text", "style": "note", "fontSize": 10}, "encoding": {"text": words}},
        ],
    }  # fmt: skip


def _cut(text: str, most: int = 30) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


def _kind(axis: Axis) -> dict[str, Any]:
    return {"type": "log", "base": axis.log} if axis.log else {"zero": False}


def _x_scale(xs: Sequence[float], x: Axis) -> dict[str, Any]:
    low, high = min(xs), max(xs)
    ends = [low / 1.06, high * 1.06] if x.log else [min(low, 0.0), high]
    return {"domain": ends, "nice": False, **_kind(x)}


def _axis(axis: Axis, *, grid: bool) -> dict[str, Any]:
    ticks = {"values": list(axis.ticks)} if axis.ticks else {"tickCount": 5}
    return {"title": axis.title, "grid": grid, "labelExpr": LABELS[axis.kind], "labelOverlap": True, **ticks}


def powers(low: float, high: float, base: float) -> tuple[float, ...]:
    """The powers of a base within bounds, at most nine of them, evenly chosen."""
    first, last = math.ceil(math.log(low, base) - 1e-9), math.floor(math.log(high, base) + 1e-9)
    step = max(1, -(-(last - first + 1) // 9))
    return tuple(float(base) ** n for n in range(first, last + 1, step))


def log_ticks(low: float, high: float, kind: str) -> tuple[float, ...]:
    """Round numbers of a unit within bounds, three or more wherever they lie: powers of 4 and of 2 of bytes, 1 2 5 of others,
    equal steps where even those are too few.
    """
    binary = kind == "bytes"
    for base, parts in ((4, (1,)), (2, (1,))) if binary else ((10, (1,)), (10, (1, 2, 5))):
        first, last = math.floor(math.log(low, base)), math.ceil(math.log(high, base))
        found = [part * float(base) ** n for n in range(first, last + 1) for part in parts]
        found = [value for value in found if low <= value <= high]
        if len(found) >= 3:
            return tuple(found[:: -(-len(found) // 9)])
    unit = 1024.0 ** math.floor(math.log(high, 1024)) if binary else 1.0
    step = 10 ** math.floor(math.log10((high - low) / unit)) * unit
    step = next(step * part for part in (0.2, 0.5, 1, 2, 5) if (high - low) / (step * part) <= 6)
    return tuple(n * step for n in range(math.ceil(low / step), math.floor(high / step) + 1))


_FONT = "system-ui, -apple-system, 'Segoe UI', 'DejaVu Sans', sans-serif"


@dataclass(frozen=True)
class Theme:
    """What a figure's ink is, on the paper it is drawn on."""

    ink: str
    soft: str
    line: str
    gap: str
    swaps: Mapping[str, str] = field(default_factory=dict)

    def config(self) -> dict[str, Any]:
        axis = {
            "labelColor": self.ink, "titleColor": self.ink, "domainColor": self.soft, "tickColor": self.soft,
            "gridColor": self.line, "labelFontSize": 12, "titleFontSize": 12, "titleFontWeight": "normal", "titlePadding": 8,
        }  # fmt: skip
        return {
            "background": None, "font": _FONT, "view": {"stroke": None}, "axis": axis,
            "legend": {"labelColor": self.ink, "titleColor": self.ink, "labelFontSize": 12, "titleFontWeight": "normal"},
            "title": {"color": self.ink, "fontSize": 13, "anchor": "start"},
            "style": {
                "mark": {"color": self.soft, "strokeDash": [4, 4], "strokeWidth": 1},
                "note": {"color": self.soft, "fontSize": 11}, "name": {"color": self.ink, "fontSize": 12},
                "gap": {"color": self.gap},
            },
        }  # fmt: skip


LIGHT = Theme("#1b1f24", "#57606a", "#d9dee4", "#eceff2")
DARK = Theme("#e6eaef", "#9aa4af", "#2b333d", "#232b35", {"#000000": "#F0E442"})  # black is seen on white alone


def alone(panels: Sequence[tuple[str, Spec]], heading: str, caption: Sequence[str]) -> Spec:
    """The panels of a figure as one picture on white, for SVG and PNG."""
    width = 620 if len(panels) == 1 else 430
    drawn = [
        {**{k: v for k, v in panel.items() if k not in ("$schema", "usermeta")}, "width": width}
        | ({"title": name} if name else {})
        for name, panel in panels
    ]
    config = LIGHT.config() | {"background": "white", "padding": 12}
    title = {"text": heading, "subtitle": list(caption), "anchor": "start", "offset": 14, "fontSize": 16}
    title |= {"subtitleColor": LIGHT.soft, "subtitleFontSize": 11}
    return {
        "$schema": _SCHEMA, "title": title, "concat": drawn, "columns": 1 if len(drawn) == 1 else 2, "config": config,
        "resolve": {"scale": {"color": "independent", "shape": "independent"}},
    }  # fmt: skip


def bundle(cache: Path | None) -> str:
    """Vega, Vega-Lite and Vega-Embed as one script, from vl-convert; kept in `cache`, for making it takes seconds."""
    import importlib.metadata

    version = importlib.metadata.version("vl-convert-python")
    kept = None if cache is None else cache / f"vega-embed-{version}.js"
    if kept is not None and kept.is_file():
        return kept.read_text(encoding="utf-8")
    import vl_convert

    text = str(vl_convert.javascript_bundle(snippet="window.vegaEmbed = vegaEmbed;"))
    text = f"(() => {{\n{text}\n}})();"  # its names are its own
    text = text.replace("</script", "<\\/script").replace("<!--", "<\\!--")
    if kept is not None:
        with suppress(OSError):  # nowhere to keep it: made again the next time
            kept.parent.mkdir(parents=True, exist_ok=True)
            handle, draft = tempfile.mkstemp(dir=kept.parent, prefix=".vega-")
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
            os.replace(draft, kept)
    return text
