"""Exact match and F1 of an answer in words, by the rules of SQuAD's evaluation (version 2.0, which has 1.1's for its answers).

Rajpurkar et al. 2016, arXiv:1606.05250, section 6.1; Rajpurkar, Jia and Liang 2018, arXiv:1806.03822.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


class Scores(NamedTuple):
    """Of one answer, 0 to 1."""

    exact: float
    f1: float


def normalized(text: str) -> str:
    """A text in lower case, without ASCII punctuation, then without the words a, an and the, single spaces between the others."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def score(said: str, golds: Sequence[str]) -> Scores:
    """The best of an answer against each of those that count as right, for exact match and F1 apart.

    None count where there is no answer: then nothing has to be said. A gold answer of which normalization leaves nothing does
    not count, unless all are such.
    """
    wanted = [gold for gold in golds if normalized(gold)] or [""]
    return Scores(
        max(float(normalized(said) == normalized(gold)) for gold in wanted), max(word_f1(said, gold) for gold in wanted)
    )


def word_f1(said: str, gold: str) -> float:
    """2 p r / (p + r) of the normalized words, each as often as it is in both; where either has none, whether both have none."""
    ours, theirs = normalized(said).split(), normalized(gold).split()
    if not ours or not theirs:
        return float(ours == theirs)
    common = sum((Counter(ours) & Counter(theirs)).values())
    return 2 * common / (len(ours) + len(theirs))  # = 2 p r / (p + r) with p = common / ours and r = common / theirs
