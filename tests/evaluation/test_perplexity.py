"""The table of lengths against models with a known answer, hand counts, and full forwards in float64."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ctxlab.data.prepare import TextDataset
from ctxlab.data.tokenizers.base import TOKENIZERS
from ctxlab.data.tokenizers.byte import Byte
from ctxlab.data.windows import EvalSegments
from ctxlab.evaluation.intervals import student_t_quantile
from ctxlab.evaluation.perplexity import (
    DocumentScores,
    PerplexityConfig,
    auto_lengths,
    evaluate_perplexity,
    score_measurements,
)
from ctxlab.model.cache import KVCache
from ctxlab.model.transformer import Transformer
from ctxlab.records.schema import Measurement
from ctxlab.train.scoring import Validation, score_windows
from tests.evaluation.builders import Known, bigram, dataset_of, random_documents, split_of, unique_documents
from tests.model.builders import VOCAB, build, tokens

CPU = torch.device("cpu")
Table = dict[int, dict[str, Measurement]]


def evaluate(
    model: Any,
    dataset: TextDataset,
    lengths: Sequence[int],
    *,
    context: int = 64,
    precision: str = "fp32",
    **config: Any,
) -> tuple[Table, dict[int, DocumentScores]]:
    """The table by length and name, and the sums behind it."""
    settings = PerplexityConfig(**{"lengths": tuple(lengths), "min_documents": 1, "max_tokens": "none"} | config)
    rows, documents, _ = evaluate_perplexity(
        model, dataset, settings, trained_context=context, device=CPU, precision=precision  # type: ignore[arg-type]
    )  # fmt: skip
    table: Table = {}
    for row in rows:
        if row.context is None:  # by position, and what is made of it
            continue
        assert row.name not in table.setdefault(row.context or 0, {}), "a row twice"
        table[row.context or 0][row.name] = row
    return table, documents


def counting_dataset(documents: Sequence[Sequence[int]]) -> TextDataset:
    """Ids of any size, each one byte of text."""
    n_ids = max(max(document) for document in documents) + 1
    return dataset_of(split_of(documents), SimpleNamespace(token_bytes=np.ones(n_ids, int), pieces=(b"x",) * n_ids))  # type: ignore[arg-type]


def value(table: Table, length: int, name: str = "nats_per_token") -> float:
    found = table[length][name].value
    assert found is not None
    return found


def known_nats(segments: EvalSegments, table: Any, length: int = 8, **options: Any) -> np.ndarray:
    settings: dict[str, Any] = {"device": CPU, "precision": "fp32", "batch_tokens": 64} | options
    return score_windows(table, segments, length, **settings)


# Models with a known answer


@pytest.mark.parametrize("position", ["rope", "alibi", "t5", "nope", "sinusoidal"])
def test_a_model_that_knows_nothing_has_the_vocabulary_as_its_perplexity(position: str) -> None:
    model = build(position)
    with torch.no_grad():
        model.embedding.weight.zero_()  # the head too: all logits are 0
    dataset = dataset_of(split_of(random_documents([40, 70, 33], VOCAB)))
    table, _ = evaluate(model, dataset, (8, 32))
    for length in (8, 32):
        assert value(table, length, "perplexity") == pytest.approx(VOCAB, rel=1e-6)
        assert value(table, length) == pytest.approx(math.log(VOCAB), rel=1e-7)


def test_a_model_that_knows_the_token_before_does_equally_well_at_every_length() -> None:
    documents = random_documents([50, 81, 33, 97], 7)
    model, nats = bigram(7)
    table, sums = evaluate(model, dataset_of(split_of(documents)), (1, 2, 5, 16, 32))
    expected, n_targets = 0.0, 0
    for document in documents:
        n_scored = (len(document) - 1) // 32 * 32
        expected += sum(nats[a, b] for a, b in pairwise(document[: n_scored + 1]))
        n_targets += n_scored
    for length in (1, 2, 5, 16, 32):
        assert value(table, length) == pytest.approx(expected / n_targets, rel=1e-12)
        assert value(table, length, "perplexity") == pytest.approx(math.exp(expected / n_targets), rel=1e-12)
        assert table[length]["perplexity"].n_targets == sum(sums[length].targets) == n_targets == 32 + 64 + 32 + 96


def nats_by_full_forwards(model: Transformer, documents: Sequence[Sequence[int]], segment: int, length: int) -> float:
    """Nats per token in float64, window by window, each by a forward of its own and a softmax over all logits."""
    double = build(model.position.config.name).double()
    double.load_state_dict(model.state_dict())
    total, count = 0.0, 0
    for document in documents:
        for start in range(0, len(document) - segment, segment):
            piece = document[start : start + segment + 1]
            for first in range(0, segment, length):
                window = piece[first : min(first + length, segment) + 1]
                with torch.no_grad():
                    scores = double(torch.tensor([window[:-1]])).log_softmax(-1)[0]
                total -= sum(scores[place, token].item() for place, token in enumerate(window[1:]))
                count += len(window) - 1
    return total / count


@pytest.mark.parametrize("position", ["rope", "alibi", "nope"])
def test_every_length_equals_full_forwards_in_float64(position: str) -> None:
    documents = random_documents([49, 120, 60], VOCAB)
    model = build(position)
    table, _ = evaluate(model, dataset_of(split_of(documents)), (8, 20, 48))
    for length in (8, 20, 48):
        assert value(table, length) == pytest.approx(nats_by_full_forwards(model, documents, 48, length), rel=2e-6)
    assert value(table, 8) != pytest.approx(value(table, 48), rel=1e-3), "context changes nothing: a weak test"


# Which tokens are scored


@settings(deadline=None, max_examples=100)
@given(
    sizes=st.lists(st.integers(1, 70), min_size=1, max_size=6),
    lengths=st.sets(st.integers(1, 40), min_size=1, max_size=4),
    batch_tokens=st.integers(1, 100),
    segment=st.one_of(st.just("auto"), st.integers(1, 40)),
    max_tokens=st.one_of(st.just("none"), st.integers(1, 200)),
)
def test_every_length_scores_the_same_targets_once_each(
    sizes: list[int], lengths: set[int], batch_tokens: int, segment: str | int, max_tokens: str | int
) -> None:
    """Ids are unique, so the windows that a model is asked for tell which tokens were scored, and with what past."""
    model = Known(lambda inputs, targets: torch.ones(targets.shape))
    dataset = counting_dataset(unique_documents(sizes))
    table, _ = evaluate(
        model, dataset, sorted(lengths), batch_tokens=batch_tokens, segment=segment, max_tokens=max_tokens
    )
    asked = iter(model.asked)
    scored: dict[int, list[int]] = {}
    for length in sorted(lengths):  # the order in which they are evaluated
        row = table[length]["nats_per_token"]
        if row.value is None:
            assert row.status == "no_document"
            continue
        scored[length] = []
        while len(scored[length]) < (row.n_targets or 0):
            inputs, targets = next(asked)
            assert targets == [token + 1 for token in inputs], "a window is not consecutive"
            assert len(targets) <= length
            scored[length] += targets
        assert len(set(scored[length])) == row.n_targets, "a target is scored twice"
    assert not list(asked), "more is scored than counted"
    assert len({frozenset(targets) for targets in scored.values()}) <= 1, "lengths differ in their targets"
    firsts = set(np.cumsum([0, *sizes]).tolist())
    assert not firsts & {token for targets in scored.values() for token in targets}, "nothing stands before it"


def test_a_length_that_does_not_divide_the_segment_ends_in_a_shorter_window() -> None:
    model = Known(lambda inputs, targets: torch.ones(targets.shape))
    split = split_of(unique_documents([17, 40]))
    known_nats(EvalSegments(split, 16), model, 7)
    windows = sorted((targets[0], len(targets)) for _, targets in model.asked)
    assert windows == [(1, 7), (8, 7), (15, 2), (18, 7), (25, 7), (32, 2), (34, 7), (41, 7), (48, 2)]
    assert all(b <= 64 // t for b, t in model.batches)


def test_sums_are_weighted_by_tokens_and_are_no_mean_of_means() -> None:
    """One document of 8 targets at 5 nats, one of 24 at 1: 64 / 32, where the mean of the documents' means is 3."""
    documents = [[5] * 9, [1] * 25]
    model = Known(lambda inputs, targets: targets.double())
    table, sums = evaluate(model, dataset_of(split_of(documents)), (3, 8))
    for length in (3, 8):
        assert value(table, length) == 2.0
        assert (sums[length].nats, sums[length].targets) == ([40.0, 24.0], [8, 24])


def test_max_tokens_is_shared_out_over_the_documents() -> None:
    dataset = counting_dataset(unique_documents([200, 20, 200, 60]))  # 19, 1, 19 and 5 segments of 10
    model = Known(lambda inputs, targets: torch.ones(targets.shape))
    _, sums = evaluate(model, dataset, (10,), max_tokens=120)
    assert sums[10].names == [f"document {n}" for n in range(4)]
    assert sums[10].targets == [40, 10, 40, 30]
    _, everything = evaluate(model, dataset, (10,))
    assert everything[10].targets == [190, 10, 190, 50]


def test_few_tokens_still_reach_enough_documents() -> None:
    model, _ = bigram(7)
    table, _ = evaluate(
        model, dataset_of(split_of(random_documents([50] * 12, 7))), (16,), max_tokens=1, min_documents=8
    )
    assert table[16]["nats_per_token"].n_docs == 8


def test_documents_of_one_name_stay_two() -> None:
    model, _ = bigram(7)
    split = split_of(random_documents([20, 20], 7), names=["chapter", "chapter"])
    _, sums = evaluate(model, dataset_of(split), (16,))
    assert sums[16].names == ["chapter", "chapter"]
    assert sums[16].targets == [16, 16]


# What the numbers are


def test_bits_per_byte_are_over_the_utf8_bytes_of_the_text() -> None:
    texts = ["Ça va? Déjà vu, naïve façade.\n", "漢字とかな、それから🙂です。\n" * 2, "plain words, plain words\n" * 2]
    kind = TOKENIZERS.get("bpe")
    tokenizer = kind.make(kind.Config(name="bpe", vocab_size=320), ["".join(texts)] * 4)
    documents = [[tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id] for text in texts]
    # One target a window: a segment of length 1 leaves nothing over, so all text is scored.
    table, sums = evaluate(bigram(tokenizer.vocab_size)[0], dataset_of(split_of(documents), tokenizer), (1,))
    n_bytes = [len(text.encode("utf-8")) for text in texts]
    assert sums[1].n_bytes == n_bytes
    assert sum(sums[1].targets) > 0
    expected = sum(sums[1].nats) / math.log(2) / sum(n_bytes)
    assert value(table, 1, "bits_per_byte") == pytest.approx(expected, rel=1e-12)
    assert (table[1]["bits_per_byte"].normaliser, table[1]["perplexity"].normaliser) == ("byte", "token")


def test_bytes_are_those_of_the_targets_and_not_of_the_inputs() -> None:
    """Of 21 bytes behind bos, segments of 8 score the first 16."""
    tokenizer = Byte(Byte.Config())
    document = [tokenizer.bos_id, *tokenizer.encode("a" * 21), tokenizer.eos_id]
    table, sums = evaluate(bigram(260)[0], dataset_of(split_of([document]), tokenizer), (4, 8))
    assert (sums[4].n_bytes, sums[8].n_bytes) == ([16], [16])
    assert value(table, 8, "bits_per_byte") == pytest.approx(value(table, 8) / math.log(2), rel=1e-12)


def test_intervals_by_hand() -> None:
    """n = (12, 30, 18) nats of m = (10, 20, 10) tokens: R = 1.5, residuals (-3, 0, 3), mean m = 40 / 3."""
    scores = DocumentScores(["a", "b", "c"], [12.0, 30.0, 18.0], [10, 20, 10], [25, 50, 25], [5, 10, 5])
    rows = {row.name: row for row in score_measurements(scores, context=4, split="test", protocol="", axes={})}
    error = math.sqrt((9 + 0 + 9) / (3 * 2)) / (40 / 3)
    half = 4.302652730 * error  # t(0.975, 2) of a printed table
    assert student_t_quantile(0.975, 2) == pytest.approx(4.302652730, abs=1e-8)
    nats, perplexity, bits = rows["nats_per_token"], rows["perplexity"], rows["bits_per_byte"]
    assert (nats.value, nats.low, nats.high) == pytest.approx((1.5, 1.5 - half, 1.5 + half), abs=1e-8)
    assert (perplexity.low, perplexity.high) == pytest.approx((math.exp(1.5 - half), math.exp(1.5 + half)), rel=1e-8)
    per_byte = 1 / math.log(2) / 2.5  # 2.5 bytes a token in every document
    assert (bits.value, bits.low, bits.high) == pytest.approx(
        (1.5 * per_byte, (1.5 - half) * per_byte, (1.5 + half) * per_byte), rel=1e-8
    )
    assert (nats.n_targets, nats.n_docs, nats.axes) == (40, 3, {})


def test_one_document_has_numbers_without_an_interval() -> None:
    table, _ = evaluate(bigram(7)[0], dataset_of(split_of(random_documents([40], 7))), (16,))
    assert table[16]["perplexity"].value is not None
    assert table[16]["perplexity"].low is None


@pytest.mark.parametrize(("nats", "reason"), [(math.nan, "it is nan"), (math.inf, "it is inf"), (800.0, "it is inf")])
def test_numbers_beyond_all_bounds_are_rows_and_not_an_end(nats: float, reason: str) -> None:
    """A model that diverged: exp(800) has no float. What is kept for comparisons in pairs can be read again."""
    model = Known(lambda inputs, targets: torch.full(targets.shape, nats))
    table, sums = evaluate(model, dataset_of(split_of(random_documents([40, 50], 7))), (8, 16))
    for length in (8, 16):
        row = table[length]["perplexity"]
        assert (row.status, row.reason, row.value) == ("failed", reason, None)
    assert set(sums) == ({8, 16} if math.isfinite(nats) else set())


# Lengths without a number


def test_positions_that_end_are_undefined_rows_and_the_others_go_on() -> None:
    model = build("learned", context=16)
    dataset = dataset_of(split_of(random_documents([70, 70, 80], VOCAB)))
    table, sums = evaluate(model, dataset, (8, 16, 17, 32, 64), context=16)
    assert {length: row["perplexity"].status for length, row in table.items()} == {
        8: "done", 16: "done", 17: "undefined", 32: "undefined", 64: "undefined",
    }  # fmt: skip
    assert set(sums) == {8, 16}
    assert table[8]["perplexity"].axes == {"segment": 64}, "the targets are those of the longest length all the same"
    for name in ("nats_per_token", "perplexity", "bits_per_byte"):
        row = table[32][name]
        assert row.value is None
        assert "learned" in row.reason
        assert "15" in row.reason
    assert not model.training


def test_lengths_that_too_few_documents_fill_say_so() -> None:
    model, _ = bigram(7)
    dataset = dataset_of(split_of(random_documents([33, 33, 33, 65], 7)))  # 65 tokens have 64 targets
    table, sums = evaluate(model, dataset, (16, 32, 64), min_documents=2)
    assert {length: row["perplexity"].status for length, row in table.items()} == {
        16: "done",
        32: "done",
        64: "no_document",
    }
    assert table[64]["bits_per_byte"].reason == "fewer than 2 test documents have 65 tokens"
    assert set(sums) == {16, 32}
    assert table[32]["perplexity"].n_docs == 4
    everything, _ = evaluate(model, dataset, (100, 200), min_documents=2)
    assert {row["perplexity"].status for row in everything.values()} == {"no_document"}


def test_lengths_beyond_segments_of_a_given_length_say_so() -> None:
    table, _ = evaluate(bigram(7)[0], dataset_of(split_of(random_documents([65] * 3, 7))), (16, 64), segment=32)
    assert table[16]["perplexity"].axes == {"segment": 32}
    assert table[64]["perplexity"].status == "no_document"
    assert "eval.perplexity.segment=32" in table[64]["perplexity"].reason


@pytest.mark.parametrize(
    ("context", "expected"), [(512, (256, 512, 1024, 2048, 4096)), (1, (1, 2, 4, 8)), (3, (1, 3, 6, 12, 24))]
)
def test_auto_lengths_are_multiples_of_the_trained_context(context: int, expected: tuple[int, ...]) -> None:
    assert auto_lengths(context) == expected


# What changes nothing


def test_batches_change_nothing() -> None:
    dataset = dataset_of(split_of(random_documents([90, 70, 120], VOCAB)))
    model = build("rope")
    one, _ = evaluate(model, dataset, (8, 20, 64), batch_tokens=1)
    many, _ = evaluate(model, dataset, (8, 20, 64), batch_tokens=4096)
    for length in (8, 20, 64):
        assert value(one, length) == pytest.approx(value(many, length), abs=1e-6)


def test_dropout_is_off_while_a_model_is_scored_and_on_again_after_it() -> None:
    dataset = dataset_of(split_of(random_documents([90, 70], VOCAB)))
    model = build("rope", dropout=0.5).train()
    table, _ = evaluate(model, dataset, (16,))
    assert model.training
    without = build("rope")
    without.load_state_dict(model.state_dict())
    assert table == evaluate(without, dataset, (16,))[0]


@pytest.mark.parametrize("position", ["rope", "alibi", "t5"])
def test_bf16_is_close_to_fp32(position: str) -> None:
    """bf16 has 8 bits: of logits that spread by a few units it moves a nat by a few hundredths, to both sides."""
    dataset = dataset_of(split_of(random_documents([300, 300], VOCAB)))
    model = build(position)
    single, _ = evaluate(model, dataset, (16, 256), context=256)
    half, _ = evaluate(model, dataset, (16, 256), context=256, precision="bf16")
    for length in (16, 256):
        assert value(half, length) != value(single, length)
        assert value(half, length) == pytest.approx(value(single, length), abs=5e-3)


@pytest.mark.parametrize("world", [2, 3, 5])
def test_the_parts_of_all_ranks_sum_to_the_whole(world: int) -> None:
    model, _ = bigram(7)
    segments = EvalSegments(split_of(random_documents([60, 95, 41], 7)), 20)
    parts = [known_nats(segments, model, 7, batch_tokens=14, part=(rank, world)) for rank in range(world)]
    n_asked = len(model.asked)
    whole = known_nats(segments, model, 7, batch_tokens=14)
    assert sum(parts) == pytest.approx(whole, rel=1e-12)
    assert len(model.asked) == 2 * n_asked, "a window is scored by two ranks"
    assert all(part.any() for part in parts)


def test_progress_counts_every_target_on_every_rank() -> None:
    segments = EvalSegments(split_of(random_documents([60, 95], 7)), 20)
    for part in ((0, 1), (1, 2)):
        counted: list[int] = []
        known_nats(segments, bigram(7)[0], 7, part=part, advance=counted.append)
        assert sum(counted) == segments.n * segments.length


@pytest.mark.parametrize("position", ["rope", "alibi", "t5", "nope"])
@pytest.mark.parametrize("sizes", [(1, 1, 61), (16, 16, 16, 15), (40, 23)])
def test_chunks_over_a_growing_cache_score_as_one_forward(position: str, sizes: tuple[int, ...]) -> None:
    model = build(position)
    text = tokens(2, 64)
    cache = KVCache(model.config.n_layers)
    start, chunks = 0, []
    with torch.inference_mode():
        whole = model.nats(model.hidden(text[:, :-1]), text[:, 1:])
        for size in sizes:
            inputs, targets = text[:, start : start + size], text[:, start + 1 : start + size + 1]
            chunks.append(model.nats(model.hidden(inputs, cache=cache), targets))
            start += size
    assert start == 63
    torch.testing.assert_close(torch.cat(chunks, dim=1), whole, atol=1e-5, rtol=1e-5)


# Validation during training


class Ranks:
    """Stands for a trainer whose other ranks have nats of their own."""

    def __init__(self, rank: int, world: int, others: float = 0.0) -> None:
        self.global_rank, self.world_size = rank, world
        self.strategy = SimpleNamespace(reduce=lambda own, reduce_op: own + others)


def validation(max_tokens: int = 10_000, context: int = 16) -> Validation:
    split = split_of(random_documents([60, 95, 41], 7), name="validation")
    return Validation(dataset_of(split), context, max_tokens=max_tokens, precision="fp32")


def test_validation_scores_the_trained_context_and_leaves_the_model_training() -> None:
    documents = random_documents([60, 95, 41], 7)
    model, nats = bigram(7)
    found = validation()(Ranks(0, 1), model, CPU)  # type: ignore[arg-type]
    assert model.training
    cut = [document[: (len(document) - 1) // 16 * 16 + 1] for document in documents]
    expected = sum(nats[a, b] for document in cut for a, b in pairwise(document))
    n_targets = 48 + 80 + 32
    n_bytes = sum(token >= 4 for document in cut for token in document[1:])  # ids 0 to 3 stand for no text
    assert found["nats_per_token"] == pytest.approx(expected / n_targets, rel=1e-12)
    assert found["perplexity"] == pytest.approx(math.exp(expected / n_targets), rel=1e-12)
    assert found["bits_per_byte"] == pytest.approx(expected / n_bytes / math.log(2), rel=1e-12)


def test_validation_by_two_ranks_is_validation_by_one() -> None:
    model, _ = bigram(7)
    split = split_of(random_documents([50_000, 30_000], 7), name="validation")  # 19 windows, 4 in a batch
    validate = Validation(dataset_of(split), 4096, max_tokens=100_000, precision="fp32")
    alone = validate(Ranks(0, 1), model, CPU)  # type: ignore[arg-type]
    other = float(known_nats(validate.segments, model, 4096, batch_tokens=16_384, part=(1, 2)).sum())
    shared = validate(Ranks(0, 2, others=other), model, CPU)  # type: ignore[arg-type]
    assert other > 0
    assert shared == pytest.approx(alone, rel=1e-6)


def test_validation_of_documents_shorter_than_the_context_takes_the_longest_length_there_is() -> None:
    assert validation(context=1000).segments.length == 94
    assert validation(max_tokens=1).n_targets == 16
