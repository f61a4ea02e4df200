"""`experiments/why_scale`: a plugin that is learned positions but for the scores, and a softmax measured as autograd has it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from ctxlab.model.position.base import POSITIONS
from ctxlab.model.seeing import Seen, look
from ctxlab.registry import import_file
from tests.model.builders import build, tokens

FOLDER = Path(__file__).parents[2] / "experiments/why_scale"


@pytest.fixture
def scores(monkeypatch: pytest.MonkeyPatch) -> Any:
    POSITIONS.names()
    monkeypatch.setattr(POSITIONS, "_classes", dict(POSITIONS._classes))  # what it registers is gone afterwards
    return import_file("why_scale_scores", FOLDER / "scores.py").Scores


def test_divided_they_are_those_of_learned_positions(scores: Any) -> None:
    x = tokens(2, 30)
    with torch.no_grad():
        assert torch.equal(build(scores.Config())(x), build("learned")(x))


def test_undivided_they_are_those_of_queries_times_sqrt_d_k(scores: Any) -> None:
    ours, theirs = build(scores.Config(divided=False)).double(), build("learned").double()
    for block in theirs.blocks:
        block.attention.query.weight.data *= theirs.config.head_dim**0.5  # type: ignore[union-attr, operator]
    x = tokens(2, 30)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x), atol=1e-10, rtol=0)


def test_unit_queries_and_keys_have_mean_square_one(scores: Any) -> None:
    found: list[Seen] = []
    look(build(scores.Config(divided=False, unit=True)), tokens(1, 30), found.append)
    assert [seen.scale for seen in found] == [1.0, 1.0]
    for seen in found:
        for x in (seen.q, seen.k):
            torch.testing.assert_close(x.square().mean(-1), torch.ones(x.shape[:-1]), atol=1e-4, rtol=0)


@pytest.mark.parametrize("way", ["scaled", "plain"])
def test_the_jacobian_is_that_of_autograd(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    saturation: Any = import_file("why_scale_saturation", FOLDER / "saturation.py")
    monkeypatch.setattr(saturation, "SETS", 1)
    monkeypatch.setattr(saturation, "QUERIES", 1)
    random = torch.Generator().manual_seed(5)
    q, k = (torch.randn(n, 32, generator=random, dtype=torch.float64) for n in (1, 64))
    s = (k @ q[0]) * (32**-0.5 if way == "scaled" else 1.0)
    jacobian: Any = torch.autograd.functional.jacobian(lambda x: x.softmax(-1), s)  # type: ignore[no-untyped-call]
    found = saturation.measure(32, way, 5)
    assert found["jacobian"] == pytest.approx(float(jacobian.norm()), rel=1e-10)
    assert found["largest"] == pytest.approx(float(s.softmax(-1).max()), rel=1e-10)
    assert found["variance"] == pytest.approx(float(s.var()), rel=1e-10)
