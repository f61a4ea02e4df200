"""Blockwise attention equals dense attention: values, log-sum-exps and every gradient, with tiles of any size."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from ctxlab.model.attention import blockwise
from ctxlab.model.attention.bias import BlockBias, Tile, Toeplitz
from ctxlab.model.attention.blockwise import blockwise_attention
from ctxlab.model.attention.visible import Chunk, Visible, Window
from tests.model.attention_kernels.reference import dense_attention, error, operands, positions

TINY = (3, 5)


def toeplitz_values(H: int, T: int, S: int, causal: bool, seed: int = 1) -> tuple[torch.Tensor, int]:
    first = 0 if causal else 1 - T
    values = torch.randn(H, S - first, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return values.requires_grad_(), first


@pytest.mark.parametrize("lengths", [None, (0, 9), (13, 4)])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("T", "S"), [(1, 13), (7, 13), (13, 13), (11, 17)])
@pytest.mark.parametrize("Hkv", [4, 2, 1])
def test_equals_dense_attention(
    Hkv: int, T: int, S: int, causal: bool, biased: bool, lengths: tuple[int, int] | None
) -> None:
    q, k, v, grad = operands(2, 4, Hkv, T, S, 5, 3)
    keys = None if lengths is None else torch.tensor(lengths)
    bias, table, leaves = None, None, [q, k, v]
    if biased:
        values, first = toeplitz_values(4, T, S, causal)
        bias, leaves = Toeplitz(values, first), [q, k, v, values]
        i, j = positions(T, S)
        table = values[:, (i - j - first).clamp(min=0)]
    out, lse = blockwise_attention(q, k, v, scale=0.3, causal=causal, bias=bias, lengths=keys, blocks=TINY)
    expected, expected_lse = dense_attention(q, k, v, scale=0.3, causal=causal, bias=table, lengths=keys)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-12, atol=1e-12)
    for found, wanted in zip(torch.autograd.grad(out, leaves, grad), torch.autograd.grad(expected, leaves, grad)):
        torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("causal", [False, True])
def test_gradcheck(causal: bool) -> None:
    q, k, v, _ = operands(2, 4, 2, 4, 7, 3, 2)
    values, first = toeplitz_values(4, 4, 7, causal)

    def function(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        bias = Toeplitz(values, first)
        return blockwise_attention(q, k, v, scale=0.7, causal=causal, bias=bias, blocks=TINY)[0]

    assert torch.autograd.gradcheck(function, (q, k, v, values))


@pytest.mark.parametrize("blocks", [(1, 1), (3, 5), (5, 3), (32, 4), (4, 32), (512, 512)])
def test_tile_sizes_do_not_change_the_result(blocks: tuple[int, int]) -> None:
    q, k, v, grad = operands(1, 2, 2, 19, 23, 4, 4)
    values, _ = toeplitz_values(2, 19, 23, True)
    results = []
    for size in (blocks, TINY):
        out, lse = blockwise_attention(q, k, v, scale=0.5, causal=True, bias=Toeplitz(values, 0), blocks=size)
        results.append([out, lse, *torch.autograd.grad(out, [q, k, v, values], grad)])
    for one, other in zip(*results):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("limit", [1, 40, 200])
def test_splitting_heads_and_rows_over_tiles_does_not_change_the_result(
    limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    q, k, v, grad = operands(3, 6, 3, 7, 9, 4, 4)
    values, _ = toeplitz_values(6, 7, 9, True)
    results = []
    for scores in (limit, 2**20):
        monkeypatch.setattr("ctxlab.model.attention.blockwise.TILE_SCORES", scores)
        out, lse = blockwise_attention(q, k, v, scale=0.5, causal=True, bias=Toeplitz(values, 0), blocks=TINY)
        results.append([out, lse, *torch.autograd.grad(out, [q, k, v, values], grad)])
    for one, other in zip(*results):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("T", [1, 5, 700, 5000])
def test_where_launches_cost_few_queries_meet_the_more_keys(T: int) -> None:
    rows, columns = blockwise._blocks(torch.empty(1, 2, T, 8, device="meta"))
    assert min(T, rows) * columns <= blockwise.WIDE_SIDE**2 < min(T, rows) * (columns + 1)
    assert blockwise._blocks(torch.empty(1, 2, T, 8)) == (512, 512)


def test_on_tiles_of_another_device_the_result_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v, _ = operands(1, 4, 2, 130, 300, 8, 8)
    expected = blockwise_attention(q, k, v, scale=0.3, causal=True)
    monkeypatch.setattr(blockwise, "_blocks", lambda q, blocks=blockwise._blocks: blocks(q.to("meta")))
    found = blockwise_attention(q, k, v, scale=0.3, causal=True)
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_later_chunk_equals_rows_of_the_whole() -> None:
    q, k, v, _ = operands(1, 4, 2, 21, 21, 4, 4)
    values, _ = toeplitz_values(4, 21, 21, True)
    whole, lse = blockwise_attention(q, k, v, scale=0.5, causal=True, bias=Toeplitz(values, 0), blocks=TINY)
    chunk, chunk_lse = blockwise_attention(
        q[:, :, 15:], k, v, scale=0.5, causal=True, bias=Toeplitz(values, 0), blocks=TINY
    )
    torch.testing.assert_close(chunk, whole[:, :, 15:], rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(chunk_lse, lse[:, :, 15:], rtol=1e-13, atol=1e-13)


def test_a_row_without_keys_is_zero_and_has_no_gradient() -> None:
    q, k, v, grad = operands(2, 2, 2, 5, 5, 4, 4)
    values, _ = toeplitz_values(2, 5, 5, True)
    lengths = torch.tensor([0, 3])
    out, lse = blockwise_attention(
        q, k, v, scale=0.5, causal=True, bias=Toeplitz(values, 0), lengths=lengths, blocks=TINY
    )
    assert torch.equal(out[0], torch.zeros_like(out[0]))
    assert torch.equal(lse[0], torch.full_like(lse[0], -torch.inf))
    dq, dk, dv = torch.autograd.grad(out, [q, k, v], grad)
    assert not dq[0].any()
    assert not dk[0].any()
    assert not dv[0].any()
    assert not dk[1, :, 3:].any()  # padding
    assert not dv[1, :, 3:].any()


def test_the_future_has_no_influence_at_all() -> None:
    q, k, v, _ = operands(1, 2, 1, 11, 11, 4, 4, dtype=torch.float32)
    changed_k, changed_v = k.detach().clone(), v.detach().clone()
    changed_k[:, :, 7:] = 1e6
    changed_v[:, :, 7:] = 1e6
    before = blockwise_attention(q, k, v, scale=0.5, causal=True, blocks=(4, 4))
    after = blockwise_attention(q, changed_k, changed_v, scale=0.5, causal=True, blocks=(4, 4))
    for one, other in zip(before, after):
        assert torch.equal(one[:, :, :7], other[:, :, :7])


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("T", "S"), [(17, 17), (6, 17)])
@pytest.mark.parametrize("constant_from", [0, 1, 4, 16, 40])
def test_constant_tail_equals_all_values_written_out(constant_from: int, T: int, S: int, causal: bool) -> None:
    q, k, v, grad = operands(2, 4, 2, T, S, 4, 4)
    first = 0 if causal else 1 - T
    n = min(constant_from, S - 1) + 1 - first
    short = torch.randn(4, n, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).requires_grad_()
    gathered = short[:, (torch.arange(first, S) - first).clamp(max=n - 1)]
    leaves = [q, k, v, short]
    results = []
    tails = ((short, constant_from), (gathered, constant_from), (gathered, None))
    for bias in (Toeplitz(values, first, tail) for values, tail in tails):
        out, lse = blockwise_attention(q, k, v, scale=0.5, causal=causal, bias=bias, blocks=TINY)
        results.append([out, lse, *torch.autograd.grad(out, leaves, grad, retain_graph=True)])
    for other in results[:2]:
        for found, wanted in zip(other, results[2]):
            torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-11)


def seen(rule: Visible, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
    """Less than `size` apart; the same multiple of `size` at or below both, found by counting up the borders."""
    if isinstance(rule, Window):
        return (j < i + rule.size) & (i < j + rule.size)
    assert isinstance(rule, Chunk)
    borders = torch.arange(rule.size, 100, rule.size)
    return (i[..., None] >= borders).sum(-1) == (j[..., None] >= borders).sum(-1)


rules = pytest.mark.parametrize("rule", [kind(size) for kind in (Window, Chunk) for size in (1, 2, 3, 4, 5, 6, 9, 16)])


@rules
@pytest.mark.parametrize("blocks", [TINY, (5, 3), (4, 4)])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("T", "S"), [(17, 17), (6, 17)])
def test_windows_and_chunks_with_borders_anywhere_in_a_tile(
    T: int, S: int, causal: bool, blocks: tuple[int, int], rule: Visible
) -> None:
    q, k, v, grad = operands(1, 2, 1, T, S, 4, 4)
    i, j = positions(T, S)
    table = torch.zeros(T, S, dtype=torch.float64).masked_fill(~seen(rule, i, j), -torch.inf)
    out, lse = blockwise_attention(q, k, v, scale=0.5, causal=causal, visible=rule, blocks=blocks)
    expected, expected_lse = dense_attention(q, k, v, scale=0.5, causal=causal, bias=table)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-12, atol=1e-12)
    leaves = [q, k, v]
    for found, wanted in zip(torch.autograd.grad(out, leaves, grad), torch.autograd.grad(expected, leaves, grad)):
        torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-11)


@rules
def test_no_key_is_visited_that_no_query_sees(rule: Visible) -> None:
    """`low` and `high` are the ends of what any query from `first`, or up to `last`, sees; None hides nothing."""
    j = torch.arange(60)
    matrix = seen(rule, j[:, None], j)
    for at in range(20):
        assert rule.low(at) == int(matrix[at:].any(0).nonzero()[0])
        assert rule.high(at) == int(matrix[: at + 1].any(0).nonzero()[-1]) + 1
    for first, start in itertools.product(range(12), range(12)):
        tile = Tile(slice(0, 1), slice(0, 1), range(first + 3, first - 1, -1), slice(start, start + 5))
        part = matrix[first : first + 4, start : start + 5].flip(0)
        hidden = rule.hidden(tile, torch.device("cpu"))
        assert torch.equal(~hidden, part) if hidden is not None else part.all()
        assert hidden is None or not part.all()


def test_block_bias_of_a_network_with_absolute_positions() -> None:
    """A bias of i and j that no Toeplitz table can give, through two layers shared by all tiles (the shape of FIRE)."""
    q, k, v, grad = operands(2, 4, 2, 9, 14, 4, 4)
    generator = torch.Generator().manual_seed(3)
    weights = [torch.randn(s, dtype=torch.float64, generator=generator).requires_grad_() for s in ((6,), (4, 6), ())]

    def network(distance: torch.Tensor, i: torch.Tensor, *w: torch.Tensor) -> torch.Tensor:
        ratio = torch.log1p(distance.clamp(min=0) * w[2].abs()) / torch.log1p((i + 1.0) * w[2].abs())
        return (torch.relu(ratio[..., None] * w[0]) @ w[1].mT).movedim(-1, 0)  # (H,m,n)

    def tile_bias(tile: Tile, *w: torch.Tensor) -> torch.Tensor:
        i = torch.tensor(tile.queries, dtype=torch.float64)[:, None]
        return network(tile.distances(torch.device("cpu")), i, *w)[tile.heads]

    i, j = positions(9, 14)
    leaves = [q, k, v, *weights]
    bias = BlockBias(tile_bias, tuple(weights))
    out, lse = blockwise_attention(q, k, v, scale=0.5, causal=True, bias=bias, blocks=TINY)
    expected, expected_lse = dense_attention(q, k, v, scale=0.5, causal=True, bias=network(i - j, i.double(), *weights))
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-12, atol=1e-12)
    for found, wanted in zip(torch.autograd.grad(out, leaves, grad), torch.autograd.grad(expected, leaves, grad)):
        torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-11)


def test_block_bias_of_the_data_of_each_row() -> None:
    """c_i - c_j of running sums per batch row and head (the shape of FoX), beside a tensor without gradient."""
    q, k, v, grad = operands(3, 2, 2, 8, 8, 4, 4)
    sums = torch.randn(3, 2, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(4)).requires_grad_()
    order = torch.arange(8)

    def tile_bias(tile: Tile, sums: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
        mine = sums[tile.batch, tile.heads]
        return mine[..., order[list(tile.queries)], None] - mine[..., None, order[tile.keys]]

    lengths = torch.tensor([8, 3, 5])
    out, lse = blockwise_attention(
        q, k, v, scale=0.5, causal=True, bias=BlockBias(tile_bias, (sums, order)), lengths=lengths, blocks=TINY
    )
    table = sums[..., :, None] - sums[..., None, :]
    expected, expected_lse = dense_attention(q, k, v, scale=0.5, causal=True, bias=table, lengths=lengths)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-12, atol=1e-12)
    leaves = [q, k, v, sums]
    for found, wanted in zip(torch.autograd.grad(out, leaves, grad), torch.autograd.grad(expected, leaves, grad)):
        torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-11)


def test_a_fixed_bias_takes_no_gradient() -> None:
    q, k, v, grad = operands(1, 2, 2, 8, 8, 4, 4)
    values = toeplitz_values(2, 8, 8, True)[0].detach()
    i, j = positions(8, 8)
    out, _ = blockwise_attention(q, k, v, scale=0.5, causal=True, bias=Toeplitz(values, 0), blocks=TINY)
    table = values[:, (i - j).clamp(min=0)]
    expected, _ = dense_attention(q, k, v, scale=0.5, causal=True, bias=table)
    for found, wanted in zip(torch.autograd.grad(out, [q, k, v], grad), torch.autograd.grad(expected, [q, k, v], grad)):
        torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("spread", [1.0, 6.0])
def test_bf16_error_against_float64(spread: float) -> None:
    """Also with large scores, which bf16 alone would round by several per cent of the weight: they are kept in fp32."""
    q, k, v, grad = operands(1, 2, 1, 700, 700, 64, 64, dtype=torch.bfloat16)
    q = (q.detach() * spread).requires_grad_()
    values = torch.randn(2, 129, generator=torch.Generator().manual_seed(5)).requires_grad_()
    out, lse = blockwise_attention(q, k, v, scale=0.125, causal=True, bias=Toeplitz(values, 0, 128))
    exact = [x.detach().double().requires_grad_() for x in (q, k, v, values)]
    i, j = positions(700, 700)
    table = exact[3][:, (i - j).clamp(0, 128)]
    expected, expected_lse = dense_attention(*exact[:3], scale=0.125, causal=True, bias=table)
    assert out.dtype == torch.bfloat16
    assert lse.dtype == torch.float32
    assert error(out, expected) < 0.003
    torch.testing.assert_close(lse, expected_lse.float(), rtol=1e-5, atol=1e-5)
    found = torch.autograd.grad(out, [q, k, v, values], grad)
    for one, other in zip(found, torch.autograd.grad(expected, exact, grad.double())):
        assert error(one, other) < 0.0125


def test_fp32_error_against_float64() -> None:
    q, k, v, grad = operands(1, 2, 2, 300, 300, 16, 16, dtype=torch.float32)
    values = torch.randn(2, 300, generator=torch.Generator().manual_seed(5)).requires_grad_()
    out, _ = blockwise_attention(q, k, v, scale=0.25, causal=True, bias=Toeplitz(values, 0), blocks=(128, 64))
    exact = [x.detach().double().requires_grad_() for x in (q, k, v, values)]
    i, j = positions(300, 300)
    expected, _ = dense_attention(*exact[:3], scale=0.25, causal=True, bias=exact[3][:, (i - j).clamp(min=0)])
    assert error(out, expected) < 1e-6
    found = torch.autograd.grad(out, [q, k, v, values], grad)
    for one, other in zip(found, torch.autograd.grad(expected, exact, grad.double())):
        assert error(one, other) < 2e-6


def test_same_inputs_give_the_same_bits() -> None:
    q, k, v, grad = operands(2, 4, 2, 130, 130, 16, 16, dtype=torch.bfloat16)
    values = torch.randn(4, 130).requires_grad_()
    runs = []
    for _ in range(2):
        out, lse = blockwise_attention(q, k, v, scale=0.25, causal=True, bias=Toeplitz(values, 0), blocks=(64, 32))
        runs.append([out, lse, *torch.autograd.grad(out, [q, k, v, values], grad)])
    assert all(torch.equal(one, other) for one, other in zip(*runs))


def test_autocast_computes_as_torch_does_and_only_the_operands() -> None:
    """Operands go to bf16, sums and the bias stay fp32: the same bits as with bf16 operands outside autocast."""
    q, k, v, grad = operands(1, 2, 2, 40, 40, 8, 8, dtype=torch.float32)
    values = torch.randn(2, 40).requires_grad_()
    low = [x.detach().bfloat16().requires_grad_() for x in (q, k, v)]
    bias = Toeplitz(values, 0)
    expected, expected_lse = blockwise_attention(*low, scale=0.3, causal=True, bias=bias, blocks=(16, 16))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, lse = blockwise_attention(q, k, v.bfloat16(), scale=0.3, causal=True, bias=bias, blocks=(16, 16))
        found = torch.autograd.grad(out, [q, k, v, values], grad.bfloat16())
    assert torch.equal(out, expected)
    assert torch.equal(lse, expected_lse)
    for one, other in zip(found, torch.autograd.grad(expected, [*low, values], grad.bfloat16())):
        assert torch.equal(one, other.to(one.dtype))


def test_precision_setting_of_torch_is_left_as_it_was() -> None:
    q, k, v, grad = operands(1, 2, 2, 8, 8, 8, 8, dtype=torch.bfloat16)
    matmul = torch.backends.mkldnn.matmul
    before = matmul.fp32_precision
    try:
        for setting in ("ieee", "tf32"):
            matmul.fp32_precision = setting
            out, _ = blockwise_attention(q, k, v, scale=0.3, causal=True)
            torch.autograd.grad(out, [q, k, v], grad)
            assert matmul.fp32_precision == setting
    finally:
        matmul.fp32_precision = before


def test_lse_by_hand() -> None:
    """Two keys, scores 0 and ln 3 by the bias alone: weights 1/4 and 3/4, lse ln 4."""
    q, k = torch.zeros(1, 1, 2, 4), torch.zeros(1, 1, 2, 4)
    v = torch.tensor([[[[8.0], [0.0]]]])
    bias = Toeplitz(torch.tensor([[0.0, math.log(3.0)]]), 0)
    out, lse = blockwise_attention(q, k, v, scale=1.0, causal=True, bias=bias)
    torch.testing.assert_close(out.flatten(), torch.tensor([8.0, 6.0]))
    torch.testing.assert_close(lse.flatten(), torch.tensor([0.0, math.log(4.0)]))
    assert not lse.requires_grad


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((1, 2, 3, 4), (1, 2, 3, 5), (1, 2, 3, 4)), "shapes do not fit"),
        (((1, 2, 3, 4), (1, 2, 3, 4), (1, 2, 4, 4)), "shapes do not fit"),
        (((1, 3, 3, 4), (1, 2, 3, 4), (1, 2, 3, 4)), "shapes do not fit"),
        (((2, 2, 3, 4), (1, 2, 3, 4), (1, 2, 3, 4)), "shapes do not fit"),
        (((1, 2, 4, 4), (1, 2, 3, 4), (1, 2, 3, 4)), r"more queries than keys \(4 > 3\)"),
    ],
)
def test_refuses_shapes_that_do_not_fit(shapes: tuple[tuple[int, ...], ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        blockwise_attention(*(torch.zeros(shape) for shape in shapes), scale=1.0, causal=True)


def test_refuses_mixed_dtypes_and_lengths_of_another_batch() -> None:
    x = torch.zeros(2, 1, 3, 4)
    with pytest.raises(ValueError, match="differ in dtype"):
        blockwise_attention(x, x, x.double(), scale=1.0, causal=True)
    with pytest.raises(ValueError, match="not one number for each of 2 rows"):
        blockwise_attention(x, x, x, scale=1.0, causal=True, lengths=torch.tensor([3]))


@pytest.mark.parametrize(
    ("n", "first", "tail", "causal", "needed"),
    [
        (2, 0, None, True, "0 to 2"),
        (5, 1, None, True, "0 to 2"),
        (3, 0, None, False, "-2 to 2"),
        (1, 0, 1, True, "0 to 1"),
    ],
)
def test_refuses_values_that_do_not_cover_every_distance(
    n: int, first: int, tail: int | None, causal: bool, needed: str
) -> None:
    x = torch.zeros(1, 1, 3, 4)
    with pytest.raises(ValueError, match=f"values cover distances {first} to {first + n - 1}; needed: {needed}"):
        blockwise_attention(x, x, x, scale=1.0, causal=causal, bias=Toeplitz(torch.zeros(1, n), first, tail))


def test_tile_distances() -> None:
    tile = Tile(slice(0, 1), slice(0, 1), range(6, 3, -1), slice(2, 5))
    assert tile.distances(torch.device("cpu")).tolist() == [[6 - j for j in (2, 3, 4)], [3, 2, 1], [2, 1, 0]]
    assert tile.nearest == 0
