"""Momentum made orthogonal, in the number format that the hardware multiplies fast.

torch.optim.Muon does it always by bf16 products, which a CPU without instructions for them takes minutes a step for. Where
fp32 is what there is, inverses are good to use and cheaper.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import groupby
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from ctxlab.train.optim.sign import nearest_to_one
from ctxlab.train.precision import multiplies_bf16

_COEFFICIENTS = 3.4445, -4.7750, 2.0315
_ITERATIONS = 5
_SIGN = nearest_to_one(1e-3, poles=2)
_LEVEL = 0.9  # what singular values become: the products' mean, so that a learning rate means the same by both ways
_EPS = 1e-7
_TOGETHER = 1 << 22  # numbers of matrices that are worked on at once, at most, where one has not more


def orthogonalized(matrices: Tensor, dtype: torch.dtype) -> Tensor:
    """Matrices (n, rows, columns) with their singular values moved to about 0.9, in `dtype`.

    In bf16 by products alone, `by_products`; in fp32 and better `by_inverses`, a fifth of the operations and less uneven.
    """
    x = matrices.to(dtype)
    tall = x.shape[-2] > x.shape[-1]
    wide = x.mT if tall else x
    with torch.autocast(x.device.type, enabled=False):
        moved = by_products(wide) if dtype == torch.bfloat16 else by_inverses(wide)
    return moved.mT if tall else moved


def by_products(x: Tensor) -> Tensor:
    """Five times X <- a X + (b A + c A A) X with A = X X^T, from X = x / |x|_F, of x (n, r, c), r <= c.

    a, b, c = 3.4445, -4.7750, 2.0315 take singular values of [0.0016, 1] to 0.68 - 1.21 (Jordan et al. 2024,
    kellerjordan.github.io/posts/muon). 5 (4 r^2 c + 2 r^3) operations a matrix.
    """
    a, b, c = _COEFFICIENTS
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=_EPS)
    for _ in range(_ITERATIONS):
        gram = x @ x.mT  # (n, r, r)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def by_inverses(x: Tensor) -> Tensor:
    """0.9 U f(S / z) V^T of x = U S V^T (n, r, c), r <= c; z = |x x^T|_F^(1/2) is at least the largest of S.

    f is the odd function of two poles nearest to 1 on [0.001, 1] (`sign.py`), and 0.9 f is 0.72 - 1.08 there: with G = x x^T

        0.9 (m / z + sum_j a_j z (G + s_j z^2)^-1) x,    f(t) = t (m + sum_j a_j / (t^2 + s_j))

    An inverse takes r^3 operations, by Cholesky, so all is 4 r^2 c + 2 r^3: what one iteration of `by_products` takes. G has
    the square of x's condition. What rounds off in it, some 1e-7 z^2 in fp32, is little beside the smaller shift of 6e-6 z^2,
    and the directions that it hides are those in which f is straight, f(t) = 918 t: of them it changes little.
    """
    gram = x @ x.mT  # (n, r, r)
    squared = gram.flatten(1).norm(dim=1).clamp(min=_EPS**2)[:, None]  # z^2 (n, 1)
    z = squared.sqrt()[..., None]
    factor, diagonal, before = torch.zeros_like(gram), gram.diagonal(dim1=-2, dim2=-1), 0.0
    for residue, shift in zip(_SIGN.residues, _SIGN.shifts, strict=True):
        diagonal += (shift - before) * squared
        before = shift
        factor.addcmul_(torch.cholesky_inverse(torch.linalg.cholesky_ex(gram).L), z, value=_LEVEL * residue)
    factor.diagonal(dim1=-2, dim2=-1).add_(_LEVEL * _SIGN.constant / z[..., 0])
    return factor @ x


class Orthogonal(torch.optim.Optimizer):
    """M <- m M + (1 - m) G; W <- (1 - lr wd) W - lr 0.2 sqrt(max(rows, columns)) O((1 - m) G + m M), O as above.

    Nesterov's momentum as in torch.optim.Muon; the scale of the step is Liu et al. 2025, arXiv:2502.16982, eq. 4.
    `stacks` says of a parameter, by its id, that it is so many matrices one below the other: each is a W of its own.
    """

    def __init__(
        self,
        parameters: Iterable[dict[str, Any]],
        *,
        lr: float,
        weight_decay: float,
        momentum: float,
        stacks: Mapping[int, int] = MappingProxyType({}),
    ) -> None:
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        self.stacks = stacks

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            alike = sorted((p for p in group["params"] if p.grad is not None), key=self._kind)
            for (shape, stack), weights in groupby(alike, key=self._kind):
                these, most = list(weights), max(1, _TOGETHER // math.prod(shape))
                for first in range(0, len(these), most):
                    self._step(these[first : first + most], stack, group)
        return loss

    def _kind(self, weight: nn.Parameter) -> tuple[tuple[int, ...], int]:
        return tuple(weight.shape), self.stacks.get(id(weight), 1)

    def _step(self, weights: Sequence[nn.Parameter], stack: int, group: dict[str, Any]) -> None:
        momentum, rate = group["momentum"], group["lr"]
        directions = weights[0].new_empty(len(weights), *weights[0].shape)
        for weight, direction in zip(weights, directions, strict=True):
            assert weight.grad is not None
            state = self.state[weight]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(weight)
            buffer = state["momentum_buffer"].lerp_(weight.grad, 1 - momentum)
            torch.lerp(weight.grad, buffer, momentum, out=direction)
        matrices = directions.unflatten(1, (stack, -1)).flatten(0, 1)  # (weights x stack, rows, columns)
        updates = orthogonalized(matrices, _fast_dtype(weights[0].device)).unflatten(0, (-1, stack)).flatten(1, 2)
        for weight, update in zip(weights, updates, strict=True):
            weight.mul_(1 - rate * group["weight_decay"])
            weight.add_(update.to(weight.dtype), alpha=-rate * 0.2 * max(matrices.shape[1:]) ** 0.5)


@functools.cache
def _fast_dtype(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if multiplies_bf16(device) else torch.float32
