"""On the native kernel every scheme and every mechanism is what it is in float64 without it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from ctxlab.model.attention import native
from ctxlab.model.attention.base import ATTENTIONS
from ctxlab.model.attention.bias import Compilable
from ctxlab.model.base import ARCHITECTURES, Parts, native_from
from ctxlab.model.cache import KVCache
from ctxlab.model.position.base import POSITIONS
from ctxlab.model.transformer import Transformer
from tests.conformance.test_attentions import PATTERNED, SMALL
from tests.model.builders import VOCAB, build, small, tokens

pytestmark = pytest.mark.usefixtures("native_kernel")

READ_SCORES = ["cope_ctx", "transformer_xl"]  # and so run in torch
T = 150  # two blocks of queries and of keys
MECHANISMS = [("full", {}), ("full", {"sink": True}), *SMALL.items()]
MECHANISMS += [(name, SMALL[name] | {"global_every": 2}) for name in PATTERNED]
SCHEMES = [(name, "full", {}) for name in POSITIONS.names()]
CASES = SCHEMES + [("rope", *mechanism) for mechanism in MECHANISMS] + [("t5", *mechanism) for mechanism in MECHANISMS]
cases = pytest.mark.parametrize(("position", "attention", "settings"), CASES)


def pair(position: str, attention: str, settings: dict[str, Any]) -> tuple[Transformer, Transformer]:
    """The same model twice: on the kernel in fp32 where it states the bias, and on torch in float64."""
    config = ATTENTIONS.get(attention).Config
    models = [
        build(position, context=T, attention=config(name=attention, kernel=kernel, **settings))
        for kernel in ("auto" if position in READ_SCORES else "native", "torch")
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
    assert [name for name in POSITIONS.names() if not can(model, name)] == READ_SCORES


def test_what_is_told_of_a_scheme_is_what_its_bias_says() -> None:
    for name in POSITIONS.names():
        scheme = POSITIONS.get(name)
        assert can(build(), name) == (scheme.form != "blockwise" or scheme.compilable), name


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("position", "attention", "settings", "expected"),
    [
        ("rope", "full", {}, {"fp32": 512, "bf16": 32}), ("rope", "full", {"kernel": "torch"}, None),
        ("t5", "full", {}, {"fp32": 32, "bf16": 32}), ("fire", "full", {}, {"fp32": 32, "bf16": 32}),
        ("nope", "sliding_window", {"size": 100}, {"fp32": 512, "bf16": 32}),
        ("kerple", "recurrent", {"size": 4, "memory": 4}, {"fp32": 32, "bf16": 32}),
        ("nope", "linear", {}, None), ("fox", "full", {}, {"fp32": 32, "bf16": 32}), ("cope_ctx", "full", {}, None),
        ("transformer_xl", "recurrent", {"size": 4, "memory": 4}, None),
    ],
)  # fmt: skip
def test_the_kernel_runs_from_the_length_that_is_told(
    position: str, attention: str, settings: dict[str, Any], expected: dict[str, int] | None, precision: str
) -> None:
    config = ATTENTIONS.get(attention).Config(name=attention, **settings)
    model = build(position, context=1024, attention=config)
    fewest = native_from(Parts(model.config, model.position.config, config), precision)
    assert fewest == (None if expected is None else expected[precision])
    for length, ran in ((600, "torch"),) if fewest is None else ((fewest - 4, "torch"), (fewest, "native")):
        native.forget()
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"):
            model(tokens(1, length))
        assert native.ran() == ("" if attention == "linear" else ran)


@pytest.mark.parametrize(("position", "fewest"), [("t5", 32), ("cope_ctx", 512), ("rope", 512)])
def test_cross_attention_is_without_a_bias(position: str, fewest: int) -> None:
    model, scheme = small(architecture="encoder_decoder"), POSITIONS.get(position).Config(name=position)
    assert native_from(Parts(model, scheme, ATTENTIONS.get("full").Config(name="full")), "fp32") == fewest


@pytest.mark.parametrize("architecture", ["lstm", "bert2bert"])
def test_without_a_mechanism_of_ours_nothing_runs_in_it(architecture: str) -> None:
    model = ARCHITECTURES.get(architecture).Config
    assert native_from(Parts(model.model_construct(architecture=architecture), "none", "none"), "fp32") is None


@cases
def test_logits_and_gradients_equal_those_in_float64(
    position: str, attention: str, settings: dict[str, Any], native_kernel: Callable[[], str]
) -> None:
    ours, exact = pair(position, attention, settings)
    x = tokens(2, T)
    found = ours(x)
    assert native_kernel() == ("torch" if position in READ_SCORES else "native")
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
