"""ListOps: a recursive evaluator of the printed expression, LRA's odds, and settings that cannot be met."""

from __future__ import annotations

import statistics
from collections import Counter
from typing import Any

import numpy as np
import pytest

from ctxlab.data.tasks.base import DoesNotFit, generator
from ctxlab.data.tasks.listops import ListOps
from ctxlab.data.windows import IGNORED
from ctxlab.errors import DataError

WORDS = [*map(str, range(10)), "[MIN", "[MAX", "[MED", "[SM", "]"]


def listops(**settings: Any) -> ListOps:
    return ListOps(ListOps.Config(**settings))


def printed(tokens: list[int]) -> str:
    return " ".join(WORDS[token] for token in tokens)


def value(text: str) -> int:
    """Evaluates an expression by splitting it into its arguments, each evaluated by itself."""
    operation, *words = text.split()
    if not words:
        return int(operation)
    assert words.pop() == "]"
    arguments, depth, current = [], 0, []
    for word in words:
        current.append(word)
        depth += word.startswith("[") - (word == "]")
        if depth == 0:
            arguments.append(value(" ".join(current)))
            current = []
    assert not current
    if operation == "[MED":
        return int(statistics.median(arguments))
    return {"[MIN": min, "[MAX": max, "[SM": lambda digits: sum(digits) % 10}[operation](arguments)


def ids(text: str) -> list[int]:
    return [WORDS.index(word) for word in text.split()]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[MAX 2 9 [MIN 4 7 ] 0 ]", 9),
        ("[MIN 2 9 [MAX 4 7 ] 3 ]", 2),
        ("[MED 1 2 ]", 1),  # 1.5, cut
        ("[MED 9 6 ]", 7),  # 7.5, cut
        ("[MED 5 1 9 ]", 5),
        ("[MED 1 2 8 9 ]", 5),
        ("[SM 9 9 9 ]", 7),
        ("[SM 5 5 ]", 0),
        ("[SM [SM 7 8 ] [MED 3 4 ] 1 ]", 9),
        ("[MIN [MAX 0 [SM 9 4 ] ] [MED 8 8 2 ] ]", 3),
    ],
)
def test_by_hand(text: str, expected: int) -> None:
    assert value(text) == expected
    assert listops().solve(ids(text)) == [IGNORED] * (len(text.split()) - 1) + [expected]


@pytest.mark.parametrize(
    ("settings", "length"),
    [({}, 4), ({}, 16), ({}, 257), ({}, 600), ({"depth": 3}, 40), ({"arguments": 2}, 30), ({"shortest": 0.9}, 24)],
)
def test_rows_are_expressions_of_the_length_with_their_value(settings: dict[str, Any], length: int) -> None:
    task = listops(**settings)
    random = generator("rows", length)
    for _ in range(12):
        row = task.row(random, length, None)
        tokens = row.tokens.tolist()
        assert max(4, int(task.config.shortest * length)) <= len(tokens) <= length
        assert row.targets.tolist() == [IGNORED] * (len(tokens) - 1) + [value(printed(tokens))]
        depth, deepest = 0, 0
        counts: list[int] = []
        for token in tokens:
            if counts and token != 14:
                counts[-1] += 1
            if 10 <= token < 14:
                depth += 1
                counts.append(0)
            elif token == 14:
                depth -= 1
                assert 2 <= counts.pop() <= task.config.arguments
            deepest = max(deepest, depth)
        assert depth == 0
        assert deepest < task.config.depth  # a digit stands one deeper


def test_nodes_have_lras_odds() -> None:
    """Free of the rule for lengths: an operation with probability 1/4, any of four, of 2 to 10 arguments alike."""
    task = listops(depth=3)
    random = generator("odds")
    draws, shapes, operations, arguments, digits = 6000, 0, Counter[int](), Counter[int](), Counter[int]()
    for _ in range(draws):
        tokens: list[int] = []
        assert task._grow(random, tokens, 2, 1000) is not None  # its arguments are digits: all in one level
        if len(tokens) == 1:
            digits[tokens[0]] += 1
            continue
        shapes += 1
        operations[tokens[0]] += 1
        arguments[len(tokens) - 2] += 1
        digits.update(tokens[1:-1])
    assert abs(shapes - draws / 4) < 3.3 * (draws * 3 / 16) ** 0.5
    for counts, kinds, limit in ((operations, 4, 16.27), (arguments, 9, 26.12), (digits, 10, 27.88)):
        expected = counts.total() / kinds
        assert len(counts) == kinds
        assert sum((n - expected) ** 2 / expected for n in counts.values()) < limit, "99.9% of chi-square"


def test_four_tokens_are_the_least() -> None:
    for length in (1, 3):
        with pytest.raises(DoesNotFit, match=rf"listops does not fit in {length} tokens.*at least 4$"):
            listops().row(generator(1), length, None)


def test_settings_that_cannot_be_met_end_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ctxlab.data.tasks.listops._TRIES", 500)
    with pytest.raises(DataError) as refused:
        listops(depth=2, arguments=2).row(generator(1), 64, None)
    assert str(refused.value) == (
        "listops: 500 drawn expressions of depth 2 and none with 16 to 64 tokens; raise data.depth or data.arguments"
    )


def test_chance_is_the_share_of_the_commonest_value() -> None:
    task = listops()
    random = generator("values")
    values = Counter(int(task.row(random, 12, None).targets[-1]) for _ in range(600))
    share = max(values.values()) / values.total()
    assert task.guess(12) == pytest.approx(share, abs=4 * np.sqrt(share * (1 - share) / 512))
    assert task.guess(12) == listops().guess(12)


def test_chance_takes_no_more_draws_than_an_example_may(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where examples of a length are rare, chance is of the few that are found, and not waited for."""
    grown: list[int] = []
    grow = ListOps._grow

    def counted(task: ListOps, random: np.random.Generator, tokens: list[int], depth: int, most: int) -> int | None:
        if depth == 1:
            grown.append(1)
        return grow(task, random, tokens, depth, most)

    monkeypatch.setattr(ListOps, "_grow", counted)
    monkeypatch.setattr("ctxlab.data.tasks.listops._TRIES", 3000)
    chance = listops(depth=3).guess(120)
    assert len(grown) == 3000
    assert 0.1 <= chance <= 1
