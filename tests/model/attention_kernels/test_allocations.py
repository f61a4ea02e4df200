"""No tensor of T x S elements is ever made, by any of the functions, forward or backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ctxlab.model.attention.bias import Bias, BlockBias, Tile, Toeplitz
from ctxlab.model.attention.blockwise import blockwise_attention
from ctxlab.model.attention.fused import fused_attention
from tests.model.attention_kernels.reference import operands

B, H, D, BLOCKS = 1, 2, 8, (64, 32)


class Largest(TorchDispatchMode):
    """The most elements that the memory under any operator's result holds: a strided view counts as what it views."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, Tensor):
                self.elements = max(self.elements, x.untyped_storage().nbytes() // x.element_size())
        return result


def largest(attend: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]], T: int, S: int) -> int:
    q, k, v, grad = operands(B, H, H, T, S, D, D, dtype=torch.float32)
    with Largest() as seen:
        out, _ = attend(q, k, v)
        out.backward(grad)
    return seen.elements


def toeplitz(S: int) -> Toeplitz:
    return Toeplitz(torch.randn(H, S).requires_grad_(), 0)


def t5_like(S: int) -> Toeplitz:
    return Toeplitz(torch.randn(H, 129).requires_grad_(), 0, 128)


def by_function(S: int) -> BlockBias:
    slope = torch.ones(H, 1, 1).requires_grad_()

    def bias(tile: Tile, slope: Tensor) -> Tensor:
        return -slope[tile.heads] * tile.distances(slope.device)

    return BlockBias(bias, (slope,))


@pytest.mark.parametrize("make", [toeplitz, t5_like, by_function])
@pytest.mark.parametrize("causal", [False, True])
def test_blockwise_holds_what_is_linear_in_the_context(make: Callable[[int], Bias], causal: bool) -> None:
    for S in (512, 1024, 2048):
        T = S // 2 + 1
        bias: Bias = make(S)
        if isinstance(bias, Toeplitz) and not causal:
            first = 1 - T
            bias = Toeplitz(torch.randn(H, S - first).requires_grad_(), first, bias.constant_from)

        def attend(q: Tensor, k: Tensor, v: Tensor, bias: Bias = bias) -> tuple[Tensor, Tensor]:
            return blockwise_attention(q, k, v, scale=0.3, causal=causal, bias=bias, blocks=BLOCKS)

        assert largest(attend, T, S) <= B * H * (S * (D + 2) + BLOCKS[0] * sum(BLOCKS)) < T * S


@pytest.mark.parametrize(("T", "S"), [(2048, 2048), (1024, 2048)])
def test_fused_holds_what_is_linear_in_the_context(T: int, S: int) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return fused_attention(q, k, v, scale=0.3, causal=True)

    tile = 512 * 512
    assert largest(attend, T, S) <= B * H * (S * (D + 2) + tile) < B * H * T * S
