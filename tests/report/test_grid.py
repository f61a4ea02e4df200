"""The table that never loses a column."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ctxlab.report.grid import Grid
from tests.report.builders import text_of


def grid(**settings: object) -> Grid:
    made = Grid(["name", "one", "two", "three"], **settings)  # type: ignore[arg-type]
    made.add(["alpha", "1.5", "22.25", "333"])
    made.add(["b", "10", "-", "4444"])
    return made


def test_words_stand_left_and_numbers_right() -> None:
    assert text_of(grid(heading="numbers"), width=30) == (
        "numbers\nname   one    two  three\nalpha  1.5  22.25    333\nb       10      -   4444"
    )


def test_what_does_not_fit_goes_on_below_with_the_keys() -> None:
    assert text_of(grid(), width=18) == (
        "name   one    two\nalpha  1.5  22.25\nb       10      -\n\nname   three\nalpha    333\nb       4444"
    )


def test_without_stacking_the_last_columns_are_left_out() -> None:
    assert text_of(grid(stack=False), width=18) == "name   one    two\nalpha  1.5  22.25\nb       10      -"


def test_markup_in_cells_is_text() -> None:
    made = Grid(["note", "n"])
    made.add(["[bold]x[/bold] [1,2]", "1"])
    assert "[bold]x[/bold] [1,2]" in text_of(made)


def test_a_row_has_a_cell_for_each_column() -> None:
    with pytest.raises(ValueError, match="a row of 1 cells in a table of 4 columns"):
        grid().add(["alone"])


@given(widths=st.lists(st.integers(1, 12), min_size=2, max_size=9), keys=st.integers(1, 2), width=st.integers(10, 90))
def test_every_column_is_in_exactly_one_part_beside_the_keys(widths: list[int], keys: int, width: int) -> None:
    made = Grid(["x" * size for size in widths], keys=min(keys, len(widths) - 1))
    parts = list(made.parts(width))
    assert [column for part in parts for column in part[made.keys :]] == list(range(made.keys, len(widths)))
    for part in parts:
        assert part[: made.keys] == list(range(made.keys))
        assert sum(widths[column] + 2 for column in part) - 2 <= width or len(part) == made.keys + 1
