"""On the native kernel every scheme and every mechanism is what it is in float64 without it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from ctxlab.model.attention import native
from ctxlab.model.attention.base import ATTENTIONS
from ctxlab.model.attention.bias import Compilable
from ctxlab.model.cache import KVCache
from ctxlab.model.position.base import POSITIONS
from ctxlab.model.transformer import Transformer
from tests.conformance.test_attentions import PATTERNED, SMALL
from tests.model.builders import VOCAB, build, tokens

pytestmark = pytest.mark.usefixtures("native_kernel")

T = 150  # two blocks of queries and of keys
MECHANISMS = [("full", {}), ("full", {"sink": True}), *SMALL.items()]
MECHANISMS += [(name, SMALL[name] | {"global_every": 2}) for name in PATTERNED]
SCHEMES = [(name, "full", {}) for name in POSITIONS.names()]
CASES = SCHEMES + [("rope", *mechanism) for mechanism in MECHANISMS] + [("t5", *mechanism) for mechanism in MECHANISMS]
cases = pytest.mark.parametrize(("position", "attention", "settings"), CASES)


def pair(position: str, attention: str, settings: dict[str, Any]) -> tuple[Transformer, Transformer]:
    """The same model twice: `auto` in fp32, and torch in float64."""
    models = [
        build(
            position, context=T, attention=ATTENTIONS.get(attention).Config(name=attention, kernel=kernel, **settings)
        )
        for kernel in ("auto", "torch")
    ]
    return models[0], models[1].double()


def can(model: Transformer, position: str) -> bool:
    """Whether the scheme has no bias, or one that the kernel can state."""
    scheme = POSITIONS.get(position)(POSITIONS.get(position).Config(name=position), model.config, T)
    scheme.initialize()
    state, _ = scheme.prepare(torch.zeros(1, 4, model.config.d_model), 0, None)
    bias = scheme.bias(torch.zeros(1, model.config.n_heads, 4, model.config.head_dim), 4, state)
    return bias is None or isinstance(bias, Compilable)


def test_all_but_those_that_read_scores_are_stated() -> None:
    model = build()
    assert [name for name in POSITIONS.names() if not can(model, name)] == ["cope_ctx", "fox", "transformer_xl"]


@cases
def test_logits_and_gradients_equal_those_in_float64(
    position: str, attention: str, settings: dict[str, Any], native_kernel: Callable[[], str]
) -> None:
    ours, exact = pair(position, attention, settings)
    x = tokens(2, T)
    found = ours(x)
    assert native_kernel() == ("native" if can(ours, position) else "torch")
    expected = exact(x)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=2e-4)
    upstream = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    mine = torch.autograd.grad(found, list(ours.parameters()), upstream)
    theirs = torch.autograd.grad(expected, list(exact.parameters()), upstream.double())
    for (name, _), a, b in zip(ours.named_parameters(), mine, theirs):
        assert (a - b).norm() <= 2e-4 * b.norm().clamp(min=1.0), name  # a shift of all scores has none


@cases
def test_cached_chunks_equal_one_forward(position: str, attention: str, settings: dict[str, Any]) -> None:
    model, _ = pair(position, attention, settings)
    x = tokens(2, T)
    cache = KVCache(model.config.n_layers)
    with torch.no_grad():
        expected = model(x)
        found = torch.cat([model(part, cache=cache) for part in x.split([70, 1, 40, 39], dim=1)], dim=1)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


@cases
@pytest.mark.parametrize("at", [1, 127, 128])
def test_no_token_sees_the_future(position: str, attention: str, settings: dict[str, Any], at: int) -> None:
    """Changing token `at` changes nothing before it, to the last bit, and something at it."""
    model, _ = pair(position, attention, settings)
    x = tokens(1, T)
    other = x.clone()
    other[0, at] = (other[0, at] + 1) % VOCAB
    with torch.no_grad():
        before, after = model(x)[0], model(other)[0]
    assert torch.equal(before[:at], after[:at])
    assert not torch.equal(before[at], after[at])


def test_packed_documents_equal_each_alone() -> None:
    model, _ = pair("t5", "full", {})
    x = tokens(1, T)
    native.forget()
    with torch.no_grad():
        packed = model(x, segments=((100, 50),))
        assert native.ran() == "native"
        for start, stop in ((0, 100), (100, 150)):
            alone = model(x[:, start:stop])
            torch.testing.assert_close(packed[:, start:stop], alone, atol=1e-5, rtol=0)
