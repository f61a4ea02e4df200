"""Learning-rate curves by hand, parameter groups, and two optimizers acting as one."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from ctxlab.train.optim.adamw import AdamW
from ctxlab.train.optim.base import OPTIMIZERS, Optimizer, rate_factor
from ctxlab.train.optim.muon import Muon, Together


def curve(schedule: str, **settings: float) -> Optimizer.Config:
    return Optimizer.Config(name="x", learning_rate=1.0, schedule=schedule, **settings)  # type: ignore[arg-type]


def test_warm_up_is_linear_and_reaches_one_after_its_steps() -> None:
    config = curve("constant", warmup_steps=4)
    assert [rate_factor(config, step, 0.0) for step in range(6)] == [0.2, 0.4, 0.6, 0.8, 1.0, 1.0]


def test_cosine_at_start_middle_and_end() -> None:
    config = curve("cosine", warmup_steps=0, final_ratio=0.1)
    assert rate_factor(config, 100, 0.0) == 1.0
    assert rate_factor(config, 100, 0.5) == pytest.approx(0.55)
    assert rate_factor(config, 100, 1.0) == pytest.approx(0.1)
    assert rate_factor(config, 100, 0.25) == pytest.approx(0.1 + 0.9 * (1 + math.sqrt(0.5)) / 2)


def test_wsd_is_flat_and_then_linear() -> None:
    config = curve("wsd", warmup_steps=0, final_ratio=0.0, decay_fraction=0.2)
    assert [rate_factor(config, 9, p) for p in (0.0, 0.5, 0.8)] == pytest.approx([1.0, 1.0, 1.0])
    assert rate_factor(config, 9, 0.9) == pytest.approx(0.5)
    assert rate_factor(config, 9, 1.0) == pytest.approx(0.0)


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 4)
        self.inner = nn.Linear(4, 8)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 11, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.inner(self.embedding(ids))))


def members(model: nn.Module, group: dict[str, list[nn.Parameter]]) -> set[str]:
    names = {id(p): n for n, p in model.named_parameters()}
    return {names[id(p)] for p in group["params"]}


def test_muon_takes_hidden_matrices_only_and_adamw_the_rest() -> None:
    model = Toy()
    optimizer = Muon(Muon.Config()).build(model)
    assert isinstance(optimizer, Together)
    hidden, *rest = optimizer.param_groups
    assert members(model, hidden) == {"inner.weight"}
    assert set().union(*(members(model, g) for g in rest)) == {
        "embedding.weight", "inner.bias", "norm.weight", "norm.bias", "head.weight",
    }  # fmt: skip


def test_adamw_decays_hidden_matrices_only() -> None:
    model = Toy()
    groups = AdamW(AdamW.Config(weight_decay=0.3)).build(model).param_groups
    decayed = [g for g in groups if g["weight_decay"]]
    assert [members(model, g) for g in decayed] == [{"inner.weight"}]
    assert decayed[0]["weight_decay"] == 0.3


def test_together_equals_its_parts_stepping_alone() -> None:
    torch.manual_seed(0)
    ids = torch.randint(11, (5,))
    one, two = Toy(), Toy()
    two.load_state_dict(one.state_dict())
    together = Muon(Muon.Config()).build(one)
    hidden = [two.inner.weight]
    others = [p for n, p in two.named_parameters() if n != "inner.weight"]
    config = Muon.Config()
    muon = torch.optim.Muon(
        hidden, lr=config.learning_rate, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw"
    )
    adamw = torch.optim.AdamW(others, lr=config.adamw_learning_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    for _ in range(3):
        for model in (one, two):
            model.zero_grad()
            model(ids).square().mean().backward()
        together.step()
        muon.step()
        adamw.step()
    for (name, a), b in zip(one.named_parameters(), two.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_together_state_survives_a_round_trip_and_rates_set_here_are_set_there() -> None:
    torch.manual_seed(0)
    ids = torch.randint(11, (5,))
    model = Toy()
    first = Muon(Muon.Config()).build(model)
    for _ in range(2):
        model.zero_grad()
        model(ids).square().mean().backward()
        first.step()
    twin = Toy()
    twin.load_state_dict(model.state_dict())
    second = Muon(Muon.Config()).build(twin)
    second.load_state_dict(copy.deepcopy(first.state_dict()))  # torch keeps the tensors it is given
    for optimizer, m in ((first, model), (second, twin)):
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * 0.5
        m.zero_grad()
        m(ids).square().mean().backward()
        optimizer.step()
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b)


def test_every_optimizer_is_registered_under_its_config_name() -> None:
    assert OPTIMIZERS.names() == ["adamw", "muon"]
    for name in OPTIMIZERS.names():
        assert OPTIMIZERS.get(name).Config().name == name  # type: ignore[call-arg]
