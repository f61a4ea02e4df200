"""RULER's frequent words: the three that come up most often, of made-up words whose counts fall as Zipf's law has it.

Template, counts and metric are those of NVIDIA/RULER (Hsieh et al. 2024, arXiv:2404.06654),
scripts/data/synthetic/freq_words_extraction.py, fwe of scripts/synthetic.yaml.
"""

from __future__ import annotations

import math
from collections import Counter
from string import ascii_lowercase
from typing import Literal

import numpy as np

from ctxlab.data.source import SOURCES
from ctxlab.data.tasks.base import DoesNotFit, Example, TextTask, Tools, generator
from ctxlab.data.tasks.fill import fill
from ctxlab.data.tasks.ruler_niah import PAPER
from ctxlab.data.tasks.values import letters

TEMPLATE = (
    "Read the following coded text and track the frequency of each coded word. Find the three most frequently appeared "
    "coded words. {context}\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What are the three "
    "most frequently appeared words in the above coded text?"
    " Answer: According to the coded text above, the three most frequently appeared words are:"
)
NOISE = "..."  # the most frequent word of all
LETTERS = 6
ZETA = math.pi**2 / 6  # of 2
LEAST, _RANKS = 53, 5  # from so many words on rank 5 comes up, and never as often as rank 4


@SOURCES.register("task/ruler/fwe")
class FrequentWords(TextTask):
    """Of n words the one of rank k comes up floor(n / (k^2 zeta(2))) times, for k up to (length - 50) // 50:

        ... qkrzfe ... ... lwuhbn ... qkrzfe ...

    Rank 1 is `...`; ranks 2 to 4 are asked for. An example has 53 words or more: below, ranks 4 and 5 can be tied.
    """

    source = "RULER, Hsieh et al. 2024"
    paper = PAPER
    separator = " "
    new_tokens = 50

    class Config(TextTask.Config):
        name: Literal["task/ruler/fwe"] = "task/ruler/fwe"

    def smallest(self, tools: Tools) -> int:
        counts = times(LEAST, _RANKS)
        frame = tools.count(TEMPLATE.format(context=" ".join([NOISE] * counts[0])))
        least = self.new_tokens + _RANKS * self.new_tokens  # a vocabulary of five
        return max(least, frame + int(counts[1:].sum()) * (LETTERS + 1) + self.new_tokens)

    def example(self, random: np.random.Generator, length: int, tools: Tools, *, depth: float | None = None) -> Example:
        room = self.room(length, tools)
        seed = int(random.integers(1 << 62))
        vocabulary = {NOISE: None}
        while len(vocabulary) < room // 50:
            vocabulary[letters(random, LETTERS, ascii_lowercase, tools.part, but=vocabulary)] = None
        coded = list(vocabulary)
        sizes = np.array([tools.count(f" {word}") for word in coded])
        frame = tools.count(TEMPLATE)

        def build(n: int) -> str:
            text = np.repeat(coded, times(n, len(coded)))
            return TEMPLATE.format(context=" ".join(generator(seed, n).permutation(text).tolist()))

        def cost(n: int) -> int:
            return frame + int(sizes @ times(n, len(coded)))

        prompt = fill(build, cost, tools.count, room, least=LEAST, most=max(LEAST, room))  # a word has a token or more
        if prompt is None:
            raise DoesNotFit(self.config.name, length, length + 1)
        return Example(prompt, tuple(coded[1:4]))

    def guess(self, length: int, tools: Tools) -> float:
        """Three of the m different coded words in the text, each as likely as another: 3 / m are right on average."""
        prompt = self.example(generator(self.config.name), length, tools).prompt
        return 3 / len(set(_coded(prompt)))

    def solve(self, prompt: str) -> str:
        return " ".join(word for word, _ in Counter(_coded(prompt)).most_common(3))


def times(n: int, ranks: int) -> np.ndarray:
    """How often each rank comes up among n words, (ranks,)."""
    return np.floor(n / (np.arange(1, ranks + 1) ** 2 * ZETA)).astype(np.int64)


def _coded(prompt: str) -> list[str]:
    text = prompt.partition(" coded words. ")[2].partition("\nQuestion:")[0]
    return [word for word in text.split() if word != NOISE]
