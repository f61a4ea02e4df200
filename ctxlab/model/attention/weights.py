"""The weights that a mechanism gives to its keys, some rows of one head at a time: for looking at, not for computing with.

Symbols: B batch, H heads, Hkv key-value heads, T queries, S keys, D and Dv widths, m queries of a block of rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ctxlab.model.attention.base import Attention
from ctxlab.model.attention.bias import LOG2_E, Bias, Span, Tile
from ctxlab.model.attention.blockwise import autocast, check

ROW_SCORES = 2**20
"""Scores that exist at once, at most: some rows of all keys."""


class HeadRows(NamedTuple):
    """What some queries of one head weigh their keys with: rows of the T queries, weights (B,m,S), fp32 at least."""

    head: int
    rows: slice
    weights: Tensor


def weight_rows(
    mechanism: Attention,
    q: Tensor,
    k: Tensor,
    *,
    scale: float,
    causal: bool,
    bias: Bias | None = None,
    lengths: Tensor | None = None,
    heads: Sequence[int] | None = None,
    scores: int = ROW_SCORES,
) -> Iterator[HeadRows]:
    """Yields p with out_i = sum_j p_ij v_j, out being what `mechanism.attend` makes of the same arguments for any v.

        p_ij = exp(s_ij) / (sum_j' exp(s_ij') + exp(sink)),    s_ij = scale q_i . k_j + bias_ij

    over the keys that query i sees (elsewhere 0), the term of the sink only where the mechanism has one: a row then sums to
    less than 1, and what is missing is the sink's. Of a mechanism without a softmax the weights are what it makes of the
    unit vectors as values. A query that sees no key, or that is padding in a batch, has whatever `attend` gives it.

    q (B,H,T,D) and k (B,Hkv,S,D) as for `attend`. heads: which of the H, all where None, each asked of alone. At most about
    `scores` numbers, or one row of all the batch, exist at once.
    """
    q, k = autocast(q, k)
    check(q, k, k, causal)
    B, H, T, _ = q.shape
    S = k.shape[2]
    asked = range(H) if heads is None else heads
    with torch.autocast(q.device.type, enabled=False):
        if not mechanism.softmax:
            yield from _linear_rows(mechanism, q, k, scale, causal, lengths, asked, max(1, scores // (B * H * S)))
            return
        m = min(T, max(1, scores // (B * S)))
        span = Span(T, S, causal, m, torch.promote_types(q.dtype, torch.float32), q.device, training=False)
        tiles = None if bias is None else bias.open(bias.tensors, span)
        for head in asked:
            keys = k[:, head // (H // k.shape[1])].to(span.dtype)  # (B,S,D)
            for start in range(0, T, m):
                rows = slice(start, min(start + m, T))
                last = S - T + rows.stop - 1
                n = last + 1 if causal else S
                tile = Tile(
                    slice(0, B), slice(head, head + 1), range(last, last - (rows.stop - start), -1), slice(0, n)
                )
                hidden = _hidden(mechanism, tile, causal, lengths, q.device)
                s = (
                    q[:, head, rows].flip(1).to(span.dtype) @ keys[:, :n].mT * (scale * LOG2_E)
                )  # (B,m,n), last query first
                if tiles is not None and tiles.reads_scores:
                    tiles.begin(tile)  # type: ignore[union-attr]
                    tiles.add(tile, s.masked_fill_(hidden, -torch.inf).unsqueeze(1))  # type: ignore[union-attr]
                elif tiles is not None:
                    s += tiles.block(tile).squeeze(1)  # type: ignore[union-attr]
                s = s.masked_fill_(hidden, -torch.inf) / LOG2_E
                if tiles is not None and tiles.constant is not None:  # what all scores share matters beside a sink
                    s += tiles.constant[head]
                lse = torch.logsumexp(s, dim=-1, keepdim=True)  # (B,m,1)
                if mechanism.sink is not None:
                    lse = torch.logaddexp(lse, mechanism.sink[head].to(lse.dtype))
                weights = torch.exp(s - lse.masked_fill(lse == -torch.inf, 0.0))
                yield HeadRows(head, rows, F.pad(weights.flip(1), (0, S - n)))


def _hidden(mechanism: Attention, tile: Tile, causal: bool, lengths: Tensor | None, device: torch.device) -> Tensor:
    """Which pairs of a tile do not see each other, (m,n), or (B,m,n) where rows of the batch are padded."""
    i = torch.arange(tile.queries.start, tile.queries.stop, -1, device=device)[:, None]
    j = torch.arange(tile.keys.start, tile.keys.stop, device=device)[None, :]
    seen = mechanism.sees(i, j)
    if causal:
        return ~(seen & (j <= i))
    if lengths is not None:
        seen = seen & (j < lengths.to(device)[:, None, None])
    return ~seen


def _linear_rows(
    mechanism: Attention,
    q: Tensor,
    k: Tensor,
    scale: float,
    causal: bool,
    lengths: Tensor | None,
    heads: Sequence[int],
    m: int,
) -> Iterator[HeadRows]:
    """The weights of a mechanism that has no scores: out_i = p_i where the value of key j is the j-th unit vector."""
    T, S = q.shape[2], k.shape[2]
    for start in range(0, T, m):
        rows = slice(start, min(start + m, T))
        n = S - T + rows.stop if causal else S
        unit = torch.eye(n, dtype=q.dtype, device=q.device).expand(*k.shape[:2], n, n)
        out, _ = mechanism.attend(q[:, :, rows], k[:, :, :n], unit, scale=scale, causal=causal, lengths=lengths)
        for head in heads:
            yield HeadRows(head, rows, F.pad(out[:, head], (0, S - n)))
