"""Updates within the backward pass are those of one step behind it, and no gradient outlives its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from ctxlab.errors import ConfigError
from ctxlab.model.base import Parts, build_model
from ctxlab.train.loop import TrainSettings
from ctxlab.train.optim.base import OPTIMIZERS
from ctxlab.train.optim.early import EarlyUpdates
from tests.train.builders import CONTEXT, Rows, Trained, computed, dataset, settings, train


def unclipped(**more: Any) -> TrainSettings:
    return settings(optimizer={"clip": 0.0, **more.pop("optimizer", {})}, **more)


def both(tmp_path: Path, **more: Any) -> tuple[Trained, Trained]:
    """The same run with updates behind the backward pass and within it."""
    data = dataset(tmp_path)
    step = train(tmp_path, data, unclipped(**more), "step")
    return step, train(tmp_path, data, unclipped(update="backward", **more), "backward")


@pytest.mark.parametrize(
    "more",
    [
        {"model": {"dropout": 0.1}, "validate_every": 3},
        {"model": {"tie_embeddings": False}, "recompute": "selective"},
        {"model": {"dropout": 0.1}, "recompute": "block", "position": "t5"},
        {"precision": "bf16", "position": "fire", "max_steps": 3},
        {"packed": True, "position": "fox", "freeze": ("blocks.0",)},
        {
            "context_schedule": ({"context": CONTEXT // 2, "share": 0.5},),
            "micro_batch": 16,
            "optimizer": {"layer_decay": 0.7},
        },
    ],
    ids=["dropout", "untied", "block", "bf16", "packed", "curriculum"],
)
def test_a_run_leaves_the_same_bits(tmp_path: Path, more: dict[str, Any]) -> None:
    """Losses, norms, rates, weights and the optimizer's state, of tied weights and of tables that all layers share too."""
    step, backward = both(tmp_path, **more)
    assert computed(step.rows.rows) == computed(backward.rows.rows)
    here, there = (run.folder / (run.folder / "last").read_text().strip() for run in (step, backward))
    assert (here / "weights.safetensors").read_bytes() == (there / "weights.safetensors").read_bytes()
    states = [torch.load(at / "training.pt", weights_only=False) for at in (here, there)]
    torch.testing.assert_close(states[1].pop("optimizer"), states[0].pop("optimizer"), atol=0, rtol=0)
    torch.testing.assert_close(states[1].pop("generators"), states[0].pop("generators"), atol=0, rtol=0)
    assert states[1] == states[0]


def test_matrices_made_orthogonal_one_by_one_differ_by_what_rounds_off(tmp_path: Path) -> None:
    step, backward = both(tmp_path, optim="muon", max_steps=3)
    for name in ("loss", "gradient_norm"):
        expected = [row[name] for row in step.rows.of("train")]
        assert [row[name] for row in backward.rows.of("train")] == pytest.approx(expected, rel=1e-4)
    for name, weight in step.weights.items():
        torch.testing.assert_close(backward.weights[name], weight, atol=1e-4, rtol=1e-3, msg=name)


class Crash(Exception):
    pass


@pytest.mark.parametrize("optim", ["adamw", "muon"])
def test_it_goes_on_from_a_checkpoint_to_the_same_bits(
    tmp_path: Path, optim: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = dataset(tmp_path)
    config = unclipped(optim=optim, update="backward", checkpoint_every=4)
    whole = train(tmp_path, data, config, "whole")

    def metrics(self: Rows, row: dict[str, Any]) -> None:
        if row["step"] > 5:
            raise Crash
        self.rows.append(row)

    with monkeypatch.context() as patched:
        patched.setattr(Rows, "metrics", metrics)
        with pytest.raises(Crash):
            train(tmp_path, data, config, "parts")
    rest = train(tmp_path, data, config, "parts", resume=True)
    assert computed(rest.rows.rows) == computed([row for row in whole.rows.rows if row["step"] > 4])
    for name in ("weights.safetensors", "training.pt"):
        here, there = (tmp_path / run / "step-000008" / name for run in ("parts", "whole"))
        assert here.read_bytes() == there.read_bytes(), name


@pytest.mark.parametrize("optim", ["adamw", "muon"])
def test_of_all_gradients_one_exists_at_a_time_and_then_none(optim: str) -> None:
    config = unclipped(optim=optim)
    model = build_model(Parts(config.model, config.position, config.attention), vocab_size=64, context=CONTEXT)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    alive: list[list[str]] = []
    moved: list[str] = []

    def look(name: str) -> None:
        alive.append([n for n, p in model.named_parameters() if p.grad is not None])
        moved.extend([name])

    for name, parameter in model.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: look(name))
    early = EarlyUpdates(OPTIMIZERS.get(optim)(config.optim).build(model))
    tokens = torch.randint(64, (2, CONTEXT + 1), generator=torch.Generator().manual_seed(0))

    def backward() -> None:
        model.nats(model.hidden(tokens[:, :-1]), tokens[:, 1:]).mean().backward()

    backward()
    assert alive == [[name] for name in moved]
    assert sorted(moved) == sorted(before)  # each once, the tied embedding too
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(not torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    early.end()
    after = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    backward()
    assert all(torch.equal(parameter, after[name]) for name, parameter in model.named_parameters())
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_the_norm_is_that_of_the_whole_gradient() -> None:
    parameters = [torch.nn.Parameter(torch.ones(n)) for n in (2, 3, 4)]
    optimizer = torch.optim.SGD([{"params": parameters[:1]}, {"params": parameters[1:]}], lr=0.5)
    early = EarlyUpdates(optimizer)
    (3 * parameters[0].sum() + 2 * parameters[2].sum()).backward()
    assert early.take_norm(list(parameters)).item() == pytest.approx((2 * 9 + 4 * 4) ** 0.5)
    assert [float(parameter[0].detach()) for parameter in parameters] == [-0.5, 1.0, 0.0]
    assert early.take_norm(list(parameters)).item() == 0  # it is taken once


def test_a_step_of_several_micro_batches_is_refused(tmp_path: Path) -> None:
    config = unclipped(update="backward", micro_batch=2)
    with pytest.raises(ConfigError) as refused:
        train(tmp_path, dataset(tmp_path), config)
    assert str(refused.value) == (
        "trainer.update: backward sees a step's gradients in one pass, and 256 tokens at context=32 take 4 micro-batches; use "
        "step, or trainer.micro_batch=8"
    )
