"""What is asked for: numbers, words and uuids, drawn so that no answer of an evaluation was ever trained on.

One value in four is held out (`base.held_out`): training draws the others, validation and test draw these. Where the
values that occur in the text of the train split are known (`taken.py`), an evaluation draws none of them either.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Container
from functools import lru_cache
from typing import Literal

import numpy as np

from ctxlab.data.tasks import words
from ctxlab.data.tasks.base import Part, Tools, held_out
from ctxlab.errors import DataError

Kind = Literal["numbers", "words", "uuids"]

_TRIES = 10_000


def draw(
    random: np.random.Generator, kind: Kind, tools: Tools, *, but: Container[str] = frozenset(), digits: int = 7
) -> str:
    """A value for an example of this part. `but`: those that the example has already.

    Raises DataError where the training text leaves nothing to ask for.
    """
    taken = frozenset[str]() if tools.part == "train" else tools.taken
    for _ in range(_TRIES):
        value = _value(random, kind, digits)
        if value not in but and may_be_asked(value, tools.part) and value not in taken:
            return value
    what = f"numbers of {digits} digits" if kind == "numbers" else kind
    raise DataError(
        f"data: {_TRIES} {what} in a row occur in the training text or this example: no new one can be asked for"
    )


def may_be_asked(value: str, part: Part) -> bool:
    """Whether a value may be an answer in this part."""
    return held_out(value) == (part != "train")


def letters(
    random: np.random.Generator, n: int, alphabet: str, part: Part, *, but: Container[str] = frozenset()
) -> str:
    """A word of `n` random letters that may be asked for in this part."""
    while True:
        word = "".join(alphabet[place] for place in random.integers(len(alphabet), size=n))
        if word not in but and may_be_asked(word, part):
            return word


def longest(kind: Kind, count: Callable[[str], int], digits: int = 7) -> tuple[str, int]:
    """A value, and how many tokens others of its kind may have more: none for words, of which it is the longest."""
    if kind == "words":
        return f"{costliest(words.adjectives(), count)}-{costliest(words.nouns(), count)}", 0
    value = "1" * digits if kind == "numbers" else str(uuid.UUID(int=0, version=4))
    return value, max(0, len(value) - count(value))


def spread(kind: Kind, digits: int = 7) -> float:
    """How many values of a kind there are."""
    if kind == "words":
        return len(words.adjectives()) * len(words.nouns())
    return 9 * 10 ** (digits - 1) if kind == "numbers" else 2.0**122  # a version 4 uuid has so many free bits


@lru_cache(maxsize=16)
def costliest(choices: tuple[str, ...], count: Callable[[str], int]) -> str:
    """The word of most tokens."""
    return max(choices, key=count)


def _value(random: np.random.Generator, kind: Kind, digits: int) -> str:
    if kind == "numbers":
        return str(random.integers(10 ** (digits - 1), 10**digits))
    if kind == "uuids":
        return str(uuid.UUID(bytes=random.bytes(16), version=4))
    adjectives, nouns = words.adjectives(), words.nouns()
    return f"{adjectives[random.integers(len(adjectives))]}-{nouns[random.integers(len(nouns))]}"
