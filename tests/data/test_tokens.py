"""Tokens on disk: bos, the document's ids, eos, for every document, however the work on them is divided."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ctxlab.data import tokens
from ctxlab.data.splits import EMPTY, SPLITS
from ctxlab.data.tokenizers.base import Tokenizer
from ctxlab.data.tokenizers.byte import Byte
from ctxlab.data.tokens import read_split, write_tokens
from tests.data.builders import pile, prose, trained

TEXTS = [
    prose(1, 40), "no newline at the end", "", "\n", "a\r\nb\r\n", "\u2581 \u2028中文\x0c\n😀\n" * 9, "x" * 3000,
    prose(2, 3) + "y" * 500, "\n\n\n", "", prose(3, 200), "the  end ",
]  # fmt: skip
LABELS = [0, 1, EMPTY, 2, 0, 1, 2, 0, 1, EMPTY, 1, 0]


def written(folder: Path, tokenizer: Tokenizer, texts: Sequence[str] = TEXTS, labels: Sequence[int] = LABELS) -> Path:
    folder.mkdir()
    tokenizer.save(folder / "tokenizer")
    n_bytes = sum(len(text.encode()) for text in texts)
    done: list[int] = []
    write_tokens(
        folder, pile(texts).documents(), np.array(labels, dtype=np.uint8), tokenizer, folder / "tokenizer",
        n_bytes=n_bytes, advance=done.append,
    )  # fmt: skip
    assert sum(done) == n_bytes
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}


@pytest.mark.parametrize("kind", ["unigram", "bpe", "byte"])
def test_the_ids_of_every_document_are_bos_its_tokens_eos(tmp_path: Path, kind: str) -> None:
    tokenizer = trained(kind)
    folder = written(tmp_path / "tokens", tokenizer)
    files = [f"{name}.{what}" for name in SPLITS for what in ("bin", "starts.npy")]
    assert set(contents(folder)) == {
        *files,
        "validation.names.json",
        "test.names.json",
    }  # no names of a huge train split
    for label, name in enumerate(SPLITS):
        mine = [number for number, said in enumerate(LABELS) if said == label]
        part = read_split(folder, name, tokenizer.vocab_size)
        assert part.n_documents == len(mine)
        assert list(part.names) == ([] if name == "train" else [f"d{number}" for number in mine])
        for index, number in enumerate(mine):
            expected = [tokenizer.bos_id, *tokenizer.encode(TEXTS[number]), tokenizer.eos_id]
            assert part.document(index).tolist() == expected
            assert part.sizes[index] == len(expected)
        assert len(part.tokens) == part.sizes.sum()
        assert part.tokens.dtype == np.uint16


@pytest.mark.parametrize("chunk", [1, 7, 64, 1000])
def test_the_size_of_a_piece_of_work_changes_no_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    expected = contents(written(tmp_path / "whole", trained("unigram")))
    monkeypatch.setattr(tokens, "_CHUNK", chunk)
    assert contents(written(tmp_path / "pieces", trained("unigram"))) == expected


def test_processes_write_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = contents(written(tmp_path / "alone", trained("unigram")))
    submitted = []

    class Counted(ProcessPoolExecutor):
        def submit(self, *work: Any, **options: Any) -> Any:
            submitted.append(work)
            return super().submit(*work, **options)

    monkeypatch.setattr(tokens, "ProcessPoolExecutor", Counted)
    monkeypatch.setattr(tokens, "_ALONE", 0)
    monkeypatch.setattr(tokens, "_CHUNK", 100)
    monkeypatch.setattr(tokens, "available_cores", lambda: 2)
    assert contents(written(tmp_path / "together", trained("unigram"))) == expected
    assert len(submitted) > 4 * tokens._QUEUE  # the queue was full more than once


def test_no_text_for_a_split_is_no_tokens(tmp_path: Path) -> None:
    folder = written(tmp_path / "tokens", trained("byte"), ["a"], [0])
    for name in ("validation", "test"):
        part = read_split(folder, name, 260)
        assert (part.n_documents, len(part.tokens), list(part.names)) == (0, 0, [])


class Offset(Byte):
    """Bytes behind so many ids that stand for nothing."""

    def __init__(self, offset: int) -> None:
        super().__init__(Byte.Config())
        Tokenizer.__init__(self, self.config, [b""] * offset + [bytes([b]) for b in range(256)], pad=0, bos=1, eos=2)
        self.offset = offset

    def encode_lines(self, lines: Sequence[str]) -> list[list[int]]:
        return [[byte + self.offset for byte in line.encode()] for line in lines]


@pytest.mark.parametrize(("vocab_size", "width"), [(1 << 16, 2), ((1 << 16) + 1, 4)])
def test_ids_take_as_many_bytes_as_the_vocabulary_needs(tmp_path: Path, vocab_size: int, width: int) -> None:
    tokenizer = Offset(vocab_size - 256)
    folder = written(tmp_path / "tokens", tokenizer, ["é"], [0])
    expected = [1, vocab_size - 256 + 0xC3, vocab_size - 256 + 0xA9, 2]
    assert read_split(folder, "train", vocab_size).tokens.tolist() == expected
    assert (folder / "train.bin").stat().st_size == width * len(expected)


def test_tokens_are_mapped_and_not_read(tmp_path: Path) -> None:
    part = read_split(written(tmp_path / "tokens", trained("byte")), "train", 260)
    for array in (part.tokens, part.starts):
        assert isinstance(array, np.memmap)
        assert array.mode == "r"


def test_a_file_of_another_length_than_its_documents_is_refused(tmp_path: Path) -> None:
    folder = written(tmp_path / "tokens", trained("byte"))
    whole = (folder / "test.bin").read_bytes()
    for damaged in (whole[:-2], whole + b"\0\0", b""):
        (folder / "test.bin").write_bytes(damaged)
        with pytest.raises(ValueError, match=rf"test\.bin holds {len(damaged) // 2} tokens, .* {len(whole) // 2}$"):
            read_split(folder, "test", 260)
