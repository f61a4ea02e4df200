"""RULER's variable tracking: a chain of assignments in noise, every link of which has the value of the first.

Template, counts and metric are those of NVIDIA/RULER (Hsieh et al. 2024, arXiv:2404.06654),
scripts/data/synthetic/variable_tracking.py, vt of scripts/synthetic.yaml: one chain of four hops, one example before it.
"""

from __future__ import annotations

import re
from string import ascii_uppercase
from typing import Literal

import numpy as np

from ctxlab.data.source import SOURCES
from ctxlab.data.tasks.base import DoesNotFit, Example, Part, TextTask, Tools, generator
from ctxlab.data.tasks.fill import fill
from ctxlab.data.tasks.ruler_niah import NOISE, PAPER
from ctxlab.data.tasks.values import letters

TEMPLATE = (
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n{context}\n"
    "Question: Find all variables that are assigned the value {query} in the text above."
    " Answer: According to the chain(s) of variable assignment in the text above, {num_v} variables are assigned the "
    "value {query}, they are: "
)
VARIABLES = 5  # four hops
EXAMPLE_TOKENS = 500  # of the solved example's question, or more where five lines of noise need more


@SOURCES.register("task/ruler/vt")
class VariableTracking(TextTask):
    """Five variables, of which each but the first is assigned the one before it:

        VAR XKCVE = 80421
        The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.
        VAR PLQMD = VAR XKCVE

    A solved example with shorter names stands before the question, with as many lines of noise as 500 tokens hold, at
    least as many as there are assignments.
    """

    source = "RULER, Hsieh et al. 2024"
    paper = PAPER
    separator = " "
    new_tokens = 30

    class Config(TextTask.Config):
        name: Literal["task/ruler/vt"] = "task/ruler/vt"

    def smallest(self, tools: Tools) -> int:
        names = [f"{letter}QXZJ" for letter in "VWKZX"]
        solved = _prompt([name[:3] for name in names], 99999, VARIABLES, 1) + " " + " ".join(name[:3] for name in names)
        mentions = 2 * (2 * VARIABLES - 1) + VARIABLES
        most = max(EXAMPLE_TOKENS + 6 * VARIABLES, tools.count(solved) + mentions)
        return most + tools.count(_prompt(names, 99999, VARIABLES, 1)) + mentions + self.new_tokens

    def example(self, random: np.random.Generator, length: int, tools: Tools, *, depth: float | None = None) -> Example:
        room = self.room(length, tools)
        values = random.permutation(90_000)[:2] + 10_000
        seed = int(random.integers(1 << 62))
        shorter = _names(random, 3, tools.part)
        names = _names(random, 5, tools.part)
        before = _longest(shorter, int(values[0]), seed, tools, EXAMPLE_TOKENS)
        before = before or _prompt(shorter, int(values[0]), VARIABLES, seed)
        before = f"{before} {' '.join(shorter)}\n\n"
        question = _longest(names, int(values[1]), seed + 1, tools, room - tools.count(before))
        if question is None:
            raise DoesNotFit(self.config.name, length, length + 1)
        return Example(before + question, tuple(names))

    def guess(self, length: int, tools: Tools) -> float:
        """All five variables of the text are answers; a guess is one of the 26^5 names."""
        return 26.0**-5

    def solve(self, prompt: str) -> str:
        _, _, question = prompt.rpartition("Memorize and track")
        query = re.search(r"assigned the value (\d+) in", question)
        found = [query[1]] if query else []
        for name, value in re.findall(r"VAR (\w+) = (?:VAR )?(\w+)", question):
            found += [name] * (value in found)
        return " ".join(found[1:])


def _names(random: np.random.Generator, n: int, part: Part) -> list[str]:
    names: list[str] = []
    for _ in range(VARIABLES):
        names.append(letters(random, n, ascii_uppercase, part, but=names))
    return names


def _longest(names: list[str], value: int, seed: int, tools: Tools, room: int) -> str | None:
    least = _prompt(names, value, VARIABLES, seed)
    frame, size = tools.count(least), tools.count(f"{NOISE}\n")
    most = VARIABLES + 1 + max(0, room - frame) // size
    return fill(
        lambda n: _prompt(names, value, n, seed), lambda n: frame + (n - VARIABLES) * size,
        tools.count, room, least=VARIABLES, most=most,
    )  # fmt: skip


def _prompt(names: list[str], value: int, n: int, seed: int) -> str:
    """The chain in order, each assignment before another of `n` lines of noise."""
    chain = [f"VAR {names[0]} = {value}"]
    chain += [f"VAR {name} = VAR {of} " for of, name in zip(names, names[1:])]
    lines = [NOISE] * n
    places = np.sort(generator(seed, n).permutation(n)[: len(chain)])
    for number, place in enumerate(places.tolist()):
        lines.insert(place + number, chain[number])
    return TEMPLATE.format(context="\n".join(lines), query=value, num_v=len(names))
