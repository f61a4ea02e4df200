"""What `ctxlab show` draws, against the schemes' formulas."""

from __future__ import annotations

import math

import pytest
import torch

from ctxlab.model.position.alibi import slopes
from ctxlab.model.position.base import POSITIONS
from ctxlab.model.position.probe import by_distance
from tests.conformance import reference
from tests.model.builders import build, small

D = torch.arange(50, dtype=torch.float64)


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found.double(), expected.double(), atol=1e-9, rtol=1e-9)


def test_alibi_is_its_slopes() -> None:
    close(by_distance(build("alibi").position, 50), -torch.tensor(slopes(4), dtype=torch.float64)[:, None] * D)


def test_rope_is_the_mean_of_its_cosines() -> None:
    """Equal pairs (1, 1): their rotated product is 2 cos, over 8 columns."""
    expected = sum(torch.cos(D * 10_000 ** (-2 * k / 8)) for k in range(4)) / 4 - 1
    close(by_distance(build("rope").position, 50), expected.expand(4, 50))


def test_t5_is_its_table() -> None:
    position = build("t5").position
    values = position.distance_bias(torch.arange(50), None).detach().double()
    close(by_distance(position, 50), values - values[:, :1])


def test_fox_forgets_as_its_first_gates_do() -> None:
    position = POSITIONS.get("fox")(POSITIONS.get("fox").Config(name="fox"), small(), 64)
    position.initialize()
    expected = D * math.log(1 / (1 + math.exp(-5)))
    torch.testing.assert_close(by_distance(position, 50), expected.expand(4, 50), atol=1e-5, rtol=0)


def test_sinusoids_are_shown_by_their_inner_products() -> None:
    expected = sum(torch.cos(D / 10_000 ** (2 * k / 32)) for k in range(16)) / 16 - 1
    close(by_distance(build("sinusoidal").position, 50), expected.expand(4, 50))


@pytest.mark.parametrize("name", [n for n in POSITIONS.names() if n not in reference.EMBEDDINGS])
def test_every_scheme_is_drawn_as_its_reference_scores_equal_content(name: str) -> None:
    """Queries and keys of ones, over a product of 1; x is 0."""
    position = build(name, context=64).position.double()
    ones = torch.ones(1, 4, 50, 8, dtype=torch.float64) * (8 / math.sqrt(8)) ** -0.5
    at = reference.Place(position, 0, torch.zeros(1, 50, 32, dtype=torch.float64))
    with torch.no_grad():
        scores = reference.SCORES[name](at, ones[:, :, -1:], ones, torch.tensor([49]), torch.arange(50))
    expected = scores.expand(1, 4, 1, 50)[0, :, 0].flip(-1)
    close(by_distance(position, 50), expected - expected[:, :1])


def test_learned_positions_are_shown_by_the_inner_products_of_their_rows() -> None:
    position = build("learned", context=64).position
    rows = position.weight.detach().double()[:50]
    expected = torch.tensor([float(rows[49 - d] @ rows[49]) for d in range(50)], dtype=torch.float64)
    close(by_distance(position, 50), (expected / expected[0] - 1).expand(4, 50))
