"""Lower layers that learn more slowly, every rate by hand."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from ctxlab.model.base import Parts, build_model
from ctxlab.model.config import LSTMConfig
from ctxlab.train.loop import freeze
from ctxlab.train.optim.base import OPTIMIZERS, depths_from_top
from tests.model.builders import build
from tests.train.builders import dataset, settings, train

# Of three layers at 0.5: above them all of the rate, then a half, a quarter, an eighth, and below them a sixteenth.
SHARES = {
    "norm": 1.0,
    "head": 1.0,
    "blocks.2": 0.5,
    "blocks.1": 0.25,
    "blocks.0": 0.125,
    "embedding": 0.0625,
    "position": 0.0625,
}


def rates(optim: str, model: Any, **changes: Any) -> dict[str, tuple[float, float]]:
    """name -> (rate, weight decay) of every parameter that is trained."""
    config = OPTIMIZERS.config({"name": optim, "layer_decay": 0.5, **changes})
    names = {id(p): name for name, p in model.named_parameters()}
    found: Counter[str] = Counter()
    said = {}
    for group in OPTIMIZERS.get(optim)(config).build(model).param_groups:
        assert group["lr"] == group["peak_lr"]
        for parameter in group["params"]:
            found[names[id(parameter)]] += 1
            said[names[id(parameter)]] = (group["lr"], group["weight_decay"])
    assert set(found.values()) == {1}
    return said


@pytest.mark.parametrize("optim", ["adamw", "muon"])
@pytest.mark.parametrize("frozen", [(), ("blocks.1", "embedding")])
def test_each_layer_has_half_the_rate_of_the_one_above(optim: str, frozen: tuple[str, ...]) -> None:
    model = build("learned", n_layers=3, tie_embeddings=False)
    freeze(model, frozen)
    said = rates(
        optim, model, learning_rate=0.8, weight_decay=0.3, **({"adamw_learning_rate": 0.2} if optim == "muon" else {})
    )
    assert said.keys() == {name for name, _ in model.named_parameters() if not name.startswith(frozen or ("-",))}
    for name, (rate, decay) in said.items():
        share = next(share for part, share in SHARES.items() if name.startswith(f"{part}."))
        matrix = name.startswith("blocks") and name.endswith(".weight") and "norm" not in name
        assert rate == pytest.approx(share * (0.2 if optim == "muon" and not matrix else 0.8), rel=1e-12), name
        assert decay == (0.3 if matrix else 0.0), name


def test_a_tied_matrix_learns_as_an_embedding() -> None:
    assert rates("adamw", build(n_layers=3), learning_rate=0.8)["embedding.weight"][0] == pytest.approx(0.05)


def test_each_stack_is_counted_from_its_own_top() -> None:
    model = build("t5", architecture="encoder_decoder", n_layers=2, n_encoder_layers=3, share_embeddings=False)
    depths = depths_from_top(model)
    expected = {"encoder.norm": 0, "encoder.blocks.2": 1, "encoder.blocks.0": 3, "encoder.embedding": 4, "encoder.position": 4,
                "norm": 0, "blocks.1": 1, "blocks.0": 2, "embedding": 3, "position": 3}  # fmt: skip
    for name, depth in depths.items():
        for part, wanted in expected.items():
            if name.startswith(f"{part}."):
                assert depth == wanted, name


def test_the_layers_of_an_lstm_are_layers() -> None:
    config = LSTMConfig(d_model=8, d_hidden=8, n_layers=2)
    depths = depths_from_top(build_model(Parts(config, "none", "none"), vocab_size=11, context=8))
    assert depths == {
        "embedding.weight": 3,
        **{f"layers.{name}_l{layer}": 2 - layer for layer in (0, 1)
           for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")},
    }  # fmt: skip


@pytest.mark.parametrize("optim", ["adamw", "muon"])
def test_a_decay_of_one_changes_nothing_and_another_one_what_it_says(tmp_path: Path, optim: str) -> None:
    """The log has the undecayed rate either way; a run goes on with the rates that it had."""
    data = dataset(tmp_path)
    plain = train(tmp_path, data, settings(optim=optim, max_steps=2), "plain")
    same = train(tmp_path, data, settings(optim=optim, max_steps=2, optimizer={"layer_decay": 1.0}), "same")
    assert all((weight == same.weights[name]).all() for name, weight in plain.weights.items())
    config = settings(optim=optim, max_steps=4, optimizer={"layer_decay": 0.5, "schedule": "constant"})
    whole = train(tmp_path, data, config, "whole")
    train(tmp_path, data, replace(config, trainer=config.trainer.model_copy(update={"max_steps": 2})), "parts")
    parts = train(tmp_path, data, config, "parts", resume=True)
    assert all((weight == parts.weights[name]).all() for name, weight in whole.weights.items())
    assert any((weight != plain.weights[name]).any() for name, weight in whole.weights.items())
    rate = config.optim.learning_rate
    assert [row["learning_rate"] for row in whole.rows.of("train")] == pytest.approx(
        [rate / 3, 2 * rate / 3, rate, rate]
    )


def test_it_is_a_share() -> None:
    for wrong in (0.0, 1.5):
        with pytest.raises(ValidationError):
            OPTIMIZERS.config({"name": "adamw", "layer_decay": wrong})
