"""Text to hide things in: sentences from a random place of a split on disk, and where something can stand between them."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from itertools import accumulate

import numpy as np

from ctxlab.data.tasks.base import Tools
from ctxlab.data.tasks.fill import fill
from ctxlab.data.tokenizers.base import Tokenizer
from ctxlab.data.tokens import Split
from ctxlab.errors import DataError

LEAST = 32  # tokens of text, below which nothing is hidden in it
LONGEST = 160  # characters of a unit; longer sentences are cut at a space
_MARGIN = 4 * LONGEST  # tokens read beyond those asked for: what is cut off at both ends
_QUOTES = "'\"\u2019\u201d)\\]_*"  # what may stand behind the full stop, Markdown's emphasis too
_BREAK = re.compile(rf"[.!?][{_QUOTES}]*\s+|[\u3002\uff01\uff1f][{_QUOTES}]*\s*|\s*\n\s*")
_END = re.compile(rf"(?:[.!?][{_QUOTES}]*\s*|[\u3002\uff01\uff1f][{_QUOTES}]*\s*|\n\s*\n\s*)$")


def units(text: str) -> list[str]:
    """A text cut behind sentences, behind lines, and where neither ends for long; each unit with the space behind it."""
    found: list[str] = []
    start = 0
    for match in _BREAK.finditer(text):
        found += _short(text[start : match.end()])
        start = match.end()
    return found + _short(text[start:])


def place(pieces: Sequence[str], share: float) -> int:
    """How many units stand before what is put in at `share` (0 to 1) of a text: the nearest end of a sentence."""
    ends = [0, *accumulate(map(len, pieces))]
    borders = [n for n in range(1, len(pieces)) if _END.search(pieces[n - 1])]
    return min([0, *borders, len(pieces)], key=lambda n: abs(ends[n] - share * ends[-1]))


def insert(pieces: Sequence[str], sentences: Sequence[str], places: Sequence[int]) -> str:
    """The text with each sentence behind as many units as its place says, on the line of the one before, unless that has
    ended."""
    parts = list(pieces)
    for where, sentence in sorted(zip(places, sentences, strict=True), key=lambda pair: -pair[0]):
        before = parts[where - 1] if where else " "
        space = "\n" if "\n" in before[len(before.rstrip()) :] else " "
        if not before[-1].isspace():
            parts[where - 1] += space
        parts.insert(where, sentence + space)
    return "".join(parts).rstrip()


def hide(
    sentences: Sequence[str],
    shares: Sequence[float],
    wrap: Callable[[str], str],
    room: int,
    random: np.random.Generator,
    tools: Tools,
) -> str | None:
    """The longest prompt of at most `room` tokens with sentences hidden in a text: `wrap` of both, each sentence about
    where its share says. None where there is no room for a text.
    """
    frame = tools.count(wrap("\n".join(sentences)))
    for more in (LEAST // 2, -LEAST // 2):  # what is too much is left out; where one sentence is too much, less is read
        text = tools.haystack.text(random, room - frame + more)
        pieces = units(text)
        sums = [0, *accumulate(len(piece) * (room - frame) / len(text) for piece in pieces)]

        def build(n: int, pieces: Sequence[str] = pieces) -> str:
            return wrap(insert(pieces[:n], sentences, [place(pieces[:n], share) for share in shares]))

        def cost(n: int, sums: Sequence[float] = sums) -> float:
            return frame + sums[n]

        prompt = fill(build, cost, tools.count, room, least=1, most=len(pieces))
        if prompt is not None:
            return prompt
    return None


class CorpusHaystack:
    """The text of one split, as it is: any place of it is as likely as any other.

    A call reads the tokens it needs and no others, from a memory map, so the corpus may be of any size.
    """

    def __init__(self, split: Split, tokenizer: Tokenizer) -> None:
        if len(split.tokens) <= 2 * split.n_documents:  # bos and eos of each
            raise DataError(f"data.haystack: there is no text in the {split.name} split")
        self.split, self.tokenizer = split, tokenizer

    def text(self, random: np.random.Generator, n_tokens: int) -> str:
        at = int(random.integers(len(self.split.tokens)))
        document = int(np.searchsorted(self.split.starts, at, side="right")) - 1
        parts: list[str] = []
        left = n_tokens
        while left > 0:
            stop = int(self.split.starts[document + 1])
            ids = np.asarray(self.split.tokens[at : min(stop, at + left + _MARGIN)])
            pieces, ends = self._units(ids, begins=at == self.split.starts[document], stops=at + len(ids) == stop)
            fits = int(np.searchsorted(ends, left, side="right"))
            if not fits and not parts and pieces:
                parts.append(self._beginning(pieces[0], left))
            parts += pieces[:fits]
            if fits < len(pieces):
                break
            left -= int(ends[-1]) if fits else 0
            if fits and not parts[-1].endswith("\n"):
                parts.append("\n")
                left -= 1
            document = (document + 1) % self.split.n_documents
            at = int(self.split.starts[document])
        return "".join(parts)

    def _units(self, ids: np.ndarray, *, begins: bool, stops: bool) -> tuple[list[str], np.ndarray]:
        """Whole units of a run of tokens, and how many tokens there are up to the end of each, about: a token that stands
        on a border counts for what is before it.
        """
        pieces = units(self.tokenizer.decode(ids.tolist()))
        behind = np.cumsum([len(unit.encode("utf-8", errors="surrogatepass")) for unit in pieces], dtype=np.int64)
        near = int(np.searchsorted(behind, _MARGIN - LONGEST, side="right"))
        first = 0 if begins else next((n for n in range(1, near) if _END.search(pieces[n - 1])), 1)
        last = len(pieces) if stops else len(pieces) - 1
        ends = np.searchsorted(np.cumsum(self.tokenizer.token_bytes[ids]), behind) + 1
        return pieces[first:last], ends[first:last] - (ends[first - 1] if 0 < first <= len(ends) else 0)

    def _beginning(self, unit: str, n_tokens: int) -> str:
        """As many words of a unit as fit."""
        words = re.findall(r"\S+\s*|\s+", unit)
        sizes = accumulate(self.tokenizer.count(word) for word in words)
        return "".join(word for word, size in zip(words, sizes, strict=True) if size <= n_tokens)


def _short(unit: str) -> list[str]:
    parts = []
    while len(unit) > LONGEST:
        space = unit.rfind(" ", 1, LONGEST) + 1
        parts.append(unit[: space or LONGEST])
        unit = unit[space or LONGEST :]
    return [*parts, unit] if unit else parts
