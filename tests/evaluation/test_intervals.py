"""Intervals against printed tables, hand computation and coverage."""

from __future__ import annotations

import math
import random

import pytest

from ctxlab.evaluation.intervals import paired_interval, ratio_interval, student_t_cdf, student_t_quantile


@pytest.mark.parametrize(
    ("df", "expected"),  # two-sided 95% critical values as printed in any t table
    [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (7, 2.365), (10, 2.228), (30, 2.042), (120, 1.980)],
)
def test_quantile_matches_printed_table(df: int, expected: float) -> None:
    assert student_t_quantile(0.975, df) == pytest.approx(expected, abs=5e-4)


def test_cdf_is_cauchy_at_one_degree_of_freedom() -> None:
    for t in (-3.0, -0.5, 0.0, 0.7, 10.0):
        assert student_t_cdf(t, 1) == pytest.approx(0.5 + math.atan(t) / math.pi, abs=1e-14)


def test_equal_denominators_give_the_t_interval_of_the_mean() -> None:
    values = [1.0, 2.0, 4.0, 3.0]
    low, high = ratio_interval(values, [1.0] * 4) or (math.nan, math.nan)
    # mean 2.5, sample standard deviation sqrt(5/3), standard error half of it, t(0.975, 3) = 3.18245
    half = 3.182446305 * math.sqrt(5 / 3) / 2
    assert low == pytest.approx(2.5 - half, abs=1e-8)
    assert high == pytest.approx(2.5 + half, abs=1e-8)


def test_one_document_has_no_interval() -> None:
    assert ratio_interval([3.0], [2.0]) is None


def test_pairing_removes_what_documents_share() -> None:
    difficulty = [5.0, 1.0, 9.0, 3.0]
    low, high = paired_interval([d + 1.0 for d in difficulty], difficulty, [10.0] * 4) or (math.nan, math.nan)
    assert low == pytest.approx(0.1, abs=1e-12)
    assert high == pytest.approx(0.1, abs=1e-12)


def test_coverage_is_about_95_percent() -> None:
    draw = random.Random(0)
    hits = 0
    for _ in range(2000):
        sizes = [draw.uniform(50, 150) for _ in range(8)]
        sums = [2.0 * m + draw.gauss(0, 10) for m in sizes]
        low, high = ratio_interval(sums, sizes) or (math.nan, math.nan)
        hits += low <= 2.0 <= high
    assert 0.93 <= hits / 2000 <= 0.97
