"""Attention with any bias in memory linear in the context: block by block forward, recomputed block by block backward.

Symbols: B batch, H heads, Hkv key-value heads, G = H / Hkv heads to each of them, T queries, S keys, D and Dv widths.
A tile is (b, h, m, n): some of the batch, some heads, m queries in descending order, n keys.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ctxlab.model.attention.bias import LOG2_E, Bias, BiasTiles, ScoreTiles, Span, Tile, no_bias
from ctxlab.model.attention.native import Kernel, native_attention, takes
from ctxlab.model.attention.visible import Visible
from ctxlab.model.kernels import kernels_of

SIDE = 512
"""Queries and keys in a tile on a CPU."""

TILE_SCORES = 2**21
"""Scores in a tile over all its heads, at most, on a CPU: its buffers then take some 24 MiB. With fewer, calls cost more
than what stays in the cache saves."""

WIDE_SIDE, WIDE_TILE_SCORES = 2048, 2**24
"""The same on other devices, where a tile has to keep the whole chip busy for longer than it takes to launch its parts."""

LOWEST = -1e30
"""Stands in for the maximum over no score: finite, so that no difference of two infinities arises."""


def blockwise_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    causal: bool,
    bias: Bias | None = None,
    lengths: Tensor | None = None,
    visible: Visible | None = None,
    blocks: tuple[int, int] | None = None,
    kernel: Kernel = "torch",
) -> tuple[Tensor, Tensor]:
    """out = softmax(scale q k^T + bias) v and its log-sum-exp, without T x S scores; every tensor gets its gradient.

        lse_i = ln sum_j exp(s_ij),    out_i = sum_j exp(s_ij - lse_i) v_j,    s_ij = scale q_i . k_j + bias_ij

    The sum over the keys is taken tile by tile with a running maximum (Milakov and Gimelshein 2018, arXiv:1805.02867;
    Dao et al. 2022, arXiv:2205.14135, algorithms 1 and 4); the backward recomputes each tile's weights from the lse.

    q (B,H,T,D), k (B,Hkv,S,D), v (B,Hkv,S,Dv) of one dtype, Hkv dividing H. Query row t sits at position S - T + t;
    causal, T <= S, it sees the keys up to that position. lengths (B,): keys from lengths[b] on are padding that
    nobody sees; positions stay as they are. visible hides further pairs. A query that sees no key gets out 0 and
    lse -inf. Tiles that nobody sees are not visited.
    Returns out (B,H,T,Dv) in q's dtype and lse (B,H,T), natural log, fp32 (fp64 for fp64); both carry gradients.
    Scores and all sums over tiles are fp32 (fp64 for fp64); weights and their gradients are rounded to q's dtype.
    blocks: queries and keys in a tile, None: by the device; any sizes give the same result. kernel: whether native.py
    computes where it can. On CUDA, biases that FlexAttention can state run there (see flex.py). Raises ValueError on shapes
    that do not fit.
    """
    q, k, v = autocast(q, k, v)
    check(q, k, v, causal)
    if lengths is not None and lengths.shape != q.shape[:1]:
        raise ValueError(f"attention: lengths {tuple(lengths.shape)} is not one number for each of {q.shape[0]} rows")
    if takes(q, k, v, scale=scale, bias=bias, kernel=kernel):
        return native_attention(q, k, v, scale=scale, causal=causal, bias=bias, lengths=lengths, visible=visible)
    if kernels_of(q.device) == "cuda":
        from ctxlab.model.attention.flex import can_flex, flexible_attention  # brings torch's compiler with it

        if can_flex(q, v, bias):
            return flexible_attention(
                q, k, v, scale=scale, causal=causal, bias=bias, lengths=lengths, visible=visible
            )  # fmt: skip
    tensors = () if bias is None else bias.tensors
    counts = None if lengths is None else tuple(int(n) for n in lengths.tolist())
    blocks = blocks or _blocks(q)
    with torch.autocast(q.device.type, enabled=False):
        return _Blockwise.apply(q, k, v, scale, causal, bias, visible, counts, blocks, *tensors)


def autocast(*operands: Tensor) -> tuple[Tensor, ...]:
    """The operands in the dtype that autocast gives torch's own attention; as they are outside autocast."""
    device = operands[0].device.type
    if not torch.is_autocast_enabled(device):
        return operands
    return tuple(x if x.dtype == torch.float64 else x.to(torch.get_autocast_dtype(device)) for x in operands)


def check(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> None:
    """Raises ValueError where q (B,H,T,D), k (B,Hkv,S,D) and v (B,Hkv,S,Dv) do not fit; causal, T <= S."""
    if q.shape[3] != k.shape[3] or k.shape[:3] != v.shape[:3] or q.shape[0] != k.shape[0] or q.shape[1] % k.shape[1]:
        shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
        raise ValueError(f"attention: shapes do not fit: {shapes}; needed: (B,H,T,D), (B,Hkv,S,D), (B,Hkv,S,Dv)")
    if causal and q.shape[2] > k.shape[2]:
        raise ValueError(f"attention: more queries than keys ({q.shape[2]} > {k.shape[2]})")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"attention: q, k and v differ in dtype ({q.dtype}, {k.dtype}, {v.dtype})")


def side_of(device: torch.device) -> int:
    """Queries, and keys, in a tile where there are many of both."""
    return SIDE if kernels_of(device) == "cpu" else WIDE_SIDE


def _blocks(q: Tensor) -> tuple[int, int]:
    """Queries and keys in a tile: few queries, as in decoding, get the more keys where launches are what costs."""
    side = side_of(q.device)
    rows = min(q.shape[2], side)
    return side, side if kernels_of(q.device) == "cpu" else side * side // rows


class _Part(NamedTuple):
    """Some of the batch and some heads; all its tiles share their operands."""

    batch: slice
    kv: slice
    heads: slice
    n_keys: int  # of the row with the most


class _Plan(NamedTuple):
    """Which tiles are visited, in which order."""

    B: int
    Hkv: int
    G: int
    span: Span
    counts: tuple[int, ...] | None
    visible: Visible | None
    n_cols: int

    def parts(self) -> Iterator[_Part]:
        """As many rows of the batch, or else heads, together as fit one tile's buffers."""
        span = self.span
        most = TILE_SCORES if kernels_of(span.device) == "cpu" else WIDE_TILE_SCORES
        fit = max(most // (self.G * min(span.rows, span.T) * min(self.n_cols, span.S)), 1)
        n_kv = -(-self.Hkv // -(-self.Hkv // fit))  # in equal shares, as few as fit
        n_rows = max(fit // self.Hkv, 1)
        for row in range(0, self.B, n_rows):
            n_keys = span.S if self.counts is None else min(max(self.counts[row : row + n_rows]), span.S)
            for kv in range(0, self.Hkv if n_keys else 0, n_kv):
                stop = min(kv + n_kv, self.Hkv)
                yield _Part(slice(row, row + n_rows), slice(kv, stop), slice(kv * self.G, stop * self.G), n_keys)

    def rows(self) -> Iterator[slice]:
        for t in range(0, self.span.T, self.span.rows):
            yield slice(t, min(t + self.span.rows, self.span.T))

    def tiles(self, part: _Part, rows: slice) -> Iterator[Tile]:
        """The visible tiles of a block of queries, nearest keys first."""
        before = self.span.S - self.span.T
        queries = range(before + rows.stop - 1, before + rows.start - 1, -1)
        low, stop = 0, part.n_keys
        if self.span.causal:
            stop = min(stop, queries[0] + 1)
        if self.visible is not None:
            low, stop = self.visible.low(queries[-1]), min(stop, self.visible.high(queries[0]))
        while stop > low:
            start = max(stop - self.n_cols, low)
            yield Tile(part.batch, part.heads, queries, slice(start, stop))
            stop = start


def _plan(
    q: Tensor, k: Tensor, causal: bool, counts: tuple[int, ...] | None, visible: Visible | None, blocks: tuple[int, int],
    training: bool,
) -> _Plan:  # fmt: skip
    B, H, T, _ = q.shape
    Hkv, S = k.shape[1:3]
    high = torch.promote_types(q.dtype, torch.float32)
    span = Span(T, S, causal, blocks[0], high, q.device, training)
    return _Plan(B, Hkv, H // Hkv, span, counts, visible, blocks[1])


class _Blockwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q, k, v, scale, causal, bias, visible, counts, blocks, *tensors):  # type: ignore[no-untyped-def]
        plan = _plan(q, k, causal, counts, visible, blocks, training=False)
        tiles = no_bias(plan.span) if bias is None else bias.open(tensors, plan.span)
        out, lse = _forward(plan, tiles, q, k, v, scale * LOG2_E)
        ctx.save_for_backward(q, k, v, out, lse, *tensors)
        ctx.settings = (scale, causal, bias, visible, counts, blocks)
        if tiles.constant is not None:
            lse = lse + tiles.constant[:, None]
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_out, grad_lse):  # type: ignore[no-untyped-def]
        q, k, v, out, lse, *tensors = ctx.saved_tensors
        scale, causal, bias, visible, counts, blocks = ctx.settings
        learned = any(ctx.needs_input_grad[9:])
        plan = _plan(q, k, causal, counts, visible, blocks, training=learned)
        tiles = no_bias(plan.span) if bias is None else bias.open(tuple(tensors), plan.span)
        with torch.autocast(q.device.type, enabled=False):
            grad_out = torch.zeros_like(out) if grad_out is None else grad_out
            grad_lse = torch.zeros_like(lse) if grad_lse is None else grad_lse.masked_fill(lse == -torch.inf, 0.0)
            dq, dk, dv = _backward(plan, tiles, q, k, v, out, lse, grad_out, grad_lse, scale)
        grads = tiles.gradients(grad_lse.sum((0, 2))) if learned else ()
        wanted = [g.to(t.dtype) if n else None for g, t, n in zip(grads, tensors, ctx.needs_input_grad[9:])]
        return dq, dk, dv, None, None, None, None, None, None, *(wanted or [None] * len(tensors))


def _forward(
    plan: _Plan, bias: BiasTiles | ScoreTiles, q: Tensor, k: Tensor, v: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """out and lse (less the bias's constant). scale is in units of ln 2: everything inside is a power of 2."""
    high = plan.span.dtype
    out = q.new_zeros(*q.shape[:3], v.shape[3])
    lse = torch.full(q.shape[:3], -torch.inf, dtype=high, device=q.device)
    scratch, hidden = _Scratch(q, 1), _Hidden(plan, bias)
    for part in plan.parts():
        keys = _fold(k[part.batch, part.kv, : part.n_keys], part)  # (g,n,D), g = b times KV heads
        values = _fold(v[part.batch, part.kv, : part.n_keys], part)  # (g,n,Dv)
        for rows in plan.rows():
            queries = q[part.batch, part.heads, rows].flip(2)  # (b,h,m,D)
            shape = queries.shape[:3]
            folded = _fold(queries, part)  # (g,G m,D)
            top = torch.full(folded.shape[:2], LOWEST, dtype=high, device=q.device).unsqueeze(-1)  # (g,G m,1)
            total = torch.zeros_like(top)
            mean = torch.zeros(*folded.shape[:2], v.shape[3], dtype=high, device=q.device)
            for tile in _begin(bias, list(plan.tiles(part, rows))):
                n = tile.keys
                scores = scratch.scores(*shape, n.stop - n.start)
                _fill(scores, bias, hidden, tile, folded, keys[:, n], scale)
                scores = scores.view(*folded.shape[:2], -1)  # (g,G m,n)
                higher = torch.maximum(top, scores.amax(-1, keepdim=True))
                weights = scores.sub_(higher).exp2_()
                decay = torch.exp2(top - higher)
                total.mul_(decay).add_(weights.sum(-1, keepdim=True))
                mean.mul_(decay).add_(torch.bmm(scratch.rounded(weights), values[:, n]))
                top = higher
            seen = total > 0
            total.masked_fill_(~seen, 1.0)
            out[part.batch, part.heads, rows] = (mean / total).view(*shape, -1).flip(2)
            block = torch.where(seen, (top + total.log2()) / LOG2_E, -torch.inf)
            lse[part.batch, part.heads, rows] = block.view(shape).flip(2)
    return out, lse


def _backward(
    plan: _Plan,
    bias: BiasTiles | ScoreTiles,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    grad: Tensor,
    grad_lse: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv; the bias collects its own. With g the gradient of out, h that of lse, and sums over the width in delta:

    p = exp(s - lse),  dv = p^T g,  delta = sum g out - h,  ds = p (g v^T - delta),  dq = scale ds k,  dk = scale ds^T q
    """
    high = plan.span.dtype
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    scratch, hidden = _Scratch(q, 2), _Hidden(plan, bias)
    for part in plan.parts():
        keys = _fold(k[part.batch, part.kv, : part.n_keys], part)
        values = _fold(v[part.batch, part.kv, : part.n_keys], part)
        sum_k = torch.zeros_like(keys, dtype=high)
        sum_v = torch.zeros(*keys.shape[:2], v.shape[3], dtype=high, device=v.device)
        for rows in plan.rows():
            queries = q[part.batch, part.heads, rows].flip(2)  # (b,h,m,D)
            shape = queries.shape[:3]
            folded = _fold(queries, part)
            norm = lse[part.batch, part.heads, rows].flip(2).unsqueeze(-1)  # (b,h,m,1)
            norm = norm.masked_fill(norm == -torch.inf, 0.0) * LOG2_E
            g = grad[part.batch, part.heads, rows].flip(2)
            delta = (g.to(high) * out[part.batch, part.heads, rows].flip(2).to(high)).sum(-1, keepdim=True)
            delta -= grad_lse[part.batch, part.heads, rows].flip(2).unsqueeze(-1)
            # delta rides in the product with v as two more columns, as two numbers of q's precision.
            coarse = delta.to(q.dtype)
            g = _fold(torch.cat((g, -coarse, (coarse - delta).to(q.dtype)), -1), part)  # (g,G m,Dv+2)
            pure = g[..., :-2].contiguous()
            sum_q = torch.zeros_like(folded, dtype=high)
            tiles = _begin(bias, list(plan.tiles(part, rows)))
            if bias.reads_scores:
                for tile in tiles:  # for the running sums alone
                    n = tile.keys
                    if bias.finished:  # type: ignore[union-attr]
                        break
                    scores = scratch.scores(*shape, n.stop - n.start)
                    _fill(scores, bias, hidden, tile, folded, keys[:, n], scale * LOG2_E)
                tiles.reverse()
            for tile in tiles:
                n = tile.keys
                scores = scratch.scores(*shape, n.stop - n.start)
                _fill(scores, bias, hidden, tile, folded, keys[:, n], scale * LOG2_E, norm)
                scores = scores.view(*folded.shape[:2], -1)  # (g,G m,n)
                weights = scratch.rounded(scores.exp2_())
                sum_v[:, n] += torch.bmm(weights.mT, pure)
                wide = F.pad(values[:, n], (0, 2), value=1.0)  # (g,n,Dv+2)
                ds = torch.bmm(g, wide.mT, out=scratch.gradient(weights.shape)).mul_(weights)
                if bias.reads_scores and plan.span.training:
                    bias.collect(tile, ds.view(*shape, -1))
                sum_q += torch.bmm(ds, keys[:, n])
                sum_k[:, n] += torch.bmm(ds.mT, folded)
                if not bias.reads_scores and plan.span.training:
                    bias.collect(tile, ds.view(*shape, -1))
            dq[part.batch, part.heads, rows] = (sum_q * scale).view(*shape, -1).flip(2)
        dk[part.batch, part.kv, : part.n_keys] = _unfold(sum_k.mul_(scale), part)
        dv[part.batch, part.kv, : part.n_keys] = _unfold(sum_v, part)
    return dq, dk, dv


def _begin(bias: BiasTiles | ScoreTiles, tiles: list[Tile]) -> list[Tile]:
    """The tiles of a block of queries, announced to a bias that keeps running sums."""
    if bias.reads_scores and tiles:
        bias.begin(tiles[0])  # type: ignore[union-attr]
    return tiles


class _Hidden:
    """Hides pairs of a tile from each other: what lies in the future, unless the bias does, padding where some row of the
    tile has more keys, and what is not visible."""

    def __init__(self, plan: _Plan, bias: BiasTiles | ScoreTiles) -> None:
        self.future = no_bias(plan.span) if plan.span.causal and not bias.hides_future else None
        self.visible, self.counts = plan.visible, plan.counts

    def __call__(self, scores: Tensor, tile: Tile) -> None:
        if self.future is not None and tile.nearest < 0:
            scores.add_(self.future.block(tile))
        hidden = None if self.visible is None else self.visible.hidden(tile, scores.device)
        if hidden is not None:
            scores.masked_fill_(hidden, -torch.inf)
        counts = () if self.counts is None else self.counts[tile.batch]
        if counts and min(counts) < tile.keys.stop:
            keys = torch.arange(tile.keys.start, tile.keys.stop, device=scores.device)
            ends = torch.tensor(counts, device=scores.device)
            scores.masked_fill_(keys >= ends[:, None, None, None], -torch.inf)


def _fill(
    scores: Tensor,
    bias: BiasTiles | ScoreTiles,
    hide: _Hidden,
    tile: Tile,
    queries: Tensor,
    keys: Tensor,
    scale: float,
    norm: Tensor | None = None,
) -> None:
    """scores (b,h,m,n) = scale q k^T + bias - norm, in units of ln 2, from folded queries (g,G m,D) and keys (g,n,D)."""
    folded = scores.view(*queries.shape[:2], -1)
    if bias.reads_scores:
        scores.zero_()
        add_product(folded, queries, keys, scale)
        hide(scores, tile)
        bias.add(tile, scores)  # type: ignore[union-attr]
        if norm is not None:
            scores.sub_(norm)
        return
    block = bias.block(tile)  # type: ignore[union-attr]
    if norm is None:
        scores.copy_(block)
    else:
        torch.sub(block.expand_as(scores), norm, out=scores)
    add_product(folded, queries, keys, scale)
    hide(scores, tile)


def _fold(x: Tensor, part: _Part) -> Tensor:
    """(b, heads, m, d) -> (b times KV heads, heads to each times m, d)."""
    return x.reshape(x.shape[0] * (part.kv.stop - part.kv.start), -1, x.shape[3])


def _unfold(x: Tensor, part: _Part) -> Tensor:
    """(b times KV heads, n, d) -> (b, KV heads, n, d)."""
    return x.view(-1, part.kv.stop - part.kv.start, *x.shape[1:])


class _Scratch:
    """The buffers of one tile, allocated once and cut to each tile's shape."""

    def __init__(self, like: Tensor, n_rounded: int) -> None:
        high = torch.promote_types(like.dtype, torch.float32)
        self.high = like.new_empty(0, dtype=high)
        self.low = [like.new_empty(0) for _ in range(n_rounded)]

    def scores(self, *shape: int) -> Tensor:
        size = math.prod(shape)
        if self.high.numel() < size:
            self.high = self.high.new_empty(size)
        return self.high[:size].view(shape)

    def rounded(self, weights: Tensor) -> Tensor:
        """The weights in the operands' dtype: themselves where that is the dtype of the scores."""
        if weights.dtype == self.low[0].dtype:
            return weights
        return self._low(0, weights.shape).copy_(weights)

    def gradient(self, shape: torch.Size) -> Tensor:
        return self._low(1, shape)

    def _low(self, n: int, shape: torch.Size) -> Tensor:
        if self.low[n].numel() < shape.numel():
            self.low[n] = self.low[n].new_empty(shape.numel())
        return self.low[n][: shape.numel()].view(shape)


def add_product(scores: Tensor, a: Tensor, b: Tensor, scale: float) -> None:
    """scores (g,m,n) += scale a b^T, in place and in the dtype of the scores, for a (g,m,D) and b (g,n,D).

    fp32 holds the products of bf16 numbers without loss, so oneDNN may multiply them as bf16 where that is faster; in
    fp32 too it is twice as fast as the default (MKL) on AMD.
    """
    exact = a.dtype == torch.bfloat16 and kernels_of(a.device) == "cpu"
    with _bf16_operands() if exact else nullcontext():
        scores.baddbmm_(a.to(scores.dtype), b.to(scores.dtype).mT, alpha=scale)


@contextmanager
def _bf16_operands() -> Iterator[None]:
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before
