"""One figure, and how those of a command are laid out: lines by panel, or dots in rows, beside a table of the numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ctxlab.records.schema import METRICS, Measurement
from ctxlab.report import vega
from ctxlab.report.groups import MOST_COLOURS, Group, Point, View
from ctxlab.report.vega import Axis, Colours, Series, Spec

QUALITY, TRAINING, COSTS, ANSWERS = "quality", "training", "costs", "answers"
_LINES = 60  # of a figure, at most: more are no figure


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


@dataclass
class Drawing:
    """What the figures of one command's subjects share: their groups, what the reader asks for, colours, words."""

    command: str
    said: str
    groups: list[Group]
    view: View
    colours: Colours

    def name(self, name: str) -> str:
        return name if self.command == "train" else f"{self.command}-{name}"

    def lines(
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
                    [(x_text(p.x), with_interval(p, y_text)) for p in points],
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
            cells = (with_interval(at[place], y_text) if place in at else "-" for place in places)
            rows.append((group.label, *cells))
        return Figure(self.name(name), section, heading + self.said, tuple(said), tuple(panels), head, tuple(rows))

    def dots(
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
            self.name(name), QUALITY, heading + self.said, tuple(said), (("", spec),), ("what", *kinds), table
        )


def trained_at(group: Group) -> list[tuple[float, str]]:
    return [(group.trained, "trained")] if group.trained else []


def with_interval(p: Point, text: Callable[[float], str]) -> str:
    return text(p.y) if p.low is None or p.high is None else f"{text(p.y)} ({text(p.low)} to {text(p.high)})"


def plain(name: str, value: float) -> Measurement:
    return Measurement(name=name, value=value, unit=METRICS[name].unit)


def slug(text: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in text.lower()).strip("-")
