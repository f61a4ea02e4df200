"""Attention as the textbook writes it, which keeps the whole matrix of weights: what the other ways are measured against.

ctxlab profile --plugin experiments/memory_scaling/naive.py attention=naive model=nano profile.contexts=[512,1k,2k,4k]
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ctxlab.model.attention.base import ATTENTIONS
from ctxlab.model.attention.bias import Bias
from ctxlab.model.attention.full import Full


@ATTENTIONS.register("naive")
class Naive(Full):
    """out = softmax(scale q k^T) v over T x S scores that exist, and stay until the backward pass. Without a bias."""

    class Config(Full.Config):
        name: Literal["naive"] = "naive"

    def mix(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        scale: float,
        causal: bool,
        bias: Bias | None,
        lengths: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        if bias is not None or lengths is not None or not causal:
            raise ValueError("naive: causal attention without a bias only")
        T, S = q.shape[2], k.shape[2]
        hidden = torch.ones(T, S, dtype=torch.bool, device=q.device).triu(S - T + 1)
        shared = q.shape[1] // k.shape[1]
        scores = (q @ k.repeat_interleave(shared, 1).mT * scale).masked_fill(hidden, float("-inf"))
        return scores.softmax(-1) @ v.repeat_interleave(shared, 1), scores.logsumexp(-1).float()
