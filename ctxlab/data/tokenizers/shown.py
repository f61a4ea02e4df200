"""Tokens as a person reads them one by one, and which of them make a word."""

from __future__ import annotations

import re
from collections.abc import Sequence

from ctxlab.data.tokenizers.base import Tokenizer

_VISIBLE = {" ": "·", "\n": "↵", "\t": "⇥", "\r": "␍"}
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


def words_of(tokenizer: Tokenizer, tokens: Sequence[int]) -> list[int]:
    """The number of each token's word, from 0: a run of letters and digits, or a sign by itself.

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
            words = _words([tokenizer.pieces[token] for token in tokens[start:stop]])
        else:
            words = [0]
        first = found[-1] + 1 if found else 0
        number = {word: n for n, word in enumerate(dict.fromkeys(words))}  # a word that no token begins in has none
        found += [first + number[word] for word in words]
        start = stop
    return found


def _words(pieces: Sequence[bytes]) -> list[int]:
    """For each piece which word of the whole text it belongs to; the last's number again for spaces at the end."""
    text = b"".join(pieces).decode("utf-8", errors="surrogateescape")
    ends = []  # of each word, in bytes
    for match in _WORD.finditer(text):
        ends.append(len(text[: match.end()].encode("utf-8", errors="surrogateescape")))
    found, at, word = [], 0, 0
    for piece in pieces:
        first = at + len(piece) - len(piece.lstrip(b" \t\r\n"))
        at += len(piece)
        while word < len(ends) - 1 and ends[word] <= min(first, at):
            word += 1
        found.append(word)
    return found
