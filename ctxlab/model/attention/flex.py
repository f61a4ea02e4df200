"""Blockwise attention as one compiled kernel, through torch's FlexAttention: what runs on CUDA where it can."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch._dynamo
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from ctxlab.model.attention.bias import Bias, Toeplitz
from ctxlab.model.attention.visible import Visible

BLOCK = 128
"""Queries and keys in a block that is visited or not."""

COMPILATIONS = 128
"""Kinds of call in one process, at most; torch's own limit is 8, and what it does beyond needs T x S scores."""


def can_flex(q: Tensor, v: Tensor, bias: Bias | None) -> bool:
    """Whether FlexAttention takes a problem: on CUDA, in its dtypes and widths, under a bias of the distance alone.

    Biases with sums over tiles, or of higher precision than the scores, have no place in it.
    """
    simple = bias is None or isinstance(bias, Toeplitz)
    small = q.dtype in (torch.float16, torch.bfloat16, torch.float32) and 16 <= q.shape[3] == v.shape[3] <= 256
    return q.device.type == "cuda" and simple and small


def flexible_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    causal: bool,
    bias: Bias | None,
    lengths: Tensor | None,
    visible: Visible | None,
) -> tuple[Tensor, Tensor]:
    """What `blockwise_attention` returns, from the same arguments: (out (B,H,T,Dv), lse (B,H,T)), both with gradients.

    Dong et al. 2024 (FlexAttention), arXiv:2412.05496. Blocks that nobody sees are not visited, by a list of blocks made
    from the rule itself: no T x S mask exists at any time.

    torch compiles it anew for each kind of call (a rule, a length that it has learned to vary, with or without gradients).
    After a few of them it would go on with a formula that holds all scores; here there may be many, and too many is an error.
    """
    assert bias is None or isinstance(bias, Toeplitz), "can_flex comes first"
    mask = _block_mask(q.shape[2], k.shape[2], causal, lengths, visible, q.device)
    with torch._dynamo.config.patch(recompile_limit=COMPILATIONS, fail_on_recompile_limit_hit=True):
        out, aux = _compiled()(
            q, k, v,
            score_mod=None if bias is None else _added(bias, q.shape[2], k.shape[2]),
            block_mask=mask,
            scale=scale,
            enable_gqa=q.shape[1] != k.shape[1],
            return_aux=AuxRequest(lse=True),
        )  # fmt: skip
    return out, aux.lse


@functools.cache
def _compiled() -> Callable[..., Any]:
    return torch.compile(flex_attention)


def _added(bias: Toeplitz, T: int, S: int) -> Callable[..., Tensor]:
    """The bias as FlexAttention asks for it, score by score."""
    values, before = bias.values, S - T - bias.first
    last = values.shape[1] - 1 if bias.constant_from is None else bias.constant_from - bias.first

    def modified(score: Tensor, b: Tensor, h: Tensor, t: Tensor, j: Tensor) -> Tensor:
        return score + values[h, (t + before - j).clamp(0, last)]  # hidden pairs may lie outside; the mask hides them

    return modified


def _block_mask(
    T: int, S: int, causal: bool, lengths: Tensor | None, visible: Visible | None, device: torch.device
) -> BlockMask | None:
    """Which blocks of keys a block of queries visits, and which pairs of them are hidden. None: nothing is."""
    if not causal and lengths is None and visible is None:
        return None
    before = S - T

    def seen(b: Tensor, h: Tensor, t: Tensor, j: Tensor) -> Tensor:
        i = t + before
        shown = j <= i if causal else j >= 0
        if visible is not None:
            shown = shown & visible.sees(i, j)
        return shown if lengths is None else shown & (j < lengths[b])

    rows, columns = -(-T // BLOCK), -(-S // BLOCK)
    partial, whole = [], []
    for row in range(rows):
        first, last = before + row * BLOCK, before + min((row + 1) * BLOCK, T) - 1  # positions
        low = 0 if visible is None else visible.low(first)
        high = S if visible is None else min(S, visible.high(last))
        high = min(high, last + 1) if causal else high
        visited = range(low // BLOCK, -(-high // BLOCK))
        # Keys that every query of the block sees: behind the last one's first, before the first one's last.
        inner = 0 if visible is None else visible.low(last)
        outer = S if visible is None else min(S, visible.high(first))
        outer = min(outer, first + 1) if causal else outer
        full = range(-(-inner // BLOCK), outer // BLOCK) if lengths is None else range(0)
        whole.append(list(full))
        partial.append([column for column in visited if column not in full])
    return BlockMask.from_kv_blocks(
        *_listed(partial, columns, device), *_listed(whole, columns, device), BLOCK, seen, (T, S)
    )


def _listed(blocks: list[list[int]], columns: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """How many blocks each row visits, (1,1,rows), and which, (1,1,rows,columns) filled up with 0."""
    counts = torch.tensor([len(row) for row in blocks], dtype=torch.int32, device=device)
    padded = [row + [0] * (columns - len(row)) for row in blocks]
    return counts[None, None], torch.tensor(padded, dtype=torch.int32, device=device)[None, None]
