"""What training data may be: a corpus of text, a task that makes its examples, pairs of sentences, or what people have labelled.
`data=NAME` picks one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

from pydantic import Field

from ctxlab.data.progress import Progress
from ctxlab.registry import ComponentConfig, Registry


class Source(ABC):
    """Where training rows come from. Its kinds are `Corpus`, `Task`, `Parallel`, `Squad` and `Classification`."""

    source: ClassVar[str] = ""
    """Where it comes from, for `ctxlab list`."""

    implies: ClassVar[Mapping[str, str]] = {}
    """group -> the option that a line means by choosing this data, unless it says otherwise."""

    scored_by: ClassVar[str] = ""
    """The one evaluation that goes with it, where there is one. Its examples are as long as they are: a step reads as many of
    them as fill its tokens."""

    class Config(ComponentConfig):
        name: str
        workers: int = Field(0, ge=0, description="processes that read batches; 0: the training process itself",
                             json_schema_extra={"identity": False})  # fmt: skip

        @property
        def packs(self) -> bool:
            """Whether a row holds several documents, kept apart."""
            return False

    def __init__(self, config: Config) -> None:
        self.config = config

    @abstractmethod
    def fetch(self, cache: Path, progress: Progress) -> None:
        """Makes sure that what it reads is on this machine. Raises DataError in one line when it cannot be."""


SOURCES: Registry[Source] = Registry(
    "data", "ctxlab.data.corpora", "ctxlab.data.tasks", "ctxlab.data.pairs", "ctxlab.data.labelled"
)
