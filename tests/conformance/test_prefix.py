"""A prefix LM under every scheme and mechanism that it may have: every pair written out, and what a prompt owes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ctxlab.errors import IncompatibleError
from ctxlab.model.attention.base import ATTENTIONS
from ctxlab.model.beam import beam_search
from ctxlab.model.blocks import SelfAttention
from ctxlab.model.generation import DecodingConfig, decode, generate
from ctxlab.model.position.base import Position
from ctxlab.train.objectives.prefix import prefix_lengths
from tests.conformance import reference
from tests.conformance.test_attentions import dense, dense_kernel, mask_by_hand
from tests.conformance.test_bidirectional import BOTH_WAYS
from tests.model.builders import build, tokens

T = 40
LENGTHS = torch.tensor([1, 17, T])
MECHANISMS: list[tuple[str, dict[str, Any]]] = [
    ("full", {}),
    ("full", {"sink": True}),
    ("sliding_window", {"size": 11, "global_every": 2}),
    ("chunked", {"size": 11}),
]
CASES = [(name, *mechanism) for name in BOTH_WAYS for mechanism in MECHANISMS]
CASES += [(name, "linear", {}) for name in ("sinusoidal", "learned")]
cases = pytest.mark.parametrize(("position", "attention", "settings"), CASES)


def prefix_lm(position: str, attention: str, settings: dict[str, Any]) -> Any:
    config = ATTENTIONS.get(attention).Config(name=attention, **settings)
    model = build(position, attention=config, prefix=True).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("sink"):
                parameter.normal_()
    return model


def written_out(name: str, attention: str, settings: dict[str, Any]) -> Any:
    """`SelfAttention._attend` pair by pair, from queries and keys before the scheme has seen them."""

    def attend(
        self: SelfAttention, x: Tensor, q: Tensor, k: Tensor, v: Tensor, position: Position, *others: Any
    ) -> Tensor:
        prefix = others[-1]
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        place = torch.arange(T)
        i, j = place[:, None], place[None, :]
        within = (i < prefix[:, None, None]) & (j < prefix[:, None, None])  # (B,T,T)
        there = (j <= i) | within
        if not (settings.get("global_every") and (self.layer + 1) % settings["global_every"] == 0):
            there = there & mask_by_hand(attention, settings, T, T, causal=False)
        mask = there[:, None]
        if attention == "linear":
            return dense_kernel(q, k, v, mask, 0.0)[0].transpose(1, 2).flatten(2)
        many = q.shape[1] // k.shape[1]
        score = reference.SCORES[name](
            reference.Place(position, self.layer, x), q, k.repeat_interleave(many, 1), place, place
        )
        plain = q @ k.repeat_interleave(many, 1).mT / q.shape[-1] ** 0.5
        out, _ = dense(q, k, v, mask, score - plain, self.mechanism.sink)
        return out.transpose(1, 2).flatten(2)

    return attend


@cases
def test_equals_every_pair_written_out(
    position: str, attention: str, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hidden states and the gradients of all parameters, in float64, of rows with prefixes of different lengths."""
    model, ids = prefix_lm(position, attention, settings), tokens(3, T)
    found = []
    for naive in (False, True):
        if naive:
            monkeypatch.setattr(SelfAttention, "_attend", written_out(position, attention, settings))
        model.zero_grad()
        hidden = model.hidden(ids, prefix=LENGTHS)
        (hidden * torch.linspace(-1, 1, hidden.numel(), dtype=torch.float64).view_as(hidden)).sum().backward()
        found.append((hidden.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]))
    (ours, our_gradients), (theirs, their_gradients) = found
    torch.testing.assert_close(ours, theirs, atol=1e-9, rtol=0)
    for a, b in zip(our_gradients, their_gradients, strict=True):
        torch.testing.assert_close(a, b, atol=1e-8, rtol=1e-8)


@cases
def test_what_is_behind_the_prefix_is_seen_by_nothing_before_it(
    position: str, attention: str, settings: dict[str, Any]
) -> None:
    """Changing token 20 of prefixes of 1, 17 and all 40: it is seen from 20 on, from 20 on, and, in reach, from before."""
    model, ids = prefix_lm(position, attention, settings), tokens(3, T)
    other = ids.clone()
    other[:, 20] = (other[:, 20] + 1) % 61
    moved = (model.hidden(ids, prefix=LENGTHS) - model.hidden(other, prefix=LENGTHS)).abs().amax(-1) > 0
    assert not moved[:2, :20].any()
    assert moved[:, 20:22].all()
    assert moved[2, 19] or attention == "chunked"
    if attention == "chunked":
        assert moved[2, 22:].any() or not moved[2, :11].any()


@cases
def test_a_prefix_of_one_token_is_a_causal_decoder(position: str, attention: str, settings: dict[str, Any]) -> None:
    model, ids = prefix_lm(position, attention, settings), tokens(2, T)
    torch.testing.assert_close(
        model.hidden(ids, prefix=torch.tensor([1, 1])), model.hidden(ids), atol=1e-10, rtol=0
    )  # fmt: skip


@cases
def test_a_cached_prompt_equals_the_full_forward(position: str, attention: str, settings: dict[str, Any]) -> None:
    """The prompt, read at once both ways, then tokens one by one and some together: the rows of one forward."""
    model, ids = prefix_lm(position, attention, settings), tokens(2, T)
    whole = model.logits(model.hidden(ids, prefix=torch.tensor([17, 17])))
    cache = model.new_cache()
    parts = [model.logits(model.hidden(ids[:, :17], cache=cache, prefix="all"))]
    edges = [17, 18, 19, 26, T]
    parts += [model(ids[:, a:b], cache=cache) for a, b in zip(edges, edges[1:])]
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-9, rtol=0)


@pytest.mark.parametrize("position", ["rope", "t5", "learned"])
def test_a_text_goes_on_from_its_prompt_as_the_prefix(position: str) -> None:
    """Greedy decoding equals full forwards; prompts of several lengths, and beams, are each as alone."""
    model = build(position, prefix=True)
    prompts = [tokens(1, n, seed=n)[0].tolist() for n in (5, 9, 5, 12)]
    greedy = DecodingConfig(temperature=0.0, max_new_tokens=8)
    said = decode(model, prompts, greedy)
    for prompt, new in zip(prompts, said, strict=True):
        text = list(prompt)
        for token in new:
            hidden = model.hidden(torch.tensor([text]), prefix=torch.tensor([len(prompt)]))
            assert int(model.logits(hidden)[0, -1].argmax()) == token
            text.append(token)
        assert list(generate(model, prompt, greedy)) == new
    beams = DecodingConfig(num_beams=3, max_new_tokens=6)
    together = beam_search(model, prompts, beams)
    alone = [beam_search(model, [prompt], beams)[0] for prompt in prompts]
    assert [[h.tokens for h in some] for some in together] == [[h.tokens for h in some] for some in alone]
    assert any(
        list(generate(model, prompt, greedy)) != list(generate(_causal(position), prompt, greedy)) for prompt in prompts
    )


def _causal(position: str) -> Any:
    """The same weights without a prefix."""
    model = build(position, prefix=True)
    model.prefix = False
    return model


def test_the_prefix_ends_where_the_first_target_stands() -> None:
    targets = torch.tensor([[-100, -100, 4, 5], [3, 4, 5, 6], [-100, -100, -100, 9]])
    assert prefix_lengths(targets).tolist() == [3, 1, 4]


def test_refusals() -> None:
    model, ids = build(prefix=True), tokens(2, 8)
    with pytest.raises(ValueError, match="not made to attend both ways"):
        build().hidden(ids, prefix=torch.tensor([2, 2]))
    cache = model.new_cache()
    model.hidden(ids, cache=cache)
    with pytest.raises(ValueError, match="fills an empty cache whole"):
        model.hidden(ids, cache=cache, prefix="all")
    with pytest.raises(IncompatibleError, match=r"decoding.cache: a prefix of 8 tokens is read at once, .* holds 6"):
        list(generate(model, ids[0].tolist(), DecodingConfig(cache="streaming", cache_sinks=2, cache_window=4)))
    with pytest.raises(IncompatibleError, match="tells no order without a causal mask"):
        build("alibi", prefix=True)
