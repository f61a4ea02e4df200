"""A number in a desert of five sentences: the first test of whether attention reaches that far."""

from __future__ import annotations

import re
from itertools import accumulate
from typing import Literal

import numpy as np
from pydantic import Field

from ctxlab.data.source import SOURCES
from ctxlab.data.tasks.base import DoesNotFit, Example, TextTask, Tools
from ctxlab.data.tasks.fill import fill
from ctxlab.data.tasks.values import draw, longest, spread

TASK = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. "
    "I will quiz you about the important information there."
)
GARBAGE = ("The grass is green.", "The sky is blue.", "The sun is yellow.", "Here we go.", "There and back again.")
KEY = "The pass key is {value}. Remember it. {value} is the pass key."
QUESTION = "What is the pass key? The pass key is"


@SOURCES.register("task/passkey")
class Passkey(TextTask):
    """The prompt of Mohtashami and Jaggi 2023 (arXiv:2305.16300), line by line:

        There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. I will quiz you ...
        The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. The grass ...
        The pass key is 81423. Remember it. 81423 is the pass key.
        The grass is green. The sky is blue. ...
        What is the pass key? The pass key is

    The five sentences come round as often as there is room, each run from its beginning: an example comes within one
    such sentence of its length.
    """

    source = "passkey retrieval, Mohtashami and Jaggi 2023, arXiv:2305.16300"
    paper = "Mohtashami and Jaggi 2023, arXiv:2305.16300"

    class Config(TextTask.Config):
        name: Literal["task/passkey"] = "task/passkey"
        digits: int = Field(5, ge=3, le=18, description="digits of the number")

    config: Config

    @property
    def new_tokens(self) -> int:
        return self.config.digits + 1  # one a digit at most, and the space

    def smallest(self, tools: Tools) -> int:
        value, more = longest("numbers", tools.count, self.config.digits)
        return tools.count(_prompt(value, 1, 0.0)) + 2 * more + self.new_tokens

    def example(self, random: np.random.Generator, length: int, tools: Tools, *, depth: float | None = None) -> Example:
        room = self.room(length, tools)
        value = draw(random, "numbers", tools, digits=self.config.digits)
        share = random.random() if depth is None else depth
        rounds = [tools.count(_garbage(n)) for n in (len(GARBAGE), 2 * len(GARBAGE))]
        ends = [0, *accumulate(tools.count(f" {sentence}") for sentence in GARBAGE)]
        frame, whole = tools.count(_prompt(value, 0, 0.0)), rounds[1] - rounds[0]

        def cost(n: int) -> float:
            return frame + whole * (n // len(GARBAGE) + ends[n % len(GARBAGE)] / ends[-1])

        most = 2 * len(GARBAGE) * (1 + room // whole)
        prompt = fill(lambda n: _prompt(value, n, share), cost, tools.count, room, least=1, most=most)
        if prompt is None:
            raise DoesNotFit(self.config.name, length, length + 1)
        key = KEY.format(value=value)
        desert = len(prompt) - len(_prompt(value, 0, 0.0))
        return Example(prompt, (value,), (prompt.index(key) - len(TASK) - 1) / desert)

    def guess(self, length: int, tools: Tools) -> float:
        """One of the 9 * 10^(digits - 1) numbers of so many digits."""
        return 1 / spread("numbers", self.config.digits)

    def solve(self, prompt: str) -> str:
        found = re.search(r"The pass key is (\d+)\. Remember it\.", prompt)
        return found[1] if found else ""


def _prompt(value: str, n: int, share: float) -> str:
    """The prompt with `n` of the sentences, the share of them before the number."""
    before = round(share * n)
    runs = [_garbage(before), KEY.format(value=value), _garbage(n - before)]
    return "\n".join([TASK, *(run for run in runs if run), QUESTION])


def _garbage(n: int) -> str:
    rounds, rest = divmod(n, len(GARBAGE))
    return " ".join(GARBAGE * rounds + GARBAGE[:rest])
