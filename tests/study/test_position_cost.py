"""`experiments/position_cost`: what is no activation is left out of a step, at each context what is there at that context."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ctxlab.errors import ConfigError
from ctxlab.registry import import_file

SCRIPT = Path(__file__).parents[2] / "experiments/position_cost/position_cost.py"
D_MODEL = 384


@pytest.fixture
def study() -> Iterator[Any]:
    yield import_file("position_cost", SCRIPT)
    sys.modules.pop("position_cost", None)


def test_a_learned_table_grows_and_is_no_activation(study: Any) -> None:
    """A table's weights, their gradients and AdamW's two numbers of each: the worst moment of a short step is its update."""
    learned = study.growth(study.point("learned", 256, recompute="block"), 10**9, 6 * 10**8)
    nope = study.growth(study.point("nope", 256, recompute="block"), 10**9, 6 * 10**8)
    fewer = {found["activation_bytes"] / found["times"] for found in (learned, nope)}
    assert nope["activation_bytes"] - learned["activation_bytes"] == pytest.approx(4 * 256 * D_MODEL * 4, rel=1e-3)
    assert max(fewer) - min(fewer) == pytest.approx(4 * 128 * D_MODEL * 4, rel=0.1)  # `times` has four digits


def test_words_name_schemes_and_contexts(study: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(study, "compare", lambda *what: asked.append(what))
    monkeypatch.setattr(study, "longest", lambda *what: asked.append(what))
    for line in ("", "alibi 8192 t5", "8192", "long", "long alibi"):
        study.main(line.split())
    with pytest.raises(ConfigError, match=r"long has contexts of its own; got '8192'"):
        study.main(["long", "8192"])
    everything = study.POSITIONS.names()
    assert asked[:3] == [(everything, (512, 2048, 8192)), (["alibi", "t5"], [8192]), (everything, [8192])]
    assert sorted(asked[3][0]) == sorted(everything)
    assert asked[4] == (["alibi"],)
