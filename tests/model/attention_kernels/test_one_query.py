"""Attention of one query, compiled, equals dense attention in float64; what it is not made for it leaves to others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ctxlab.model.attention.bias import BlockBias, Tile, Toeplitz
from ctxlab.model.attention.one_query import attend_once
from tests.model.attention_kernels.reference import dense_attention, error, operands

pytestmark = pytest.mark.usefixtures("native_kernel")

# B, H, Hkv, S, D, Dv: less than a chunk of keys, chunks with a last one that is short or empty for a row; odd widths.
SHAPES = [
    (1, 2, 2, 1, 64, 64),
    (2, 4, 2, 37, 20, 12),
    (1, 6, 1, 1300, 64, 64),
    (2, 3, 3, 515, 5, 3),
    (1, 2, 2, 1024, 72, 72),
]
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 0.004}
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


def given(shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    """q, and k and v as they lie in a cache that has room for more."""
    B, H, Hkv, S, D, Dv = shape
    q, k, v, _ = operands(B, H, Hkv, 1, S, D, Dv, dtype=dtype)
    room = [x.new_full((B, Hkv, S + 9, x.shape[3]), torch.nan) for x in (k, v)]
    for wide, x in zip(room, (k, v)):
        wide[:, :, 4 : S + 4] = x.detach()
    return [q.detach(), *(wide[:, :, 4 : S + 4] for wide in room)]


def attend(q: Tensor, k: Tensor, v: Tensor, **settings: Any) -> tuple[Tensor, Tensor] | None:
    with torch.no_grad():
        return attend_once(
            q, k, v, **{"scale": 0.3, "causal": True, "bias": None, "lengths": None, "kernel": "auto"} | settings
        )


def compare(found: tuple[Tensor, Tensor] | None, operands: list[Tensor], **settings: Any) -> None:
    assert found is not None
    out, lse = dense_attention(*(x.double() for x in operands), scale=0.3, causal=False, **settings)
    assert found[0].dtype == operands[0].dtype
    assert found[0].shape == out.shape
    assert error(found[0], out) < TOLERANCE[operands[0].dtype]
    assert found[1].dtype == torch.float32
    assert error(found[1], lse) < 1e-6


@dtypes
@shapes
def test_equals_dense_attention(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = given(shape, dtype)
    compare(attend(*x), x)


@dtypes
@pytest.mark.parametrize("tail", [None, 30, 0])
@shapes
def test_with_a_bias_of_the_distance(shape: tuple[int, ...], tail: int | None, dtype: torch.dtype) -> None:
    x = given(shape, dtype)
    H, S = shape[1], shape[3]
    values = torch.randn(H, S if tail is None else min(tail, S - 1) + 1, generator=torch.Generator().manual_seed(3))
    distances = (S - 1 - torch.arange(S)).clamp(max=values.shape[1] - 1)
    bias = values[:, distances].double()[:, None]  # (H,1,S)
    compare(attend(*x, bias=Toeplitz(values, 0, None if tail is None else values.shape[1] - 1)), x, bias=bias)


@shapes
def test_with_a_bias_of_each_row_and_key_that_heads_share(shape: tuple[int, ...]) -> None:
    x = given(shape, torch.float32)
    table = torch.randn(shape[0], 1, 1, shape[3], generator=torch.Generator().manual_seed(3))

    def rows(tile: Tile, table: Tensor) -> Tensor:
        return table[tile.batch, :, :, tile.keys]

    compare(attend(*x, bias=BlockBias(rows, (table,))), x, bias=table.double())


@pytest.mark.parametrize("lengths", [(515, 512), (1, 513), (100, 600)])
def test_padding_is_not_seen(lengths: tuple[int, int]) -> None:
    x = given(SHAPES[3], torch.float32)
    x[1][0, :, lengths[0] :] = torch.nan
    x[2][0, :, lengths[0] :] = torch.nan
    found = attend(*x, causal=False, lengths=torch.tensor(lengths, dtype=torch.int32))
    compare(found, [y.nan_to_num(0.0) for y in x], lengths=torch.tensor(lengths))


def test_keys_so_unlike_that_all_but_one_vanish() -> None:
    x = given(SHAPES[2], torch.float32)
    x[1][:, :, 700] = 1e4 * x[0].sum(1)
    compare(attend(*x), x)


@dtypes
def test_threads_change_no_bit(dtype: torch.dtype) -> None:
    x = given((2, 6, 2, 3000, 64, 64), dtype)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(attend(*x))
    finally:
        torch.set_num_threads(before)
    assert all(a is not None and found[0] is not None and torch.equal(a[0], found[0][0]) for a in found)


def test_what_is_something_else_is_left_to_others() -> None:
    x = given(SHAPES[1], torch.float32)
    assert attend(*x) is not None
    assert attend(*x, kernel="torch") is None
    assert attend(*(y.double() for y in x)) is None
    assert attend(x[0].repeat(1, 1, 2, 1), *x[1:]) is None
    assert (
        attend_once(*x, scale=1.0, causal=True, bias=None, lengths=None, kernel="auto") is None
    )  # a gradient is wanted
