"""The order in which a run reads its pairs: batches of like lengths and equal tokens, a function of seed and step.

An epoch's pairs are sorted by length, with a share of chance so that no two epochs cut them alike, and laid end to end;
batch k holds the pairs that begin in its `batch_tokens` of that line, source and target counted. So an epoch has as many
batches as its tokens fill, whatever the order, and all that a loader has to remember is one integer. The batches of an
epoch come in an order of their own.
"""

from __future__ import annotations

import numpy as np
import torch
from torch.utils.data import Dataset

from ctxlab.data.pairs.dataset import Pairs
from ctxlab.data.permutation import permute, uniform
from ctxlab.data.stream import Batch, padded
from ctxlab.data.windows import IGNORED
from ctxlab.errors import DataError

_SPREAD = 0.1  # by how much of its length a pair may stand away from its place among the sorted ones
_FINE = 1 << 20


class PairOrder:
    """Which pairs of a split each batch holds. Pairs with a side longer than `longest` tokens are left out.

    Raises DataError where all are.
    """

    def __init__(self, pairs: Pairs, *, batch_tokens: int, seed: int, longest: int) -> None:
        self.pairs, self.batch_tokens, self.seed = pairs, batch_tokens, seed
        sizes = np.stack([pairs.source.sizes, pairs.target.sizes - 1])  # what the model reads of each
        self.kept = np.flatnonzero((sizes <= longest).all(0))
        if not len(self.kept):
            raise DataError(
                f"context: no pair of the {pairs.name} split is as short as {longest} tokens; the nearest valid value is "
                f"{int(sizes.max(0).min(initial=1 << 30))}"
            )
        self.tokens = sizes[:, self.kept].sum(0)
        self.n_batches = -(-int(self.tokens.sum()) // batch_tokens)
        self._epoch = -1
        self._line: tuple[np.ndarray, np.ndarray] | None = None

    def batch(self, number: int) -> np.ndarray:
        """The pairs of batch `number`, counted over all epochs. Where none begins in its part of the line, the last before."""
        epoch, place = divmod(number, self.n_batches)
        order, edges = self._sorted(epoch)
        which = int(permute(np.array([place]), self.n_batches, self.seed, epoch)[0])
        first, last = edges[which], edges[which + 1]
        if first == last:
            first, last = max(first - 1, 0), max(first, 1)
        return self.kept[order[first:last]]

    def _sorted(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """An epoch's pairs in their line, and where each batch begins in it, (n_batches + 1,)."""
        if self._line is None or self._epoch != epoch:
            chance = uniform(np.arange(len(self.kept)), np.full(len(self.kept), _FINE), self.seed, epoch, 1) / _FINE
            order = np.argsort(self.tokens * (1 + _SPREAD * (chance - 0.5)), kind="stable")
            begins = np.concatenate([[0], np.cumsum(self.tokens[order])[:-1]])
            edges = np.searchsorted(begins, np.arange(self.n_batches + 1) * self.batch_tokens)
            self._epoch, self._line = epoch, (order, edges)
        return self._line


class PairStream(Dataset[Batch]):
    """Every micro-batch of one rank, by number from the start of the run. A batch's pairs are dealt out to ranks, and in
    each to `n_micro` micro-batches."""

    in_order = False

    def __init__(
        self, order: PairOrder, *, n_steps: int, n_micro: int = 1, rank: int = 0, world: int = 1, pad_id: int = 0
    ) -> None:
        self.order, self.n_steps, self.n_micro = order, n_steps, n_micro
        self.rank, self.world, self.pad_id = rank, world, pad_id

    def micro_batches(self, step: int) -> int:
        return self.n_micro

    def first_of(self, step: int) -> int:
        return step * self.n_micro

    def __getitem__(self, number: int) -> Batch:
        step, micro = divmod(number, self.n_micro)
        whole = self.order.batch(step)
        mine = whole[self.rank * self.n_micro + micro :: self.world * self.n_micro]
        targets = int((self.order.pairs.target.sizes[whole] - 1).sum())
        # A rank without a pair of its own still takes part: it reads one, and scores nothing of it.
        batch = pair_batch(self.order.pairs, mine if len(mine) else whole[:1], self.pad_id, targets)
        if not len(mine):
            batch.targets.fill_(IGNORED)
        return batch


def pair_batch(pairs: Pairs, indices: np.ndarray, pad_id: int, n_targets: int) -> Batch:
    """Some pairs side by side, padded on the right."""
    sources, targets_whole = ([side.sentence(int(i)) for i in indices] for side in (pairs.source, pairs.target))
    source, source_lengths = padded(sources, pad_id)
    whole, lengths = padded(targets_whole, pad_id)
    tokens, targets = whole[:, :-1].copy(), whole[:, 1:].copy()
    padding = np.arange(targets.shape[1]) >= lengths[:, None] - 1
    tokens[padding], targets[padding] = pad_id, IGNORED
    return Batch(
        torch.from_numpy(tokens),
        torch.from_numpy(targets),
        torch.from_numpy(lengths - 1),
        None,
        n_targets,
        source=torch.from_numpy(source),
        source_lengths=torch.from_numpy(source_lengths),
    )
