"""Values that occur in the text that is trained on: an evaluation that draws none of them asks for nothing memorized.

One pass over the train split, whose result is kept in the cache. A value is found wherever it occurs, inside a longer run
of digits or letters too, as an answer is looked for in what a model says. Eight bytes a value are kept, of those only that
evaluations may ask for (`base.held_out`).
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np

from ctxlab.cache import default_cache
from ctxlab.data.corpora.base import Corpus, Document
from ctxlab.data.lock import locked
from ctxlab.data.prepare import training_text
from ctxlab.data.progress import Progress, silent
from ctxlab.data.tasks import words
from ctxlab.data.tasks.base import held_out
from ctxlab.errors import DataError

DIGITS = range(3, 19)  # of the numbers that can be asked for
# What a pattern begins with is rare: it is looked for fast, and what stands before it is looked at there.
_NUMBER = re.compile("[0-9]" * DIGITS.start + "+")
_NOUN = re.compile(r"-[A-Za-z]+")
_GROUPS = re.compile(r"-[0-9A-Fa-f]{4}-[0-9A-Fa-f]{4}-[0-9A-Fa-f]{4}-")
_UUID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")
_CHUNK = 1 << 20  # characters that are searched at once
_AT_ONCE = 1 << 20  # values that are gathered before they join those found so far


class Taken:
    """A set of values by 64-bit hashes, on disk and memory-mapped. It has every value that occurs, and may take one in
    2^64 / n others for one that does.
    """

    def __init__(self, file: Path) -> None:
        try:
            self._hashes = np.load(file, mmap_mode="r")
        except (OSError, ValueError) as error:
            raise DataError(f"paths.cache: {file} is damaged ({error}); remove it and run again") from error

    def __len__(self) -> int:
        return len(self._hashes)

    def __contains__(self, value: object) -> bool:
        wanted = _hash(str(value))
        place = int(np.searchsorted(self._hashes, wanted))
        return place < len(self._hashes) and bool(self._hashes[place] == wanted)


class TakenSomewhere:
    """What is taken in any of several texts."""

    def __init__(self, texts: Sequence[Container[str]]) -> None:
        self.texts = texts

    def __contains__(self, value: object) -> bool:
        return any(value in text for text in self.texts)


def taken_values(data: Corpus.Config, *, cache: Path | None = None, progress: Progress = silent) -> Taken:
    """The values in the training text of a corpus, from the cache or found now. Raises DataError for text that cannot be
    read.
    """
    root = default_cache() if cache is None else cache
    text = training_text(data, cache=root, progress=progress)
    kinds = hashlib.sha256(repr((DIGITS, words.adjectives(), words.nouns())).encode()).hexdigest()[:8]
    file = root / "splits" / f"{text.key}.values-{kinds}.npy"
    with locked(file):
        if not file.exists():
            advance = progress("looking for values in the training text", text.n_bytes)
            found = np.empty(0, dtype=np.uint64)
            for some in _gathered(text.documents, advance):
                found = np.union1d(found, some)
            draft = file.with_suffix(".draft.npy")
            np.save(draft, found)
            os.replace(draft, file)
    return Taken(file)


def values_in(text: str) -> Iterator[str]:
    """All numbers, words and uuids that a task may ask for and that a text has somewhere, in lower case."""
    for run in _NUMBER.findall(text):
        for start in range(len(run) - DIGITS.start + 1):
            if run[start] != "0":
                yield from (run[start : start + n] for n in DIGITS if start + n <= len(run))
    adjectives, nouns, longest = _known()
    for match in _NOUN.finditer(text):
        left, right = text[max(0, match.start() - longest) : match.start()].lower(), match[0][1:].lower()
        before = [left[start:] for start in range(len(left)) if left[start:] in adjectives]
        behind = [right[:end] for end in range(1, len(right) + 1) if right[:end] in nouns] if before else []
        yield from (f"{adjective}-{noun}" for adjective in before for noun in behind)
    for match in _GROUPS.finditer(text):
        if _UUID.fullmatch(found := text[max(0, match.start() - 8) : match.end() + 12].lower()):
            yield found


def _gathered(documents: Iterable[Document], advance: Callable[[int], None]) -> Iterator[np.ndarray]:
    """Hashes of the values that evaluations may ask for, many at a time."""
    values: set[str] = set()
    for document in documents:
        for chunk in _chunks(document.lines):
            values.update(values_in(chunk))
            advance(len(chunk.encode("utf-8", errors="surrogatepass")))
            if len(values) >= _AT_ONCE:
                yield _hashes(values)
                values.clear()
    yield _hashes(values)


def _chunks(lines: Iterable[str]) -> Iterator[str]:
    """The text in parts, cut behind lines: no value goes over a line's end."""
    part: list[str] = []
    size = 0
    for line in lines:
        part.append(line)
        size += len(line)
        if size >= _CHUNK and line.endswith("\n"):
            yield "".join(part)
            part, size = [], 0
    yield "".join(part)


def _hashes(values: set[str]) -> np.ndarray:
    return np.array([_hash(value) for value in values if held_out(value)], dtype=np.uint64)


def _hash(value: str) -> np.uint64:
    return np.uint64(int.from_bytes(hashlib.blake2b(value.lower().encode(), digest_size=8).digest(), "little"))


@lru_cache
def _known() -> tuple[frozenset[str], frozenset[str], int]:
    """Adjectives, nouns, and the letters of the longest adjective."""
    return frozenset(words.adjectives()), frozenset(words.nouns()), max(map(len, words.adjectives()))
