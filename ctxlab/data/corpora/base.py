"""What a corpus is: named documents, each a stream of lines, and a fingerprint that tells one state of it from another."""

from __future__ import annotations

import io
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from pydantic import Field

from ctxlab.data.progress import Progress
from ctxlab.registry import ComponentConfig, Registry


class Document(NamedTuple):
    """One document. `lines` are its text cut anywhere after newlines; joined they are the text. Read them once."""

    name: str
    lines: Iterable[str]


def lines_of(text: str) -> Iterable[str]:
    """The lines of a document that is in memory, cut after newlines only: `splitlines` cuts at U+2028 and others, too."""
    return io.StringIO(text, newline="\n")


class Corpus(ABC):
    """Text as documents in a fixed order. Nothing here holds more than a line's worth of it."""

    source: ClassVar[str] = ""
    """Where it comes from, for `ctxlab list`."""

    class Config(ComponentConfig):
        name: str
        packed: bool = Field(False, description="rows of several documents, kept apart segment by segment")
        workers: int = Field(0, ge=0, description="processes that read batches; 0: the training process itself",
                             json_schema_extra={"identity": False})  # fmt: skip

    def __init__(self, config: Config) -> None:
        self.config = config

    @abstractmethod
    def fetch(self, cache: Path, progress: Progress) -> None:
        """Makes sure that the text is on this machine. Raises DataError in one line when it cannot be."""

    @abstractmethod
    def documents(self) -> Iterator[Document]:
        """All documents, in an order that is the same every time. Raises DataError for text that cannot be read."""

    @abstractmethod
    def facts(self) -> dict[str, Any]:
        """What pins this state of the text, cheap to find: the identity of the token cache, and part of the record."""


CORPORA: Registry[Corpus] = Registry("data", "ctxlab.data.corpora")
