"""What is made again: once a pass, alive no longer than it is read, with the gradients of what autograd keeps."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ctxlab.model.remake import Recompute, remade
from tests.model.builders import build, tokens


class Reads:
    """y = sum of x's exponential times each of three matrices, the exponential kept or made again."""

    def __init__(self, again: bool) -> None:
        torch.manual_seed(0)
        self.x = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
        self.matrices = [torch.randn(4, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]
        self.made: list[Any] = []
        read = self.exponential()
        if again:
            with remade(read, self.exponential):
                self.y = [self.through(read, matrix) for matrix in self.matrices]
        else:
            self.y = [self.through(read, matrix) for matrix in self.matrices]

    def exponential(self) -> Tensor:
        made = (2 * self.x).exp()
        self.made.append(weakref.ref(made))
        return made

    @staticmethod
    def through(read: Tensor, matrix: Tensor) -> Tensor:
        return (read.T[1:].T @ matrix[1:]).sum()  # a view of it

    def gradients(self, which: slice = slice(None)) -> tuple[Tensor, ...]:
        y = torch.stack(self.y[which]).sum()
        return torch.autograd.grad(y, [self.x, *self.matrices[which]], retain_graph=True)


def test_it_is_made_once_a_pass_and_goes_with_the_last_that_reads_it() -> None:
    kept, reads = Reads(again=False), Reads(again=True)
    assert all(torch.equal(a, b) for a, b in zip(reads.gradients(), kept.gradients(), strict=True))
    assert len(reads.made) == 2
    assert reads.made[1]() is None
    assert all(torch.equal(a, b) for a, b in zip(reads.gradients(), kept.gradients(), strict=True))
    assert len(reads.made) == 3


@pytest.mark.parametrize("first", [slice(0, 1), slice(1, 3)])
def test_a_pass_through_some_of_them_spoils_no_other(first: slice) -> None:
    kept, reads = Reads(again=False), Reads(again=True)
    for which in (first, slice(None), first, slice(None)):
        found, expected = reads.gradients(which), kept.gradients(which)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


class Adapted(nn.Module):
    """x -> W x + B A dropout(x), as adapters read what a matrix reads."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, 2, bias=False)
        self.up = nn.Linear(2, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(F.dropout(x, 0.2)))


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("trained", ["adapters", "vectors", "feed_forward"])
@pytest.mark.parametrize("policy", ["none", "selective"])
def test_adapters_and_frozen_parameters_have_the_gradients_of_blocks_run_twice(
    policy: Recompute, trained: str, bf16: bool
) -> None:
    model = build("rope", activation="gelu", norm="layernorm", bias=True).train()
    if trained == "adapters":
        torch.manual_seed(1)
        for name, module in list(model.named_modules()):
            if isinstance(module, nn.Linear) and name.rpartition(".")[2] in ("query", "up", "down"):
                model.set_submodule(name, Adapted(module))
    for name, parameter in model.named_parameters():
        chosen = {
            "adapters": any(f".{part}." in name for part in ("down.down", "down.up", "up.down", "up.up", "query.up")),
            "vectors": parameter.ndim == 1,
            "feed_forward": ".feed_forward." in name,
        }
        parameter.requires_grad_(chosen[trained])
    found = []
    for recompute in (policy, "block"):
        model.recompute = recompute
        model.zero_grad(set_to_none=True)
        torch.manual_seed(2)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            x = tokens(2, 33)
            loss = model.nats(model.hidden(x[:, :-1]), x[:, 1:]).sum()
        loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    assert len(found[0]) > 3
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_an_output_that_nobody_reads_goes_with_its_graph() -> None:
    """As the log-sum-exp of attention does where no sink has its gradient: its operation keeps it, and it the operation."""
    x = torch.randn(3, 5, requires_grad=True)
    read = 2 * x
    with remade(read, lambda: 2 * x):
        unread = (read + x).logsumexp(-1)
        there = weakref.ref(unread)
        del unread
    assert there() is None
