"""Attention without a bias through torch's own fused kernels, with the log-sum-exp that they compute anyway."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ctxlab.model.attention.blockwise import autocast, blockwise_attention, check
from ctxlab.model.kernels import kernels_of

_ops = torch.ops.aten


def fused_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    causal: bool,
    lengths: Tensor | None = None,
    lse_gradient: bool = False,
) -> tuple[Tensor, Tensor]:
    """out = softmax(scale q k^T) v and its log-sum-exp, as fast as torch's fused kernel, never holding T x S scores.

        lse_i = ln sum_j exp(s_ij),    out_i = sum_j exp(s_ij - lse_i) v_j,    s_ij = scale q_i . k_j

    q (B,H,T,D), k (B,Hkv,S,D), v (B,Hkv,S,Dv) of one dtype, Hkv dividing H. Query row t sits at position S - T + t;
    causal, T <= S, it sees the keys up to that position. (torch's own `is_causal` lets it see those up to t.) lengths (B,),
    each at least 1: keys from lengths[b] on are padding that nobody sees; one row of S numbers for each of the batch hides
    them, which the CPU's kernel takes as it is and the others as one more column of q and k.
    Returns out (B,H,T,Dv) in q's dtype and lse (B,H,T), natural log, fp32 (fp64 for fp64), which carries a gradient where
    `lse_gradient` asks for it (on CPU, here; elsewhere blockwise).
    T = S, T = 1 and no causality go to torch's kernel, on CPU without copying key-value heads. The rest, new tokens
    that also attend to a past, goes blockwise, and so does what a device has no fused kernel for. Widths are padded
    with zeros to one multiple of 8: unequal ones fall off the kernel. Raises ValueError on shapes that do not fit.
    """
    q, k, v = autocast(q, k, v)
    check(q, k, v, causal)
    T, S, width = q.shape[2], k.shape[2], v.shape[3]
    causal = causal and T > 1
    kernel = _kernel(q, q.shape[3] + (lengths is not None))
    if kernel is None or (causal and T < S) or (lse_gradient and kernel is not _cpu):
        return blockwise_attention(q, k, v, scale=scale, causal=causal, lengths=lengths)
    mask = None
    if lengths is not None and kernel is _cpu:
        mask = _padding(lengths, k)
    elif lengths is not None:
        q, k = _with_padding(lengths, q, k)
    padded = -(-max(q.shape[3], width) // 8) * 8
    q, k, v = _aligned(q, padded), _aligned(k, padded), _aligned(v, padded)
    if lse_gradient:
        out, lse = _WithLseGradient.apply(q, k, v, causal, scale, width, mask)
    else:
        out, lse = kernel(q, k, v, causal, scale, mask)
    return out if width == padded else out[..., :width], lse


def _aligned(x: Tensor, width: int) -> Tensor:
    """x as the kernels want it, the same tensor where it is already: `width` wide and its last axis contiguous."""
    if x.shape[3] != width:
        return F.pad(x, (0, width - x.shape[3]))
    return x if x.stride(3) == 1 else x.contiguous()


def _padding(lengths: Tensor, k: Tensor, lowest: float = -torch.inf) -> Tensor:
    """What is added to all scores of a key, 0 or `lowest`, (B,1,1,S)."""
    hidden = torch.arange(k.shape[2], device=k.device) >= lengths.to(k.device)[:, None]  # (B,S)
    return torch.zeros(hidden.shape, dtype=k.dtype, device=k.device).masked_fill_(hidden, lowest)[:, None, None]


def _with_padding(lengths: Tensor, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """q and k with a column whose product hides padded keys: the lowest that a score may be without overflow."""
    column = _padding(lengths, k, max(-1e9, torch.finfo(k.dtype).min / 2)).mT  # (B,1,S,1)
    return F.pad(q, (0, 1), value=1.0), torch.cat([k, column.expand(*k.shape[:3], 1)], dim=3)


def _cpu(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    out, lse = _ops._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, attn_mask=mask, scale=scale)
    return out, lse


class _WithLseGradient(torch.autograd.Function):
    """The CPU kernel, whose log-sum-exp has a gradient too.

    With g and h the gradients of out and lse, ds = p (g v^T - sum g out + h). One more column gives the last term: ones in v,
    h in g, and 0 in what the backward is told was the output.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float, width: int, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        out, lse = _cpu(q, k, v, causal, scale, mask)
        ctx.save_for_backward(q, k, v, out, lse, mask)
        ctx.settings = causal, scale, width
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None):  # type: ignore[no-untyped-def]
        q, k, v, out, lse, mask = ctx.saved_tensors
        causal, scale, width = ctx.settings
        grad = torch.zeros_like(out) if grad_out is None else grad_out
        full = q.shape[3]
        if grad_lse is not None:
            padded = -(-(width + 1) // 8) * 8
            padded = max(full, padded)
            q, k, v, out, grad = (_aligned(x, padded) for x in (q, k, v, out, grad))
            v, out, grad = v.clone(), out.clone(), grad.clone()
            v[..., width], out[..., width], grad[..., width] = 1.0, 0.0, grad_lse.to(grad.dtype)
        dq, dk, dv = _ops._scaled_dot_product_flash_attention_for_cpu_backward(
            grad.contiguous(), q, k, v, out, lse, 0.0, causal, attn_mask=mask, scale=scale
        )
        dv = dv[..., :full]
        if width < full:  # the columns of v beyond its own are padding
            dv = dv.clone()
            dv[..., width:] = 0.0
        return dq[..., :full], dk[..., :full], dv, None, None, None, None


def _cuda_half(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float, mask: None) -> tuple[Tensor, Tensor]:
    out, lse, *_ = _ops._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, False, scale=scale)
    return out, lse


def _cuda_single(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float, mask: None) -> tuple[Tensor, Tensor]:
    group = q.shape[1] // k.shape[1]
    if group > 1:  # this kernel wants a key-value head for every head
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    out, lse, *_ = _ops._scaled_dot_product_efficient_attention(q, k, v, None, True, 0.0, causal, scale=scale)
    return out, lse[..., : q.shape[2]].detach()  # the kernel rounds the length up to a multiple of 32


def _kernel(q: Tensor, width: int):  # type: ignore[no-untyped-def]
    """torch's fused kernel for q's device and dtype and a width, if there is one."""
    kind = kernels_of(q.device)
    if kind == "cpu":
        return _cpu
    if kind == "cuda" and q.dtype in (torch.float16, torch.bfloat16) and width <= 256:
        return _cuda_half
    if kind == "cuda" and q.dtype == torch.float32:
        return _cuda_single
    return None
