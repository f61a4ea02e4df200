"""Transformer-XL's relative positions: the score has a part for what stands at a distance, and one for the distance alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from ctxlab.errors import IncompatibleError
from ctxlab.fields import OrNone
from ctxlab.model.attention.bias import LOG2_E, Bias, BiasTiles, Span, Tile
from ctxlab.model.attention.blockwise import add_product
from ctxlab.model.config import ModelConfig
from ctxlab.model.position.base import POSITIONS, Position
from ctxlab.model.position.sinusoidal import sinusoids

_ROWS = 128  # of a tile at a time: their products with n + 127 distances are little more than with the n that count


@POSITIONS.register("transformer_xl")
class TransformerXL(Position):
    """A_ij = (q_i + u) . k_j + (q_i + v) . r_{i-j}, r_d = W R_d, R sinusoidal, all over sqrt(D).

    Dai et al. 2019, arXiv:1901.02860, section 3.3. u and v (their biases) belong to a head and are shared by the layers, W
    belongs to a layer. Sinusoids are computed in float64. With `clamp` all distances from it on are one.
    """

    class Config(Position.Config):
        name: Literal["transformer_xl"] = "transformer_xl"
        clamp: OrNone | int = Field("none", description="distance from which on all are one; none: all are told apart")

    paper = "Dai et al. 2019, arXiv:1901.02860"
    form = "blockwise"
    relative = True
    shared_across_layers = False
    bidirectional = False

    def __init__(self, config: Config, model: ModelConfig, context: int, *, causal: bool = True) -> None:
        super().__init__(config, model, context, causal=causal)
        H, D = model.n_heads, model.head_dim
        self.u, self.v = nn.Parameter(torch.empty(1, H, 1, D)), nn.Parameter(torch.empty(1, H, 1, D))
        self.weight = nn.Parameter(torch.empty(model.n_layers, H * D, model.d_model))

    @classmethod
    def check(cls, config: Position.Config, model: ModelConfig, *, causal: bool = True) -> None:
        super().check(config, model, causal=causal)
        assert isinstance(config, TransformerXL.Config)
        if model.d_model % 2:
            raise IncompatibleError(f"model.d_model: sinusoidal distances need an even number, got {model.d_model}")
        if config.clamp != "none" and config.clamp < 1:
            raise IncompatibleError(f"position.clamp: expected a number >= 1 or none, got {config.clamp}")

    @classmethod
    def n_parameters(cls, config: Position.Config, model: ModelConfig, context: int) -> int:
        return model.n_heads * model.head_dim * (2 + model.n_layers * model.d_model)

    def initialize(self) -> None:
        for parameter in (self.u, self.v, self.weight):
            nn.init.normal_(parameter, std=0.02)

    def prepare(self, x: Tensor, layer: int, carry: Any) -> tuple[int, None]:
        return layer, None

    def query(self, q: Tensor, tables: Any, state: Any) -> Tensor:
        return q + self.u.to(q.dtype)

    def bias(self, q: Tensor, n_keys: int, state: Any) -> Bias:
        assert isinstance(self.config, TransformerXL.Config)
        distances = torch.arange(n_keys, device=q.device)
        if self.config.clamp != "none":
            distances = distances.clamp(max=self.config.clamp)
        r = sinusoids(distances, self.model.d_model).to(q.dtype) @ self.weight[state].to(q.dtype).T  # (S,HD)
        r = r.view(n_keys, self.model.n_heads, self.model.head_dim).transpose(0, 1)  # (H,S,D)
        return DistanceProduct((q + self.v.to(q.dtype)) * self.scale, r)


@dataclass(frozen=True)
class DistanceProduct:
    """bias[b, h, i, j] = q[b, h, i] . r[h, i - j], q (B,H,T,D), r (H,n,D) for distances from 0 on."""

    q: Tensor
    r: Tensor

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.q, self.r)

    def open(self, tensors: tuple[Tensor, ...], span: Span) -> BiasTiles:
        q, r = tensors
        if r.shape[1] < span.S or q.shape[2] != span.T:
            raise ValueError(
                f"DistanceProduct: {r.shape[1]} distances, {q.shape[2]} queries; needed: {span.S}, {span.T}"
            )
        return _ProductTiles(q, r, span)


class _ProductTiles:
    reads_scores = False
    hides_future = False
    constant: Tensor | None = None

    def __init__(self, q: Tensor, r: Tensor, span: Span) -> None:
        self.q, self.span = q, span
        self.n = r.shape[1]
        reach = min(span.rows, span.T) - 1  # of a causal tile into the future, where r is 0
        # One line a head, distances descending from S - 1: row a and column c of a tile lie at a + c from its start.
        self.line = torch.cat([r[:, : span.S].flip(1), r.new_zeros(r.shape[0], reach, r.shape[2])], dim=1)  # (H,L,D)
        if span.training:
            self.d_q = torch.zeros_like(q, dtype=span.dtype)
            self.d_line = torch.zeros_like(self.line, dtype=span.dtype)

    def block(self, tile: Tile) -> Tensor:
        q = self.q[self._place(tile)].flip(2)  # (b,h,m,D)
        b, h, m, _ = q.shape
        n = tile.keys.stop - tile.keys.start
        block = q.new_empty(b, h, m, n, dtype=self.span.dtype)
        for rows, line in self._parts(tile, m, n):
            folded = self._fold(q[:, :, rows])  # (h,b part,D)
            product = block.new_zeros(h, folded.shape[1], line.stop - line.start)  # (h,b part,e)
            add_product(product, folded, self.line[tile.heads, line], 1.0)
            block[:, :, rows] = _skewed(product, b, n)
        return block.mul_(LOG2_E)

    def collect(self, tile: Tile, grad: Tensor) -> None:
        place = self._place(tile)
        q = self.q[place].flip(2)
        b, h, m, n = grad.shape
        d_q = torch.empty(q.shape, dtype=self.span.dtype, device=q.device)
        for rows, line in self._parts(tile, m, n):
            folded = self._fold(q[:, :, rows])
            product = folded.new_zeros(h, folded.shape[1], line.stop - line.start)
            _skewed(product, b, n).copy_(grad[:, :, rows])
            d_q[:, :, rows] = torch.bmm(product, self.line[tile.heads, line]).view(h, b, -1, q.shape[3]).transpose(0, 1)
            self.d_line[tile.heads, line] += torch.bmm(product.mT, folded)
        self.d_q[place] += d_q.flip(2)

    def gradients(self, surplus: Tensor) -> tuple[Tensor, ...]:
        d_r = self.d_line.new_zeros(self.d_line.shape[0], self.n, self.d_line.shape[2])
        d_r[:, : self.span.S] = self.d_line[:, : self.span.S].flip(1)
        return self.d_q, d_r

    def _place(self, tile: Tile) -> tuple[slice, slice, slice]:
        return tile.batch, tile.heads, self.span.rows_of(tile)

    def _parts(self, tile: Tile, m: int, n: int) -> list[tuple[slice, slice]]:
        """Some rows at a time, and the stretch of the line that they and all n keys reach."""
        start = self.span.start_of(tile)
        parts = [(a, min(a + _ROWS, m)) for a in range(0, m, _ROWS)]
        return [(slice(a, z), slice(start + a, start + z - 1 + n)) for a, z in parts]

    @staticmethod
    def _fold(q: Tensor) -> Tensor:
        """(b,h,m,D) -> (h,b m,D): the batch shares the line."""
        return q.transpose(0, 1).reshape(q.shape[1], -1, q.shape[3])


def _skewed(product: Tensor, b: int, n: int) -> Tensor:
    """Products (h, b m, m + n - 1) of rows with distances, as the view (b,h,m,n) whose entry (a, c) is at distance a + c."""
    h, rows, e = product.shape
    m = rows // b
    return product.as_strided((b, h, m, n), (m * e, rows * e, e + 1, 1))
