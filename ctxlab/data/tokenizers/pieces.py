"""What every sentencepiece model shares: lossless encoding, and training on a sample of text.

sentencepiece writes a space as U+2581 inside its pieces, so it cannot tell that character from a space: it is encoded
here as its three bytes, which every model below has pieces for. Nothing is normalized, no space is put in or taken out.
"""

from __future__ import annotations

import io
import itertools
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import sentencepiece
from pydantic import Field

from ctxlab.data.tokenizers.base import Tokenizer
from ctxlab.errors import DataError

MODEL = "sentencepiece.model"
SPACE = "\u2581"
_SENTENCE = 1000  # characters; sentencepiece skips sentences of more than 4,192 bytes
_THREADS = 4  # always: sums over threads are part of the result
_COVERAGE = 0.9995  # of the characters in the text, as sentencepiece has it for large alphabets; the rest are bytes
_SMALL = 512  # kinds of characters up to which an alphabet is covered whole
_SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<mask>")


class Pieces(Tokenizer):
    """A sentencepiece model with byte pieces (Kudo and Richardson 2018, arXiv:1808.06226)."""

    def __init__(self, config: Any, model: bytes) -> None:
        self.model = model
        self._processor = sentencepiece.SentencePieceProcessor()
        self._processor.LoadFromSerializedProto(model)
        count = self._processor.vocab_size()
        pieces = [_bytes_of(self._processor, i) for i in range(count)]
        self._space = [self._processor.piece_to_id(f"<0x{b:02X}>") for b in SPACE.encode()]
        bos, eos, pad = self._processor.bos_id(), self._processor.eos_id(), self._processor.pad_id()
        mask = self._processor.piece_to_id("<mask>")
        super().__init__(
            config, pieces, pad=eos if pad < 0 else pad, bos=eos if bos < 0 else bos, eos=eos,
            mask=mask if self._processor.is_control(mask) else None,
        )  # fmt: skip

    def encode_lines(self, lines: Sequence[str]) -> list[list[int]]:
        encoded: list[list[int]] = self._processor.encode(list(lines), num_threads=1)
        for number, line in enumerate(lines):
            if SPACE in line:
                encoded[number] = self._around_spaces(line)
        return encoded

    def files(self) -> dict[str, bytes]:
        return {MODEL: self.model}

    @classmethod
    def restore(cls, config: Any, files: dict[str, bytes]) -> Tokenizer:
        return cls(config, files[MODEL])

    def _around_spaces(self, line: str) -> list[int]:
        first, *rest = line.split(SPACE)
        ids: list[int] = self._processor.encode(first)
        for part in rest:
            ids += self._space + self._processor.encode(part)
        return ids


class TrainedPieces(Pieces):
    """Pieces learned from the train split."""

    learns = True

    class Config(Tokenizer.Config):
        name: str
        vocab_size: int = Field(2048, ge=300, le=1_000_000, description="pieces, with 256 bytes and 5 special ones")
        separate: bool = Field(
            False,
            description="one of the sources and one of the targets of sentence pairs, each with vocab_size pieces",
        )

    @classmethod
    def make(cls, config: Any, sample: Iterable[str]) -> Tokenizer:
        return cls(config, train(config.name, config.vocab_size, list(sample)))


def train(kind: str, vocab_size: int, sample: Sequence[str]) -> bytes:
    """A sentencepiece model of `kind` (unigram, bpe) learned from pieces of text; the same text gives the same model."""
    room = vocab_size - 256 - len(_SPECIAL)
    writer = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_sentences(sample, _rare(sample, room // 2)),
            model_writer=writer,
            model_type=kind,
            vocab_size=vocab_size,
            character_coverage=1.0,
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            hard_vocab_limit=False,
            pad_id=0,
            bos_id=1,
            eos_id=2,
            unk_id=3,
            control_symbols=["<mask>"],
            num_threads=_THREADS,
            minloglevel=2,
        )
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1]
        raise DataError(f"tokenizer: {kind} of {vocab_size} pieces cannot be trained on this text: {reason}") from error
    return writer.getvalue()


def _sentences(sample: Iterable[str], rare: str) -> Iterator[str]:
    """Lines, long ones in parts, cut at rare characters; a newline itself is always a byte, never in a longer piece."""
    ends = re.compile(f"[\n{re.escape(rare)}]")
    for text in sample:
        for line in ends.split(text):
            for start in range(0, len(line), _SENTENCE):
                yield line[start : start + _SENTENCE]


def _rare(sample: Sequence[str], most: int) -> str:
    """The characters that stay bytes, so that `most` have pieces of their own: sentencepiece would do this itself, but
    for no more than 2% of a text, and the common thousand of a Chinese text leave more.
    """
    counts = Counter[str]()
    for text in sample:
        counts.update(text)
    total = sum(counts.values())
    if not total:
        raise DataError("tokenizer: there is no text to train it on")
    kinds = sorted(counts, key=lambda kind: (-counts[kind], kind))
    if len(kinds) <= min(most, _SMALL):
        return ""
    behind = itertools.accumulate((counts[kind] for kind in kinds), initial=0)
    covering = sum(1 for before in itertools.islice(behind, len(kinds)) if before < _COVERAGE * total)
    return "".join(kinds[min(covering, max(most, 1)) :])


def _bytes_of(processor: Any, index: int) -> bytes:
    if processor.is_byte(index):
        return bytes([int(processor.id_to_piece(index)[3:5], 16)])
    if processor.is_control(index) or processor.is_unknown(index) or processor.is_unused(index):
        return b""
    piece: str = processor.id_to_piece(index)
    return piece.replace(SPACE, " ").encode("utf-8")
