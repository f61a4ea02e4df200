"""Attention over parts of the keys, merged, is attention over all of them."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ctxlab.model.attention.blockwise import blockwise_attention
from ctxlab.model.attention.fused import fused_attention
from ctxlab.model.attention.merge import merge
from tests.model.attention_kernels.reference import dense_attention, operands


@settings(max_examples=30, deadline=None)
@given(cuts=st.lists(st.integers(0, 23), max_size=5), seed=st.integers(0, 1000))
def test_parts_cut_anywhere_equal_the_whole(cuts: list[int], seed: int) -> None:
    """Empty parts among them."""
    q, k, v, _ = operands(2, 4, 2, 6, 23, 8, 8, seed=seed)
    edges = [0, *sorted(cuts), 23]
    parts = []
    for start, stop in itertools.pairwise(edges):
        if start == stop:
            parts.append((torch.zeros_like(q), torch.full(q.shape[:3], -torch.inf)))
        else:
            parts.append(dense_attention(q, k[:, :, start:stop], v[:, :, start:stop], scale=0.4, causal=False))
    out, lse = merge(parts)
    expected, expected_lse = dense_attention(q, k, v, scale=0.4, causal=False)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-12, atol=1e-12, check_dtype=False)


def test_past_and_causal_square_equal_attention_to_both() -> None:
    """How a cache is continued: past keys all seen, new ones causally; the kernels' own log-sum-exps."""
    q, k, v, _ = operands(1, 4, 2, 9, 30, 8, 8, dtype=torch.float32)
    past = fused_attention(q, k[:, :, :21], v[:, :, :21], scale=0.4, causal=False)
    new = blockwise_attention(q, k[:, :, 21:], v[:, :, 21:], scale=0.4, causal=True, blocks=(4, 4))
    out, lse = merge([past, new])
    expected, expected_lse = fused_attention(q, k, v, scale=0.4, causal=True)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-5, atol=1e-6)


def test_by_hand() -> None:
    """Weights 1 and 3 of 4."""
    one, other = torch.tensor([[[[8.0]]]]), torch.tensor([[[[4.0]]]])
    out, lse = merge([(one, torch.zeros(1, 1, 1)), (other, torch.full((1, 1, 1), math.log(3.0)))])
    torch.testing.assert_close(out, torch.tensor([[[[5.0]]]]))
    torch.testing.assert_close(lse, torch.full((1, 1, 1), math.log(4.0)))


def test_one_part_is_the_whole() -> None:
    out, lse = torch.randn(1, 2, 3, 4), torch.randn(1, 2, 3)
    found, found_lse = merge([(out, lse)])
    assert torch.equal(found, out)
    assert torch.equal(found_lse, lse)


def test_no_keys_anywhere_is_zero() -> None:
    nothing = (torch.zeros(1, 1, 2, 3), torch.full((1, 1, 2), -torch.inf))
    out, lse = merge([nothing, nothing])
    assert torch.equal(out, torch.zeros(1, 1, 2, 3))
    assert torch.equal(lse, nothing[1])


def test_large_log_sum_exps_do_not_overflow() -> None:
    parts = [(torch.full((1, 1, 1, 1), value), torch.full((1, 1, 1), 1000.0)) for value in (1.0, 3.0)]
    out, lse = merge(parts)
    torch.testing.assert_close(out, torch.full((1, 1, 1, 1), 2.0))
    torch.testing.assert_close(lse, torch.full((1, 1, 1), 1000.0 + math.log(2.0)))


def test_gradients_reach_the_outs_by_their_weights() -> None:
    one, other = (torch.ones(1, 1, 1, 2, requires_grad=True) for _ in range(2))
    out, _ = merge([(one, torch.zeros(1, 1, 1)), (other, torch.full((1, 1, 1), math.log(3.0)))])
    first, second = torch.autograd.grad(out.sum(), [one, other])
    torch.testing.assert_close(first, torch.full((1, 1, 1, 2), 0.25))
    torch.testing.assert_close(second, torch.full((1, 1, 1, 2), 0.75))


def test_keeps_the_dtype_of_the_outs() -> None:
    part = (torch.ones(1, 1, 2, 3, dtype=torch.bfloat16), torch.zeros(1, 1, 2))
    out, lse = merge([part, part])
    assert out.dtype == torch.bfloat16
    assert lse.dtype == torch.float32


def test_refuses_no_parts() -> None:
    with pytest.raises(ValueError, match="at least one"):
        merge([])
