"""Predictions under recompute=auto, which chooses a policy anew at every context."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from ctxlab.model.remake import POLICIES, Recompute
from ctxlab.profiling.measure import Point
from ctxlab.profiling.predict import Prediction, Predictor


def predictor_of(
    point: Point, updates: dict[str, tuple[int, dict[str, int]]] | None = None
) -> Predictor | AutoPredictor:
    """What predicts the steps of a point; `updates` as Predictor keeps them."""
    return AutoPredictor(point, updates) if point.recompute == "auto" else Predictor(point, updates)


class AutoPredictor:
    """Predicts steps that differ from `point` in their context, and in the policy that `auto` has there.

    The policy is chosen by closed form, as a training does (`Point.at`), and the step that it leads to is then predicted like
    any other: what does not fit under the policy that would be chosen does not fit, whatever another would do.
    """

    def __init__(self, point: Point, updates: dict[str, tuple[int, dict[str, int]]] | None = None) -> None:
        self.point = point
        updates = {} if updates is None else updates
        self.under = {policy: Predictor(replace(point, recompute=policy), updates) for policy in POLICIES}

    def policy(self, context: int, rows: int | None = None) -> Recompute:
        chosen = self.point.at(context, rows=rows).recompute
        assert chosen != "auto"
        return chosen

    def memory(self, context: int) -> Prediction:
        """Bytes of one step at batch 1."""
        return self.under[self.policy(context)].memory(context)

    def fits(self, context: int, memory: float) -> bool:
        return self.under[self.policy(context)].fits(context, memory)

    def longest(self, memory: float) -> int:
        """The longest context, in whole multiples of 64 tokens, that is predicted to fit under its policy; 0 where none does."""
        return max(
            64 * _last(lambda n: self.policy(64 * n), policy, predictor.longest(memory) // 64)
            for policy, predictor in self.under.items()
        )

    def rows(self, context: int, memory: float) -> int:
        """How many rows of `context` tokens fit at once, under the policy that is chosen for so many; 0 where one does not."""
        return max(
            _last(lambda n: self.policy(context, n), policy, predictor.rows(context, memory))
            for policy, predictor in self.under.items()
        )


def _last(chosen: Callable[[int], Recompute], policy: Recompute, most: int) -> int:
    """The largest n up to `most` for which the policy is chosen, 0 where there is none: the more there is to hold, the more
    frugal is what is chosen."""
    if most == 0 or chosen(most) == policy:
        return most
    order = POLICIES.index
    low, high = 0, most
    while high - low > 1:
        middle = (low + high) // 2
        if order(chosen(middle)) <= order(policy):
            low = middle
        else:
            high = middle
    return low if low and chosen(low) == policy else 0
