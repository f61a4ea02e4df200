"""95% intervals over documents: documents are the independent draws of a corpus, tokens are not."""

from __future__ import annotations

import math
from collections.abc import Sequence


def student_t_cdf(t: float, df: int) -> float:
    """P(T <= t) for a whole number of degrees of freedom, by its finite series (Abramowitz and Stegun 26.7.3 and 4)."""
    theta = math.atan2(abs(t), math.sqrt(df))
    sine, cosine = math.sin(theta), math.cos(theta)
    if df % 2:
        term, total = cosine, cosine if df > 1 else 0.0
        for k in range(3, df - 1, 2):
            term *= cosine * cosine * (k - 1) / k
            total += term
        inside = 2 / math.pi * (theta + sine * total)
    else:
        term = total = 1.0
        for k in range(2, df - 1, 2):
            term *= cosine * cosine * (k - 1) / k
            total += term
        inside = sine * total
    return 0.5 + math.copysign(inside / 2, t)


def student_t_quantile(p: float, df: int) -> float:
    """t with P(T <= t) = p, for p in [0.5, 1), by bisection."""
    low, high = 0.0, 1.0
    while student_t_cdf(high, df) < p:
        high *= 2
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if student_t_cdf(middle, df) < p else (low, middle)
    return (low + high) / 2


def ratio_interval(numerators: Sequence[float], denominators: Sequence[float]) -> tuple[float, float] | None:
    """The 95% interval of R = sum(n_d) / sum(m_d) over documents d, by the ratio estimator.

    With m the mean denominator and K documents, se(R)^2 = sum (n_d - R m_d)^2 / (K (K - 1) m^2) (Cochran 1977,
    Sampling Techniques, eq. 6.13 without the finite-population factor), and the bounds are R -+ t(0.975, K - 1) se.
    None for fewer than two documents: one document has no spread.
    """
    count = len(numerators)
    if count < 2:
        return None
    mean = sum(denominators) / count
    ratio = sum(numerators) / sum(denominators)
    residual = sum((n - ratio * m) ** 2 for n, m in zip(numerators, denominators, strict=True))
    half = student_t_quantile(0.975, count - 1) * math.sqrt(residual / (count * (count - 1))) / mean
    return ratio - half, ratio + half


def paired_interval(
    first: Sequence[float], second: Sequence[float], denominators: Sequence[float]
) -> tuple[float, float] | None:
    """The 95% interval of the difference of two ratios over the same documents: documents' own levels cancel."""
    return ratio_interval([a - b for a, b in zip(first, second, strict=True)], denominators)
