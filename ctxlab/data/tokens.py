"""Documents to token ids on disk: encoded in parallel, written as they come, read back as memory maps.

A folder holds, for each split, SPLIT.bin (ids, one document behind the other, each bos, tokens, eos), SPLIT.starts.npy
(where each begins, and the end of the last), and for validation and test SPLIT.names.json.
"""

from __future__ import annotations

import json
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ctxlab.cores import available_cores
from ctxlab.data.corpora.base import Document
from ctxlab.data.splits import EMPTY, SPLITS
from ctxlab.data.tokenizers.base import Tokenizer, load_tokenizer

_CHUNK = 1 << 19  # characters of one piece of work
_ALONE = 16 << 20  # bytes of text up to which starting processes takes longer than they save
_QUEUE = 4  # pieces of work under way a process
_NAMED = ("validation", "test")  # splits whose documents results name


@dataclass(frozen=True)
class Split:
    """The documents of one split, memory-mapped."""

    name: str
    tokens: np.ndarray  # (n_tokens,) uint16 or uint32
    starts: np.ndarray  # (n_documents + 1,) int64
    names: Sequence[str]  # of the documents; empty for the train split

    @property
    def n_documents(self) -> int:
        return len(self.starts) - 1

    @property
    def sizes(self) -> np.ndarray:
        """Tokens of each document, bos and eos included, (n_documents,)."""
        return np.diff(self.starts)

    def document(self, index: int) -> np.ndarray:
        return self.tokens[self.starts[index] : self.starts[index + 1]]


class _Piece(NamedTuple):
    """Lines of one document that are encoded together."""

    lines: list[str]
    ends: bool  # the document ends here


def write_tokens(
    folder: Path,
    documents: Iterable[Document],
    labels: np.ndarray,
    tokenizer: Tokenizer,
    saved: Path,
    *,
    n_bytes: int,
    advance: Callable[[int], None],
) -> None:
    """Encodes all documents into `folder`. `labels` says each document's split; `saved` is the tokenizer's own folder."""
    dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
    with ExitStack() as stack:
        files = [stack.enter_context(open(folder / f"{name}.bin", "wb")) for name in SPLITS]
        starts: list[list[int]] = [[0] for _ in SPLITS]
        names: list[list[str]] = [[] for _ in SPLITS]
        edges = np.array([[tokenizer.bos_id], [tokenizer.eos_id]], dtype=dtype)
        index, size = 0, 0
        for document, piece, ids in _encoded(documents, labels, tokenizer, saved, dtype, n_bytes):
            label = int(labels[index])
            if label != EMPTY:
                parts = [edges[0]] if not size else []
                parts += [ids, edges[1]] if piece.ends else [ids]
                for part in parts:
                    files[label].write(part.tobytes())
                size += sum(len(part) for part in parts)
            if piece.ends:
                if label != EMPTY:
                    starts[label].append(starts[label][-1] + size)
                    if SPLITS[label] in _NAMED:
                        names[label].append(document)
                index, size = index + 1, 0
            advance(int(tokenizer.token_bytes[ids].sum()))
        for file in files:
            file.flush()
            os.fsync(file.fileno())
    for name, where, called in zip(SPLITS, starts, names, strict=True):
        np.save(folder / f"{name}.starts.npy", np.array(where, dtype=np.int64))
        if name in _NAMED:
            (folder / f"{name}.names.json").write_text(json.dumps(called, ensure_ascii=False), encoding="utf-8")


def read_split(folder: Path, name: str, vocab_size: int) -> Split:
    """One split of a folder that `write_tokens` filled."""
    starts = np.load(folder / f"{name}.starts.npy", mmap_mode="r")
    dtype = np.uint16 if vocab_size <= 1 << 16 else np.uint32
    file = folder / f"{name}.bin"
    tokens = np.memmap(file, dtype=dtype, mode="r") if file.stat().st_size else np.empty(0, dtype=dtype)
    if len(tokens) != starts[-1]:
        raise ValueError(f"{file.name} holds {len(tokens)} tokens, its documents have {starts[-1]}")
    names = json.loads((folder / f"{name}.names.json").read_text(encoding="utf-8")) if name in _NAMED else ()
    return Split(name, tokens, starts, names)


def _pieces(documents: Iterable[Document], labels: np.ndarray) -> Iterator[tuple[str, _Piece]]:
    """Work in document order; documents without text have one empty piece."""
    for document, label in zip(documents, labels, strict=True):
        lines: list[str] = []
        size = 0
        for line in document.lines if label != EMPTY else ():
            lines.append(line)
            size += len(line)
            if size >= _CHUNK and line.endswith("\n"):
                yield document.name, _Piece(lines, False)
                lines, size = [], 0
        yield document.name, _Piece(lines, True)


def _encoded(
    documents: Iterable[Document],
    labels: np.ndarray,
    tokenizer: Tokenizer,
    saved: Path,
    dtype: type[np.unsignedinteger],
    n_bytes: int,
) -> Iterator[tuple[str, _Piece, np.ndarray]]:
    """Every piece with its ids, in order: here for little text, else by a pool of processes with a short queue."""
    workers = available_cores() if n_bytes > _ALONE else 1
    if workers == 1:
        for name, piece in _pieces(documents, labels):
            yield name, piece, _ids(tokenizer, piece.lines, dtype)
        return
    # spawn: a fork would copy the locks of whatever threads there are. The child imports this module, not torch.
    pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_load, initargs=(str(saved),))
    waiting: deque[tuple[str, _Piece, Future[bytes]]] = deque()
    with pool:
        for name, piece in _pieces(documents, labels):
            waiting.append((name, piece, pool.submit(_work, piece.lines, dtype)))
            if len(waiting) >= _QUEUE * workers:
                first, done, future = waiting.popleft()
                yield first, done, np.frombuffer(future.result(), dtype=dtype)
        for first, done, future in waiting:
            yield first, done, np.frombuffer(future.result(), dtype=dtype)


def _ids(tokenizer: Tokenizer, lines: list[str], dtype: type[np.unsignedinteger]) -> np.ndarray:
    return np.array(tokenizer.encode("".join(lines)), dtype=dtype)


_worker_tokenizer: Tokenizer | None = None  # of a pool process, which serves one tokenizer all its life


def _load(folder: str) -> None:
    global _worker_tokenizer
    _worker_tokenizer = load_tokenizer(Path(folder))


def _work(lines: list[str], dtype: type[np.unsignedinteger]) -> bytes:
    assert _worker_tokenizer is not None
    return _ids(_worker_tokenizer, lines, dtype).tobytes()
