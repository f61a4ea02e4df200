"""CoPE, contextual positions: a query counts only the keys that its own gate opens for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from ctxlab.model.attention.bias import LOG2_E, Bias, ScoreTiles, Span, Tile
from ctxlab.model.config import ModelConfig
from ctxlab.model.position.base import POSITIONS, Position


@POSITIONS.register("cope_ctx")
class CoPE(Position):
    """bias_ij = q_i . e[p_ij] / sqrt(D), p_ij = sum_{t=j..i} sigmoid(q_i . k_t / sqrt(D)).

    Golovneva et al. 2024, arXiv:2405.18719. p is cut off at n - 1, e (n rows, one set a layer, shared by its heads) starts at
    0 and is interpolated between whole positions. Gates, sums and interpolation are fp32; nothing of them is kept for the
    backward pass. Not the later CoPE that clips RoPE's frequencies.
    """

    class Config(Position.Config):
        name: Literal["cope_ctx"] = "cope_ctx"
        rows: int = Field(64, ge=2, description="positions that are told apart")

    paper = "Golovneva et al. 2024, arXiv:2405.18719"
    form = "blockwise"
    relative = True
    shared_across_layers = False
    bidirectional = False

    def __init__(self, config: Config, model: ModelConfig, context: int, *, causal: bool = True) -> None:
        super().__init__(config, model, context, causal=causal)
        self.weight = nn.Parameter(torch.empty(model.n_layers, config.rows, model.head_dim))

    @classmethod
    def n_parameters(cls, config: Position.Config, model: ModelConfig, context: int) -> int:
        assert isinstance(config, CoPE.Config)
        return model.n_layers * config.rows * model.head_dim

    def initialize(self) -> None:
        nn.init.zeros_(self.weight)

    def prepare(self, x: Tensor, layer: int, carry: Any) -> tuple[int, None]:
        return layer, None

    def bias(self, q: Tensor, n_keys: int, state: Any) -> Bias:
        return Contextual(q @ self.weight[state].to(q.dtype).T * self.scale)  # (B,H,T,n)


@dataclass(frozen=True)
class Contextual:
    """bias[b, h, i, j] = z[b, h, i, p_ij], p as in CoPE, linear between whole p; z (B,H,T,n)."""

    z: Tensor

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.z,)

    def open(self, tensors: tuple[Tensor, ...], span: Span) -> ScoreTiles:
        return _ContextualTiles(tensors[0], span)


class _ContextualTiles:
    reads_scores = True
    hides_future = False
    constant: Tensor | None = None

    def __init__(self, z: Tensor, span: Span) -> None:
        self.z, self.span, self.last = z, span, z.shape[-1] - 1
        self.grad = torch.zeros_like(z, dtype=span.dtype) if span.training else None
        self.place: tuple[slice, slice, slice] | None = None  # where the block of queries lies in z

    def begin(self, tile: Tile) -> None:
        self._keep()
        self.place = (tile.batch, tile.heads, self.span.rows_of(tile))
        self.values = self.z[self.place].flip(2).to(self.span.dtype)  # (b,h,m,n)
        self.d_values = torch.zeros_like(self.values)
        self.sums = self.values.new_zeros(*self.values.shape[:3], 1)  # of the gates of all tiles so far
        self.before: dict[int, Tensor] = {}  # first key of a tile -> the sums of the tiles nearer than it
        self.d_position = torch.zeros_like(self.sums)  # the gradients of all positions in farther tiles

    @property
    def finished(self) -> bool:
        return bool((self.sums >= self.last).all())

    def add(self, tile: Tile, scores: Tensor) -> None:
        first = tile.keys.start
        new = first not in self.before
        if new and self.finished:
            self.found = None
            scores.add_(self.values[..., self.last :], alpha=LOG2_E)
            return
        sums = self.before.setdefault(first, self.sums)
        gates = torch.sigmoid(scores / LOG2_E)  # 0 where a key is hidden
        behind = gates.flip(-1).cumsum(-1).flip(-1)  # of this tile, from each key to the query
        if new:
            self.sums = sums + behind[..., :1]
        position = behind.add_(sums)
        within = position < self.last
        position.clamp_(max=self.last)
        floor = position.floor()
        part = position.sub_(floor)
        index = floor.to(torch.int64)
        low = self.values.gather(-1, index)
        step = self.values.gather(-1, (index + 1).clamp_(max=self.last)).sub_(low)
        scores.add_(torch.addcmul(low, part, step), alpha=LOG2_E)
        self.found = (gates, within, part, index, step) if self.span.training else None

    def collect(self, tile: Tile, grad: Tensor) -> None:
        ds = grad.to(self.span.dtype)
        if self.found is None:  # every position is the last one
            self.d_values[..., self.last] += ds.sum(-1)
            return
        gates, within, part, index, step = self.found
        upper = ds * part
        self.d_values.scatter_add_(-1, index, ds - upper)
        self.d_values.scatter_add_(-1, (index + 1).clamp_(max=self.last), upper)
        d_position = (ds * step).masked_fill_(~within, 0.0)
        # A gate is part of the position of its own key and of all keys farther away.
        farther = d_position.cumsum(-1).add_(self.d_position)
        self.d_position = farther[..., -1:].clone()
        grad.copy_(ds.add_(farther.mul_(gates).mul_(1 - gates)))

    def gradients(self, surplus: Tensor) -> tuple[Tensor, ...]:
        self._keep()
        assert self.grad is not None
        return (self.grad,)

    def _keep(self) -> None:
        if self.place is not None and self.grad is not None:
            self.grad[self.place] += self.d_values.flip(2)
        self.place = None
