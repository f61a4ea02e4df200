"""Momentum made orthogonal, in the number format that the hardware multiplies fast.

torch.optim.Muon does the same always in bf16, which a CPU without instructions for it takes minutes a step for.
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

from ctxlab.train.precision import multiplies_bf16

_COEFFICIENTS = 3.4445, -4.7750, 2.0315
_ITERATIONS = 5
_EPS = 1e-7
_TOGETHER = 1 << 22  # numbers of matrices that are worked on at once, at most, where one has not more


def orthogonalized(matrices: Tensor, dtype: torch.dtype) -> Tensor:
    """Matrices (n, rows, columns) with their singular values moved to about 1, in `dtype`.

    Five times X <- P X, P = a I + b A + c A A with A = X X^T, from X = G / |G|_F; a, b, c = 3.4445, -4.7750, 2.0315 take
    singular values of [0.01, 1] or so to 0.7 - 1.2 (Jordan et al. 2024, kellerjordan.github.io/posts/muon).
    """
    x = matrices.to(dtype)
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    rows, columns = x.shape[-2:]
    iterate = _through_gram if gram_is_cheaper(rows, columns, dtype) else _directly
    with torch.autocast(x.device.type, enabled=False):
        x = iterate(x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=_EPS))
    return x.mT if tall else x


def gram_is_cheaper(rows: int, columns: int, dtype: torch.dtype) -> bool:
    """Whether the iteration on A alone takes fewer multiplications, and may be used: rows r <= columns c.

    An iteration on X is two products with it and A A: 2 r^2 c + r^3, of k = 5 in all k (2 r^2 c + r^3). On A, whose next is
    P A P, it is A A, two for that, and one that gathers the product of all P, 4 r^3; the first has nothing to gather and the
    last needs no next A, so with A itself and the product with X all is 2 r^2 c + (4 k - 3) r^3. Equal at c = 1.5 r. A has the
    square of X's condition, which the 8 bits of bf16 do not hold.
    """
    directly = _ITERATIONS * (2 * rows**2 * columns + rows**3)
    through_gram = 2 * rows**2 * columns + (4 * _ITERATIONS - 3) * rows**3
    return dtype != torch.bfloat16 and through_gram < directly


def _directly(x: Tensor) -> Tensor:
    a, b, c = _COEFFICIENTS
    for _ in range(_ITERATIONS):
        gram = x @ x.mT  # (n, r, r), r the shorter side
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def _through_gram(x: Tensor) -> Tensor:
    """P_5 P_4 P_3 P_2 P_1 X. All P are polynomials of the first A: symmetric, and the order is of no matter."""
    a, b, c = _COEFFICIENTS
    gram = x @ x.mT
    gathered: Tensor | None = None
    for left in reversed(range(_ITERATIONS)):
        step = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        step.diagonal(dim1=-2, dim2=-1).add_(a)
        gathered = step if gathered is None else step @ gathered
        if left:
            gram = step @ gram @ step
    assert gathered is not None
    return gathered @ x


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
