"""Induction: rows against the definition in words, the one right answer, and what can be reached without any order."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from ctxlab.data.tasks.base import DoesNotFit, TokenRow, generator
from ctxlab.data.tasks.induction import Induction
from ctxlab.data.windows import IGNORED


def induction(**settings: Any) -> Induction:
    return Induction(Induction.Config(**settings))


def parts(row: TokenRow) -> tuple[int, int]:
    """Lengths of prefix and period: the first scored place is the period's second beginning."""
    tokens = row.tokens.tolist()
    first = int(np.flatnonzero(row.targets != IGNORED)[0])
    period = first - tokens.index(tokens[first])
    return first - period, period


SHAPES = [
    (64, 16, 31, 64),
    (64, 16, 31, 32),
    (64, 16, 31, 33),
    (8, 2, 7, 4),
    (8, 2, 3, 40),
    (100, 50, 60, 500),
    (33, 32, 32, 70),
]


@pytest.mark.parametrize(("vocab_size", "shortest", "longest", "length"), SHAPES)
def test_a_prefix_then_a_period_again_and_again(vocab_size: int, shortest: int, longest: int, length: int) -> None:
    task = induction(vocab_size=vocab_size, shortest=shortest, longest=longest)
    for seed in range(100):
        row = task.row(generator(seed), length, None)
        tokens, targets = row.tokens.tolist(), row.targets.tolist()
        prefix, period = parts(row)
        assert len(tokens) == len(targets) == length
        assert all(0 <= token < vocab_size for token in tokens)
        assert shortest <= period <= min(longest, length // 2)
        assert 0 <= prefix <= min(longest, length - 2 * period)
        repeated = tokens[prefix : prefix + period]
        assert len(set(repeated)) == period
        assert not set(repeated) & set(tokens[:prefix])
        assert tokens[prefix:] == [repeated[n % period] for n in range(length - prefix)]
        second = prefix + period
        assert targets == [IGNORED] * second + [repeated[(n + 1) % period] for n in range(length - second)]


def test_every_period_and_every_prefix_comes_up() -> None:
    task = induction(vocab_size=12, shortest=3, longest=6)
    for length, periods in ((12, {3, 4, 5, 6}), (8, {3, 4})):
        found = Counter(parts(task.row(generator(seed), length, None)) for seed in range(1500))
        assert {period for _, period in found} == periods
        for period in periods:
            assert {n for n, p in found if p == period} == set(range(min(length - 2 * period, 6) + 1))


def test_an_answer_follows_the_same_token_everywhere_before() -> None:
    """One right answer: whatever came behind earlier occurrences of a token is the same, and it is the label."""
    task = induction(vocab_size=20, shortest=3, longest=8)
    for seed in range(100):
        row = task.row(generator(seed), 60, None)
        tokens = row.tokens.tolist()
        for place in np.flatnonzero(row.targets != IGNORED).tolist():
            before = {tokens[n + 1] for n in range(place) if tokens[n] == tokens[place]}
            assert before == {int(row.targets[place])}


@pytest.mark.parametrize(("shortest", "longest", "length"), [(2, 2, 4), (16, 31, 32), (5, 9, 10)])
def test_it_takes_two_of_the_shortest_periods(shortest: int, longest: int, length: int) -> None:
    task = induction(shortest=shortest, longest=longest)
    assert parts(task.row(generator(1), length, None)) == (0, shortest)
    for short in (1, length - 1):
        with pytest.raises(
            DoesNotFit, match=rf"induction does not fit in {short} tokens.*at least {length}$"
        ) as refused:
            task.row(generator(1), short, None)
        assert refused.value.smallest == length


@pytest.mark.parametrize(("shortest", "longest"), [(9, 8), (16, 64), (64, 64)])
def test_the_longest_period_leaves_a_token_for_the_prefix(shortest: int, longest: int) -> None:
    with pytest.raises(
        ValidationError, match=rf"shortest \({shortest}\), longest \({longest}\) and vocab_size \(64\) must"
    ):
        Induction.Config(shortest=shortest, longest=longest)


def counting(row: TokenRow) -> float:
    """The expected share of right answers of one that is told the period's tokens, and counts: it says any of those that
    have come least often, other than the one that has just come.
    """
    tokens = row.tokens.tolist()
    prefix, period = parts(row)
    repeated = set(tokens[prefix : prefix + period])
    hits = []
    for place in np.flatnonzero(row.targets != IGNORED).tolist():
        counts = Counter(tokens[: place + 1])
        open_to = repeated - {tokens[place]}
        least = min(counts[token] for token in open_to)
        candidates = {token for token in open_to if counts[token] == least}
        assert int(row.targets[place]) in candidates
        hits.append(1 / len(candidates))
    return float(np.mean(hits))


def test_chance_is_what_counting_reaches_by_hand() -> None:
    # one period of 4 and no room for a prefix: behind its tokens 3, 2, 1 are left, and then 3 that may begin again
    assert induction(shortest=4, longest=4).guess(8) == pytest.approx((1 / 3 + 1 / 2 + 1 + 1 / 3) / 4, abs=1e-15)
    # 9 tokens: no prefix and five places, or a prefix of one and four
    five = (1 / 3 + 1 / 2 + 1 + 1 / 3 + 1 / 3) / 5
    four = (1 / 3 + 1 / 2 + 1 + 1 / 3) / 4
    assert induction(shortest=4, longest=4).guess(9) == pytest.approx((five + four) / 2, abs=1e-15)
    harmonic = sum(Fraction(1, n) for n in range(1, 16))
    whole = float((harmonic + Fraction(1, 15)) / 16)
    assert induction(shortest=16, longest=16).guess(32) == pytest.approx(whole, abs=1e-15)
    assert whole == pytest.approx(0.2116, abs=1e-4), "three times 1/16, for a model without any order"


@pytest.mark.parametrize(("shortest", "longest", "length"), [(16, 31, 64), (3, 6, 40)])
def test_chance_is_the_mean_of_what_counting_reaches(shortest: int, longest: int, length: int) -> None:
    task = induction(shortest=shortest, longest=longest)
    reached = [counting(task.row(generator("chance", seed), length, None)) for seed in range(600)]
    error = np.std(reached) / np.sqrt(len(reached))
    assert task.guess(length) == pytest.approx(np.mean(reached), abs=4 * error)


def test_looking_back_by_any_fixed_distance_is_far_from_right() -> None:
    """Periods differ, so no constant offset is right more often than its own period comes up."""
    task = induction()
    right: Counter[int] = Counter()
    labelled = 0
    for seed in range(300):
        row = task.row(generator("offset", seed), 64, None)
        for place in np.flatnonzero(row.targets != IGNORED).tolist():
            labelled += 1
            for back in range(place):
                right[back] += int(row.tokens[place - back] == row.targets[place])
    assert max(right.values()) / labelled < 0.2
