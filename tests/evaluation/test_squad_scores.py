"""Exact match and F1 against values worked out by hand from the rules of SQuAD's evaluation."""

from __future__ import annotations

import pytest

from ctxlab.evaluation.squad_scores import normalized, score, word_f1


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The Cat, sat.", "cat sat"),
        ("  A  an  THE  ", ""),
        ("an apple a day", "apple day"),
        ("Anna and Theo", "anna and theo"),  # only whole words are articles
        ("U.S.A.", "usa"),  # punctuation goes without leaving a space
        ("well-known", "wellknown"),
        ("the-cat", "thecat"),  # punctuation goes first, so this is one word
        ("a.", ""),
        ("**HAMLET**", "hamlet"),
        ("Denver\tBroncos\n", "denver broncos"),
        ("«Été»", "«été»"),  # only ASCII's punctuation
        ("$1,000.50", "100050"),
        ("", ""),
    ],
)
def test_a_text_is_normalized(text: str, expected: str) -> None:
    assert normalized(text) == expected


@pytest.mark.parametrize(
    ("said", "gold", "expected"),
    [
        ("the Denver Broncos", "Denver Broncos!", 1.0),
        ("Denver", "Denver Broncos", 2 / 3),  # p = 1, r = 1/2
        ("Denver Broncos team", "Broncos", 1 / 2),  # p = 1/3, r = 1
        ("Broncos Denver", "Denver Broncos", 1.0),  # words, not their order
        ("red red blue", "red green", 2 / 5),  # one red in common: p = 1/3, r = 1/2
        ("red red", "red red red", 4 / 5),  # two in common: p = 1, r = 2/3
        ("Carolina", "Denver", 0.0),
        ("", "Denver", 0.0),
        ("the", "Denver", 0.0),
        ("", "", 1.0),
        ("an", "the", 1.0),  # both are nothing
    ],
)
def test_overlap_in_words(said: str, gold: str, expected: float) -> None:
    assert word_f1(said, gold) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("said", "golds", "exact", "f1"),
    [
        ("santa clara", ("Levi's Stadium", "Santa Clara, California", "Santa Clara"), 1.0, 1.0),
        # The best of each score apart: no gold is matched, the second has two of three words in common.
        ("in Santa Clara", ("Levi's Stadium", "Santa Clara"), 0.0, 4 / 5),
        ("Levi", ("Levi's Stadium",), 0.0, 0.0),
        ("gold", ("gold", "gold", "gold"), 1.0, 1.0),
        # No answer is right, and only that.
        ("", (), 1.0, 1.0),
        ("the", (), 1.0, 1.0),
        ("anything", (), 0.0, 0.0),
        ("", ("something",), 0.0, 0.0),
        # A gold answer of nothing but articles and punctuation does not count beside another ...
        ("", ("the", "Denver"), 0.0, 0.0),
        ("Denver", ("the", "Denver"), 1.0, 1.0),
        # ... and is no answer where there is no other.
        ("", ("The.",), 1.0, 1.0),
        ("Denver", ("The.",), 0.0, 0.0),
    ],
)
def test_the_best_of_the_right_answers(said: str, golds: tuple[str, ...], exact: float, f1: float) -> None:
    found = score(said, golds)
    assert found.exact == exact
    assert found.f1 == pytest.approx(f1, abs=1e-12)
