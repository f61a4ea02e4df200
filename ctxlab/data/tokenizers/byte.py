"""Bytes: every byte of the UTF-8 text is a token."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

from ctxlab.data.tokenizers.base import TOKENIZERS, Tokenizer

_SPECIAL = 4  # pad, bos, eos, mask: the ids that a trained tokenizer has too


@TOKENIZERS.register("byte")
class Byte(Tokenizer):
    """Id 4 + b is byte b (as in ByT5, Xue et al. 2022, arXiv:2105.13626); ids 0 to 3 are pad, bos, eos and mask."""

    source = "bytes of UTF-8, nothing to train"

    class Config(Tokenizer.Config):
        name: Literal["byte"] = "byte"

    def __init__(self, config: Config) -> None:
        pieces = [b""] * _SPECIAL + [bytes([b]) for b in range(256)]
        super().__init__(config, pieces, pad=0, bos=1, eos=2, mask=3)

    @classmethod
    def make(cls, config: Any, sample: Iterable[str]) -> Byte:
        return cls(config)

    def encode_lines(self, lines: Sequence[str]) -> list[list[int]]:
        return [[b + _SPECIAL for b in line.encode("utf-8")] for line in lines]

    def files(self) -> dict[str, bytes]:
        return {}

    @classmethod
    def restore(cls, config: Any, files: dict[str, bytes]) -> Byte:
        return cls(config)
