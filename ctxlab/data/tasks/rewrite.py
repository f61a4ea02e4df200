"""Copy, reverse, repeat: sequences to be written again, trained at short lengths and asked for at longer ones."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Literal

import numpy as np
from pydantic import Field

from ctxlab.data.source import SOURCES
from ctxlab.data.tasks.base import DoesNotFit, TokenRow, TokenTask
from ctxlab.data.windows import IGNORED


class Rewrite(TokenTask):
    """n symbols, a separator, then what they become, and an end (Kazemnejad et al. 2023, arXiv:2305.19466, section 3).

    An example of `length` tokens has n = (length - 1) / 2 symbols in evaluation, any number up to that in training. It is
    right when greedy generation from the separator on gives every symbol and the end.
    """

    paper = "Kazemnejad et al. 2023, arXiv:2305.19466"
    generated = True

    class Config(TokenTask.Config):
        symbols: int = Field(32, ge=2, description="different symbols; separator and end are two more numbers")

    config: Config

    @property
    def vocab_size(self) -> int:
        return self.config.symbols + 2

    @abstractmethod
    def draw(self, random: np.random.Generator, n: int) -> np.ndarray:
        """n symbols to be written again."""

    @abstractmethod
    def becomes(self, symbols: np.ndarray) -> np.ndarray: ...

    def row(self, random: np.random.Generator, length: int, epoch: int | None) -> TokenRow:
        longest = (length - 1) // 2
        if longest < 1:
            raise DoesNotFit(self.label, length, 3)
        n = longest if epoch is None else int(random.integers(1, longest + 1))
        symbols = self.draw(random, n)
        separator, end = self.config.symbols, self.config.symbols + 1
        whole = np.concatenate([symbols, [separator], self.becomes(symbols), [end]])
        targets = whole[1:].copy()
        targets[:n] = IGNORED  # the symbols themselves are random
        return TokenRow(whole[:-1], targets)

    def guess(self, length: int) -> float:
        """1 / symbols^n."""
        return float(self.config.symbols) ** -((length - 1) // 2)

    def solve(self, tokens: Sequence[int]) -> list[int]:
        n = list(tokens).index(self.config.symbols)
        answer = self.becomes(np.array(tokens[:n]))
        return [IGNORED] * n + [*answer.tolist(), self.config.symbols + 1]


@SOURCES.register("task/copy")
class Copy(Rewrite):
    """Random symbols, the same again."""

    source = "made here: random symbols to be copied"

    class Config(Rewrite.Config):
        name: Literal["task/copy"] = "task/copy"

    def draw(self, random: np.random.Generator, n: int) -> np.ndarray:
        return random.integers(0, self.config.symbols, n)

    def becomes(self, symbols: np.ndarray) -> np.ndarray:
        return symbols


@SOURCES.register("task/reverse")
class Reverse(Copy):
    """Random symbols, from the last to the first."""

    source = "made here: random symbols to be written backwards"

    class Config(Rewrite.Config):
        name: Literal["task/reverse"] = "task/reverse"

    def becomes(self, symbols: np.ndarray) -> np.ndarray:
        return symbols[::-1]


@SOURCES.register("task/repeat")
class Repeat(Copy):
    """One symbol n times, and n times again: only the count has to be kept."""

    source = "made here: one symbol many times, to be copied as often"

    class Config(Rewrite.Config):
        name: Literal["task/repeat"] = "task/repeat"

    def draw(self, random: np.random.Generator, n: int) -> np.ndarray:
        return np.full(n, random.integers(0, self.config.symbols))

    def guess(self, length: int) -> float:
        """1 / n: the symbol can be seen; how often cannot."""
        return 1 / ((length - 1) // 2)
