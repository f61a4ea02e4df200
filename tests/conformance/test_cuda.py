"""On a CUDA device every scheme and every mechanism is what it is in float64 on a CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ctxlab.model.attention.base import ATTENTIONS
from ctxlab.model.cache import KVCache
from ctxlab.model.transformer import Transformer
from tests.conformance.test_native import CASES, T
from tests.model.builders import VOCAB, build, tokens

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
DEVICE = "cuda"
cases = pytest.mark.parametrize(("position", "attention", "settings"), CASES)


def model_of(position: str, attention: str, settings: dict[str, Any]) -> Transformer:
    """Heads of 16, the narrowest that FlexAttention takes."""
    config = ATTENTIONS.get(attention).Config(name=attention, **settings)
    return build(position, context=T, attention=config, head_dim=16)


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative, in the Euclidean norm."""
    return float((found.detach().double().cpu() - expected).norm() / expected.norm().clamp(min=1.0))


@cases
def test_logits_and_gradients_equal_those_in_float64(position: str, attention: str, settings: dict[str, Any]) -> None:
    exact = model_of(position, attention, settings).double()
    ours = model_of(position, attention, settings).cuda()
    x = tokens(2, T)
    expected, found = exact(x), ours(x.cuda())
    assert distance(found, expected.detach()) < 2e-5
    upstream = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    theirs = torch.autograd.grad(expected, list(exact.parameters()), upstream.double())
    mine = torch.autograd.grad(found, list(ours.parameters()), upstream.cuda())
    for (name, _), a, b in zip(ours.named_parameters(), mine, theirs):
        assert distance(a, b) < 2e-4, name


@cases
def test_in_bf16_it_is_what_it_is_in_float64_but_for_rounding(
    position: str, attention: str, settings: dict[str, Any]
) -> None:
    expected = model_of(position, attention, settings).double()(tokens(2, T)).detach()
    with torch.no_grad(), torch.autocast("cuda", dtype=torch.bfloat16):
        found = model_of(position, attention, settings).cuda()(tokens(2, T).cuda())
    assert 1e-3 < distance(found, expected) < 0.03


@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("position", ["t5", "kerple", "sandwich", "fox"])
def test_biases_train_in_bf16_at_real_widths(position: str, width: int) -> None:
    """Here torch's own sizes of a kernel's blocks found no room in the chip's shared memory."""
    exact = build(position, context=600, head_dim=width).double()
    ours = build(position, context=600, head_dim=width).to(DEVICE)
    x = tokens(2, 600)
    upstream = torch.randn(2, 600, VOCAB, generator=torch.Generator().manual_seed(1))
    theirs = torch.autograd.grad(exact(x), list(exact.parameters()), upstream.double())
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        found = ours(x.to(DEVICE))
    mine = torch.autograd.grad(found, list(ours.parameters()), upstream.to(found))
    for (name, _), a, b in zip(ours.named_parameters(), mine, theirs):
        assert distance(a, b) < 0.05, name


@cases
def test_cached_chunks_equal_one_forward(position: str, attention: str, settings: dict[str, Any]) -> None:
    model, x = model_of(position, attention, settings).cuda(), tokens(2, T).cuda()
    cache = KVCache(model.config.n_layers)
    with torch.no_grad():
        expected = model(x)
        found = torch.cat([model(part, cache=cache) for part in x.split([70, 1, 40, 39], dim=1)], dim=1)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
