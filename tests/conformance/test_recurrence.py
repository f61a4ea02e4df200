"""A memory carried from segment to segment: one forward under the mechanism's mask, and a reference written out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ctxlab.errors import IncompatibleError
from ctxlab.model.attention.recurrent import Recurrent
from ctxlab.model.position.base import POSITIONS
from ctxlab.model.transformer import Transformer
from tests.model.builders import VOCAB, build, tokens

SIZE = 6
RELATIVE = [name for name in POSITIONS.names() if POSITIONS.get(name).relative]


def recurrent(memory: int, size: int = SIZE) -> Recurrent.Config:
    return Recurrent.Config(size=size, memory=memory)


def in_segments(model: Transformer, x: Tensor, size: int = SIZE) -> Tensor:
    memory = model.new_memory(len(x))
    return torch.cat([model.logits(model.hidden(part, memory=memory)) for part in x.split(size, dim=1)], dim=1)


@pytest.mark.parametrize("position", RELATIVE)
@pytest.mark.parametrize("memory", [6, 12])
def test_segment_by_segment_equals_one_forward(position: str, memory: int) -> None:
    model = build(position, attention=recurrent(memory), context=64).double()
    x = tokens(3, 5 * SIZE)
    with torch.no_grad():
        torch.testing.assert_close(in_segments(model, x), model(x), atol=1e-9, rtol=0)
        # Rows of two segments each, too: a row is no segment of the mechanism's.
        torch.testing.assert_close(in_segments(model, x, 2 * SIZE), model(x), atol=1e-9, rtol=0)


def test_a_row_that_begins_anew_remembers_nothing_and_disturbs_nobody() -> None:
    model = build("transformer_xl", attention=recurrent(12)).double()
    x = tokens(4, 4 * SIZE)
    goes_on = torch.tensor([[True] * 4, [True, False, True, True], [False, True, True, False], [True] * 4])
    memory = model.new_memory(4)
    with torch.no_grad():
        found = []
        for part, keep in zip(x.split(SIZE, dim=1), goes_on, strict=True):
            memory.keep(keep)
            found.append(model.hidden(part, memory=memory))
        hidden = torch.cat(found, dim=1)
        for row, begins in enumerate((2, 1, 0, 2)):
            cut = begins * SIZE
            for piece in (slice(0, cut), slice(cut, None)):
                if x[row, piece].numel():
                    alone = model.hidden(x[None, row, piece])[0]
                    torch.testing.assert_close(hidden[row, piece], alone, atol=1e-9, rtol=0)


def test_what_is_remembered_reaches_back_a_memory_a_layer_and_no_further() -> None:
    """Two layers, memory 12: of the last segment, from 30 on, the first layer's inputs matter from 30 - 24 on."""
    model = build("rope", attention=recurrent(12)).double()
    x = tokens(1, 6 * SIZE)
    with torch.no_grad():
        before = in_segments(model, x)[:, -SIZE:]
        for place, matters in ((0, False), (5, False), (6, True), (20, True)):
            other = x.clone()
            other[0, place] = (other[0, place] + 1) % VOCAB
            assert torch.equal(in_segments(model, other)[:, -SIZE:], before) is not matters


def by_hand(model: Transformer, x: Tensor, past: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """One segment (T,) of a rope-free model without GQA, all scores at once; past: inputs of the layers, (n,d)."""
    h = model.embedding(x)
    inputs = []
    for block, before in zip(model.blocks, past, strict=True):
        inputs.append(h)
        seen = torch.cat([before.detach(), h])
        normed = torch.nn.functional.rms_norm(
            seen, seen.shape[-1:], block.attention_norm.weight, block.attention_norm.eps
        )
        a = block.attention
        n, T, H, D = len(before), len(h), model.config.n_heads, model.config.head_dim
        q = a.query(normed[n:]).view(T, H, D).transpose(0, 1)
        k, v = (p(normed).view(n + T, H, D).transpose(0, 1) for p in (a.key, a.value))
        hidden = torch.ones(T, n + T, dtype=torch.bool).triu(n + 1)
        weights = (q @ k.mT / math.sqrt(D)).masked_fill(hidden, -torch.inf).softmax(-1)
        h = h + a.out((weights @ v).transpose(0, 1).reshape(T, H * D))
        normed = torch.nn.functional.rms_norm(
            h, h.shape[-1:], block.feed_forward_norm.weight, block.feed_forward_norm.eps
        )
        f = block.feed_forward
        h = h + f.down(torch.nn.functional.silu(f.gate(normed)) * f.up(normed))
    out = torch.nn.functional.rms_norm(h, h.shape[-1:], model.norm.weight, model.norm.eps)
    return out @ model.embedding.weight.T, inputs


def test_gradients_reach_the_projections_of_the_memory_but_not_what_made_it() -> None:
    model = build("nope", attention=recurrent(6), n_kv_heads=4).double()
    x = tokens(1, 3 * SIZE)
    past = [torch.zeros(0, model.config.d_model, dtype=torch.float64)] * 2
    memory = model.new_memory(1)
    for part in x.split(SIZE, dim=1):
        expected, past = by_hand(model, part[0], past)
        found = model.logits(model.hidden(part, memory=memory))[0]
        torch.testing.assert_close(found, expected, atol=1e-10, rtol=0)
        upstream = torch.randn(expected.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
        parameters = list(model.parameters())
        for a, b in zip(
            torch.autograd.grad(found, parameters, upstream),
            torch.autograd.grad(expected, parameters, upstream),
            strict=True,
        ):
            torch.testing.assert_close(a, b, atol=1e-9, rtol=0)


def test_recomputed_blocks_have_the_same_gradients() -> None:
    model = build("rope", attention=recurrent(12))
    x = tokens(2, 3 * SIZE)
    found = []
    for recompute in ("none", "selective", "block"):
        model.recompute = recompute
        model.zero_grad()
        in_segments(model, x)[:, -SIZE:].square().sum().backward()
        found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for gradients in zip(*found, strict=True):
        assert all(torch.equal(gradient, gradients[0]) for gradient in gradients)


@pytest.mark.parametrize("position", ["sinusoidal", "learned", "fire"])
def test_refuses_positions_that_are_not_relative(position: str) -> None:
    with pytest.raises(
        IncompatibleError, match=f"recurrent attention reads {position} positions of an earlier segment"
    ):
        build(position, attention=recurrent(6))


def test_refuses_a_memory_of_broken_segments_and_rows_of_broken_ones() -> None:
    with pytest.raises(ValueError, match=r"memory \(20\) must be a multiple of the segment's size \(6\).*value is 18"):
        recurrent(20)
    with pytest.raises(IncompatibleError, match=r"attention\.size: rows of 64 tokens .* segments of 6; .* value is 4$"):
        Recurrent.check_training(recurrent(6), contexts=(12, 64), packed=False)
    with pytest.raises(IncompatibleError, match=r"data\.packed: recurrent"):
        Recurrent.check_training(recurrent(6), contexts=(12,), packed=True)
