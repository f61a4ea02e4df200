"""What a scheme does by itself: the score of a query with the same key at every distance behind it, head by head."""

from __future__ import annotations

import torch
from torch import Tensor

from ctxlab.model.attention.bias import LOG2_E, Span, Tile
from ctxlab.model.position.base import Position


@torch.no_grad()
def by_distance(position: Position, n: int) -> Tensor:
    """The score of the last of n positions with the key at distance 0 .. n-1, less that of the key at distance 0: (H,n).

    Content is the same everywhere: each head's query and keys are the vector of ones, scaled so that their product without any
    position is 1. Schemes that are added to the embeddings are shown by the inner product of what they add, over that
    at distance 0.
    """
    model = position.model
    positions = torch.arange(n)
    if position.form == "embedding":
        added = position.embed(torch.zeros(1, n, model.d_model, dtype=torch.float64), positions)[0].double()  # (n,d)
        products = (added @ added[-1]).flip(0)
        return (products / products[0] - 1).expand(model.n_heads, n)
    x = torch.zeros(1, n, model.d_model, dtype=torch.float64)
    ones = torch.ones(1, 1, n, model.head_dim, dtype=torch.float64) * (position.scale * model.head_dim) ** -0.5
    q, k = ones.expand(1, model.n_heads, -1, -1), ones.expand(1, model.n_kv_heads, -1, -1)
    state, _ = position.prepare(x, 0, None)
    tables = position.tables(positions, torch.float64)
    query, key = position.query(q, tables, state)[:, :, -1:], position.key(k, tables, state)
    key = key.repeat_interleave(model.n_heads // model.n_kv_heads, 1) if key.shape[1] > 1 else key
    score = (query @ key.mT)[0] * position.scale  # (H,1,n)
    bias = position.bias(q[:, :, -1:], n, state)
    if bias is not None:
        tile = Tile(slice(None), slice(None), range(n - 1, n - 2, -1), slice(0, n))
        opened = bias.open(bias.tensors, Span(1, n, True, 1, torch.float64, score.device, False))
        if opened.reads_scores:
            scores = (score * LOG2_E)[None].clone()
            opened.begin(tile)  # type: ignore[union-attr]
            opened.add(tile, scores)  # type: ignore[union-attr]
            score = scores[0] / LOG2_E
        else:
            score = score + opened.block(tile).reshape(-1, 1, n) / LOG2_E  # type: ignore[union-attr]
    score = score[:, 0].flip(-1).expand(model.n_heads, n)  # by distance
    return score - score[:, :1]
