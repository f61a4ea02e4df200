"""Python's own library, as source text: a corpus that every machine has."""

from __future__ import annotations

import hashlib
import platform
import sysconfig
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from ctxlab.data.corpora.base import Corpus, Document, lines_of
from ctxlab.data.progress import Progress
from ctxlab.data.source import SOURCES
from ctxlab.errors import DataError

_LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "lib2to3", "ensurepip"}


@SOURCES.register("stdlib")
class Stdlib(Corpus):
    """The .py files of the running Python's standard library, without tests; version and content hash in the record."""

    source = "source of Python's standard library, from this machine"

    class Config(Corpus.Config):
        name: Literal["stdlib"] = "stdlib"

    def fetch(self, cache: Path, progress: Progress) -> None:
        if not self._files:
            raise DataError(f"data: there is no Python source in {sysconfig.get_path('stdlib')}; use data=text")

    def documents(self) -> Iterator[Document]:
        root = Path(sysconfig.get_path("stdlib"))
        for file in self._files:
            text = file.read_text(encoding="utf-8", errors="replace")
            if text:
                yield Document(str(file.relative_to(root)), lines_of(text))

    def facts(self) -> dict[str, Any]:
        return {"corpus": "stdlib", "version": f"Python {platform.python_version()}", "sha256": self._sha256}

    @cached_property
    def _files(self) -> list[Path]:
        root = Path(sysconfig.get_path("stdlib"))
        files = (file for file in root.rglob("*.py") if not _LEFT_OUT & set(file.relative_to(root).parts))
        return sorted(file for file in files if file.is_file())

    @cached_property
    def _sha256(self) -> str:
        digest = hashlib.sha256()
        for file in self._files:
            digest.update(file.name.encode() + b"\0" + file.read_bytes())
        return digest.hexdigest()
