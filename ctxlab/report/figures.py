"""What runs come to as figures: quality by context and by scheme, curves of training, costs, answers. Only those with data.

A figure is panels for the eye and a table of the same numbers; a page, the dashboard and a folder of pictures draw the same.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ctxlab.records.schema import METRICS, Measurement
from ctxlab.report import vega
from ctxlab.report.costs import exponent_line
from ctxlab.report.groups import (
    AS_IT_IS,
    MOST_COLOURS,
    Group,
    Point,
    View,
    average_curve,
    averaged,
    by_context,
    grouped,
    mapped,
    smoothed,
    thinned,
)
from ctxlab.report.results import number, title, way_of
from ctxlab.report.subjects import SPLITS, Subject
from ctxlab.report.vega import Axis, Colours, Series, Spec
from ctxlab.report.ways import way_text, ways
from ctxlab.units import format_bytes, format_count, format_length

QUALITY, TRAINING, COSTS, ANSWERS = "quality", "training", "costs", "answers"
SECTIONS = {
    QUALITY: "Quality by context", TRAINING: "Training", COSTS: "What a context costs", ANSWERS: "Answers",
}  # fmt: skip
_POINTS = 300  # of a curve of training that is drawn
_LINES = 60  # of a figure, at most: more are no figure
_MULTIPLES = (1, 2, 4)  # of the trained length, side by side
_COMMANDS = {
    "train": "",
    "eval": ", evaluated again",
    "profile": ", profiled",
    "plan": ", predicted",
    "results": ", of saved results",
}
# What a step and generation cost by context: metric, title with unit, how numbers are written.
_BY_CONTEXT = (
    ("peak_memory_bytes", "memory", "peak memory of a training step at batch 1", "bytes"),
    ("step_seconds", "time", "time of a training step at batch 1", "seconds"),
    ("cache_bytes", "cache", "key-value cache", "bytes"),
    ("prefill_seconds", "prefill", "time to read a prompt", "seconds"),
    ("decode_seconds_per_token", "decode", "time of a generated token", "seconds"),
)
_QUALITY = {
    "perplexity": "perplexity (per token)", "nats_per_token": "loss (nats/token)",
    "bits_per_byte": "bits per byte", "word_perplexity": "perplexity (per word)",
}  # fmt: skip


@dataclass(frozen=True)
class Figure:
    """One figure: its name, where it stands, what it shows, its panels, and its numbers as a table."""

    name: str
    section: str
    heading: str
    caption: tuple[str, ...]
    panels: tuple[tuple[str, Spec], ...]
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def alone(self) -> Spec:
        return vega.alone(self.panels, self.heading, self.caption)


def figures(subjects: Sequence[Subject], view: View = AS_IT_IS) -> list[Figure]:
    """Every figure that these have data for, in the order in which a page has them."""
    found: list[Figure] = []
    by_command: dict[str, list[Group]] = {}
    for command in _COMMANDS:
        some = [one for one in subjects if one.command == command]
        if some:
            by_command[command] = grouped(some, view)
    known = dict.fromkeys(group.colour for groups in by_command.values() for group in groups)
    colours = Colours(tuple(known))
    for command, groups in by_command.items():
        drawing = _Drawing(groups, view, colours, command)
        found += [figure for figure in drawing.all() if figure is not None]
    order = list(SECTIONS)
    return sorted(found, key=lambda figure: order.index(figure.section))


def save_figures(found: Sequence[Figure], folder: Path) -> list[Path]:
    """Each figure as NAME.svg and NAME.png in a folder that is there."""
    import vl_convert

    paths = []
    for figure in found:
        spec = json.dumps(figure.alone())
        svg, png = folder / f"{figure.name}.svg", folder / f"{figure.name}.png"
        svg.write_text(vl_convert.vegalite_to_svg(spec), encoding="utf-8")
        png.write_bytes(vl_convert.vegalite_to_png(spec, scale=2))
        paths += [svg, png]
    return paths


@dataclass
class _Drawing:
    """The figures of the subjects of one command."""

    groups: list[Group]
    view: View
    colours: Colours
    command: str

    @property
    def said(self) -> str:
        return _COMMANDS[self.command]

    def all(self) -> Iterator[Figure | None]:
        measurements = [m for group in self.groups for one in group.members for m in one.measurements]
        for way in ways([m for m in measurements if m.context]) or [{}]:
            yield self._quality(way)
            if not way:
                yield self._by_scheme()
                yield self._extrapolation()
        yield self._ratio()
        yield self._positions()
        for split in SPLITS:
            yield self._training(split)
        for metric, name, heading, kind in _BY_CONTEXT:
            yield self._cost(metric, name, heading, kind)
        for task in dict.fromkeys(str(m.axes["task"]) for m in measurements if "task" in m.axes):
            yield self._answers(task)
            yield self._depths(task)

    def _name(self, name: str) -> str:
        return name if self.command == "train" else f"{self.command}-{name}"

    def _lines(
        self,
        name: str,
        section: str,
        heading: str,
        series: Sequence[tuple[Group, Sequence[Point]]],
        x: Axis,
        y: Axis,
        *,
        x_text: Callable[[float], str],
        y_text: Callable[[float], str],
        caption: Sequence[str] = (),
        marks: Callable[[Group], Sequence[tuple[float, str]]] = lambda group: (),
        levels: Sequence[tuple[float, str]] = (),
        fits: Callable[[Group], Sequence[Point]] = lambda group: (),
        dots: bool = True,
    ) -> Figure | None:
        """A figure of lines, a panel for each that the view asks for; None where no line has two points."""
        drawn = [(group, points) for group, points in series if len(points) > 1]
        if not drawn:
            return None
        said = list(caption)
        if len(drawn) > _LINES:
            said.append(f"the first {_LINES} of {len(drawn)} lines: group by fewer keys, or choose runs")
            drawn = drawn[:_LINES]
        if any(p.n > 1 for _, points in drawn for p in points):
            least, most = (f(p.n for _, points in drawn for p in points if p.n > 1) for f in (min, max))
            said.append(f"means over {least if least == most else f'{least} to {most}'} runs, with 95% intervals")
        elif any(p.low is not None for _, points in drawn for p in points):
            said.append("with 95% intervals over documents")
        by_panel: dict[str, list[tuple[Group, Sequence[Point]]]] = {}
        for group, points in drawn:
            by_panel.setdefault(group.panel, []).append((group, points))
        everything = [Series(group.label, group.colour, points) for group, points in drawn]
        within = vega.domain(everything, log=bool(y.log), outliers=self.view.outliers, also=[v for v, _ in levels])
        if within.beyond:
            said.append(f"{within.beyond} points lie outside of what is drawn")
        elif within.cut:
            said.append("wide intervals are cut at the frame")
        xs = [p.x for _, points in drawn for p in points]
        if x.log:
            x = Axis(x.title, x.kind, x.log, vega.powers(min(xs), max(xs), x.log))
        if y.log:
            y = Axis(y.title, y.kind, y.log, vega.log_ticks(within.low, within.high, y.kind))
        panels = []
        for panel, some in by_panel.items():
            lines = [
                Series(
                    group.label, group.colour, points,
                    [(x_text(p.x), _with_interval(p, y_text)) for p in points],
                )
                for group, points in some
            ]  # fmt: skip
            marked = dict(mark for group, _ in some for mark in marks(group))
            dashed = [Series(group.label, group.colour, fits(group)) for group, _ in some if fits(group)]
            spec = vega.lines(
                lines, x, y, self.colours, within=within, marks=list(marked.items()), levels=levels, fits=dashed, dots=dots,
                labelled=len(lines) <= 2 * MOST_COLOURS,
            )  # fmt: skip
            panels.append((panel, spec))
        places = sorted(set(xs))
        if len(places) > 12:
            places = [places[n * (len(places) - 1) // 11] for n in range(12)]
        head = ("what", *map(x_text, places))
        rows = []
        for group, points in drawn:
            at = {p.x: p for p in points}
            cells = (_with_interval(at[place], y_text) if place in at else "-" for place in places)
            rows.append((group.label, *cells))
        return Figure(self._name(name), section, heading + self.said, tuple(said), tuple(panels), head, tuple(rows))

    def _points(self, group: Group, metric: str, way: Mapping[str, Any]) -> list[Point]:
        """A metric by context; a perplexity is that of the mean loss, which has the interval of a mean."""
        under = {"perplexity": "nats_per_token", "word_perplexity": "nats_per_word"}.get(metric, metric)
        points = by_context(group, under, way)
        return mapped(points, _exp) if under != metric else points

    def _quality(self, way: Mapping[str, Any]) -> Figure | None:
        metric = self.view.metric
        how = f", {way_text(way)}" if way else ""
        ending = "-".join(f"{key}-{value}" for key, value in way.items())
        title_of = _QUALITY[metric]
        several = {str(one.settings.get("tokenizer")) for group in self.groups for one in group.members}
        note = ["their tokenizers differ: per token they do not compare, per byte they do"] if len(several) > 1 else []
        return self._lines(
            f"{_slug(metric)}-by-context{'-' if ending else ''}{_slug(ending)}",
            QUALITY,
            f"{_words(metric)} by context{how}",
            [(group, self._points(group, metric, way)) for group in self.groups],
            Axis("context (tokens, log scale)", "length", 2),
            Axis(f"{title_of}{', log scale' if self.view.log_y else ''}", log=10 if self.view.log_y else 0),
            x_text=lambda x: format_length(int(x)),
            y_text=lambda y: number(y, METRICS[metric].unit, name=metric),
            caption=["on the test text, less is better", *note],
            marks=_trained,
        )

    def _by_scheme(self) -> Figure | None:
        metric = self.view.metric
        rows: list[tuple[str, str, Point, str]] = []
        for group in self.groups:
            trained = group.trained
            points = {p.x: p for p in self._points(group, metric, {})}
            for multiple in _MULTIPLES if trained else ():
                p = points.get((trained or 0) * multiple)
                if p is not None:
                    text = _with_interval(p, lambda y: number(y, METRICS[metric].unit, name=metric))
                    rows.append((group.label, f"{multiple}×", p, text))
        return self._dots(
            f"{_slug(metric)}-by-scheme", f"{_words(metric)} at the trained length and beyond", rows,
            Axis(f"{_QUALITY[metric]}{', log scale' if self.view.log_y else ''}", log=10 if self.view.log_y else 0),
            ["best at the trained length first"], legend="trained length",
        )  # fmt: skip

    def _ratio(self) -> Figure | None:
        rows = []
        for group in self.groups:
            values = [m.value for one in group.members for m in one.measurements if m.name == "extrapolation_ratio"]
            there = [value for value in values if value is not None]
            if there:
                middle = Point(0, statistics.median(there), min(there), max(there), len(there))
                text = f"{middle.y:g}×" + (f" ({min(there):g} to {max(there):g})" if len(there) > 1 else "")
                rows.append((group.label, "ratio", middle, text))
        rows.sort(key=lambda row: -row[2].y)
        several = any(p.n > 1 for _, _, p, _ in rows)
        return self._dots(
            "extrapolation-ratio", "extrapolation ratio", rows, Axis("trained lengths", "x"),
            ["the most trained lengths whose last tokens lose no more than epsilon, more is better",
             *(["median, least and most of the runs"] if several else [])],
            falling=True,
        )  # fmt: skip

    def _dots(
        self, name: str, heading: str, rows: list[tuple[str, str, Point, str]], x: Axis, caption: list[str],
        *, falling: bool = False, legend: str = "",
    ) -> Figure | None:  # fmt: skip
        labels = list(dict.fromkeys(row[0] for row in rows))
        if len(labels) < 2:
            return None
        first = {label: next(p.y for of, _, p, _ in rows if of == label) for label in labels}
        rows.sort(key=lambda row: -first[row[0]] if falling else first[row[0]])
        labels = list(dict.fromkeys(row[0] for row in rows))[:_LINES]
        rows = [row for row in rows if row[0] in labels]
        kinds = list(dict.fromkeys(row[1] for row in rows))
        within = vega.domain(
            [Series("", "", [p for _, _, p, _ in rows])], log=bool(x.log), outliers=self.view.outliers
        )  # fmt: skip
        spec = vega.dots(rows, x, Colours(tuple(kinds)), within=within, legend=legend)
        words = {(of, kind): text for of, kind, _, text in rows}
        table = tuple((label, *(words.get((label, kind), "-") for kind in kinds)) for label in labels)
        said = [*caption, *([f"{within.beyond} points lie outside of what is drawn"] if within.beyond else [])]
        return Figure(
            self._name(name), QUALITY, heading + self.said, tuple(said), (("", spec),), ("what", *kinds), table
        )

    def _extrapolation(self) -> Figure | None:
        """Perplexity against that at the trained length, of each run for itself; then the means."""
        series = []
        for group in self.groups:
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
                        (context / one.trained, _plain("nats_per_token", value - start)) for context, value in at.items()
                        if context is not None
                    ])  # fmt: skip
            series.append((group, mapped(averaged(each), _exp)))
        if not any(p.x > 1 for _, points in series for p in points):
            return None
        return self._lines(
            "extrapolation", QUALITY, "perplexity against that at the trained length", series,
            Axis("context over trained length (log scale)", "x", 2), Axis("ratio of perplexities", "plain"),
            x_text=lambda x: f"{x:g}×", y_text=lambda y: f"{y:.3f}", levels=[(1.0, "as at the trained length")],
            caption=["the same target tokens at every length; below 1 more context helps"],
        )  # fmt: skip

    def _positions(self) -> Figure | None:
        series = []
        for group in self.groups:
            each = [
                [(float(m.axes["to"]), m) for m in one.measurements if m.name == "nats_per_token" and "from" in m.axes]
                for one in group.members
            ]
            series.append((group, averaged(each)))
        return self._lines(
            "loss-by-position", QUALITY, "loss by position in the window", series,
            Axis("tokens seen in the window (log scale)", "length", 2), Axis("loss (nats/token)"),
            x_text=lambda x: format_length(int(x)), y_text=lambda y: f"{y:.3f}", marks=_trained,
            caption=["each bin at its last position"],
        )  # fmt: skip

    def _training(self, split: str) -> Figure | None:
        view = self.view
        series = []
        for group in self.groups:
            curves = [
                thinned(smoothed(one.curves[split], view.smooth), _POINTS)
                for one in group.members
                if split in one.curves
            ]
            points = average_curve(curves)
            series.append((group, [p for p in points if p.x > 0] if view.log_x else points))
        smooth = [f"smoothed by an exponential average of weight {view.smooth:g}"] if view.smooth else []
        longest = max((len(points) for _, points in series), default=0)
        return self._lines(
            f"{split}-loss", TRAINING, f"{'training' if split == 'train' else split} loss by tokens seen", series,
            Axis(f"tokens seen{' (log scale)' if view.log_x else ''}", "count", 10 if view.log_x else 0),
            Axis(f"loss (nats/token{', log scale' if view.log_y else ''})", log=10 if view.log_y else 0),
            x_text=format_count, y_text=lambda y: f"{y:.3f}", caption=smooth, dots=longest <= 24,
        )  # fmt: skip

    def _cost(self, metric: str, name: str, heading: str, kind: str) -> Figure | None:
        series = [(group, [p for p in by_context(group, metric, log=True) if p.y > 0]) for group in self.groups]
        unit = METRICS[metric].unit
        of = {"peak_memory_bytes": "activation memory", "step_seconds": "time"}.get(metric)
        limit = self._limit() if metric == "peak_memory_bytes" else None
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
            caption.append(
                f"the machine has {format_bytes(limit)}, {limit / highest:,.0f} times the most that is drawn"
            )
        return self._lines(
            f"{name}-by-context", COSTS, f"{heading} by context", series,
            Axis("context (tokens)", "length", 2),
            Axis({"bytes": "bytes", "seconds": "seconds"}[kind], kind, 10 if kind == "seconds" else 2),
            x_text=lambda x: format_length(int(x)), y_text=lambda y: number(y, unit, name=metric), caption=caption,
            levels=[(limit, f"this machine's {format_bytes(limit)}")] if near and limit else [],
            fits=lambda group: _fitted(laws.get(group.label), by_label[group.label]),
        )  # fmt: skip

    def _limit(self) -> float | None:
        """The memory of the machine that the runs were on, where it is one machine."""
        found = {
            one.run.record.provenance.hardware.get("memory_bytes")
            for group in self.groups
            for one in group.members
            if one.run is not None
        }
        return float(value) if len(found) == 1 and isinstance(value := found.pop(), int | float) and value > 0 else None

    def _answers(self, task: str) -> Figure | None:
        series = []
        for group in self.groups:
            each = [_by_length(one, task) for one in group.members]
            series.append((group, averaged(each)))
        chances = [
            m.facts["chance"]
            for group in self.groups
            for one in group.members
            for m in one.measurements
            if m.axes.get("task") == task and isinstance(m.facts.get("chance"), float)
        ]
        name = f"{_slug(task)}-by-length"
        chance = [(max(chances), f"chance {max(chances):.2g}")] if chances and max(chances) > 0.005 else []
        figure = self._lines(
            name, ANSWERS, f"{task}: share of right answers by length", series,
            Axis("length (tokens, log scale)", "length", 2), Axis("share of right answers"),
            x_text=lambda x: format_length(int(x)), y_text=lambda y: f"{y:.3f}", caption=["more is better"], marks=_trained,
            levels=chance,
        )  # fmt: skip
        if figure is not None:
            return figure
        rows = [
            (group.label, f"at {format_length(int(p.x))}", p, _with_interval(p, lambda y: f"{y:.3f}"))
            for group, points in series
            for p in points
        ]
        dotted = self._dots(
            name,
            f"{task}: share of right answers",
            rows,
            Axis("share of right answers"),
            ["more is better"],
            falling=True,
        )
        return None if dotted is None else replace(dotted, section=ANSWERS)

    def _depths(self, task: str) -> Figure | None:
        panels, table = [], []
        for group in self.groups[:24]:
            cells = _cells(group, task)
            if cells:
                spec = vega.score_map(cells, across="length (tokens)", down="depth of the answer (%)")
                panels.append((group.label, spec))
                table += [(group.label, format_length(a), f"{d:g}%", text) for a, d, _, text in cells]
        if not panels:
            return None
        return Figure(
            self._name(f"{_slug(task)}-by-depth"), ANSWERS, f"{task}: share of right answers by depth and length{self.said}",
            ("where in the text the answer stands, and how long the text is",), tuple(panels),
            ("what", "length", "depth", "share right"), tuple(table),
        )  # fmt: skip


def _trained(group: Group) -> list[tuple[float, str]]:
    return [(group.trained, "trained")] if group.trained else []


def _with_interval(p: Point, text: Callable[[float], str]) -> str:
    return text(p.y) if p.low is None or p.high is None else f"{text(p.y)} ({text(p.low)} to {text(p.high)})"


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
    return [(context, _plain("accuracy", statistics.fmean(m.value or 0.0 for m in at))) for context, at in deep.items()]


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


def _plain(name: str, value: float) -> Measurement:
    return Measurement(name=name, value=value, unit=METRICS[name].unit)


def _words(metric: str) -> str:
    return {"nats_per_token": "loss", "word_perplexity": "perplexity per word"}.get(
        metric, title(metric).replace("/", " per ")
    )


def _slug(text: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in text.lower()).strip("-")


def _exp(value: float) -> float:
    return math.exp(min(value, 700.0))
