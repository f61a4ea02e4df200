"""recompute=auto in plans and measurements: the policy of each context, and what fits under it."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch

from ctxlab.cli.scoring import step_point
from ctxlab.model.count import standing_bytes
from ctxlab.model.remake import POLICIES
from ctxlab.profiling import measure
from ctxlab.profiling.measure import Point
from ctxlab.profiling.plan import changes, planned
from ctxlab.profiling.policy import AutoPredictor, predictor_of
from ctxlab.profiling.predict import Predictor
from ctxlab.train.loop import chosen_policy
from ctxlab.train.optim.base import OPTIMIZERS
from tests.profiling.builders import closed, point
from tests.train.builders import settings

MEMORY = 100 * 2**20
UNDER: list[Any] = list(POLICIES)


def auto(**settings: Any) -> Point:
    return point("nano", 512, recompute="auto", memory=MEMORY, **settings)


def longest_by_closed_form(policy: Any) -> int:
    """The longest context in steps of 64 tokens whose closed form under a policy is at most 0.9 of the memory, by trying."""
    at, context = point("nano", 64, recompute=policy), 64
    while closed(replace(at, context=context + 64)).all <= 0.9 * MEMORY:
        context += 64
    return context


def test_a_context_has_the_cheapest_policy_with_which_it_fits() -> None:
    at = auto()
    for policy, further in zip(UNDER[:2], UNDER[1:], strict=True):
        last = longest_by_closed_form(policy)
        assert at.at(last).recompute == policy
        assert at.at(last + 64).recompute == further
    assert at.at(1 << 20).recompute == "block"
    assert replace(at, recompute="none").at(1 << 20).recompute == "none"


def test_rows_of_a_micro_batch_count_as_far_as_a_step_has_them() -> None:
    last = longest_by_closed_form("none")
    one = auto(micro_batch="auto", step_tokens=1 << 20)
    assert one.at(last).recompute == "none"
    assert replace(one, micro_batch=2).at(last).recompute != "none"
    assert replace(one, micro_batch=2, step_tokens=last).at(last).recompute == "none"  # a step has but one


def test_frozen_weights_leave_room_for_a_cheaper_policy() -> None:
    last = longest_by_closed_form("none")
    total = auto().n_parameters(last)
    assert auto().at(last + 64).recompute == "selective"
    assert auto(counted=(total, total // 2)).at(last + 64).recompute == "none"


@pytest.mark.parametrize("trainer", [{}, {"micro_batch": 2}, {"freeze": ("embedding",)}], ids=str)
def test_a_training_and_its_plan_choose_alike(trainer: dict[str, Any]) -> None:
    config = settings(recompute="auto", **trainer)
    at = step_point(config, vocab_size=300, precision="fp32", device=torch.device("cpu"), memory=1)
    all_weights, trained = at.counted or (at.n_parameters(config.context),) * 2
    standing = standing_bytes(all_weights, trained, OPTIMIZERS.get(config.optim.name).states)
    found = []
    for memory in (standing + kib * 1024 for kib in range(0, 8192, 128)):
        policy = chosen_policy(config, 300, "fp32", torch.device("cpu"), memory, standing)
        assert replace(at, memory=memory).at(config.context).recompute == policy
        found.append(policy)
    assert found[0] == "block"
    assert found[-1] == "none"


def test_what_is_predicted_is_the_step_of_the_policy_there() -> None:
    predictor = predictor_of(auto())
    assert isinstance(predictor, AutoPredictor)
    for context in (512, 2048):
        policy = auto().at(context).recompute
        alone = Predictor(point("nano", 512, recompute=policy)).memory(context)
        assert predictor.memory(context) == alone
    assert {predictor.policy(context) for context in (512, 2048)} > {"none"}


def test_the_longest_context_and_the_largest_batch_are_those_of_the_policy_that_auto_takes_there() -> None:
    predictor = AutoPredictor(auto())
    longest = predictor.longest(MEMORY)
    assert predictor.fits(longest, MEMORY)
    assert not any(predictor.fits(longest + 64 * more, MEMORY) for more in range(1, 6))
    assert longest == Predictor(point("nano", 512, recompute=predictor.policy(longest))).longest(MEMORY)
    rows = predictor.rows(512, MEMORY)
    assert rows == Predictor(point("nano", 512, recompute=predictor.policy(512, rows))).rows(512, MEMORY)
    assert rows > Predictor(point("nano", 512)).rows(512, MEMORY)
    assert (predictor.longest(2**20), predictor.rows(512, 2**20)) == (0, 0)


@pytest.mark.slow
def test_what_auto_would_not_choose_is_not_what_fits() -> None:
    """Where auto judges by too much memory it recomputes nothing, and only what fits without fits."""
    at = replace(auto(), memory=1 << 50)
    assert AutoPredictor(at).longest(MEMORY) == Predictor(point("nano", 512)).longest(MEMORY)
    assert AutoPredictor(at).rows(512, MEMORY) == Predictor(point("nano", 512)).rows(512, MEMORY)


def test_a_plan_names_the_policy_of_every_row_and_offers_no_other() -> None:
    assert not any("recompute" in words for words, _ in changes(auto()))
    rows = planned(auto(), (512, 2048), MEMORY)
    peaks = {row.context: row.facts["recompute"] for row in rows if row.name == "peak_memory_bytes"}
    assert peaks == {context: auto().at(context).recompute for context in (512, 2048)}
    (longest,) = [row for row in rows if row.name == "longest_context"]
    assert longest.facts["recompute"] == "block"


def test_a_point_is_measured_under_the_policy_of_its_context(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def answer(child: Any, specification: str, timeout: float) -> dict[str, Any]:
        asked.append(json.loads(specification))
        return {"status": "done", "peak_memory_bytes": 1, "step_seconds": 1.0}

    monkeypatch.setattr(measure, "_start", lambda what: None)
    monkeypatch.setattr(measure, "answer_of", answer)
    rows = measure.measure_step(auto(), (512, 2048), timeout=1)
    policies = {context: auto().at(context).recompute for context in (512, 2048)}
    assert {(spec["context"], spec["recompute"]) for spec in asked} == set(policies.items())
    assert {row.context: row.facts["recompute"] for row in rows if row.name == "peak_memory_bytes"} == policies
