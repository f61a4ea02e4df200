"""Curves in the terminal: where a value stands, what the axis says, and the same in ASCII."""

from __future__ import annotations

import io
import itertools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from ctxlab.report.terminal import Chart, _binary_ticks, _spread, _ticks
from ctxlab.units import format_bytes, format_length
from tests.report.builders import CONTEXTS, CURVES, text_of


def chart(curves: dict[str, list[tuple[float, float]]], **settings: Any) -> Chart:
    ticks = sorted({x for points in curves.values() for x, _ in points})
    return Chart(
        "nats/token by context", curves, x_ticks=ticks, x_name=lambda x: format_length(int(x)),
        y_name=lambda y: f"{y:g}", **settings,
    )  # fmt: skip


def positions(lines: list[str], mark: str) -> list[tuple[int, int]]:
    """(row, column) of a mark, names at the right left out."""
    return [(row, column) for row, line in enumerate(lines) for column, c in enumerate(line) if c == mark]


def test_a_straight_line_is_drawn_straight() -> None:
    """Loss falling by the same amount a doubling: on a log axis the marks stand on a diagonal, evenly spaced."""
    lines = text_of(chart({"a": [(2**n, 8.0 - n) for n in range(5)]}), width=40).splitlines()
    marks = positions(lines, "●")
    rows, columns = [row for row, _ in marks], [column for _, column in marks]
    assert columns == sorted(columns)
    assert {b - a for a, b in itertools.pairwise(columns)} <= {8, 9, 10}
    assert {b - a for a, b in itertools.pairwise(rows)} <= {2, 3}


def test_ticks_stand_under_their_marks_and_the_trained_length_is_named() -> None:
    lines = text_of(chart({"a": [(c, 1.0) for c in CONTEXTS]}, at=256), width=70).splitlines()
    axis = next(line for line in lines if "┬" in line)
    ticks = [column for column, c in enumerate(axis) if c == "┬"]
    assert [column for _, column in positions(lines, "●")] == ticks
    names = lines[lines.index(axis) + 1]
    assert names.split() == ["128", "256", "512", "1k", "2k"]
    assert all(name[0] <= tick <= name[1] for name, tick in zip(_spans(names), ticks, strict=True))
    below = lines[lines.index(axis) + 2]
    assert below.strip() == "trained"
    start, end = _spans(below)[0]
    assert abs((start + end) // 2 - ticks[1]) <= 1
    assert {line.index("┊") for line in lines if "┊" in line} == {ticks[1]}


def _spans(line: str) -> list[tuple[int, int]]:
    spans, start = [], None
    for column, c in enumerate(f"{line} "):
        if c != " " and start is None:
            start = column
        elif c == " " and start is not None:
            spans.append((start, column - 1))
            start = None
    return spans


def test_every_curve_is_named_at_its_end_in_the_order_of_their_ends() -> None:
    curves = {name: list(zip(CONTEXTS, values, strict=False)) for name, values in CURVES.items()}
    lines = text_of(chart(curves), width=80).splitlines()
    ends = [line.split()[-2:] for line in lines if line.endswith(tuple(CURVES))]
    assert ends == [["●", "rope"], ["▲", "learned"], ["■", "alibi"]]
    assert max(map(len, lines)) <= 80


def test_without_unicode_the_same_picture_is_ascii() -> None:
    class Ascii(io.StringIO):
        encoding = "ascii"

    curves = {name: list(zip(CONTEXTS, values, strict=False)) for name, values in CURVES.items()}
    file = Ascii()
    Console(file=file, width=80, color_system=None).print(chart(curves, at=256))
    drawn = file.getvalue()
    assert drawn.isascii()
    unicode = text_of(chart(curves, at=256), width=80).splitlines()
    plain = [line.rstrip() for line in drawn.rstrip().splitlines()]
    assert positions(plain[1:], "x") == positions(unicode[1:], "■")
    assert [line.endswith("o rope") for line in plain] == [line.endswith("● rope") for line in unicode]


def test_bytes_have_binary_ticks() -> None:
    drawn = Chart(
        "memory", {"m": [(256, 100 * 2**20), (512, 700 * 2**20)]}, x_ticks=[256, 512], x_name=str, y_name=format_bytes,
        log_y=True, binary_y=True,
    )  # fmt: skip
    assert [line.split(" ┤")[0].strip() for line in text_of(drawn).splitlines() if "┤" in line] == [
        "512 MiB", "256 MiB", "128 MiB",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("curves", "line"),
    [
        ({}, "(nothing to draw)"),
        ({"a": []}, "(nothing to draw)"),
        ({str(n): [(1, n), (2, n)] for n in range(12)}, "(12 curves: too many to tell apart here)"),
    ],
)
def test_what_cannot_be_drawn_is_said(curves: dict[str, list[tuple[float, float]]], line: str) -> None:
    assert text_of(chart(curves)).splitlines() == ["nats/token by context", line]


@given(low=st.floats(1e-3, 1e6), size=st.floats(1e-3, 1e6))
def test_ticks_are_two_to_six_within_the_range(low: float, size: float) -> None:
    ticks = _ticks(low, low + size, log=False)
    assert 2 <= len(ticks) <= 6
    assert all(low - 1e-9 * low <= tick <= (low + size) * (1 + 1e-9) for tick in ticks)
    steps = [b - a for a, b in itertools.pairwise(ticks)]
    assert max(steps) - min(steps) <= 1e-6 * max(ticks)


@given(low=st.floats(1e3, 1e12), ratio=st.floats(1.2, 1e4))
def test_binary_ticks_lie_within_the_range(low: float, ratio: float) -> None:
    ticks = _binary_ticks(low, low * ratio)
    assert ticks
    assert all(low * (1 - 1e-9) <= tick <= low * ratio * (1 + 1e-9) for tick in ticks)
    assert ticks == sorted(set(ticks))


@given(st.lists(st.floats(0, 11), min_size=1, max_size=11))
def test_labels_get_rows_of_their_own_in_order(wanted: list[float]) -> None:
    rows = _spread({str(n): row for n, row in enumerate(wanted)}, 12)
    assert len(set(rows.values())) == len(wanted)
    assert all(0 <= row < 12 for row in rows.values())
    by_wish = sorted(rows, key=lambda name: wanted[int(name)])
    assert [rows[name] for name in by_wish] == sorted(rows.values())
    apart = all(abs(a - b) >= 2 for n, a in enumerate(wanted) for b in wanted[:n])
    if apart and max(wanted) <= 11 and len(wanted) == 1:
        assert rows["0"] == int(wanted[0] + 0.5)
