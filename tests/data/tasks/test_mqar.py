"""MQAR's layout and its odds, against the definition in words."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from ctxlab.data.tasks.base import DoesNotFit, TokenRow, generator
from ctxlab.data.tasks.mqar import MQAR
from ctxlab.data.windows import IGNORED


def mqar(**settings: Any) -> MQAR:
    return MQAR(MQAR.Config(**settings))


def read(row: TokenRow, pairs: int) -> tuple[dict[int, int], dict[int, int]]:
    """The pairs in the order in which they stand, and place -> key of what is asked."""
    tokens, targets = row.tokens.tolist(), row.targets.tolist()
    told = dict(zip(tokens[0 : 2 * pairs : 2], tokens[1 : 2 * pairs : 2], strict=True))
    asked = {place: token for place, token in enumerate(tokens) if place >= 2 * pairs and token}
    assert {place for place, target in enumerate(targets) if target != IGNORED} == asked.keys()
    assert all(targets[place] == told[key] for place, key in asked.items())
    return told, asked


@pytest.mark.parametrize(("vocab_size", "pairs"), [(8, 3), (9, 3), (128, 16), (1000, 5)])
@pytest.mark.parametrize("room", [0, 1, 2, 37])
def test_pairs_then_every_key_once_at_places_two_apart(vocab_size: int, pairs: int, room: int) -> None:
    task, length, half = mqar(vocab_size=vocab_size, pairs=(pairs,)), 4 * pairs + room, vocab_size // 2
    for seed in range(50):
        row = task.row(generator(seed), length, None)
        assert row.tokens.shape == row.targets.shape == (length,)
        told, asked = read(row, pairs)
        assert len(told) == len(set(told.values())) == pairs
        assert all(1 <= key < half for key in told)
        assert all(half <= value < vocab_size for value in told.values())
        assert sorted(asked.values()) == sorted(told)
        assert all((place - 2 * pairs) % 2 == 0 for place in asked)
        assert not {*row.tokens[2 * pairs :].tolist()} & {*told.values()}, "what comes later shows no answer"


def test_every_key_every_value_and_every_place_comes_up() -> None:
    task = mqar(vocab_size=11, pairs=(2,), power=1.0)  # keys 1 to 4, values 5 to 10, places 4, 6 and 8
    rows = [read(task.row(generator(seed), 10, None), 2) for seed in range(300)]
    assert {key for told, _ in rows for key in told} == {1, 2, 3, 4}
    assert {value for told, _ in rows for value in told.values()} == {5, 6, 7, 8, 9, 10}
    assert {place for _, asked in rows for place in asked} == {4, 6, 8}


@pytest.mark.parametrize("power", [0.01, 0.5, 1.0])
def test_gaps_are_drawn_one_after_the_other_by_their_power_law(power: float) -> None:
    """Which gap each pair gets, in the order of drawing: p(g1) p(g2 | not g1), by chi-square at 0.1%."""
    places, draws = 5, 2500
    random = generator("gaps")
    task = mqar(vocab_size=8, pairs=(2,), power=power)
    counts: Counter[tuple[int, ...]] = Counter()
    for _ in range(draws):
        told, asked = read(task.row(random, 4 + 2 * places, None), 2)
        gap_of = {key: (place - 4) // 2 + 1 for place, key in asked.items()}
        counts[tuple(gap_of[key] for key in told)] += 1
    odds = {g: power * g ** (power - 1) for g in range(1, places + 1)}
    total = sum(odds.values())
    expected = {
        (g, h): draws * odds[g] / total * odds[h] / (total - odds[g]) for g, h in itertools.permutations(odds, 2)
    }
    assert math.isclose(sum(expected.values()), draws)
    chi_square = sum((counts[gaps] - n) ** 2 / n for gaps, n in expected.items())
    assert chi_square < 43.82, "99.9% of chi-square with 19 degrees of freedom"


def test_epochs_bring_more_pairs_and_evaluation_the_most() -> None:
    task = mqar(vocab_size=16, pairs=(1, 3, 2))
    for epoch, pairs in ((0, 1), (1, 3), (2, 2), (3, 2), (1000, 2), (None, 2)):
        told, _ = read(task.row(generator(1), 12, epoch), pairs)
        assert len(told) == pairs
    assert task.guess(12) == task.guess(999) == 1 / 2


@pytest.mark.parametrize("pairs", [1, 2, 16])
def test_it_takes_four_tokens_a_pair(pairs: int) -> None:
    task = mqar(pairs=(pairs,))
    for length in (1, 4 * pairs - 1):
        with pytest.raises(
            DoesNotFit, match=rf"mqar does not fit in {length} tokens.*at least {4 * pairs}$"
        ) as refused:
            task.row(generator(1), length, None)
        assert refused.value.smallest == 4 * pairs
    told, asked = read(task.row(generator(1), 4 * pairs, None), pairs)
    assert sorted(asked) == list(range(2 * pairs, 4 * pairs, 2)), "every place is taken"
    assert len(told) == pairs


def test_the_earlier_epochs_may_fit_where_the_last_does_not() -> None:
    task = mqar(pairs=(2, 16))
    read(task.row(generator(1), 8, 0), 2)
    with pytest.raises(DoesNotFit, match="at least 64"):
        task.row(generator(1), 8, 1)


@pytest.mark.parametrize(("vocab_size", "most"), [(8, 3), (9, 3), (10, 4), (128, 63), (129, 63)])
def test_there_are_as_many_keys_as_pairs(vocab_size: int, most: int) -> None:
    row = mqar(vocab_size=vocab_size, pairs=(most,)).row(generator(1), 4 * most, None)
    assert sorted(read(row, most)[0]) == list(range(1, most + 1))
    with pytest.raises(
        ValidationError, match=rf"pairs \({most + 1}\) must be at most {most}, the keys of vocab_size {vocab_size}"
    ):
        MQAR.Config(vocab_size=vocab_size, pairs=(1, most + 1, 1))


def test_the_oracle_reads_pairs_and_nothing_else() -> None:
    task = mqar(vocab_size=8, pairs=(2,))
    assert task.solve([1, 6, 3, 4, 0, 0, 3, 0, 1, 0, 2]) == [IGNORED] * 6 + [4, IGNORED, 6, IGNORED, IGNORED]
    # a key that was never told has no answer, and what is asked is not taken for a pair
    assert task.solve(np.array([1, 6, 2, 0, 1]).tolist()) == [IGNORED] * 4 + [6]
