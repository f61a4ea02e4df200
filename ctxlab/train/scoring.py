"""Nats of text under a model: the one place where a trained model meets held-out tokens, in training and after it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import lightning
import numpy as np
import torch
from torch import Tensor

from ctxlab.data.prepare import TextDataset
from ctxlab.data.windows import EvalSegments
from ctxlab.errors import DataError
from ctxlab.model.transformer import Transformer
from ctxlab.train.precision import Precision, autocast


@torch.inference_mode()
def score_windows(
    model: Transformer,
    segments: EvalSegments,
    length: int,
    *,
    device: torch.device,
    precision: Precision,
    batch_tokens: int,
    stride: int | None = None,
    part: tuple[int, int] = (0, 1),
    advance: Callable[[int], None] = lambda _: None,
) -> np.ndarray:
    """Nats of every segment, float64 (n_segments,), when it is scored in windows of `length`.

    Windows follow one another, or with a `stride` begin so many tokens after one another, and all but the first score what is
    new in them: every target counts once either way. `advance` hears of the targets.
    `part` = (rank, world) takes every world-th batch; the others stay zero, so a sum over ranks is the whole.
    Raises UndefinedBeyondTraining where the model's positions end before `length`.
    """
    nats = np.zeros(segments.n)
    cuts = windows(segments.length, length, stride)
    # All windows alike go together: those that begin segments, those that follow, the shorter last ones.
    for width, scored in sorted({(cut.width, cut.scored) for cut in cuts}, reverse=True):
        starts = [cut.start for cut in cuts if (cut.width, cut.scored) == (width, scored)]
        alike = [(s, i) for s in range(segments.n) for i in starts]
        rows = max(1, batch_tokens // width)
        for number, first in enumerate(range(0, len(alike), rows)):
            chosen = alike[first : first + rows]
            if number % part[1] == part[0]:
                owners = [s for s, _ in chosen]
                block = torch.from_numpy(
                    np.stack([segments.segment(s)[1][i : i + width + 1] for s, i in chosen]).astype(np.int64)
                ).to(device)  # (B, width + 1)
                np.add.at(nats, owners, _window_nats(model, block, scored, precision).cpu().numpy())
            advance(len(chosen) * scored)
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


def _window_nats(model: Transformer, block: Tensor, scored: int, precision: Precision) -> Tensor:
    """Summed nats of the last `scored` tokens of each row (B, width + 1) given the row's past, float64 (B,)."""
    with autocast(precision, block.device):
        hidden = model.hidden(block[:, :-1])[:, -scored:]
        nats = model.nats(hidden, block[:, -scored:])  # (B, scored)
    return nats.double().sum(dim=1)


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

    def __call__(self, trainer: lightning.Trainer, model: Transformer, device: torch.device) -> dict[str, float]:
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
