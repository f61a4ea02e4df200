"""The cache's buffers: what goes in comes out, growth is amortised, bytes are what is held."""

from __future__ import annotations

import torch

from ctxlab.model.cache import Growing, KVCache


def test_growing_returns_everything_in_order() -> None:
    torch.manual_seed(0)
    pieces = [torch.randn(2, 3, n, 4) for n in (1, 5, 1, 130, 2)]
    growing = Growing(dim=2)
    for count, piece in enumerate(pieces, start=1):
        held = growing.append(piece)
        assert torch.equal(held, torch.cat(pieces[:count], dim=2))
    assert growing.bytes == 2 * 3 * 139 * 4 * 4


def test_a_thousand_tokens_move_a_handful_of_times() -> None:
    growing = Growing(dim=0)
    places = {growing.append(torch.tensor([n])).untyped_storage().data_ptr() for n in range(1000)}
    assert len(places) <= 5  # rooms of 64, 128, 256, 512, 1024


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
