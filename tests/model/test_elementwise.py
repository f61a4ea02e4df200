"""The hand-written gradients, against numerical ones and against torch's own functions."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from ctxlab.model.elementwise import Gate, gated, rms_norm


def test_rms_norm_gradient_is_the_numerical_one() -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 4, 7, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, w: rms_norm(x, w, 1e-5, torch.float64), (x, weight))


def test_rms_norm_equals_torch() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(5, 33), torch.randn(33)
    torch.testing.assert_close(
        rms_norm(x, weight, 1e-6, torch.float32), F.rms_norm(x, (33,), weight, 1e-6), atol=1e-6, rtol=1e-6
    )


def test_rms_norm_of_bf16_is_computed_in_fp32() -> None:
    torch.manual_seed(0)
    x = torch.randn(64, 96).bfloat16()
    weight = torch.randn(96)
    exact = F.rms_norm(x.double(), (96,), weight.double(), 1e-5)
    assert torch.equal(rms_norm(x, weight, 1e-5, torch.bfloat16), exact.bfloat16())


def test_rms_norm_gradient_under_autocast_stays_fp32() -> None:
    torch.manual_seed(0)
    x = torch.randn(64, 96, requires_grad=True)
    weight = torch.randn(96, requires_grad=True)
    upstream = torch.randn(64, 96)
    expected = torch.autograd.grad(rms_norm(x, weight, 1e-5, torch.float32), (x, weight), upstream)
    with torch.autocast("cpu", torch.bfloat16):
        found = torch.autograd.grad(rms_norm(x, weight, 1e-5, torch.float32), (x, weight), upstream)
    assert all(torch.equal(a, b) for a, b in zip(found, expected))


@pytest.mark.parametrize("kind", ["swiglu", "geglu_tanh"])
def test_gates_have_value_and_gradient_of_their_composition(kind: Gate) -> None:
    torch.manual_seed(0)
    gate, up = (torch.randn(4, 9, dtype=torch.float64, requires_grad=True) for _ in range(2))
    upstream = torch.randn(4, 9, dtype=torch.float64)
    if kind == "swiglu":
        expected = gate / (1 + torch.exp(-gate)) * up
    else:
        expected = 0.5 * gate * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (gate + 0.044715 * gate**3))) * up
    found = gated(gate, up, kind)
    torch.testing.assert_close(found, expected, atol=1e-14, rtol=1e-14)
    mine, theirs = (torch.autograd.grad(y, (gate, up), upstream) for y in (found, expected))
    torch.testing.assert_close(mine, theirs, atol=1e-12, rtol=1e-12)
    assert torch.autograd.gradcheck(lambda gate, up: gated(gate, up, kind), (gate, up))


@pytest.mark.parametrize("kind", ["swiglu", "geglu_tanh"])
def test_gates_leave_what_they_are_given_as_it_is(kind: Gate) -> None:
    torch.manual_seed(0)
    gate, up = (torch.randn(4, 9, requires_grad=True) for _ in range(2))
    upstream = torch.randn(4, 9)
    before = [x.detach().clone() for x in (gate, up, upstream)]
    y = gated(gate, up, kind)
    first, second = (torch.autograd.grad(y, (gate, up), upstream, retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(a, b) for a, b in zip((gate, up, upstream), before, strict=True))
