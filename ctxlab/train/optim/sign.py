"""The odd rational function that is nearest to 1 between a small number and 1: Zolotarev's, as a sum of simple poles.

Of a symmetric matrix, or of singular values, a sum of poles is a sum of inverses.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from math import prod


@dataclass(frozen=True)
class OddRational:
    """f(x) = x (constant + sum_j residues_j / (x^2 + shifts_j)), all numbers positive."""

    constant: float
    residues: tuple[float, ...]
    shifts: tuple[float, ...]

    def __call__(self, x: float) -> float:
        return x * (self.constant + sum(a / (x * x + s) for a, s in zip(self.residues, self.shifts, strict=True)))


def nearest_to_one(low: float, poles: int) -> OddRational:
    """The f of `poles` = r terms for which max |f(x) - 1| over [low, 1] is least; 0 < low < 1.

    f(x) = M x prod_{j=1..r} (x^2 + c_2j) / (x^2 + c_2j-1), c_i = low^2 tan^2 am(i K / (2r + 1)), with the amplitude am and
    the quarter period K of modulus sqrt(1 - low^2) (Zolotarev 1877; Nakatsukasa and Freund 2016, SIAM Review 58(3), section 3).
    It swings 2r + 2 times between its least and its largest value, at low first and at 1 last; M puts 1 half-way.
    """
    c = [(low * math.tan(angle)) ** 2 for angle in _amplitudes(low, 2 * poles + 1)]
    shifts, zeros = c[0::2], c[1::2]

    def product(x: float) -> float:
        return x * prod((x * x + zero) / (x * x + shift) for zero, shift in zip(zeros, shifts, strict=True))

    constant = 2 / (product(low) + product(1.0))
    residues = (
        constant * prod(zero - shift for zero in zeros) / prod(other - shift for other in shifts if other != shift)
        for shift in shifts
    )
    return OddRational(constant, tuple(residues), tuple(shifts))


def _amplitudes(low: float, n: int) -> list[float]:
    """am(i K / n) for i = 1 .. n - 1, of modulus sqrt(1 - low^2), by the arithmetic-geometric mean (Abramowitz and Stegun
    1964, 16.4): from a, b = 1, low down to a = b, where the amplitude is (pi / 2) (i / n) doubled each time, and back up."""
    a, b, ratios = 1.0, low, []
    while a - b > 1e-15:
        ratios.append((a - b) / (a + b))
        a, b = (a + b) / 2, math.sqrt(a * b)
    found = []
    for i in range(1, n):
        angle = 2 ** len(ratios) * math.pi / 2 * i / n
        for ratio in reversed(ratios):
            angle = (angle + math.asin(ratio * math.sin(angle))) / 2
        found.append(angle)
    return found
