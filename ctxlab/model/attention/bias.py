"""Biases on attention scores, as blockwise attention asks for them: one tile of scores at a time, never a T x S matrix.

A `Bias` is what a positional scheme hands over: its tensors and how to open it on one attention problem (a `Span`).
The opened `BiasTiles` gives the bias of a tile and takes the gradient of a tile's scores. A bias with running sums
keeps them in its `BiasTiles`: the tiles of a block of queries come nearest keys first.

Symbols: i = S - T + t is the position of query row t, j that of a key, i - j their signed distance.
B batch, H heads, T queries, S keys.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

LOG2_E = 1.0 / math.log(2.0)


class Span(NamedTuple):
    """One attention problem: T queries at positions S - T to S - 1, S keys, and how its tiles are cut and computed."""

    T: int
    S: int
    causal: bool
    rows: int  # queries in a tile, at most
    dtype: torch.dtype  # of the scores
    device: torch.device
    training: bool  # gradients of the bias will be asked for

    def rows_of(self, tile: Tile) -> slice:
        """Which of the T queries a tile's are, in ascending order: to be flipped."""
        before = self.S - self.T
        return slice(tile.queries[-1] - before, tile.queries[0] - before + 1)

    def start_of(self, tile: Tile) -> int:
        """Where on a line of distances that descend from S - 1 the tile's first score lies; row a, column c: a + c on."""
        return self.S - 1 - (tile.queries[0] - tile.keys.start)


class Tile(NamedTuple):
    """A block of scores (b, h, m, n). Its rows run from the last query position down to the first.

    Rows in this order make a bias of the distance alone a view of one vector: one row down and one key on are the same
    step along it.
    """

    batch: slice
    heads: slice
    queries: range  # positions i, descending, m of them
    keys: slice  # positions j, n of them

    def distances(self, device: torch.device) -> Tensor:
        """i - j for every score, (m, n) int64."""
        i = torch.arange(self.queries.start, self.queries.stop, -1, device=device)
        j = torch.arange(self.keys.start, self.keys.stop, device=device)
        return i[:, None] - j[None, :]

    @property
    def nearest(self) -> int:
        """The smallest signed distance of the tile; negative where it reaches into the future."""
        return self.queries[-1] - (self.keys.stop - 1)


class BiasTiles(Protocol):
    """A bias opened on one span.

    One that `reads_scores` is asked by other names (see ScoreTiles).
    """

    reads_scores: bool
    hides_future: bool
    """Whether `block` is -inf at keys in the future of a causal span; where it is not, attention hides them itself."""
    constant: Tensor | None
    """(H,) what the blocks leave out: a number per head that every visible score has in common, added to the lse."""

    def block(self, tile: Tile) -> Tensor:
        """bias / ln 2 of a tile, broadcastable to (b, h, m, n)."""
        ...

    def collect(self, tile: Tile, grad: Tensor) -> None:
        """Takes the gradient (b, h, m, n) of the tile that `block` gave last; it may overwrite it."""
        ...

    def gradients(self, surplus: Tensor) -> tuple[Tensor, ...]:
        """The gradient of every tensor of the bias, in their order, when all tiles are collected.

        surplus (H,): what the gradients of a head's scores sum to, which is the gradient of its log-sum-exps.
        """
        ...


class ScoreTiles(Protocol):
    """A bias that depends on the scores themselves, with sums that run from a query's nearest key to its farthest.

    The forward asks for the tiles of a block of queries nearest first. So does the backward, until `finished`; then it asks
    once more, farthest first, and after each tile hands over its gradient.
    """

    reads_scores: bool
    hides_future: bool
    constant: Tensor | None

    def begin(self, tile: Tile) -> None:
        """A block of queries begins: that of `tile`."""
        ...

    @property
    def finished(self) -> bool:
        """Whether the sums of all queries of the block have come to their end: tiles farther away change none."""
        ...

    def add(self, tile: Tile, scores: Tensor) -> None:
        """Adds the bias / ln 2 to the scores / ln 2 (b, h, m, n) of a tile, in place; hidden keys' are -inf already."""
        ...

    def collect(self, tile: Tile, grad: Tensor) -> None:
        """Takes the gradient (b, h, m, n) of the tile that `add` had last, and adds to it, in place, what reaches the
        scores through the bias."""
        ...

    def gradients(self, surplus: Tensor) -> tuple[Tensor, ...]:
        """As in BiasTiles."""
        ...


class Bias(Protocol):
    """A term added to the scaled scores before the softmax; every tensor in `tensors` receives its gradient."""

    @property
    def tensors(self) -> tuple[Tensor, ...]: ...

    def open(self, tensors: tuple[Tensor, ...], span: Span) -> BiasTiles | ScoreTiles:
        """The bias, its `tensors` as autograd hands them over. Raises ValueError where it does not cover the span."""
        ...


class Compiled(NamedTuple):
    """A bias as the native kernel takes it (see native.cpp)."""

    fields: dict[str, Tensor | int]
    """Fields of its Problem by name."""
    constant: Tensor | None
    """As in BiasTiles."""
    gradient_shapes: dict[str, tuple[int, ...]]
    """Of what its backward fills in, for one row of the batch and one head."""
    gradients: Callable[[dict[str, Tensor], Tensor], tuple[Tensor, ...]]
    """From those of all rows and heads (B,H,...), and the surplus, as in BiasTiles: the gradient of every tensor."""


@runtime_checkable
class Compilable(Bias, Protocol):
    """A bias that the native kernel can state."""

    def compiled(self, tensors: tuple[Tensor, ...], span: Span, pad: int) -> Compiled:
        """As `open`, for a kernel that reads up to `pad` distances beyond those that are seen."""
        ...


@dataclass(frozen=True)
class Toeplitz:
    """bias[h, i, j] = values[h, (i - j) - first]: a bias that depends on the signed distance alone.

    values: (H, n), finite, one for each distance from `first` on; every visible distance must be covered, that is
    0 to S - 1 when causal, 1 - T to S - 1 otherwise. Which keys are visible is not a bias's business: no -inf here.
    constant_from: all distances >= constant_from share one value per head, values[:, constant_from - first] (T5 beyond
    its last bucket); values may end there. The tiles beyond then need no bias, and the whole gradient of the shared
    value is returned at that entry: what the sum of the others leaves of the sum of all.
    """

    values: Tensor
    first: int
    constant_from: int | None = None

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.values,)

    def open(self, tensors: tuple[Tensor, ...], span: Span) -> BiasTiles:
        (values,) = tensors
        tail, _, _ = self._covered(values, span)
        return _ToeplitzTiles(values, self.first, tail, span)

    def compiled(self, tensors: tuple[Tensor, ...], span: Span, pad: int) -> Compiled:
        (values,) = tensors
        tail, lowest, highest = self._covered(values, span)
        n = (highest if tail is None else highest - 1) - lowest + 1
        own = slice(lowest - self.first, lowest - self.first + n)  # of the values that stand on the line
        constant = None if tail is None else values[:, tail - self.first].float()
        line = values[:, own].float() if constant is None else values[:, own].float() - constant[:, None]
        line = torch.nn.functional.pad(line, (pad, pad)).contiguous()  # (H, L)

        def gradients(found: dict[str, Tensor], surplus: Tensor) -> tuple[Tensor, ...]:
            grad = torch.zeros_like(values, dtype=torch.float32)
            grad[:, own] = found["d_line"].sum(0)[:, pad : pad + n]
            if tail is not None:
                grad[:, tail - self.first] = surplus - grad.sum(1)
            return (grad,)

        length = line.shape[1]
        fields: dict[str, Tensor | int] = {
            "line": line, "line_heads": line.shape[0], "line_length": length, "line_first": lowest - pad,
            "tail": span.S if tail is None else tail,
        }  # fmt: skip
        return Compiled(fields, constant, {"d_line": (length,)}, gradients)

    def _covered(self, values: Tensor, span: Span) -> tuple[int | None, int, int]:
        """Where the constant tail begins, if it does, and the ends of the distances that are needed."""
        last = self.first + values.shape[1] - 1
        tail = self.constant_from if self.constant_from is not None and self.constant_from < span.S else None
        lowest, highest = (0 if span.causal else 1 - span.T), (span.S - 1 if tail is None else tail)
        if self.first > lowest or last < highest:
            raise ValueError(f"Toeplitz: values cover distances {self.first} to {last}; needed: {lowest} to {highest}")
        return tail, lowest, highest


class Diagonals:
    """Sums along the diagonals of tiles, where the distance is the same; one buffer for all of them."""

    def __init__(self) -> None:
        self.skewed = torch.empty(0)

    def __call__(self, x: Tensor) -> Tensor:
        """x (b, h, m, n), one row down and one column on along a diagonal -> (b, h, m + n - 1), the last row's start first.

        Rows of m + n, read again at a stride of m + n - 1, move one to the right at each row: equal distances align.
        """
        b, h, m, n = x.shape
        size = b * h * m * (m + n)
        if self.skewed.numel() < size or self.skewed.dtype != x.dtype or self.skewed.device != x.device:
            self.skewed = x.new_empty(size)
        rows = self.skewed[:size].view(b, h, m, m + n)
        rows[..., n:].zero_()
        rows[..., :n].copy_(x)
        return rows.as_strided((b, h, m, m + n - 1), (h * m * (m + n), m * (m + n), m + n - 1, 1)).sum(2)


class _ToeplitzTiles:
    """One line per head, distances descending from S - 1: a tile is an (m, n) view of it with strides (1, 1)."""

    reads_scores = False
    hides_future = True

    def __init__(self, values: Tensor, first: int, tail: int | None, span: Span) -> None:
        self.values, self.first, self.tail, self.span = values, first, tail, span
        # A causal tile reaches less than its own height into the future.
        reach = (min(span.rows, span.T) if span.causal else span.T) - 1
        distances = torch.arange(span.S - 1, -reach - 1, -1, device=span.device)  # (L,)
        self.index = (distances - first).clamp(0, values.shape[1] - 1 if tail is None else tail - first)
        line = values.to(span.dtype)[:, self.index]  # (H, L)
        self.constant: Tensor | None = None
        if tail is not None:
            self.constant = values[:, tail - first].to(span.dtype)
            line = line - self.constant[:, None]
        line = line * LOG2_E
        self.line = (line.masked_fill(distances < 0, -torch.inf) if span.causal else line).contiguous()
        self.grad = torch.zeros_like(self.line) if span.training else None
        self.diagonals = Diagonals()

    def block(self, tile: Tile) -> Tensor:
        if self._is_far(tile):
            return self.line.new_zeros(1, 1, 1, 1)
        m, n = len(tile.queries), tile.keys.stop - tile.keys.start
        line = self.line if self.line.shape[0] == 1 else self.line[tile.heads]
        length = line.shape[1]
        start = line.storage_offset() + self.span.start_of(tile)
        return line.as_strided((1, line.shape[0], m, n), (0, length, 1, 1), start)

    def collect(self, tile: Tile, grad: Tensor) -> None:
        if self.grad is None or self._is_far(tile):
            return
        m, n = grad.shape[2:]
        sums = self.diagonals(grad).sum(0)  # (h, m + n - 1)
        start = self.span.start_of(tile)
        self.grad[tile.heads, start : start + m + n - 1] += sums

    def gradients(self, surplus: Tensor) -> tuple[Tensor, ...]:
        assert self.grad is not None
        found = torch.zeros_like(self.values, dtype=self.span.dtype)
        if self.tail is None:
            return (found.index_add_(1, self.index, self.grad),)
        beyond = self.span.S - self.tail  # entries of the line at distances >= tail
        found.index_add_(1, self.index[beyond:], self.grad[:, beyond:])
        found[:, self.tail - self.first] = surplus - found.sum(1)
        return (found,)

    def _is_far(self, tile: Tile) -> bool:
        return self.tail is not None and tile.nearest >= self.tail


@dataclass(frozen=True)
class Difference:
    """bias[b, h, i, j] = f[b, h, i] - f[b, h, j], f (B,H,S)."""

    f: Tensor

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.f,)

    def open(self, tensors: tuple[Tensor, ...], span: Span) -> BiasTiles:
        return _DifferenceTiles(covering(tensors[0], span.S), span)

    def compiled(self, tensors: tuple[Tensor, ...], span: Span, pad: int) -> Compiled:
        f = covering(tensors[0], span.S)

        def gradients(found: dict[str, Tensor], surplus: Tensor) -> tuple[Tensor, ...]:
            grad = -found["d_earlier"]
            grad[..., span.S - span.T :] += found["d_later"]
            return (grad,)

        shapes: dict[str, tuple[int, ...]] = {"d_later": (span.T,), "d_earlier": (span.S,)}
        return Compiled({"f": f.double().contiguous()}, None, shapes, gradients)


def covering(f: Tensor, S: int) -> Tensor:
    """f, of S positions. Raises ValueError where it has others."""
    if f.shape[-1] != S:
        raise ValueError(f"Difference: f has {f.shape[-1]} positions; needed: {S}")
    return f


class _DifferenceTiles:
    reads_scores = False
    hides_future = False
    constant: Tensor | None = None

    def __init__(self, f: Tensor, span: Span) -> None:
        self.f, self.span = f * LOG2_E, span
        self.grad = torch.zeros_like(f, dtype=span.dtype) if span.training else None

    def block(self, tile: Tile) -> Tensor:
        f = self.f[tile.batch, tile.heads]  # (b,h,S)
        last, first = tile.queries[0], tile.queries[-1]
        # Counted from the tile's first query on, numbers near the diagonal are small before they are rounded.
        here = f[..., first, None]
        rows = (f[..., first : last + 1].flip(-1) - here).to(self.span.dtype)  # (b,h,m)
        columns = (here - f[..., tile.keys]).to(self.span.dtype)  # (b,h,n)
        return rows.unsqueeze(-1) + columns.unsqueeze(-2)

    def collect(self, tile: Tile, grad: Tensor) -> None:
        # The rows of ds sum to 0 but for their rounding. Both sums are kept, of the same rounded numbers: what cancels in
        # the gates' gradients, which are sums of these over all later tokens, then cancels exactly.
        assert self.grad is not None
        last, first = tile.queries[0], tile.queries[-1]
        here = self.grad[tile.batch, tile.heads]
        here[..., first : last + 1] += grad.sum(-1, dtype=self.span.dtype).flip(-1)
        here[..., tile.keys] -= grad.sum(-2, dtype=self.span.dtype)

    def gradients(self, surplus: Tensor) -> tuple[Tensor, ...]:
        assert self.grad is not None
        return (self.grad,)


@dataclass(frozen=True)
class BlockBias:
    """A bias that a python function gives tile by tile: bias = function(tile, *tensors), by autograd differentiable.

    function: (tile, *tensors) -> Tensor broadcastable to (b, h, m, n) of that tile. It runs once a tile in the forward
    and once in the backward, where autograd takes its gradients; nothing of it is kept in between.
    """

    function: Callable[..., Tensor]
    tensors: tuple[Tensor, ...]

    def open(self, tensors: tuple[Tensor, ...], span: Span) -> BiasTiles:
        return _BlockTiles(self.function, tensors, span)


class _BlockTiles:
    reads_scores = False
    hides_future = False
    constant: Tensor | None = None

    def __init__(self, function: Callable[..., Tensor], tensors: tuple[Tensor, ...], span: Span) -> None:
        self.function, self.span = function, span
        self.leaves = [t.detach().requires_grad_(span.training and t.is_floating_point()) for t in tensors]
        self.grads = [torch.zeros_like(t, dtype=span.dtype) for t in tensors] if span.training else []
        self.value = torch.empty(0)

    def block(self, tile: Tile) -> Tensor:
        with torch.set_grad_enabled(self.span.training):
            self.value = self.function(tile, *self.leaves)
        return self.value.detach().to(self.span.dtype) * LOG2_E

    def collect(self, tile: Tile, grad: Tensor) -> None:
        if not self.value.requires_grad:
            return
        wanted = [n for n, leaf in enumerate(self.leaves) if leaf.requires_grad]
        grad = grad.sum_to_size(self.value.shape).to(self.value.dtype)
        found = torch.autograd.grad(self.value, [self.leaves[n] for n in wanted], grad, allow_unused=True)
        for n, one in zip(wanted, found):
            if one is not None:
                self.grads[n] += one

    def gradients(self, surplus: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.grads)


def no_bias(span: Span) -> BiasTiles:
    """The bias 0, which still hides the future of a causal span."""
    zero = torch.zeros(1, 1, dtype=span.dtype, device=span.device)
    first = 0 if span.causal else 1 - span.T
    return _ToeplitzTiles(zero, first, first, span._replace(training=False))
