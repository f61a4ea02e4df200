"""FIRE: a small learned network maps the distance, over how far the query could look at all, to a bias for each head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from ctxlab.model.attention.bias import LOG2_E, Bias, BiasTiles, Compiled, Diagonals, Span, Tile
from ctxlab.model.config import ModelConfig
from ctxlab.model.kernels import has_no_numbers, kernels_of
from ctxlab.model.position.base import POSITIONS, Position

_EPSILON = 1e-6  # added to the normalizer, as in the authors' code
_FEATURES = 2**21  # numbers in the features of some rows of a tile, at most, on a CPU
_WIDE_FEATURES = 2**25  # and where tiles are wide


@POSITIONS.register("fire")
class FIRE(Position):
    """bias_ij = f_h(psi(i - j) / (psi(max(i, L)) + 1e-6)), psi(x) = ln(|c x| + 1): Li et al. 2024, arXiv:2310.04418.

    f is a network of one hidden layer of ReLUs, for each layer of the model, as are c (starts at 0.1) and L = |m span|
    (m starts at 1). The bias depends on where the query stands, not on the distance alone.
    """

    class Config(Position.Config):
        name: Literal["fire"] = "fire"
        hidden: int = Field(32, ge=1, description="ReLUs in the network")
        initial_c: float = Field(0.1, gt=0)
        span: float = Field(512.0, gt=0, description="distances are relative to this until the query stands beyond it")

    paper = "Li et al. 2024, arXiv:2310.04418"
    form = "blockwise"
    relative = False
    shared_across_layers = False
    bidirectional = False
    compilable = True

    def __init__(self, config: Config, model: ModelConfig, context: int, *, causal: bool = True) -> None:
        super().__init__(config, model, context, causal=causal)
        L, H, K = model.n_layers, model.n_heads, config.hidden
        self.c, self.m = nn.Parameter(torch.empty(L)), nn.Parameter(torch.empty(L))
        self.w1, self.b1 = nn.Parameter(torch.empty(L, 1, K)), nn.Parameter(torch.empty(L, 1, K))
        self.w2, self.b2 = nn.Parameter(torch.empty(L, H, K)), nn.Parameter(torch.empty(L, H, 1))

    @classmethod
    def n_parameters(cls, config: Position.Config, model: ModelConfig, context: int) -> int:
        assert isinstance(config, FIRE.Config)
        return model.n_layers * (2 + 2 * config.hidden + model.n_heads * (config.hidden + 1))

    def initialize(self) -> None:
        assert isinstance(self.config, FIRE.Config)
        nn.init.constant_(self.c, self.config.initial_c)
        nn.init.constant_(self.m, 1.0)
        for parameter, fan_in in (
            (self.w1, 1),
            (self.b1, 1),
            (self.w2, self.config.hidden),
            (self.b2, self.config.hidden),
        ):
            nn.init.uniform_(parameter, -(fan_in**-0.5), fan_in**-0.5)

    def prepare(self, x: Tensor, layer: int, carry: Any) -> tuple[tuple[int, int], int]:
        """(layer, tokens so far): the bias depends on where a query stands."""
        seen = (carry or 0) + x.shape[1]
        return (layer, seen), seen

    def bias(self, q: Tensor, n_keys: int, state: Any) -> Bias:
        assert isinstance(self.config, FIRE.Config)
        layer, seen = state
        c, span = self.c[layer].double(), self.m[layer].double().abs() * self.config.span
        psi = torch.log1p((c * torch.arange(n_keys, dtype=torch.float64, device=q.device)).abs())  # of distances
        positions = torch.arange(seen - q.shape[2], seen, dtype=torch.float64, device=q.device)  # of queries
        normalizer = torch.log1p((c * torch.maximum(positions, span)).abs()) + _EPSILON
        return PiecewiseLinear(
            psi, normalizer, *_pieces(*(p[layer].double() for p in (self.w1, self.b1, self.w2, self.b2)))
        )


def _pieces(w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> tuple[Tensor, Tensor]:
    """The network for u >= 0 as intercept + slope u + sum_k delta_k relu(u - knot_k): ((H, 2 + K), (K,)).

    A unit's knot is where it turns on or off, -b1/w1. With w1 < 0 it is on before it: relu(-x) = relu(x) - x.
    """
    w1, b1 = w1[0], b1[0]  # (K,)
    turns = b1 * w1 < 0  # within u > 0; the other units are on or off throughout
    on = (b1 > 0) | ((b1 == 0) & (w1 > 0))  # at u = 0 and a little beyond
    intercept = (w2 * torch.where(on, b1, 0.0)).sum(1, keepdim=True) + b2  # (H,1)
    slope = (w2 * torch.where(on, w1, 0.0)).sum(1, keepdim=True)  # (H,1)
    delta = w2 * torch.where(turns, w1.abs(), 0.0)  # (H,K)
    knots = torch.where(turns, -b1 / torch.where(turns, w1, 1.0), torch.inf)  # (K,)
    return torch.cat([intercept, slope, delta], dim=1), knots


@dataclass(frozen=True)
class PiecewiseLinear:
    """bias[h, i, j] = f_h(psi[i - j] / normalizer[i]), f_h(u) = a_h + s_h u + sum_k delta_hk relu(u - knot_k).

    psi (S,), normalizer (T,), coefficients (H, 2 + K) = (a, s, delta), knots (K,). Of a tile only the knots that it reaches
    to both sides of cost anything: the others are part of its straight line.
    """

    psi: Tensor
    normalizer: Tensor
    coefficients: Tensor
    knots: Tensor

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.psi, self.normalizer, self.coefficients, self.knots)

    def open(self, tensors: tuple[Tensor, ...], span: Span) -> BiasTiles:
        psi, normalizer, coefficients, knots = tensors
        if psi.shape[0] < span.S or normalizer.shape[0] != span.T:
            raise ValueError(
                f"PiecewiseLinear: {psi.shape[0]} distances, {normalizer.shape[0]} queries; needed: {span}"
            )
        return _PiecewiseTiles(psi, normalizer, coefficients, knots, span)

    def compiled(self, tensors: tuple[Tensor, ...], span: Span, pad: int) -> Compiled:
        """Pieces between knots in ascending order: a row of intercepts and slopes for each number of knots passed."""
        psi, normalizer, coefficients, knots = tensors
        order = torch.argsort(knots)
        at, bends = knots[order], coefficients[:, 2 + order]  # (K,), (H,K)
        reached = torch.isfinite(at)
        moved = (bends * torch.where(reached, at, 0.0)).cumsum(1)  # what the intercept has lost
        intercept = coefficients[:, :1] - torch.nn.functional.pad(moved, (1, 0))  # (H,K+1)
        slope = coefficients[:, 1:2] + torch.nn.functional.pad(bends.cumsum(1), (1, 0))
        line = torch.nn.functional.pad(psi[: span.S].float(), (pad, pad))
        line[pad + span.S :] = line[pad + span.S - 1]  # ascending to the end
        fields: dict[str, Tensor | int] = {
            "psi": line, "inverse": (1.0 / normalizer).float(), "knots": at.float(), "bends": bends.float().contiguous(),
            "straight": torch.stack([intercept, slope], -1).float().contiguous(), "K": len(knots), "pad": pad,
        }  # fmt: skip

        def gradients(found: dict[str, Tensor], surplus: Tensor) -> tuple[Tensor, ...]:
            total, moment, hinge, beyond = found["d_pieces"].sum(0).unbind(1)  # (H,K+1) each
            d_psi = torch.zeros_like(psi)
            d_psi[: span.S] = found["d_psi"].sum((0, 1))[pad : pad + span.S]
            d_normalizer = -found["d_inverse"].sum((0, 1)) / normalizer**2
            # Of scores that have passed a knot, whatever their piece: the sums of all pieces behind it.
            behind, moments = (x.flip(1).cumsum(1).flip(1)[:, 1:] for x in (total, moment))  # (H,K)
            d_bends = hinge[:, :-1] + moments - behind * torch.where(reached, at, 0.0)
            d_knots = -((beyond[:, :-1] + behind) * bends).sum(0)
            d_coefficients = torch.empty_like(coefficients)
            d_coefficients[:, 0], d_coefficients[:, 1] = total.sum(1), moment.sum(1)
            d_coefficients[:, 2 + order] = d_bends
            return d_psi, d_normalizer, d_coefficients, torch.empty_like(knots).index_copy_(0, order, d_knots)

        n = len(line)
        shapes = {"d_psi": (n,), "d_inverse": (span.T,), "d_pieces": (4, len(knots) + 1)}
        return Compiled(fields, None, shapes, gradients)


class _PiecewiseTiles:
    reads_scores = False
    hides_future = False
    constant: Tensor | None = None

    def __init__(self, psi: Tensor, normalizer: Tensor, coefficients: Tensor, knots: Tensor, span: Span) -> None:
        self.span, self.high = span, span.dtype
        self.psi, self.inverse = psi, (1.0 / normalizer).to(self.high)
        self.coefficients, self.knots = coefficients, knots
        # Which knots lie within a tile is decided on the host; in a trace, where nobody knows, all of them do.
        self.bounds = None if has_no_numbers(psi) else tuple(x.cpu().numpy() for x in (psi, normalizer, knots))
        reach = min(span.rows, span.T) - 1
        self.distances = torch.arange(span.S - 1, -reach - 1, -1, device=span.device).clamp(min=0)  # (L,)
        self.line = psi.to(self.high)[self.distances]
        self.diagonals = Diagonals()
        if span.training:
            self.d_line = torch.zeros_like(self.line)
            self.d_normalizer = torch.zeros_like(self.inverse)
            self.d_coefficients = torch.zeros_like(coefficients, dtype=self.high)
            self.d_knots = torch.zeros_like(knots, dtype=self.high)

    def block(self, tile: Tile) -> Tensor:
        u = self._u(tile)  # (m,n)
        weights, knots, _, _ = self._reached(tile)
        block = u.new_empty(1, weights.shape[0], *u.shape)  # (1,h,m,n)
        for rows in self._parts(u, knots):
            part = self._features(u[rows], knots)  # (1 + k, mn)
            torch.addmm(weights[:, :1], weights[:, 1:], part, out=(found := u.new_empty(len(weights), part.shape[1])))
            block[0, :, rows] = found.view(len(weights), -1, u.shape[1])
        return block.mul_(LOG2_E)

    def collect(self, tile: Tile, grad: Tensor) -> None:
        u = self._u(tile)
        weights, knots, inside, passed = self._reached(tile)
        ds = grad.sum(0, dtype=self.high)  # (h,m,n)
        total = ds.sum((1, 2))  # (h,)
        du = torch.empty_like(u)
        by_feature = torch.zeros(len(weights), 1 + len(knots), dtype=self.high, device=u.device)
        by_knot = torch.zeros_like(knots)
        for rows in self._parts(u, knots):
            features = self._features(u[rows], knots)  # (1 + k, mn)
            part = ds[:, rows].flatten(1)  # (h,mn)
            by_feature.addmm_(part, features.T)
            upstream = weights[:, 1:].T @ part  # (1 + k, mn)
            beyond = upstream[1:].mul_(features[1:] > 0)
            by_knot -= beyond.sum(1)
            du[rows] = (upstream[0] + beyond.sum(0)).view(-1, u.shape[1])
        dc, heads = self.d_coefficients, tile.heads
        dc[heads, 0] += total
        dc[heads, 1] += by_feature[:, 0]
        dc[heads, 2 + inside] += by_feature[:, 1:]
        dc[heads, 2 + passed] += by_feature[:, :1] - total[:, None] * self.knots[passed].to(self.high)
        self.d_knots[inside] += by_knot
        self.d_knots[passed] -= total @ self.coefficients[heads][:, 2 + passed].to(self.high)
        du *= self._inverse(tile)[:, None]
        self.d_normalizer[self.span.rows_of(tile)] -= (du * u).sum(1).flip(0)
        start = self.span.start_of(tile)
        self.d_line[start : start + sum(u.shape) - 1] += self.diagonals(du[None, None])[0, 0]

    def gradients(self, surplus: Tensor) -> tuple[Tensor, ...]:
        d_psi = torch.zeros_like(self.psi, dtype=self.high).index_add_(0, self.distances, self.d_line)
        return d_psi, self.d_normalizer, self.d_coefficients, self.d_knots

    def _u(self, tile: Tile) -> Tensor:
        """psi(i - j) over the query's normalizer, (m,n); 0 at keys in the future."""
        m, n = len(tile.queries), tile.keys.stop - tile.keys.start
        return self.line.as_strided((m, n), (1, 1), self.span.start_of(tile)) * self._inverse(tile)[:, None]

    def _inverse(self, tile: Tile) -> Tensor:
        return self.inverse[self.span.rows_of(tile)].flip(0)

    def _reached(self, tile: Tile) -> tuple[Tensor, Tensor, np.ndarray, np.ndarray]:
        """(intercept, slope, delta of the knots inside) (h, 2 + k), those knots, and which are inside and which are passed."""
        if self.bounds is None:
            c = self.coefficients[tile.heads].to(self.high)
            return c, self.knots.to(self.high), np.arange(len(self.knots)), np.arange(0)
        psi, normalizer, knots = self.bounds
        rows = normalizer[self.span.rows_of(tile)]
        low = psi[max(tile.nearest, 0)] / rows.max()
        high = psi[min(tile.queries[0] - tile.keys.start, len(psi) - 1)] / rows.min()
        passed, inside = np.flatnonzero(knots <= low), np.flatnonzero((knots > low) & (knots < high))
        c = self.coefficients[tile.heads]
        straight, gone = c[:, :2].clone(), c[:, 2 + passed]
        straight[:, 0] -= (gone * self.knots[passed]).sum(1)
        straight[:, 1] += gone.sum(1)
        return (
            torch.cat([straight, c[:, 2 + inside]], dim=1).to(self.high),
            self.knots[inside].to(self.high),
            inside,
            passed,
        )

    def _parts(self, u: Tensor, knots: Tensor) -> list[slice]:
        most = _FEATURES if kernels_of(u.device) == "cpu" else _WIDE_FEATURES
        step = max(1, most // ((1 + len(knots)) * u.shape[1]))
        return [slice(r, min(r + step, u.shape[0])) for r in range(0, u.shape[0], step)]

    def _features(self, u: Tensor, knots: Tensor) -> Tensor:
        """u and relu(u - knot) for each knot, (1 + k, mn)."""
        features = u.new_empty(1 + len(knots), u.numel())
        features[0] = u.flatten()
        torch.sub(features[:1], knots[:, None], out=features[1:]).clamp_(min=0)
        return features
