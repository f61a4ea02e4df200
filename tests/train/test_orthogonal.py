"""Matrices made orthogonal, against the polynomial of singular values that a decomposition in float64 gives."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ctxlab.train.optim.orthogonal import Orthogonal, gram_is_cheaper, orthogonalized


def with_singular_values(values: Any, columns: int) -> Tensor:
    """A float64 matrix (1, n, columns) of n given singular values."""
    n = len(values)
    left, right = (torch.linalg.qr(torch.randn(size, n, dtype=torch.float64))[0] for size in (n, columns))
    return ((left * torch.as_tensor(values, dtype=torch.float64)) @ right.mT)[None]


def matrices() -> dict[str, Tensor]:
    """What gradients are, and worse."""
    torch.manual_seed(0)
    return {
        "noise": torch.randn(2, 24, 56).double(),
        "tall": torch.randn(2, 40, 8).double(),
        "square": torch.randn(1, 32, 32).double(),
        "one row": torch.randn(1, 1, 9).double(),
        "ill-conditioned": with_singular_values(np.logspace(0, -8, 40), 90),
        "rank of 3": torch.randn(1, 30, 3).double() @ torch.randn(1, 3, 50).double(),
        "rank of 1": torch.ones(1, 30, 50).double(),
        "nearly rank of 1": (torch.rand(1, 1, 50) + 1e-4 * torch.randn(1, 30, 50)).double(),
        "rows of all sizes": torch.randn(1, 30, 50).double() * torch.logspace(0, -9, 30)[:, None],
        "zero": torch.zeros(1, 5, 9).double(),
    }


MATRICES = matrices()


def by_decomposition(x: Tensor) -> Tensor:
    """U p(S / |S|) V^T, p five times 3.4445 s - 4.7750 s^3 + 2.0315 s^5."""
    u, s, vt = torch.linalg.svd(x, full_matrices=False)
    s = s / s.norm(dim=-1, keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return u * s[:, None] @ vt


def test_both_ways_are_tried() -> None:
    ways = {kind: gram_is_cheaper(*sorted(x.shape[1:]), torch.float32) for kind, x in MATRICES.items()}
    assert set(ways.values()) == {True, False}
    assert ways["ill-conditioned"]
    assert not ways["square"]


@pytest.mark.parametrize("kind", MATRICES)
def test_singular_values_are_moved_and_singular_vectors_are_not(kind: str) -> None:
    x = MATRICES[kind]
    torch.testing.assert_close(orthogonalized(x, torch.float64), by_decomposition(x), rtol=0, atol=1e-10)


@pytest.mark.parametrize("kind", MATRICES)
def test_fp32_is_good_to_half_a_hundredth_in_every_direction(kind: str) -> None:
    """Spectral norms: of any unit vector, through a condition of 1e16 of what is iterated on."""
    x = MATRICES[kind]
    found = orthogonalized(x.float(), torch.float32).double()
    assert torch.linalg.matrix_norm(found - by_decomposition(x), ord=2).max() < 5e-3


@pytest.mark.parametrize(
    ("rows", "columns", "directly", "gram"), [(1, 1, 15, 19), (2, 3, 160, 160), (512, 2048, 45, 25)]
)
def test_the_cheaper_way_is_that_of_fewer_multiplications(rows: int, columns: int, directly: int, gram: int) -> None:
    """Counted by hand; of 512 x 2048 in units of 512^3."""
    assert gram_is_cheaper(rows, columns, torch.float32) == (gram < directly)
    assert not gram_is_cheaper(rows, columns, torch.bfloat16)


def test_one_matrix_that_is_no_number_spoils_no_other() -> None:
    x = torch.randn(2, 6, 30)
    alone = orthogonalized(x[1:], torch.float32)
    x[0, 0, 0] = math.nan
    found = orthogonalized(x, torch.float32)
    assert not found[0].isfinite().any()
    torch.testing.assert_close(found[1:], alone)


def test_a_step_under_autocast_is_the_same_to_the_last_bit() -> None:
    torch.manual_seed(0)
    start, gradient = torch.randn(8, 32), torch.randn(8, 32)
    ends = []
    for enabled in (False, True):
        weight = nn.Parameter(start.clone())
        weight.grad = gradient.clone()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            Orthogonal([{"params": [weight]}], lr=0.1, weight_decay=0.1, momentum=0.9).step()
        ends.append(weight.detach())
    assert torch.equal(*ends)
