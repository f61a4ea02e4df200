"""Who sees whom, beyond causality: which keys a block of queries can reach at all, and which pairs of a tile are hidden."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ctxlab.model.attention.bias import Tile


class Visible(Protocol):
    """A rule of visibility by position. Causality is not its business."""

    def __hash__(self) -> int: ...  # equal rules share what is made of them

    @property
    def most(self) -> int:
        """How many keys a causal query sees at most."""
        ...

    def low(self, first: int) -> int:
        """The first key that any query from position `first` on sees."""
        ...

    def high(self, last: int) -> int:
        """One behind the last key that any query up to position `last` sees, if the mask is not causal."""
        ...

    def sees(self, i: Tensor, j: Tensor) -> Tensor:
        """Whether queries at positions i see keys at positions j."""
        ...

    def seen_by(self, i: Tensor) -> tuple[Tensor, Tensor]:
        """The same, said of all keys at once: a query at position i sees those in [low, high). Both grow with i."""
        ...

    def hidden(self, tile: Tile, device: torch.device) -> Tensor | None:
        """Which pairs of a tile are hidden, (m,n) bool; None where none is."""
        ...


@dataclass(frozen=True)
class Window:
    """|i - j| < size: the query itself counts."""

    size: int

    @property
    def most(self) -> int:
        return self.size

    def low(self, first: int) -> int:
        return max(0, first - self.size + 1)

    def high(self, last: int) -> int:
        return last + self.size

    def sees(self, i: Tensor, j: Tensor) -> Tensor:
        return (i - j).abs() < self.size

    def seen_by(self, i: Tensor) -> tuple[Tensor, Tensor]:
        return (i - self.size + 1).clamp(min=0), i + self.size

    def hidden(self, tile: Tile, device: torch.device) -> Tensor | None:
        if tile.queries[0] - tile.keys.start < self.size and tile.nearest > -self.size:
            return None
        return ~self.sees(*_positions(tile, device))


@dataclass(frozen=True)
class Chunk:
    """i // size = j // size: positions are cut into chunks, counted from the first key, that do not see one another."""

    size: int

    @property
    def most(self) -> int:
        return self.size

    def low(self, first: int) -> int:
        return first // self.size * self.size

    def high(self, last: int) -> int:
        return self.low(last) + self.size

    def sees(self, i: Tensor, j: Tensor) -> Tensor:
        return i // self.size == j // self.size

    def seen_by(self, i: Tensor) -> tuple[Tensor, Tensor]:
        start = i // self.size * self.size
        return start, start + self.size

    def hidden(self, tile: Tile, device: torch.device) -> Tensor | None:
        start, stop = self.low(tile.queries[-1]), self.high(tile.queries[-1])
        if start <= tile.keys.start and max(tile.keys.stop - 1, tile.queries[0]) < stop:
            return None
        return ~self.sees(*_positions(tile, device))


@dataclass(frozen=True)
class Remembered:
    """A position sees its own segment of `size` tokens and the `memory` tokens before it, a multiple of `size`."""

    size: int
    memory: int

    @property
    def most(self) -> int:
        return self.size + self.memory

    def low(self, first: int) -> int:
        return max(0, first // self.size * self.size - self.memory)

    def high(self, last: int) -> int:
        return last // self.size * self.size + self.size

    def sees(self, i: Tensor, j: Tensor) -> Tensor:
        back = i // self.size - j // self.size  # in segments
        return (back >= 0) & (back <= self.memory // self.size)

    def seen_by(self, i: Tensor) -> tuple[Tensor, Tensor]:
        start = i // self.size * self.size
        return (start - self.memory).clamp(min=0), start + self.size

    def hidden(self, tile: Tile, device: torch.device) -> Tensor | None:
        start, stop = self.low(tile.queries[0]), self.high(tile.queries[-1])
        if start <= tile.keys.start and tile.keys.stop <= stop:
            return None
        return ~self.sees(*_positions(tile, device))


def _positions(tile: Tile, device: torch.device) -> tuple[Tensor, Tensor]:
    """Those of a tile's queries, (m,1), and of its keys, (1,n)."""
    i = torch.arange(tile.queries.start, tile.queries.stop, -1, device=device)
    j = torch.arange(tile.keys.start, tile.keys.stop, device=device)
    return i[:, None], j[None, :]
