"""Budgets by hand: rows, micro-batches, curricula, refusals."""

from __future__ import annotations

import math
from typing import Any

import pytest

from ctxlab.errors import ConfigError
from ctxlab.train.budget import UNBOUNDED_STEPS, Budget, micro_rows, plan_budget, rows_per_step
from ctxlab.train.settings import TrainerConfig


def trainer(**settings: Any) -> TrainerConfig:
    return TrainerConfig(**({"max_steps": 10} | settings))


def plan(config: TrainerConfig, context: int, world: int = 1, fit: int = 10**9) -> Budget:
    return plan_budget(config, context, world=world, fitting_rows=lambda _: fit)


def test_token_budget_becomes_whole_steps() -> None:
    budget = plan(trainer(max_steps="none", max_tokens=10_000, batch_tokens=1024), 256)
    assert [(s.context, s.rows, s.steps) for s in budget.stages] == [(256, 4, 9)]  # 9 x 1024 = 9216 <= 10,000
    assert budget.n_tokens == 9216
    assert budget.tokens_before(5) == 5120


def test_the_smaller_budget_wins() -> None:
    assert plan(trainer(max_steps=3, max_tokens=10_000, batch_tokens=1024), 256).n_steps == 3


def test_a_context_that_does_not_divide_the_batch_takes_the_rows_that_fit() -> None:
    assert rows_per_step(trainer(batch_tokens=4096), 300, world=1) == 13


@pytest.mark.parametrize(
    ("rows", "largest", "expected"), [(16, 5, 4), (13, 12, 1), (12, 6, 6), (12, 100, 12), (7, 0, 1), (1, 1, 1)]
)
def test_micro_rows_is_the_largest_fitting_divisor(rows: int, largest: int, expected: int) -> None:
    assert micro_rows(rows, largest) == expected


def test_ranks_share_the_global_batch() -> None:
    (stage,) = plan(trainer(batch_tokens=4096), 256, world=2, fit=3).stages
    assert (stage.rows, stage.micro_rows) == (16, 2)  # 8 rows a rank, 2 at once


def test_curriculum_spends_its_share_and_leaves_the_rest() -> None:
    config = trainer(
        max_steps=100,
        batch_tokens=1024,
        context_schedule=({"context": 128, "share": 0.25}, {"context": 256, "share": 0.5}),
    )
    budget = plan(config, 512)
    assert [(s.context, s.rows, s.steps) for s in budget.stages] == [(128, 8, 25), (256, 4, 50), (512, 2, 25)]
    assert budget.tokens_before(60) == 60 * 1024


def test_time_alone_is_unbounded_in_steps_and_progress_is_time() -> None:
    budget = plan(trainer(max_steps="none", max_time=200.0), 256)
    assert budget.n_steps == UNBOUNDED_STEPS
    assert budget.progress(10**6, 50.0) == 0.25


def test_progress_is_the_budget_nearest_its_end() -> None:
    budget = plan(trainer(max_steps=100, max_time=1000.0), 256)
    assert budget.progress(10, 900.0) == 0.9
    assert budget.progress(95, 900.0) == 0.95
    assert math.isinf(plan(trainer(), 256).max_seconds)


@pytest.mark.parametrize(
    ("limits", "step", "seconds", "limit"),
    [
        ({"max_steps": 10}, 9, 1e9, None),
        ({"max_steps": 10}, 10, 0.0, "max_steps"),
        ({"max_steps": 10, "max_tokens": 4096 * 4}, 4, 0.0, "max_tokens"),
        ({"max_steps": 10, "max_time": 60.0}, 9, 59.9, None),
        ({"max_steps": 10, "max_time": 60.0}, 9, 60.0, "max_time"),
        ({"max_steps": "none", "max_time": 60.0}, 10**6, 59.9, None),
    ],
)
def test_which_limit_is_reached(limits: dict[str, Any], step: int, seconds: float, limit: str | None) -> None:
    assert plan(trainer(**limits), 256).spent(step, seconds) == limit


@pytest.mark.parametrize(
    ("settings", "context", "world", "message"),
    [
        ({"batch_tokens": 4096}, 8192, 1, r"trainer.batch_tokens: 4096 tokens hold no window of context=8192.*8192"),
        ({"batch_tokens": 768}, 256, 2, r"trainer.devices: 2 devices cannot share 3 rows.*is 1024"),
        (
            {"max_steps": "none", "max_time": 60.0, "context_schedule": ({"context": 64, "share": 0.5},)},
            256, 1, r"trainer.context_schedule: .*needs max_tokens or max_steps",
        ),
    ],
)  # fmt: skip
def test_refusals(settings: dict[str, Any], context: int, world: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan(trainer(**settings), context, world=world)
