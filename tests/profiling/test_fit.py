"""Exponents: laws that are known, and a regression done by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest

from ctxlab.profiling.fit import exponents, power_law
from ctxlab.profiling.predict import Prediction
from ctxlab.records.schema import Measurement


def test_a_law_is_found_again() -> None:
    fit = power_law([(n, 3.0 * n**1.75) for n in (128, 512, 1024, 8192)])
    assert fit.exponent == pytest.approx(1.75, abs=1e-12)
    assert fit.factor == pytest.approx(3.0)
    assert fit.high - fit.low < 1e-9
    assert fit.at(64) == pytest.approx(3.0 * 64**1.75)


def test_the_interval_is_students() -> None:
    """ln y = 0, 1, 3 at ln x = 0, 1, 2: slope 3/2, residuals 1/6, -1/3, 1/6, t(0.975, 1) = 12.7062."""
    fit = power_law([(1.0, 1.0), (math.e, math.e), (math.e**2, math.e**3)])
    assert fit.exponent == pytest.approx(1.5)
    half = 12.7062 * math.sqrt((1 / 36 + 1 / 9 + 1 / 36) / 1 / 2)
    assert fit.high - fit.exponent == pytest.approx(half, rel=1e-5)
    assert fit.exponent - fit.low == pytest.approx(half, rel=1e-5)


def test_two_points_have_no_interval_and_one_no_exponent() -> None:
    assert power_law([(1, 1), (2, 4)]).high == math.inf
    with pytest.raises(ValueError, match="fewer than two"):
        power_law([(64, 1.0), (128, 0.0)])


def test_what_is_no_activation_bends_no_exponent() -> None:
    """Activations grow as L, the logits of a chunk until 1,024 tokens; time is of the whole step."""

    class Known:
        def memory(self, context: int) -> Prediction:
            parts = {"weights": 5e6, "gradients": 5e6, "optimizer": 1e7, "activations": 9e3 * context, "temporaries": 0.0,
                     "logits": 8e3 * min(context, 1024), "process": 1e6}  # fmt: skip
            return Prediction(context, parts, "known")

    predictor: Any = Known()
    measured = [
        Measurement(name=name, value=value, unit=unit, context=context)
        for context in (256, 1024, 4096)
        for name, value, unit in (
            ("peak_memory_bytes", predictor.memory(context).bytes, "B"), ("step_seconds", 1e-9 * context**1.5, "s")
        )
    ]  # fmt: skip
    memory, time = exponents(measured, predictor)
    assert memory.axes["of"] == "activation memory"
    assert memory.value == pytest.approx(1, abs=1e-12)
    assert time.value == pytest.approx(1.5, abs=1e-12)
