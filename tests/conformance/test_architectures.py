"""What an encoder and an encoder-decoder owe, with every scheme that an encoder may have: a dense reference, padding that
nobody sees, a decoder half that does not look ahead, and a cache that changes nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ctxlab.errors import IncompatibleError
from ctxlab.model.attention import fused
from ctxlab.model.attention.base import ATTENTIONS
from ctxlab.model.attention.blockwise import blockwise_attention
from ctxlab.model.attention.fused import fused_attention
from ctxlab.model.attention.recurrent import Recurrent
from ctxlab.model.attention.sliding_window import SlidingWindow
from ctxlab.model.beam import beam_search
from ctxlab.model.blocks import CrossAttention
from ctxlab.model.generation import DecodingConfig, decode
from ctxlab.model.position.base import POSITIONS
from tests.conformance import reference
from tests.conformance.test_bidirectional import BOTH_WAYS
from tests.conformance.test_positions import NAMES, VARIANTS
from tests.model.builders import VOCAB, build, tokens

SCHEMES = [*BOTH_WAYS, "nope"]
every = pytest.mark.parametrize("name", SCHEMES)
variants = pytest.mark.parametrize(
    ("name", "settings"), [(n, {}) for n in SCHEMES] + [(n, s) for n in SCHEMES for s in VARIANTS.get(n, ())]
)
# A scheme that goes with each mechanism, and what makes it hide something in a row of 20.
MECHANISMS: dict[str, tuple[str, dict[str, Any]]] = {
    "full": ("rope", {}),
    "linear": ("sinusoidal", {}),
    "sliding_window": ("t5", {"size": 4}),
    "chunked": ("rope", {"size": 6}),
    "recurrent": ("rope", {"size": 6, "memory": 0}),
}
LENGTHS = torch.tensor([20, 1, 13, 7])


def encoder_decoder(position: Any = "rope", **settings: Any) -> Any:
    return build(position, **{"architecture": "encoder_decoder", "n_encoder_layers": 3} | settings)


def changed(x: Tensor, seen: Tensor) -> Tensor:
    return torch.where(seen, x, (x + 1) % VOCAB)


def assert_same_gradients(model: Any, ours: Tensor, theirs: Tensor) -> None:
    parameters = list(model.parameters())
    upstream = torch.randn(ours.shape, dtype=ours.dtype, generator=torch.Generator().manual_seed(0))
    pairs = zip(torch.autograd.grad(ours, parameters, upstream), torch.autograd.grad(theirs, parameters, upstream))
    for a, b in pairs:
        torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-8)


def test_every_mechanism_is_here() -> None:
    assert sorted(MECHANISMS) == ATTENTIONS.names()


@variants
def test_an_encoder_equals_the_dense_reference(
    name: str, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits of what is no padding and every parameter's gradient in float64, across block borders."""
    monkeypatch.setitem(blockwise_attention.__kwdefaults__, "blocks", (40, 56))
    config = POSITIONS.get(name).Config(name=name, **settings)
    model = build(config, context=130, architecture="encoder").double()
    x, lengths = tokens(3, 130), torch.tensor([130, 41, 77])
    seen = torch.arange(130) < lengths[:, None]
    ours = model(x, lengths=lengths)[seen]
    theirs = reference.logits(model, x, lengths=lengths)[seen]
    torch.testing.assert_close(ours, theirs, atol=1e-9, rtol=1e-9)
    assert_same_gradients(model, ours, theirs)


@variants
def test_an_encoder_decoder_equals_the_dense_reference(
    name: str, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same; the source is longer than the target in one case and shorter in the other."""
    monkeypatch.setitem(blockwise_attention.__kwdefaults__, "blocks", (40, 56))
    model = encoder_decoder(POSITIONS.get(name).Config(name=name, **settings), context=90).double()
    for S, T in ((90, 31), (23, 70)):
        source, x, lengths = tokens(3, S), tokens(3, T, seed=2), torch.tensor([S, 1, 17])
        ours = model(x, source=source, source_lengths=lengths)
        theirs = reference.logits(model, x, source=source, source_lengths=lengths)
        torch.testing.assert_close(ours, theirs, atol=1e-9, rtol=1e-9)
    assert_same_gradients(model, ours, theirs)


@pytest.mark.parametrize("mechanism", MECHANISMS)
@pytest.mark.parametrize("place", ["pre", "post"])
def test_padding_is_seen_by_nobody(mechanism: str, place: str) -> None:
    """A padded batch is its rows alone, and what stands in the padding changes nothing."""
    position, settings = MECHANISMS[mechanism]
    attention = ATTENTIONS.get(mechanism).Config(name=mechanism, **settings)
    model = build(position, attention=attention, architecture="encoder", norm_place=place)
    x = tokens(4, 20)
    seen = torch.arange(20) < LENGTHS[:, None]
    with torch.no_grad():
        together = model(x, lengths=LENGTHS)
        assert torch.equal(together[seen], model(changed(x, seen), lengths=LENGTHS)[seen])
        for row, n in enumerate(LENGTHS.tolist()):
            torch.testing.assert_close(together[row, :n], model(x[row : row + 1, :n])[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_packed_documents_are_alone(mechanism: str) -> None:
    position, settings = MECHANISMS[mechanism]
    attention = ATTENTIONS.get(mechanism).Config(name=mechanism, **settings)
    model = build(position, attention=attention, architecture="encoder").double()
    x = tokens(1, 24)
    packed = model(x, segments=((9, 13),))[:, :22]
    alone = torch.cat([model(x[:, :9]), model(x[:, 9:22])], dim=1)
    torch.testing.assert_close(packed, alone, atol=1e-10, rtol=0)
    assert_same_gradients(model, packed, alone)


def test_a_window_looks_both_ways() -> None:
    """With one layer and a window of 4, the tokens within 3 on either side matter, and no other."""
    model = build("rope", attention=SlidingWindow.Config(size=4), architecture="encoder", n_layers=1)
    x = tokens(1, 20)
    other = x.clone()
    other[0, 10] = (other[0, 10] + 1) % VOCAB
    with torch.no_grad():
        moved = (model(x) - model(other))[0].abs().amax(-1) > 0
    assert moved.nonzero()[:, 0].tolist() == list(range(7, 14))


@every
def test_only_positions_tell_an_encoder_order(name: str) -> None:
    """Without them its output is permuted as its input is; with them it is another."""
    model = build(name, architecture="encoder").double()
    x = tokens(1, 20)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        gap = (model(x[:, order]) - model(x)[:, order]).abs().max()
    assert gap < 1e-10 if name == "nope" else gap > 1e-2


@every
def test_the_decoder_half_does_not_look_ahead_and_sees_all_of_the_source(name: str) -> None:
    model = encoder_decoder(name)
    source, x = tokens(1, 12), tokens(1, 15, seed=2)
    later = x.clone()
    later[0, 8] = (later[0, 8] + 1) % VOCAB
    with torch.no_grad():
        here = model(x, source=source)
        there = model(later, source=source)
        assert torch.equal(here[:, :8], there[:, :8])
        assert (here[:, 8:] - there[:, 8:]).abs().amax(-1).min() > 1e-4
        for place in range(12):
            other = source.clone()
            other[0, place] = (other[0, place] + 1) % VOCAB
            assert (here - model(x, source=other)).abs().amax(-1).min() > 1e-6


@pytest.mark.parametrize(
    ("name", "mechanism"), [*((name, "full") for name in SCHEMES), *((p, m) for m, (p, _) in MECHANISMS.items())]
)
def test_cached_equals_uncached(name: str, mechanism: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In any chunks, with rows taken twice, left out and in another order; the source's keys and values are made once."""
    attention = ATTENTIONS.get(mechanism).Config(name=mechanism, **MECHANISMS[mechanism][1])
    model = encoder_decoder(name, attention=attention).double()
    project, calls = CrossAttention.project, []
    monkeypatch.setattr(CrossAttention, "project", lambda self, encoded: calls.append(1) or project(self, encoded))
    source, x, rows = tokens(4, 20), tokens(4, 25, seed=2), torch.tensor([2, 0, 2, 3, 3])
    with torch.no_grad():
        encoded, cache = model.encode(source, LENGTHS), model.new_cache()
        first = torch.cat([model(part, encoded=encoded, cache=cache) for part in (x[:, :5], x[:, 5:6], x[:, 6:13])], 1)
        cache.keep(rows)
        kept = encoded.keep(rows)
        rest = torch.cat([model(part, encoded=kept, cache=cache) for part in x[rows, 13:].split(1, dim=1)], dim=1)
        assert len(calls) == model.config.n_layers
        whole = model(x, source=source, source_lengths=LENGTHS)
    torch.testing.assert_close(first, whole[:, :13], atol=1e-9, rtol=0)
    torch.testing.assert_close(rest, whole[rows, 13:], atol=1e-9, rtol=0)
    assert cache.length == 25


@every
def test_sources_decoded_side_by_side_are_decoded_one_by_one(name: str) -> None:
    """Greedy and with a beam, sources of several lengths, some of which end early."""
    model = encoder_decoder(name).double()
    source, start = tokens(4, 20), [[5]] * 4
    beam = DecodingConfig(max_new_tokens=8, num_beams=3)
    greedy = DecodingConfig(max_new_tokens=8, temperature=0)
    with torch.no_grad():
        together = model.encode(source, LENGTHS)
        alone = [model.encode(source[r : r + 1, :n]) for r, n in enumerate(LENGTHS.tolist())]
    free = decode(model, start, greedy, encoded=together)
    stop = free[0][2]
    written = decode(model, start, greedy, stop_ids=[stop], encoded=together)
    assert written == [decode(model, start[:1], greedy, stop_ids=[stop], encoded=one)[0] for one in alone]
    assert len({tuple(row) for row in free}) > 1
    searched = beam_search(model, start, beam, stop_ids=[stop], encoded=together)
    for found, one in zip(searched, alone, strict=True):
        expected = beam_search(model, start[:1], beam, stop_ids=[stop], encoded=one)[0]
        assert [h.tokens for h in found] == [h.tokens for h in expected]
        assert [h.score for h in found] == pytest.approx([h.score for h in expected], abs=1e-9)


@pytest.mark.parametrize("place", ["pre", "post"])
@pytest.mark.parametrize("architecture", ["encoder", "encoder_decoder"])
def test_recomputed_gradients_are_equal(architecture: str, place: str) -> None:
    model: Any = build("t5", architecture=architecture, dropout=0.1, norm_place=place).train()
    x = tokens(4, 20)
    inputs = (
        {"source": tokens(4, 20, seed=2), "source_lengths": LENGTHS} if model.reads_source else {"lengths": LENGTHS}
    )
    found = []
    for recompute in ("none", "selective", "block"):
        model.recompute = recompute
        torch.manual_seed(3)
        model.zero_grad()
        model.nats(model.hidden(x, **inputs), x).sum().backward()
        found.append([p.grad.clone() for p in model.parameters()])
    for kept, *again in zip(*found, strict=True):
        assert all(torch.equal(gradient, kept) for gradient in again)


@pytest.mark.parametrize("place", ["pre", "post"])
def test_bf16_is_near_fp32(place: str) -> None:
    model = encoder_decoder("rope", norm_place=place)
    inputs = {"source": tokens(4, 20), "source_lengths": LENGTHS}
    with torch.no_grad():
        exact = model.hidden(tokens(4, 9), **inputs)
        with torch.autocast("cpu", torch.bfloat16):
            rounded = model.hidden(tokens(4, 9), **inputs)
    assert rounded.dtype == torch.bfloat16
    assert (
        rounded - exact
    ).norm() / exact.norm() < 0.05  # of 13 parts one behind the other, each some roundings of 2^-9


@pytest.mark.parametrize("name", [name for name in NAMES if name not in SCHEMES])
@pytest.mark.parametrize("architecture", ["encoder", "encoder_decoder"])
def test_schemes_that_need_a_causal_mask_are_refused(name: str, architecture: str) -> None:
    with pytest.raises(IncompatibleError, match=rf"^position.name: {name} tells no order without a causal mask$"):
        build(name, architecture=architecture)


def test_a_memory_is_refused() -> None:
    with pytest.raises(IncompatibleError, match=r"^attention.name: recurrent attention carries a memory"):
        build("rope", attention=Recurrent.Config(size=6, memory=6), architecture="encoder")


def test_what_does_not_go_together_is_said() -> None:
    model, encoder, x = encoder_decoder(), build(architecture="encoder"), tokens(1, 5)
    for inputs in ({}, {"source": x, "encoded": model.encode(x)}):
        with pytest.raises(ValueError, match="expected a source, or what it was encoded to"):
            model(x, **inputs)
    with pytest.raises(ValueError, match="neither a packed batch nor a memory"):
        model(x, source=x, segments=((5,),))
    with pytest.raises(IncompatibleError, match="an encoder writes no text"):
        encoder.new_cache()


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(("T", "S"), [(40, 40), (7, 40), (50, 30)])
def test_fused_attention_hides_padding(T: int, S: int, groups: int) -> None:
    """As the blockwise function does: output, log-sum-exp and gradients, of the latter too."""
    torch.manual_seed(0)
    lengths = torch.tensor([S, 1, 13])
    found = []
    made = [
        torch.randn(3, h, n, 8, dtype=torch.float64, requires_grad=True)
        for h, n in ((4, T), (4 // groups, S), (4 // groups, S))
    ]
    q, k, v = made
    kwargs: dict[str, Any] = {"scale": 0.3, "causal": False, "lengths": lengths}
    upstream = torch.randn(3, 4, T, 8, dtype=torch.float64), torch.randn(3, 4, T, dtype=torch.float64)
    for out, lse in (
        blockwise_attention(q, k, v, **kwargs),
        blockwise_attention(q, k, v, **kwargs, blocks=(16, 8)),
        fused_attention(q, k, v, **kwargs, lse_gradient=True),
    ):
        found.append([out, lse, *torch.autograd.grad((out, lse), made, upstream)])
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            torch.testing.assert_close(a, b, atol=1e-10, rtol=0)
    plain, with_lse = (fused_attention(q, k, v, **kwargs, lse_gradient=asked) for asked in (False, True))
    for a, b in zip(plain, with_lse, strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=0)
    gradients = [torch.autograd.grad(out, made, upstream[0]) for out, _ in (plain, with_lse)]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_kernels_without_a_mask_hide_padding_by_a_column(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The way of the CUDA kernels, through the CPU's."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(3, heads, 40, 8, dtype=dtype, requires_grad=True) for heads in (4, 2, 2))
    kwargs: dict[str, Any] = {"scale": 0.3, "causal": False, "lengths": torch.tensor([40, 1, 13])}
    upstream = torch.randn(3, 4, 40, 8, dtype=dtype)
    out, lse = fused_attention(q, k, v, **kwargs)
    monkeypatch.setattr(fused, "_kernel", lambda q, width: lambda *operands: fused._cpu(*operands))
    other, other_lse = fused_attention(q, k, v, **kwargs)
    near = {"atol": 1e-10, "rtol": 0} if dtype == torch.float64 else {"atol": 0.02, "rtol": 0.02}
    torch.testing.assert_close(other, out, **near)
    torch.testing.assert_close(other_lse, lse, **near)
    pairs = zip(
        torch.autograd.grad(other, (q, k, v), upstream), torch.autograd.grad(out, (q, k, v), upstream), strict=True
    )
    for a, b in pairs:
        torch.testing.assert_close(a, b, **near)
