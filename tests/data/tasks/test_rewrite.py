"""Copy, reverse, repeat: by hand, and what a row of any length is."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from ctxlab.data.source import SOURCES
from ctxlab.data.tasks.base import DoesNotFit, generator
from ctxlab.data.tasks.rewrite import Rewrite
from ctxlab.data.windows import IGNORED

NAMES = ("task/copy", "task/reverse", "task/repeat")
N = IGNORED


def rewrite(name: str, **settings: Any) -> Rewrite:
    kind = SOURCES.get(name)
    assert issubclass(kind, Rewrite)
    return kind(kind.Config(name=name, **settings))


def written(name: str, symbols: list[int]) -> list[int]:
    return symbols[::-1] if name == "task/reverse" else symbols


@pytest.mark.parametrize(
    ("name", "prompt", "answer"),
    [
        ("task/copy", [3, 1, 1, 7], [3, 1, 1, 7, 9]),
        ("task/reverse", [3, 1, 1, 7], [7, 1, 1, 3, 9]),
        ("task/repeat", [5, 5, 5], [5, 5, 5, 9]),
        ("task/copy", [2], [2, 9]),
    ],
)
def test_by_hand(name: str, prompt: list[int], answer: list[int]) -> None:
    """Symbols 0 to 7, separator 8, end 9; the oracle sees the prompt and the separator, or all that is read."""
    task = rewrite(name, symbols=8)
    assert task.vocab_size == 10
    assert task.solve([*prompt, 8]) == [N] * len(prompt) + answer
    assert task.solve([*prompt, 8, *answer[:-1]]) == [N] * len(prompt) + answer


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("length", [3, 4, 5, 20, 21, 64])
def test_an_evaluation_is_as_long_as_fits_and_training_any_length_up_to_that(name: str, length: int) -> None:
    task, longest = rewrite(name, symbols=6), (length - 1) // 2
    for epoch, numbers in ((None, {longest}), (0, set(range(1, longest + 1))), (7, set(range(1, longest + 1)))):
        found = set()
        for seed in range(400 if epoch == 0 else 20):
            row = task.row(generator(seed), length, epoch)
            tokens, targets = row.tokens.tolist(), row.targets.tolist()
            n = tokens.index(6)
            found.add(n)
            answer = written(name, tokens[:n])
            assert all(0 <= token < 6 for token in tokens[:n])
            assert tokens == [*tokens[:n], 6, *answer]
            assert targets == [IGNORED] * n + [*answer, 7]
            assert len(tokens) == 2 * n + 1 <= length
        assert found == numbers if epoch != 7 else found <= numbers


@pytest.mark.parametrize("name", NAMES)
def test_one_symbol_takes_three_tokens(name: str) -> None:
    for length in (1, 2):
        with pytest.raises(DoesNotFit, match=rf"does not fit in {length} tokens.*at least 3$"):
            rewrite(name).row(generator(1), length, None)


def test_symbols_are_drawn_alike_and_those_of_repeat_are_one() -> None:
    copies = np.concatenate(
        [rewrite("task/copy", symbols=5).row(generator(s), 41, None).tokens[:20] for s in range(100)]
    )
    counts = np.bincount(copies)
    assert len(counts) == 5
    assert ((counts - 400) ** 2 / 400).sum() < 18.47, "99.9% of chi-square with 4 degrees of freedom"
    repeats = [
        set(rewrite("task/repeat", symbols=5).row(generator(s), 41, None).tokens[:20].tolist()) for s in range(100)
    ]
    assert all(len(symbols) == 1 for symbols in repeats)
    assert set().union(*repeats) == {0, 1, 2, 3, 4}


@pytest.mark.parametrize(
    ("name", "length", "chance"),
    [
        ("task/copy", 7, 1 / 8**3), ("task/copy", 8, 1 / 8**3), ("task/reverse", 5, 1 / 64), ("task/repeat", 7, 1 / 3),
        ("task/repeat", 41, 1 / 20), ("task/copy", 4001, 0.0),
    ],
)  # fmt: skip
def test_chance_by_hand(name: str, length: int, chance: float) -> None:
    assert rewrite(name, symbols=8).guess(length) == pytest.approx(chance, rel=1e-12)
