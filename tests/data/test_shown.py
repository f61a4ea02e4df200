"""Tokens one by one: their labels, and the words that they are pieces of, BERT's by the tokenizer that Hugging Face has of it."""

from __future__ import annotations

import itertools

import pytest

from ctxlab.data.tokenizers.base import Tokenizer
from ctxlab.data.tokenizers.byte import Byte
from ctxlab.data.tokenizers.shown import basic_words, shown, visible, words_of
from ctxlab.data.tokenizers.unigram import Unigram


class Listed(Byte):
    """Pieces written down one by one; encoding is not asked for."""

    def __init__(self, *pieces: bytes) -> None:
        Tokenizer.__init__(self, Byte.Config(), (b"", b"", b"", *pieces), pad=0, bos=1, eos=2)


def test_labels_say_what_a_piece_is() -> None:
    some = Listed(b" ne", b"\n", b"\t", "ç".encode(), b"\xc3", b"\x00", b"", "你".encode())
    labels = [shown(some, token) for token in range(11)]
    assert labels == ["<pad>", "<s>", "</s>", "·ne", "↵", "⇥", "ç", "<C3>", "<00>", "<9>", "你"]


def test_a_text_is_made_visible_character_by_character() -> None:
    text = "é 你\u202e\x1b[31m\x9b\u200d\u00ad\U000e0041\r\n"
    assert visible(text) == "é·你<202E><1B>[31m<9B><200D><AD><E0041>␍↵"
    assert visible(text, as_it_is=" \n") == "é 你<202E><1B>[31m<9B><200D><AD><E0041>␍\n"
    assert all(
        c.isprintable() for c in visible("".join(map(chr, range(0xD800))) + "".join(map(chr, range(0xE000, 0x110000))))
    )


@pytest.mark.parametrize(
    ("pieces", "expected"),
    [
        ([b"Je", b" ne", b" par", b"le"], [0, 1, 2, 2]),
        ([b"fran", b"\xc3", b"\xa7", b"ais", b"."], [0, 0, 0, 0, 1]),  # half a character belongs to its word
        ([b"a", b" ", b" b", b" "], [0, 1, 1, 1]),  # spaces go with what follows, or at the end with what there is
        ([b"n", b"'", b"est", b"-", b"ce", b" pas", b"?"], [0, 0, 0, 0, 0, 1, 2]),
        ([b" a b", b"c d"], [0, 1]),  # a piece belongs where it begins
        ([b"a b c", b" d"], [0, 1]),  # no number is left out
        ([b"!", b"!"], [0, 1]),
    ],
)  # fmt: skip
def test_words_are_runs_of_letters(pieces: list[bytes], expected: list[int]) -> None:
    some = Listed(*pieces)
    tokens = list(range(3, 3 + len(pieces)))
    assert words_of(some, tokens) == expected
    assert words_of(some, [1, *tokens, 2]) == [0, *(word + 1 for word in expected), expected[-1] + 2]


SAID = (
    "  I don't know, Mr. O'Neil\t(really)... 5€ + $7_a~b — «naïve» हिन्दी"
    "\n\n话说天下大势，ok分久必合 vingt-deux カタカナ 한국어 𠀀x.  "
)


def basic_tokenizer(text: str) -> list[str]:
    """The words of BERT's basic tokenizer, cased, as the `tokenizers` of Hugging Face's BertTokenizer split."""
    tokenizers = pytest.importorskip("tokenizers")
    clean = tokenizers.normalizers.BertNormalizer(lowercase=False, strip_accents=False).normalize_str(text)
    return [word for word, _ in tokenizers.pre_tokenizers.BertPreTokenizer().pre_tokenize_str(clean)]


def test_basic_words_are_those_of_berts_tokenizer() -> None:
    expected = basic_tokenizer(SAID)
    assert {"don", "'", "t", ",", "话", "，", "हिन्दी", "カタカナ", "$"} <= set(expected)
    ends = basic_words(SAID)
    assert [SAID[a:b].strip() for a, b in zip([0, *ends], ends)] == expected


def test_tokens_of_a_basic_word_are_together_whatever_the_pieces_are() -> None:
    expected = basic_tokenizer(SAID)
    starts, at = set(), 0
    for word in expected:
        at = SAID.index(word, at)
        starts.add(at)
        at += len(word)
    for tokenizer in (Byte(Byte.Config()), Unigram.make(Unigram.Config(vocab_size=400), [SAID] * 20)):
        tokens = tokenizer.encode(SAID)
        words = words_of(tokenizer, tokens, basic_words)
        grouped = [tokenizer.decode([t for t, w in zip(tokens, words) if w == n]) for n in range(words[-1] + 1)]
        assert "".join(grouped) == SAID
        begins = [0, *itertools.accumulate(len(group) for group in grouped[:-1])]
        found = {begin + len(group) - len(group.lstrip()) for begin, group in zip(begins, grouped)}
        assert found <= starts, "a piece may hold several words, and none is cut in two"
        if isinstance(tokenizer, Byte):
            assert [group.strip() for group in grouped] == expected
