"""Attention in bf16 at lengths that no trained context here has, against the naive reference in float64."""

from __future__ import annotations

import pytest

from tests.conformance.test_positions import BF16_ERROR, BF16_ERRORS, NAMES, errors_in_bf16, scheme

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("length", [32_768, 131_072])
@pytest.mark.parametrize("name", NAMES)
def test_bf16_far_out_is_as_exact_as_near(name: str, length: int) -> None:
    """One head of 64; rows at the start, around the borders of tiles and at the end."""
    made = scheme(name, head_dim=64, n_heads=1, context=length)
    if made.n_positions is not None and made.n_positions < length:
        pytest.skip(f"{name} has {made.n_positions} positions")
    error, lse_error = errors_in_bf16(made, length, [0, 1, 511, 512, length // 2, length - 513, length - 2, length - 1])
    largest, largest_lse = BF16_ERRORS.get(name, BF16_ERROR)
    assert error < largest
    assert lse_error < largest_lse
