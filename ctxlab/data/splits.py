"""Which documents are for training, validation and test: by document, never by window, and never by a seed.

Documents are put in the order of a hash of their content. The first few are the test split, the next the validation
split, the rest is trained on: renaming, moving or reordering files changes nothing, and copies of a document never
stand on two sides.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ctxlab.data.corpora.base import Corpus, Document
from ctxlab.errors import DataError

SPLITS = ("train", "validation", "test")
MIN_DOCUMENTS = 24
_PARTS = 48  # that a corpus of fewer documents is cut into
_MIN_TEST, _TEST_SHARE, _MAX_TEST = 8, 0.05, 4096
_MIN_VALIDATION, _VALIDATION_SHARE, _MAX_VALIDATION = 2, 0.025, 2048
EMPTY = 255  # label of a document without text

Ends = Literal["blank lines", "line ends"]


@dataclass(frozen=True)
class Cut:
    """How the documents of a small corpus are cut: at the first of `ends` after `n_bytes`."""

    n_bytes: int
    ends: Ends


@dataclass(frozen=True)
class Splits:
    """What one reading of a corpus tells: labels of the documents, in their order, and what pins the text."""

    cut: Cut | None
    labels: np.ndarray  # (n,) uint8: index into SPLITS, or EMPTY
    n_bytes: np.ndarray  # (n,) int64
    sha256: str  # of all documents, whatever their order and names


def split(corpus: Corpus, advance: Callable[[int], None]) -> Splits:
    """Reads a corpus once (more often when it has to be cut) and says where each document goes.

    Raises DataError when there is no text, or too little of it to be split.
    """
    cut: Cut | None = None
    digests, sizes = _scan(corpus, None, advance)
    if not sizes.sum():
        raise DataError("data: there is no text in this corpus")
    n, n_bytes = _different(digests, sizes)
    if n < MIN_DOCUMENTS:
        share = max(1, n_bytes // _PARTS)
        for cut in (Cut(share, "blank lines"), Cut(share, "line ends"), Cut(1, "line ends")):
            digests, sizes = _scan(corpus, cut, lambda _: None)
            if _different(digests, sizes)[0] >= MIN_DOCUMENTS:
                break
        else:
            raise DataError(
                f"data: {n} different document{'s' * (n > 1)} of {n_bytes} bytes cannot be cut into {MIN_DOCUMENTS} "
                f"different parts at line ends; a corpus needs {MIN_DOCUMENTS} different documents or lines"
            )
    return Splits(cut, _labels(digests, sizes), sizes, hashlib.sha256(np.sort(digests).tobytes()).hexdigest())


def documents(corpus: Corpus, cut: Cut | None) -> Iterator[Document]:
    """The documents of a corpus, cut. Read the lines of each before going on to the next."""
    for document in corpus.documents():
        if cut is None:
            yield document
        else:
            for number, lines in itertools.groupby(document.lines, key=_PartOf(cut)):
                yield Document(f"{document.name}#{number}", lines)


class _PartOf:
    """Numbers the parts of one document: called with its lines, in order."""

    def __init__(self, cut: Cut) -> None:
        self.cut = cut
        self.part = 0
        self.size = 0
        self.may_end = False

    def __call__(self, line: str) -> int:
        if self.size >= self.cut.n_bytes and self.may_end:
            self.part += 1
            self.size = 0
        self.size += len(line.encode("utf-8"))
        self.may_end = self.cut.ends == "line ends" or not line.strip()
        return self.part


def _scan(corpus: Corpus, cut: Cut | None, advance: Callable[[int], None]) -> tuple[np.ndarray, np.ndarray]:
    """A digest (16 bytes) and the size in bytes of every document."""
    digests, sizes = bytearray(), []
    for document in documents(corpus, cut):
        digest, size = hashlib.sha256(), 0
        for line in document.lines:
            data = line.encode("utf-8", errors="surrogatepass")
            digest.update(data)
            size += len(data)
        digests += digest.digest()[:16]
        sizes.append(size)
        advance(size)
    return np.frombuffer(bytes(digests), dtype="S16"), np.array(sizes, dtype=np.int64)


def _different(digests: np.ndarray, sizes: np.ndarray) -> tuple[int, int]:
    """How many different documents with text there are, and their bytes together."""
    filled = sizes > 0
    unique, first = np.unique(digests[filled], return_index=True)
    return len(unique), int(sizes[filled][first].sum())


def _labels(digests: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    labels = np.full(len(sizes), EMPTY, dtype=np.uint8)
    unique, copy_of = np.unique(digests[sizes > 0], return_inverse=True)  # in the order of the digests
    n = len(unique)
    n_test = min(max(_MIN_TEST, round(_TEST_SHARE * n)), _MAX_TEST)
    n_validation = min(max(_MIN_VALIDATION, round(_VALIDATION_SHARE * n)), _MAX_VALIDATION)
    by_rank = np.zeros(n, dtype=np.uint8)
    by_rank[:n_test] = SPLITS.index("test")
    by_rank[n_test : n_test + n_validation] = SPLITS.index("validation")
    labels[sizes > 0] = by_rank[copy_of]
    return labels
