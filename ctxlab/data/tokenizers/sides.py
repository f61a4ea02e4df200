"""The tokenizers of a run: one, or with sources that have tokens of their own, two. How they are kept and found again."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ctxlab.data.tokenizers.base import Tokenizer, load_tokenizer

TARGET, SOURCE = "tokenizer", "source_tokenizer"
"""Folders: of what is written, and of all that is read where there is one; of sources, where they have their own."""


@dataclass(frozen=True)
class Tokenizers:
    """`source` is `target` itself where both sides have the same tokens."""

    source: Tokenizer
    target: Tokenizer

    @classmethod
    def joint(cls, tokenizer: Tokenizer) -> Tokenizers:
        """One for both sides."""
        return cls(tokenizer, tokenizer)

    @property
    def apart(self) -> bool:
        return self.source is not self.target

    def with_sentinels(self, number: int) -> Tokenizers:
        """The same tokens, and as many of T5's sentinels."""
        target = self.target.with_sentinels(number)
        return Tokenizers(self.source.with_sentinels(number) if self.apart else target, target)

    def save(self, folder: Path) -> None:
        """Writes them below `folder`; `load_tokenizers` reads them back."""
        self.target.save(folder / TARGET)
        if self.apart:
            self.source.save(folder / SOURCE)

    def facts(self) -> dict[str, Any]:
        """What a record says of them."""
        named = {TARGET: self.target} | ({SOURCE: self.source} if self.apart else {})
        return {
            key: {"name": one.config.name, "vocab_size": one.vocab_size, "sha256": one.sha256}
            for key, one in named.items()
        }


def load_tokenizers(folder: Path, *, apart: bool) -> Tokenizers:
    """What `Tokenizers.save` wrote. Raises DataError where it is not whole."""
    target = load_tokenizer(folder / TARGET)
    return Tokenizers(load_tokenizer(folder / SOURCE) if apart else target, target)


def are_apart(config: dict[str, Any]) -> bool:
    """Whether the tokenizer settings of a config ask for one of sources and one of targets."""
    return bool(config.get("separate", False))
