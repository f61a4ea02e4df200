"""Every text task: an oracle that sees the prompt alone solves each example, and none is longer than asked for."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from typing import Any

import pytest

from ctxlab.data.source import SOURCES
from ctxlab.data.tasks import words
from ctxlab.data.tasks.base import DoesNotFit, Example, Part, TextTask, Tools, generator, held_out
from ctxlab.data.tasks.ruler_niah import NEEDLE, NOISE
from ctxlab.data.tasks.values import costliest
from tests.data.builders import trained
from tests.data.tasks.tools import TEXTS, text_tasks, tools, write_hotpot, write_squad

NAMES = text_tasks()
QA = ("task/ruler/qa_1", "task/ruler/qa_2")
IN_TEXT = ("task/needle", *(name for name in NAMES if "niah" in name and name[-4:] not in ("le_1", "ey_2", "ey_3")))
DEEP = ("task/needle", "task/passkey", *(name for name in NAMES if "single" in name or "multikey" in name))
DRAWN = ("task/needle", "task/passkey", *(name for name in NAMES if "niah" in name))
KINDS = ("byte", "unigram")
SETTINGS: dict[str, list[dict[str, Any]]] = {
    "task/needle": [{"needles": 4}, {"needles": 12, "digits": 4}, {"digits": 9}],
    "task/passkey": [{"digits": 3}],
}
Make = Callable[..., TextTask]


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """A task by its name, with the file that it reads."""
    folder = tmp_path_factory.mktemp("questions")
    write_squad(folder / "qa_1.json")
    write_hotpot(folder / "qa_2.json")

    def task(name: str, **settings: Any) -> TextTask:
        kind = SOURCES.get(name)
        assert issubclass(kind, TextTask)
        if name in QA:
            settings |= {"path": str(folder / f"{name[-4:]}.json")}
        return kind(kind.Config(name=name, **settings))

    return task


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
def test_every_example_is_solved_and_fits(make: Make, name: str, kind: str, part: Part) -> None:
    given = tools(kind, part)
    for task in [make(name), *(make(name, **settings) for settings in SETTINGS.get(name, []))]:
        smallest = task.smallest(given)
        for length in sorted({smallest, smallest + 1, *(n for n in (128, 300, 1000, 2048, 8192) if n > smallest)}):
            for seed in range(3):
                checked(task, (part, seed), length, given)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*KINDS, "bpe"])
@pytest.mark.parametrize("name", NAMES)
def test_every_example_is_solved_and_fits_at_any_length(make: Make, name: str, kind: str) -> None:
    task, given = make(name), tools(kind)
    smallest = task.smallest(given)
    lengths = [*range(smallest, smallest + 40), *(smallest + int(1.3**n) for n in range(14, 36)), 40_000, 131_072]
    for length in lengths:
        for seed in range(20 if length < smallest + 40 else 3):
            checked(task, seed, length, given)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_below_the_smallest_length_it_does_not_fit(make: Make, name: str, kind: str) -> None:
    task, given = make(name), tools(kind)
    smallest = task.smallest(given)
    for length in (1, smallest // 2, smallest - 1):
        with pytest.raises(DoesNotFit, match=f"{name} does not fit in {length} tokens.*at least {smallest}") as refused:
            task.example(generator(1), length, given)
        assert refused.value.smallest == smallest


@pytest.mark.parametrize("name", NAMES)
def test_the_same_key_makes_the_same_example_and_another_makes_another(make: Make, name: str) -> None:
    task, given = make(name), tools("unigram")
    length = task.smallest(given) + 400
    assert task.example(generator(1), length, given) == make(name).example(generator(1), length, given)
    assert task.example(generator(1), length, given) != task.example(generator(2), length, given)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", DEEP)
def test_the_answer_stands_as_deep_as_asked(make: Make, name: str, kind: str) -> None:
    task, given = make(name), tools(kind)
    for depth in (0.0, 0.25, 0.5, 0.75, 1.0):
        for seed in range(4):
            example = checked(task, seed, 8192, given, depth)
            # at the ends other needles may stand before it or behind it
            assert example.depth == pytest.approx(
                depth, abs=0.0 if depth in (0.0, 1.0) and "key_1" not in name else 0.05
            )
            answer = example.prompt.index(f" {example.answers[0]}.") / len(example.prompt)
            assert answer == pytest.approx(depth, abs=0.1)
    depths = [task.example(generator(seed), 2048, given).depth or 0.0 for seed in range(60)]
    assert min(depths) < 0.1 < 0.9 < max(depths)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in DEEP])
def test_an_answer_in_several_places_has_no_depth(make: Make, name: str) -> None:
    task, given = make(name), tools("byte")
    assert task.example(generator(1), task.smallest(given) + 300, given, depth=0.5).depth is None


def unit(name: str, kind: str) -> float:
    """Tokens of the longest thing that the length of an example goes by."""
    count = trained(kind).count
    longest = max(count(line) for text in TEXTS for line in text.splitlines(keepends=True))
    if name in IN_TEXT:
        return longest + 8
    if name == "task/passkey":
        return count(" There and back again.")
    if name in QA:
        return 10 * longest  # a document
    word = costliest(words.everything(), count)
    return count({
        "cwe": f"123. {word} " * 3, "fwe": "abcdef " * 6, "vt": f"{NOISE}\n", "niah_single_1": f"{NOISE}\n",
        "niah_multikey_2": NEEDLE.format(kind="numbers", key=f"{word}-{word}", value="1234567"),
        "niah_multikey_3": NEEDLE.format(kind="uuids", key="1" * 36, value="1" * 36),
    }[name.removeprefix("task/ruler/")])  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_an_example_comes_within_a_unit_of_its_length(make: Make, name: str, kind: str) -> None:
    task, given = make(name), tools(kind)
    smallest = task.smallest(given)
    for length in range(smallest + 300, smallest + 8192, 2611):
        for seed in range(3):
            example = checked(task, (length, seed), length, given)
            assert given.count(example.prompt) + task.new_tokens >= length - unit(name, kind)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in QA])
def test_no_answer_of_an_evaluation_is_trained_on(make: Make, name: str) -> None:
    task = make(name)
    length = task.smallest(tools("byte")) + 100
    asked: dict[Part, set[str]] = {}
    for part in ("train", "validation", "test"):
        examples = [task.example(generator(part, seed), length, tools("byte", part)) for seed in range(60)]
        asked[part] = {answer for example in examples for answer in example.answers}
        assert {held_out(answer) for answer in asked[part]} == {part != "train"}
    assert not asked["train"] & (asked["validation"] | asked["test"])


@pytest.mark.parametrize("name", DRAWN)
def test_what_occurs_in_the_training_text_is_not_asked(make: Make, name: str) -> None:
    task = make(name)
    length = task.smallest(tools("byte")) + 100
    anything = [task.example(generator(seed), length, tools("byte")).answers for seed in range(60)]
    taken = {answer for answers in anything[:30] for answer in answers}
    left = [task.example(generator(seed), length, tools("byte", taken=taken)).answers for seed in range(60)]
    assert not taken & {answer for answers in left for answer in answers}
    assert left[30:] == anything[30:]  # nothing else changes
    train = [task.example(generator(seed), length, tools("byte", "train")).answers for seed in range(60)]
    asked = {answer for answers in train for answer in answers}
    assert train == [task.example(generator(n), length, tools("byte", "train", asked)).answers for n in range(60)]


@pytest.mark.parametrize("name", NAMES)
def test_chance_is_a_share_that_length_does_not_raise(make: Make, name: str) -> None:
    task, given = make(name), tools("byte")
    chances = [task.guess(task.smallest(given) + more, given) for more in (300, 3000)]
    assert 0 <= chances[1] <= chances[0] < 1
    assert task.paper
    assert task.source


GOLDEN = {
    "task/needle": "6a57bef539e7f0e6",
    "task/passkey": "8a3dfe547b11af5a",
    "task/ruler/cwe": "3fffe701474642b4",
    "task/ruler/fwe": "07e95c429173f824",
    "task/ruler/niah_multikey_1": "298e408e53364f15",
    "task/ruler/niah_multikey_2": "38b19ce8a409930a",
    "task/ruler/niah_multikey_3": "8736043cf33fc29c",
    "task/ruler/niah_multiquery": "dfcc154d5c678a0e",
    "task/ruler/niah_multivalue": "5aeea8a49943a68d",
    "task/ruler/niah_single_1": "4e6d3238ed2450e0",
    "task/ruler/niah_single_2": "1687f5be2ddc70b4",
    "task/ruler/niah_single_3": "9c0f761890e62c5c",
    "task/ruler/qa_1": "f1e247172a140ebf",
    "task/ruler/qa_2": "a0057f3d86369fd3",
    "task/ruler/vt": "1a023a74b03269e5",
}


@pytest.mark.parametrize("name", NAMES)
def test_the_examples_are_those_of_before(make: Make, name: str) -> None:
    """A change here makes other data of every recorded seed: it has to be meant."""
    task, given = make(name), tools("byte")
    example = task.example(generator("golden", name), task.smallest(given) + 2000, given)
    text = json.dumps([example.prompt, example.answers])
    assert (name, hashlib.sha256(text.encode()).hexdigest()[:16]) == (name, GOLDEN[name])
