"""Sentence pairs: what is read, what is left out, what is held out; bad files in one line."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest

from ctxlab.data.pairs.dataset import PairDataset, prepare_pairs
from ctxlab.data.pairs.parallel import Pair, Parallel, held_out, plain, sentence_hash
from ctxlab.data.tokenizers.base import TOKENIZERS
from ctxlab.errors import DataError

LINES = [f"the {a} {b}\tle {a} {b} {'!' * (n % 3)}\tCC-BY {n}" for n, (a, b) in enumerate(
    (a, b) for a in ("dog", "cat", "fox", "cow", "owl", "bee") for b in range(40)
)]  # fmt: skip


def read(path: Path, **settings: object) -> Parallel:
    found = Parallel(Parallel.Config(path=str(path), **settings))  # type: ignore[arg-type]
    found.fetch(path.parent, lambda *_: lambda _: None)
    return found


def prepared(tmp_path: Path, lines: list[str] = LINES, **settings: object) -> PairDataset:
    file = tmp_path / "pairs.tsv"
    if not file.exists():
        file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    config = Parallel.Config(path=str(file), **settings)  # type: ignore[arg-type]
    return prepare_pairs(config, TOKENIZERS.config({"name": "byte"}), cache=tmp_path / "cache")


def test_columns_of_a_file_and_two_files_are_the_same_pairs(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text("Go.\tVa !\tx\n\nRun!\tCours !\ty\r\n", encoding="utf-8")
    with gzip.open(tmp_path / "a.tsv.gz", "wt", encoding="utf-8") as file:
        file.write("Go.\tVa !\nRun!\tCours !")
    (tmp_path / "fr.txt").write_text("Va !\nCours !\n", encoding="utf-8")
    (tmp_path / "en.txt").write_text("Go.\nRun!\n", encoding="utf-8")
    expected = [Pair("Va !", "Go."), Pair("Cours !", "Run!")]
    for name in ("a.tsv", "a.tsv.gz"):
        assert list(read(tmp_path / name, source_column=2, target_column=1).pairs()) == expected
    apart = read(tmp_path / "fr.txt", target_path=str(tmp_path / "en.txt"))
    assert list(apart.pairs()) == expected


def test_excluded_sentences_are_gone_whatever_their_case_and_punctuation(tmp_path: Path) -> None:
    file = tmp_path / "a.tsv"
    file.write_text(
        "I don't know.\tJe ne sais pas.\nGo.\tVa !\nI don\u2019t!\tNon\nGo away.\tVa-t'en\u202f!\n", encoding="utf-8"
    )
    left = read(file, exclude=("je NE sais pas", "Go", "Va-t'en !")).pairs()
    assert [pair.source for pair in left] == ["I don\u2019t!"]


def test_held_out_sentences_are_the_smallest_hashes_whatever_the_order_and_copies() -> None:
    sentences = [f"sentence number {n}" for n in range(5000)]
    bounds = held_out(sentences)
    assert bounds == held_out([*reversed(sentences), *sentences[:100]])
    parts = [bounds.part(sentence) for sentence in sentences]
    assert (parts.count("test"), parts.count("validation")) == (50, 25)
    tested = max(sentence_hash(s) for s, part in zip(sentences, parts, strict=True) if part == "test")
    assert all(sentence_hash(s) > tested for s, part in zip(sentences, parts, strict=True) if part != "test")
    assert bounds.part("Sentence  NUMBER 7!") == bounds.part("sentence number 7")


def test_no_target_is_on_two_sides(tmp_path: Path) -> None:
    lines = [f"source {n}\ttarget {n % 300}" for n in range(3000)]
    data = prepared(tmp_path, lines)
    seen = {
        name: {plain(data.text(name, index).target) for index in range(pairs.n)} for name, pairs in data.splits.items()
    }
    assert not seen["train"] & seen["test"]
    assert not seen["train"] & seen["validation"]
    assert not seen["test"] & seen["validation"]
    assert sum(pairs.n for pairs in data.splits.values()) == 3000
    assert data.splits["test"].n == 80  # 8 targets, each 10 times


def test_tokens_are_the_text(tmp_path: Path) -> None:
    data = prepared(tmp_path)
    found = [data.text(name, index) for name, pairs in data.splits.items() for index in range(pairs.n)]
    expected = [Pair(*(column.strip() for column in line.split("\t")[:2])) for line in LINES]
    assert sorted(found) == sorted(expected)
    train, tokenizer = data.splits["train"], data.tokenizer
    for index in range(5):
        source, target = train.source.sentence(index), train.target.sentence(index)
        assert source.tolist() == [*tokenizer.encode(data.text("train", index).source), tokenizer.eos_id]
        assert target.tolist() == [
            tokenizer.bos_id, *tokenizer.encode(data.text("train", index).target), tokenizer.eos_id
        ]  # fmt: skip


def test_the_cache_is_made_once_and_anew_for_other_settings(tmp_path: Path) -> None:
    one = prepared(tmp_path)
    assert isinstance(one.splits["train"].source.tokens, np.memmap)
    made = set((tmp_path / "cache" / "pairs").iterdir())
    prepared(tmp_path)
    assert set((tmp_path / "cache" / "pairs").iterdir()) == made
    other = prepared(tmp_path, exclude=("the dog 1",))
    assert other.facts["text_sha256"] != one.facts["text_sha256"]
    assert sum(p.n for p in other.splits.values()) == len(LINES) - 1


def test_a_tokenizer_learns_from_the_train_split_alone(tmp_path: Path) -> None:
    """A character of held out sentences only has no piece of its own: it is bytes."""
    lines = [f"word {n}\tmot {n}" for n in range(400)]
    bounds = held_out(line.split("\t")[1] for line in lines)
    marked = [line + "\u4e2d" if bounds.part(line.split("\t")[1]) == "train" else line + "\u6587" for line in lines]
    # the marks change the hashes: mark the sources, and hold out by targets
    marked = [f"{m[-1]}{line}" for m, line in zip(marked, lines, strict=True)]
    file = tmp_path / "pairs.tsv"
    file.write_text("\n".join(marked), encoding="utf-8")
    data = prepare_pairs(
        Parallel.Config(path=str(file)), TOKENIZERS.config({"name": "unigram", "vocab_size": 300}), cache=tmp_path / "c"
    )
    assert len(data.tokenizer.encode("\u4e2d")) == 1
    assert len(data.tokenizer.encode("\u6587")) == 3


@pytest.mark.parametrize(
    ("text", "settings", "message"),
    [
        (None, {}, r"data.path: there is no file .*pairs.tsv; it takes a file of sentence pairs"),
        ("a\tb\nno tab here\n", {}, r"data.path: line 2 of .*pairs.tsv has 1 column between tabs, and column 2 is asked for"),
        ("a\tb\n", {"target_column": 3}, r"data.path: line 1 of .* has 2 columns between tabs, and column 3 is asked for"),
        ("a\tb\n", {"target_column": 1}, r"data.target_column: column 1 is the source's own"),
        ("a\tb\n" * 100, {}, r"data.path: 1 different sentences are too few to hold some out; 64 are enough"),
        (b"\xff\xfe\tb\n", {}, r"data.path: .*pairs.tsv is not UTF-8 text"),
    ],
)  # fmt: skip
def test_bad_files(tmp_path: Path, text: str | bytes | None, settings: dict[str, object], message: str) -> None:
    file = tmp_path / "pairs.tsv"
    if text is not None:
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(DataError, match=message):
        prepare_pairs(Parallel.Config(path=str(file), **settings), TOKENIZERS.config({"name": "byte"}), cache=tmp_path)  # type: ignore[arg-type]


def test_files_of_other_lengths_and_none(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("one\ntwo\n")
    (tmp_path / "b").write_text("un\n")
    with pytest.raises(DataError, match=r"data.target_path: .*/b ends before line 2 of the other"):
        list(read(tmp_path / "a", target_path=str(tmp_path / "b")).pairs())
    with pytest.raises(DataError, match=r"data.path: .*/b ends before .*/a does"):
        list(read(tmp_path / "b", target_path=str(tmp_path / "a")).pairs())
    with pytest.raises(DataError, match=r"data.path: it takes a file of sentence pairs.*manythings"):
        read(Path("none"))
