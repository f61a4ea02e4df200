"""Heads for fine-tuning: what a model says of a whole text instead of what stands at a place or comes next.

Shapes: B rows, T places, d d_model, k answers a row, C choices of an answer.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Literal

import torch
from torch import Tensor, nn

from ctxlab.model.loss import IGNORED

Pooling = Literal["first", "mean", "last"]


class TaskHead(nn.Module):
    """Chooses k times among C choices, given what a model makes of each place of a row."""

    @abstractmethod
    def scores(self, hidden: Tensor, lengths: Tensor) -> Tensor:
        """Logits (B,k,C), fp32, of hidden states (B,T,d) of which row b has `lengths[b]`; -inf where there is no choice."""

    def losses(self, hidden: Tensor, targets: Tensor, lengths: Tensor, smoothing: float) -> tuple[Tensor, Tensor]:
        """(loss, nats) of each right choice, (B,k) fp32, 0 where the target is -100: nats = -ln p, and
        loss = (1 - e) nats + e mean_c(-ln p_c) with e = smoothing, over the choices that there are."""
        scores = self.scores(hidden, lengths)
        nats_of = -scores.log_softmax(-1)  # (B,k,C)
        scored = targets != IGNORED
        nats = nats_of.gather(-1, torch.where(scored, targets, 0)[..., None])[..., 0].masked_fill(~scored, 0.0)
        if not smoothing:
            return nats, nats.detach()
        missing = scores.isneginf()
        mean = nats_of.masked_fill(missing, 0.0).sum(-1) / (~missing).sum(-1)
        return (1 - smoothing) * nats + smoothing * mean.masked_fill(~scored, 0.0), nats.detach()

    def _initialize(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)


class SpanHead(TaskHead):
    """Where an answer begins and where it ends: p_i = softmax_i(w . h_i + b) with a vector for either.

    Devlin et al. 2019, arXiv:1810.04805, section 4.2. k = 2, C = T: every place of the row, not its padding.
    """

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.ends = nn.Linear(d_model, 2)
        self._initialize()

    def scores(self, hidden: Tensor, lengths: Tensor) -> Tensor:
        padding = torch.arange(hidden.shape[1], device=hidden.device) >= lengths[:, None]  # (B,T)
        return self.ends(hidden).float().transpose(1, 2).masked_fill(padding[:, None], -torch.inf)


class LabelHead(TaskHead):
    """Which of C labels a text has: W dropout(h) + b of its first place, its last, or the mean over all. k = 1.

    Devlin et al. 2019, section 4.1 (first); Radford et al. 2018, section 3.2 (last).
    """

    def __init__(self, d_model: int, labels: tuple[str, ...], pooling: Pooling, dropout: float) -> None:
        super().__init__()
        self.labels, self.pooling = labels, pooling
        self.dropout = nn.Dropout(dropout)
        self.choose = nn.Linear(d_model, len(labels))
        self._initialize()

    def scores(self, hidden: Tensor, lengths: Tensor) -> Tensor:
        if self.pooling == "first":
            read = hidden[:, 0]
        elif self.pooling == "last":
            read = hidden[torch.arange(len(hidden), device=hidden.device), lengths - 1]
        else:
            padding = torch.arange(hidden.shape[1], device=hidden.device) >= lengths[:, None]
            read = hidden.masked_fill(padding[..., None], 0.0).sum(1) / lengths[:, None]
        return self.choose(self.dropout(read)).float()[:, None]
