"""Every positional scheme and attention mechanism written out naively: dense, in float64, from the papers' formulas alone.

A new scheme adds its score (and, if it has one, its embedding) here; the conformance tests find it by its name.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ctxlab.model.position.base import Position


class Place(NamedTuple):
    """Where a score is taken: the scheme, the layer, and what the layer's queries and keys are projected from, (B,S,d)."""

    scheme: Position
    layer: int
    x: Tensor

    @property
    def config(self) -> Any:
        return self.scheme.config


Score = Callable[[Place, Tensor, Tensor, Tensor, Tensor], Tensor]


def plain(at: Place, q: Tensor, k: Tensor, i: Tensor, j: Tensor) -> Tensor:
    """q . k / sqrt(D): q (...,H,T,D), k (...,H,S,D), positions i (T,), j (S,) -> (...,H,T,S)."""
    return q @ k.mT / math.sqrt(q.shape[-1])


def turned(x: Tensor, positions: Tensor, frequencies: list[float], layout: str) -> Tensor:
    """Each pair turned by a 2 x 2 rotation matrix; columns beyond the last pair stay."""
    out, width = x.clone(), 2 * len(frequencies)
    for n, frequency in enumerate(frequencies):
        a, b = (2 * n, 2 * n + 1) if layout == "interleaved" else (n, n + width // 2)
        angle = positions.double() * frequency
        out[..., a] = x[..., a] * angle.cos() - x[..., b] * angle.sin()
        out[..., b] = x[..., a] * angle.sin() + x[..., b] * angle.cos()
    return out


def ladder(width: int, theta: float) -> list[float]:
    return [theta ** (-2 * n / width) for n in range(width // 2)]


def rope(at: Place, q: Tensor, k: Tensor, i: Tensor, j: Tensor) -> Tensor:
    f, layout = ladder(q.shape[-1], at.config.theta), at.config.layout
    return plain(at, turned(q, i, f, layout), turned(k, j, f, layout), i, j)


def partial_rope(at: Place, q: Tensor, k: Tensor, i: Tensor, j: Tensor) -> Tensor:
    """The ladder of a head of the rotated columns alone."""
    f = ladder(int(at.config.fraction * q.shape[-1]), at.config.theta)
    return plain(at, turned(q, i, f, at.config.layout), turned(k, j, f, at.config.layout), i, j)


def p_rope(at: Place, q: Tensor, k: Tensor, i: Tensor, j: Tensor) -> Tensor:
    """The ladder of the whole head, its slow end replaced by no rotation."""
    f = ladder(q.shape[-1], at.config.theta)
    kept = math.floor(at.config.p * q.shape[-1] / 2)
    f = [frequency if n < kept else 0.0 for n, frequency in enumerate(f)]
    return plain(at, turned(q, i, f, at.config.layout), turned(k, j, f, at.config.layout), i, j)


def rope_nope(at: Place, q: Tensor, k: Tensor, i: Tensor, j: Tensor) -> Tensor:
    """RoPE's score, or in every n-th layer the plain one of queries that grow with the logarithm of their position."""
    if (at.layer + 1) % at.config.every:
        return rope(at, q, k, i, j)
    growth = [1 + at.config.query_scale * math.log(1 + (p + 1) // at.config.scale_span) for p in i.tolist()]
    return plain(at, q, k, i, j) * torch.tensor(growth, dtype=torch.float64)[:, None]


def xpos(at: Place, q: Tensor, k: Tensor, i: Tensor, j: Tensor) -> Tensor:
    """RoPE's score, the part of pair n times zeta_n^((i - j) / 512)."""
    D = q.shape[-1]
    f, layout = ladder(D, at.config.theta), at.config.layout
    q, k = turned(q, i, f, layout), turned(k, j, f, layout)
    score = torch.zeros(*q.shape[:-1], len(j), dtype=torch.float64)
    for n in range(D // 2):
        a, b = (2 * n, 2 * n + 1) if layout == "interleaved" else (n, n + D // 2)
        zeta = (2 * n + 0.4 * D) / (1.4 * D)
        decay = zeta ** ((i[:, None] - j[None, :]).double() / 512)
        score = score + (q[..., [a, b]] @ k[..., [a, b]].mT) * decay
    return score / math.sqrt(D)


def alibi(at: Place, q: Tensor, k: Tensor, i: Tensor, j: Tensor) -> Tensor:
    """-(i - j) 2^(-8h/H) for a power of two of heads."""
    n = q.shape[-3]
    assert n & (n - 1) == 0
    slopes = torch.tensor([2 ** (-8 * h / n) for h in range(1, n + 1)], dtype=torch.float64)
    return plain(at, q, k, i, j) - slopes[:, None, None] * (i[:, None] - j[None, :])


def t5(at: Place, q: Tensor, k: Tensor, i: Tensor, j: Tensor) -> Tensor:
    """The bucket of every distance, by the formula of the paper's code, in Python floats: of 32, or 16 to each side."""
    buckets = 32 if at.scheme.causal else 16

    def bucket(n: int) -> int:
        if n < 0 and not at.scheme.causal:
            return buckets + bucket(-n)
        exact = buckets // 2
        if n < exact:
            return max(n, 0)
        return min(buckets - 1, exact + math.floor(exact * math.log(n / exact) / math.log(128 / exact)))

    lowest, highest = int(i.min() - j.max()), int(i.max() - j.min())
    rows = at.scheme.weight[[bucket(n) for n in range(lowest, highest + 1)]]  # (distance, H)
    bias = rows[i[:, None] - j[None, :] - lowest].permute(2, 0, 1)  # (H,T,S)
    return plain(at, q, k, i, j) + bias


def kerple(at: Place, q: Tensor, k: Tensor, i: Tensor, j: Tensor) -> Tensor:
    distance = (i[:, None] - j[None, :]).clamp(min=0).double()
    p, a = (parameter.clamp(min=0.01)[:, None, None] for parameter in (at.scheme.p, at.scheme.a))
    if at.config.kind == "log":
        return plain(at, q, k, i, j) - p * torch.log(1 + a * distance)
    return plain(at, q, k, i, j) - a * distance ** p.clamp(max=2.0)


def sandwich(at: Place, q: Tensor, k: Tensor, i: Tensor, j: Tensor) -> Tensor:
    H = q.shape[-3]
    w = q.shape[-1] if at.config.width == "auto" else at.config.width
    distance = (i[:, None] - j[None, :]).double()
    total = sum(torch.cos(distance / 10_000 ** (2 * n / w)) for n in range(1, w // 2 + 1)) - w / 2
    bias = torch.stack([total / (8 * h / H) for h in range(1, H + 1)])
    return plain(at, q, k, i, j) + bias


def pope(at: Place, q: Tensor, k: Tensor, i: Tensor, j: Tensor) -> Tensor:
    """One column at a time, the angle from the distance itself."""
    D, group = q.shape[-1], q.shape[-3] // at.scheme.delta.shape[1]
    delta = at.scheme.delta[at.layer].clamp(-2 * math.pi, 0).repeat_interleave(group, 0)  # (H,D)
    score = torch.zeros(*q.shape[:-1], len(j), dtype=torch.float64)
    for c in range(D):
        angle = (j[None, :] - i[:, None]).double() * at.config.theta ** (-c / D) + delta[:, c, None, None]
        score = score + F.softplus(q[..., c, None]) * F.softplus(k[..., None, :, c]) * angle.cos()
    return score / math.sqrt(D)


def fox(at: Place, q: Tensor, k: Tensor, i: Tensor, j: Tensor) -> Tensor:
    """Sums of the logarithms of the gates behind j up to i; x stands at the positions of j."""
    weight, offset = at.scheme.weight[at.layer].double(), at.scheme.offset[at.layer].double()
    gates = torch.log(1 / (1 + torch.exp(-(at.x @ weight.T + offset))))  # (B,S,H)
    before = torch.cat([torch.zeros_like(gates[:, :1]), gates.cumsum(1)], dim=1).transpose(
        1, 2
    )  # of the first n, (B,H,n)
    first = int(j.min())
    return plain(at, q, k, i, j) + before[..., i - first + 1].unsqueeze(-1) - before[..., j - first + 1].unsqueeze(-2)


def fire(at: Place, q: Tensor, k: Tensor, i: Tensor, j: Tensor) -> Tensor:
    """The network itself, pair by pair."""
    made = at.scheme
    c, m, w1, b1, w2, b2 = (p[at.layer].double() for p in (made.c, made.m, made.w1, made.b1, made.w2, made.b2))
    distance = (i[:, None] - j[None, :]).clamp(min=0).double()
    largest = torch.maximum(i.double(), (m * at.config.span).abs())[:, None]
    u = torch.log((c * distance).abs() + 1) / (torch.log((c * largest).abs() + 1) + 1e-6)
    hidden = torch.relu(u[..., None] * w1[0] + b1[0])  # (T,S,K)
    return plain(at, q, k, i, j) + (hidden @ w2.T + b2[:, 0]).permute(2, 0, 1)


def cope_ctx(at: Place, q: Tensor, k: Tensor, i: Tensor, j: Tensor) -> Tensor:
    """Gates of every pair, summed from the key to the query one key at a time."""
    score = plain(at, q, k, i, j)
    e = at.scheme.weight[at.layer].double()
    gates = torch.sigmoid(score).masked_fill(i[:, None] < j[None, :], 0.0)
    position = torch.stack([gates[..., n:].sum(-1) for n in range(len(j))], dim=-1).clamp(max=len(e) - 1)
    whole = position.floor().long()
    part = position - whole
    at_row = q @ e.T / math.sqrt(q.shape[-1])  # (...,T,rows)
    low, high = at_row.gather(-1, whole), at_row.gather(-1, (whole + 1).clamp(max=len(e) - 1))
    return score + (1 - part) * low + part * high


def transformer_xl(at: Place, q: Tensor, k: Tensor, i: Tensor, j: Tensor) -> Tensor:
    """The four terms of the paper's equation, one distance at a time."""
    u, v, w = at.scheme.u[0].double(), at.scheme.v[0].double(), at.scheme.weight[at.layer].double()
    H, D, width = q.shape[-3], q.shape[-1], w.shape[1]
    distance = (i[:, None] - j[None, :]).clamp(min=0)
    rows = {}
    for d in distance.unique().tolist():
        angles = torch.tensor([d / 10_000 ** (n / width) for n in range(0, width, 2)], dtype=torch.float64)
        rows[d] = (w @ torch.stack([angles.sin(), angles.cos()], -1).flatten()).view(H, D)
    r = torch.stack([rows[d] for d in distance.flatten().tolist()]).view(*distance.shape, H, D)  # (T,S,H,D)
    terms = q @ k.mT + torch.einsum("bhid,ijhd->bhij", q, r)
    terms = terms + (u @ k.mT) + torch.einsum("hid,ijhd->hij", v, r)
    return terms / math.sqrt(D)


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
    "partial_rope": partial_rope,
    "p_rope": p_rope,
    "xpos": xpos,
    "rope_nope": rope_nope,
    "kerple": kerple,
    "sandwich": sandwich,
    "pope": pope,
    "fox": fox,
    "fire": fire,
    "cope_ctx": cope_ctx,
    "transformer_xl": transformer_xl,
}
EMBEDDINGS: dict[str, Callable[[Position, Tensor, Tensor], Tensor]] = {
    "sinusoidal": sinusoidal_embedding,
    "learned": learned_embedding,
}


def logits(
    model: Any,
    tokens: Tensor,
    *,
    lengths: Tensor | None = None,
    source: Tensor | None = None,
    source_lengths: Tensor | None = None,
) -> Tensor:
    """A whole model (SwiGLU, RMSNorm before each part, no biases) with dense attention, on the weights of `model`."""
    encoded = None
    if source is not None:
        encoded = _stack(model.encoder, model.embedding.weight[source], model.config, False, source_lengths)
    x = _stack(model, model.embedding.weight[tokens], model.config, model.causal, lengths, encoded, source_lengths)
    return x @ model.embedding.weight.T


def _padding(lengths: Tensor | None, n_keys: int) -> Tensor:
    """Whether a key is padding, (B,1,1,S)."""
    ends = torch.tensor([n_keys]) if lengths is None else lengths
    return (torch.arange(n_keys) >= ends[:, None])[:, None, None]


def _stack(
    model: Any,
    x: Tensor,
    config: Any,
    causal: bool,
    lengths: Tensor | None = None,
    encoded: Tensor | None = None,
    encoded_lengths: Tensor | None = None,
) -> Tensor:
    scheme = model.position
    name = scheme.config.name
    positions = torch.arange(x.shape[1])
    mask = positions[:, None] < positions[None, :] if causal else _padding(lengths, x.shape[1])

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return x / torch.sqrt(x.square().mean(-1, keepdim=True) + config.norm_eps) * weight

    def heads(x: Tensor, n: int) -> Tensor:
        x = x.view(*x.shape[:2], n, config.head_dim).transpose(1, 2)
        return x.repeat_interleave(config.n_heads // n, dim=1)

    def projected(part: Any, queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return (
            heads(queries @ part.query.weight.T, config.n_heads),
            heads(keys @ part.key.weight.T, config.n_kv_heads),
            heads(keys @ part.value.weight.T, config.n_kv_heads),
        )

    def mixed(part: Any, score: Tensor, v: Tensor) -> Tensor:
        return (score.softmax(-1) @ v).transpose(1, 2).flatten(2) @ part.out.weight.T

    if name in EMBEDDINGS:
        x = EMBEDDINGS[name](scheme, x, positions)
    for layer, block in enumerate(model.blocks):
        h = norm(x, block.attention_norm.weight)
        q, k, v = projected(block.attention, h, h)
        score = SCORES[name](Place(scheme, layer, h), q, k, positions, positions)
        x = x + mixed(block.attention, score.masked_fill(mask, -math.inf), v)
        if encoded is not None:
            q, k, v = projected(block.cross_attention, norm(x, block.cross_attention_norm.weight), encoded)
            score = q @ k.mT / math.sqrt(config.head_dim)
            score = score.masked_fill(_padding(encoded_lengths, encoded.shape[1]), -math.inf)
            x = x + mixed(block.cross_attention, score, v)
        h = norm(x, block.feed_forward_norm.weight)
        gate, up = h @ block.feed_forward.gate.weight.T, h @ block.feed_forward.up.weight.T
        x = x + (F.silu(gate) * up) @ block.feed_forward.down.weight.T
    return norm(x, model.norm.weight)
