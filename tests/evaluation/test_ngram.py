"""Modified Kneser-Ney against the paper's formulas over dictionaries, token by token."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence

import numpy as np
import pytest

from ctxlab.data.prepare import TextDataset, prepare
from ctxlab.data.source import SOURCES
from ctxlab.data.tokenizers.base import TOKENIZERS
from ctxlab.data.tokenizers.byte import Byte
from ctxlab.data.windows import EvalSegments
from ctxlab.evaluation.ngram import KneserNey, NGramConfig, evaluate_ngram, modified_discounts
from ctxlab.evaluation.perplexity import DocumentScores
from tests.evaluation.builders import split_of

BOS, V = 1, 3000


def text(seed: int, documents: int = 150, longest: int = 60) -> list[np.ndarray]:
    """A walk in which the next token leans on the last two, or is a rare one: every order has something to tell."""
    random = np.random.default_rng(seed)
    found = []
    for _ in range(documents):
        tokens = [BOS, int(random.integers(2, V))]
        for _ in range(int(random.integers(3, longest))):
            likely = 2 + (tokens[-1] * 3 + tokens[-2]) % 10
            tokens.append(likely if random.random() < 0.7 else 2 + int(random.zipf(1.2)) % (V - 2))
        found.append(np.array(tokens))
    return found


class ByHand:
    """Chen and Goodman 1999, interpolated and modified, as the formulas stand: one probability at a time."""

    def __init__(self, documents: Sequence[np.ndarray], order: int, vocab_size: int = V) -> None:
        self.vocab_size = vocab_size
        raw: list[Counter[tuple[int, ...]]] = [Counter() for _ in range(order)]
        for document in documents:
            words = document.tolist()
            for n in range(1, order + 1):
                raw[n - 1].update(tuple(words[i : i + n]) for i in range(len(words) - n + 1))
        self.counts: list[dict[tuple[int, ...], int]] = []
        for n in range(1, order + 1):
            if n == order:
                self.counts.append(dict(raw[n - 1]))
                continue
            preceding = defaultdict(set)
            for gram in raw[n]:
                preceding[gram[1:]].add(gram[0])
            self.counts.append({g: c if g[0] == BOS else len(preceding[g]) for g, c in raw[n - 1].items()})
        self.discounts = []
        for counts in self.counts:
            n1, n2, n3, n4 = (sum(c == k for c in counts.values()) for k in (1, 2, 3, 4))
            y = n1 / (n1 + 2 * n2)
            self.discounts.append([0, 1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3])
            assert all(0 <= found <= k for k, found in enumerate(self.discounts[-1]))
        self.behind: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for counts in self.counts:
            for gram, c in counts.items():
                self.behind[gram[:-1]].append(c)

    def p(self, word: int, history: tuple[int, ...]) -> float:
        counts, d = self.counts[len(history)], self.discounts[len(history)]
        lower = self.p(word, history[1:]) if history else 1 / self.vocab_size
        behind = self.behind.get(history)
        if not behind:
            return lower
        total = sum(behind)
        freed = sum(d[min(c, 3)] for c in behind)
        count = counts.get((*history, word), 0)
        return max(count - d[min(count, 3)], 0) / total + freed / total * lower


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_equals_the_formulas(order: int) -> None:
    documents, unseen = text(0), text(1, 4)
    model, by_hand = KneserNey(documents, order=order, vocab_size=V, bos_id=BOS), ByHand(documents, order)
    for document in (*documents[:3], *unseen):
        places = np.arange(1, len(document))
        expected = [by_hand.p(int(document[i]), tuple(document[max(0, i - order + 1) : i].tolist())) for i in places]
        np.testing.assert_allclose(model.probabilities(document, places), expected, rtol=1e-12)


@pytest.mark.slow
def test_equals_the_formulas_on_the_default_corpus() -> None:
    """Order 5 on a million tokens of plays, as `ctxlab train` has it: every target of the first test plays."""
    data = prepare(SOURCES.config({"name": "shakespeare"}), TOKENIZERS.config({"name": "unigram", "vocab_size": 2048}))
    vocab_size, bos_id = data.tokenizer.vocab_size, data.tokenizer.bos_id
    train, test = data.splits["train"], data.splits["test"]
    documents = [np.asarray(train.document(number)) for number in range(train.n_documents)]
    assert sum(map(len, documents)) > 10**6
    model = KneserNey(documents, order=5, vocab_size=vocab_size, bos_id=bos_id)
    by_hand = ByHand(documents, 5, vocab_size)
    nats = expected = 0.0
    for number in range(2):
        document = np.asarray(test.document(number))
        places = np.arange(1, len(document))
        nats -= float(np.log(model.probabilities(document, places)).sum())
        words = document.tolist()
        expected -= sum(math.log(by_hand.p(words[i], tuple(words[max(0, i - 4) : i]))) for i in places)
    assert nats == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("history", [(), (2,), (3, 4), (9, 9, 9)])
def test_probabilities_of_all_tokens_add_up_to_one(history: tuple[int, ...]) -> None:
    model = KneserNey(text(0), order=4, vocab_size=V, bos_id=BOS)
    whole = [model.probabilities(np.array([BOS, *history, w]), np.array([len(history) + 1]))[0] for w in range(V)]
    assert sum(whole) == pytest.approx(1.0, abs=1e-12)


def test_a_vocabulary_and_an_order_whose_product_fills_more_than_64_bits() -> None:
    """100,000 tokens and order 5 are 83 bits; the same text in a small vocabulary gives the same ratios of probabilities."""
    documents = text(0)
    big, small = (KneserNey(documents, order=5, vocab_size=size, bos_id=BOS) for size in (100_000, V))
    document = documents[0]
    places = np.arange(6, len(document))
    assert [len(order.keys) for order in big.orders] == [len(order.keys) for order in small.orders]
    p, q = big.probabilities(document, places), small.probabilities(document, places)
    assert (p <= q).all()  # less is left for each of more tokens
    assert (p < q).any()
    np.testing.assert_allclose(p, q, rtol=5e-2)


def test_nothing_is_impossible_in_a_text_of_few_tokens() -> None:
    """Byte-like text, whose counts of counts are not those that the formulas expect."""
    random = np.random.default_rng(0)
    documents = [np.concatenate([[BOS], 40 + random.integers(0, 10, 300)]) for _ in range(20)]
    model = KneserNey(documents, order=5, vocab_size=260, bos_id=BOS)
    other = np.concatenate([[BOS], random.integers(0, 260, 500)])
    assert (model.probabilities(other, np.arange(1, len(other))) > 0).all()


def test_documents_shorter_than_the_order() -> None:
    model = KneserNey([np.array([BOS, 2, 3]), np.array([BOS, 2])], order=5, vocab_size=V, bos_id=BOS)
    assert len(model.orders) == 3
    whole = [model.probabilities(np.array([BOS, 2, w]), np.array([2]))[0] for w in range(V)]
    assert sum(whole) == pytest.approx(1.0, abs=1e-12)
    assert max(whole) == whole[3]


def test_discounts_by_hand() -> None:
    """Seven n-grams once, three twice, two three times, one four times: Y = 7 / 13."""
    y = 7 / 13
    found = modified_discounts(np.array([1] * 7 + [2] * 3 + [3] * 2 + [4]))
    assert found.tolist() == pytest.approx([0, 1 - 2 * y * 3 / 7, 2 - 3 * y * 2 / 3, 3 - 4 * y * 1 / 2])
    assert modified_discounts(np.array([5, 6])).tolist() == [0, 0.5, 0.5, 0.5]  # none that occurs once
    falling = modified_discounts(np.array([1] * 9 + [2] + [3] * 5))  # 2 - 3 Y n_3 / n_2 would be below 0
    assert falling.tolist() == pytest.approx([0, 9 / 11, 9 / 11, 3.0])
    assert math.isclose(modified_discounts(np.array([1, 1, 5]))[1], 1.0)  # none twice: the whole count is set free


def test_scores_the_targets_of_the_segments_and_is_compared_with_a_model_in_pairs() -> None:
    documents = [(d % 250).tolist() for d in text(0)]  # ids that bytes have
    tests = [(d % 250).tolist() for d in text(2, 6) if len(d) > 20]
    split = split_of(tests)
    data = TextDataset({"train": split_of(documents, "train"), "test": split}, Byte(Byte.Config()), {})
    segments = EvalSegments(split, 10)
    model = KneserNey([np.array(d) for d in documents], order=3, vocab_size=data.tokenizer.vocab_size, bos_id=BOS)
    expected: dict[str, float] = {}
    for name, tokens in zip(split.names, tests, strict=True):
        scored = np.arange(1, (len(tokens) - 1) // 10 * 10 + 1)
        expected[name] = float(-np.log(model.probabilities(np.array(tokens), scored)).sum())
    config = NGramConfig(order=3, train_tokens=10**6)
    rows, sums = evaluate_ngram(data, config, segments)
    assert dict(zip(sums.names, sums.nats, strict=True)) == pytest.approx(expected, rel=1e-12)
    named = {row.name: row for row in rows}
    assert named["nats_per_token"].value == pytest.approx(sum(expected.values()) / sum(sums.targets))
    assert named["nats_per_token"].facts["train_tokens"] == sum(map(len, documents))
    assert "difference" not in named["nats_per_token"].facts
    against = DocumentScores(sums.names, [n + 1.0 for n in sums.nats], sums.targets, sums.n_bytes)
    rows, _ = evaluate_ngram(data, config, segments, against=against, context=64)
    facts = rows[0].facts
    assert facts["difference"] == pytest.approx(len(tests) / sum(sums.targets))  # one nat more in every document
    assert facts["difference_low"] < facts["difference"] < facts["difference_high"]
    few, _ = evaluate_ngram(data, NGramConfig(order=3, train_tokens=50), segments)
    assert few[0].facts["train_tokens"] == 50
    assert few[0].value > rows[0].value
