"""Numbers as people read them."""

from __future__ import annotations

import pytest

from ctxlab.units import format_operations


@pytest.mark.parametrize(
    ("n", "text"),
    [
        (0, "0 FLOP"),
        (999.4, "999 FLOP"),
        (999.6, "1 kFLOP"),
        (95.5e9, "95.5 GFLOP"),
        (38.2e12, "38.2 TFLOP"),
        (1.97e15, "1.97 PFLOP"),
        (2.5e21, "2.5e+03 EFLOP"),
    ],
)
def test_operations(n: float, text: str) -> None:
    assert format_operations(n) == text
