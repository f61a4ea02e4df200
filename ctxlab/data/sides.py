"""Many short sequences of tokens on disk: written one behind the other, read as a memory map."""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ctxlab.data.tokenizers.base import Tokenizer


@dataclass(frozen=True)
class Side:
    """One side of a split's examples: the texts' tokens one behind the other, and where each begins."""

    tokens: np.ndarray  # uint16 or uint32
    starts: np.ndarray  # (n + 1,) int64

    @property
    def sizes(self) -> np.ndarray:
        return np.diff(self.starts)

    def sentence(self, index: int) -> np.ndarray:
        return self.tokens[self.starts[index] : self.starts[index + 1]]


class SideWriter:
    """Token sequences one behind the other in `NAME.bin`, and where each begins in `NAME.starts.npy`."""

    def __init__(self, folder: Path, name: str, tokenizer: Tokenizer) -> None:
        self.folder, self.name, self.dtype = folder, name, _dtype_of(tokenizer)
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
    dtype = _dtype_of(tokenizer)
    tokens = np.memmap(file, dtype=dtype, mode="r") if file.stat().st_size else np.empty(0, dtype=dtype)
    if len(tokens) != starts[-1]:
        raise ValueError(f"{name} holds {len(tokens)} tokens, its texts have {starts[-1]}")
    return Side(tokens, starts)


def _dtype_of(tokenizer: Tokenizer) -> type[np.unsignedinteger]:
    return np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
