"""Schemes that an encoder may have: their hooks and kernels without a causal mask, against every pair written out."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ctxlab.model.attention.blockwise import blockwise_attention
from ctxlab.model.attention.full import Full
from ctxlab.model.position.base import POSITIONS
from tests.conformance import reference
from tests.conformance.test_positions import NAMES, VARIANTS
from tests.model.builders import small

BOTH_WAYS = [name for name in NAMES if POSITIONS.get(name).bidirectional]
T = 90


def t5_bias(weight: Tensor) -> Tensor:
    """(H,T,T) from the table, by the buckets of `transformers`."""
    modeling_t5 = pytest.importorskip("transformers").models.t5.modeling_t5
    positions = torch.arange(T)
    bucket = modeling_t5.T5Attention._relative_position_bucket(
        positions[None, :] - positions[:, None], bidirectional=True
    )
    return weight[bucket].permute(2, 0, 1)


def test_are_these() -> None:
    assert BOTH_WAYS == ["learned", "p_rope", "partial_rope", "pope", "rope", "sinusoidal", "t5"]


@pytest.mark.parametrize(
    ("name", "settings"), [(n, {}) for n in BOTH_WAYS] + [(n, s) for n in BOTH_WAYS for s in VARIANTS.get(n, ())]
)
@pytest.mark.parametrize("padded", [False, True])
def test_equals_the_reference_over_all_pairs(
    name: str, settings: dict[str, object], padded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Output and the gradients of queries, keys and parameters, in float64; the second row's last keys may be padding."""
    monkeypatch.setitem(blockwise_attention.__kwdefaults__, "blocks", (40, 56))
    kind, model = POSITIONS.get(name), small(n_kv_heads=4)
    made = kind(kind.Config(name=name, **settings), model, T, causal=False).double()
    torch.manual_seed(0)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(2, T, 32, dtype=torch.float64)
    q, k, v = (torch.randn(2, 4, T, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    lengths = torch.tensor([T, T - 23]) if padded else None
    positions = torch.arange(T)

    tables, state = made.tables(positions, q.dtype), made.prepare(x, 0, None)[0]
    ours, _ = Full(Full.Config(), model, 0).attend(
        made.query(q, tables, state),
        made.key(k, tables, state),
        v,
        scale=made.scale,
        causal=False,
        bias=made.bias(q, T, state),
        lengths=lengths,
    )
    if name == "t5":
        score = q @ k.mT / math.sqrt(8) + t5_bias(made.weight)
    else:
        score = reference.SCORES[name](reference.Place(made, 0, x), q, k, positions, positions)
    if lengths is not None:
        score = score.masked_fill(positions >= lengths[:, None, None, None], -torch.inf)
    theirs = score.softmax(-1) @ v
    torch.testing.assert_close(ours, theirs, atol=1e-9, rtol=0)

    if name in reference.EMBEDDINGS:
        expected = reference.EMBEDDINGS[name](made, x, positions)
        torch.testing.assert_close(made.embed(x, positions), expected, atol=1e-9, rtol=0)
    inputs = [q, k, v, *(p for p in made.parameters() if name not in reference.EMBEDDINGS)]
    upstream = torch.randn_like(ours)
    for a, b in zip(torch.autograd.grad(ours, inputs, upstream), torch.autograd.grad(theirs, inputs, upstream)):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=0)


@pytest.mark.parametrize("name", BOTH_WAYS)
def test_tells_what_is_ahead_from_what_is_behind(name: str) -> None:
    """With the same content everywhere, a key one step ahead and one step behind do not score the same."""
    kind = POSITIONS.get(name)
    made = kind(kind.Config(name=name), small(n_kv_heads=4), T, causal=False).double()
    torch.manual_seed(0)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter)
    positions = torch.arange(T)
    if name in reference.EMBEDDINGS:
        embedded = made.embed(torch.zeros(1, T, 32, dtype=torch.float64), positions)[0]
        assert (embedded[39] - embedded[41]).abs().max() > 0.1
        return
    q, k = (torch.randn(1, 4, 1, 8, dtype=torch.float64).expand(1, 4, T, 8) for _ in range(2))
    if name == "t5":
        bias = made.distance_bias(torch.tensor([-1, 1]), None)
        ahead, behind = bias[:, 0], bias[:, 1]
    else:
        tables, state = made.tables(positions, q.dtype), made.prepare(torch.zeros(1, T, 32), 0, None)[0]
        score = made.query(q, tables, state)[0, :, 40:41] @ made.key(k, tables, state)[0].mT
        ahead, behind = score[:, 0, 41], score[:, 0, 39]
    assert (ahead - behind).abs().min() > 1e-3
