"""Curves in the terminal: braille dots for the lines, a mark of its own for each curve's points, names at their ends.

Where the terminal has no Unicode the same picture is made of ASCII.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

Points = Sequence[tuple[float, float]]

_MARKS, _ASCII_MARKS = "●■▲◆▼○□△◇▽", "ox+*#@%&=~"
_COLOURS = ("blue", "red", "green", "magenta", "cyan", "yellow")
MOST = len(_MARKS)  # curves that can be told apart
_WIDEST = 100  # columns: beyond this a curve gets flat, not clearer
_DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))  # braille bits by row and column of a cell


@dataclass
class Chart:
    """Named curves over a common axis. `x_ticks` and `y_ticks` are values; `x_name` and `y_name` make them text.

    `at` marks one x (the trained length) with a dotted line and the word `at_name`.
    """

    heading: str
    curves: Mapping[str, Points]
    x_ticks: Sequence[float]
    x_name: Callable[[float], str]
    y_name: Callable[[float], str]
    log_x: bool = True
    log_y: bool = False
    at: float | None = None
    at_name: str = "trained"
    height: int = 12
    binary_y: bool = False  # ticks at powers of two, for bytes

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Text(self.heading, style="bold")
        curves = {name: points for name, points in self.curves.items() if points}
        if not curves:
            yield Text("(nothing to draw)", style="dim")
            return
        if len(curves) > MOST:
            yield Text(f"({len(curves)} curves: too many to tell apart here)", style="dim")
            return
        yield from self._draw(curves, min(options.max_width, _WIDEST), ascii_only=options.ascii_only)

    def _draw(self, curves: Mapping[str, Points], width: int, *, ascii_only: bool) -> RenderResult:
        xs = [x for points in curves.values() for x, _ in points]
        ys = [y for points in curves.values() for _, y in points]
        bottom, top = _padded(min(ys), max(ys), self.log_y)
        ticks = _binary_ticks(bottom, top) if self.binary_y else _ticks(bottom, top, log=self.log_y)
        names = [self.y_name(tick) for tick in ticks]
        margin = max(cell_len(name) for name in names)
        ends = {name: f"{_mark(n, ascii_only)} {name}" for n, name in enumerate(curves)} if len(curves) > 1 else {}
        right = min(max((cell_len(text) for text in ends.values()), default=-1) + 1, width // 3)
        inner = max(16, width - margin - 2 - right)
        left_x, right_x = min([*xs, *self.x_ticks]), max([*xs, *self.x_ticks])

        def column(x: float) -> float:
            return _share(x, left_x, right_x, log=self.log_x) * (inner - 3) + 1  # a cell's room on either side

        def row(y: float) -> float:
            return (1 - _share(y, bottom, top, log=self.log_y)) * (self.height - 1)

        cells: dict[tuple[int, int], tuple[str, str]] = {}
        if self.at is not None and left_x <= self.at <= right_x:
            for line in range(self.height):
                cells[line, _nearest(column(self.at))] = (":" if ascii_only else "┊", "dim")
        for number, points in enumerate(curves.values()):
            places = [(column(x), row(y)) for x, y in points]
            _line(cells, places, self.height, inner, _COLOURS[number % len(_COLOURS)], ascii_only=ascii_only)
        for number, points in enumerate(curves.values()):
            for x, y in points if len(points) <= inner // 2 else points[-1:]:
                style = _COLOURS[number % len(_COLOURS)]
                cells[_nearest(row(y)), _nearest(column(x))] = (_mark(number, ascii_only), style)

        wanted = {name: row(points[-1][1]) for name, points in curves.items()}
        label_rows = _spread({name: wanted[name] for name in ends}, self.height)
        label_at = {line: name for name, line in label_rows.items()}
        order = list(curves)
        tick_rows = {_nearest(row(tick)): name for tick, name in zip(ticks, names, strict=True)}
        for line in range(self.height):
            axis = ("+" if line in tick_rows else "|") if ascii_only else ("┤" if line in tick_rows else "│")
            text = Text(f"{tick_rows.get(line, ''):>{margin}} {axis}")
            for place in range(inner):
                text.append(*cells.get((line, place), (" ", "")))
            if line in label_at:
                name = label_at[line]
                label = Text(ends[name], style=_COLOURS[order.index(name) % len(_COLOURS)])
                label.truncate(right, overflow="crop" if ascii_only else "ellipsis")
                text.append(" " if right else "").append_text(label)
            text.rstrip()
            yield text
        tick_columns = {_nearest(column(tick)): self.x_name(tick) for tick in self.x_ticks}
        dash, cross, corner = ("-", "+", "+") if ascii_only else ("─", "┬", "└")
        rule = "".join(cross if place in tick_columns else dash for place in range(inner))
        yield Text(f"{'':>{margin}} {corner}{rule}")
        offset = margin + 2
        yield Text(_written(tick_columns, offset, width))
        if self.at is not None and left_x <= self.at <= right_x:
            yield Text(_written({_nearest(column(self.at)): self.at_name}, offset, width), style="dim")


def _mark(number: int, ascii_only: bool) -> str:
    return (_ASCII_MARKS if ascii_only else _MARKS)[number]


def _nearest(place: float) -> int:
    """The cell of a place, halves up, as the dots of `_line` fall (Python's round takes them to the even one)."""
    return math.floor(place + 0.5)


def _share(value: float, low: float, high: float, *, log: bool) -> float:
    if high == low:
        return 0.5
    if log:
        value, low, high = math.log(value), math.log(low), math.log(high)
    return (value - low) / (high - low)


def _padded(low: float, high: float, log: bool) -> tuple[float, float]:
    """A range with some room, never of no height."""
    if log:
        room = max((high / low) ** 0.05, 1.05)
        return low / room, high * room
    room = max(0.05 * (high - low), 0.005 * abs(high), 1e-9)
    return low - room, high + room


def _ticks(low: float, high: float, *, log: bool) -> list[float]:
    """Two to six round values within the range."""
    if log and high / low > 20:
        exponents = range(math.ceil(math.log10(low)), math.floor(math.log10(high)) + 1)
        return _thinned([10.0**e for e in exponents])
    raw = (high - low) / 5
    size = 10.0 ** math.floor(math.log10(raw))
    step = next(size * factor for factor in (1, 2, 2.5, 5, 10) if size * factor >= raw)
    first = math.ceil(low / step)
    return [n * step for n in range(first, math.floor(high / step) + 1)]


def _binary_ticks(low: float, high: float) -> list[float]:
    """Powers of two within a range of bytes, or those and their halves between; round values where it has neither."""
    exponents = range(math.floor(math.log2(low)), math.floor(math.log2(high)) + 1)
    powers = [2.0**e for e in exponents if 2.0**e >= low]
    if len(powers) >= 3:
        return _thinned(powers)
    halves = [2.0**e * part for e in exponents for part in (1, 1.5) if low <= 2.0**e * part <= high]
    if len(halves) >= 2:
        return halves
    unit = 2.0 ** (10 * math.floor(math.log2(high) / 10))
    return [tick * unit for tick in _ticks(low / unit, high / unit, log=False)]


def _thinned(values: list[float]) -> list[float]:
    return values[:: math.ceil(len(values) / 5)] if values else []


def _line(
    cells: dict[tuple[int, int], tuple[str, str]],
    places: Sequence[tuple[float, float]],
    height: int,
    width: int,
    style: str,
    *,
    ascii_only: bool,
) -> None:
    """Straight lines from place to place: braille dots (2 by 4 a cell), or a full stop a cell in ASCII."""
    dots: dict[tuple[int, int], int] = {}
    for (x0, y0), (x1, y1) in itertools.pairwise(places):
        steps = max(1, math.ceil(max(abs(x1 - x0) * 2, abs(y1 - y0) * 4)))
        for step in range(steps + 1):
            x, y = x0 + (x1 - x0) * step / steps + 0.5, y0 + (y1 - y0) * step / steps + 0.5
            place = (min(int(y), height - 1), min(int(x), width - 1))
            dots[place] = dots.get(place, 0) | _DOTS[int(y % 1 * 4)][int(x % 1 * 2)]
    for place, bits in dots.items():
        before = cells.get(place, (" ", ""))[0]
        shared = ord(before) - 0x2800 if "\u2800" <= before <= "\u28ff" else 0
        cells[place] = ("." if ascii_only else chr(0x2800 | bits | shared), style)


def _spread(wanted: Mapping[str, float], height: int) -> dict[str, int]:
    """A row of its own for each label, as near as may be to the one wanted, in the order wanted."""
    names = sorted(wanted, key=lambda name: wanted[name])
    rows: list[int] = []
    for name in names:
        rows.append(max(_nearest(wanted[name]), rows[-1] + 1 if rows else 0))
    for index in range(len(rows) - 1, -1, -1):  # what ran off the bottom moves the others up
        rows[index] = min(rows[index], (rows[index + 1] if index + 1 < len(rows) else height) - 1)
    return dict(zip(names, rows, strict=True))


def _written(names: Mapping[int, str], offset: int, width: int) -> str:
    """Names centred under their columns; one that would run into the name before it is left out."""
    text = ""
    for place, name in sorted(names.items()):
        start = min(max(0, offset + place - len(name) // 2), width - len(name))
        if not text or start > len(text):
            text = text.ljust(start) + name
    return text
