"""ListOps: nested operations on digits, read as one long sequence, whose value is a digit."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import numpy as np
from pydantic import Field

from ctxlab.data.source import SOURCES
from ctxlab.data.tasks.base import DoesNotFit, TokenRow, TokenTask, generator
from ctxlab.data.windows import IGNORED
from ctxlab.errors import DataError

# Numbers 0 to 9 are digits, then the four operations, then what closes one.
_OPERATIONS: dict[int, Callable[[list[int]], int]] = {
    10: min, 11: max, 12: lambda values: int(np.median(values)), 13: lambda values: sum(values) % 10,
}  # fmt: skip
_END = 14
_TRIES = 100_000
_SAMPLE = 512


@SOURCES.register("task/listops")
class ListOps(TokenTask):
    """[MAX 2 9 [MIN 4 7 ] 0 ] = 9, in tokens; what comes out behind the last is the value (Tay et al. 2021, Long Range Arena,
    arXiv:2011.04006, section 2.2.1).

    A node is an operation (MIN, MAX, MED, the median cut to a whole number, or SM, the sum modulo 10) with probability
    0.25 where it is less than `depth` deep, else a digit; an operation has 2 to 10 arguments. As in LRA's own generator, drawn
    again until an expression has between `shortest` of the length and the length, counting digits, operations and ends.
    LRA draws without a seed and from an unordered set; here an example is a function of its key.
    """

    paper = "Tay et al. 2021, Long Range Arena, arXiv:2011.04006"
    source = "made here: nested MIN, MAX, MED and SM of digits"

    class Config(TokenTask.Config):
        name: Literal["task/listops"] = "task/listops"
        depth: int = Field(10, ge=2, description="levels of nesting, at most")
        arguments: int = Field(10, ge=2, description="of an operation, at most")
        shortest: float = Field(0.25, gt=0, lt=1, description="tokens of the shortest example, of the longest's")

    config: Config

    @property
    def vocab_size(self) -> int:
        return _END + 1

    def row(self, random: np.random.Generator, length: int, epoch: int | None) -> TokenRow:
        tokens, value = next(self._drawn(random, length))
        targets = np.full(len(tokens), IGNORED)
        targets[-1] = value
        return TokenRow(np.array(tokens, dtype=np.int64), targets)

    def _drawn(self, random: np.random.Generator, length: int) -> Iterator[tuple[list[int], int]]:
        """Expressions of the right length with their values, out of a number of draws. Raises DataError where none is."""
        if length < 4:
            raise DoesNotFit(self.label, length, 4)
        least = max(4, int(length * self.config.shortest))
        found = False
        for _ in range(_TRIES):
            tokens: list[int] = []
            value = self._grow(random, tokens, 1, length)
            if value is not None and least <= len(tokens):
                found = True
                yield tokens, value
        if not found:
            raise DataError(
                f"listops: {_TRIES} drawn expressions of depth {self.config.depth} and none with {least} to {length} tokens; "
                "raise data.depth or data.arguments"
            )

    def _grow(self, random: np.random.Generator, tokens: list[int], depth: int, most: int) -> int | None:
        """Appends one node to `tokens` and returns its value; None where there is no room."""
        if depth >= self.config.depth or random.random() >= 0.25:
            digit = int(random.integers(0, 10))
            tokens.append(digit)
            return digit if len(tokens) <= most else None
        operation = int(random.integers(10, _END))
        tokens.append(operation)
        values = []
        for _ in range(int(random.integers(2, self.config.arguments + 1))):
            value = self._grow(random, tokens, depth + 1, most)
            if value is None:
                return None
            values.append(value)
        tokens.append(_END)
        return _OPERATIONS[operation](values) if len(tokens) <= most else None

    def guess(self, length: int) -> float:
        """The share of the commonest value among 512 examples of this length, or fewer where they are rare."""
        drawn = itertools.islice(self._drawn(generator("listops", length), length), _SAMPLE)
        values = Counter(value for _, value in drawn)
        return max(values.values()) / values.total()

    def solve(self, tokens: Sequence[int]) -> list[int]:
        stack: list[list[int]] = [[]]
        operations: list[int] = []
        for token in tokens:
            if token == _END:
                stack[-2].append(_OPERATIONS[operations.pop()](stack.pop()))
            elif token in _OPERATIONS:
                operations.append(token)
                stack.append([])
            else:
                stack[-1].append(token)
        return [IGNORED] * (len(tokens) - 1) + [stack[0][0]]
