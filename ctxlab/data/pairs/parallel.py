"""Pairs of sentences in two languages, out of files of the user's."""

from __future__ import annotations

import hashlib
import heapq
import io
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import ClassVar, Literal, NamedTuple

import numpy as np
from pydantic import Field

from ctxlab.data.corpora.text import opened
from ctxlab.data.files import FileSource
from ctxlab.data.progress import Progress
from ctxlab.data.source import SOURCES, Source
from ctxlab.errors import DataError
from ctxlab.fields import OrNone

TEST_SHARE, VALIDATION_SHARE = 0.01, 0.005  # of the sentences that are held out by
MOST_TEST, MOST_VALIDATION = 4096, 2048
FEWEST = 8  # different sentences that a part needs


class Pair(NamedTuple):
    """A sentence and its translation."""

    source: str
    target: str


@SOURCES.register("parallel")
class Parallel(FileSource):
    """Sentence pairs: a file of columns with tabs between them, or two files whose lines belong together."""

    source = "your own sentence pairs, .tsv or two text files (.gz): data.path=PATH"
    implies: ClassVar[Mapping[str, str]] = {"eval": "[translation]", "objective": "seq2seq"}
    scored_by = "translation"
    where_from = (
        "a file of sentence pairs, one a line with a tab between (.gz too): English-French ones, for instance, are fra.txt in "
        "fra-eng.zip of manythings.org/anki (Tatoeba, CC-BY 2.0)"
    )
    file_settings = ("path", "target_path")

    class Config(Source.Config):
        name: Literal["parallel"] = "parallel"
        path: OrNone | str = Field("none", description="a file of pairs, one a line with a tab between; or the sources")
        target_path: OrNone | str = Field(
            "none", description="the translations of the lines of `path`, in a file apart"
        )
        source_column: int = Field(1, ge=1, description="which column is translated; with one file")
        target_column: int = Field(2, ge=1, description="which column it is translated to")
        exclude: tuple[str, ...] = Field(
            (), description="sentences left out, with their pairs, on whichever side they are"
        )
        held_out_by: Literal["source", "target"] = Field(
            "target", description="no sentence of this side is both trained on and tested"
        )

    config: Config

    def fetch(self, cache: Path, progress: Progress) -> None:
        self.require_files()
        if "target_path" not in self.files and self.config.source_column == self.config.target_column:
            raise DataError(f"data.target_column: column {self.config.target_column} is the source's own")
        next(self.pairs(), None)  # says what is wrong with the first line

    def pairs(self) -> Iterator[Pair]:
        """All pairs but those excluded, in the files' order. Raises DataError at a line that is none."""
        excluded = {plain(sentence) for sentence in self.config.exclude}
        for pair in self._apart() if self.config.target_path != "none" else self._columns():
            if not pair.source or not pair.target:
                continue
            if excluded and (plain(pair.source) in excluded or plain(pair.target) in excluded):
                continue
            yield pair

    def _columns(self) -> Iterator[Pair]:
        file = self.files["path"]
        source, target = self.config.source_column - 1, self.config.target_column - 1
        for number, line in enumerate(file_lines("path", file), start=1):
            columns = line.split("\t")
            if len(columns) <= max(source, target):
                if not line.strip():
                    continue
                raise DataError(
                    f"data.path: line {number} of {file} has {len(columns)} column{'s' * (len(columns) > 1)} between tabs, "
                    f"and column {max(source, target) + 1} is asked for"
                )
            yield Pair(columns[source].strip(), columns[target].strip())

    def _apart(self) -> Iterator[Pair]:
        sources, targets = (file_lines(key, file) for key, file in self.files.items())
        done = object()
        for number, source in enumerate(sources, start=1):
            target = next(targets, done)
            if not isinstance(target, str):
                raise DataError(f"data.target_path: {self.files['target_path']} ends before line {number} of the other")
            yield Pair(source.strip(), target.strip())
        if next(targets, done) is not done:
            raise DataError(f"data.path: {self.files['path']} ends before {self.files['target_path']} does")


class HeldOut(NamedTuple):
    """Up to which value of its hash a sentence is tested, and up to which it is validated on."""

    test: int
    validation: int

    def part(self, sentence: str) -> str:
        """The split of the pairs that hold this sentence on the side that is held out by."""
        value = sentence_hash(sentence)
        return "test" if value <= self.test else "validation" if value <= self.validation else "train"


def held_out(sentences: Iterable[str]) -> HeldOut:
    """The sentences with the smallest hashes are held out, the same whatever the order, the copies and the seed.

    Raises DataError where there are too few different ones.
    """
    seen = np.unique(np.fromiter((sentence_hash(sentence) for sentence in sentences), dtype=np.uint64))
    test, validation = (
        int(min(max(FEWEST, share * len(seen)), most))
        for share, most in ((TEST_SHARE, MOST_TEST), (VALIDATION_SHARE, MOST_VALIDATION))
    )
    if len(seen) < 4 * (test + validation):
        raise DataError(
            f"data.path: {len(seen)} different sentences are too few to hold some out; {4 * 2 * FEWEST} are enough"
        )
    lowest = heapq.nsmallest(test + validation, seen.tolist())
    return HeldOut(lowest[test - 1], lowest[-1])


def sentence_hash(sentence: str) -> int:
    """64 bits of a sentence, of whatever case, spaces and final punctuation."""
    return int.from_bytes(hashlib.blake2b(plain(sentence).encode(), digest_size=8).digest(), "big")


def plain(sentence: str) -> str:
    """A sentence without what makes no other sentence of it: case, spaces, and punctuation at its end."""
    return re.sub(r"\s+", " ", sentence).strip(" .!?\u2026").casefold()


def file_lines(key: str, file: Path) -> Iterator[str]:
    """Lines without their ends, of the file that `data.key` names. Raises DataError, one line, where they are no text."""
    try:
        with opened(file) as stream:
            for line in io.TextIOWrapper(stream, encoding="utf-8-sig", newline="\n"):
                yield line.rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise DataError(f"data.{key}: {file} is not UTF-8 text ({error.reason})") from error
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"data.{key}: {file} cannot be read: {getattr(error, 'strerror', None) or error}") from error
