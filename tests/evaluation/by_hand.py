"""Nats of text by the plainest means: a forward for each target, and attention written out for each query."""

from __future__ import annotations

import torch
from torch import Tensor

from ctxlab.model.blocks import Block, SelfAttention
from ctxlab.model.transformer import Transformer


def nats_of_last(model: Transformer, seen: list[int], target: int) -> float:
    """-ln p(target | seen), by one forward and a softmax over all logits."""
    with torch.no_grad():
        return -model(torch.tensor([seen])).log_softmax(-1)[0, -1, target].item()


def streamed_nats(model: Transformer, tokens: list[int], *, sinks: int, window: int) -> list[float]:
    """Nats of every token after the first where query t of every layer sees the first `sinks` tokens and the last `window`.

    Distances count places among what is seen. For models under alibi or without positions, of one sequence, in float64.
    """
    H = model.config.n_heads  # a power of two: no other slopes are written out here
    slopes = 2.0 ** (-8 * torch.arange(1, H + 1) / H) if model.position.config.name == "alibi" else torch.zeros(H)
    with torch.no_grad():
        x = model.embedding(torch.tensor(tokens[:-1]))  # (T,d)
        for block in model.blocks:
            assert isinstance(block, Block)
            x = x + _attended(block.attention, block.attention_norm(x, x.dtype), slopes, sinks, window)
            x = x + block.feed_forward(block.feed_forward_norm(x, x.dtype))
        p = model.logits(model.norm(x, x.dtype)).log_softmax(-1)
    return [-p[place, token].item() for place, token in enumerate(tokens[1:])]


def _attended(attention: SelfAttention, x: Tensor, slopes: Tensor, sinks: int, window: int) -> Tensor:
    q, k, v = (f(x).view(len(x), -1, attention.head_dim) for f in (attention.query, attention.key, attention.value))
    group = q.shape[1] // k.shape[1]
    rows = []
    for t in range(len(x)):
        held = [j for j in range(t + 1) if j < sinks or t - j < window]
        heads = []
        for head in range(q.shape[1]):
            scores = k[held, head // group] @ q[t, head] * attention.head_dim**-0.5
            scores = scores - slopes[head] * torch.arange(len(held) - 1, -1, -1)
            heads.append(scores.softmax(0) @ v[held, head // group])
        rows.append(torch.cat(heads))
    return attention.out(torch.stack(rows))
