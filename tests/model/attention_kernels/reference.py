"""The oracle: dense attention written out from its definition, with every score in one T x S tensor."""

from __future__ import annotations

import torch
from torch import Tensor


def positions(T: int, S: int) -> tuple[Tensor, Tensor]:
    """i of the queries (T, 1), j of the keys (S,)."""
    return torch.arange(S - T, S)[:, None], torch.arange(S)


def dense_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    causal: bool,
    bias: Tensor | None = None,
    lengths: Tensor | None = None,
    hidden: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """out and lse; bias, and hidden, which is True where a key is not seen, broadcastable to (B,H,T,S)."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = q @ k.mT * scale  # (B,H,T,S)
    if bias is not None:
        scores = scores + bias
    i, j = positions(q.shape[2], k.shape[2])
    if causal:
        scores = scores.masked_fill(j > i, -torch.inf)
    if lengths is not None:
        scores = scores.masked_fill(j >= lengths[:, None, None, None], -torch.inf)
    if hidden is not None:
        scores = scores.masked_fill(hidden, -torch.inf)
    lse = torch.logsumexp(scores, -1)
    weights = torch.exp(scores - lse.masked_fill(lse == -torch.inf, 0.0)[..., None])
    return weights @ v, lse


def operands(
    B: int, H: int, Hkv: int, T: int, S: int, D: int, Dv: int, *, dtype: torch.dtype = torch.float64, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Random q, k, v that require grad, and a gradient of the output."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    q, k, v = normal(B, H, T, D), normal(B, Hkv, S, D), normal(B, Hkv, S, Dv)
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), normal(B, H, T, Dv)


def error(found: Tensor, expected: Tensor) -> float:
    """Relative error in the Euclidean norm."""
    return float((found.detach().double() - expected.detach()).norm() / expected.detach().norm())
