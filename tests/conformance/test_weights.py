"""The weights that are shown are those of the model: every scheme and mechanism, against outputs, references and unit vectors."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from ctxlab.errors import IncompatibleError
from ctxlab.model.attention.base import ATTENTIONS
from ctxlab.model.attention.bias import Toeplitz
from ctxlab.model.attention.weights import weight_rows
from ctxlab.model.position.base import POSITIONS
from ctxlab.model.seeing import Seen, attention_weights, attentions, look
from tests.conformance import reference
from tests.conformance.test_attentions import CASES, config_of, mask_by_hand, mechanism
from tests.model.builders import build, small, tokens

SCHEMES = POSITIONS.names()
SCORES = (2**20, 100)  # all rows of a head in one block, or one or two at a time


def seen_by(model: Any, x: Tensor | None, **inputs: Any) -> list[Seen]:
    found: list[Seen] = []
    look(model, x, found.append, **inputs)
    return found


def mixed(seen: Seen, weights: Tensor) -> Tensor:
    """sum_j p_ij v_j of every head, key-value heads shared by groups."""
    return weights @ seen.v.repeat_interleave(seen.n_heads // seen.k.shape[1], 1)


def agrees(seen: Seen) -> None:
    """Weights times values are what the model goes on with, and rows sum to 1."""
    weights = seen.weights()
    out, _ = seen.mechanism.attend(
        seen.q, seen.k, seen.v, scale=seen.scale, causal=seen.causal, bias=seen.bias, lengths=seen.lengths
    )
    torch.testing.assert_close(mixed(seen, weights), out, atol=1e-10, rtol=0)
    total = weights.sum(-1)
    torch.testing.assert_close(total, torch.ones_like(total), atol=1e-12, rtol=0)
    assert float(weights.min()) >= 0


@pytest.mark.parametrize("scores", SCORES)
@pytest.mark.parametrize("name", SCHEMES)
def test_weights_times_values_are_the_output_under_every_scheme(
    name: str, scores: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weight_rows, "__kwdefaults__", {**weight_rows.__kwdefaults__, "scores": scores})
    found = seen_by(build(name).double(), tokens(2, 40))
    assert [(seen.kind, seen.layer) for seen in found] == [("self", 0), ("self", 1)]
    for seen in found:
        agrees(seen)


@pytest.mark.parametrize("name", [name for name in SCHEMES if POSITIONS.get(name).bidirectional])
def test_and_in_an_encoder_and_across_to_it(name: str) -> None:
    """Both of padded sources; what padding itself attends to is nobody's business."""
    model = build(name, architecture="encoder_decoder").double()
    lengths = torch.tensor([9, 14])
    found = seen_by(model, tokens(2, 11), source=tokens(2, 14, seed=2), source_lengths=lengths)
    assert [(seen.kind, seen.layer) for seen in found] == [
        ("encoder", 0), ("encoder", 1), ("self", 0), ("cross", 0), ("self", 1), ("cross", 1),
    ]  # fmt: skip
    for seen in found:
        agrees(seen)
        if seen.kind != "self":
            assert not seen.weights()[0, :, :, 9:].any()


def test_an_encoder_alone_looks_both_ways_and_never_at_padding() -> None:
    model, lengths = build("rope", architecture="encoder").double(), torch.tensor([5, 12])
    found = seen_by(model, tokens(2, 12), lengths=lengths)
    assert [(seen.kind, seen.layer) for seen in found] == [("self", 0), ("self", 1)]
    for seen in found:
        agrees(seen)
        assert not seen.weights()[0, :, :, 5:].any()
        assert float(seen.weights()[1].min()) > 0


@pytest.mark.parametrize("name", SCHEMES)
def test_a_head_s_weights_are_the_softmax_of_the_naive_scores(name: str) -> None:
    """Of the first layer, from the papers' formulas and the model's own matrices alone."""
    model, x = build(name).double(), tokens(2, 40)
    at = torch.arange(40)
    with torch.no_grad():
        h = model.embedding.weight[x]
        if name in reference.EMBEDDINGS:
            h = reference.EMBEDDINGS[name](model.position, h, at)
        h = h / torch.sqrt(h.square().mean(-1, keepdim=True) + model.config.norm_eps)
        block = model.blocks[0].attention
        q = (h @ block.query.weight.T).unflatten(2, (4, 8)).transpose(1, 2)
        k = (h @ block.key.weight.T).unflatten(2, (2, 8)).transpose(1, 2).repeat_interleave(2, 1)
        score = reference.SCORES[name](reference.Place(model.position, 0, h), q, k, at, at)
        expected = score.masked_fill(at[:, None] < at, -math.inf).softmax(-1)
    torch.testing.assert_close(attention_weights(model, x, 0), expected, atol=1e-9, rtol=0)


@pytest.mark.parametrize(("name", "settings"), CASES)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("T", "S"), [(40, 40), (7, 40)])
@pytest.mark.parametrize("scores", SCORES)
def test_are_what_a_mechanism_makes_of_unit_vectors(
    name: str, settings: dict[str, Any], causal: bool, T: int, S: int, scores: int
) -> None:
    """out_i = sum_j p_ij v_j whatever the values are: with the unit vectors as values, out is p. Nobody else is seen."""
    torch.manual_seed(0)
    q, k = torch.randn(2, 4, T, 8, dtype=torch.float64), torch.randn(2, 2, S, 8, dtype=torch.float64)
    made = mechanism(name, settings).double()
    if made.sink is not None:
        made.sink.data.copy_(torch.tensor([-1.0, 0.0, 1.0, 2.0]))
    bias = Toeplitz(torch.randn(4, 2 * S - 1, dtype=torch.float64), 1 - S) if made.softmax else None
    asked: dict[str, Any] = {"scale": 0.3, "causal": causal, "bias": bias}
    if not causal:
        asked["lengths"] = torch.tensor([31, 40])
    with torch.no_grad():
        unit = torch.eye(S, dtype=torch.float64).expand(2, 2, S, S)
        expected, _ = made.attend(q, k, unit, **asked)
        found = torch.zeros(2, 4, T, S, dtype=torch.float64)
        for part in weight_rows(made, q, k, **asked, scores=scores):
            found[:, part.head, part.rows] = part.weights
    torch.testing.assert_close(found, expected, atol=1e-11, rtol=0)
    assert not found.masked_fill(mask_by_hand(name, settings, T, S, causal), 0.0).any()


@pytest.mark.parametrize("position", ["rope", "t5"])  # T5's last bucket is a constant that only a sink can tell from 0
def test_a_sink_takes_what_its_logit_says(position: str) -> None:
    """The rows of a head sum to 1 - exp(sink) / (sum_j exp(s_ij) + exp(sink)), by hand where all scores are known."""
    settings = POSITIONS.get(position).Config(name=position)
    model = build(settings, attention=config_of("full", {"sink": True})).double()
    model.blocks[0].attention.mechanism.sink.data.copy_(torch.tensor([-2.0, 0.0, 1.0, 3.0]))
    (seen, _) = seen_by(model, tokens(1, 40))
    weights = seen.weights()
    _, with_sink = seen.mechanism.attend(seen.q, seen.k, seen.v, scale=seen.scale, causal=True, bias=seen.bias)
    sink = torch.exp(seen.mechanism.sink[:, None] - with_sink)  # (B,H,T), the share that is nobody's
    torch.testing.assert_close(weights.sum(-1), 1 - sink, atol=1e-12, rtol=0)
    out, _ = seen.mechanism.attend(seen.q, seen.k, seen.v, scale=seen.scale, causal=True, bias=seen.bias)
    torch.testing.assert_close(mixed(seen, weights), out, atol=1e-10, rtol=0)


def test_heads_that_are_asked_for_are_those_heads() -> None:
    model, x = build("alibi"), tokens(1, 20)
    every = attention_weights(model, x, 1)
    assert torch.equal(attention_weights(model, x, 1, heads=[3, 0, 3]), every[:, [3, 0, 3]])


def test_looking_changes_nothing_and_leaves_nothing_behind() -> None:
    model, x = build("rope"), tokens(1, 20)
    with torch.no_grad():
        before = model.hidden(x)
    assert torch.equal(look(model, x, lambda seen: None), before)
    assert not any(mechanism._forward_pre_hooks for _, _, mechanism in attentions(model))


def test_never_makes_more_rows_than_it_may() -> None:
    """Of 8,000 tokens and one head: some rows of 8,000 numbers, never 8,000 times 8,000."""
    q, k = torch.randn(1, 2, 8000, 4), torch.randn(1, 1, 8000, 4)
    made = ATTENTIONS.get("full")(config_of("full", {}), small(), 0)
    sizes = [part.weights.numel() for part in weight_rows(made, q, k, scale=0.5, causal=True, heads=[1])]
    assert max(sizes) <= 2**20
    assert sum(sizes) == 8000**2


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"layer": 2}, "layers: the model has 2, 0 to 1, got 2; the nearest is 1"),
        ({"layer": 0, "heads": [-1]}, "heads: the model has 4, 0 to 3, got -1; the nearest is 0"),
        ({"layer": 0, "kind": "cross"}, "kind: the model has no cross attention; it has self"),
    ],
)
def test_refuses_what_a_model_does_not_have(asked: dict[str, Any], said: str) -> None:
    with pytest.raises(IncompatibleError) as error:
        attention_weights(build("rope"), tokens(1, 4), **asked)
    assert str(error.value) == said
