"""The recurrent model against its equations written out, against itself in pieces, and against its closed forms."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ctxlab.errors import IncompatibleError
from ctxlab.model import count
from ctxlab.model.base import Parts, build_model
from ctxlab.model.config import LSTMConfig
from ctxlab.model.generation import DecodingConfig, generate
from ctxlab.model.lstm import LSTM
from tests.model.builders import VOCAB, tokens

SETTINGS = [
    {},
    {"n_layers": 3, "d_hidden": 32},  # of the embedding's width: no matrix behind the layers
    {"n_layers": 1, "d_hidden": 48, "tie_embeddings": False},
]


def build(*, seed: int = 0, **settings: Any) -> LSTM:
    """32 wide, 2 layers of 40, in eval mode, every number drawn with standard deviation 0.25."""
    torch.manual_seed(seed)
    config = LSTMConfig(**{"d_model": 32, "d_hidden": 40, "n_layers": 2} | settings)
    model = build_model(Parts(config, "none", "none"), vocab_size=VOCAB, context=16)
    assert isinstance(model, LSTM)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.25)
    return model.eval()


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def by_hand(model: LSTM, x: Tensor) -> np.ndarray:
    """What the head reads, one row, token, layer and gate at a time in float64, from the equations."""
    weights = {name: p.detach().double().numpy() for name, p in model.named_parameters()}
    h = model.config.d_hidden
    found = []
    for row in x.tolist():
        hidden, cell = np.zeros((model.config.n_layers, h)), np.zeros((model.config.n_layers, h))
        for token in row:
            below = weights["embedding.weight"][token]
            for layer in range(model.config.n_layers):
                gates = []
                for number in range(4):  # input, forget, cell, output: torch's order of the stack
                    rows = slice(number * h, (number + 1) * h)
                    kept = {name: weights[f"layers.{name}_l{layer}"][rows] for name in ("weight_ih", "weight_hh")}
                    bias = weights[f"layers.bias_ih_l{layer}"][rows] + weights[f"layers.bias_hh_l{layer}"][rows]
                    gates.append(kept["weight_ih"] @ below + kept["weight_hh"] @ hidden[layer] + bias)
                cell[layer] = sigmoid(gates[1]) * cell[layer] + sigmoid(gates[0]) * np.tanh(gates[2])
                below = hidden[layer] = sigmoid(gates[3]) * np.tanh(cell[layer])
            found.append(below if model.out is None else weights["out.weight"] @ below)
    return np.stack(found).reshape(*x.shape, -1)


@pytest.mark.parametrize("settings", SETTINGS)
def test_hidden_is_what_the_equations_give(settings: dict[str, Any]) -> None:
    model, x = build(**settings).double(), tokens(2, 9)
    np.testing.assert_allclose(model.hidden(x).detach().numpy(), by_hand(model, x), atol=1e-12, rtol=0)
    head = model.embedding.weight if model.head is None else model.head.weight
    expected = by_hand(model, x) @ head.detach().numpy().T
    np.testing.assert_allclose(model(x).detach().numpy(), expected, atol=1e-12, rtol=0)


def test_fp32_layers_give_the_same() -> None:
    """oneDNN computes them, where torch has it; float64 does not pass through it."""
    model, x = build(), tokens(2, 200)
    np.testing.assert_allclose(model.hidden(x).detach().numpy(), by_hand(model, x), atol=2e-6, rtol=0)


@pytest.mark.parametrize("settings", SETTINGS)
def test_chunks_over_a_cache_are_one_forward_of_any_length(settings: dict[str, Any]) -> None:
    model, x = build(**settings), tokens(3, 70)  # past the context of 16
    cache = model.new_cache()
    with torch.no_grad():
        found = torch.cat([model(part, cache=cache) for part in x.split([9, 1, 1, 40, 19], dim=1)], dim=1)
        torch.testing.assert_close(found, model(x), atol=1e-5, rtol=0)
    assert cache.length == 70
    assert cache.bytes == count.kv_cache_bytes(model.config, "none", "none", length=70, rows=3)


def test_a_cache_holds_no_gradient() -> None:
    model = build()
    cache = model.new_cache()
    model.hidden(tokens(1, 3), cache=cache)
    assert cache.state is not None
    assert not any(part.requires_grad for part in cache.state)


def test_greedy_equals_full_forwards_without_a_cache() -> None:
    model = build()
    text = tokens(1, 20)[0].tolist()
    found = list(generate(model, text, DecodingConfig(temperature=0.0, max_new_tokens=24)))
    with torch.no_grad():
        for _ in range(24):
            text.append(int(model(torch.tensor([text]))[0, -1].argmax()))
    assert found == text[20:]


def test_what_follows_a_token_changes_nothing_before_it() -> None:
    model, x = build().double(), tokens(2, 30)
    other = x.clone()
    other[:, 11] = (other[:, 11] + 1) % VOCAB
    with torch.no_grad():
        one, two = model.hidden(x), model.hidden(other)
        padded = model.hidden(torch.nn.functional.pad(x, (0, 7)), lengths=torch.tensor([30, 30]))
    assert torch.equal(one[:, :11], two[:, :11])
    assert not (one[:, 11:] == two[:, 11:]).all(-1).any()
    torch.testing.assert_close(padded[:, :30], one, atol=1e-14, rtol=0)


SEGMENTS = ((5, 3, 12), (1, 1, 9), (20,), (7, 13))  # of rows of 20: the second has padding behind its last


def test_packed_documents_know_nothing_of_each_other() -> None:
    """Values and gradients are those of the documents alone, whatever stands beside them."""
    model, x = build().double(), tokens(4, 20)
    draw = torch.Generator().manual_seed(3)
    weigh = torch.randn(4, 20, 32, generator=draw, dtype=torch.float64)
    packed = model.hidden(x, segments=SEGMENTS)
    alone = torch.zeros_like(packed)
    parts = []
    for row, sizes in enumerate(SEGMENTS):
        for start, size in zip(np.cumsum((0, *sizes)), sizes):
            part = slice(int(start), int(start) + size)
            hidden = model.hidden(x[row : row + 1, part])[0]
            alone[row, part] = hidden.detach()
            parts.append((hidden * weigh[row, part]).sum())
    torch.testing.assert_close(packed.detach(), alone, atol=1e-12, rtol=0)
    grads = [torch.autograd.grad(total, list(model.parameters())[1:]) for total in ((packed * weigh).sum(), sum(parts))]
    for here, there in zip(*grads):
        torch.testing.assert_close(here, there, atol=1e-11, rtol=0)


@pytest.mark.parametrize(
    ("segments", "why"),
    [
        (((5,),), "expected one list of lengths for each of 2 rows, got 1"),
        (((5,), (11,)), "expected lengths >= 1 that add up to at most 10, got \\(11,\\)"),
    ],
)
def test_segments_that_do_not_fit_are_refused(segments: tuple[tuple[int, ...], ...], why: str) -> None:
    with pytest.raises(ValueError, match=f"segments: {why}"):
        build().hidden(tokens(2, 10), segments=segments)


def test_a_memory_goes_on_where_each_row_was_left() -> None:
    model, x = build(carry_state=True).double(), tokens(3, 24)
    assert model.carries
    assert not build().carries
    memory = model.new_memory(3)
    first = model.hidden(x[:, :10], memory=memory)
    memory.keep(torch.tensor([True, False, True]))  # the second row begins a document
    second = model.hidden(x[:, 10:], memory=memory)
    with torch.no_grad():
        whole, anew = model.hidden(x), model.hidden(x[1:2, 10:])
    torch.testing.assert_close(first.detach(), whole[:, :10], atol=1e-12, rtol=0)
    torch.testing.assert_close(second[::2].detach(), whole[::2, 10:], atol=1e-12, rtol=0)
    torch.testing.assert_close(second[1:2].detach(), anew, atol=1e-12, rtol=0)
    assert not any(layer.requires_grad for layer in memory.layers)


def test_a_memory_goes_with_neither_a_cache_nor_a_packed_batch() -> None:
    model, x = build(), tokens(1, 4)
    for given in ({"cache": model.new_cache()}, {"segments": ((4,),)}):
        with pytest.raises(ValueError, match="LSTM: a packed batch, a cache and a memory do not go together"):
            model.hidden(x, memory=model.new_memory(1), **given)


def test_under_bf16_the_layers_stay_fp32_and_what_the_head_reads_is_bf16() -> None:
    model, x = build(), tokens(2, 30)
    with torch.no_grad():
        states, _ = model.layers(model.embedding(x))
        assert model.out is not None
        expected = states.bfloat16() @ model.out.weight.bfloat16().T
        with torch.autocast("cpu", torch.bfloat16):
            found = model.hidden(x)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, expected)


def test_dropout_is_drawn_in_training_only() -> None:
    model, x = build(dropout=0.3), tokens(2, 8)
    assert torch.equal(model.hidden(x), model.hidden(x))
    model.train()
    assert not torch.equal(model.hidden(x), model.hidden(x))
    assert build(dropout=0.3, n_layers=1).layers.dropout == 0.0  # torch would warn: nothing stands between the layers


def test_forget_gates_begin_open() -> None:
    config = LSTMConfig(d_model=32, d_hidden=40, n_layers=2)
    model = LSTM(config, vocab_size=VOCAB, context=16)
    for layer in range(2):
        bias = getattr(model.layers, f"bias_ih_l{layer}") + getattr(model.layers, f"bias_hh_l{layer}")
        assert bias.tolist() == [0.0] * 40 + [1.0] * 40 + [0.0] * 80


@pytest.mark.parametrize("settings", SETTINGS)
def test_parameters_are_those_built(settings: dict[str, Any]) -> None:
    model = build(**settings)
    counted = count.parameters(model.config, "none", "none", vocab_size=VOCAB, context=16)
    assert counted.total == model.n_parameters()
    assert counted.without_embeddings == model.n_parameters(embeddings=False)


def test_flops_by_hand() -> None:
    """2 layers of 3, d 2, vocabulary 5: every product once forward and twice backward, at 2 a weight."""
    config = LSTMConfig(d_model=2, d_hidden=3, n_layers=2)
    first, second, out, head = 4 * 3 * (2 + 3), 4 * 3 * (3 + 3), 3 * 2, 2 * 5
    for context in (7, 7000):
        found = count.flops_per_token(config, "none", vocab_size=5, context=context)
        assert found == 3 * 2 * (first + second + out + head)


def test_what_does_not_apply_is_refused() -> None:
    model = build(carry_state=True)
    with pytest.raises(IncompatibleError, match=r"decoding\.cache: an LSTM's state has one size"):
        next(generate(model, [1], DecodingConfig(cache="streaming")))
    with pytest.raises(IncompatibleError, match=r"trainer\.compile: torch does not compile its LSTM"):
        model.compile_blocks()
    for setting, why in (
        ("packed", "data.packed"),
        ("compiled", "trainer.compile"),
        ("recompute", "trainer.recompute"),
    ):
        said: dict[str, Any] = {"packed": False, "compiled": False, "recompute": "none"}
        said[setting] = "block" if setting == "recompute" else True
        with pytest.raises(IncompatibleError, match=f"^{why}: .*; use (false|none)$"):
            LSTM.check_training(model.config, **said)
    LSTM.check_training(build().config, packed=True, compiled=False, recompute="none")
