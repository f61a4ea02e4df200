"""The order in which a run reads its rows: a function of seed and step, the same for any number of processes.

Batch k holds the rows at the places rows*k .. rows*k + rows - 1 of an endless sequence: the epochs one behind the
other, each shuffled by a permutation whose key is the seed and the epoch. Of a batch, rank r takes its slice. So all
that a loader has to remember is one integer.

A model that carries a memory reads its rows in a row: an epoch's documents are shuffled and laid end to end, row b of
every batch goes through the b-th part of them, window by window.
"""

from __future__ import annotations

import itertools
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from ctxlab.data.permutation import permute
from ctxlab.data.windows import IGNORED, Row, Rows, Windows
from ctxlab.errors import DataError


@dataclass(frozen=True)
class Stage:
    """Part of a run at one context: `rows` of it in a step over all ranks, `micro_rows` at once in a rank."""

    context: int
    rows: int
    micro_rows: int
    steps: int


@dataclass
class Batch:
    """Rows that are in memory at once. Rows shorter than the widest are padded on the right."""

    tokens: Tensor  # (B,T) int64
    targets: Tensor  # (B,T) int64, -100 where nothing is scored
    lengths: Tensor  # (B,) int64, of each row without its padding
    segments: list[list[int]] | None  # packed: the lengths of each row's documents
    n_targets_in_step: int  # scored targets of the whole optimizer step, over all ranks and micro-batches
    goes_on: Tensor | None = None  # (B,) bool, in order: whether a row follows the same row of the step before
    source: Tensor | None = None  # (B,S) int64: what an encoder reads, where there is one
    source_lengths: Tensor | None = None  # (B,)
    few_targets: bool = False  # less than half of the places are scored: the head is worth leaving out elsewhere


class Stream(Protocol):
    """Every micro-batch of one rank, by number from the start of the run."""

    @property
    def n_steps(self) -> int: ...

    def micro_batches(self, step: int) -> int:
        """Micro-batches that a rank takes part in an optimizer step with."""
        ...

    def first_of(self, step: int) -> int:
        """The number of a step's first micro-batch."""
        ...

    def __getitem__(self, number: int) -> Batch: ...


class TrainStream(Dataset[Batch]):
    """Every micro-batch of one rank, by number from the start of the run; `in_order` for a model that carries a memory.

    `rows_of` says which rows there are of a context. Raises DataError when rows in order are more than there are windows,
    and what the rows raise where the last epoch of a stage has none.
    """

    def __init__(
        self,
        rows_of: Callable[[int], Rows],
        *,
        seed: int,
        stages: tuple[Stage, ...],
        rank: int = 0,
        world: int = 1,
        pad_id: int = 0,
        in_order: bool = False,
    ) -> None:
        self.seed, self.stages, self.rank, self.world, self.pad_id = seed, stages, rank, world, pad_id
        self.rows: dict[int, Rows] = {stage.context: rows_of(stage.context) for stage in stages}
        self.in_order = in_order
        self._ordered: tuple[tuple[int, int], np.ndarray] | None = None  # the last epoch's windows, in order
        for stage in stages:  # a task whose last examples are too long for the context says so now
            source = self.rows[stage.context]
            source.row(0, max(stage.steps * stage.rows - 1, 0) // source.n)
        for stage in stages if in_order else ():
            if self.rows[stage.context].n < stage.rows:
                raise DataError(
                    f"trainer.batch_tokens: {stage.rows} rows in order of {stage.context} tokens are more than the "
                    f"{self.rows[stage.context].n} windows that there are to train on"
                )

    @property
    def n_steps(self) -> int:
        return sum(stage.steps for stage in self.stages)

    def micro_batches(self, step: int) -> int:
        """Micro-batches that a rank takes part in an optimizer step with."""
        for stage in self.stages:
            if step < stage.steps:
                break
            step -= stage.steps
        return self._in_step(stage)

    def first_of(self, step: int) -> int:
        """The number of a step's first micro-batch."""
        number = 0
        for stage in self.stages:
            steps = min(step, stage.steps)
            number += steps * self._in_step(stage)
            step -= steps
        return number

    def __getitem__(self, number: int) -> Batch:
        first = 0
        for stage in self.stages:
            size = self._in_step(stage)
            if number < stage.steps * size:
                return self._batch(stage, first, *divmod(number, size))
            number -= stage.steps * size
            first += stage.steps
        raise IndexError(number)

    def _batch(self, stage: Stage, first: int, step: int, micro: int) -> Batch:
        """`step` counts from the stage's own first; the key of the shuffle holds `first`, so stages differ."""
        source = self.rows[stage.context]
        goes_on = None
        if self.in_order:
            indices, epochs, goes_on = self._in_order(stage, first, step)
        else:
            indices, epochs = self._shuffled(stage, first, step)
        share = stage.rows // self.world
        start = self.rank * share + micro * stage.micro_rows
        mine = slice(start, start + stage.micro_rows)
        rows = [source.row(int(i), int(e)) for i, e in zip(indices[mine], epochs[mine])]
        return row_batch(
            rows,
            self.pad_id,
            source.n_targets(indices, epochs),
            None if goes_on is None else torch.from_numpy(goes_on[mine].copy()),
        )

    def _shuffled(self, stage: Stage, first: int, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Windows and epochs of a step's rows, every window of an epoch anywhere."""
        source = self.rows[stage.context]
        places = np.arange(step * stage.rows, (step + 1) * stage.rows)
        epochs = places // source.n
        indices = np.empty_like(places)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            indices[here] = permute(places[here] % source.n, source.n, self.seed, first, int(epoch))
        return indices, epochs

    def _in_order(self, stage: Stage, first: int, step: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Windows and epochs of a step's rows, and which of them follow what the same row read in the step before.

        An epoch has as many steps as the shortest part has windows; what that leaves over is another rest in each.
        """
        source = self.rows[stage.context]
        assert isinstance(source, Windows)
        epoch, at = divmod(step, source.n // stage.rows)
        if self._ordered is None or self._ordered[0] != (first, epoch):
            documents = permute(np.arange(len(source.counts)), len(source.counts), self.seed, first, epoch)
            counts = source.counts[documents]
            ends = np.cumsum(counts)
            begins = np.repeat(source.ends[documents] - counts, counts)  # of each window's document
            self._ordered = (first, epoch), begins + np.arange(source.n) - np.repeat(ends - counts, counts)
        windows = self._ordered[1]
        starts = np.arange(stage.rows) * source.n // stage.rows
        indices = windows[starts + at]
        goes_on = np.zeros(stage.rows, dtype=bool)
        if at:
            goes_on = (indices == windows[starts + at - 1] + 1) & ~source.is_first(indices)
        return indices, np.full(stage.rows, epoch), goes_on

    def _in_step(self, stage: Stage) -> int:
        return stage.rows // self.world // stage.micro_rows


def row_batch(rows: Sequence[Row], pad_id: int, n_targets_in_step: int, goes_on: Tensor | None = None) -> Batch:
    """Rows side by side, padded on the right."""
    tokens, lengths = padded([row.tokens for row in rows], pad_id)
    targets, _ = padded([row.targets for row in rows], IGNORED)
    source, source_lengths = sources_of(rows, pad_id)
    return Batch(
        torch.from_numpy(tokens),
        torch.from_numpy(targets),
        torch.from_numpy(lengths),
        [list(row.segments) for row in rows] if rows[0].segments else None,
        n_targets_in_step,
        goes_on,
        source=source,
        source_lengths=source_lengths,
        few_targets=bool(2 * (targets != IGNORED).sum() < targets.size),
    )


def sources_of(rows: Sequence[Row], pad_id: int) -> tuple[Tensor | None, Tensor | None]:
    """The rows' sources side by side (B,S), padded on the right, and their lengths (B,); nothing where they have none."""
    sources = [row.source for row in rows if row.source is not None]
    if not sources:
        return None, None
    found, lengths = padded(sources, pad_id)
    return torch.from_numpy(found), torch.from_numpy(lengths)


def padded(sequences: Sequence[Sequence[int] | np.ndarray], fill: int) -> tuple[np.ndarray, np.ndarray]:
    """Sequences as rows (n, longest) int64, filled up on the right, and their lengths (n,)."""
    lengths = np.array([len(sequence) for sequence in sequences], dtype=np.int64)
    rows = np.full((len(sequences), int(lengths.max())), fill, dtype=np.int64)
    for row, sequence in zip(rows, sequences, strict=True):
        row[: len(sequence)] = sequence
    return rows, lengths


class _From(Sampler[int]):
    """Micro-batch numbers from one on to the end of the run."""

    def __init__(self, start: int, stop: int) -> None:
        self.start, self.stop = start, stop

    def __iter__(self) -> Iterator[int]:
        return itertools.islice(itertools.count(self.start), self.stop - self.start)


def train_loader(stream: Stream, step: int, workers: int) -> DataLoader[Batch]:
    """A loader that begins at an optimizer step, with worker processes or (0) without; the batches are the same."""
    numbers = _From(stream.first_of(step), stream.first_of(stream.n_steps))
    dataset: Any = stream
    return DataLoader(
        dataset,
        batch_size=None,
        sampler=numbers,
        num_workers=workers,
        persistent_workers=False,
        # Workers of a fork server are not children of this process, and do not notice when it is killed.
        multiprocessing_context="fork" if workers and sys.platform == "linux" else None,
        worker_init_fn=_outlive_signals,
        generator=torch.Generator(),  # of its own: a loader that starts must not draw from the model's random numbers
    )


def _outlive_signals(worker: int) -> None:
    """In a worker: lets Ctrl-C, and the SIGTERM of a whole group, pass.

    The training process, which ends its workers itself, still needs batches for the step in hand. A worker that it has
    to terminate gets a second SIGTERM at the latest when that process ends, and obeys it.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))
