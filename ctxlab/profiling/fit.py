"""How something grows with the context: an exponent with its interval, by least squares in logarithms."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ctxlab.evaluation.intervals import student_t_quantile
from ctxlab.profiling.policy import AutoPredictor
from ctxlab.profiling.predict import Predictor
from ctxlab.records.schema import Measurement

OTHERS = ("weights", "gradients", "optimizer", "logits", "process")
"""Parts of a step's memory that are no activations: there at any context, or a chunk that stops growing with it."""


@dataclass(frozen=True)
class PowerLaw:
    """value = factor L^exponent, and the 95% interval of the exponent, infinite where two points leave nothing to judge by."""

    factor: float
    exponent: float
    low: float
    high: float
    n_points: int

    def at(self, context: float) -> float:
        return float(self.factor * context**self.exponent)


def power_law(points: Sequence[tuple[float, float]]) -> PowerLaw:
    """The line through (ln L, ln value): slope p, standard error s = sqrt(sum r^2 / ((n - 2) sum (x - mean x)^2)), p +- t s.

    Draper and Smith 1998, Applied Regression Analysis, section 1.4; t has n - 2 degrees of freedom. Values have to be positive
    and free of what does not depend on L: an exponent of a total is none. Raises ValueError for fewer than two contexts.
    """
    points = [(x, y) for x, y in points if y > 0]
    if len({x for x, _ in points}) < 2:
        raise ValueError("power_law: fewer than two contexts with a value above 0")
    xs, ys = [math.log(x) for x, _ in points], [math.log(y) for _, y in points]
    n = len(points)
    mean_x, mean_y = sum(xs) / n, sum(ys) / n
    spread = sum((x - mean_x) ** 2 for x in xs)
    slope = sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys)) / spread
    residuals = sum((y - mean_y - slope * (x - mean_x)) ** 2 for x, y in zip(xs, ys))
    half = student_t_quantile(0.975, n - 2) * math.sqrt(residuals / (n - 2) / spread) if n > 2 else math.inf
    return PowerLaw(math.exp(mean_y - slope * mean_x), slope, slope - half, slope + half, n)


def exponents(measured: Sequence[Measurement], predictor: Predictor | AutoPredictor) -> list[Measurement]:
    """scaling_exponent of memory and of time, with 95% intervals, over the contexts that were measured.

    Memory is what was measured less what is no activation, as that is predicted: the logits of a chunk among it, with which a
    line through all contexts would be too flat.
    """
    rows = []
    for name, of in (("peak_memory_bytes", "activation memory"), ("step_seconds", "time")):
        points: list[tuple[float, float]] = []
        for m in measured:
            if m.name != name or m.value is None or m.context is None:
                continue
            others = 0.0
            if name == "peak_memory_bytes":
                split = predictor.memory(m.context).split
                if not split["activations"]:
                    continue  # at its worst while the optimizer works, which is no matter of the context
                others = sum(split[kind] for kind in OTHERS)
            points.append((m.context, m.value - others))
        try:
            fit = power_law(points)
        except ValueError:
            continue
        facts = {"factor": fit.factor, "n_points": fit.n_points}
        rows.append(
            Measurement(
                name="scaling_exponent",
                value=fit.exponent,
                unit="1",
                low=fit.low,
                high=fit.high,
                axes={"of": of},
                facts=facts,
            )
        )
    return rows
