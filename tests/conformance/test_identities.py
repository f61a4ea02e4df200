"""Schemes that are special cases of one another, to the last bit or to rounding: each ties two files together."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ctxlab.errors import UndefinedBeyondTraining
from ctxlab.model.position.alibi import slopes
from ctxlab.model.position.base import POSITIONS, Position
from ctxlab.model.transformer import Transformer
from tests.model.builders import build, tokens


def config(name: str, **settings: Any) -> Position.Config:
    return POSITIONS.get(name).Config(name=name, **settings)


def logits(model: Transformer, length: int = 96) -> torch.Tensor:
    with torch.no_grad():
        return model.double()(tokens(1, length))


@pytest.mark.parametrize("layout", ["interleaved", "half"])
@pytest.mark.parametrize(("name", "settings"), [("p_rope", {"p": 1.0}), ("partial_rope", {"fraction": 1.0})])
def test_all_of_rope_is_rope(name: str, settings: dict[str, float], layout: str) -> None:
    ours = logits(build(config(name, layout=layout, **settings)))
    assert torch.equal(ours, logits(build(config("rope", layout=layout))))


def test_none_of_rope_is_nope() -> None:
    assert torch.equal(logits(build(config("p_rope", p=0.0))), logits(build("nope")))


@pytest.mark.parametrize(("name", "share"), [("p_rope", "p"), ("partial_rope", "fraction")])
def test_a_share_that_is_no_whole_number_of_pairs_is_rounded_down(name: str, share: str) -> None:
    """Of 4 pairs: 0.7 is 2.8, and two are rotated."""
    model = logits(build(config(name, **{share: 0.7})))
    assert torch.equal(model, logits(build(config(name, **{share: 0.5}))))


def test_layouts_are_equal_up_to_a_permutation_of_the_columns() -> None:
    """Interleaved pairs (2k, 2k+1) become (k, k + D/2) when even columns come first."""
    one, two = build(config("rope")), build(config("rope", layout="half"))
    order = torch.cat([torch.arange(0, 8, 2), torch.arange(1, 8, 2)])
    with torch.no_grad():
        for a, b in zip(one.blocks, two.blocks):
            for name in ("query", "key"):
                weight = getattr(a.attention, name).weight  # (heads D, d)
                getattr(b.attention, name).weight.copy_(weight.view(-1, 8, weight.shape[1])[:, order].flatten(0, 1))
    torch.testing.assert_close(logits(one), logits(two), atol=1e-12, rtol=0)


def test_kerple_of_power_one_and_slope_m_is_alibi() -> None:
    model = build(config("kerple", kind="power"))
    with torch.no_grad():
        model.position.p.fill_(1.0)
        model.position.a.copy_(torch.tensor(slopes(4)))
    # Slopes below kerple's smallest parameter, 0.01, would be raised to it.
    assert min(slopes(4)) < 0.01
    with torch.no_grad():
        model.position.a.clamp_(min=0.01)
    distances = torch.arange(300)
    found = model.position.distance_bias(distances, None)
    expected = -torch.tensor(slopes(4)).clamp(min=0.01)[:, None] * distances
    torch.testing.assert_close(found, expected, atol=0, rtol=1e-6)


def test_xpos_without_decay_is_rope() -> None:
    """zeta goes to 1 as gamma grows."""
    one = logits(build(config("xpos", gamma=1e12)))
    torch.testing.assert_close(one, logits(build(config("rope"))), atol=1e-9, rtol=0)


def test_xpos_refuses_positions_whose_factors_leave_the_range_of_a_float() -> None:
    position = build("xpos").position
    last = position.n_positions - 1
    assert 45_000 < last < 55_000
    position.require_defined(last)
    queries, keys = position.tables(torch.tensor([0, last]), torch.float32)
    assert all(t.abs().isfinite().all() and t.abs().min() > 1e-30 for t in (queries, keys))
    with pytest.raises(UndefinedBeyondTraining, match=f"xpos positions are defined up to {last} only.*fp32's range"):
        position.require_defined(last + 1)


def test_sandwich_is_zero_at_distance_zero_and_least_steep_in_the_last_head() -> None:
    """Sum over w/2 cosines of 0, minus w/2; head h is divided by 8h/H."""
    bias = build("sandwich").position.distance_bias(torch.arange(500), None)
    assert torch.equal(bias[:, 0], torch.zeros(4, dtype=torch.float64))
    torch.testing.assert_close(bias[0], 4 * bias[3], atol=1e-12, rtol=0)
    assert (bias[:, 1:] < 0).all()
