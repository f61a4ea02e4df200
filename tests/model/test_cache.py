"""The cache's buffers: what goes in comes out, growth is amortised, bytes are what is held."""

from __future__ import annotations

import pytest
import torch

from ctxlab.errors import IncompatibleError
from ctxlab.model.cache import Growing, KVCache, StreamingCache
from tests.model.builders import build, tokens


def test_growing_returns_everything_in_order() -> None:
    torch.manual_seed(0)
    pieces = [torch.randn(2, 3, n, 4) for n in (1, 5, 1, 130, 2)]
    growing = Growing(dim=2)
    for count, piece in enumerate(pieces, start=1):
        held = growing.append(piece)
        assert torch.equal(held, torch.cat(pieces[:count], dim=2))
    assert growing.bytes == 2 * 3 * 139 * 4 * 4
    assert growing.allocated_bytes == 2 * 3 * 274 * 4 * 4  # there was room for 64, for 137, and for twice that


def test_a_thousand_tokens_move_a_handful_of_times() -> None:
    growing = Growing(dim=0)
    places = {growing.append(torch.tensor([n])).untyped_storage().data_ptr() for n in range(1000)}
    assert len(places) <= 5  # rooms of 64, 128, 256, 512, 1024


def test_growing_forgets_its_beginning() -> None:
    growing = Growing(dim=0)
    numbers = torch.arange(1000)
    for n in range(1000):
        held = growing.append(numbers[n : n + 1])
        assert torch.equal(held, numbers[max(0, n - 30) : n + 1])
        if growing.length > 30:
            growing.drop(growing.length - 30)
    assert growing.bytes == 30 * 8
    assert growing.allocated_bytes == 60 * 8  # the 64 of the beginning became twice what was held


def test_what_a_cache_has_set_aside_is_what_its_tensors_take() -> None:
    model = build("rope")
    for cache in (KVCache(2), StreamingCache(2, sinks=4, window=16)):
        with torch.no_grad():
            for part in tokens(3, 40).split([18, *[1] * 22], dim=1):
                model(part, cache=cache)
        held = [layer.__dict__ for layer in cache.layers]
        rooms = [part._room for layer in held for part in (layer["_keys"], layer["_values"])]
        rooms += [part for layer in held for part in layer.get("_first") or ()]
        positions = cache._positions._room
        rooms += [] if positions is None else [positions]
        assert cache.allocated_bytes == sum(room.untyped_storage().nbytes() for room in rooms) > cache.bytes


def test_positions_go_on_where_they_ended() -> None:
    cache = KVCache(n_layers=1)
    device = torch.device("cpu")
    first, _ = cache.advance(3, device)
    second, held = cache.advance(2, device)
    assert (first.tolist(), second.tolist(), held.tolist()) == ([0, 1, 2], [3, 4], [0, 1, 2, 3, 4])
    assert cache.length == 5


def test_nothing_held_carries_a_gradient() -> None:
    held = Growing(dim=0).append(torch.ones(3, requires_grad=True) * 2)
    assert not held.requires_grad


STREAMABLE = ["rope", "alibi", "t5", "nope", "xpos", "kerple", "pope", "transformer_xl", "cope_ctx"]


@pytest.mark.parametrize("position", STREAMABLE)
def test_a_streaming_cache_that_is_not_full_changes_nothing(position: str) -> None:
    model = build(position).double()
    x = tokens(2, 24)
    cache = StreamingCache(2, sinks=4, window=20)
    with torch.no_grad():
        found = torch.cat([model(part, cache=cache) for part in x.split([9, 1, 1, 13], dim=1)], dim=1)
        torch.testing.assert_close(found, model(x), atol=1e-10, rtol=0)


@pytest.mark.parametrize("position", STREAMABLE)
def test_a_full_streaming_cache_is_the_first_and_the_last_tokens_at_new_positions(position: str) -> None:
    """In one layer keys know nothing of what was dropped, so the text without its middle gives the same."""
    model = build(position, n_layers=1, context=12).double()
    x = tokens(1, 40)
    cache = StreamingCache(1, sinks=3, window=9)
    with torch.no_grad():
        found = [model(part, cache=cache) for part in x.split([12] + [1] * 28, dim=1)][-1]
        kept = torch.cat([x[:, :3], x[:, -9:]], dim=1)
        torch.testing.assert_close(found[:, -1], model(kept)[:, -1], atol=1e-10, rtol=0)


def test_a_streaming_cache_has_one_size() -> None:
    model = build("rope")
    cache = StreamingCache(2, sinks=4, window=20)
    sizes = []
    with torch.no_grad():
        for part in tokens(1, 200).split(1, dim=1):
            model(part, cache=cache)
            sizes.append(cache.bytes)
    assert set(sizes[24:]) == {2 * 2 * 2 * 8 * 24 * 4}  # layers, keys and values, heads, width, tokens, fp32
    assert cache.length == 24


def test_a_full_streaming_cache_takes_one_token_at_a_time() -> None:
    model = build("rope")
    cache = StreamingCache(2, sinks=4, window=20)
    with torch.no_grad():
        model(tokens(1, 20), cache=cache)
        with pytest.raises(ValueError, match="5 tokens at once do not fit beside 20 in 24"):
            model(tokens(1, 5), cache=cache)


@pytest.mark.parametrize(
    ("position", "why"),
    [
        ("fox", "carries sums over all tokens"), ("fire", "carries sums over all tokens"),
        ("sinusoidal", "is part of the keys and values themselves"),
        ("learned", "is part of the keys and values themselves"),
    ],
)  # fmt: skip
def test_schemes_that_cannot_be_moved_are_refused_by_a_streaming_cache(position: str, why: str) -> None:
    with pytest.raises(IncompatibleError, match=f"position: {position} {why}"), torch.no_grad():
        build(position)(tokens(1, 5), cache=StreamingCache(2, sinks=1, window=4))
