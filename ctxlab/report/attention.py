"""What heads attend to, for people: shades in the terminal, a table of numbers, a picture, and what the page shows."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from rich.cells import cell_len, set_cell_size
from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from ctxlab.report.grid import Grid
from ctxlab.report.plots import styled

NAMES = {"encoder": "encoder self", "self": "self", "cross": "cross"}
SHADES, ASCII_SHADES = " ░▒▓█", " .:+#"
# The weight from which on a shade is used: their square roots are a fifth, two fifths, ...
STEPS = (0.04, 0.16, 0.36, 0.64)
_LABEL = 10  # columns of a row's label, at most
_MOST_LINES = 240  # of maps in the terminal


@dataclass(frozen=True)
class Axes:
    """The labels of what attends (rows) and of what is attended to (columns)."""

    rows: Sequence[str]
    columns: Sequence[str]


@dataclass(frozen=True)
class Map:
    """One head's weights as they are drawn, (rows, columns), and its numbers by name. Layers and heads count from 1."""

    kind: str
    layer: int
    head: int
    weights: np.ndarray
    numbers: Mapping[str, float | None]


@dataclass(frozen=True)
class Step:
    """One step of decoding, in labels: read, chosen and its probability, what else was likely, where it looked."""

    read: str
    chosen: str
    p: float
    others: Sequence[tuple[str, float]]
    sources: Sequence[tuple[str, float]]


class Column(NamedTuple):
    """How a number of a head is shown: its title, its decimals."""

    title: str
    decimals: int


COLUMNS = {
    "entropy": Column("entropy (nats)", 2),
    "distance": Column("distance (tokens)", 1),
    "previous": Column("previous", 2),
    "first": Column("first", 2),
    "induction": Column("induction", 2),
    "sink": Column("sink", 2),
}
MEANING = {
    "entropy": "nats of a query's weights, mean over queries: 0 is one token, ln n is n tokens alike",
    "distance": "tokens between query and key, weighted mean",
    "previous": "weight on the token before",
    "first": "weight on the first token",
    "induction": "on random tokens read twice, weight on what followed the first time",
    "sink": "weight on no token",
}


def shown_numbers(maps: Sequence[Map]) -> list[str]:
    """The numbers that some head has, in their order."""
    return [name for name in COLUMNS if any(one.numbers.get(name) is not None for one in maps)]


def number(name: str, value: float | None) -> str:
    """A head's number as text; a dash where it has no meaning."""
    return "-" if value is None else f"{value:.{COLUMNS[name].decimals}f}"


def heads_table(maps: Sequence[Map]) -> Grid:
    """A line a head."""
    names = shown_numbers(maps)
    grid = Grid(["attention", "layer", "head", *(COLUMNS[name].title for name in names)], keys=3)
    for one in maps:
        cells = [NAMES[one.kind], str(one.layer), str(one.head)]
        grid.add([*cells, *(number(name, one.numbers.get(name)) for name in names)])
    return grid


def steps_table(steps: Sequence[Step], say: Callable[[str], str] = str) -> Grid:
    """A line a step. say: what is printed of a label."""
    grid = Grid(["step", "reads", "writes", "p", "or", "looks at"], keys=3, left=frozenset({4, 5}))
    for place, step in enumerate(steps, start=1):
        others = "  ".join(f"{say(label)} {p:.3f}" for label, p in step.others)
        sources = "  ".join(f"{say(label)} {p:.2f}" for label, p in step.sources)
        grid.add([str(place), say(step.read), say(step.chosen), f"{step.p:.3f}", others, sources])
    return grid


def side(width: int) -> int:
    """How many parts of a text a map in a terminal of this width shows at most: one a column, and no more than fit a screen."""
    return max(8, min(40, width - _LABEL - 5))


@dataclass
class Maps:
    """The maps of heads, those of one layer side by side; a query a row, a key a column, the shade its weight."""

    maps: Sequence[Map]
    axes: Mapping[str, Axes]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        lines = list(self._lines(options.max_width, SHADES if not options.ascii_only else ASCII_SHADES))
        if len(lines) > _MOST_LINES:
            yield Text(
                f"({len(self.maps)} heads: too many to draw here; layers=[1] heads=[1,2] draws some)",
                style="dim",
            )
            return
        yield from lines

    def _lines(self, width: int, shades: str) -> Iterator[Text]:
        share = ", ".join(f"{shade} from {step:.0%}" for shade, step in zip(shades[1:], STEPS, strict=True))
        yield Text(f"a query a row, a key a column: {share}", style="dim")
        for kind, layer in dict.fromkeys((one.kind, one.layer) for one in self.maps):
            heads = [one for one in self.maps if (one.kind, one.layer) == (kind, layer)]
            axes = self.axes[kind]
            yield Text("")
            yield Text(f"{NAMES[kind]} attention, layer {layer}", style="bold")
            if kind == "cross":
                yield from _wrapped([f"{n} {label}" for n, label in enumerate(axes.columns, 1)], "source: ", width)
            yield from self._layer(heads, axes, width, shades)

    def _layer(self, heads: Sequence[Map], axes: Axes, width: int, shades: str) -> Iterator[Text]:
        digits = len(str(len(axes.rows)))
        label = min(_LABEL, max(cell_len(text) for text in axes.rows))
        margin = digits + 1 + label + 1
        n = len(axes.columns)
        cell = 2 if margin + 2 * n <= width else 1
        wide = max(cell * n, len("head 00"))
        fit = max(1, (width - margin + 2) // (wide + 2))
        for first in range(0, len(heads), fit):
            some = heads[first : first + fit]
            yield Text(" " * margin + "  ".join(f"head {one.head}".ljust(wide) for one in some).rstrip())
            ruler = _ruler(n, cell)
            yield Text(" " * margin + "  ".join(ruler.ljust(wide) for _ in some).rstrip(), style="dim")
            for row, text in enumerate(axes.rows):
                line = Text(f"{row + 1:>{digits}} {_cut(text, label)} ")
                for place, one in enumerate(some):
                    cells = "".join(_shade(weight, shades) * cell for weight in one.weights[row])
                    line.append(("  " if place else "") + cells.ljust(wide), style="cyan")
                line.rstrip()
                yield line


def _ruler(n: int, cell: int) -> str:
    """The numbers of the first column and of every fifth, each over the end of its column."""
    line = " " * (cell - 1) + "1"
    for place in range(5, n + 1, 5):
        line = line.ljust(place * cell - len(str(place))) + str(place)
    return line


def _shade(weight: float, shades: str) -> str:
    return shades[sum(weight >= step for step in STEPS)]


def _cut(text: str, width: int) -> str:
    return set_cell_size(text, width) if cell_len(text) <= width else set_cell_size(text, width - 1) + "~"


def _wrapped(words: Sequence[str], start: str, width: int) -> Iterator[Text]:
    """Words one after another, as many a line as fit, none of them cut in two."""
    line = start
    for word in words:
        if cell_len(line) + cell_len(word) > width and line.strip():
            yield Text(line.rstrip(), style="dim")
            line = " " * len(start)
        line += f"{word}  "
    yield Text(line.rstrip(), style="dim")


_CELLS = 40_000  # of all maps of a picture together
_PIXELS = 150, 420  # the side of a map: of many, and of one


def picture_side(n_maps: int) -> int:
    """How many parts a side a map of a picture of so many has at most."""
    return max(8, min(64, math.isqrt(_CELLS // max(1, n_maps))))


def figure(maps: Sequence[Map], axes: Mapping[str, Axes], *, heading: str) -> Any:
    """All maps as one picture: a row a layer, a column a head, the colour the square root of the weight."""
    import altair

    many = len(maps) > 1
    side = _PIXELS[0] if many else _PIXELS[1]
    rows = []
    for kind, layer in dict.fromkeys((one.kind, one.layer) for one in maps):
        heads = [one for one in maps if (one.kind, one.layer) == (kind, layer)]
        drawn = [_heat(one, axes[kind], side, labelled=place == 0, named=many) for place, one in enumerate(heads)]
        rows.append(altair.hconcat(*drawn, spacing=8))
    scale = "a query a row, a key a column; the colour is the square root of the weight, from 0 (light) to 1 (dark)"
    title = altair.Title(heading, subtitle=scale, anchor="start", offset=10, fontSize=14, subtitleFontSize=10)
    return styled(altair.vconcat(*rows, spacing=14).properties(title=title))


def _heat(one: Map, axes: Axes, side: int, *, labelled: bool, named: bool) -> Any:
    """One head; the labels of the queries only where they are asked for, those of the keys where they can be read."""
    import altair

    cells = [
        {"i": i, "j": j, "weight": round(float(weight), 4)}
        for i, row in enumerate(one.weights)
        for j, weight in enumerate(row)
        if weight >= 0.001
    ]
    legible = side / max(len(axes.rows), len(axes.columns)) >= 6
    x, y = (
        altair.Axis(
            labelExpr=f"{json.dumps([_short(label) for label in labels])}[datum.value]",
            title=None, ticks=False, domain=False, labels=shown and legible, labelFontSize=9, labelLimit=70,
            labelOverlap=False, **turned,
        )
        for labels, shown, turned in (
            (axes.columns, True, {"labelAngle": -90, "orient": "bottom"}), (axes.rows, labelled, {}),
        )
    )  # fmt: skip
    chart = altair.Chart(altair.Data(values=cells or [{"i": 0, "j": 0, "weight": 0.0}])).mark_rect()
    chart = chart.encode(
        x=altair.X("j:O", scale=altair.Scale(domain=list(range(len(axes.columns))), padding=0), axis=x),
        y=altair.Y("i:O", scale=altair.Scale(domain=list(range(len(axes.rows))), padding=0), axis=y),
        color=altair.Color(
            "weight:Q", scale=altair.Scale(domain=[0, 1], type="sqrt", range=["#f4f6f8", "#0072B2", "#00263d"]),
            legend=None,
        ),
    )  # fmt: skip
    name = f"{NAMES[one.kind]}, layer {one.layer}, head {one.head}" if labelled or not named else f"head {one.head}"
    heading = altair.Title(name, anchor="start", fontSize=10, fontWeight="normal", offset=3)
    return chart.properties(width=side, height=side * len(axes.rows) / len(axes.columns), title=heading)


def _short(label: str) -> str:
    return label if len(label) <= 12 else f"{label[:11]}…"
