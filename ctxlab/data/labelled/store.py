"""Labelled examples as a folder of the cache: made once, read as memory maps."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ctxlab.data.lock import locked, made_whole
from ctxlab.data.pairs.dataset import Side
from ctxlab.data.prepare import default_cache
from ctxlab.data.tokenizers.base import TOKENIZERS, Tokenizer, load_tokenizer
from ctxlab.errors import DataError

_FACTS = "facts.json"


class SideWriter:
    """Token sequences one behind the other in `NAME.bin`, and where each begins in `NAME.starts.npy`."""

    def __init__(self, folder: Path, name: str, tokenizer: Tokenizer) -> None:
        self.folder, self.name, self.dtype = folder, name, dtype_of(tokenizer)
        self.starts = array("q", [0])
        self._file = open(folder / f"{name}.bin", "wb")  # noqa: SIM115

    def add(self, ids: list[int]) -> None:
        self._file.write(np.array(ids, dtype=self.dtype).tobytes())
        self.starts.append(self.starts[-1] + len(ids))

    def close(self) -> None:
        self._file.close()
        np.save(self.folder / f"{self.name}.starts.npy", np.array(self.starts, dtype=np.int64))


def read_side(folder: Path, name: str, tokenizer: Tokenizer) -> Side:
    """What a `SideWriter` wrote. Raises ValueError where it is not whole."""
    starts, file = np.load(folder / f"{name}.starts.npy", mmap_mode="r"), folder / f"{name}.bin"
    dtype = dtype_of(tokenizer)
    tokens = np.memmap(file, dtype=dtype, mode="r") if file.stat().st_size else np.empty(0, dtype=dtype)
    if len(tokens) != starts[-1]:
        raise ValueError(f"{name} holds {len(tokens)} tokens, its texts have {starts[-1]}")
    return Side(tokens, starts)


def dtype_of(tokenizer: Tokenizer) -> type[np.unsignedinteger]:
    return np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32


def kept(
    kind: str,
    facts: Mapping[str, Any],
    tokenizer: Tokenizer.Config | Tokenizer,
    cache: Path | None,
    make: Callable[[Path], Mapping[str, Any]],
) -> tuple[Path, Tokenizer, dict[str, Any]]:
    """The folder that `make` fills once for each `facts` and tokenizer, what it speaks and its facts with those of `make`."""
    said = tokenizer.sha256 if isinstance(tokenizer, Tokenizer) else tokenizer.model_dump(mode="json")
    key = json.dumps([kind, facts, said], sort_keys=True, ensure_ascii=False)
    root = default_cache() if cache is None else cache
    folder = root / "labelled" / hashlib.sha256(key.encode()).hexdigest()[:24]
    with locked(folder):
        if not (folder / _FACTS).exists():
            with made_whole(folder) as draft:
                described = {**facts, **make(draft)}
                (draft / _FACTS).write_text(json.dumps(described, ensure_ascii=False, indent=1), encoding="utf-8")
    try:
        return folder, load_tokenizer(folder / "tokenizer"), json.loads((folder / _FACTS).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise damaged(folder, error) from error


def damaged(folder: Path, error: Exception) -> DataError:
    return DataError(f"paths.cache: {folder} is damaged ({error}); remove it and run again")


def learned(tokenizer: Tokenizer.Config | Tokenizer, sample: Iterable[str], folder: Path) -> Tokenizer:
    """The tokenizer that is given, or one that is made of the texts; a copy lies in the folder."""
    if not isinstance(tokenizer, Tokenizer):
        tokenizer = TOKENIZERS.get(tokenizer.name).make(tokenizer, sample)
    tokenizer.save(folder / "tokenizer")
    return tokenizer


def tokenizer_facts(tokenizer: Tokenizer) -> dict[str, Any]:
    return {"name": tokenizer.config.name, "vocab_size": tokenizer.vocab_size, "sha256": tokenizer.sha256}


def file_facts(files: Iterable[Path]) -> str:
    """What pins the state of files, cheap to find: a hash of their names, sizes and times."""
    digest = hashlib.sha256()
    for file in files:
        stat = file.stat()
        digest.update(f"{file.resolve()}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()
