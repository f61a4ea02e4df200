"""What every attention mechanism owes, over every registered name: dense attention under the mask that it states."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from ctxlab.errors import IncompatibleError
from ctxlab.model import count
from ctxlab.model.attention.base import ATTENTIONS, Attention
from ctxlab.model.attention.bias import Toeplitz
from ctxlab.model.cache import KVCache, StreamingCache
from tests.model.builders import VOCAB, build, small, tokens

NAMES = ATTENTIONS.names()
CONF = Path(__file__).parents[2] / "conf" / "attention"
every = pytest.mark.parametrize("name", NAMES)


# Settings small enough that a sequence of 40 goes beyond them; layer 1 of a pattern of 2 is global.
SMALL: dict[str, dict[str, Any]] = {
    "sliding_window": {"size": 11},
    "chunked": {"size": 11},
    "recurrent": {"size": 5, "memory": 10},
}
PATTERNED = ("sliding_window", "chunked")
SEEN = {"sliding_window": 11, "chunked": 11, "recurrent": 15}  # keys at most
CASES = [(name, {}) for name in NAMES] + list(SMALL.items()) + [("recurrent", {"size": 7, "memory": 0})]
CASES += [(name, SMALL[name] | {"global_every": 2}) for name in PATTERNED]
CASES += [(name, settings | {"sink": True}) for name, settings in [("full", {}), *SMALL.items()]]
cases = pytest.mark.parametrize(("name", "settings"), CASES)


def config_of(name: str, settings: dict[str, Any]) -> Attention.Config:
    return ATTENTIONS.get(name).Config(name=name, **settings)


def mechanism(name: str, settings: dict[str, Any], layer: int = 0) -> Attention:
    return ATTENTIONS.get(name)(config_of(name, settings), small(), layer)


def mask_by_hand(name: str, settings: dict[str, Any], T: int, S: int, causal: bool) -> Tensor:
    """Who sees whom in a layer that is not global, (T,S), pair by pair as the papers say it; query t stands at S - T + t."""
    config = config_of(name, settings)

    def sees(i: int, j: int) -> bool:
        if causal and j > i:
            return False
        if name == "sliding_window":
            return abs(i - j) <= config.size - 1  # itself is one of them
        if name == "chunked":
            return math.floor(i / config.size) == math.floor(j / config.size)
        if name == "recurrent":
            begin = math.floor(i / config.size) * config.size  # of the segment
            return begin - config.memory <= j < begin + config.size
        return True

    return torch.tensor([[sees(i, j) for j in range(S)] for i in range(S - T, S)])


def dense(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, bias: Tensor | float, sink: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """A sink is one more key, of the same score for all queries, whose value is 0."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    score = (q @ k.mT / math.sqrt(q.shape[-1]) + bias).masked_fill(~mask, -torch.inf)
    if sink is not None:
        score = torch.cat([score, sink[:, None, None].expand(*score.shape[:3], 1)], dim=-1)
        v = torch.cat([v, torch.zeros_like(v[:, :, :1])], dim=2)
    blind = ~mask.any(-1, keepdim=True)  # queries that see no key get 0
    return score.softmax(-1).masked_fill(blind & (score.shape[-1] == k.shape[2]), 0.0) @ v, score.logsumexp(-1)


def dense_kernel(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, bias: Tensor | float, sink: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Every pair weighed by phi(q) . phi(k), phi(x) = x + 1 above 0 and exp(x) below."""
    assert sink is None
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    phi_q, phi_k = (torch.where(x > 0, x + 1, x.clamp(max=0).exp()) for x in (q, k))
    weight = (phi_q @ phi_k.mT) * mask
    return weight @ v / weight.sum(-1, keepdim=True), weight.sum(-1).log()


@every
def test_has_a_paper_and_a_file(name: str) -> None:
    kind = ATTENTIONS.get(name)
    assert "arXiv:" in kind.paper
    text = (CONF / f"{name}.yaml").read_text()
    assert text.startswith("# ")
    assert kind.Config(**yaml.safe_load(text)) == kind.Config(name=name)


def test_every_file_has_a_mechanism() -> None:
    assert sorted(path.stem for path in CONF.glob("*.yaml")) == NAMES


@cases
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("T", "S"), [(40, 40), (1, 40), (7, 40), (12, 12)])
def test_equals_dense_attention_under_its_mask(
    name: str, settings: dict[str, Any], T: int, S: int, causal: bool, with_bias: bool
) -> None:
    """Values, log-sum-exps and gradients, in float64, two key-value heads for four queries."""
    if with_bias and not ATTENTIONS.get(name).softmax:
        pytest.skip("has no scores to add a bias to")
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, h, n, 8, dtype=torch.float64, requires_grad=True) for h, n in ((4, T), (2, S), (2, S)))
    values = torch.randn(4, 2 * S - 1, dtype=torch.float64, requires_grad=True)
    i, j = torch.arange(S - T, S), torch.arange(S)
    matrix = values[:, i[:, None] - j[None, :] + S - 1] if with_bias else 0.0
    inputs = (q, k, v, values) if with_bias else (q, k, v)
    made = mechanism(name, settings)
    if made.sink is not None:
        made.double().sink.data.copy_(torch.tensor([-1.0, 0.0, 1.0, 2.0]))
        inputs = (*inputs, made.sink)
    out, lse = made.attend(
        q, k, v, scale=8**-0.5, causal=causal, bias=Toeplitz(values, 1 - S) if with_bias else None
    )  # fmt: skip
    oracle = dense if made.softmax else dense_kernel
    expected, expected_lse = oracle(q, k, v, mask_by_hand(name, settings, T, S, causal), matrix, made.sink)
    torch.testing.assert_close(out, expected, atol=1e-10, rtol=0)
    torch.testing.assert_close(lse.double(), expected_lse, atol=1e-6, rtol=0)
    upstream = torch.randn_like(out)
    for a, b in zip(torch.autograd.grad(out, inputs, upstream), torch.autograd.grad(expected, inputs, upstream)):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=0)


@cases
def test_padded_keys_are_not_seen_without_a_causal_mask(name: str, settings: dict[str, Any]) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 4, 20, 8, dtype=torch.float64) for _ in range(3))
    lengths = torch.tensor([13, 20])
    made = mechanism(name, settings)
    out, _ = made.double().attend(q, k, v, scale=8**-0.5, causal=False, lengths=lengths)
    mask = mask_by_hand(name, settings, 20, 20, False) & (torch.arange(20) < lengths[:, None])[:, None, None, :]
    oracle = dense if made.softmax else dense_kernel
    torch.testing.assert_close(out, oracle(q, k, v, mask, 0.0, made.sink)[0], atol=1e-10, rtol=0)


@cases
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("T", "S"), [(40, 40), (7, 40)])
def test_states_its_mask(name: str, settings: dict[str, Any], T: int, S: int, causal: bool) -> None:
    assert torch.equal(
        mechanism(name, settings).visible(T, S, causal=causal), mask_by_hand(name, settings, T, S, causal)
    )


def test_a_training_step_of_a_recurrent_model_sees_its_memory_at_any_context() -> None:
    config = config_of("recurrent", {"size": 5, "memory": 10})
    flops = [ATTENTIONS.get("recurrent").flops(config, small(), context, 0) for context in (5, 40)]
    assert flops == [4 * 4 * 8 * 15] * 2


@cases
@pytest.mark.parametrize("layer", [0, 1])
def test_flops_and_cache_follow_who_sees_whom(name: str, settings: dict[str, Any], layer: int) -> None:
    """Four operations a column and key that the best-placed query sees: a causal mask's hidden half counts as seen."""
    kind, model, config = ATTENTIONS.get(name), small(), config_of(name, settings)
    made = kind(config, model, layer)
    if not kind.softmax:
        assert kind.flops(config, model, 96, layer) == kind.flops(config, model, 96_000, layer)  # whatever the context
        return
    seen = made.visible(96, 96, causal=True).sum(1)
    behind = kind.carried_tokens(config)  # a row of a training step stands behind a memory
    in_training = made.visible(96, 96 + behind, causal=True).sum(1)
    assert kind.flops(config, model, 96, layer) == 4 * model.n_heads * model.head_dim * int(in_training.max())
    assert [kind.cached_tokens(config, n, layer) for n in range(1, 97)] == seen.tolist()
    first = [int(row.nonzero()[0]) for row in made.visible(96, 96, causal=True)]
    assert [made.first_needed(position) for position in range(96)] == first


@cases
def test_a_local_layer_sees_no_more_than_it_says_and_the_pattern_is_by_layer(
    name: str, settings: dict[str, Any]
) -> None:
    for layer in range(4):
        is_global = (
            name not in SMALL or "size" not in settings or (settings.get("global_every") == 2 and layer % 2 == 1)
        )
        seen = mechanism(name, settings, layer).visible(40, 40, causal=True).sum(1)
        assert int(seen.max()) == (40 if is_global else 7 if settings.get("memory") == 0 else SEEN[name])


@pytest.mark.parametrize("name", PATTERNED)
@pytest.mark.parametrize(("n", "expected"), [(1, [0, 1, 2, 3, 4, 5, 6]), (3, [2, 5]), (4, [3])])
def test_every_nth_layer_is_global(name: str, n: int, expected: list[int]) -> None:
    """Counted from 1: only there does the last query see the first key."""
    settings = SMALL[name] | {"global_every": n}
    layers = [mechanism(name, settings, layer).visible(40, 40, causal=True) for layer in range(7)]
    assert [layer for layer, seen in enumerate(layers) if seen[39, 0]] == expected


@cases
@pytest.mark.parametrize("position", ["rope", "alibi", "t5", "fire", "fox", "cope_ctx", "transformer_xl"])
def test_cached_chunks_equal_one_forward_and_hold_no_more_than_they_need(
    name: str, settings: dict[str, Any], position: str
) -> None:
    if not ATTENTIONS.get(name).softmax:
        position = "nope"
    if name == "recurrent" and position == "fire":
        pytest.skip("no relative scheme: refused")
    model = build(position, attention=config_of(name, settings)).double()
    x = tokens(2, 64)
    with torch.no_grad():
        expected = model(x)
        for sizes in ([1] * 64, [17, 1, 1, 30, 15]):
            cache = KVCache(model.config.n_layers)
            found = torch.cat([model(part, cache=cache) for part in x.split(sizes, dim=1)], dim=1)
            torch.testing.assert_close(found, expected, atol=1e-9, rtol=0)
            if max(sizes) == 1:
                held = count.kv_cache_bytes(
                    model.config, model.position.config, config_of(name, settings), length=64, rows=2
                )  # fmt: skip
                assert cache.bytes == 2 * held  # float64 here, fp32 there


def test_what_linear_attention_caches_does_not_grow() -> None:
    model = build("nope", attention="linear")
    cache, sizes = KVCache(model.config.n_layers), []
    with torch.no_grad():
        for part in tokens(1, 200).split([1, 99, 100], dim=1):
            model(part, cache=cache)
            sizes.append(cache.bytes)
    assert sizes == [2 * 2 * 8 * 9 * 4] * 3  # layers, key-value heads, head_dim, head_dim + 1, fp32


def test_a_cache_of_sums_carries_no_gradient() -> None:
    model = build("nope", attention="linear")
    cache = KVCache(model.config.n_layers)
    for _ in range(2):  # with gradients on
        model(tokens(1, 3), cache=cache)
        assert not any(layer.sums.requires_grad for layer in cache.layers)


@every
def test_a_streaming_cache_is_taken_by_full_attention_alone(name: str) -> None:
    """A window, a chunk or a segment counts tokens that such a cache has dropped."""
    model = build("nope", attention=name)
    cache = StreamingCache(model.config.n_layers, sinks=1, window=4)
    if ATTENTIONS.get(name).streams:
        assert name == "full"
        model(tokens(1, 1), cache=cache)
        return
    with pytest.raises(
        IncompatibleError, match=rf"^decoding\.cache: .* which {name} attention cannot follow; use full"
    ):
        model(tokens(1, 1), cache=cache)


@cases
def test_no_token_sees_the_future(name: str, settings: dict[str, Any]) -> None:
    model = build("rope" if ATTENTIONS.get(name).softmax else "nope", attention=config_of(name, settings))
    x = tokens(1, 40)
    other = x.clone()
    other[0, 25] = (other[0, 25] + 1) % VOCAB
    with torch.no_grad():
        before, after = model(x)[0], model(other)[0]
    assert torch.equal(before[:25], after[:25])
    assert not torch.equal(before[25], after[25])


@pytest.mark.parametrize("position", ["rope", "alibi", "t5", "fox", "pope"])
def test_linear_attention_refuses_what_would_need_scores(position: str) -> None:
    with pytest.raises(IncompatibleError, match=f"linear attention has no scores that {position} could turn or add to"):
        build(position, attention="linear")


def test_linear_attention_is_exact_over_many_chunks_of_a_long_sequence() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 300, 8, dtype=torch.float64) for _ in range(3))
    made = mechanism("linear", {})
    out, lse = made.attend(q, k, v, scale=1.0, causal=True)
    expected, expected_lse = dense_kernel(q, k, v, made.visible(300, 300, causal=True), 0.0)
    torch.testing.assert_close(out, expected, atol=1e-12, rtol=0)
    torch.testing.assert_close(lse, expected_lse, atol=1e-12, rtol=0)
