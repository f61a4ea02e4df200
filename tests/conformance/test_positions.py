"""What every positional scheme owes, over every registered name: a new file is held to it by being there."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import yaml
from torch import Tensor

from ctxlab.errors import IncompatibleError, UndefinedBeyondTraining
from ctxlab.model.attention.bias import LOG2_E, Bias, Span, Tile
from ctxlab.model.attention.blockwise import blockwise_attention
from ctxlab.model.attention.full import Full
from ctxlab.model.cache import KVCache
from ctxlab.model.position.base import POSITIONS, Form, Position
from ctxlab.model.position.transformer_xl import DistanceProduct
from tests.conformance import reference
from tests.model.builders import VOCAB, build, small, tokens

NAMES = POSITIONS.names()
CONF = Path(__file__).parents[2] / "conf" / "position"
every = pytest.mark.parametrize("name", NAMES)
# Settings that are another formula than the default's.
VARIANTS: dict[str, tuple[dict[str, Any], ...]] = {
    "rope": ({"layout": "half", "theta": 500.0},),
    "partial_rope": ({"fraction": 0.5, "layout": "half"},),
    "p_rope": ({"p": 0.5, "layout": "half"},),
    "xpos": ({"layout": "half"},),
    "kerple": ({"kind": "power"},),
    "sandwich": ({"width": 24},),
    "rope_nope": ({"every": 2, "query_scale": 0.1, "scale_span": 16},),
    "cope_ctx": ({"rows": 4},),
    "fire": ({"hidden": 5, "span": 30.0},),
}
variants = pytest.mark.parametrize(
    ("name", "settings"), [(n, {}) for n in NAMES] + [(n, s) for n, every in VARIANTS.items() for s in every]
)
# Relative error of an output in bf16, absolute error of a log-sum-exp: those of the rounding of the output and its inputs.
BF16_ERROR = (0.004, 0.02)
# The sums q + u and q + v and the table of distances are bf16 numbers themselves, and here make scores of up to 20.
BF16_ERRORS = {"transformer_xl": (0.012, 0.05)}


def scheme(name: str, *, head_dim: int = 8, n_heads: int = 4, context: int = 64) -> Position:
    config = small(n_heads=n_heads, n_kv_heads=n_heads, head_dim=head_dim)
    torch.manual_seed(0)
    made = POSITIONS.get(name)(POSITIONS.get(name).Config(name=name), config, context)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter)
    return made


@torch.no_grad()
def biased(bias: Bias, score: Tensor, T: int, S: int) -> Tensor:
    """Scores of the last T of S positions with some of the last keys, (b,h,T,n), and their bias."""
    dtype = torch.promote_types(bias.tensors[0].dtype, torch.float32)
    span = Span(T, S, True, T, dtype, torch.device("cpu"), False)
    opened = bias.open(bias.tensors, span)
    tile = Tile(slice(None), slice(None), range(S - 1, S - T - 1, -1), slice(0, S))
    if opened.reads_scores:
        i, j = torch.arange(S - T, S), torch.arange(S - score.shape[-1], S)
        block = (score * LOG2_E).masked_fill(i[:, None] < j[None, :], -torch.inf).flip(-2)
        opened.begin(tile)
        opened.add(tile, block)
        return block.flip(-2) / LOG2_E
    block = opened.block(tile).flip(-2) / LOG2_E
    return score + block[..., -score.shape[-1] :] + (0.0 if opened.constant is None else opened.constant[:, None, None])


@torch.no_grad()
def scores(made: Position, x: Tensor, q: Tensor, k: Tensor, i: Tensor, j: Tensor) -> Tensor:
    """Causal scores by the scheme's hooks, (B,H,T,S); x is what queries and keys come from."""
    S = len(j) if made.relative else int(j[-1]) + 1
    state, _ = made.prepare(x if made.relative else x.new_zeros(1, S, x.shape[2]), 0, None)
    queries, keys = made.tables(i, q.dtype), made.tables(j, q.dtype)
    score = made.query(q, queries, state) @ made.key(k, keys, state).mT * made.scale
    bias = made.bias(q, S, state)
    if bias is not None:
        score = biased(bias, score, len(i), S)
    return score.masked_fill(i[:, None] < j[None, :], -torch.inf)


def weights(made: Position, x: Tensor, q: Tensor, k: Tensor, i: Tensor, j: Tensor) -> Tensor:
    """Dense causal attention weights, (B,H,T,S)."""
    return scores(made, x, q, k, i, j).softmax(-1)


@torch.no_grad()
def errors_in_bf16(made: Position, T: int, rows: list[int]) -> tuple[float, float]:
    """Attention of T tokens in bf16, hooks and kernel together: relative error of the output in these rows, largest of the lse.

    The reference is naive and in float64, on the same queries, keys and values.
    """
    mechanism = Full(Full.Config(), made.model, 0)
    torch.manual_seed(1)
    x = torch.randn(1, T, 32)
    q, k, v = (torch.randn(1, made.model.n_heads, T, made.model.head_dim).bfloat16() for _ in range(3))
    positions, at = torch.arange(T), torch.tensor(rows)
    tables = made.tables(positions, torch.bfloat16)
    state, _ = made.prepare(x, 0, None)
    out, lse = mechanism.attend(
        made.query(q, tables, state),
        made.key(k, tables, state),
        v,
        scale=made.scale,
        causal=True,
        bias=made.bias(q, T, state),
    )
    place = reference.Place(made, 0, x.double())
    score = reference.SCORES[made.config.name](place, q[:, :, at].double(), k.double(), at, positions)
    score = score.masked_fill(at[:, None] < positions[None, :], -torch.inf)
    exact = score.softmax(-1) @ v.double()
    error = (out[:, :, at].double() - exact).norm() / exact.norm()
    return float(error), float((lse[:, :, at] - score.logsumexp(-1)).abs().max())


@every
def test_has_facts_a_reference_and_a_file(name: str) -> None:
    made = POSITIONS.get(name)
    assert made.form in get_args(Form)
    assert "arXiv:" in made.paper
    assert name in reference.SCORES, f"write {name}'s score out in tests/conformance/reference.py"
    assert (made.form == "embedding") == (name in reference.EMBEDDINGS)
    lines = (CONF / f"{name}.yaml").read_text()
    assert lines.startswith("# ")
    assert made.Config(**yaml.safe_load(lines)) == made.Config(name=name)


def test_every_file_has_a_scheme() -> None:
    assert sorted(path.stem for path in CONF.glob("*.yaml")) == NAMES


@variants
def test_logits_and_gradients_equal_the_dense_reference(
    name: str, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forward and every parameter's gradient in float64, across block borders of the blockwise function."""
    monkeypatch.setitem(blockwise_attention.__kwdefaults__, "blocks", (40, 56))
    model = build(POSITIONS.get(name).Config(name=name, **settings), context=160).double()
    x = tokens(2, 160)
    ours = model(x)
    theirs = reference.logits(model, x)
    torch.testing.assert_close(ours, theirs, atol=1e-9, rtol=1e-9)
    parameters = list(model.parameters())
    upstream = torch.randn_like(ours)
    for a, b in zip(torch.autograd.grad(ours, parameters, upstream), torch.autograd.grad(theirs, parameters, upstream)):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-8)


@every
def test_a_common_shift_of_positions(name: str) -> None:
    """Changes nothing in a relative scheme; does change an absolute one."""
    made = scheme(name, context=8000)
    torch.manual_seed(1)
    x, q, k = (torch.randn(*shape, dtype=torch.float64) for shape in ((1, 12, 32), (1, 4, 12, 8), (1, 4, 12, 8)))
    made = made.double()
    here, there = torch.arange(12), torch.arange(12) + 7919
    if made.relative:
        assert torch.equal(made.embed(x, here), x)
        torch.testing.assert_close(
            weights(made, x, q, k, here, here), weights(made, x, q, k, there, there), atol=1e-9, rtol=0
        )
    elif made.form == "embedding":
        assert (made.embed(x, here) - made.embed(x, there)).abs().max() > 0.1
    else:  # what the last of many positions see of one another, against the first of all
        near, far = (
            biased(made.bias(q, n, made.prepare(torch.zeros(1, n, 32), 0, None)[0]), torch.zeros(1, 4, 12, 12), 12, n)
            for n in (12, 12 + 7919)
        )
        assert (near - far).tril().abs().max() > 0.1


@every
@pytest.mark.parametrize("chunks", [[1] * 64, [63, 1], [1, 63], [17, 1, 1, 30, 15]])
def test_cached_chunks_equal_one_forward(name: str, chunks: list[int]) -> None:
    model = build(name).double()
    x = tokens(2, 64)
    cache = KVCache(model.config.n_layers)
    with torch.no_grad():
        expected = model(x)
        found = torch.cat([model(part, cache=cache) for part in x.split(chunks, dim=1)], dim=1)
    torch.testing.assert_close(found, expected, atol=1e-9, rtol=0)
    assert cache.length == 64


@every
@pytest.mark.parametrize("at", [0, 1, 31, 62])
def test_no_token_sees_the_future(name: str, at: int) -> None:
    """Changing token `at` changes nothing before it, to the last bit, and something at it."""
    model = build(name)
    x = tokens(1, 63)
    other = x.clone()
    other[0, at] = (other[0, at] + 1) % VOCAB
    with torch.no_grad():
        before, after = model(x)[0], model(other)[0]
    assert torch.equal(before[:at], after[:at])
    assert not torch.equal(before[at], after[at])


@every
def test_packed_equals_each_document_alone(name: str) -> None:
    model = build(name).double()
    x = tokens(2, 64)
    segments = ((20, 1, 43), (33, 25))
    with torch.no_grad():
        packed = model(x, segments=segments)
        for row, sizes in enumerate(segments):
            start = 0
            for size in sizes:
                alone = model(x[row : row + 1, start : start + size])
                torch.testing.assert_close(packed[row, start : start + size], alone[0], atol=1e-12, rtol=0)
                start += size


@every
def test_packed_documents_do_not_touch(name: str) -> None:
    """Every token of document A changed: exactly zero change in B and C."""
    model = build(name)
    x = tokens(1, 64)
    other = x.clone()
    other[0, :20] = (other[0, :20] + 1) % VOCAB
    segments = ((20, 10, 34),)
    with torch.no_grad():
        one, two = model(x, segments=segments), model(other, segments=segments)
    assert torch.equal(one[:, 20:], two[:, 20:])
    assert (one[:, :20] != two[:, :20]).any(-1).all()


@every
def test_beyond_the_trained_context(name: str) -> None:
    """Defined: the first tokens' logits do not depend on how many follow. Undefined: says so."""
    model = build(name, context=16)
    x = tokens(1, 40)
    if model.position.defined_beyond_training:
        with torch.no_grad():
            torch.testing.assert_close(model(x)[:, :16], model(x[:, :16]), atol=1e-5, rtol=0)
    else:
        with pytest.raises(UndefinedBeyondTraining, match=f"position 39: {name} positions are defined up to 15 only"):
            model(x)


def beyond_training(name: str) -> bool:
    return POSITIONS.get(name).defined_beyond_training


@pytest.mark.parametrize(
    ("name", "positions"),
    [
        pytest.param(name, positions, marks=pytest.mark.slow if (name, positions) == ("fire", 1_000_000) else ())
        for name in NAMES
        for positions in (131_072, 1_000_000)
        if beyond_training(name)
    ],
)
def test_positions_beyond_100k_in_fp32(name: str, positions: int) -> None:
    """Attention weights of the last 16 of so many positions, in fp32, against the naive float64 reference there.

    A scheme with fewer positions is looked at where they end.
    """
    made = scheme(name, head_dim=64)
    end = min(positions, made.n_positions or positions)
    torch.manual_seed(1)
    x, q, k = torch.randn(1, 16, 32), torch.randn(1, 4, 16, 64), torch.randn(1, 4, 16, 64)
    far = torch.arange(end - 16, end)
    at = reference.Place(made, 0, x.double())
    score = reference.SCORES[name](at, q.double(), k.double(), far, far)
    exact = score.masked_fill(far[:, None] < far[None, :], -torch.inf).softmax(-1)
    found = weights(made, x, q, k, far, far)
    assert (found - exact).abs().max() < 1e-5
    if name in reference.EMBEDDINGS:
        expected = reference.EMBEDDINGS[name](made, x.double(), far)
        assert (made.embed(x, far) - expected).abs().max() < 1e-5


@every
def test_bf16_at_4096_against_float64(name: str) -> None:
    """Within the rounding of a bf16 output (2^-9 = 0.002) and of its inputs."""
    rows = [0, 1, 2, 127, 128, 129, 511, 512, 2047, 2048, 4000, 4094, 4095]
    error, lse_error = errors_in_bf16(scheme(name, head_dim=64, context=4096), 4096, rows)
    largest, largest_lse = BF16_ERRORS.get(name, BF16_ERROR)
    assert error < largest
    assert lse_error < largest_lse


def test_transformer_xl_rounds_no_score_to_bf16() -> None:
    """Products of bf16 queries with bf16 distances are summed and kept in fp32, as those with keys are."""
    made = scheme("transformer_xl", head_dim=64)
    torch.manual_seed(1)
    bias = made.bias(torch.randn(1, 4, 200, 64).bfloat16(), 200, 0)
    assert isinstance(bias, DistanceProduct)
    positions = torch.arange(200)
    distances = (positions[:, None] - positions[None, :]).clamp(min=0)
    exact = torch.einsum("bhid,hijd->bhij", bias.q.double(), bias.r.double()[:, distances])
    found = biased(bias, torch.zeros(1, 4, 200, 200), 200, 200)
    assert exact.abs().max() > 16
    assert (found - exact).tril().nan_to_num().abs().max() < 1e-4


@every
def test_kept_memory_is_linear_in_the_context(name: str) -> None:
    """Twice the tokens, twice the bytes kept for the backward pass: no T x S tensor among them."""

    def kept(length: int) -> int:
        model = build(name, context=2048).train()
        ours = {p.untyped_storage().data_ptr() for p in model.parameters()}
        storages: dict[int, Tensor] = {}

        def keep(tensor: Tensor) -> Tensor:
            if tensor.untyped_storage().data_ptr() not in ours:
                storages[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model.hidden(tokens(1, length))
        return sum(tensor.untyped_storage().nbytes() for tensor in storages.values())

    assert kept(2048) / kept(1024) == pytest.approx(2.0, abs=0.01)


@every
def test_without_a_causal_mask(name: str) -> None:
    """A scheme that tells no order by itself refuses an encoder, but for none at all: who asks for none gets none."""
    kind = POSITIONS.get(name)
    config = kind.Config(name=name)
    if kind.bidirectional or name == "nope":
        kind(config, small(), 64, causal=False)
    else:
        with pytest.raises(IncompatibleError, match=f"position.name: {name} tells no order without a causal mask"):
            kind(config, small(), 64, causal=False)
