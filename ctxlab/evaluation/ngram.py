"""The traditional language model beside every perplexity: modified Kneser-Ney over the same tokens and the same split."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from pydantic import Field

from ctxlab.data.prepare import TextDataset
from ctxlab.data.tokens import Split
from ctxlab.data.windows import EvalSegments
from ctxlab.evaluation.perplexity import DocumentScores, difference_facts, document_scores, score_measurements
from ctxlab.fields import Count
from ctxlab.records.schema import Measurement
from ctxlab.registry import ComponentConfig

BASELINE = "ngram"
_UNKNOWN = -1


class NGramConfig(ComponentConfig):
    """How long a history is counted, on how much text."""

    order: int = Field(5, ge=1, le=8, description="tokens of an n-gram: order - 1 of history and the one that follows")
    train_tokens: Count = Field(20_000_000, description="training tokens that are counted, at most")


@dataclass(frozen=True)
class _Order:
    """All n-grams of one order, named by their places; a key is the name of all tokens but the last, and the last."""

    keys: np.ndarray  # prefix * V + last token, ascending
    counts: np.ndarray
    totals: np.ndarray  # of each prefix: the sum of the counts behind it
    left_over: np.ndarray  # of each prefix: the share that the discounts set free
    discounts: np.ndarray  # by count: 0, 1, 2, 3 and more


class KneserNey:
    """p(w | h) = max(c(hw) - D(c(hw)), 0) / c(h) + gamma(h) p(w | h'), h' the history without its oldest token.

    Chen and Goodman 1999, doi:10.1006/csla.1999.0128, sections 3 and 4.1: interpolated and modified, three discounts an
    order from its counts of counts; below the highest order c is how many different tokens precede an n-gram (its count,
    where it begins a document: nothing precedes it there). Below the unigrams all `vocab_size` tokens are alike.

    documents: token ids, each beginning with `bos_id`. Keys are numbers below (different n-grams) x vocab_size: any order
    and vocabulary fit in 64 bits.
    """

    def __init__(self, documents: Sequence[np.ndarray], *, order: int, vocab_size: int, bos_id: int) -> None:
        self.vocab_size = vocab_size
        self.orders: list[_Order] = []
        tokens = np.concatenate(documents).astype(np.int64)
        sizes = [len(document) for document in documents]
        ends = np.repeat(np.cumsum(sizes), sizes)  # of each token's document
        starts = np.arange(len(tokens))  # of the n-grams of one order
        prefix, n_prefixes = np.zeros_like(starts), 1  # the names of what comes before their last token
        shorter = starts  # the names of the n-grams of the order before, by their first token
        raw: list[tuple[Any, ...]] = []
        for n in range(1, order + 1):
            if not len(starts):  # every document is shorter
                break
            keys, first, names, counts = np.unique(
                prefix * vocab_size + tokens[starts + n - 1], return_index=True, return_inverse=True, return_counts=True
            )
            raw.append((keys, starts[first], counts, n_prefixes))
            named = np.full(len(tokens), _UNKNOWN)
            named[starts] = names
            if n > 1:  # of each different n-gram, the (n - 1)-gram that it ends with
                self._count(raw[n - 2], shorter[starts[first] + 1], tokens, bos_id)
            shorter = named
            starts = starts[starts + n < ends[starts]]
            prefix, n_prefixes = named[starts], len(keys)
        self._count(raw[-1], None, tokens, bos_id)

    def _count(self, raw: tuple[Any, ...], preceded: np.ndarray | None, tokens: np.ndarray, bos_id: int) -> None:
        """Adds an order; `preceded` are its n-grams once for each different token before them, None in the highest."""
        keys, examples, counts, n_prefixes = raw
        if preceded is not None:
            begins = tokens[examples] == bos_id
            counts = np.where(begins, counts, np.bincount(preceded, minlength=len(keys)))
        discounts = modified_discounts(counts)
        prefixes = keys // self.vocab_size
        totals = np.bincount(prefixes, weights=counts, minlength=n_prefixes)
        freed = np.bincount(prefixes, weights=discounts[np.minimum(counts, 3)], minlength=n_prefixes)
        self.orders.append(_Order(keys, counts, totals, freed / np.maximum(totals, 1), discounts))

    def probabilities(self, document: np.ndarray, places: np.ndarray) -> np.ndarray:
        """p of the tokens at some places of a document, each given all before it that an n-gram reaches."""
        document = document.astype(np.int64)
        p = np.full(len(places), 1 / self.vocab_size)
        for n, order in enumerate(self.orders, start=1):
            history = np.zeros(len(places), dtype=np.int64)
            for shorter, back in zip(self.orders, range(n - 1, 0, -1)):
                history = self._found(shorter, history, document[np.maximum(places - back, 0)])
            known = (history != _UNKNOWN) & (places >= n - 1)
            at = np.where(known, history, 0)
            name = self._found(order, np.where(known, history, _UNKNOWN), document[places])
            count = np.where(name == _UNKNOWN, 0, order.counts[np.maximum(name, 0)])
            total = order.totals[at]
            direct = np.maximum(count - order.discounts[np.minimum(count, 3)], 0) / np.maximum(total, 1)
            p = np.where(known & (total > 0), direct + order.left_over[at] * p, p)
        return p

    def _found(self, order: _Order, prefix: np.ndarray, last: np.ndarray) -> np.ndarray:
        """The names of n-grams, _UNKNOWN where they, or their prefixes, never occurred."""
        keys = prefix * self.vocab_size + last
        at = np.minimum(np.searchsorted(order.keys, keys), len(order.keys) - 1)
        return np.where((prefix != _UNKNOWN) & (order.keys[at] == keys), at, _UNKNOWN)


def modified_discounts(counts: np.ndarray) -> np.ndarray:
    """D(0) = 0, D(c) = c - (c + 1) Y n_{c+1} / n_c for c = 1, 2, 3 and more, Y = n_1 / (n_1 + 2 n_2), n_c the n-grams of count c.

    Chen and Goodman 1999, eq. 26. Where a text is so small that an n_c is 0, or what follows is not within 0 < D <= c, Y stands
    for the discount, or a half for Y: something is always left over for what was never seen.
    """
    n = [int((counts == c).sum()) for c in range(1, 5)]
    y = n[0] / (n[0] + 2 * n[1]) if n[0] else 0.5
    found = [c - (c + 1) * y * n[c] / n[c - 1] if n[c - 1] else y for c in (1, 2, 3)]
    return np.array([0.0, *(d if 0 < d <= c else y for c, d in enumerate(found, start=1))])


def evaluate_ngram(
    dataset: TextDataset,
    config: NGramConfig,
    segments: EvalSegments,
    *,
    split: str = "test",
    against: DocumentScores | None = None,
    context: int | None = None,
    advance: Callable[[int], None] = lambda _: None,
) -> tuple[list[Measurement], DocumentScores]:
    """Counts the training split and scores the targets of `segments`; the text before a segment is history too.

    `against` are a model's sums over the same targets at `context`: what it has more of in nats per token, with the interval
    paired over documents, is a fact beside each measurement.
    """
    begun = time.perf_counter()
    documents = _first_documents(dataset.splits["train"], config.train_tokens)
    model = KneserNey(
        documents, order=config.order, vocab_size=dataset.tokenizer.vocab_size, bos_id=dataset.tokenizer.bos_id
    )
    counted = sum(map(len, documents))
    seconds = time.perf_counter() - begun
    nats = np.zeros(segments.n)
    for index in range(segments.n):
        number, tokens = segments.segment(index)
        places = segments.start(index) + np.arange(1, len(tokens))
        nats[index] = -np.log(model.probabilities(np.asarray(segments.split.document(number)), places)).sum()
        advance(len(places))
    scores = document_scores(segments, nats, dataset.tokenizer)
    facts: dict[str, Any] = {"train_tokens": counted, "train_seconds": seconds}
    if difference := difference_facts(against, scores):
        facts |= {**difference, "difference_context": context}
    measurements = score_measurements(
        scores,
        split=split,
        protocol=f"modified Kneser-Ney, order {config.order}",
        axes={"segment": segments.length, "baseline": BASELINE, "order": config.order},
        facts=facts,
    )
    return measurements, scores


def _first_documents(split: Split, most: int) -> list[np.ndarray]:
    """Documents in their order until `most` tokens are reached; the one that goes beyond is cut."""
    found, left = [], most
    for number in range(split.n_documents):
        if left <= 0:
            break
        document = np.asarray(split.document(number))[:left]
        left -= len(document)
        if len(document):
            found.append(document)
    return found
