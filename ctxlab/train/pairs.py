"""Pairs under a model: the nats of their targets, in training and after it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import lightning
import numpy as np
import torch

from ctxlab.data.pairs.dataset import PairDataset, Pairs
from ctxlab.data.pairs.stream import nothing_fits, pair_batch, read_sizes
from ctxlab.data.stream import padded
from ctxlab.model.base import Model
from ctxlab.train.precision import Precision, autocast


def encode(model: Any, sources: Sequence[Sequence[int]], pad_id: int) -> Any:
    """What an encoder-decoder makes of some sources, padded side by side."""
    rows, lengths = padded(sources, pad_id)
    device = model.embedding.weight.device
    return model.encode(torch.from_numpy(rows).to(device), torch.from_numpy(lengths).to(device))


@torch.inference_mode()
def score_pairs(
    model: Model,
    pairs: Pairs,
    indices: np.ndarray,
    *,
    pad_id: int,
    device: torch.device,
    precision: Precision,
    batch_tokens: int,
    part: tuple[int, int] = (0, 1),
    advance: Callable[[int], None] = lambda _: None,
) -> np.ndarray:
    """Nats of each pair's target given its source, all its tokens and the eos behind them, float64 (n,).

    `part` (number, of): only each so many-th batch is scored, the others' nats are 0.
    """
    reader: Any = model
    lengths = pairs.source.sizes[indices] + pairs.target.sizes[indices]
    order = np.argsort(lengths, kind="stable")
    found = np.zeros(len(indices))
    begins = np.cumsum(lengths[order]) - lengths[order]
    for number, chosen in enumerate(np.split(order, np.flatnonzero(np.diff(begins // batch_tokens)) + 1)):
        if number % part[1] != part[0]:
            continue
        batch = pair_batch(pairs, indices[chosen], pad_id, 0)
        assert batch.source is not None
        assert batch.source_lengths is not None
        with autocast(precision, device):
            hidden = reader.hidden(
                batch.tokens.to(device), source=batch.source.to(device), source_lengths=batch.source_lengths.to(device)
            )
            found[chosen] = model.nats(hidden, batch.targets.to(device)).double().sum(1).cpu().numpy()
        advance(int((batch.lengths).sum()))
    return found


class PairValidation:
    """Scores a fixed set of the validation split's pairs, shared by the ranks. Raises DataError where none is short enough."""

    def __init__(self, dataset: PairDataset, *, longest: int, max_tokens: int, precision: Precision) -> None:
        self.pairs = dataset.splits["validation"]
        self.pad_id = dataset.tokenizer.pad_id
        self.precision = precision
        sizes = read_sizes(self.pairs)
        short = np.flatnonzero((sizes <= longest).all(0))
        if not len(short):
            raise nothing_fits(self.pairs, longest)
        self.indices = short[: max(1, int(np.searchsorted(np.cumsum(sizes[1, short]), max_tokens, side="right")))]
        targets = self.pairs.target
        self.n_targets = int(sizes[1, self.indices].sum())
        decoded = (dataset.tokenizer.decode(targets.sentence(int(index)).tolist()) for index in self.indices)
        self.n_bytes = sum(len(text.encode()) for text in decoded)

    def __call__(self, trainer: lightning.Trainer, model: Model, device: torch.device) -> dict[str, float]:
        """nats per token, perplexity and bits per byte; every rank returns the same numbers."""
        model.eval()
        nats: Any = score_pairs(
            model, self.pairs, self.indices, pad_id=self.pad_id, device=device, precision=self.precision,
            batch_tokens=16_384, part=(trainer.global_rank, trainer.world_size),
        ).sum()  # fmt: skip
        model.train()
        if trainer.world_size > 1:
            nats = trainer.strategy.reduce(torch.tensor(nats, device=device), reduce_op="sum").item()
        per_token = float(nats) / self.n_targets
        return {
            "nats_per_token": per_token,
            "perplexity": float(np.exp(per_token)),
            "bits_per_byte": float(nats) / (self.n_bytes * np.log(2)),
        }
