"""Splits: by what a document says, never by its name, its place or a seed; small corpora are cut without loss."""

from __future__ import annotations

import hashlib
import random
import re
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ctxlab.data.progress import silent
from ctxlab.data.splits import EMPTY, SPLITS, Cut, Splits, _labels, documents, split
from ctxlab.errors import DataError
from tests.data.builders import Pile, naive_labels, pile, prose


def found(corpus: Pile) -> Splits:
    return split(corpus, silent("", 0))


def sides(splits: Splits) -> list[str]:
    return ["empty" if label == EMPTY else SPLITS[label] for label in splits.labels]


def texts_of(corpus: Pile, cut: Cut | None) -> list[tuple[str, str]]:
    return [(document.name, "".join(document.lines)) for document in documents(corpus, cut)]


@pytest.mark.parametrize(
    ("n", "test", "validation"), [(24, 8, 2), (100, 8, 2), (200, 10, 5), (1000, 50, 25), (100_000, 4096, 2048)]
)
def test_sizes_of_the_splits(n: int, test: int, validation: int) -> None:
    digests = np.array([hashlib.sha256(b"%d" % number).digest()[:16] for number in range(n)], dtype="S16")
    counts = Counter(SPLITS[label] for label in _labels(digests, np.ones(n, dtype=np.int64)).tolist())
    assert counts == {"test": test, "validation": validation, "train": n - test - validation}


@given(st.lists(st.integers(0, 60), min_size=24, max_size=90).filter(lambda kinds: len(set(kinds) - {0}) >= 24))
@settings(deadline=None, max_examples=40, database=None)
def test_the_order_of_content_hashes_decides(kinds: list[int]) -> None:
    texts = [f"document {kind}\nmore\n" if kind else "" for kind in kinds]  # with copies and empty ones
    splits = found(pile(texts))
    assert splits.cut is None
    assert sides(splits) == naive_labels(texts)
    assert splits.n_bytes.tolist() == [len(text) for text in texts]
    digests = sorted(hashlib.sha256(text.encode()).digest()[:16] for text in texts)
    assert splits.sha256 == hashlib.sha256(b"".join(digests)).hexdigest()


def test_names_and_order_change_nothing() -> None:
    texts = [prose(seed) for seed in range(60)]
    one, other = pile(texts), Pile([(f"other/{number % 7}", text) for number, text in enumerate(texts)][::-1])
    assert dict(zip(texts, sides(found(one)))) == dict(zip(texts[::-1], sides(found(other))))
    assert found(one).sha256 == found(other).sha256


def test_copies_are_on_one_side_and_count_once() -> None:
    texts = [prose(seed) for seed in range(40)]
    copied = texts + [text for text in texts for _ in range(3)]
    splits = found(pile(copied))
    assert sides(splits) == naive_labels(copied)
    assert sides(splits)[:40] == naive_labels(texts)


def test_a_documents_bytes_are_all_that_tells_it_from_another() -> None:
    texts = [f"\0{number}\0" for number in range(40)]  # zeros at the ends, spaces of one kind and another
    texts += [f" {number}" for number in range(40)] + [f"{number} " for number in range(40)]
    assert sides(found(pile(texts))) == naive_labels(texts)


def naive_parts(text: str, cut: Cut) -> list[str]:
    parts = [""]
    for line in re.findall("[^\n]*\n|[^\n]+", text):
        parts[-1] += line
        if len(parts[-1].encode()) >= cut.n_bytes and (cut.ends == "line ends" or not line.strip()):
            parts.append("")
    return [part for part in parts if part]


@given(
    st.lists(st.lists(st.sampled_from(["", " ", "a", "é" * 9, "\u2028", "\r", "x\x0cy"]), max_size=14), max_size=4),
    st.integers(1, 40),
    st.sampled_from(["blank lines", "line ends"]),
)
@settings(deadline=None, max_examples=150, database=None)
def test_cutting_equals_the_rule_line_by_line(lines: list[list[str]], n_bytes: int, ends: str) -> None:
    texts = ["\n".join(each) for each in lines]
    cut = Cut(n_bytes, ends)  # type: ignore[arg-type]
    expected = [(f"d{n}#{k}", part) for n, text in enumerate(texts) for k, part in enumerate(naive_parts(text, cut))]
    assert texts_of(pile(texts), cut) == expected


@pytest.mark.parametrize("n", [1, 3, 23])
def test_fewer_than_24_documents_are_cut_at_blank_lines(n: int) -> None:
    texts = [prose(seed, 1200 // n) for seed in range(n)]
    corpus = pile(texts)
    splits = found(corpus)
    assert splits.cut == Cut(sum(map(len, texts)) // 48, "blank lines")
    parts = texts_of(corpus, splits.cut)
    assert sides(splits) == naive_labels([text for _, text in parts])
    assert sides(splits).count("test") >= 8
    for number, text in enumerate(texts):
        mine = [part for name, part in parts if name.split("#")[0] == f"d{number}"]
        assert "".join(mine) == text
        assert all(part.endswith("\n\n") and len(part) >= splits.cut.n_bytes for part in mine[:-1])


def test_24_documents_are_not_cut() -> None:
    texts = [prose(seed, 100) for seed in range(24)]
    splits = found(pile(texts))
    assert (splits.cut, len(splits.labels)) == (None, 24)


def test_without_blank_lines_the_cut_is_at_line_ends() -> None:
    text = prose(0, 300, blank_every=1000)
    corpus = pile([text])
    splits = found(corpus)
    assert splits.cut == Cut(len(text) // 48, "line ends")
    assert sides(splits) == naive_labels([part for _, part in texts_of(corpus, splits.cut)])


def test_one_long_line_does_not_hide_the_short_ones() -> None:
    lines = ["long " * 10_000 + "\n", *(f"line {number}\n" for number in range(23))]
    splits = found(pile(["".join(lines)]))
    assert splits.cut == Cut(1, "line ends")
    assert sides(splits) == naive_labels(lines)


def test_parts_of_copies_are_on_one_side() -> None:
    texts = [prose(0, 800), prose(1, 400)]
    corpus = pile([texts[0], texts[1], texts[0], texts[0]] * 10)  # 40 documents, two different
    splits = found(corpus)
    assert splits.cut == Cut(sum(map(len, texts)) // 48, "blank lines")
    assert sides(splits) == naive_labels([part for _, part in texts_of(corpus, splits.cut)])


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ([], "there is no text in this corpus"),
        (["", ""], "there is no text in this corpus"),
        (
            ["word " * 5000],
            r"1 different document of 25000 bytes cannot be cut into 24 .* at line ends; a corpus needs 24",
        ),
        ([prose(0, 23, blank_every=99)], "1 different document of .* cannot be cut"),
        (["same\n"] * 100, "1 different document of 5 bytes cannot be cut"),
        (["one\n", "", "two\n"] * 9, "2 different documents of 8 bytes cannot be cut"),
        (["again\n" * 100], "1 different document of 600 bytes cannot be cut"),
    ],
)
def test_too_little_text_is_refused_in_one_line(texts: Sequence[str], message: str) -> None:
    with pytest.raises(DataError, match=rf"^data: {message}[^\n]*$"):
        found(pile(texts))


def test_24_lines_are_enough() -> None:
    text = prose(0, 24, blank_every=99)
    assert sides(found(pile([text]))) == naive_labels(text.splitlines(keepends=True))


def test_empty_documents_are_on_no_side_and_have_no_parts() -> None:
    texts = [prose(seed) for seed in range(30)]
    texts = random.Random(0).sample(texts + [""] * 5, 35)
    assert sides(found(pile(texts))) == naive_labels(texts)
    cut = found(pile(["", prose(0, 500), ""]))
    assert "empty" not in sides(cut)


def test_the_reading_is_reported_in_bytes() -> None:
    texts = [f"é{number}\n" for number in range(30)]
    seen: list[int] = []
    split(pile(texts), seen.append)
    assert seen == [len(text.encode()) for text in texts]
