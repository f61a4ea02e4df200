"""Numbers as tokens: what tasks in numbers speak."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

from ctxlab.data.tokenizers.base import TOKENIZERS, Tokenizer
from ctxlab.errors import DataError

_SIZE = "size"


@TOKENIZERS.register("ids")
class Ids(Tokenizer):
    """Token i is the number i, for as many as the task has; pad, bos and eos come behind them. Text is "17 4 99 "."""

    source = "the numbers of a task (data=task/...), nothing to train"

    class Config(Tokenizer.Config):
        name: Literal["ids"] = "ids"

    def __init__(self, config: Config, size: int) -> None:
        self.size = size
        pieces = [f"{i} ".encode() for i in range(size)] + [b""] * 3
        super().__init__(config, pieces, pad=size, bos=size + 1, eos=size + 2)

    @classmethod
    def make(cls, config: Any, sample: Iterable[str]) -> Ids:
        raise DataError("tokenizer: ids are for tasks in numbers; text needs unigram, bpe, byte or file")

    def encode_lines(self, lines: Sequence[str]) -> list[list[int]]:
        return [[self._number(word) for word in line.split()] for line in lines]

    def files(self) -> dict[str, bytes]:
        return {_SIZE: str(self.size).encode()}

    @classmethod
    def restore(cls, config: Any, files: dict[str, bytes]) -> Ids:
        return cls(config, int(files[_SIZE]))

    def _number(self, word: str) -> int:
        if word.isdecimal() and int(word) < self.size:
            return int(word)
        raise DataError(f"tokenizer: expected numbers from 0 to {self.size - 1}, got '{word}'")
