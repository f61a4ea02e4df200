"""Every task in numbers: the oracle is right at every labelled place, lengths hold, and a row is a function of its key."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import numpy as np
import pytest

from ctxlab.data.source import SOURCES
from ctxlab.data.tasks.base import Part, TokenRow, TokenTask, generator
from ctxlab.data.tasks.dataset import TaskDataset, prepare_task
from ctxlab.data.tokenizers.ids import Ids
from ctxlab.data.windows import IGNORED, Row

NAMES = [name for name in SOURCES.names() if issubclass(SOURCES.get(name), TokenTask)]
SETTINGS: dict[str, list[dict[str, Any]]] = {
    "task/mqar": [{"pairs": (1,)}, {"pairs": (2, 3), "vocab_size": 9, "power": 1.0}],
    "task/induction": [{"vocab_size": 5, "shortest": 2, "longest": 4}],
    "task/copy": [{"symbols": 2}],
}
LENGTHS = (4, 5, 8, 16, 31, 32, 64, 65, 128, 200, 333, 512)


def make(name: str, **settings: Any) -> TokenTask:
    kind = SOURCES.get(name)
    assert issubclass(kind, TokenTask)
    return kind(kind.Config(name=name, **settings))


def smallest(task: TokenTask) -> int:
    """The least length that it takes, by trying."""
    for length in range(1, 100):
        try:
            task.row(generator(1), length, None)
        except Exception:
            continue
        return length
    raise AssertionError(task.config.name)


def alike(one: TokenRow | Row, other: TokenRow | Row) -> bool:
    return np.array_equal(one.tokens, other.tokens) and np.array_equal(one.targets, other.targets)


@pytest.mark.parametrize("name", NAMES)
def test_the_oracle_is_right_at_every_labelled_place_and_no_row_is_too_long(name: str) -> None:
    for task in [make(name), *(make(name, **settings) for settings in SETTINGS.get(name, []))]:
        least = smallest(task)
        for length in sorted({least, least + 1, *(n for n in LENGTHS if n > least)}):
            for epoch in (0, None):
                row = task.row(generator(length, epoch), length, epoch)
                assert row.tokens.dtype == row.targets.dtype == np.int64
                assert 0 < len(row.tokens) == len(row.targets) <= length
                labelled = np.flatnonzero(row.targets != IGNORED)
                assert len(labelled) > 0
                assert {*row.tokens.tolist(), *row.targets[labelled].tolist()} <= set(range(task.vocab_size))
                answers = task.solve(row.tokens.tolist())
                assert len(answers) == len(row.tokens)
                assert [answers[place] for place in labelled] == row.targets[labelled].tolist()


@pytest.mark.parametrize("name", NAMES)
def test_the_oracle_needs_nothing_behind_the_place(name: str) -> None:
    """An answer says the same when everything behind its question is cut off."""
    task = make(name)
    row = task.row(generator(1), 64, None)
    whole = task.solve(row.tokens.tolist())
    for place in np.flatnonzero(row.targets != IGNORED).tolist():
        assert task.solve(row.tokens[: place + 1].tolist())[place] == whole[place]


def dataset(name: str, **settings: Any) -> TaskDataset:
    kind = SOURCES.get(name)
    return prepare_task(kind.Config(name=name, **settings), Ids.Config())


@pytest.mark.parametrize("name", NAMES)
def test_a_row_is_a_function_of_its_key(name: str) -> None:
    one, again = dataset(name), dataset(name)
    keys: list[tuple[Part, int, tuple[int, ...], int | None]] = [
        ("train", 64, (1, 0, 0), 0), ("train", 64, (1, 1, 0), 0), ("train", 64, (1, 0, 1), 1), ("train", 64, (2, 0, 0), 0),
        ("validation", 64, (0,), None), ("validation", 64, (1,), None), ("test", 64, (0,), None), ("test", 64, (1,), None),
    ]  # fmt: skip
    rows = [one.row(*key) for key in keys]
    for key, row in reversed(list(zip(keys, rows, strict=True))):
        assert alike(again.row(*key), row), key
    same = [(a, b) for a in range(len(rows)) for b in range(a) if alike(rows[a], rows[b])]
    assert len(same) <= (1 if name == "task/repeat" else 0), "a symbol and a number are soon drawn twice"


@pytest.mark.parametrize("name", NAMES)
def test_the_seed_moves_training_and_not_the_examples_of_an_evaluation(name: str) -> None:
    data = dataset(name)
    rows = {seed: [data.rows(64, seed=seed).row(index, 0) for index in range(8)] for seed in (1, 2)}
    assert not all(alike(a, b) for a, b in zip(rows[1], rows[2], strict=True))
    assert sum(alike(a, b) for a, b in zip(rows[1], rows[2], strict=True)) < 4
    held = [data.row(part, 64, (index,), None) for part in ("validation", "test") for index in range(8)]  # type: ignore[arg-type]
    if name != "task/repeat":  # of which there are 32 of a length
        assert not any(alike(a, b) for a in held for b in [*rows[1], *rows[2]])
        assert not any(alike(held[a], held[b]) for a in range(16) for b in range(a))


# Of rows as they were when their runs were recorded.
GOLDEN = {
    "task/copy": "08ee15cb2242c2a2",
    "task/induction": "6a76eb1e7debed11",
    "task/listops": "fcdf4875cf00a786",
    "task/mqar": "8f787f9773ef9cc4",
    "task/repeat": "6059266da89345a0",
    "task/reverse": "d9283c686a55121e",
}


@pytest.mark.parametrize("name", NAMES)
def test_the_examples_are_those_of_before(name: str) -> None:
    """A change here makes other data of every recorded seed: it has to be meant."""
    data = dataset(name)
    rows = [
        data.row("train", 64, (1, 7, 2), 2),
        data.row("validation", 64, (3,), None),
        data.row("test", 96, (3,), None),
    ]
    text = json.dumps([[row.tokens.tolist(), row.targets.tolist()] for row in rows])
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == GOLDEN[name]
