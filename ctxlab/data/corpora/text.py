"""The user's own text: .txt, .md, .jsonl, each also .gz, by path, folder or glob, of any size."""

from __future__ import annotations

import glob
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import IO, Any, Literal

from pydantic import Field

from ctxlab.data.corpora.base import Corpus, Document, lines_of
from ctxlab.data.files import files_sha256
from ctxlab.data.progress import Progress
from ctxlab.data.source import SOURCES
from ctxlab.errors import DataError

ENDINGS = (".txt", ".md", ".jsonl")
_HALF = re.compile("[\ud800-\udfff]")  # what JSON can write and UTF-8 cannot


@SOURCES.register("text")
class Text(Corpus):
    """Files of the user's. A .txt or .md file is a document, a .jsonl file holds one a line under `field`."""

    source = "your own .txt, .md, .jsonl (.gz): data.path=PATH"

    class Config(Corpus.Config):
        name: Literal["text"] = "text"
        path: str = Field(min_length=1, description="a file, a folder, or a glob such as 'books/**/*.txt'")
        field: str = Field("text", description="the key of a .jsonl line that holds the text")

    def fetch(self, cache: Path, progress: Progress) -> None:
        for file in self._files:
            try:
                with opened(file) as stream:
                    start = stream.read(8192)
            except (OSError, EOFError, zlib.error) as error:
                raise DataError(
                    f"data.path: {file} cannot be read: {getattr(error, 'strerror', None) or error}"
                ) from error
            if b"\0" in start:
                raise DataError(f"data.path: {file} is not text (it holds zero bytes)")

    def documents(self) -> Iterator[Document]:
        for file in self._files:
            if _ending(file) == ".jsonl":
                yield from self._json_lines(file)
            else:
                yield Document(str(file), _lines(file))

    def facts(self) -> dict[str, Any]:
        """Names, sizes and times of the files: cheap for any size. The sha256 of their content joins when tokens are made."""
        return {
            "corpus": "text",
            "path": self._config.path,
            "n_files": len(self._files),
            "files_sha256": files_sha256(self._files, of=self._config.field),
        }

    @property
    def _config(self) -> Config:
        assert isinstance(self.config, Text.Config)
        return self.config

    @cached_property
    def _files(self) -> list[Path]:
        where = self._config.path
        path = Path(where).expanduser()
        if path.is_dir():
            found = [file for file in path.rglob("*") if file.is_file() and _ending(file) in ENDINGS]
            if not found:
                raise DataError(f"data.path: {where} holds no {', '.join(ENDINGS)} file (.gz too)")
        elif path.exists():
            found = [path]
        elif glob.has_magic(where):
            found = [Path(name) for name in glob.glob(str(path), recursive=True) if Path(name).is_file()]
            if not found:
                raise DataError(f"data.path: no file matches {where}")
        else:
            raise DataError(f"data.path: {where} does not exist")
        for file in found:
            if _ending(file) not in ENDINGS:
                raise DataError(f"data.path: {file} is no {', '.join(ENDINGS)} file (.gz too)")
        if all(file.stat().st_size == 0 for file in found):
            raise DataError(f"data.path: {where} is empty")
        return sorted(set(found))  # a glob with two ** finds a file twice

    def _json_lines(self, file: Path) -> Iterator[Document]:
        for number, line in enumerate(_lines(file), start=1):
            if not line.strip():
                continue
            try:
                text = json.loads(line)[self._config.field]
            except (ValueError, KeyError, TypeError) as error:
                what = f"has no '{self._config.field}'" if isinstance(error, KeyError) else "is no JSON object"
                raise DataError(f"data.path: line {number} of {file} {what}") from error
            if isinstance(text, str) and text:
                if _HALF.search(text):
                    raise DataError(f"data.path: line {number} of {file} holds half a character (a lone surrogate)")
                yield Document(f"{file}:{number}", lines_of(text))


def _ending(file: Path) -> str:
    return Path(file.name.removesuffix(".gz")).suffix


def opened(file: Path) -> IO[bytes]:
    """A file's bytes, unpacked where it is .gz."""
    return gzip.open(file, "rb") if file.suffix == ".gz" else open(file, "rb")  # type: ignore[return-value]


def _lines(file: Path) -> Iterator[str]:
    """The lines of a file, with their ends as they are in it."""
    try:
        with opened(file) as stream:
            yield from io.TextIOWrapper(stream, encoding="utf-8-sig", newline="\n")
    except UnicodeDecodeError as error:
        raise DataError(
            f"data.path: {file} is not UTF-8 text ({error.reason} at byte {error.start} of a block)"
        ) from error
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"data.path: {file} cannot be read: {getattr(error, 'strerror', None) or error}") from error
