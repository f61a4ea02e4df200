"""Elementwise steps of a block whose gradient, written by hand, is faster or keeps less than autograd's own.

On CPU, torch's RMSNorm is a chain of small kernels (its backward took eight times LayerNorm's), and `silu(a) * b` keeps
three tensors of the feed-forward width where two are enough, as many as its gradient needs besides what it is given. Without a
gradient they are what they compute: for one token, calling a function of one's own takes longer than its arithmetic.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from ctxlab.model.few import are_few

Gate = Literal["swiglu", "geglu_tanh"]


def rms_norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """y = x / sqrt(mean(x^2) + eps) * weight over the last dimension, in fp32 or better, returned as `dtype`.

    Zhang and Sennrich 2019, arXiv:1910.07467, eq. 4, with eps inside the root as everybody has it.
    """
    if are_few(x):
        high = torch.promote_types(x.dtype, torch.float32)
        return F.rms_norm(x.to(high), weight.shape, weight.to(high), eps).to(dtype)
    return scaled(x, weight, row_scale(x, eps), dtype)


def row_scale(x: Tensor, eps: float) -> Tensor:
    """r = 1 / sqrt(mean(x^2) + eps) over the last dimension, (...,1) in fp32 or better, as a number without a gradient."""
    with torch.no_grad():
        high = x.to(torch.promote_types(x.dtype, torch.float32))
        norm = torch.linalg.vector_norm(high, dim=-1, keepdim=True)
        return norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()


def scaled(x: Tensor, weight: Tensor, r: Tensor, dtype: torch.dtype) -> Tensor:
    """y = x r weight for the r that is x's own `row_scale`: the gradient is that of the whole norm. Keeps x, weight and r."""
    if not torch.is_grad_enabled():
        return _times(x, weight, r, dtype)
    result: Tensor = _RMSNorm.apply(x, weight, r, dtype)
    return result


def gated(gate: Tensor, up: Tensor, kind: Gate) -> Tensor:
    """y = f(gate) * up (Shazeer 2020, arXiv:2002.05202, eq. 5). Keeps only its two inputs.

    swiglu: f(a) = a sigmoid(a). geglu_tanh: f is GELU by tanh (Hendrycks and Gimpel 2016, arXiv:1606.08415).
    """
    if not torch.is_grad_enabled():
        return _gate(gate, kind).mul_(up)
    result: Tensor = _Gated.apply(gate, up, kind)
    return result


class _RMSNorm(torch.autograd.Function):
    """With n the width, r = 1 / sqrt(mean(x^2) + eps), u = grad * weight: dx = r (u - x r^2 sum(u x) / n)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, r: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(x, weight, r)
        return _times(x, weight, r, dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x, weight, r = ctx.saved_tensors
        n = x.shape[-1]
        high, grad, scale = x.to(r.dtype), grad.to(r.dtype), weight.to(r.dtype)
        # LayerNorm's kernel, told that the mean is 0, gives all terms at once and one too many: - r mean(u), added back.
        dx, dweight, _ = torch.ops.aten.native_layer_norm_backward(
            grad.contiguous(), high, (n,), torch.zeros_like(r), r, scale, None, (True, True, False)
        )
        with torch.autocast(x.device.type, enabled=False):
            dx.addcmul_((grad @ scale).unsqueeze(-1), r, value=1 / n)
        return dx.to(x.dtype), dweight.to(weight.dtype), None, None


class _Gated(torch.autograd.Function):
    """With g the gradient: dup = f(gate) g, dgate = f'(gate) up g, each in the memory of its first factor's product."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, kind: Gate) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.kind = kind
        return _gate(gate, kind).mul_(up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        gate, up = ctx.saved_tensors
        dup = _gate(gate, ctx.kind).mul_(grad)
        dgate = grad * up
        if ctx.kind == "swiglu":
            torch.ops.aten.silu_backward.grad_input(dgate, gate, grad_input=dgate)
        else:
            torch.ops.aten.gelu_backward.grad_input(dgate, gate, approximate="tanh", grad_input=dgate)
        return dgate, dup, None


def _times(x: Tensor, weight: Tensor, r: Tensor, dtype: torch.dtype) -> Tensor:
    return (x.to(r.dtype) * r).mul_(weight).to(dtype)


def _gate(x: Tensor, kind: Gate) -> Tensor:
    return F.silu(x) if kind == "swiglu" else F.gelu(x, approximate="tanh")
