"""Loss by index and what is made of it, against rules whose answers are known and sums by hand."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ctxlab.evaluation.by_position import position_bins, score_indices
from ctxlab.evaluation.intervals import student_t_quantile
from ctxlab.evaluation.perplexity import Evaluated, PerplexityConfig, evaluate_perplexity
from ctxlab.records.schema import Measurement
from tests.evaluation.builders import Known, dataset_of, split_of
from tests.model.builders import build


def evaluate(model: Any, documents: Sequence[Sequence[int]], lengths: Sequence[int], trained: int) -> Evaluated:
    config = PerplexityConfig(lengths=tuple(lengths), min_documents=1, max_tokens="none")
    return evaluate_perplexity(
        model, dataset_of(split_of(documents)), config, trained_context=trained, device=torch.device("cpu"),
        precision="fp32",
    )  # fmt: skip


def by_index(rule: Callable[[Tensor], Tensor]) -> Known:
    """A model whose nats are a rule of the index in the window, plus a tenth of the target's id."""
    return Known(lambda inputs, targets: rule(torch.arange(1.0, targets.shape[1] + 1).double()) + targets.double() / 10)


def constant_documents(sizes: Sequence[int]) -> list[list[int]]:
    """Document number n is all token 4 + n."""
    return [[4 + number] * size for number, size in enumerate(sizes)]


def bins(found: Evaluated) -> dict[tuple[int, int], Measurement]:
    return {(m.axes["from"], m.axes["to"]): m for m in found.measurements if "from" in m.axes}


def one(found: Evaluated, name: str) -> Measurement | None:
    rows = [m for m in found.measurements if m.name == name]
    assert len(rows) <= 1
    return rows[0] if rows else None


@given(st.integers(1, 300_000))
def test_bins_cover_every_index_once_and_end_at_powers_of_two(length: int) -> None:
    found = position_bins(length)
    assert found[0][0] == 1
    assert found[-1][1] == length
    assert all(first <= last for first, last in found)
    assert all(after[0] == before[1] + 1 for before, after in zip(found, found[1:], strict=False))
    ends = {last for _, last in found}
    assert {2**k for k in range(length.bit_length())} <= ends | {length}
    assert len(found) <= 2 * math.log2(length) + 2


def test_bins_by_hand() -> None:
    assert position_bins(1) == [(1, 1)]
    assert position_bins(20) == [(1, 1), (2, 2), (3, 3), (4, 4), (5, 6), (7, 8), (9, 11), (12, 16), (17, 20)]


def test_bins_are_means_over_full_windows_with_intervals_over_documents() -> None:
    """Documents of 2, 1 and 1 segments of 10, at the longest length that is scored."""
    documents = constant_documents([21, 11, 15])
    found = bins(evaluate(by_index(lambda p: p), documents, (4, 10), 8))
    assert list(found) == position_bins(10)
    levels, windows = np.array([0.4, 0.5, 0.6]), np.array([2, 1, 1])
    for (first, last), m in found.items():
        n = last - first + 1
        per_document = (np.arange(first, last + 1).mean() + levels) * n * windows
        mean = per_document.sum() / (4 * n)
        residual = ((per_document - mean * n * windows) ** 2).sum()
        half = student_t_quantile(0.975, 2) * math.sqrt(residual / 6) / (4 * n / 3)
        assert m.value == pytest.approx(mean, abs=1e-12)
        assert (m.low, m.high) == pytest.approx((mean - half, mean + half), abs=1e-12)
        assert (m.n_targets, m.n_docs, m.protocol, m.context) == (4 * n, 3, "by position", None)
        assert m.axes == {"segment": 10, "length": 10, "from": first, "to": last}


def test_windows_that_are_not_full_are_left_out() -> None:
    """Segments of 10 in windows of 4, 4 and 2, the longest length that has a number: two of each index, not three."""
    model = build("learned", context=4)
    found = evaluate(model, [[5] * 11, [6] * 21], (4, 10), 4)
    assert {m.axes["length"] for m in bins(found).values()} == {4}
    assert [m.n_targets for m in bins(found).values()] == [6, 6, 6, 6]


def test_the_sums_of_all_bins_are_the_sums_of_the_windows() -> None:
    documents = constant_documents([65, 40, 129])
    found = evaluate(by_index(lambda p: 7 / p), documents, (32,), 16)
    whole = found.documents[32]
    parts = [row for row in found.sums if "from" in row.axes]
    assert [(row.axes["from"], row.axes["to"]) for row in parts] == position_bins(32)
    assert {row.names for row in parts} == {tuple(whole.names)}
    for field in ("nats", "targets", "n_bytes"):
        summed = np.sum([getattr(row, field) for row in parts], axis=0)
        assert summed == pytest.approx(np.array(getattr(whole, field)), rel=1e-12)


@pytest.mark.parametrize(
    ("trained", "expected"),
    [(512, (50, 500)), (4096, (50, 500)), (256, (25, 250)), (64, (6, 62)), (8, (1, 7)), (2, (1, 1))],
)
def test_indices_of_the_in_context_score_shrink_with_the_context(trained: int, expected: tuple[int, int]) -> None:
    assert score_indices(trained) == expected


def test_the_in_context_score_is_taken_from_the_shortest_windows_that_reach_it() -> None:
    """l(62) - l(6) where windows of 64 say p / 100 and longer ones something else."""
    model = Known(
        lambda inputs, targets: torch.arange(1.0, targets.shape[1] + 1).double() * (-0.01 if targets.shape[1] == 64 else 9)
        + targets.double() / 10
    )  # fmt: skip
    documents = constant_documents([257, 129])
    row = one(evaluate(model, documents, (32, 64, 128), 64), "in_context_score")
    assert row is not None
    assert row.value == pytest.approx(-0.56, abs=1e-12)
    assert (row.low, row.high) == pytest.approx((-0.56, -0.56), abs=1e-12), "documents do not differ in it"
    assert row.axes == {"segment": 128, "length": 64, "early": 6, "late": 62}
    assert (row.facts, row.n_docs) == ({"scaled_from": 512}, 2)
    assert one(evaluate(model, documents, (8, 32), 64), "in_context_score") is None, "no window reaches index 62"


@pytest.mark.parametrize(("worse", "ratio"), [(0.0, 8), (0.049, 8), (0.051, 2), (-1.0, 8)])
def test_the_extrapolation_ratio_compares_the_last_quarter_on_the_same_targets(worse: float, ratio: int) -> None:
    """Targets differ by far more than epsilon, and differently at every place: only the same ones can be told apart."""
    documents = [np.random.default_rng(n).integers(0, 200, 260).tolist() for n in range(3)]
    model = by_index(lambda p: worse * (p > 64).double())
    found = one(evaluate(model, documents, (32, 64, 128, 256), 32), "extrapolation_ratio")
    assert found is not None
    assert found.value == ratio
    assert found.axes == {"segment": 256, "trained": 32, "epsilon": 0.05, "last": 8}
    assert found.facts["longest"] == 256
    expected = {"64": 0.0, "128": worse, "256": worse}
    for length, change in found.facts["changes"].items():
        assert change["change"] == pytest.approx(expected[length], abs=1e-12)
        assert (change["low"], change["high"]) == pytest.approx((expected[length],) * 2, abs=1e-9)
    assert set(found.facts["changes"]) == set(expected)


def test_lengths_that_are_no_multiple_of_the_trained_context_have_no_part_in_the_ratio() -> None:
    model = by_index(lambda p: p)
    documents = constant_documents([81, 81])
    found = one(evaluate(model, documents, (10, 20, 25, 40, 50), 20), "extrapolation_ratio")
    assert found is not None
    assert list(found.facts["changes"]) == ["40"]
    assert found.value == 1
    assert one(evaluate(model, documents, (10, 25, 40), 20), "extrapolation_ratio") is None, "nothing to compare with"


def test_a_model_that_diverged_has_no_numbers_by_position() -> None:
    found = evaluate(Known(lambda i, t: torch.full(t.shape, math.nan)), constant_documents([41, 41]), (10, 20), 10)
    assert not bins(found)
    assert found.sums == []
