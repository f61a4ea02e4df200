"""Sentence pairs in batches of like lengths (`data/by_length.py`), source and target counted."""

from __future__ import annotations

import numpy as np
import torch

from ctxlab.data.by_length import LengthOrder, LengthStream
from ctxlab.data.pairs.dataset import Pairs
from ctxlab.data.stream import Batch, padded
from ctxlab.data.windows import IGNORED
from ctxlab.errors import DataError


class PairOrder(LengthOrder):
    """Which pairs of a split each batch holds. Pairs with a side longer than `longest` tokens are left out.

    Raises DataError where all are.
    """

    def __init__(self, pairs: Pairs, *, batch_tokens: int, seed: int, longest: int) -> None:
        self.pairs = pairs
        sizes = read_sizes(pairs)
        kept = np.flatnonzero((sizes <= longest).all(0))
        if not len(kept):
            raise nothing_fits(pairs, longest)
        source, target = sizes[:, kept]
        super().__init__(source + target, kept, batch_tokens=batch_tokens, seed=seed, lean=source - target)


def read_sizes(pairs: Pairs) -> np.ndarray:
    """Tokens that a model reads of each source and of each target, (2, n)."""
    return np.stack([pairs.source.sizes, pairs.target.sizes - 1])


def nothing_fits(pairs: Pairs, longest: int) -> DataError:
    """What to say where every pair of a split has a side longer than `longest` tokens."""
    return DataError(
        f"context: no pair of the {pairs.name} split is as short as {longest} tokens; the nearest valid value is "
        f"{int(read_sizes(pairs).max(0).min())}"
    )


class PairStream(LengthStream):
    """Every micro-batch of one rank."""

    order: PairOrder

    def read(self, indices: np.ndarray, n_targets: int) -> Batch:
        return pair_batch(self.order.pairs, indices, self.pad_id, n_targets)

    def n_targets(self, indices: np.ndarray) -> int:
        return int((self.order.pairs.target.sizes[indices] - 1).sum())


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
