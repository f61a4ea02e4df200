"""How many words a scored stretch of tokens has, where it is a part of a document."""

from __future__ import annotations

from collections.abc import Sequence

from ctxlab.data.windows import EvalSegments

_LOOK_BACK = 7  # bytes: the longest character in UTF-8, and all but one of those of the next
_INNER = bytes(range(0x80, 0xC0))  # of a character, behind its first one


def words_that_begin(before: bytes, text: bytes) -> int:
    """Words that begin in `text`, `before` being what stands in front of it: its last whole character on is enough.

    A word is a run of anything but Unicode's white space, as `str.split()` finds them. One that is cut counts where it begins,
    so parts that follow one another have as many words as the whole: len(document.split()). (lm-evaluation-harness has
    len(re.split(r"\\s+", document)), which is one more for white space at either end.) Where a character of white space is
    itself cut, its first half passes for a word, which is taken off again in the part that ends it.
    """
    return _words(before + text) - _words(before)


def segment_words(segments: EvalSegments, index: int, pieces: Sequence[bytes]) -> int:
    """Words that begin in the targets of a segment; `pieces` are the bytes that each token stands for."""
    number, tokens = segments.segment(index)
    document, place = segments.split.document(number), segments.start(index)
    before = b""
    while place >= 0 and len(before) < _LOOK_BACK:
        before = pieces[int(document[place])] + before
        place -= 1
    return words_that_begin(before.lstrip(_INNER), b"".join([pieces[token] for token in tokens[1:].tolist()]))


def _words(text: bytes) -> int:
    return len(text.decode("utf-8", errors="replace").split())
