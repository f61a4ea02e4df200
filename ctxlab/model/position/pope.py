"""PoPE: polar positions, where content sets only the length of a column's vector and position only its direction."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from ctxlab.model.config import ModelConfig
from ctxlab.model.position.base import POSITIONS, Position


@POSITIONS.register("pope")
class PoPE(Position):
    """q_i . k_j becomes sum_c softplus(q_ic) softplus(k_jc) cos((j - i) theta_c + delta_c), theta_c = theta^(-c/D), c = 0 .. D-1.

    Gopalakrishnan et al. 2025, arXiv:2509.10534. delta_c in [-2 pi, 0] is learned for each key-value head and layer and
    starts at 0. Every column becomes a pair (cosine, sine), so queries and keys are twice as wide in the product and in the
    cache. Angles are computed in float64, vectors in fp32 and rounded once.
    """

    class Config(Position.Config):
        name: Literal["pope"] = "pope"
        theta: float = Field(10_000.0, gt=0, description="base of the ladder of frequencies theta^(-c/head_dim)")

    paper = "Gopalakrishnan et al. 2025, arXiv:2509.10534"
    form = "separable"
    relative = True
    shared_across_layers = False

    def __init__(self, config: Config, model: ModelConfig, context: int, *, causal: bool = True) -> None:
        super().__init__(config, model, context, causal=causal)
        self.delta = nn.Parameter(torch.empty(model.n_layers, model.n_kv_heads, model.head_dim))

    @classmethod
    def n_parameters(cls, config: Position.Config, model: ModelConfig, context: int) -> int:
        return model.n_layers * model.n_kv_heads * model.head_dim

    @classmethod
    def key_columns(cls, config: Position.Config, model: ModelConfig) -> int:
        return model.head_dim

    def initialize(self) -> None:
        nn.init.zeros_(self.delta)

    def prepare(self, x: Tensor, layer: int, carry: Any) -> tuple[Tensor, None]:
        return self.delta[layer].clamp(-2 * math.pi, 0.0), None  # (Hkv,D)

    def tables(self, positions: Tensor, dtype: torch.dtype) -> Tensor:
        """exp(i position theta_c), (T,D) complex64 (complex128 for float64 models)."""
        assert isinstance(self.config, PoPE.Config)
        c = torch.arange(self.model.head_dim, dtype=torch.float64, device=positions.device)
        angles = positions.to(torch.float64)[:, None] * self.config.theta ** (-c / self.model.head_dim)
        high = torch.promote_types(dtype, torch.float32)
        return torch.complex(angles.cos().to(high), angles.sin().to(high))

    def query(self, q: Tensor, tables: Any, state: Any) -> Tensor:
        result: Tensor = _Polar.apply(q, tables, None)
        return result  # (B,H,T,2D)

    def key(self, k: Tensor, tables: Any, state: Any) -> Tensor:
        result: Tensor = _Polar.apply(k, tables, state)
        return result  # (B,Hkv,T,2D)


class _Polar(torch.autograd.Function):
    """softplus(x) (cos, sin) of the angle of `turns` (T,D) plus `delta` (H,D); keeps x alone, in its own dtype."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, turns: Tensor, delta: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, turns, delta)
        size = F.softplus(x.to(turns.real.dtype))  # (B,H,T,D)
        direction = _direction(turns, delta)
        out = x.new_empty(*x.shape[:-1], 2 * x.shape[-1])
        cosine, sine = out.chunk(2, dim=-1)
        cosine.copy_(size * direction.real)
        sine.copy_(size * direction.imag)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, Tensor | None]:
        x, turns, delta = ctx.saved_tensors
        high = x.to(turns.real.dtype)
        direction = _direction(turns, delta)
        cosine, sine = (part.to(high.dtype) for part in grad.chunk(2, dim=-1))
        dx = (cosine * direction.real).add_(sine * direction.imag).mul_(torch.sigmoid(high))
        if delta is None:
            return dx.to(x.dtype), None, None
        across = (sine * direction.real).sub_(cosine * direction.imag).mul_(F.softplus(high))  # along the circle
        return dx.to(x.dtype), None, across.sum((0, 2)).to(delta.dtype)


def _direction(turns: Tensor, delta: Tensor | None) -> Tensor:
    if delta is None:
        return turns  # (T,D)
    delta = delta.to(turns.real.dtype)
    return turns * torch.complex(delta.cos(), delta.sin())[:, None, :]  # (H,T,D)
