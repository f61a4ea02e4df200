"""RULER's eight needle tasks: keys and values in noise, in a text, or between needles that nobody asks for.

Templates, counts and metric are those of NVIDIA/RULER (Hsieh et al. 2024, arXiv:2404.06654), scripts/data/synthetic/niah.py
and scripts/synthetic.yaml. What differs: the text is that of any corpus, with the white space it has there; no key and
no value comes twice; and the number of lines or sentences is the largest that fits, not a multiple of 5, 25 or 500.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import accumulate
from typing import ClassVar, Literal

import numpy as np

from ctxlab.data.source import SOURCES
from ctxlab.data.tasks.base import DoesNotFit, Example, TextTask, Tools, generator
from ctxlab.data.tasks.fill import fill
from ctxlab.data.tasks.haystack import LEAST, hide
from ctxlab.data.tasks.passkey import GARBAGE
from ctxlab.data.tasks.values import Kind, draw, longest, spread

PAPER = "Hsieh et al. 2024, arXiv:2404.06654"
NOISE = " ".join(GARBAGE)
NEEDLE = "One of the special magic {kind} for {key} is: {value}."
TEMPLATE = (
    "Some special magic {kind} are hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the {kind} afterwards.\n{context}\n"
    "What are all the special magic {kind} for {query} mentioned in the provided text?"
    " The special magic {kind} for {query} mentioned in the provided text are"
)
DEPTHS = np.round(np.linspace(0, 100, 40)) / 100  # where a needle may stand in a text


class Niah(TextTask):
    """`keys` keys of `values` values each stand in the haystack, and all values of `queries` of the keys are asked for."""

    source = "RULER, Hsieh et al. 2024"
    paper = PAPER
    new_tokens = 128

    hay: ClassVar[Literal["noise", "text", "needles"]] = "text"
    key_kind: ClassVar[Kind] = "words"
    value_kind: ClassVar[Kind] = "numbers"
    keys: ClassVar[int] = 1
    values: ClassVar[int] = 1
    queries: ClassVar[int] = 1

    def smallest(self, tools: Tools) -> int:
        (key, more), (value, much) = (longest(kind, tools.count) for kind in (self.key_kind, self.value_kind))
        needle = self._needle(key, value)
        n = self.keys * self.values
        hay = {"noise": [NOISE] * n, "text": [], "needles": [needle] * n}[self.hay]
        tokens = tools.count(self._prompt("\n".join([*hay, *[needle] * n]), [key] * self.queries))
        needles = n * (1 + (self.hay == "needles"))
        spare = more * (needles + 2 * self.queries) + much * needles + LEAST * (self.hay == "text")
        return tokens + spare + self.new_tokens

    def example(self, random: np.random.Generator, length: int, tools: Tools, *, depth: float | None = None) -> Example:
        room = self.room(length, tools)
        keys: list[str] = []
        needles: list[str] = []
        values: list[str] = []
        for _ in range(self.keys):
            keys.append(draw(random, self.key_kind, tools, but=keys))
            for _ in range(self.values):
                values.append(draw(random, self.value_kind, tools, but=values))
                needles.append(self._needle(keys[-1], values[-1]))
        asked = random.permutation(self.keys)[: self.queries].tolist()
        answers = tuple(values[index * self.values + number] for index in asked for number in range(self.values))
        single = len(answers) == 1
        shares = random.permutation(DEPTHS)[: len(needles)] if self.hay == "text" else random.random(len(needles))
        if single and depth is not None:
            shares[asked[0]] = depth
        queries = [keys[index] for index in asked]

        def wrap(context: str) -> str:
            return self._prompt(context, queries)

        if self.hay == "text":
            prompt = hide(needles, shares.tolist(), wrap, room, random, tools)
        else:
            frame = tools.count(wrap("\n".join(needles)))
            lines = self._lines(random, max(0, room - frame), tools, keys, values)
            sums = [0, *accumulate(size for _, size in lines)]
            prompt = fill(
                lambda n: wrap(_between([line for line, _ in lines[:n]], needles, shares.tolist())),
                lambda n: frame + sums[n],
                tools.count, room, least=min(len(needles), len(lines)), most=len(lines),
            )  # fmt: skip
        if prompt is None:
            raise DoesNotFit(self.config.name, length, length + 1)
        where = None
        if single:
            context = prompt[prompt.index("\n") + 1 : prompt.rindex("\n")]
            needle = needles[asked[0]]
            where = context.index(needle) / max(1, len(context) - len(needle))
        return Example(prompt, answers, where)

    def guess(self, length: int, tools: Tools) -> float:
        """Where keys are in the text that nobody asks for: one of the values that stand there. Else all of them are
        answers, and a guess is one of the 9 * 10^6 numbers, or of the 2^122 uuids.
        """
        if self.hay == "needles" or self.keys > self.queries:
            prompt = self.example(generator(self.config.name), length, tools).prompt
            return self.queries * self.values / prompt.count("One of the special magic")
        return 1 / spread(self.value_kind)

    def solve(self, prompt: str) -> str:
        text, _, question = prompt.rpartition("\n")
        found = re.findall(r"One of the special magic \w+ for (\S+) is: (\S+)\.", text)
        asked = re.split(r", and |, ", question.partition(" for ")[2].partition(" mentioned in ")[0])
        return ", ".join(value for query in asked for key, value in found if key == query)

    def _needle(self, key: str, value: str) -> str:
        return NEEDLE.format(kind=self.value_kind, key=key, value=value)

    def _prompt(self, context: str, queries: Sequence[str]) -> str:
        template, kind = TEMPLATE, str(self.value_kind)
        if self.queries * self.values == 1:
            template, kind = template.replace("Some", "A").replace("are all", "is").replace("are", "is"), kind[:-1]
        query = queries[0] if len(queries) == 1 else f"{', '.join(queries[:-1])}, and {queries[-1]}"
        return template.format(kind=kind, context=context, query=query)

    def _lines(
        self, random: np.random.Generator, n_tokens: int, tools: Tools, keys: list[str], values: list[str]
    ) -> list[tuple[str, int]]:
        """Lines to stand between the needles and their tokens, just more than there is room for."""
        if self.hay == "noise":
            size = tools.count(f"{NOISE}\n")
            return [(NOISE, size)] * (1 + n_tokens // size)
        seen_keys, seen_values = set(keys), set(values)
        lines: list[tuple[str, int]] = []
        while n_tokens >= 0:
            key = draw(random, self.key_kind, tools, but=seen_keys)
            value = draw(random, self.value_kind, tools, but=seen_values)
            seen_keys.add(key)
            seen_values.add(value)
            line = self._needle(key, value)
            lines.append((line, tools.count(f"{line}\n")))
            n_tokens -= lines[-1][1]
        return lines


def _between(lines: Sequence[str], needles: Sequence[str], shares: Sequence[float]) -> str:
    """The lines with each needle behind the share of them that is its own."""
    mixed = list(lines)
    for share, needle in sorted(zip(shares, needles, strict=True), reverse=True):
        mixed.insert(min(int(share * (len(lines) + 1)), len(lines)), needle)
    return "\n".join(mixed)


@SOURCES.register("task/ruler/niah_single_1")
class Single1(Niah):
    """One number in noise: `One of the special magic numbers for long-context is: 8231094.` between lines of
    `The grass is green. The sky is blue. ...`
    """

    class Config(Niah.Config):
        name: Literal["task/ruler/niah_single_1"] = "task/ruler/niah_single_1"

    hay = "noise"


@SOURCES.register("task/ruler/niah_single_2")
class Single2(Niah):
    """One number in a text."""

    class Config(Niah.Config):
        name: Literal["task/ruler/niah_single_2"] = "task/ruler/niah_single_2"


@SOURCES.register("task/ruler/niah_single_3")
class Single3(Niah):
    """One uuid in a text."""

    class Config(Niah.Config):
        name: Literal["task/ruler/niah_single_3"] = "task/ruler/niah_single_3"

    value_kind = "uuids"


@SOURCES.register("task/ruler/niah_multikey_1")
class MultiKey1(Niah):
    """Four keys with a number each in a text; one is asked for."""

    class Config(Niah.Config):
        name: Literal["task/ruler/niah_multikey_1"] = "task/ruler/niah_multikey_1"

    keys = 4


@SOURCES.register("task/ruler/niah_multikey_2")
class MultiKey2(Niah):
    """A key and its number between as many others as there is room for."""

    class Config(Niah.Config):
        name: Literal["task/ruler/niah_multikey_2"] = "task/ruler/niah_multikey_2"

    hay = "needles"


@SOURCES.register("task/ruler/niah_multikey_3")
class MultiKey3(Niah):
    """A uuid whose value is a uuid, between as many others as there is room for."""

    class Config(Niah.Config):
        name: Literal["task/ruler/niah_multikey_3"] = "task/ruler/niah_multikey_3"

    hay = "needles"
    key_kind = "uuids"
    value_kind = "uuids"


@SOURCES.register("task/ruler/niah_multivalue")
class MultiValue(Niah):
    """One key with four numbers in a text; all four are asked for."""

    class Config(Niah.Config):
        name: Literal["task/ruler/niah_multivalue"] = "task/ruler/niah_multivalue"

    values = 4


@SOURCES.register("task/ruler/niah_multiquery")
class MultiQuery(Niah):
    """Four keys with a number each in a text; all four are asked for."""

    class Config(Niah.Config):
        name: Literal["task/ruler/niah_multiquery"] = "task/ruler/niah_multiquery"

    keys = 4
    queries = 4
