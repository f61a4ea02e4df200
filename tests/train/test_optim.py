"""Learning-rate curves by hand, parameter groups, and two optimizers acting as one."""

from __future__ import annotations

import copy
import math
import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from ctxlab.config.catalog import conf_dir
from ctxlab.config.overrides import split
from ctxlab.config.prepare import prepare
from ctxlab.train.optim import orthogonal
from ctxlab.train.optim.adamw import AdamW
from ctxlab.train.optim.base import OPTIMIZERS, Optimizer, rate_factor
from ctxlab.train.optim.muon import Muon, Together
from ctxlab.train.optim.orthogonal import Orthogonal
from ctxlab.train.optim.sign import nearest_to_one


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


def test_noam_is_the_formula_of_the_paper() -> None:
    d_model, warmup = 512, 4000
    config = OPTIMIZERS.config({"name": "adamw", "schedule": "noam", "warmup_steps": warmup,
                                "learning_rate": (d_model * warmup) ** -0.5})  # fmt: skip
    for step in (1, 2, 100, 3999, 4000, 4001, 100_000):
        expected = d_model**-0.5 * min(step**-0.5, step * warmup**-1.5)
        assert config.learning_rate * rate_factor(config, step - 1, 0.3) == pytest.approx(expected, rel=1e-12)
    assert config.learning_rate == pytest.approx(6.99e-4, rel=1e-3)  # the peak


def test_the_settings_that_the_original_names_are_those_of_the_paper() -> None:
    """Vaswani et al. 2017, section 5.3: Adam (0.9, 0.98, 1e-9), and the rate of equation 3 with d_model 512 and warm-up 4000."""
    words = re.findall(r"optim[.=]\S+", (conf_dir() / "model" / "vaswani_base.yaml").read_text(encoding="utf-8"))
    line = ["model=vaswani_base", "data=parallel", "data.path=pairs.tsv", *words]
    (cell,) = prepare(split("train", line)).cells
    assert not cell.skipped
    config = cell.typed.optim
    for step in (1, 4000, 16_000):
        expected = 512**-0.5 * min(step**-0.5, step * 4000**-1.5)
        assert config.learning_rate * rate_factor(config, step - 1, 0.5) == pytest.approx(expected, rel=1e-8)
    assert (config.name, config.betas, config.eps) == ("adamw", (0.9, 0.98), 1e-9)
    assert (config.weight_decay, config.clip, config.layer_decay) == (0, 0, 1)


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


def step_by_hand(weight: np.ndarray, buffer: np.ndarray, gradient: np.ndarray, config: Muon.Config) -> None:
    """One step of Jordan et al. with Liu et al.'s scale, in float64 and in place, its direction by a decomposition."""
    buffer *= config.momentum
    buffer += (1 - config.momentum) * gradient
    u, s, vt = np.linalg.svd((1 - config.momentum) * gradient + config.momentum * buffer, full_matrices=False)
    sign = nearest_to_one(1e-3, poles=2)
    moved = 0.9 * np.array([sign(value) for value in s / (s**4).sum() ** 0.25])
    weight *= 1 - config.learning_rate * config.weight_decay
    weight -= config.learning_rate * 0.2 * np.sqrt(max(weight.shape)) * (u * moved @ vt)


@pytest.mark.parametrize("fast", [False, True])
def test_muon_is_the_formula_on_matrices_of_several_shapes_together(fast: bool, monkeypatch: Any) -> None:
    """In fp32 to rounding, in bf16 to the last bit what torch's own Muon does with each matrix alone."""
    monkeypatch.setattr(orthogonal, "_fast_dtype", lambda device: torch.bfloat16 if fast else torch.float32)
    torch.manual_seed(0)
    config = Muon.Config()
    shapes = [(6, 4), (4, 6), (6, 4), (5, 5)]
    mine = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    theirs = [nn.Parameter(p.detach().clone()) for p in mine]
    exact = [p.detach().double().numpy().copy() for p in mine]
    buffers = [np.zeros(shape) for shape in shapes]
    ours = Orthogonal([{"params": mine}], lr=config.learning_rate, weight_decay=config.weight_decay, momentum=0.95)
    torchs = torch.optim.Muon(
        theirs, lr=config.learning_rate, weight_decay=config.weight_decay, momentum=0.95, adjust_lr_fn="match_rms_adamw"
    )
    for _ in range(3):
        for a, b, weight, buffer in zip(mine, theirs, exact, buffers, strict=True):
            a.grad = torch.randn(a.shape)
            b.grad = a.grad.clone()
            step_by_hand(weight, buffer, a.grad.double().numpy(), config)
        ours.step()
        torchs.step()
    for a, b, weight in zip(mine, theirs, exact, strict=True):
        if fast:
            torch.testing.assert_close(a, b, rtol=0, atol=2e-4)  # a bf16 update of 0.005 is good to 2e-5 a step
        else:
            np.testing.assert_allclose(a.detach().numpy(), weight, rtol=0, atol=1e-6)


def test_few_matrices_at_once_change_nothing(monkeypatch: Any) -> None:
    torch.manual_seed(0)
    gradients = [torch.randn(8, 8) for _ in range(5)]
    results = []
    for together in (1, 130, 1 << 22):
        monkeypatch.setattr(orthogonal, "_TOGETHER", together)
        weights = [nn.Parameter(torch.ones(8, 8)) for _ in gradients]
        for weight, gradient in zip(weights, gradients, strict=True):
            weight.grad = gradient.clone()
        Orthogonal([{"params": weights}], lr=0.1, weight_decay=0.0, momentum=0.9).step()
        results.append(torch.stack([weight.detach() for weight in weights]))
    torch.testing.assert_close(results[0], results[2], rtol=0, atol=1e-6)
    torch.testing.assert_close(results[1], results[2], rtol=0, atol=1e-6)


def test_together_equals_its_parts_stepping_alone() -> None:
    torch.manual_seed(0)
    ids = torch.randint(11, (5,))
    one, two = Toy(), Toy()
    two.load_state_dict(one.state_dict())
    together = Muon(Muon.Config()).build(one)
    hidden = [two.inner.weight]
    others = [p for n, p in two.named_parameters() if n != "inner.weight"]
    config = Muon.Config()
    muon = Orthogonal([{"params": hidden}], lr=config.learning_rate, weight_decay=0.1, momentum=0.95)
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


def test_muon_makes_each_gate_of_an_lstm_orthogonal_by_itself() -> None:
    """The stack that torch keeps takes the steps of four parameters of their own."""
    torch.manual_seed(0)
    model, config = nn.LSTM(6, 8, 2), Muon.Config()
    stacks = [p for p in model.parameters() if p.ndim == 2]
    gates = [nn.Parameter(gate.clone()) for p in stacks for gate in p.detach().chunk(4)]
    alone = Orthogonal([{"params": gates}], lr=config.learning_rate, weight_decay=0.1, momentum=config.momentum)
    together = Muon(config).build(model)
    for _ in range(3):
        for number, stack in enumerate(stacks):
            stack.grad = torch.randn(stack.shape)
            stack.grad[:8] *= 30  # one gate's gradient is larger than those of the others
            for gate, part in zip(gates[4 * number : 4 * number + 4], stack.grad.chunk(4), strict=True):
                gate.grad = part.clone()
        together.step()
        alone.step()
    for number, stack in enumerate(stacks):
        expected = torch.cat([gate.detach() for gate in gates[4 * number : 4 * number + 4]])
        torch.testing.assert_close(stack.detach(), expected, rtol=0, atol=1e-6)


def test_every_optimizer_is_registered_under_its_config_name() -> None:
    assert OPTIMIZERS.names() == ["adamw", "muon"]
    for name in OPTIMIZERS.names():
        assert OPTIMIZERS.get(name).Config().name == name  # type: ignore[call-arg]
