"""Induction: a stretch of random tokens again and again; what followed a token before follows it once more."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from pydantic import Field, model_validator

from ctxlab.data.source import SOURCES
from ctxlab.data.tasks.base import DoesNotFit, TokenRow, TokenTask
from ctxlab.data.windows import IGNORED


@SOURCES.register("task/induction")
class Induction(TokenTask):
    """A prefix, then a period of different tokens repeated to the end; scored from the second time on (Olsson et al. 2022,
    In-context Learning and Induction Heads, arXiv:2209.11895).

    The length of the period and of the prefix are drawn anew for every example: with fixed ones a single layer can look
    back by a constant distance. Prefix and period have no token in common, so there is one right answer.
    """

    paper = "Olsson et al. 2022, arXiv:2209.11895"
    source = "made here: a random stretch, repeated"

    class Config(TokenTask.Config):
        name: Literal["task/induction"] = "task/induction"
        vocab_size: int = Field(64, ge=4, description="numbers there are")
        shortest: int = Field(16, ge=2, description="tokens of the shortest period")
        longest: int = Field(31, ge=2, description="tokens of the longest period")

        @model_validator(mode="after")
        def _enough(self) -> Induction.Config:
            if not self.shortest <= self.longest < self.vocab_size:
                raise ValueError(
                    f"shortest ({self.shortest}), longest ({self.longest}) and vocab_size ({self.vocab_size}) must rise "
                    "in this order"
                )
            return self

    config: Config

    @property
    def vocab_size(self) -> int:
        return self.config.vocab_size

    def row(self, random: np.random.Generator, length: int, epoch: int | None) -> TokenRow:
        smallest = 2 * self.config.shortest
        if length < smallest:
            raise DoesNotFit(self.label, length, smallest)
        period = int(random.integers(self.config.shortest, min(self.config.longest, length // 2) + 1))
        before = int(random.integers(0, min(length - 2 * period, self.config.longest) + 1))
        numbers = random.permutation(self.vocab_size)
        repeated, others = numbers[:period], numbers[period:]
        times = -(-(length + 1 - before) // period)
        whole = np.concatenate([random.choice(others, before), np.tile(repeated, times)])[: length + 1]
        targets = np.full(length, IGNORED)
        targets[before + period :] = whole[before + period + 1 :]
        return TokenRow(whole[:-1], targets)

    def guess(self, length: int) -> float:
        """What counting alone reaches, at best: of a period of p tokens, p - k have not come in this round behind its k-th,
        and p - 1 may begin the next one. So (1/(p - 1) + 1/(p - 2) + ... + 1 + 1/(p - 1)) / p over a whole round: far more
        than 1/p. The mean over the lengths of period and prefix.
        """
        shares = []
        for period in range(self.config.shortest, min(self.config.longest, length // 2) + 1):
            hits = 1 / np.array([*range(period - 1, 0, -1), period - 1])
            before = range(min(length - 2 * period, self.config.longest) + 1)
            shares.append(np.mean([np.resize(hits, length - period - n).mean() for n in before]))
        return float(np.mean(shares))

    def solve(self, tokens: Sequence[int]) -> list[int]:
        follows: dict[int, int] = {}
        seen: dict[int, int] = {}
        answers = []
        for place, (here, following) in enumerate(zip(tokens, [*tokens[1:], IGNORED])):
            # A token that comes again after something else than before is of the prefix, where nothing is repeated yet.
            known = follows.get(here, IGNORED)
            answers.append(known if place - seen.get(here, place) >= self.config.shortest else IGNORED)
            follows[here] = following
            seen[here] = place
        return answers
