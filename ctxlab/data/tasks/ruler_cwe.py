"""RULER's common words: ten words of a numbered list come up more often than the others.

Template, counts and metric are those of NVIDIA/RULER (Hsieh et al. 2024, arXiv:2404.06654),
scripts/data/synthetic/common_words_extraction.py, cwe of scripts/synthetic.yaml.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from itertools import accumulate
from typing import Literal, NamedTuple

import numpy as np

from ctxlab.data.source import SOURCES
from ctxlab.data.tasks import words
from ctxlab.data.tasks.base import DoesNotFit, Example, Part, TextTask, Tools, generator
from ctxlab.data.tasks.fill import fill
from ctxlab.data.tasks.ruler_niah import PAPER
from ctxlab.data.tasks.values import may_be_asked

TEMPLATE = (
    "Below is a numbered list of words. In these words, some appear more often than others. "
    "Memorize the ones that appear most often.\n{context}\n"
    "Question: What are the 10 most common words in the above list?"
    " Answer: The top 10 words that appear most often in the list are:"
)
COMMON = 10
LEAST = 20  # different words of a list


class Counts(NamedTuple):
    """How often a common and another word come up in the list, and the size and the counts of the solved example's."""

    often: int
    rarely: int
    example_words: int
    example_often: int
    example_rarely: int


LONG = Counts(30, 3, 40, 10, 3)  # from 4,096 tokens on
SHORT = Counts(6, 1, 20, 3, 1)
_LONG_FROM = 4096
_TRIES = 100


@SOURCES.register("task/ruler/cwe")
class CommonWords(TextTask):
    """Ten words of `1. river 2. stone 3. river ...` come up 30 times and the others 3 times, in any order; a solved
    example of 40 words stands before it. Below 4,096 tokens, and where so long a list has no room with this tokenizer,
    they come up 6 times and once, and the example has 20 words.

    Words of an evaluation are held out of training, as long as there are enough: the others follow beyond, and behind
    them compounds of two (RULER takes them from a second list).
    """

    source = "RULER, Hsieh et al. 2024"
    paper = PAPER
    new_tokens = 120

    class Config(TextTask.Config):
        name: Literal["task/ruler/cwe"] = "task/ruler/cwe"

    def smallest(self, tools: Tools) -> int:
        return self._smallest(SHORT, tools)

    def example(self, random: np.random.Generator, length: int, tools: Tools, *, depth: float | None = None) -> Example:
        room = self.room(length, tools)
        counts = LONG if length >= max(_LONG_FROM, self._smallest(LONG, tools)) else SHORT
        for _ in range(_TRIES):  # at the smallest length a few draws have more long words than there is room for
            example = self._drawn(random, counts, room, tools)
            if example is not None:
                return example
        raise DoesNotFit(self.config.name, length, length + 1)

    def guess(self, length: int, tools: Tools) -> float:
        """Ten of the n different words in the list, each as likely as another: 10 / n are right on average."""
        prompt = self.example(generator(self.config.name), length, tools).prompt
        return COMMON / len(set(_listed(prompt)))

    def solve(self, prompt: str) -> str:
        return " ".join(word for word, _ in Counter(_listed(prompt)).most_common(COMMON))

    def completion(self, example: Example) -> str:
        """Numbered, as the solved example has it."""
        return " " + _numbered(example.answers)

    def _smallest(self, counts: Counts, tools: Tools) -> int:
        """With words of average length; three standard deviations of their sum are added."""
        sizes = np.array([*_sizes(tools.count).values()])
        first, second = counts.example_words, LEAST
        times = [counts.example_often] * COMMON + [counts.example_rarely] * (first - COMMON) + [1] * COMMON
        times += [counts.often] * COMMON + [counts.rarely] * (second - COMMON)
        items = [f"{number}." for number in range(1, sum(times) + 1)]
        frame = tools.count(f"{TEMPLATE}\n{TEMPLATE} {' '.join(items)}")
        deviation = sizes.std() * np.sqrt(np.square(times).sum())
        return int(np.ceil(frame + sizes.mean() * sum(times) + 3 * deviation)) + self.new_tokens

    def _drawn(self, random: np.random.Generator, counts: Counts, room: int, tools: Tools) -> Example | None:
        seed = int(random.integers(1 << 62))
        known = _sizes(tools.count)
        item = 2 + sum(known.values()) / len(known)  # the number, its point and a word
        most = LEAST + int(1.25 * room / (counts.rarely * item))
        chosen = _words(random, counts.example_words + most, tools.part)
        shown, chosen = chosen[: counts.example_words], chosen[counts.example_words :]
        before = _list(shown, counts.example_often, counts.example_rarely, seed)
        before = f"{before} {_numbered(shown[:COMMON])}\n"
        sizes = [known[word] if word in known else tools.count(f" {word}") for word in chosen]
        common = tools.count(before) + counts.often * sum(sizes[:COMMON])
        sums = [common, *accumulate((counts.rarely * size for size in sizes[COMMON:]), initial=common)]
        digits = [tools.count(f" {'1' * n}.") for n in range(1, 9)]
        frame = tools.count(TEMPLATE)

        def cost(n: int) -> int:
            items = counts.often * COMMON + counts.rarely * (n - COMMON)
            numbers = sum(size * max(0, min(items, 10**n - 1) - 10 ** (n - 1) + 1) for n, size in enumerate(digits, 1))
            return frame + numbers + sums[n - COMMON + 1]

        prompt = fill(
            lambda n: before + _list(chosen[:n], counts.often, counts.rarely, seed + 1), cost,
            tools.count, room, least=LEAST, most=most,
        )  # fmt: skip
        return None if prompt is None else Example(prompt, tuple(chosen[:COMMON]))


def _words(random: np.random.Generator, n: int, part: Part) -> list[str]:
    """Different words, those that may be asked for in this part first."""
    found: list[str] = []
    for some in _sides(part):
        found += [some[index] for index in random.permutation(len(some))[: n - len(found)]]
    everything, seen = words.everything(), set(found)
    while len(found) < n:
        first, second = (everything[index] for index in random.integers(len(everything), size=2))
        if (word := f"{first}-{second}") not in seen:
            seen.add(word)
            found.append(word)
    return found


def _list(chosen: Sequence[str], often: int, rarely: int, seed: int) -> str:
    items = [*chosen[:COMMON]] * often + [*chosen[COMMON:]] * rarely
    order = generator(seed, len(items)).permutation(len(items))
    return TEMPLATE.format(context=_numbered([items[index] for index in order]))


def _numbered(items: Sequence[str]) -> str:
    return " ".join(f"{number}. {word}" for number, word in enumerate(items, 1))


def _listed(prompt: str) -> list[str]:
    """The words of the last list."""
    return re.findall(r"\d+\. (\S+)", prompt.rpartition("Below is a numbered list")[2].partition("\nQuestion:")[0])


@lru_cache(maxsize=16)
def _sizes(count: Callable[[str], int]) -> dict[str, int]:
    """Tokens of every word behind a space."""
    return {word: count(f" {word}") for word in words.everything()}


@cache
def _sides(part: Part) -> tuple[list[str], list[str]]:
    """The words that may be asked for in this part, and the others."""
    mine = [word for word in words.everything() if may_be_asked(word, part)]
    return mine, sorted(set(words.everything()) - set(mine))
