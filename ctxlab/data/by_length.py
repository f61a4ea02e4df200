"""Batches of like lengths and equal tokens, a function of seed and step.

An epoch's examples are sorted by length, with a share of chance so that no two epochs cut them alike, and laid end to end;
batch k holds the examples that begin in its `batch_tokens` of that line. So an epoch has as many batches as its tokens fill,
whatever the order, and all that a loader has to remember is one integer. The batches of an epoch come in an order of their own.

Examples of two sides, each padded by itself, can be as long and yet not alike. Of n batches the line is then cut in sqrt(n)
spans of sqrt(n) batches, and a span is sorted by how much longer one side is than the other.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator

import numpy as np
from torch.utils.data import Dataset

from ctxlab.data.permutation import permute, uniform
from ctxlab.data.stream import Batch, row_batch
from ctxlab.data.windows import IGNORED, Row

_SPREAD = 0.1  # by how much of its length an example may stand away from its place among the sorted ones
_FINE = 1 << 20


class LengthOrder:
    """Which examples each batch holds, of those whose `tokens` (n,) a model reads; `kept` (n,) are their numbers, `lean` (n,)
    the tokens of one side less those of the other, where there are two."""

    def __init__(
        self, tokens: np.ndarray, kept: np.ndarray, *, batch_tokens: int, seed: int, lean: np.ndarray | None = None
    ) -> None:
        self.tokens, self.kept, self.batch_tokens, self.seed, self.lean = tokens, kept, batch_tokens, seed, lean
        self.n_batches = -(-int(tokens.sum()) // batch_tokens)
        self._epoch = -1
        self._line: tuple[np.ndarray, np.ndarray] | None = None

    def batch(self, number: int) -> np.ndarray:
        """The examples of batch `number`, counted over all epochs. Where none begins in its part of the line, the last before."""
        epoch, place = divmod(number, self.n_batches)
        order, edges = self._sorted(epoch)
        which = int(permute(np.array([place]), self.n_batches, self.seed, epoch)[0])
        first, last = edges[which], edges[which + 1]
        if first == last:
            first, last = max(first - 1, 0), max(first, 1)
        return self.kept[order[first:last]]

    def _sorted(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """An epoch's examples in their line, and where each batch begins in it, (n_batches + 1,)."""
        if self._line is None or self._epoch != epoch:
            chance = uniform(np.arange(len(self.kept)), np.full(len(self.kept), _FINE), self.seed, epoch, 1) / _FINE
            order = np.argsort(self.tokens * (1 + _SPREAD * (chance - 0.5)), kind="stable")
            if self.lean is not None:
                span = self._begins(order) // (self.batch_tokens * max(1, round(math.sqrt(self.n_batches))))
                order = order[np.lexsort((self.lean[order], span))]
            begins = self._begins(order)
            edges = np.searchsorted(begins, np.arange(self.n_batches + 1) * self.batch_tokens)
            self._epoch, self._line = epoch, (order, edges)
        return self._line

    def _begins(self, order: np.ndarray) -> np.ndarray:
        """Where on its line, in tokens, each example of an order begins."""
        tokens = self.tokens[order]
        begins: np.ndarray = np.cumsum(tokens) - tokens
        return begins


class LengthStream(Dataset[Batch]):
    """Every micro-batch of one rank, by number from the start of the run. A batch's examples are dealt out to ranks, and in
    each to `n_micro` micro-batches."""

    in_order = False

    def __init__(
        self, order: LengthOrder, *, n_steps: int, n_micro: int = 1, rank: int = 0, world: int = 1, pad_id: int = 0
    ) -> None:
        self.order, self.n_steps, self.n_micro = order, n_steps, n_micro
        self.rank, self.world, self.pad_id = rank, world, pad_id

    @abstractmethod
    def read(self, indices: np.ndarray, n_targets: int) -> Batch:
        """Some examples side by side, padded on the right."""

    @abstractmethod
    def n_targets(self, indices: np.ndarray) -> int:
        """Scored targets of some examples, without reading them."""

    def micro_batches(self, step: int) -> int:
        return self.n_micro

    def first_of(self, step: int) -> int:
        return step * self.n_micro

    def __getitem__(self, number: int) -> Batch:
        step, micro = divmod(number, self.n_micro)
        whole = self.order.batch(step)
        mine = whole[self.rank * self.n_micro + micro :: self.world * self.n_micro]
        # A rank without an example of its own still takes part: it reads one, and scores nothing of it.
        batch = self.read(mine if len(mine) else whole[:1], self.n_targets(whole))
        if not len(mine):
            batch.targets.fill_(IGNORED)
        return batch


class Examples(ABC):
    """What a split is to a model, row by row. `tokens` and `targets` (n,): what is read and what is scored of each; `kept`:
    the numbers of those that can be trained on."""

    tokens: np.ndarray
    targets: np.ndarray
    kept: np.ndarray

    @abstractmethod
    def row(self, index: int) -> Row: ...


class ExampleStream(LengthStream):
    """Every micro-batch of one rank, of examples."""

    def __init__(self, examples: Examples, *, batch_tokens: int, seed: int, **shares: int) -> None:
        kept = examples.kept
        super().__init__(LengthOrder(examples.tokens[kept], kept, batch_tokens=batch_tokens, seed=seed), **shares)
        self.examples = examples

    def read(self, indices: np.ndarray, n_targets: int) -> Batch:
        return row_batch([self.examples.row(int(index)) for index in indices], self.pad_id, n_targets)

    def n_targets(self, indices: np.ndarray) -> int:
        return int(self.examples.targets[indices].sum())


def even_parts(rows: np.ndarray, sizes: np.ndarray, batch_tokens: int) -> Iterator[np.ndarray]:
    """Rows in the order of their rising `sizes`, cut so that each part, padded to its longest, has so many tokens at most."""
    first = 0
    while first < len(rows):
        padded = sizes[first:] * np.arange(1, len(rows) - first + 1)
        more = max(1, int(np.searchsorted(padded, batch_tokens, side="right")))
        yield rows[first : first + more]
        first += more
