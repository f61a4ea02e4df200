"""Matrices made orthogonal, against singular value decompositions in float64; the function of two poles, proven the nearest."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ctxlab.train.optim.orthogonal import Orthogonal, by_inverses, by_products, orthogonalized
from ctxlab.train.optim.sign import nearest_to_one

LOW, LEVEL = 1e-3, 0.9
SIGN = nearest_to_one(LOW, poles=2)


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
        "large": 1e6 * torch.randn(1, 12, 20).double(),
        "small": 1e-4 * torch.randn(1, 12, 20).double(),
        "zero": torch.zeros(1, 5, 7).double(),
    }


MATRICES = matrices()


def by_decomposition(x: Tensor) -> tuple[Tensor, Tensor]:
    """0.9 U f(S / z) V^T, z^4 = sum S^4, and S / z."""
    u, s, vt = torch.linalg.svd(x, full_matrices=False)
    seen = s / s.pow(4).sum(-1, keepdim=True).pow(0.25).clamp(min=1e-7)
    moved = torch.tensor([[SIGN(value) for value in row] for row in seen.tolist()], dtype=torch.float64)
    return LEVEL * u * moved[:, None] @ vt, seen


@pytest.mark.parametrize("kind", MATRICES)
def test_singular_values_are_moved_and_singular_vectors_are_not(kind: str) -> None:
    x = MATRICES[kind]
    torch.testing.assert_close(orthogonalized(x, torch.float64), by_decomposition(x)[0], rtol=0, atol=1e-10)


@pytest.mark.parametrize("kind", MATRICES)
def test_fp32_is_good_to_half_a_hundredth_in_every_direction(kind: str) -> None:
    """Spectral norms: of any unit vector, through the condition of 1e16 that the product of the worst with itself has."""
    x = MATRICES[kind]
    expected, seen = by_decomposition(x)
    found = orthogonalized(x.float(), torch.float32).double()
    assert torch.linalg.matrix_norm(found - expected, ord=2).max() < 5e-3
    values = torch.linalg.svdvals(found)  # descending, as `seen`; f is not monotonous, so sets are compared
    n_within = int((seen >= LOW).sum())
    assert int(((values > LEVEL * 0.79) & (values < LEVEL * 1.21)).sum()) >= n_within
    assert values.max() < LEVEL * 1.21


def test_one_matrix_that_is_no_number_spoils_no_other() -> None:
    x = torch.randn(3, 6, 10)
    alone = by_inverses(x[2:])
    x[0, 0, 0], x[1, 2, 3] = math.nan, math.inf
    found = by_inverses(x)
    assert not found[0].isfinite().any()
    assert not found[1].isfinite().all()
    torch.testing.assert_close(found[2:], alone)


def test_a_step_under_autocast_is_the_same_to_the_last_bit() -> None:
    torch.manual_seed(0)
    start, gradient = torch.randn(8, 12), torch.randn(8, 12)
    ends = []
    for enabled in (False, True):
        weight = nn.Parameter(start.clone())
        weight.grad = gradient.clone()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            Orthogonal([{"params": [weight]}], lr=0.1, weight_decay=0.1, momentum=0.9).step()
        ends.append(weight.detach())
    assert torch.equal(*ends)


def test_products_do_what_they_say() -> None:
    """0.68 - 1.21 from 0.0016 on, 0.9 on average; what inverses make is less uneven, 0.72 - 1.08, from 0.001 on."""
    values = np.logspace(math.log10(0.0016), 0, 20_001)
    moved = values.copy()
    for _ in range(5):
        moved = 3.4445 * moved - 4.7750 * moved**3 + 2.0315 * moved**5
    assert 0.68 < moved.min() < 0.69
    assert 1.20 < moved.max() < 1.21
    assert moved.mean() == pytest.approx(LEVEL, abs=0.02)
    assert LEVEL * SIGN(LOW) == pytest.approx(0.718, abs=5e-4)
    assert LEVEL * SIGN(1.0) == pytest.approx(1.082, abs=5e-4)
    x = with_singular_values([0.9, 0.3, 0.01], 5)
    u, s, vt = torch.linalg.svd(x, full_matrices=False)
    s = s / s.norm()
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    torch.testing.assert_close(by_products(x), u * s[:, None] @ vt, rtol=0, atol=1e-10)


@pytest.mark.parametrize("low", [0.3, 1e-2, 1e-3, 1e-5])
@pytest.mark.parametrize("poles", [1, 2, 3, 4])
def test_no_function_of_so_many_poles_is_nearer_to_one(poles: int, low: float) -> None:
    """It has 2r + 1 numbers to choose and errs 2r + 2 times by the same amount with alternating signs, from `low` to 1: were
    another nearer, their difference would change its sign 2r + 1 times, and its numerator has no such degree (Chebyshev)."""
    f = nearest_to_one(low, poles)
    assert f.constant > 0
    assert all(number > 0 for number in (*f.residues, *f.shifts))
    x = np.logspace(math.log10(low), 0, 20_001)
    x[0], x[-1] = low, 1.0
    error = np.asarray(f(x)) - 1  # type: ignore[arg-type]
    turns = np.flatnonzero(np.diff(np.sign(np.diff(error)))) + 1
    extremes = error[np.concatenate([[0], turns, [len(x) - 1]])]
    assert len(extremes) == 2 * poles + 2
    most = abs(error).max()
    np.testing.assert_allclose(extremes, most * (-1.0) ** np.arange(1, 2 * poles + 3), rtol=1e-6)


@pytest.mark.parametrize("low", [0.1, 1e-2, 1e-4])
def test_one_pole_is_the_weighted_halley_iteration(low: float) -> None:
    """x (a + b x^2) / (1 + c x^2) with 1 as its largest value, by the closed form of Nakatsukasa, Bai and Gygi 2010 (SIAM
    J. Matrix Anal. Appl. 31(5), eq. 3.17 and 3.18), which has no elliptic function in it."""
    d = (4 * (1 - low**2) / low**4) ** (1 / 3)
    a = math.sqrt(1 + d) + math.sqrt(8 - 4 * d + 8 * (2 - low**2) / (low**2 * math.sqrt(1 + d))) / 2
    b = (a - 1) ** 2 / 4
    c = a + b - 1
    f = nearest_to_one(low, 1)
    assert f.shifts[0] == pytest.approx(1 / c, rel=1e-9)
    for x in (low, 3 * low, 0.5, 1.0):
        assert f(x) / f(1.0) == pytest.approx(x * (a + b * x * x) / (1 + c * x * x), rel=1e-9)
