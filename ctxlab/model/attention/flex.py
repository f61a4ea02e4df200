"""Blockwise attention as one compiled kernel, through torch's FlexAttention: what runs on CUDA where it can."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch._dynamo
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from ctxlab.model.attention.bias import Bias, Difference, Toeplitz, covering
from ctxlab.model.attention.visible import Visible
from ctxlab.model.kernels import has_no_numbers, kernels_of

BLOCK = 128
"""Queries and keys in a block that is visited or not."""

MOST_BLOCKS = 2048
"""Rows of blocks at most: the lists of a longer text are of larger blocks, or would take more room than the text."""

MASKS = 16
"""Lists of blocks that are kept: a model asks for the same one in every layer of every step."""

COPIES = 16
"""Copies of what a bias has learned, while it learns: gradients are added up where a number was read, one after the other, and
neighbouring scores, which are computed together, read different ones."""

COMPILATIONS = 128
"""Kinds of call in one process, at most; torch's own limit is 8, and what it does beyond needs T x S scores."""


def can_flex(q: Tensor, v: Tensor, bias: Bias | None) -> bool:
    """Whether FlexAttention takes a problem: on CUDA, in its dtypes and widths, under a bias of the distance alone or of one
    number each of query and key.

    Biases with sums over tiles have no place in it. What the others learn gets its gradient by additions in any order. Fewer
    queries than a block has, as in decoding, are quicker in one tile than the list of blocks is made.
    """
    simple = bias is None or isinstance(bias, Toeplitz | Difference)
    small = q.dtype in (torch.float16, torch.bfloat16, torch.float32) and 16 <= q.shape[3] == v.shape[3] <= 256
    return kernels_of(q.device) == "cuda" and simple and small and q.shape[2] >= BLOCK


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
    assert bias is None or isinstance(bias, Toeplitz | Difference), "can_flex comes first"
    T, S = q.shape[2], k.shape[2]
    added, read = (None, []) if bias is None else _added(bias, T, S)
    if has_no_numbers(q):
        return _Shapes.apply(q, k, v, *read)
    if lengths is None:
        mask = _kept_mask(T, S, causal, visible, q.device)
    else:
        mask = _block_mask(T, S, causal, lengths, visible, q.device)
    with torch._dynamo.config.patch(recompile_limit=COMPILATIONS, fail_on_recompile_limit_hit=True):
        out, aux = _compiled()(
            q, k, v,
            score_mod=added,
            block_mask=mask,
            scale=scale,
            enable_gqa=q.shape[1] != k.shape[1],
            return_aux=AuxRequest(lse=True),
            kernel_options=None if bias is None else _options(q.shape[3]),
        )  # fmt: skip
    return out, aux.lse


@_disable_dynamo
@functools.lru_cache(MASKS)
def _kept_mask(T: int, S: int, causal: bool, visible: Visible | None, device: torch.device) -> BlockMask | None:
    with torch.inference_mode(False):  # the next to ask may be a training
        return _block_mask(T, S, causal, None, visible, device)


@functools.cache
def _compiled() -> Callable[..., Any]:
    return torch.compile(flex_attention)


def _options(width: int) -> Any:  # torch's own type for it knows no pass
    """How a kernel with a bias is cut. It fetches blocks ahead in stages, and the biases of a whole block of scores with them:
    in torch's own sizes those do not fit into a chip's shared memory."""
    if width > 64:
        return {"num_stages": 1}
    return {"fwd_num_stages": 2, "fwd_BLOCK_N": 64, "bwd_num_stages": 1}


Added = tuple[Callable[..., Tensor], list[Tensor]]
"""What FlexAttention adds to a score, and the tensors that it reads there."""


def _added(bias: Toeplitz | Difference, T: int, S: int) -> Added:
    return _by_distance(bias, T, S) if isinstance(bias, Toeplitz) else _by_difference(bias, T, S)


def _by_distance(bias: Toeplitz, T: int, S: int) -> Added:
    """Every distance has a number of its own, those that share a value too: half of all scores may be beyond the last bucket."""
    values, before = bias.values.float(), S - T - bias.first
    n_own = values.shape[1] if bias.constant_from is None else bias.constant_from - bias.first + 1
    own = values[:, :n_own]
    n = max(n_own, S - bias.first)
    lines = _copies(torch.cat([own, own[:, -1:].expand(-1, n - n_own)], dim=1))  # (copies,H,n)
    copies = len(lines)

    def modified(score: Tensor, b: Tensor, h: Tensor, t: Tensor, j: Tensor) -> Tensor:
        # hidden pairs may lie outside; the mask hides them
        return score + lines[t % copies, h, (t + before - j).clamp(0, n - 1)]

    return modified, [lines]


def _by_difference(bias: Difference, T: int, S: int) -> Added:
    """f_i - f_j of two fp32 numbers each: what is left of f when it is rounded is small, and so is the difference of what is not
    where i and j are near. Gradients go to the first, of query and of key apart."""
    f, before = covering(bias.f, S), S - T
    rounded = f.float()
    rest = (f.detach() - rounded.detach()).float().contiguous()  # (B,H,S)
    queries, keys = _copies(rounded), _copies(rounded)  # (copies,B,H,S)
    copies = len(queries)

    def modified(score: Tensor, b: Tensor, h: Tensor, t: Tensor, j: Tensor) -> Tensor:
        i = (t + before).clamp(0, S - 1)
        near = queries[j % copies, b, h, i] - keys[t % copies, b, h, j]
        return score + near + (rest[b, h, i] - rest[b, h, j])

    return modified, [queries, keys, rest]


def _copies(x: Tensor) -> Tensor:
    """x as COPIES of itself in front, in the memory of one, or as one where nothing is learned: their gradients are apart."""
    n = COPIES if torch.is_grad_enabled() and x.requires_grad else 1
    return x.contiguous().expand(n, *x.shape)


class _Shapes(torch.autograd.Function):
    """What is there in a trace, where tensors have no numbers: out and its log-sum-exp, and what the backward pass makes."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, *read: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)
        ctx.save_for_backward(q, k, v, out, lse, *read)
        return out, lse

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor):  # type: ignore[no-untyped-def]
        q, k, v, _, lse, *read = ctx.saved_tensors
        delta = torch.empty_like(lse)  # the sums over out and its gradient, there while the others are made
        found = [torch.empty_like(x) if wanted else None for x, wanted in zip((q, k, v, *read), ctx.needs_input_grad)]
        del delta
        return tuple(found)


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

    side = BLOCK
    while max(T, S) > side * MOST_BLOCKS:
        side *= 2
    visited, whole = [], []  # of each row, from one block up to another
    for row in range(-(-T // side)):
        first, last = before + row * side, before + min((row + 1) * side, T) - 1  # positions
        low = 0 if visible is None else visible.low(first)
        high = S if visible is None else min(S, visible.high(last))
        high = min(high, last + 1) if causal else high
        visited.append((low // side, -(-high // side)))
        # Keys that every query of the block sees: behind the last one's first, before the first one's last.
        inner = 0 if visible is None else visible.low(last)
        outer = S if visible is None else min(S, visible.high(first))
        outer = min(outer, first + 1) if causal else outer
        full = (-(-inner // side), outer // side)
        whole.append(full if lengths is None and full[0] < full[1] else (low // side, low // side))
    columns = torch.arange(-(-S // side))  # all of it is made on the host: small parts, many of them
    (low, high), (inner, outer) = (torch.tensor(ends).T[..., None] for ends in (visited, whole))  # (rows,1) each
    partial = columns + low + torch.where(columns + low >= inner, outer - inner, 0)
    lists = _listed(partial, high - low - (outer - inner)), _listed(columns + inner, outer - inner)
    (counts, blocks), (full_counts, full_blocks) = (tuple(part.to(device) for part in pair) for pair in lists)
    return BlockMask.from_kv_blocks(counts, blocks, full_counts, full_blocks, side, seen, (T, S))


def _listed(blocks: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """From blocks (rows,columns) of which the first counts (rows,1) are meant: how many, (1,1,rows), and which, filled up
    with 0, (1,1,rows,columns)."""
    meant = torch.arange(blocks.shape[1]) < counts
    return counts[None, None, :, 0].int(), blocks.masked_fill(~meant, 0)[None, None].int()
