"""How far context helps: by hand, and a group of runs in which each is known."""

from __future__ import annotations

import math

import numpy as np
import pytest

from ctxlab.data.windows import EvalSegments
from ctxlab.evaluation.reach import (
    TokenNats,
    effective_context,
    relative_effective_context,
    relative_effective_contexts,
)
from tests.evaluation.builders import split_of, unique_documents


def reached(nats: dict[int, float]) -> float | None:
    rows = effective_context(nats, protocol="sliding", split="test", axes={})
    return rows[0].value if rows else None


def test_the_effective_context_is_the_shortest_length_within_one_percent_of_the_longest() -> None:
    edge = math.log(1.01)
    assert reached({128: 3.2, 256: 3.0 + edge - 1e-9, 512: 3.001, 1024: 3.0}) == 256
    assert reached({128: 3.2, 256: 3.0 + edge + 1e-9, 512: 3.001, 1024: 3.0}) == 512
    assert reached({128: 3.0, 256: 3.2, 512: 3.5}) == 128, "what is worse further on reaches no further"
    assert reached({128: 3.2, 256: 3.1, 512: 3.0}) == 512
    assert reached({128: 3.2}) is None


def test_relative_effective_contexts_by_hand() -> None:
    """Two targets, two runs. b(1) = (2, 4), b(2) = (2, 3), b(4) = (1.9, 2.995).

    Over both: f_A(1, 1) = (2 + 4) / 2, f_A(1, 2) = (2 + 3) / 2: a gain of 1 - exp(-0.5). f_A(2, 2) = (2 + 3) / 2, f_A(2, 4) =
    (2 + 2.995) / 2: 1 - exp(-0.0025), too little. B has 1 - exp((1.9 + 4 - 6) / 2) from 1 to 2 and nothing further on.
    """
    a = {1: [2.5, 4.0], 2: [2.1, 3.0], 4: [2.4, 2.995]}
    b = {1: [2.0, 5.0], 2: [2.0, 3.5], 4: [1.9, 3.2]}
    group = {run: {n: np.array(v) for n, v in nats.items()} for run, nats in (("a", a), ("b", b))}
    found = relative_effective_contexts(group, 1.0)
    assert found["a"][0] == 2
    assert found["a"][1] == pytest.approx({"1-2": 1 - math.exp(-0.5), "2-4": 1 - math.exp(-0.0025)}, abs=1e-12)
    assert found["b"][0] == 4
    # f_B(1, 2) = (min(2, 2) + min(4, 3.5)) / 2 = 2.75 against 3; f_B(2, 4) = (1.9 + min(3, 3.2)) / 2 = 2.45 against 2.5.
    assert found["b"][1] == pytest.approx({"1-2": 1 - math.exp(-0.25), "2-4": 1 - math.exp(-0.05)}, abs=1e-12)
    # The harder half is the second target: f_A(1, 2) - f_A(1, 1) = 3 - 4, f_A(2, 4) - f_A(2, 2) = -0.005; B: 3.5 - 4, 3 - 3.
    harder = relative_effective_contexts(group, 0.5)
    assert harder["a"] == (2, pytest.approx({"1-2": 1 - math.exp(-1), "2-4": 1 - math.exp(-0.005)}, abs=1e-12))
    assert harder["b"] == (2, pytest.approx({"1-2": 1 - math.exp(-0.5), "2-4": 0.0}, abs=1e-12))


def test_a_run_whose_positions_end_reaches_no_further_and_the_others_go_on() -> None:
    group = {
        "learned": {1: np.array([3.0]), 2: np.array([2.0])},
        "alibi": {1: np.array([3.0]), 2: np.array([2.5]), 4: np.array([1.0])},
    }
    found = relative_effective_contexts(group, 0.1)
    assert (found["learned"][0], found["alibi"][0]) == (2, 4)


def test_the_nats_of_single_targets_are_kept_in_their_places() -> None:
    segments = EvalSegments(split_of(unique_documents([13, 9])), 4)
    kept = TokenNats()
    hear = kept.at(2, "non-overlapping", segments)
    for owner in range(5):
        hear(np.array([owner, owner]), np.array([2, 0]), np.array([[3.0, 4.0], [1.0, 2.0]]) + 10 * owner)
    assert kept.by_length[2].tolist() == [[10 * owner + n for n in (1.0, 2.0, 3.0, 4.0)] for owner in range(5)]


def test_of_too_many_targets_every_nth_segment_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ctxlab.evaluation.reach._MOST", 9)
    segments = EvalSegments(split_of(unique_documents([21])), 4)  # 5 segments: 9 targets hold two, every third is kept
    kept = TokenNats()
    hear = kept.at(4, "non-overlapping", segments)
    hear(np.arange(5), np.zeros(5, dtype=np.int64), np.arange(20.0).reshape(5, 4))
    assert kept.by_length[4].tolist() == [[0, 1, 2, 3], [12, 13, 14, 15]]


def test_the_rows_of_a_group_say_who_is_in_it() -> None:
    group = {run: TokenNats() for run in ("a", "b")}
    for number, nats in enumerate(group.values()):
        nats.protocol = "sliding"
        nats.by_length = {1: np.full((1, 4), 3.0), 2: np.full((1, 4), 2.0 + number)}
    rows = relative_effective_context(group, split="test")
    assert {(row.axes["run"], row.axes["top"]): row.value for row in rows} == {
        (run, top): reach for run, reach in (("a", 2.0), ("b", 1.0)) for top in (0.1, 0.5, 1.0)
    }
    assert {(row.protocol, row.n_targets, tuple(row.facts["group"])) for row in rows} == {("sliding", 4, ("a", "b"))}
    assert relative_effective_context({"a": group["a"]}, split="test") == []
