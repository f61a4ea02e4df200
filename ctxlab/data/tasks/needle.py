"""A number in a text: short enough to be trained on and asked about in 128 tokens, as long as any context."""

from __future__ import annotations

import re
from typing import Literal

import numpy as np
from pydantic import Field

from ctxlab.data.source import SOURCES
from ctxlab.data.tasks.base import DoesNotFit, Example, TextTask, Tools
from ctxlab.data.tasks.haystack import LEAST, hide
from ctxlab.data.tasks.values import costliest, draw, longest, spread

NEEDLE = "The number of the {key} is {value}."
QUESTION = "\nThe number of the {key} is"
_KEYS = """
    anchor apple arrow axe baker ball barn barrel basket bear bee bell bench bird boat bone book boot bottle bowl box boy
    bread bridge broom brush bucket candle cap captain cart castle cat chain chair chest child church circle city clock
    cloak cloth cloud coat coin cook corn cow crane cross crow crown cup dagger deer desk dish doctor dog doll donkey door
    dress drum duck eagle egg engine farm farmer feather fence field finger fire fish flag flame flower flute forest fork
    fox frog garden gate ghost giant girl glass glove goat gold goose grape guest hall hammer harp hat hawk head hen hill
    hook horn horse house hunter inn island jar jewel judge key king kitchen kite knife knight ladder lady lake lamb lamp
    leaf lemon letter lion lock log lord maid map market mask mill miller mirror monk moon mother mouse mule nail neck
    needle nest net nurse oak ocean onion orange owl ox page palace paper path pear pearl pen pig pillow pipe plate pond
    pot priest prince queen rabbit raven ribbon ring river road robe rock roof room rope rose saddle sail sailor salt school
    sea seat servant sheep shell shepherd shield ship shirt shoe shop silver singer sister sky snake soldier son song soup
    spear spider spoon spring star stone stool storm street sun swan sword table tailor teacher temple tent thief throne
    tower town tree trumpet uncle valley violin wagon wall watch water well wheel widow wind window wine winter wolf woman
    wood wool
    """
KEYS = tuple(_KEYS.split())


@SOURCES.register("task/needle")
class Needle(TextTask):
    """Sentences that give things a number, between those of a text, and one of the things at the end:

        ... and that in the most exact regard support the worships of their name. The number of the river is 81423.
        O most small fault, How ugly didst thou in Cordelia show!
        The number of the river is

    The number is the very next thing to be said, so an answer takes one token a digit and one for the space. A needle
    stands behind the end of a sentence where the text has one near (Kamradt 2023), and an example comes within one
    sentence or line of its length.
    """

    source = "short needles in any corpus, after Kamradt 2023"
    paper = "after Kamradt 2023, github.com/gkamradt/LLMTest_NeedleInAHaystack"

    class Config(TextTask.Config):
        name: Literal["task/needle"] = "task/needle"
        digits: int = Field(5, ge=3, le=18, description="digits of a number")
        needles: int = Field(1, ge=1, le=len(KEYS), description="things that have a number; one of them is asked for")

    config: Config

    @property
    def new_tokens(self) -> int:
        return self.config.digits + 1  # one a digit at most, and the space

    def smallest(self, tools: Tools) -> int:
        value, more = longest("numbers", tools.count, self.config.digits)
        key = costliest(KEYS, tools.count)
        needles = tools.count(f"{NEEDLE.format(key=key, value=value)} ") + more
        return LEAST + self.config.needles * needles + tools.count(QUESTION.format(key=key)) + self.new_tokens

    def example(self, random: np.random.Generator, length: int, tools: Tools, *, depth: float | None = None) -> Example:
        room = self.room(length, tools)
        keys = [KEYS[index] for index in random.permutation(len(KEYS))[: self.config.needles]]
        values: list[str] = []
        for _ in keys:
            values.append(draw(random, "numbers", tools, but=values, digits=self.config.digits))
        needles = [NEEDLE.format(key=key, value=value) for key, value in zip(keys, values, strict=True)]
        shares = random.random(len(keys))
        if depth is not None:
            shares[0] = depth
        question = QUESTION.format(key=keys[0])
        prompt = hide(needles, shares.tolist(), lambda text: text + question, room, random, tools)
        if prompt is None:
            raise DoesNotFit(self.config.name, length, length + 1)
        context = len(prompt) - len(question) - len(needles[0])
        return Example(prompt, (values[0],), prompt.index(needles[0]) / context)

    def guess(self, length: int, tools: Tools) -> float:
        """One of the 9 * 10^(digits - 1) numbers of so many digits; with several needles, one of theirs: 1 / needles."""
        if self.config.needles > 1:
            return 1 / self.config.needles
        return 1 / spread("numbers", self.config.digits)

    def solve(self, prompt: str) -> str:
        text, _, asked = prompt.rpartition("\nThe number of the ")
        found = re.search(rf"The number of the {asked.removesuffix(' is')} is (\d+)\.", text)
        return found[1] if found else ""
