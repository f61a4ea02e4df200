"""Masked language modelling and span corruption, against counts and lengths computed another way."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from math import comb
from pathlib import Path

import numpy as np
import pytest

from ctxlab.data.prepare import TextDataset
from ctxlab.data.tasks.base import generator
from ctxlab.data.tokenizers.byte import Byte
from ctxlab.data.windows import IGNORED
from ctxlab.errors import DataError
from ctxlab.train.objectives.masked import Masked
from ctxlab.train.objectives.span_corruption import SpanCorruption, parts
from tests.evaluation.builders import split_of
from tests.train.builders import settings, train

BYTES = Byte(Byte.Config())
MARKED = Byte(Byte.Config(sentinels=100))


def text(n: int, seed: int = 0) -> np.ndarray:
    """bos, then n - 1 letters and spaces."""
    random = np.random.default_rng(seed)
    letters = random.choice([ord(c) + 4 for c in "abcde "], n - 1)
    return np.concatenate([[BYTES.bos_id], letters]).astype(np.int64)


@pytest.mark.parametrize(("n", "wanted"), [(128, 19), (10, 2), (4, 1), (3, 1), (512, 77), (30, 4)])
def test_a_row_has_as_many_masked_tokens_as_bert_chooses(n: int, wanted: int) -> None:
    """max(1, int(round(0.15 n))) of create_pretraining_data.py; 4.5 rounds to 4 there, as in Python."""
    tokens = text(n)
    for seed in range(20):
        row = Masked(Masked.Config()).row(tokens, generator(seed), BYTES)
        chosen = np.flatnonzero(row.targets != IGNORED)
        assert len(chosen) == wanted
        assert 0 not in chosen, "a special token is never chosen"
        assert np.array_equal(row.targets[chosen], tokens[chosen])
        untouched = np.setdiff1d(np.arange(n), chosen)
        assert np.array_equal(row.tokens[untouched], tokens[untouched])


def test_of_the_chosen_four_in_five_are_hidden_and_one_in_ten_is_random() -> None:
    hidden = same = other = 0
    places = np.zeros(200)
    for seed in range(400):
        tokens = text(200, seed)
        row = Masked(Masked.Config()).row(tokens, generator("x", seed), BYTES)
        chosen = np.flatnonzero(row.targets != IGNORED)
        places[chosen] += 1
        now = row.tokens[chosen]
        hidden += int((now == BYTES.mask_id).sum())
        same += int((now == tokens[chosen]).sum())
        other += int(((now != BYTES.mask_id) & (now != tokens[chosen])).sum())
    total = hidden + same + other
    assert total == 400 * 30
    spread = 4 * (0.25 * total) ** 0.5  # four standard errors, at most
    assert abs(hidden - (0.8 + 0.1 / 260) * total) < spread
    assert abs(same - (0.1 + 0.1 / 260) * total) < spread
    assert abs(other - 0.1 * (258 / 260) * total) < spread
    assert places[0] == 0
    assert abs(places[1:] - 400 * 30 / 199).max() < 5 * (400 * 0.15) ** 0.5  # every place alike


def test_whole_words_are_hidden_together() -> None:
    said = "one three  five, don't\nnine (a) 你好 b c d"
    tokens = np.array([BYTES.bos_id, *BYTES.encode(said)], dtype=np.int64)
    sizes = [
        3,
        6,
        6,
        1,
        4,
        1,
        1,
        5,
        2,
        1,
        1,
        4,
        3,
        2,
        2,
        2,
    ]  # in bytes, with the spaces before: "one", " three", "  five", ","
    ends = np.cumsum([1, *sizes]).tolist()
    assert ends[-1] == len(tokens)
    words = list(zip(ends[:-1], ends[1:]))
    objective = Masked(Masked.Config(whole_words=True, share=0.3))
    seen = set()
    for seed in range(60):
        row = objective.row(tokens, generator(seed), BYTES)
        chosen = set(np.flatnonzero(row.targets != IGNORED).tolist())
        assert 0 < len(chosen) <= round(0.3 * len(tokens))
        for first, stop in words:
            inside = chosen & set(range(first, stop))
            assert inside in (set(), set(range(first, stop))), (first, stop, chosen)
            seen.add((first, bool(inside)))
    assert {first for first, hidden in seen if hidden} == set(ends[:-1])


@pytest.mark.parametrize("whole_words", [False, True])
def test_text_without_spaces_is_masked_too(whole_words: bool) -> None:
    """Of 256 bytes of Chinese 38 are to be chosen: of whole characters of 3 bytes, 12."""
    said = "话说天下大势，分久必合，合久必分。周末七国分争，并入于秦。" * 4
    tokens = np.array(BYTES.encode(said))[:255]
    objective = Masked(Masked.Config(whole_words=whole_words))
    hidden = set()
    for seed in range(40):
        chosen = np.flatnonzero(objective.row(tokens, generator(seed), BYTES).targets != IGNORED)
        assert len(chosen) == (36 if whole_words else 38)
        hidden.update(chosen.tolist())
    assert len(hidden) > 250


def test_a_row_of_words_that_are_all_too_long_has_targets() -> None:
    """15 of 100 tokens: a stretch of one of the two words, anywhere in it."""
    tokens = np.array([BYTES.bos_id, *BYTES.encode("a" * 49 + " " + "b" * 49)])
    firsts = []
    for seed in range(60):
        row = Masked(Masked.Config(whole_words=True)).row(tokens, generator(seed), BYTES)
        chosen = np.flatnonzero(row.targets != IGNORED)
        assert chosen.tolist() == list(range(chosen[0], chosen[0] + 15))
        assert chosen[-1] < 50 or chosen[0] >= 50
        firsts.append(int(chosen[0]))
    assert min(firsts) < 10
    assert max(firsts) > 75


def test_a_step_without_targets_moves_nothing_to_nan(tmp_path: Path) -> None:
    """Documents of bos and eos alone: nothing can be masked, and the mean over no targets is 0."""
    data = TextDataset({name: split_of([[1, 2]] * 6, name) for name in ("train", "validation", "test")}, BYTES, {})
    config = replace(
        settings(context=1, max_steps=2, model={"architecture": "encoder"}), objective=Masked.Config(whole_words=True)
    )
    run = train(tmp_path, data, config)
    assert [row["loss"] for row in run.rows.of("train")] == [0.0, 0.0]
    assert all(bool(weight.isfinite().all()) for weight in run.weights.values())


@pytest.mark.parametrize(("context", "raw", "said"), [(512, 568, 114), (128, 141, 29)])
def test_lengths_are_those_of_t5(context: int, raw: int, said: int) -> None:
    """568 tokens make inputs of 512 and targets of 114 (random_spans_helper of T5's preprocessors)."""
    objective = SpanCorruption(SpanCorruption.Config())
    assert objective.window(context, MARKED) == raw
    row = objective.row(text(raw), generator(0), MARKED)
    assert row.source is not None
    assert (len(row.source), len(row.targets), len(row.tokens)) == (context, said, said)


@pytest.mark.parametrize("n", [4, 7, 50, 141, 568])
def test_source_and_target_put_together_are_the_text(n: int) -> None:
    objective = SpanCorruption(SpanCorruption.Config())
    noise = min(max(round(0.15 * n), 1), n - 1)
    spans = max(1, round(noise / 3))
    for seed in range(10):
        tokens = text(n, seed)
        row = objective.row(tokens, generator("s", seed), MARKED)
        assert row.source is not None
        source, target = row.source.tolist(), row.targets.tolist()
        assert row.tokens.tolist() == [MARKED.bos_id, *target[:-1]]
        assert source.pop() == target.pop() == MARKED.eos_id
        sentinels = [MARKED.vocab_size - 1 - k for k in range(spans)]
        assert [t for t in source if t >= 260] == [t for t in target if t >= 260] == sentinels
        left_out: dict[int, list[int]] = {}
        for token in target:
            if token >= 260:
                left_out[token] = []
            else:
                left_out[sentinels[len(left_out) - 1]].append(token)
        whole = [t for token in source for t in (left_out[token] if token >= 260 else [token])]
        assert whole == tokens.tolist()
        assert sum(map(len, left_out.values())) == noise
        assert all(left_out.values())
        assert source[0] == tokens[0], "the first token is never noise"
        assert source[-1] >= 260, "the text ends in noise"


@pytest.mark.parametrize(
    ("density", "mean", "noise", "spans"),
    [(0.5, 1, 64, 64), (0.6, 1, 77, 51), (0.75, 2, 96, 32), (0.8, 3, 102, 26), (0.9, 3, 115, 13), (0.15, 3, 19, 6)],
)
def test_spans_are_no_more_than_the_text_between_them(density: float, mean: float, noise: int, spans: int) -> None:
    """Of 128 tokens round(128 density) are noise; the rest keeps that many spans apart at most."""
    objective = SpanCorruption(SpanCorruption.Config(density=density, mean_span=mean))
    assert objective.counts(128) == (noise, spans)
    many = Byte(Byte.Config(sentinels=2000))
    for context in (*range(3, 40), 300):
        n = objective.window(context, many)
        for length in {2, n}:
            row = objective.row(text(length), generator(context), many)
            assert row.source is not None
            assert max(len(row.source), len(row.targets)) <= context
            left_out = sum(token < 260 and token != many.eos_id for token in row.targets.tolist())
            assert left_out == objective.counts(length)[0]


def test_every_way_to_cut_is_as_likely() -> None:
    random = np.random.default_rng(0)
    draws, n, k = 12_000, 7, 3
    counts = Counter(tuple(parts(n, k, random)) for _ in range(draws))
    assert len(counts) == comb(n - 1, k - 1)
    expected = draws / len(counts)
    assert all(sum(found) == n and min(found) >= 1 for found in counts)
    assert max(abs(count - expected) for count in counts.values()) < 5 * expected**0.5


def test_too_few_sentinels_and_too_short_a_context() -> None:
    objective = SpanCorruption(SpanCorruption.Config())
    with pytest.raises(
        DataError, match=r"tokenizer.sentinels: 0 are too few for the 28 spans of 568 tokens; use .*=100"
    ):
        objective.window(512, BYTES)
    with pytest.raises(DataError, match=r"context: 2 tokens are too few .*; the nearest valid value is 3"):
        objective.window(2, MARKED)
    assert objective.window(3, MARKED) == 2


def test_rows_change_with_the_epoch_and_held_out_ones_never_do() -> None:
    documents = [text(400, seed).tolist() for seed in range(6)]
    data = TextDataset({name: split_of(documents, name) for name in ("train", "validation", "test")}, BYTES, {})
    objective = Masked(Masked.Config())
    rows, again, other = (objective.rows(data, 64, seed=seed, packed=False) for seed in (1, 1, 2))
    index, epoch = np.arange(6), np.zeros(6, dtype=int)
    assert rows.n_targets(index, epoch) == 6 * 10
    for at in range(6):
        one = rows.row(at, 0)
        assert np.array_equal(one.targets, again.row(at, 0).targets)
        assert not np.array_equal(one.targets, other.row(at, 0).targets)
        assert not np.array_equal(one.targets, rows.row(at, 1).targets)
    first, names = objective.held_out(data, "test", 64, 12)
    second, _ = objective.held_out(data, "test", 64, 12)
    assert len(first) == 12
    assert len(set(names)) == 6
    assert all(np.array_equal(a.tokens, b.tokens) for a, b in zip(first, second, strict=True))


def test_sentinels_are_ids_that_no_text_has_and_part_of_the_tokenizers_identity() -> None:
    assert (BYTES.vocab_size, MARKED.vocab_size) == (260, 360)
    assert [MARKED.sentinel_id(k) for k in (0, 1, 99)] == [359, 358, 260]
    assert MARKED.decode([359, *MARKED.encode("a"), 260]) == "a"
    assert MARKED.encode("any text") == BYTES.encode("any text")
    assert MARKED.sha256 != BYTES.sha256
