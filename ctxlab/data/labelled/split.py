"""Which articles, passages or texts are held out (those with the smallest hashes, whatever the order and the seed), and
what learns its tokens from the others."""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from ctxlab.data.pairs.parallel import HeldOut, sentence_hash
from ctxlab.data.tokenizers.base import TOKENIZERS, Tokenizer
from ctxlab.data.tokenizers.sides import Tokenizers
from ctxlab.errors import DataError

SHARE = 0.05  # of what there is, for the test and for the validation each
MOST = 4096
NOBODY = -1  # a bound that no hash is below


def held_out(names: Iterable[str], *, what: str, fewest: int, tested_apart: bool, instead: str = "") -> HeldOut:
    """The parts of the split. `tested_apart`: the test is a file of its own, and only validation is held out.

    At least `fewest` are held out for each. Raises DataError where `what` are too few for that, with what to do `instead`.
    """
    seen = np.unique(np.fromiter((sentence_hash(name) for name in names), dtype=np.uint64))
    each = int(min(max(fewest, SHARE * len(seen)), MOST))
    parts = 1 if tested_apart else 2
    if len(seen) < 4 * parts * fewest:
        raise DataError(
            f"data.path: {len(seen)} different {what} are too few to hold some out; {4 * parts * fewest} are enough{instead}"
        )
    lowest = heapq.nsmallest(parts * each, seen.tolist())
    return HeldOut(NOBODY if tested_apart else lowest[each - 1], lowest[-1])


def learned(tokenizer: Tokenizer.Config | Tokenizers, sample: Iterable[str], folder: Path) -> Tokenizer:
    """The tokenizer that is given, or one that is made of the texts; a copy lies in the folder."""
    if not isinstance(tokenizer, Tokenizers):
        tokenizer = Tokenizers.joint(TOKENIZERS.get(tokenizer.name).make(tokenizer, sample))
    tokenizer.save(folder)
    return tokenizer.target
