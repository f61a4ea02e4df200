"""What a corpus is: named documents, each a stream of lines, and a fingerprint that tells one state of it from another."""

from __future__ import annotations

import io
from abc import abstractmethod
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from pydantic import Field

from ctxlab.data.source import Source


class Document(NamedTuple):
    """One document. `lines` are its text cut anywhere after newlines; joined they are the text. Read them once."""

    name: str
    lines: Iterable[str]


def lines_of(text: str) -> Iterable[str]:
    """The lines of a document that is in memory, cut after newlines only: `splitlines` cuts at U+2028 and others, too."""
    return io.StringIO(text, newline="\n")


class Corpus(Source):
    """Text as documents in a fixed order. Nothing here holds more than a line's worth of it."""

    config: Config

    class Config(Source.Config):
        packed: bool = Field(False, description="rows of several documents, kept apart segment by segment")

        @property
        def packs(self) -> bool:
            return self.packed

    @abstractmethod
    def documents(self) -> Iterator[Document]:
        """All documents, in an order that is the same every time. Raises DataError for text that cannot be read."""

    @abstractmethod
    def facts(self) -> dict[str, Any]:
        """What pins this state of the text, cheap to find: the identity of the token cache, and part of the record."""
