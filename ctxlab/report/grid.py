"""A table that never loses a column: what is wider than the terminal goes on below, its first columns repeated."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

_GAP = 2  # spaces between columns


@dataclass
class Grid:
    """Columns of text. The first `keys` columns say what a row is about; they stand left, the others right.

    With `stack` off, columns that do not fit are left out, the last ones first.
    """

    titles: list[str]
    keys: int = 1
    heading: str = ""
    stack: bool = True
    rows: list[list[str]] = field(default_factory=list)
    styles: list[str] = field(default_factory=list)
    left: frozenset[int] = frozenset()  # columns of words among those of numbers

    def add(self, cells: Sequence[str], *, style: str = "") -> None:
        """One row, a cell a column."""
        if len(cells) != len(self.titles):
            raise ValueError(f"a row of {len(cells)} cells in a table of {len(self.titles)} columns")
        self.rows.append(list(cells))
        self.styles.append(style)

    def width(self, column: int) -> int:
        return max(cell_len(text) for text in (self.titles[column], *(row[column] for row in self.rows)))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if self.heading:
            yield Text(self.heading, style="bold")
        for number, columns in enumerate(self.parts(options.max_width)):
            if number:
                yield Text("")
            yield self._table(columns)
            if not self.stack:
                return

    def parts(self, width: int) -> Iterator[list[int]]:
        """The columns of each table: as many as fit side by side, at least one beside the keys."""
        keys = list(range(self.keys))
        taken = sum(self.width(key) + _GAP for key in keys) - _GAP
        part: list[int] = []
        used = taken
        for column in range(self.keys, len(self.titles)):
            needed = self.width(column) + _GAP
            if part and used + needed > width:
                yield keys + part
                part, used = [], taken
            part.append(column)
            used += needed
        yield keys + part

    def _table(self, columns: list[int]) -> Table:
        table = Table(box=None, pad_edge=False, padding=(0, _GAP, 0, 0), header_style="bold")
        for column in columns:
            words = column < self.keys or column in self.left
            table.add_column(
                Text(self.titles[column]), justify="left" if words else "right", no_wrap=not words, overflow="fold"
            )
        for row, style in zip(self.rows, self.styles, strict=True):
            table.add_row(*(Text(row[column]) for column in columns), style=style)
        return table
