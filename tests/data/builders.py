"""Text, corpora in memory, and splits whose token ids are their own positions."""

from __future__ import annotations

import functools
import hashlib
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ctxlab.data.corpora.base import Corpus, Document, lines_of
from ctxlab.data.tokenizers.base import TOKENIZERS, Tokenizer
from ctxlab.data.tokens import Split

_TEXT = (
    "the of and to in a river mountain window longest context token memory small large under bright stone "
    "reading writing carried winter yellow against thousand whisper engine harbour quickly slowly never always"
)
WORDS = _TEXT.split()


def prose(seed: int, n_lines: int = 12, *, blank_every: int = 4) -> str:
    """Lines of words, a blank line after every few."""
    rng = random.Random(seed)
    lines = []
    for number in range(1, n_lines + 1):
        lines.append(" ".join(rng.choices(WORDS, k=rng.randint(3, 9))) + ".\n")
        if number % blank_every == 0:
            lines.append("\n")
    return "".join(lines)


@functools.cache
def trained(kind: str) -> Tokenizer:
    """A tokenizer of 512 pieces that learned from `prose`."""
    cls = TOKENIZERS.get(kind)
    settings = {} if kind == "byte" else {"vocab_size": 512}
    return cls.make(cls.Config(name=kind, **settings), prose(0, 600).splitlines(keepends=True))


class Pile(Corpus):
    """A corpus in memory, of (name, text)."""

    def __init__(self, documents: Sequence[tuple[str, str]]) -> None:
        super().__init__(Corpus.Config(name="pile"))
        self.texts = documents

    def fetch(self, cache: Path, progress: Any) -> None:
        pass

    def documents(self) -> Iterator[Document]:
        for name, text in self.texts:
            yield Document(name, lines_of(text))

    def facts(self) -> dict[str, Any]:
        return {"corpus": "pile"}


def pile(texts: Sequence[str]) -> Pile:
    return Pile([(f"d{number}", text) for number, text in enumerate(texts)])


def naive_labels(texts: Sequence[str]) -> list[str]:
    """Each text's split by the rule in words: by the order of the SHA-256 of their UTF-8, copies as one; at least 8 and
    5% are the test split, then at least 2 and 2.5% for validation; nothing for empty ones.
    """
    order = sorted({text for text in texts if text}, key=lambda text: hashlib.sha256(text.encode()).digest())
    n_test = max(8, round(len(order) * 0.05))
    n_validation = max(2, round(len(order) * 0.025))
    side = dict.fromkeys(order[:n_test], "test")
    side |= dict.fromkeys(order[n_test : n_test + n_validation], "validation")
    return [side.get(text, "train") if text else "empty" for text in texts]


class Ramp:
    """Token ids without a memory of their own: the id at place i is i."""

    def __init__(self, n: int) -> None:
        self.n = n

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, where: slice) -> np.ndarray:
        return np.arange(*where.indices(self.n))


def ramp(sizes: Sequence[int]) -> Split:
    """A split of documents of these sizes in tokens: the ids of a row say where it was read."""
    starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    return Split("train", Ramp(int(starts[-1])), starts, ())  # type: ignore[arg-type]
