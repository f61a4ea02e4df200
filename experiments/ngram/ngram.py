"""A modified Kneser-Ney model of token n-grams, scored on the very test tokens that `ctxlab train` scores.

Chen and Goodman 1999, doi:10.1006/csla.1999.0128, section 3: interpolated, three discounts an order from its counts of counts,
lower orders from how many different tokens precede an n-gram (from its count where it begins a document).

    python experiments/ngram/ngram.py [ORDER] [SEGMENT]
"""

from __future__ import annotations

import math
import sys
import time
from dataclasses import dataclass

import numpy as np

from ctxlab.data.corpora.base import CORPORA
from ctxlab.data.prepare import prepare
from ctxlab.data.tokenizers.base import TOKENIZERS
from ctxlab.data.windows import EvalSegments
from ctxlab.evaluation.perplexity import PerplexityConfig


@dataclass(frozen=True)
class Order:
    """The n-grams of one order as numbers in base V, sorted, and of each context (the n-gram less its last token) its sums."""

    keys: np.ndarray
    counts: np.ndarray
    contexts: np.ndarray
    totals: np.ndarray  # of the counts behind a context
    left_over: np.ndarray  # the share of a context that the discounts set free
    discounts: np.ndarray  # by count: 0, 1, 2, 3 and more


def grams(tokens: np.ndarray, n: int, V: int) -> np.ndarray:
    """Every n tokens in a row as one number."""
    keys = np.zeros(max(0, len(tokens) - n + 1), dtype=np.int64)
    for start in range(n):
        keys = keys * V + tokens[start : start + len(keys)]
    return keys


def train(documents: list[np.ndarray], order: int, V: int, bos: int) -> list[Order]:
    """The orders from 1 to `order`."""
    raw = [
        np.unique(np.concatenate([grams(d, n, V) for d in documents]), return_counts=True) for n in range(1, order + 1)
    ]
    orders = []
    for n in range(1, order + 1):
        keys, counts = raw[n - 1]
        if n < order:
            longer = raw[n][0]
            begins = keys // V ** (n - 1) == bos
            inner, preceded = np.unique(longer % V**n, return_counts=True)
            keys, counts = np.concatenate([inner, keys[begins]]), np.concatenate([preceded, counts[begins]])
            by_key = np.argsort(keys)
            keys, counts = keys[by_key], counts[by_key]
        n1, n2, n3, n4 = (int((counts == c).sum()) for c in (1, 2, 3, 4))
        y = n1 / (n1 + 2 * n2)
        discounts = np.array([0.0, 1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3])
        contexts, context_of = np.unique(keys // V, return_inverse=True)
        totals = np.bincount(context_of, weights=counts)
        freed = np.bincount(context_of, weights=discounts[np.minimum(counts, 3)])
        orders.append(Order(keys, counts, contexts, totals, freed / totals, discounts))
    return orders


def probabilities(orders: list[Order], document: np.ndarray, places: np.ndarray, V: int) -> np.ndarray:
    """p(token | all before it) at some places of a document."""
    p = np.full(len(places), 1 / V)
    for n, order in enumerate(orders, start=1):
        context = np.zeros(len(places), dtype=np.int64)
        for back in range(n - 1, 0, -1):
            context = context * V + document[np.maximum(places - back, 0)]
        count, _ = found(order.keys, order.counts, context * V + document[places])
        total, known = found(order.contexts, order.totals, context)
        left_over, _ = found(order.contexts, order.left_over, context)
        direct = np.maximum(count - order.discounts[np.minimum(count, 3)], 0) / np.maximum(total, 1)
        p = np.where(known & (places >= n - 1), direct + left_over * p, p)
    return p


def found(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The value of each wanted key, 0 where there is none, and whether there is one."""
    at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    there = keys[at] == wanted
    return np.where(there, values[at], 0), there


def main() -> None:
    words = sys.argv[1:]
    order, segment = (int(word) for word in (words + ["5", "2048"][len(words) :])[:2])
    text = prepare(CORPORA.config({"name": "shakespeare"}), TOKENIZERS.config({"name": "unigram"}))
    train_split, test = text.splits["train"], text.splits["test"]
    V = text.tokenizer.vocab_size
    if V**order >= 2**63:
        sys.exit(
            f"order {order} of {V:,} tokens does not fit in 64 bits; the longest that does is {int(63 / math.log2(V))}"
        )
    start = time.perf_counter()
    documents = [np.asarray(train_split.document(n), dtype=np.int64) for n in range(train_split.n_documents)]
    orders = train(documents, order, V, text.tokenizer.bos_id)
    trained = time.perf_counter() - start

    asked = PerplexityConfig()
    assert asked.max_tokens != "none"
    segments = EvalSegments(test, segment, max_segments=max(asked.max_tokens // segment, asked.min_documents))
    nats, n_bytes = 0.0, 0
    for index in range(segments.n):
        number, tokens = segments.segment(index)
        document = np.asarray(test.document(number), dtype=np.int64)
        places = segments.start(index) + np.arange(1, len(tokens))
        nats -= float(np.log(probabilities(orders, document, places, V)).sum())
        n_bytes += int(text.tokenizer.token_bytes[document[places]].sum())
    n = segments.n * segment
    print(f"modified Kneser-Ney, order {order}, {trained:.1f} s to train on {len(train_split.tokens):,} tokens")
    print(f"{nats / n:.3f} nats/token, {nats / math.log(2) / n_bytes:.3f} bits/byte on {n:,} test tokens")


main()
