"""What a task is: examples made from a random generator, at any length, with an oracle that solves them.

Two kinds. A `TokenTask` speaks in numbers of a vocabulary of its own. A `TextTask` asks in words, so it needs a tokenizer
and, most of them, text to hide things in. Either makes examples for training and, from other random numbers and other
values, for validation and test.
"""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal, NamedTuple, Protocol

import numpy as np
from pydantic import Field

from ctxlab.data.corpora.base import Corpus
from ctxlab.data.corpora.text import Text
from ctxlab.data.progress import Progress
from ctxlab.data.source import SOURCES, Source
from ctxlab.errors import DataError

Part = Literal["train", "validation", "test"]


class DoesNotFit(DataError):
    """An example of this task is longer than the length asked for; `smallest` is the least length that it fits in."""

    def __init__(self, task: str, length: int, smallest: int) -> None:
        self.task, self.smallest = task, smallest
        super().__init__(f"{task} does not fit in {length} tokens: it takes at least {smallest}")


class Task(Source):
    """Examples by a random generator. The part that they are for decides which values may occur in them."""

    implies: ClassVar[Mapping[str, str]] = {"eval": "[task]"}
    paper: ClassVar[str] = ""

    class Config(Source.Config):
        examples: int = Field(100_000, ge=1, description="rows of an epoch; every epoch has new ones")

    config: Config

    @property
    def label(self) -> str:
        """The name without its group: mqar."""
        return self.config.name.removeprefix("task/")


class TokenRow(NamedTuple):
    """One example of a token task: what is read and, at each place, what comes out (`windows.IGNORED`: anything)."""

    tokens: np.ndarray  # (n,) int64
    targets: np.ndarray  # (n,) int64


class TokenTask(Task):
    """A task over the numbers 0 to vocab_size - 1, scored at the labelled places."""

    implies: ClassVar[Mapping[str, str]] = {"tokenizer": "ids", "eval": "[task]"}
    generated: ClassVar[bool] = False
    """Whether the labelled places are one answer at the end, to be said by greedy generation."""

    class Config(Task.Config):
        """Of a class of its own, which tells these tasks from those in words."""

    def fetch(self, cache: Path, progress: Progress) -> None:
        """There is nothing to fetch."""

    @property
    @abstractmethod
    def vocab_size(self) -> int: ...

    @abstractmethod
    def row(self, random: np.random.Generator, length: int, epoch: int | None) -> TokenRow:
        """One example of at most `length` tokens; `epoch` is how far training is, None: as hard as it gets.

        Raises DoesNotFit.
        """

    @abstractmethod
    def guess(self, length: int) -> float:
        """Chance: the accuracy of a guess that knows what `chance` says, and nothing of the example's order."""

    @abstractmethod
    def solve(self, tokens: Sequence[int]) -> list[int]:
        """The oracle: what comes out at each labelled place, from the tokens alone (IGNORED elsewhere)."""


class Haystack(Protocol):
    """Text to hide things in, of any corpus."""

    def text(self, random: np.random.Generator, n_tokens: int) -> str:
        """Whole sentences or lines from somewhere in one part of the corpus, with the white space between them: as many as
        come to `n_tokens` tokens at most. Behind a document's end the next one begins, behind the last one the first."""
        ...


@dataclass(frozen=True)
class Tools:
    """What a text task makes its examples with."""

    count: Callable[[str], int]  # tokens of a text; what is counted once is remembered by it: `Tokenizer.count`
    haystack: Haystack
    part: Part
    taken: Container[str] = frozenset()  # values that occur in the text of the train split: no evaluation asks for them


class Example(NamedTuple):
    """One example of a text task: a prompt, and all the answers that it asks for."""

    prompt: str
    answers: tuple[str, ...]
    depth: float | None = (
        None  # where in the context the answer stands, from 0, its start, to 1; None: in several places
    )


class TextTask(Task):
    """A question about a text, answered by greedy generation of at most `new_tokens` tokens."""

    match: ClassVar[Literal["all", "part"]] = "all"
    """all: the share of the answers that are in the generated text; part: 1 where any is (RULER's metrics)."""
    separator: ClassVar[str] = ", "
    """What stands between answers that are trained on."""

    config: Config

    class Config(Task.Config):
        haystack: str = Field(
            "shakespeare", min_length=1, description="corpus to hide things in, or path of your own text"
        )
        scored: Literal["all", "answers"] = Field("all", description="tokens that training is on: all | answers")

    def fetch(self, cache: Path, progress: Progress) -> None:
        haystack_corpus(self.config.haystack).fetch(cache, progress)

    @property
    @abstractmethod
    def new_tokens(self) -> int:
        """Tokens that are generated for an answer, at most."""

    @abstractmethod
    def example(self, random: np.random.Generator, length: int, tools: Tools, *, depth: float | None = None) -> Example:
        """One example whose prompt and `new_tokens` together have at most `length` tokens.

        `depth` says where the answer stands (0 to 1), where the task has one place for it; None: anywhere.
        Raises DoesNotFit.
        """

    @abstractmethod
    def smallest(self, tools: Tools) -> int:
        """The least length in which every example fits, with this tokenizer."""

    @abstractmethod
    def guess(self, length: int, tools: Tools) -> float:
        """Chance: the score to expect of an answer drawn from the candidates at random. They are those in the text that
        the question could mean, where it has several, and else everything that such an answer can be."""

    @abstractmethod
    def solve(self, prompt: str) -> str:
        """The oracle: the answer, from the prompt alone."""

    def room(self, length: int, tools: Tools) -> int:
        """Tokens that the prompt may have. Raises DoesNotFit."""
        if length < (smallest := self.smallest(tools)):
            raise DoesNotFit(self.config.name, length, smallest)
        return length - self.new_tokens

    def completion(self, example: Example) -> str:
        """What stands behind the prompt where an example is trained on; it begins with a space, unless the prompt ends in
        one."""
        space = "" if example.prompt[-1:].isspace() else " "
        return space + self.separator.join(example.answers)

    def score(self, generated: str, answers: Sequence[str]) -> float:
        """RULER's string_match_all or string_match_part (Hsieh et al. 2024, arXiv:2404.06654), from 0 to 1."""
        text = "".join("\n" if ord(character) < 32 else character for character in generated.strip()).lower()
        found = [answer.lower() in text for answer in answers]
        return sum(found) / len(found) if self.match == "all" else float(any(found))


def haystack_corpus(named: str) -> Corpus:
    """The corpus that a haystack's name stands for: one that needs no settings, or the user's own text at a path."""
    if named in SOURCES.names() and issubclass(kind := SOURCES.get(named), Corpus) and named != "text":
        return kind(kind.Config(name=named))
    return Text(Text.Config(path=named))


def generator(*key: object) -> np.random.Generator:
    """Random numbers that are a function of a key."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))


def held_out(value: str) -> bool:
    """Whether a value is for questions of an evaluation only: one in four is, by its hash, and none of them is trained on."""
    return hashlib.blake2b(value.lower().encode(), digest_size=1).digest()[0] % 4 == 0
