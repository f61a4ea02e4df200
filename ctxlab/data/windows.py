"""How documents are cut into rows: windows for training, packed rows, segments for evaluation. Ids in, ids out, no torch.

A row of n inputs t[i:i+n] has the targets t[i+1:i+n+1]. Windows never cross documents; a packed row holds several
documents side by side as segments, which the model keeps apart.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple, Protocol

import numpy as np

from ctxlab.data.permutation import uniform
from ctxlab.data.tokens import Split
from ctxlab.errors import DataError

IGNORED = -100  # a target that is not scored
_REMEMBERED = 4096  # rows that are made on demand and kept


class Row(NamedTuple):
    """One row of a batch: at most `context` inputs and their targets, and the documents' lengths when packed."""

    tokens: np.ndarray  # (n,)
    targets: np.ndarray  # (n,) int64, IGNORED where nothing is scored
    segments: tuple[int, ...]
    source: np.ndarray | None = None  # (m,) what an encoder reads, where there is one


class Rows(Protocol):
    """All rows of a split at one context, in an order without meaning; an epoch is one pass over all."""

    n: int

    def n_targets(self, indices: np.ndarray, epochs: np.ndarray) -> int:
        """Scored targets of some rows, without reading them."""
        ...

    def row(self, index: int, epoch: int) -> Row: ...


class MadeRows:
    """Rows that are made when they are read. Those of a step are asked for twice, to count their targets and to be read:
    they are kept."""

    def __init__(self, n: int, make: Callable[[int, int], Row]) -> None:
        self.n = n
        self.row = functools.lru_cache(maxsize=_REMEMBERED)(make)

    def n_targets(self, indices: np.ndarray, epochs: np.ndarray) -> int:
        rows = (self.row(int(index), int(epoch)) for index, epoch in zip(indices, epochs))
        return sum(int((row.targets != IGNORED).sum()) for row in rows)


class Windows:
    """Windows of `context` inputs that follow one another in a document.

    A document of L tokens has floor((L - 1) / context) windows, or one short one; the tokens that are left over are put
    before the first or behind the last, by another share in each epoch.
    """

    def __init__(self, split: Split, context: int, seed: int) -> None:
        self.split, self.context, self.seed = split, context, seed
        self.targets = np.maximum(split.sizes - 1, 0)  # of each document
        if not len(self.targets) or self.targets.max() < context:
            longest = int(self.targets.max(initial=0))
            raise DataError(
                f"context: {context} is longer than every document of the {split.name} split; the nearest valid value "
                f"is {longest}, or pack documents with data.packed=true"
            )
        self.counts = np.where(self.targets > 0, np.maximum(self.targets // context, 1), 0)
        self.ends = np.cumsum(self.counts)
        self.n = int(self.ends[-1])

    def n_targets(self, indices: np.ndarray, epochs: np.ndarray) -> int:
        return int(np.minimum(self.targets[self._documents(indices)], self.context).sum())

    def row(self, index: int, epoch: int) -> Row:
        document = int(self._documents(np.array([index]))[0])
        window = index - int(self.ends[document] - self.counts[document])
        slack = max(0, int(self.targets[document]) - int(self.counts[document]) * self.context)
        offset = uniform(np.array([document]), np.array([slack + 1]), self.seed, epoch)[0]
        start = int(self.split.starts[document] + offset) + window * self.context
        n = min(self.context, int(self.targets[document]))
        ids = self.split.tokens[start : start + n + 1]
        return Row(ids[:-1], ids[1:].astype(np.int64), ())

    def is_first(self, indices: np.ndarray) -> np.ndarray:
        """Whether each window is the first of its document."""
        documents = self._documents(indices)
        return indices == self.ends[documents] - self.counts[documents]

    def _documents(self, indices: np.ndarray) -> np.ndarray:
        return np.searchsorted(self.ends, indices, side="right")


class Packed:
    """Rows of exactly `context` inputs cut out of all documents laid end to end, from another first token in each epoch.

    A row's documents are its segments. The last token of a document has no target.
    """

    def __init__(self, split: Split, context: int, seed: int) -> None:
        self.split, self.context, self.seed = split, context, seed
        self.n = (len(split.tokens) - context) // context  # the last row of the last phase has its last target, too
        if self.n < 1:
            raise DataError(
                f"context: the {split.name} split has {len(split.tokens)} tokens, too few for rows of {context}; the "
                f"nearest valid value is {len(split.tokens) // 2}"
            )

    def n_targets(self, indices: np.ndarray, epochs: np.ndarray) -> int:
        starts = self._starts(indices, epochs)
        # A document that ends at e has its last token at e - 1, which is an input without a target.
        ends = np.searchsorted(self.split.starts[1:], starts + self.context, side="right")
        before = np.searchsorted(self.split.starts[1:], starts, side="right")
        return len(indices) * self.context - int((ends - before).sum())

    def row(self, index: int, epoch: int) -> Row:
        start = int(self._starts(np.array([index]), np.array([epoch]))[0])
        ids = self.split.tokens[start : start + self.context + 1].astype(np.int64)
        first, last = np.searchsorted(self.split.starts, [start, start + self.context], side="right")
        cuts = np.asarray(self.split.starts[first:last]) - start  # where documents end within the row, 1 to context
        targets = ids[1:].copy()
        targets[cuts - 1] = IGNORED
        edges = [0, *cuts.tolist(), self.context]
        segments = tuple(b - a for a, b in pairwise(edges) if b > a)
        return Row(ids[:-1], targets, segments)

    def _starts(self, indices: np.ndarray, epochs: np.ndarray) -> np.ndarray:
        phase = uniform(epochs, np.full(len(epochs), self.context), self.seed)
        return indices * self.context + phase


class EvalSegments:
    """Segments of `length` targets that follow one another in each document, from its first token on; what is left over
    at its end is not scored. With `max_segments` a part of them: as many from every document as from every other (all
    that it has where that is fewer), evenly spaced in it.
    """

    def __init__(self, split: Split, length: int, *, max_segments: int | None = None) -> None:
        self.split, self.length = split, length
        counts = np.maximum(split.sizes - 1, 0) // length
        quotas = counts if max_segments is None else _share_out(counts, max_segments)
        documents = np.repeat(np.arange(split.n_documents), quotas)
        number = np.arange(len(documents)) - np.repeat(np.cumsum(quotas) - quotas, quotas)
        self._documents = documents
        self._within = number * counts[documents] // np.maximum(quotas[documents], 1)
        self.n = len(documents)

    @property
    def rows(self) -> np.ndarray:
        """Of each segment, the place of its document among those that have segments, (n,)."""
        return np.unique(self._documents, return_inverse=True)[1]

    @property
    def begin_documents(self) -> np.ndarray:
        """Which segments are the first of their documents, (n,) bool."""
        return self._within == 0

    def segment(self, index: int) -> tuple[int, np.ndarray]:
        """(document, its length + 1 tokens)."""
        document = int(self._documents[index])
        start = int(self.split.starts[document]) + self.start(index)
        return document, self.split.tokens[start : start + self.length + 1]

    def start(self, index: int) -> int:
        """Where in its document a segment begins."""
        return int(self._within[index]) * self.length


def longest_length(split: Split, lengths: Sequence[int], *, min_docs: int) -> int | None:
    """The longest of the lengths that `min_docs` documents have as many targets as; None where there is none."""
    targets = split.sizes - 1
    filled = [length for length in lengths if int((targets >= length).sum()) >= min_docs]
    return max(filled, default=None)


def _share_out(counts: np.ndarray, most: int) -> np.ndarray:
    """How many each may have when together they have at most `most`: the same for all, less only where there is less."""
    low, high = 0, int(counts.max(initial=0))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if int(np.minimum(counts, middle).sum()) <= most else (low, middle - 1)
    quotas = np.minimum(counts, low)
    more = np.flatnonzero(counts > low)
    left = most - int(quotas.sum())
    if low < int(counts.max(initial=0)) and left > 0:  # one more for some of them, evenly spread
        quotas[more[np.arange(left) * len(more) // left]] += 1
    return quotas
