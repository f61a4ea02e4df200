"""The key-value cache: what decoding and scoring in chunks keep of the tokens already seen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_FIRST_ROOM = 64


class Growing:
    """A tensor that grows along one dimension, and may lose its beginning.

    Its room doubles, so appending n tokens copies O(n) numbers in all.
    """

    def __init__(self, dim: int) -> None:
        self.dim = dim
        self.length = 0
        self._start = 0  # of what is held, in the room
        self._room: Tensor | None = None

    def append(self, new: Tensor) -> Tensor:
        """Adds `new` behind what is there and returns all of it, as a view."""
        room = self._room
        length = self.length + new.shape[self.dim]
        if room is None or self._start + length > room.shape[self.dim]:
            size = list(new.shape)
            size[self.dim] = max(length, _FIRST_ROOM if room is None else 2 * self.length)
            grown = new.new_empty(size)
            if room is not None:
                grown.narrow(self.dim, 0, self.length).copy_(room.narrow(self.dim, self._start, self.length))
            room, self._start = grown, 0
            self._room = room
        room.narrow(self.dim, self._start + self.length, new.shape[self.dim]).copy_(new.detach())
        self.length = length
        return room.narrow(self.dim, self._start, length)

    def drop(self, n: int) -> None:
        """Forgets the first n entries."""
        self._start += n
        self.length -= n

    def keep(self, rows: Tensor) -> None:
        """Goes on with these entries along the first dimension, which is not the one that grows."""
        if self._room is not None:
            held = self._room.narrow(self.dim, self._start, self.length)
            size = list(self._room.shape)
            size[0] = len(rows)
            room = self._room.new_empty(size)
            torch.index_select(held, 0, rows, out=room.narrow(self.dim, self._start, self.length))
            self._room = room

    @property
    def bytes(self) -> int:
        """Bytes of what is held, without the room kept free for more."""
        if self._room is None:
            return 0
        return self._room.numel() // self._room.shape[self.dim] * self.length * self._room.element_size()

    @property
    def allocated_bytes(self) -> int:
        """Bytes of all the room there is."""
        return 0 if self._room is None else self._room.numel() * self._room.element_size()


class LayerCache:
    """One layer's keys (as the scheme's `key` returns them, or raw where the scheme says so), values and carry."""

    raw = False  # whether keys are held as they come, before the scheme's `key`, whatever the scheme says

    def __init__(self) -> None:
        self._keys = Growing(dim=2)
        self._values = Growing(dim=2)
        self.seen = 0  # tokens, those that are forgotten included
        self.carry: Any = None  # what the scheme's `prepare` continues: running sums
        self.sums: Tensor | None = None  # of a mechanism that keeps them in place of keys and values
        self.source: tuple[Tensor, Tensor] | None = None  # keys and values of an encoded source, made once
        self.step: tuple[torch.dtype, Any] | None = None  # what decodes a token of this layer, and in which dtype

    def append(self, k: Tensor, v: Tensor, *, first: int = 0) -> tuple[Tensor, Tensor]:
        """Forgets keys before position `first`, adds keys (B,Hkv,T,D) and values (B,Hkv,T,Dv), and returns all held."""
        gone = max(0, first - (self.seen - self._keys.length))
        self._keys.drop(gone)
        self._values.drop(gone)
        self.seen += k.shape[2]
        return self._keys.append(k), self._values.append(v)

    def keep(self, rows: Tensor) -> None:
        """Goes on with these rows."""
        self._keys.keep(rows)
        self._values.keep(rows)
        self.carry = self.carry[rows] if isinstance(self.carry, Tensor) else self.carry
        self.sums = None if self.sums is None else self.sums[rows]
        self.source = None if self.source is None else (self.source[0][rows], self.source[1][rows])

    @property
    def bytes(self) -> int:
        return self._keys.bytes + self._values.bytes + self._whole_bytes()

    @property
    def allocated_bytes(self) -> int:
        return self._keys.allocated_bytes + self._values.allocated_bytes + self._whole_bytes()

    def _whole_bytes(self) -> int:
        """Of what has one size, whatever else comes."""
        whole = [] if self.sums is None else [self.sums]
        whole += [] if self.source is None else self.source
        return sum(t.numel() * t.element_size() for t in whole)


class KVCache:
    """Keys and values of every layer, with the positions they stand at. For inference: nothing in it carries a gradient.

    cache = KVCache(model.config.n_layers)
    model(first, cache=cache); model(rest, cache=cache)     # the logits of one forward over both
    """

    raw = False
    sinks = 0  # first tokens that stay when those behind them go

    def __init__(self, n_layers: int) -> None:
        self.layers: Sequence[LayerCache] = [LayerCache() for _ in range(n_layers)]
        self._positions = Growing(dim=0)

    @property
    def length(self) -> int:
        """Tokens held."""
        return self._positions.length

    @property
    def bytes(self) -> int:
        """Bytes of the keys and values held (room for more excluded)."""
        return sum(layer.bytes for layer in self.layers)

    @property
    def allocated_bytes(self) -> int:
        """Bytes set aside for keys, values and their positions, room for more included."""
        return sum(layer.allocated_bytes for layer in self.layers) + self._positions.allocated_bytes

    def keep(self, rows: Tensor) -> None:
        """Goes on with these rows (n,) of those held, in this order; one may be there several times, or not at all."""
        for layer in self.layers:
            layer.keep(rows)

    def last_after(self, n: int) -> int:
        """The position of the last of n more tokens."""
        return self.length + n - 1

    def advance(self, n: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Makes place for n more tokens: their positions (n,) and those of all tokens then held (S,), int64."""
        new = torch.arange(self.length, self.length + n, device=device)
        return new, self._positions.append(new)


class StreamingLayer(LayerCache):
    """The first `sinks` tokens and the last `window` ones, raw."""

    raw = True

    def __init__(self, sinks: int, window: int) -> None:
        super().__init__()
        self.sinks, self.window = sinks, window
        self._first: tuple[Tensor, Tensor] | None = None  # keys and values of the first tokens

    def append(self, k: Tensor, v: Tensor, *, first: int = 0) -> tuple[Tensor, Tensor]:
        self.seen += k.shape[2]
        keys, values = self._keys.append(k), self._values.append(v)
        if self._first is None and self.seen > self.sinks + self.window:
            self._first = keys[:, :, : self.sinks].clone(), values[:, :, : self.sinks].clone()
        if self._first is None:
            return keys, values
        gone = keys.shape[2] - self.window
        self._keys.drop(gone)
        self._values.drop(gone)
        return torch.cat([self._first[0], keys[:, :, gone:]], 2), torch.cat([self._first[1], values[:, :, gone:]], 2)

    def keep(self, rows: Tensor) -> None:
        super().keep(rows)
        self._first = None if self._first is None else (self._first[0][rows], self._first[1][rows])

    def _whole_bytes(self) -> int:
        return super()._whole_bytes() + sum(t.numel() * t.element_size() for t in self._first or ())


class StreamingCache(KVCache):
    """A cache of constant size for endless text: the first `sinks` tokens and the last `window` ones.

    Xiao et al. 2024 (StreamingLLM), arXiv:2309.17453. Positions count within the cache, so none is ever larger than
    sinks + window - 1, and the keys are held before the scheme has turned them. It does not lengthen the context: what has
    left the window is gone. Once it is full, tokens come one at a time. Schemes that carry something from token to token
    (FoX, FIRE), and those that are added to the embeddings, have no meaning in it and are refused by the model.
    """

    raw = True

    def __init__(self, n_layers: int, *, sinks: int, window: int) -> None:
        super().__init__(n_layers)
        self.layers = [StreamingLayer(sinks, window) for _ in range(n_layers)]
        self.sinks = sinks
        self.capacity = sinks + window
        self._held = 0

    @property
    def length(self) -> int:
        return self._held

    def last_after(self, n: int) -> int:
        return min(self._held + n, self.capacity) - 1

    def advance(self, n: int, device: torch.device) -> tuple[Tensor, Tensor]:
        if n > 1 and self._held + n > self.capacity:
            raise ValueError(f"StreamingCache: {n} tokens at once do not fit beside {self._held} in {self.capacity}")
        self._held = min(self._held + n, self.capacity)
        held = torch.arange(self._held, device=device)
        return held[-n:], held
