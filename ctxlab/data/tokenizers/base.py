"""What a tokenizer is: text to ids and back without loss, and how many bytes of text each id stands for."""

from __future__ import annotations

import codecs
import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from pydantic import Field

from ctxlab.errors import DataError
from ctxlab.registry import ComponentConfig, Registry

SETTINGS = "tokenizer.json"


class Tokenizer(ABC):
    """Text to token ids and back: decode(encode(text)) == text for any text.

    `encode` adds no special tokens; a document is stored as bos, its tokens, eos. A text may be encoded in parts cut
    after newlines: the tokens are those of the whole.
    """

    source: ClassVar[str] = ""
    """What it is, for `ctxlab list`."""
    learns: ClassVar[bool] = False
    """Whether it is trained on text."""

    class Config(ComponentConfig):
        name: str
        sentinels: int = Field(
            0, ge=0, le=10_000, description="ids behind all others that no text has: what stands for a span left out"
        )

    def __init__(
        self, config: Config, pieces: Sequence[bytes], *, pad: int, bos: int, eos: int, mask: int | None = None
    ) -> None:
        """`pieces`: the bytes of text that each id stands for, none for special ids."""
        self.config = config
        self.pieces = (*pieces, *[b""] * config.sentinels)
        self.pad_id, self.bos_id, self.eos_id, self.mask_id = pad, bos, eos, mask
        self.token_bytes = np.array([len(piece) for piece in self.pieces], dtype=np.int64)  # (vocab_size,)

    def sentinel_id(self, number: int) -> int:
        """The id that stands for span `number`, from 0: they fall from the last id there is (Raffel et al. 2020)."""
        return self.vocab_size - 1 - number

    def with_sentinels(self, number: int) -> Tokenizer:
        """The same pieces with so many sentinels behind them."""
        if number == self.config.sentinels:
            return self
        return self.restore(self.config.model_copy(update={"sentinels": number}), self.files())

    @classmethod
    @abstractmethod
    def make(cls, config: Any, sample: Iterable[str]) -> Tokenizer:
        """A tokenizer by its settings. `sample` is text of the train split, read only where there is something to learn."""

    @abstractmethod
    def encode_lines(self, lines: Sequence[str]) -> list[list[int]]:
        """The ids of each line, each cut after a newline or at the end of the text."""

    @abstractmethod
    def files(self) -> dict[str, bytes]:
        """What `save` writes beside the settings."""

    @classmethod
    @abstractmethod
    def restore(cls, config: Any, files: dict[str, bytes]) -> Tokenizer:
        """The tokenizer that `files` were taken from."""

    @property
    def vocab_size(self) -> int:
        return len(self.pieces)

    def encode(self, text: str) -> list[int]:
        """The ids of a text; none for an empty one."""
        lines = text.split("\n")
        whole = [f"{line}\n" for line in lines[:-1]] + ([lines[-1]] if lines[-1] else [])
        return [token for ids in self.encode_lines(whole) for token in ids]

    def count(self, text: str) -> int:
        """How many tokens a text has."""
        return len(self.encode(text))

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; special ones are silent, bytes that are no UTF-8 (half a character) become U+FFFD."""
        return b"".join(self.pieces[token] for token in ids).decode("utf-8", errors="replace")

    def stream(self, ids: Iterable[int]) -> Iterator[str]:
        """The text of ids as they come. Tokens may be parts of a character: it comes out when its last byte is there."""
        whole = codecs.getincrementaldecoder("utf-8")(errors="replace")
        for token in ids:
            text = whole.decode(self.pieces[token])
            if text:
                yield text
        rest = whole.decode(b"", final=True)
        if rest:
            yield rest

    @property
    def sha256(self) -> str:
        """Of everything that decides how it encodes."""
        digest = hashlib.sha256(self.config.name.encode())
        if self.config.sentinels:
            digest.update(f"\0sentinels\0{self.config.sentinels}".encode())
        for name, content in sorted(self.files().items()):
            digest.update(name.encode() + b"\0" + content)
        return digest.hexdigest()

    def save(self, folder: Path) -> None:
        """Writes it into a folder of its own; `load_tokenizer` reads it back."""
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in self.files().items():
            (folder / name).write_bytes(content)
        settings = json.dumps(self.config.model_dump(mode="json"), ensure_ascii=False)
        (folder / SETTINGS).write_text(settings + "\n", encoding="utf-8")


TOKENIZERS: Registry[Tokenizer] = Registry("tokenizer", "ctxlab.data.tokenizers")


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer that `Tokenizer.save` wrote. Raises DataError where it is not whole."""
    try:
        config = TOKENIZERS.config(json.loads((folder / SETTINGS).read_text(encoding="utf-8")))
        files = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != SETTINGS}
        return TOKENIZERS.get(config.name).restore(config, files)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"tokenizer: {folder} holds no whole tokenizer ({reason})") from error
