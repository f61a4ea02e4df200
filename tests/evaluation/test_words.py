"""Words of parts of documents: they add up to those of the whole."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ctxlab.data.tokenizers.base import TOKENIZERS
from ctxlab.data.windows import EvalSegments
from ctxlab.evaluation.words import segment_words, words_that_begin
from tests.evaluation.builders import split_of

# Letters and white space of one to four bytes, some of which share their first ones.
TEXT = st.text("ab.\n \t\x1c\u00a0\u00e9\u3000\u3042\u2003\u2014\u200b\U0001f642", max_size=60)


@pytest.mark.parametrize(
    ("before", "text", "expected"),
    [
        ("", "one two", 2), ("", " one", 1), ("fo", "o bar", 1), ("foo ", "bar", 1), ("foo", " bar", 1), ("", "", 0),
        ("a", "\u3000b", 1), ("\u3000", "b", 1), ("\u3042", "\u3042", 0), ("a\n", "\n \n", 0),
    ],
)  # fmt: skip
def test_a_word_counts_where_it_begins(before: str, text: str, expected: int) -> None:
    assert words_that_begin(before.encode(), text.encode()) == expected


@given(TEXT, st.lists(st.integers(0, 240), max_size=6))
def test_parts_have_as_many_words_as_the_whole_wherever_they_are_cut(text: str, cuts: list[int]) -> None:
    """Within a character too: what is in front of a part is all that was before it."""
    data = text.encode()
    edges = sorted({0, len(data), *(cut for cut in cuts if cut < len(data))})
    parts = [words_that_begin(data[:a], data[a:b]) for a, b in zip(edges, edges[1:], strict=False)]
    assert sum(parts) == len(text.split())


@given(TEXT, st.integers(1, 9))
def test_segments_of_bytes_have_as_many_words_as_the_text_they_cover(text: str, length: int) -> None:
    byte = TOKENIZERS.get("byte")
    tokenizer = byte.make(byte.Config(name="byte"), ())
    document = [tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id]
    if len(document) <= length:
        return
    segments = EvalSegments(split_of([document]), length)
    counted = sum(segment_words(segments, index, tokenizer.pieces) for index in range(segments.n))
    covered = text.encode()[: segments.n * length]
    assert counted == len(covered.decode("utf-8", errors="replace").split())


def test_pieces_of_several_bytes_and_none() -> None:
    kind = TOKENIZERS.get("bpe")
    text = "Words, words;\u3000naïve words \U0001f642 and so on and so on\n" * 5
    tokenizer = kind.make(kind.Config(name="bpe", vocab_size=300), [text] * 4)
    document = [tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id]
    for length in (1, 3, len(document) - 1):
        segments = EvalSegments(split_of([document]), length)
        assert segments.n * length == len(document) - 1 or length == 3
        counted = [segment_words(segments, index, tokenizer.pieces) for index in range(segments.n)]
        covered = b"".join(tokenizer.pieces[t] for t in document[1 : segments.n * length + 1])
        assert sum(counted) == len(covered.decode("utf-8", errors="replace").split())
