"""Tokens as a person reads them one by one, and which of them make a word."""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence

from ctxlab.data.tokenizers.base import Tokenizer

_VISIBLE = {" ": "·", "\n": "↵", "\t": "⇥", "\r": "␍"}
_CHINESE = (
    (0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x2A6DF), (0x2A700, 0x2CEAF), (0x2F800, 0x2FA1F)
)  # fmt: skip
_WORD = re.compile(r"[^\W_]+(?:['’-][^\W_]+)*['’]?|\S")


def shown(tokenizer: Tokenizer, token: int) -> str:
    """A token as a label: a space is ·, a line's end ↵; what has no text is <s>, </s>, <pad> or its number, bytes that are
    no whole character their hexadecimal numbers."""
    piece = tokenizer.pieces[token]
    if not piece:
        names = {tokenizer.pad_id: "<pad>", tokenizer.bos_id: "<s>", tokenizer.eos_id: "</s>"}
        return names.get(token, f"<{token}>")
    try:
        text = piece.decode("utf-8")
    except UnicodeDecodeError:
        return "".join(f"<{byte:02X}>" for byte in piece)
    return visible(text)


def visible(text: str, *, as_it_is: str = "") -> str:
    """A text in which every character is seen, and none acts on a terminal or turns what stands behind it: signs for spaces
    and ends of lines, <1B> for what else is not printable. `as_it_is`: characters that stay."""
    seen = {c: c for c in as_it_is}
    return "".join(seen.get(c) or _VISIBLE.get(c) or (c if c.isprintable() else f"<{ord(c):02X}>") for c in text)


def read_words(text: str) -> list[int]:
    """Where each word ends as a reader sees them: a run of letters and digits, "l'eau" and "vingt-deux" too, or a sign."""
    return [match.end() for match in _WORD.finditer(text)]


def basic_words(text: str) -> list[int]:
    """Where each word ends as BERT's masking has them: what stands between spaces, each sign of punctuation and each Chinese
    character by itself (BasicTokenizer of google-research/bert, tokenization.py)."""
    ends: list[int] = []
    goes_on = False
    for place, char in enumerate(text):
        kind = _kind(char)
        if kind == "space":
            goes_on = False
            continue
        if goes_on and kind == "letter":
            ends[-1] = place + 1
        else:
            ends.append(place + 1)
        goes_on = kind == "letter"
    return ends


@functools.lru_cache(maxsize=1 << 14)
def _kind(char: str) -> str:
    if char.isspace():
        return "space"
    code = ord(char)
    # all ASCII that is no letter and no digit is punctuation there, "$" and "^" too
    if (code < 128 and char.isprintable() and not char.isalnum()) or unicodedata.category(char).startswith("P"):
        return "sign"
    return "sign" if any(first <= code <= last for first, last in _CHINESE) else "letter"


def words_of(
    tokenizer: Tokenizer, tokens: Sequence[int], split: Callable[[str], Iterable[int]] = read_words
) -> list[int]:
    """The number of each token's word, from 0. `split` says where in a text each word ends.

    A token belongs to the word of its first byte that is no space, and one of spaces alone to the word behind it; what has no
    text stands alone. So numbers never fall, and no two tokens of one word have another between them.
    """
    found: list[int] = []
    start = 0
    while start < len(tokens):
        stop = start + 1
        if tokenizer.pieces[tokens[start]]:
            while stop < len(tokens) and tokenizer.pieces[tokens[stop]]:
                stop += 1
            words = _words([tokenizer.pieces[token] for token in tokens[start:stop]], split)
        else:
            words = [0]
        first = found[-1] + 1 if found else 0
        number = {word: n for n, word in enumerate(dict.fromkeys(words))}  # a word that no token begins in has none
        found += [first + number[word] for word in words]
        start = stop
    return found


def _words(pieces: Sequence[bytes], split: Callable[[str], Iterable[int]]) -> list[int]:
    """For each piece which word of the whole text it belongs to; the last's number again for spaces at the end."""
    text = b"".join(pieces).decode("utf-8", errors="surrogateescape")
    ends: list[int] = []  # of each word, in bytes
    before = 0
    for end in split(text):
        size = len(text[before:end].encode("utf-8", errors="surrogateescape"))
        ends.append((ends[-1] if ends else 0) + size)
        before = end
    found, at, word = [], 0, 0
    for piece in pieces:
        first = at + len(piece) - len(piece.lstrip(b" \t\r\n"))
        at += len(piece)
        while word < len(ends) - 1 and ends[word] <= min(first, at):
            word += 1
        found.append(word)
    return found
