"""A forward of few tokens, as in decoding: its time goes into reading weights and into calls, not into arithmetic.

On CPU torch's product of one fp32 row reads the matrix on one core alone; oneDNN's, which torch brings, on all of them.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ctxlab.model.kernels import kernels_of

FEW = 64  # rows; with more, the arithmetic is what costs
_LARGE = 1 << 20  # numbers of a matrix; to wake the other cores takes as long as to read a smaller one


def are_few(x: Tensor) -> bool:
    """Whether x (...,n) has few rows, and no gradient is wanted."""
    return not torch.is_grad_enabled() and x.numel() <= FEW * x.shape[-1]


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (...,n) by weight (m,n), (...,m), of any number of rows."""
    if (
        are_few(x)
        and weight.numel() >= _LARGE
        and x.dtype == weight.dtype == torch.float32
        and kernels_of(x.device) == "cpu"
        and torch.backends.mkldnn.is_available()
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
    ):
        product: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return product
    return F.linear(x, weight, bias)


class Projection(nn.Linear):
    """W x + b, quick for few rows."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)
