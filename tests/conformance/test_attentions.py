"""What every attention mechanism owes, over every registered name: dense attention under the mask that it states."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import yaml
from torch import Tensor

from ctxlab.model.attention.base import ATTENTIONS, Attention
from ctxlab.model.attention.bias import Toeplitz
from tests.model.builders import VOCAB, build, small, tokens

NAMES = ATTENTIONS.names()
CONF = Path(__file__).parents[2] / "conf" / "attention"
every = pytest.mark.parametrize("name", NAMES)


def mechanism(name: str) -> Attention:
    return ATTENTIONS.get(name)(ATTENTIONS.get(name).Config(name=name), small(), 0)


def dense(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, bias: Tensor | float) -> tuple[Tensor, Tensor]:
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    score = (q @ k.mT / math.sqrt(q.shape[-1]) + bias).masked_fill(~mask, -torch.inf)
    return score.softmax(-1) @ v, score.logsumexp(-1)


@every
def test_has_a_paper_and_a_file(name: str) -> None:
    kind = ATTENTIONS.get(name)
    assert "arXiv:" in kind.paper
    text = (CONF / f"{name}.yaml").read_text()
    assert text.startswith("# ")
    assert kind.Config(**yaml.safe_load(text)) == kind.Config(name=name)


def test_every_file_has_a_mechanism() -> None:
    assert sorted(path.stem for path in CONF.glob("*.yaml")) == NAMES


@every
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("T", "S"), [(40, 40), (1, 40), (7, 40)])
def test_equals_dense_attention_under_its_mask(name: str, T: int, S: int, causal: bool, with_bias: bool) -> None:
    """Values, log-sum-exps and gradients, in float64, two key-value heads for four queries."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, h, n, 8, dtype=torch.float64, requires_grad=True) for h, n in ((4, T), (2, S), (2, S)))
    values = torch.randn(4, 2 * S - 1, dtype=torch.float64, requires_grad=True)
    i, j = torch.arange(S - T, S), torch.arange(S)
    matrix = values[:, i[:, None] - j[None, :] + S - 1] if with_bias else 0.0
    inputs = (q, k, v, values) if with_bias else (q, k, v)
    made = mechanism(name)
    out, lse = made.attend(
        q, k, v, scale=8**-0.5, causal=causal, bias=Toeplitz(values, 1 - S) if with_bias else None
    )  # fmt: skip
    expected, expected_lse = dense(q, k, v, made.visible(T, S, causal=causal), matrix)
    torch.testing.assert_close(out, expected, atol=1e-10, rtol=0)
    torch.testing.assert_close(lse.double(), expected_lse, atol=1e-6, rtol=0)
    upstream = torch.randn_like(out)
    for a, b in zip(torch.autograd.grad(out, inputs, upstream), torch.autograd.grad(expected, inputs, upstream)):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=0)


@every
def test_padded_keys_are_not_seen_without_a_causal_mask(name: str) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 4, 20, 8, dtype=torch.float64) for _ in range(3))
    lengths = torch.tensor([13, 20])
    made = mechanism(name)
    out, _ = made.attend(q, k, v, scale=8**-0.5, causal=False, lengths=lengths)
    mask = made.visible(20, 20, causal=False) & (torch.arange(20) < lengths[:, None])[:, None, None, :]
    torch.testing.assert_close(out, dense(q, k, v, mask, 0.0)[0], atol=1e-10, rtol=0)


@every
def test_flops_and_cache_follow_who_sees_whom(name: str) -> None:
    """Four operations a visible pair and column, where a causal mechanism's hidden half counts as seen (PaLM's convention)."""
    kind, model = ATTENTIONS.get(name), small()
    config = kind.Config(name=name)
    pairs = kind(config, model, 0).visible(96, 96, causal=False).sum().item() / 96
    assert kind.flops(config, model, 96) == 4 * model.n_heads * model.head_dim * pairs
    assert kind.cached_tokens(config, 96) == kind(config, model, 0).visible(1, 96, causal=True).sum().item()


@every
def test_no_token_sees_the_future(name: str) -> None:
    model = build("rope", attention=name)
    x = tokens(1, 40)
    other = x.clone()
    other[0, 25] = (other[0, 25] + 1) % VOCAB
    with torch.no_grad():
        before, after = model(x)[0], model(other)[0]
    assert torch.equal(before[:25], after[:25])
    assert not torch.equal(before[25], after[25])
