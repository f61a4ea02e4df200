"""Every text task: an oracle that sees the prompt alone solves each example, and none is longer than asked for."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import pytest

from ctxlab.data.source import SOURCES
from ctxlab.data.tasks.base import DoesNotFit, Example, Part, TextTask, Tools, generator, held_out
from tests.data.tasks.tools import text_tasks, tools

NAMES = text_tasks()
KINDS = ("byte", "unigram")
SETTINGS: dict[str, list[dict[str, Any]]] = {
    "task/needle": [{"needles": 4}, {"digits": 9}],
    "task/passkey": [{"digits": 3}],
}


def make(name: str, **settings: Any) -> TextTask:
    kind = SOURCES.get(name)
    assert issubclass(kind, TextTask)
    return kind(kind.Config(name=name, **settings))


def checked(task: TextTask, key: Any, length: int, given: Tools, depth: float | None = None) -> Example:
    """An example, solved and counted."""
    example = task.example(generator(key), length, given, depth=depth)
    assert given.count(example.prompt) + task.new_tokens <= length
    assert task.score(task.solve(example.prompt), example.answers) == 1.0
    assert task.score(task.completion(example), example.answers) == 1.0
    assert len(set(example.answers)) == len(example.answers) > 0
    return example


@pytest.mark.parametrize("part", ["train", "validation", "test"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_every_example_is_solved_and_fits(name: str, kind: str, part: Part) -> None:
    given = tools(kind, part)
    for task in [make(name), *(make(name, **settings) for settings in SETTINGS.get(name, []))]:
        smallest = task.smallest(given)
        for length in sorted({smallest, smallest + 1, *(n for n in (128, 300, 1000, 2048, 8192) if n > smallest)}):
            for seed in range(6):
                checked(task, (part, seed), length, given)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_below_the_smallest_length_it_does_not_fit(name: str, kind: str) -> None:
    task, given = make(name), tools(kind)
    smallest = task.smallest(given)
    for length in (1, smallest // 2, smallest - 1):
        with pytest.raises(DoesNotFit, match=f"{name} does not fit in {length} tokens.*at least {smallest}") as refused:
            task.example(generator(1), length, given)
        assert refused.value.smallest == smallest


@pytest.mark.parametrize("name", NAMES)
def test_the_same_key_makes_the_same_example_and_another_makes_another(name: str) -> None:
    task, given = make(name), tools("unigram")
    length = task.smallest(given) + 400
    assert task.example(generator(1), length, given) == make(name).example(generator(1), length, given)
    assert task.example(generator(1), length, given) != task.example(generator(2), length, given)


DEEP = [name for name in NAMES if name in ("task/needle", "task/passkey")]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", DEEP)
def test_the_answer_stands_as_deep_as_asked(name: str, kind: str) -> None:
    task, given = make(name), tools(kind)
    for depth in (0.0, 0.25, 0.5, 0.75, 1.0):
        for seed in range(8):
            example = checked(task, seed, 8192, given, depth)
            assert example.depth == pytest.approx(depth, abs=0.0 if depth in (0.0, 1.0) else 0.03)
            answer = example.prompt.index(example.answers[0]) / len(example.prompt)
            assert answer == pytest.approx(depth, abs=0.08)
    depths = [task.example(generator(seed), 2048, given).depth for seed in range(60)]
    assert min(depths) < 0.1 < 0.9 < max(depths)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", DEEP)
def test_an_example_comes_within_a_sentence_of_its_length(name: str, kind: str) -> None:
    task, given = make(name), tools(kind)
    longest = 64 if kind == "byte" else 32  # tokens of the longest line of the corpus, and of the five sentences
    for length in range(300, 8192, 501):
        for seed in range(4):
            example = checked(task, (length, seed), length, given)
            assert given.count(example.prompt) + task.new_tokens > length - longest


@pytest.mark.parametrize("name", DEEP)
def test_no_answer_of_an_evaluation_is_trained_on(name: str) -> None:
    task = make(name)
    asked: dict[Part, set[str]] = {}
    for part in ("train", "validation", "test"):
        examples = [task.example(generator(part, seed), 700, tools("byte", part)) for seed in range(200)]
        asked[part] = {answer for example in examples for answer in example.answers}
        assert {held_out(answer) for answer in asked[part]} == {part != "train"}
    assert not asked["train"] & (asked["validation"] | asked["test"])


@pytest.mark.parametrize("name", DEEP)
def test_what_occurs_in_the_training_text_is_not_asked(name: str) -> None:
    task = make(name)
    open_to_all = [task.example(generator(seed), 700, tools("byte")).answers for seed in range(100)]
    taken = {answer for answers in open_to_all[:50] for answer in answers}
    left = [task.example(generator(seed), 700, tools("byte", taken=taken)).answers for seed in range(100)]
    assert not taken & {answer for answers in left for answer in answers}
    assert [a for a, b in zip(open_to_all, left) if a == b and not taken & set(b)]  # the others are as they were


GOLDEN = {
    "task/needle": "6a57bef539e7f0e6",
    "task/passkey": "8a3dfe547b11af5a",
}


@pytest.mark.parametrize("name", NAMES)
def test_the_examples_are_those_of_before(name: str) -> None:
    """A change here makes other data of every recorded seed: it has to be meant."""
    task, given = make(name), tools("byte")
    example = task.example(generator("golden", name), task.smallest(given) + 2000, given)
    text = json.dumps([example.prompt, example.answers])
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == GOLDEN[name]
