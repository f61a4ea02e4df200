"""Multi-query associative recall: pairs of keys and values, then some of the keys again, far or near."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import numpy as np
from pydantic import Field, model_validator

from ctxlab.data.source import SOURCES
from ctxlab.data.tasks.base import DoesNotFit, TokenRow, TokenTask
from ctxlab.data.windows import IGNORED


@SOURCES.register("task/mqar")
class MQAR(TokenTask):
    """k1 v1 ... kp vp, then every key once more; what comes out there is its value (Arora et al. 2024, Zoology,
    arXiv:2312.04927, section 3 and appendix).

    Keys are p different numbers of 1 to V/2 - 1, values p different ones of V/2 to V - 1 (V/2 rounded down). Behind the
    pairs are (n - 2p) / 2 places two tokens apart; the keys take p of them, drawn without replacement with a probability
    in proportion to a g^(a - 1) at the g-th, so most stand near. Everything else is 0. The values are never read as inputs
    there: nothing of an answer can be seen in what follows.
    """

    paper = "Arora et al. 2024, Zoology, arXiv:2312.04927"
    source = "made here: pairs of keys and values, then the keys again"

    class Config(TokenTask.Config):
        name: Literal["task/mqar"] = "task/mqar"
        vocab_size: int = Field(128, ge=8, description="numbers there are; the lower half are keys")
        pairs: tuple[Annotated[int, Field(ge=1)], ...] = Field(
            (4, 8, 16),
            min_length=1,
            description="in each epoch of training; the last in all that follow and in evaluation",
        )
        power: float = Field(0.01, gt=0, le=1, description="a: 1 spreads the queries evenly, near 0 most are near")

        @model_validator(mode="after")
        def _enough(self) -> MQAR.Config:
            keys = self.vocab_size // 2 - 1
            if max(self.pairs) > keys:
                raise ValueError(
                    f"pairs ({max(self.pairs)}) must be at most {keys}, the keys of vocab_size {self.vocab_size}"
                )
            return self

    config: Config

    @property
    def vocab_size(self) -> int:
        return self.config.vocab_size

    def row(self, random: np.random.Generator, length: int, epoch: int | None) -> TokenRow:
        pairs = self.config.pairs[-1 if epoch is None else min(epoch, len(self.config.pairs) - 1)]
        if length < 4 * pairs:
            raise DoesNotFit(self.label, length, 4 * pairs)
        half = self.vocab_size // 2
        keys = random.choice(np.arange(1, half), pairs, replace=False)
        values = random.choice(np.arange(half, self.vocab_size), pairs, replace=False)
        places = (length - 2 * pairs) // 2
        odds = np.arange(1, places + 1) ** (self.config.power - 1.0)
        queries = 2 * pairs + 2 * random.choice(places, pairs, replace=False, p=odds / odds.sum())
        tokens = np.zeros(length, dtype=np.int64)
        tokens[0 : 2 * pairs : 2], tokens[1 : 2 * pairs : 2] = keys, values
        targets = np.full(length, IGNORED)
        tokens[queries], targets[queries] = keys, values
        return TokenRow(tokens, targets)

    def guess(self, length: int) -> float:
        """1 / p: whoever knows the values at hand, but not whose they are."""
        return 1 / self.config.pairs[-1]

    def solve(self, tokens: Sequence[int]) -> list[int]:
        value_of: dict[int, int] = {}
        answers = []
        for here, following in zip(tokens, [*tokens[1:], 0]):
            answers.append(value_of.get(here, IGNORED))
            if here and following >= self.vocab_size // 2:
                value_of.setdefault(here, following)
        return answers
