"""How many words a scored stretch of tokens has, where it is a part of a document."""

from __future__ import annotations

from collections.abc import Sequence

from ctxlab.data.windows import EvalSegments

_CHARACTER = 4  # bytes of the longest character in UTF-8


def words_that_begin(before: bytes, text: bytes) -> int:
    """Words that begin in `text`, `before` being what stands in front of it (its last character is enough).

    A word is a run of anything but Unicode's white space, as `str.split()` finds them. One that is cut counts where it begins,
    so parts that follow one another have as many words as the whole: len(document.split()). (lm-evaluation-harness has
    len(re.split(r"\\s+", document)), which is one more for white space at either end.)
    """
    return _words(before + text) - _words(before)


def segment_words(segments: EvalSegments, index: int, pieces: Sequence[bytes]) -> int:
    """Words that begin in the targets of a segment; `pieces` are the bytes that each token stands for."""
    number, tokens = segments.segment(index)
    document, place = segments.split.document(number), segments.start(index)
    before = b""
    while place >= 0 and len(before) < _CHARACTER:
        before = pieces[int(document[place])] + before
        place -= 1
    return words_that_begin(before, b"".join([pieces[token] for token in tokens[1:].tolist()]))


def _words(text: bytes) -> int:
    return len(text.decode("utf-8", errors="replace").split())
