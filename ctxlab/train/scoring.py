"""Nats of text under a model: the one place where a trained model meets held-out tokens, in training and after it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import lightning
import numpy as np
import torch
from torch import Tensor

from ctxlab.data.prepare import TextDataset
from ctxlab.data.windows import EvalSegments
from ctxlab.errors import DataError
from ctxlab.model.base import Cache, Model
from ctxlab.train.precision import Precision, autocast

Watch = Callable[[np.ndarray, np.ndarray, np.ndarray], None]
"""Hears of every batch as it is scored: the segments (B,), the place in its segment of each one's first target, from 0, (B,),
and the nats of the targets from there on, float64 (B, n)."""


@torch.inference_mode()
def score_windows(
    model: Model,
    segments: EvalSegments,
    length: int,
    *,
    device: torch.device,
    precision: Precision,
    batch_tokens: int,
    stride: int | None = None,
    bos_id: int | None = None,
    part: tuple[int, int] = (0, 1),
    advance: Callable[[int], None] = lambda _: None,
    watch: Watch | None = None,
) -> np.ndarray:
    """Nats of every segment, float64 (n_segments,), when it is scored in windows of `length`.

    Windows follow one another, or with a `stride` begin so many tokens after one another, and all but the first score what is
    new in them: every target counts once either way. A window of more than `batch_tokens` is read in parts of so many over a
    growing cache, which is the same as one forward over it. With `bos_id` that token is put in front of every window but those
    that begin with a document, which has it there; it is one input more, and no target. `advance` hears of the targets,
    `watch` of their nats. `part` = (rank, world) takes every world-th batch; the others stay zero, so a sum over ranks is the
    whole. Raises UndefinedBeyondTraining where the model's positions end before `length`.
    """
    nats, scored = np.zeros(segments.n), np.zeros(segments.n, dtype=np.int64)
    for alike in _alike(segments, windows(segments.length, length, stride), bos_id):
        for number, (owners, starts) in enumerate(alike.batches(batch_tokens // alike.width)):
            if number % part[1] == part[0]:
                block = _block(segments, owners, starts, alike).to(device)
                width = block.shape[1] - 1
                cache = model.new_cache() if width > batch_tokens else None
                edges = [*range(0, width, batch_tokens), width]
                found = _read(model, block, alike.scored, precision, edges, cache).cpu().numpy()  # (B, scored)
                np.add.at(nats, owners, found.sum(axis=1))
                if watch is not None:
                    watch(owners, starts + alike.width - alike.scored, found)
            np.add.at(scored, owners, alike.scored)
            advance(len(owners) * alike.scored)
    assert (scored == segments.length).all(), "a target is left out, or counts twice"
    return nats


@torch.inference_mode()
def score_streaming(
    model: Model,
    segments: EvalSegments,
    *,
    sinks: int,
    window: int,
    device: torch.device,
    precision: Precision,
    batch_tokens: int,
    bos_id: int | None = None,
    advance: Callable[[int], None] = lambda _: None,
) -> np.ndarray:
    """Nats of every segment, float64 (n_segments,), read token by token over a cache of its first `sinks` and last `window`.

    This is not a sliding window: a key that is held was computed from tokens that have left since, and in every layer it
    carries something of them. The two are the same in a model of one layer, and where all that an attention of windows of W
    in n layers reaches, n (W - 1) + 1 tokens, is held. Raises IncompatibleError where the model cannot be read so.
    """
    nats, scored = np.zeros(segments.n), np.zeros(segments.n, dtype=np.int64)
    capacity = sinks + window
    for alike in _alike(segments, windows(segments.length, segments.length), bos_id):
        for owners, starts in alike.batches(batch_tokens // capacity):
            block = _block(segments, owners, starts, alike).to(device)
            width = block.shape[1] - 1
            whole = min(width, capacity)
            edges = [*range(0, whole, batch_tokens), *range(whole, width), width]
            cache = model.new_streaming_cache(sinks=sinks, window=window)
            found = _read(model, block, alike.scored, precision, edges, cache, advance)
            np.add.at(nats, owners, found.sum(dim=1).cpu().numpy())
            np.add.at(scored, owners, alike.scored)
    assert (scored == segments.length).all(), "a target is left out, or counts twice"
    return nats


class Window(NamedTuple):
    """Inputs from `start` on of a segment, `width` of them, of whose targets the last `scored` count."""

    start: int
    width: int
    scored: int


def windows(segment: int, length: int, stride: int | None = None) -> list[Window]:
    """How a segment is cut: every target is scored by one window; with a stride all but the first see length - stride more."""
    if stride is None or stride >= length:
        return [Window(i, min(length, segment - i), min(length, segment - i)) for i in range(0, segment, length)]
    found = [Window(0, min(length, segment), min(length, segment))]
    end = length
    while end < segment:
        new = min(stride, segment - end)
        end += new
        found.append(Window(end - length, length, new))
    return found


class _Alike(NamedTuple):
    """Windows of one width that score equally many targets: each of some segments has one at each of some places."""

    width: int
    scored: int
    segments: np.ndarray
    starts: np.ndarray
    front: int | None  # a token before each of them

    def batches(self, rows: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(segment, start) of the windows, `rows` at once; one at least."""
        n, rows = len(self.segments) * len(self.starts), max(1, rows)
        for first in range(0, n, rows):
            segment, start = np.divmod(np.arange(first, min(first + rows, n)), len(self.starts))
            yield self.segments[segment], self.starts[start]


def _alike(segments: EvalSegments, cuts: Sequence[Window], bos_id: int | None) -> Iterator[_Alike]:
    """All windows of all segments: those that begin segments, those that follow, the shorter last ones."""
    edge = 0
    for cut in cuts:
        assert cut.start + cut.width - cut.scored == edge, "a target is left out, or counts twice"
        edge += cut.scored
    assert edge == segments.length
    everything = np.arange(segments.n)
    for width, scored in sorted({(cut.width, cut.scored) for cut in cuts}, reverse=True):
        starts = np.array([cut.start for cut in cuts if (cut.width, cut.scored) == (width, scored)])
        if bos_id is None:
            yield _Alike(width, scored, everything, starts, None)
            continue
        begin = segments.begin_documents
        for some, places, front in (
            (everything[begin], starts[starts == 0], None),
            (everything[~begin], starts[starts == 0], bos_id),
            (everything, starts[starts > 0], bos_id),
        ):
            if len(some) and len(places):
                yield _Alike(width, scored, some, places, front)


def _block(segments: EvalSegments, owners: np.ndarray, starts: np.ndarray, alike: _Alike) -> Tensor:
    """The inputs of windows and the token behind them, (B, width + 1) int64, one more with a token in front."""
    rows = [
        segments.segment(s)[1][i : i + alike.width + 1] for s, i in zip(owners.tolist(), starts.tolist(), strict=True)
    ]
    block = np.stack(rows).astype(np.int64)
    if alike.front is not None:
        block = np.pad(block, ((0, 0), (1, 0)), constant_values=alike.front)
    return torch.from_numpy(block)


def _read(
    model: Model,
    block: Tensor,
    scored: int,
    precision: Precision,
    edges: Sequence[int],
    cache: Cache | None,
    advance: Callable[[int], None] = lambda _: None,
) -> Tensor:
    """Nats of the last `scored` tokens of each row (B, n + 1) given the row's past, float64 (B, scored).

    The n inputs are read in the parts that `edges` bound; more than one need a cache. `advance` hears of the targets.
    """
    unscored = block.shape[1] - 1 - scored
    found = []
    with autocast(precision, block.device):
        for start, stop in pairwise(edges):
            inputs = block[:, start:stop]
            hidden = model.hidden(inputs) if cache is None else model.hidden(inputs, cache=cache)
            first = max(start, unscored)
            if first < stop:
                found.append(model.nats(hidden[:, first - start :], block[:, first + 1 : stop + 1]))
                advance(len(block) * (stop - first))
    return torch.cat(found, dim=1).double()


class Validation:
    """Scores a fixed part of the validation split at the trained context: always the same tokens, shared by the ranks."""

    def __init__(self, dataset: TextDataset, context: int, *, max_tokens: int, precision: Precision) -> None:
        split = dataset.splits["validation"]
        longest = int(np.diff(split.starts).max(initial=0)) - 1
        if longest < 1:
            raise DataError("data: no document of the validation split has two tokens")
        length = min(context, longest)
        self.segments = EvalSegments(split, length, max_segments=max(1, max_tokens // length))
        self.precision = precision
        self.n_targets = self.segments.n * length
        token_bytes = dataset.tokenizer.token_bytes
        self.n_bytes = sum(int(token_bytes[self.segments.segment(i)[1][1:]].sum()) for i in range(self.segments.n))

    def __call__(self, trainer: lightning.Trainer, model: Model, device: torch.device) -> dict[str, float]:
        """nats per token, perplexity and bits per byte; every rank returns the same numbers."""
        model.eval()
        nats: Any = score_windows(
            model,
            self.segments,
            self.segments.length,
            device=device,
            precision=self.precision,
            batch_tokens=16_384,
            part=(trainer.global_rank, trainer.world_size),
        ).sum()
        model.train()
        if trainer.world_size > 1:
            nats = trainer.strategy.reduce(torch.tensor(nats, device=device), reduce_op="sum").item()
        per_token = float(nats) / self.n_targets
        return {
            "nats_per_token": per_token,
            "perplexity": float(np.exp(per_token)),
            "bits_per_byte": float(nats) / (self.n_bytes * np.log(2)),
        }
