"""The words of RULER's keys, values and lists: those of the package wonderwords, of one part only, in a fixed order.

RULER (Hsieh et al. 2024, arXiv:2404.06654) takes keys and values `adjective-noun` and the words of its numbered lists
from it. The few entries that are more than plain lower-case letters (`ad hoc`, `e-book`) are left out here, so that a
key is always two words around one hyphen.
"""

from __future__ import annotations

from functools import cache
from importlib.resources import files


def adjectives() -> tuple[str, ...]:
    return _words("adjectivelist")


def nouns() -> tuple[str, ...]:
    return _words("nounlist")


@cache
def everything() -> tuple[str, ...]:
    """Adjectives, nouns and verbs, each once."""
    return tuple(sorted({*adjectives(), *nouns(), *_words("verblist")}))


@cache
def _words(name: str) -> tuple[str, ...]:
    text = (files("wonderwords") / "assets" / f"{name}.txt").read_text(encoding="utf-8")
    plain = {
        word for line in text.splitlines() if (word := line.strip()).isascii() and word.isalpha() and word.islower()
    }
    return tuple(sorted(plain))
