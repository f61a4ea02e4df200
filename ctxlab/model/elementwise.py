"""Elementwise steps of a block whose gradient, written by hand, is faster or keeps less than autograd's own.

On CPU, torch's RMSNorm is a chain of small kernels (its backward took eight times LayerNorm's), and `silu(a) * b` keeps
three tensors of the feed-forward width where two are enough. Without a gradient they are what they compute: for one
token, calling a function of one's own takes longer than its arithmetic.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """y = x / sqrt(mean(x^2) + eps) * weight over the last dimension, in fp32 or better, returned as `dtype`.

    Zhang and Sennrich 2019, arXiv:1910.07467, eq. 4, with eps inside the root as everybody has it.
    """
    if not torch.is_grad_enabled():
        return _normed(x, weight, eps, dtype)[0]
    result: Tensor = _RMSNorm.apply(x, weight, eps, dtype)
    return result


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """y = silu(gate) * up, silu(a) = a sigmoid(a) (Shazeer 2020, arXiv:2002.05202, eq. 5). Keeps only its two inputs."""
    if not torch.is_grad_enabled():
        return _gated(gate, up)
    result: Tensor = _SwiGLU.apply(gate, up)
    return result


def _normed(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """y, and r = 1 / sqrt(mean(x^2) + eps)."""
    high = x.to(torch.promote_types(x.dtype, torch.float32))
    norm = torch.linalg.vector_norm(high, dim=-1, keepdim=True)
    r = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    return (high * r).mul_(weight).to(dtype), r


def _gated(gate: Tensor, up: Tensor) -> Tensor:
    return torch.nn.functional.silu(gate).mul_(up)


class _RMSNorm(torch.autograd.Function):
    """With n the width, r = 1 / sqrt(mean(x^2) + eps), u = grad * weight: dx = r (u - x r^2 sum(u x) / n)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        y, r = _normed(x, weight, eps, dtype)
        ctx.save_for_backward(x, weight, r)
        return y

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


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return _gated(gate, up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        dup = torch.nn.functional.silu(gate).mul_(grad)
        return torch.ops.aten.silu_backward(grad * up, gate), dup
