"""FIRE's piecewise bias in tiles against its network, pair by pair, where a tile's rows reach knots at different distances."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from ctxlab.model.attention.blockwise import blockwise_attention
from ctxlab.model.position.fire import PiecewiseLinear


@pytest.mark.parametrize("blocks", [(4, 4), (16, 4), (32, 32)])
@pytest.mark.parametrize("T", [40, 33])
def test_equals_its_definition_where_normalizers_differ_within_a_tile(T: int, blocks: tuple[int, int]) -> None:
    """Queries whose normalizers grow a hundredfold along the rows, and knots everywhere."""
    S, H, K = 40, 2, 50
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, H, n, 8, dtype=torch.float64, requires_grad=True) for n in (T, S, S))
    psi = torch.log1p(torch.arange(S, dtype=torch.float64)).requires_grad_()
    normalizer = torch.logspace(0, 2, T, dtype=torch.float64).requires_grad_()
    coefficients = torch.randn(H, 2 + K, dtype=torch.float64, requires_grad=True)
    knots = torch.linspace(0.01, 3, K, dtype=torch.float64).requires_grad_()
    inputs = (q, k, v, psi, normalizer, coefficients, knots)

    i, j = torch.arange(S - T, S)[:, None], torch.arange(S)[None, :]
    u = psi[(i - j).clamp(min=0)] / normalizer[:, None]  # (T,S)
    hinges = F.relu(u[..., None] - knots)  # (T,S,K)
    straight = coefficients[:, 0, None, None] + coefficients[:, 1, None, None] * u
    bias = straight + torch.einsum("tsk,hk->hts", hinges, coefficients[:, 2:])
    scores = (q @ k.mT * 0.3 + bias).masked_fill(j > i, -torch.inf)
    expected = scores.softmax(-1) @ v

    piecewise = PiecewiseLinear(psi, normalizer, coefficients, knots)
    found, lse = blockwise_attention(q, k, v, scale=0.3, causal=True, bias=piecewise, blocks=blocks)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)
    torch.testing.assert_close(lse, scores.logsumexp(-1), atol=1e-12, rtol=0)
    upstream = torch.randn_like(expected)
    ours, theirs = (torch.autograd.grad(x, inputs, upstream) for x in (found, expected))
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=0)
