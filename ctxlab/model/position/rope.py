"""Rotary positions: queries and keys turned by angles proportional to where they stand."""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from ctxlab.errors import IncompatibleError
from ctxlab.model.config import ModelConfig
from ctxlab.model.position.base import POSITIONS, Position

Layout = Literal["interleaved", "half"]


@POSITIONS.register("rope")
class Rope(Position):
    """Pair k of q_i is rotated by i theta_k, of k_j by j theta_k, theta_k = theta^(-2k/D): the score depends on i - j alone.

    Su et al. 2021, arXiv:2104.09864, eqs. 14 to 16 (their d is our head_dim D). A pair is two neighbours (2k, 2k+1), as in
    the paper, or (k, k + D/2), as in Llama's files at Hugging Face: the same models up to a fixed permutation of each
    head's rows in the query and key matrices. Angles are computed in float64 from the positions themselves, at any
    distance; the rotation is applied in fp32 and rounded once to the dtype of q and k.
    """

    class Config(Position.Config):
        name: Literal["rope"] = "rope"
        theta: float = Field(10_000.0, gt=0, description="base of the geometric ladder of frequencies")
        layout: Layout = Field("interleaved", description="which columns make a pair; no difference to training")

    paper = "Su et al. 2021, arXiv:2104.09864"
    form = "separable"
    relative = True

    @classmethod
    def check(cls, config: Position.Config, model: ModelConfig, *, causal: bool = True) -> None:
        super().check(config, model, causal=causal)
        if model.head_dim % 2:
            raise IncompatibleError(
                f"model.head_dim: rope rotates pairs and needs an even number, got {model.head_dim}"
            )

    def frequencies(self, device: torch.device) -> Tensor:
        """theta_k of each pair, float64 (n,); n pairs from the first column on are rotated."""
        assert isinstance(self.config, Rope.Config)
        return inverse_frequencies(self.model.head_dim, self.config.theta, device)

    def tables(self, positions: Tensor, dtype: torch.dtype) -> Any:
        """exp(i position theta_k), (T,n) complex64 (complex128 for float64 models)."""
        angles = positions.to(torch.float64)[:, None] * self.frequencies(positions.device)  # (T,n)
        high = torch.promote_types(dtype, torch.float32)
        return torch.complex(angles.cos().to(high), angles.sin().to(high))

    def query(self, q: Tensor, tables: Any, state: Any) -> Tensor:
        assert isinstance(self.config, Rope.Config)
        return rotate(q, tables, self.config.layout)

    def key(self, k: Tensor, tables: Any, state: Any) -> Tensor:
        assert isinstance(self.config, Rope.Config)
        return rotate(k, tables, self.config.layout)


def inverse_frequencies(head_dim: int, theta: float, device: torch.device) -> Tensor:
    """theta^(-2k/D) for k = 0 .. D/2 - 1, float64."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float64, device=device) / head_dim
    return theta**-exponents


def rotate(x: Tensor, turns: Tensor, layout: Layout) -> Tensor:
    """The first n pairs of x (B,H,T,D) as complex numbers, each multiplied by turns (T,n), in the dtype of x."""
    if not torch.is_grad_enabled():
        return _turn(x, turns, layout)
    result: Tensor = _Rotate.apply(x, turns, layout)
    return result


class _Rotate(torch.autograd.Function):
    """The gradient of a product with t is the product with its conjugate, so nothing of the size of x is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, turns: Tensor, layout: Layout) -> Tensor:
        ctx.save_for_backward(turns)
        ctx.layout = layout
        return _turn(x, turns, layout)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (turns,) = ctx.saved_tensors
        return _turn(grad, turns.conj(), ctx.layout), None, None


def _turn(x: Tensor, turns: Tensor, layout: Layout) -> Tensor:
    width = 2 * turns.shape[-1]
    if width < x.shape[-1]:
        return torch.cat([_turn(x[..., :width], turns, layout), x[..., width:]], dim=-1)
    high = torch.float64 if turns.dtype == torch.complex128 else torch.float32
    same = x if x.dtype == high else x.to(high)
    if layout == "interleaved":
        pairs = same.view(*x.shape[:-1], -1, 2)
        if torch.compiler.is_compiling():  # which knows no code for complex numbers
            first, second = pairs.unbind(-1)  # (B,H,T,D/2) each
            real, imaginary = turns.real, turns.imag
            out = torch.stack([first * real - second * imaginary, first * imaginary + second * real], dim=-1)
        else:
            out = torch.view_as_real(torch.view_as_complex(pairs) * turns)
        out = out.view(x.shape)
    else:
        first, second = same.chunk(2, dim=-1)  # (B,H,T,D/2) each
        out = torch.empty_like(same)
        real, imaginary = out.chunk(2, dim=-1)
        torch.mul(first, turns.real, out=real).addcmul_(second, turns.imag, value=-1)
        torch.mul(second, turns.real, out=imaginary).addcmul_(first, turns.imag)
    return out if x.dtype == high else out.to(x.dtype)
