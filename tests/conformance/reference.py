"""Every positional scheme and attention mechanism written out naively: dense, in float64, from the papers' formulas alone.

A new scheme adds its score (and, if it has one, its embedding) here; the conformance tests find it by its name.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from ctxlab.model.position.base import Position
from ctxlab.model.transformer import Transformer

Score = Callable[[Position, Tensor, Tensor, Tensor, Tensor], Tensor]


def plain(scheme: Position, q: Tensor, k: Tensor, i: Tensor, j: Tensor) -> Tensor:
    """q . k / sqrt(D): q (...,H,T,D), k (...,H,S,D), positions i (T,), j (S,) -> (...,H,T,S)."""
    return q @ k.mT / math.sqrt(q.shape[-1])


def rope(scheme: Position, q: Tensor, k: Tensor, i: Tensor, j: Tensor) -> Tensor:
    """Each pair turned by a 2 x 2 rotation matrix."""
    width, theta, layout = q.shape[-1], scheme.config.theta, scheme.config.layout

    def turned(x: Tensor, positions: Tensor) -> Tensor:
        out = x.clone()
        for n in range(width // 2):
            a, b = (2 * n, 2 * n + 1) if layout == "interleaved" else (n, n + width // 2)
            angle = positions.double() * theta ** (-2 * n / width)
            out[..., a] = x[..., a] * angle.cos() - x[..., b] * angle.sin()
            out[..., b] = x[..., a] * angle.sin() + x[..., b] * angle.cos()
        return out

    return plain(scheme, turned(q, i), turned(k, j), i, j)


def alibi(scheme: Position, q: Tensor, k: Tensor, i: Tensor, j: Tensor) -> Tensor:
    """-(i - j) 2^(-8h/H) for a power of two of heads."""
    n = q.shape[-3]
    assert n & (n - 1) == 0
    slopes = torch.tensor([2 ** (-8 * h / n) for h in range(1, n + 1)], dtype=torch.float64)
    return plain(scheme, q, k, i, j) - slopes[:, None, None] * (i[:, None] - j[None, :])


def t5(scheme: Position, q: Tensor, k: Tensor, i: Tensor, j: Tensor) -> Tensor:
    """The causal bucket of every distance, by the formula of the paper's code, in Python floats."""

    def bucket(n: int) -> int:
        if n < 16:
            return max(n, 0)
        return min(31, 16 + math.floor(16 * math.log(n / 16) / math.log(128 / 16)))

    span = int(i.max() - j.min()) + 1
    rows = scheme.weight[[bucket(n) for n in range(span)]]  # (distance, H)
    bias = rows[(i[:, None] - j[None, :]).clamp(min=0)].permute(2, 0, 1)  # (H,T,S)
    return plain(scheme, q, k, i, j) + bias


def sinusoidal_embedding(scheme: Position, x: Tensor, positions: Tensor) -> Tensor:
    width = x.shape[-1]
    encoding = torch.zeros(len(positions), width, dtype=torch.float64)
    for row, p in enumerate(positions.tolist()):
        for n in range(0, width, 2):
            encoding[row, n] = math.sin(p / 10_000 ** (n / width))
            encoding[row, n + 1] = math.cos(p / 10_000 ** (n / width))
    return x * math.sqrt(width) + encoding


def learned_embedding(scheme: Position, x: Tensor, positions: Tensor) -> Tensor:
    return x + scheme.weight[positions]


SCORES: dict[str, Score] = {
    "nope": plain,
    "sinusoidal": plain,
    "learned": plain,
    "rope": rope,
    "alibi": alibi,
    "t5": t5,
}
EMBEDDINGS: dict[str, Callable[[Position, Tensor, Tensor], Tensor]] = {
    "sinusoidal": sinusoidal_embedding,
    "learned": learned_embedding,
}


def logits(model: Transformer, tokens: Tensor) -> Tensor:
    """The whole decoder (SwiGLU, RMSNorm, no biases) with dense causal attention, on the weights of `model`."""
    scheme, config = model.position, model.config
    name = scheme.config.name
    positions = torch.arange(tokens.shape[1])
    mask = positions[:, None] < positions[None, :]

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return x / torch.sqrt(x.square().mean(-1, keepdim=True) + config.norm_eps) * weight

    def heads(x: Tensor, n: int) -> Tensor:
        x = x.view(*x.shape[:2], n, config.head_dim).transpose(1, 2)
        return x.repeat_interleave(config.n_heads // n, dim=1)

    x = model.embedding.weight[tokens]
    if name in EMBEDDINGS:
        x = EMBEDDINGS[name](scheme, x, positions)
    for block in model.blocks:
        h = norm(x, block.attention_norm.weight)
        q = heads(h @ block.attention.query.weight.T, config.n_heads)
        k = heads(h @ block.attention.key.weight.T, config.n_kv_heads)
        v = heads(h @ block.attention.value.weight.T, config.n_kv_heads)
        score = SCORES[name](scheme, q, k, positions, positions).masked_fill(mask, -math.inf)
        mixed = (score.softmax(-1) @ v).transpose(1, 2).flatten(2)
        x = x + mixed @ block.attention.out.weight.T
        h = norm(x, block.feed_forward_norm.weight)
        gate, up = h @ block.feed_forward.gate.weight.T, h @ block.feed_forward.up.weight.T
        x = x + (F.silu(gate) * up) @ block.feed_forward.down.weight.T
    return norm(x, model.norm.weight) @ model.embedding.weight.T
