"""FoX, the forgetting transformer: a gate on every token decides how much of what came before is still seen."""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from ctxlab.model.attention.bias import Bias, Difference
from ctxlab.model.config import ModelConfig
from ctxlab.model.position.base import POSITIONS, Position


@POSITIONS.register("fox")
class FoX(Position):
    """bias_ij = sum_{t=j+1..i} ln sigmoid(w_h . x_t + b_h) = f_i - f_j: Lin et al. 2025, arXiv:2503.02130.

    x is what the block's queries and keys are projected from, w and b belong to a layer and head, b starts at `initial_bias`.
    The running sums f are float64, their differences fp32, and so are the sums over rows and columns that are their
    gradient. A cache keeps f of every token.
    """

    class Config(Position.Config):
        name: Literal["fox"] = "fox"
        initial_bias: float = Field(5.0, description="of the gates: sigmoid(5) forgets 0.7% a token")

    paper = "Lin et al. 2025, arXiv:2503.02130"
    form = "blockwise"
    relative = True
    shared_across_layers = False
    bidirectional = False
    compilable = True

    def __init__(self, config: Config, model: ModelConfig, context: int, *, causal: bool = True) -> None:
        super().__init__(config, model, context, causal=causal)
        self.weight = nn.Parameter(torch.empty(model.n_layers, model.n_heads, model.d_model))
        self.offset = nn.Parameter(torch.empty(model.n_layers, model.n_heads))

    @classmethod
    def n_parameters(cls, config: Position.Config, model: ModelConfig, context: int) -> int:
        return model.n_layers * model.n_heads * (model.d_model + 1)

    def initialize(self) -> None:
        assert isinstance(self.config, FoX.Config)
        nn.init.normal_(self.weight, std=0.02)
        nn.init.constant_(self.offset, self.config.initial_bias)

    def prepare(self, x: Tensor, layer: int, carry: Any) -> tuple[Tensor, Tensor]:
        """f of all tokens so far, (B,H,S) float64, both as the state and as the carry."""
        f: Tensor = _GateSums.apply(x, self.weight[layer], self.offset[layer])
        if carry is not None:
            f = torch.cat([carry, carry[..., -1:] + f], dim=-1)
        return f, f

    def bias(self, q: Tensor, n_keys: int, state: Any) -> Bias:
        return Difference(state[..., -n_keys:])


class _GateSums(torch.autograd.Function):
    """sum_{t <= i} ln sigmoid(w_h . x_t + b_h), (B,H,T) float64, from x (B,T,d); keeps x in its own dtype.

    Products and sums are float64: a sum over 100,000 gates then has no error that matters, and none that depends on how
    a sequence is cut into chunks.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, offset: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            logits = x.double() @ weight.double().T + offset.double()  # (B,T,H)
        ctx.save_for_backward(x, weight, logits)
        return F.logsigmoid(logits).cumsum(1).transpose(1, 2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, weight, logits = ctx.saved_tensors
        later = grad.transpose(1, 2).double().flip(1).cumsum(1).flip(1)  # (B,T,H): a gate is in all sums behind it
        high = torch.promote_types(x.dtype, torch.float32)
        dlogits = later.mul_(torch.sigmoid(-logits)).to(high).flatten(0, 1)  # (BT,H)
        with torch.autocast(x.device.type, enabled=False):
            dx = (dlogits @ weight.to(high)).view(x.shape).to(x.dtype)
            dweight = dlogits.T @ x.flatten(0, 1).to(high)
        return dx, dweight.to(weight.dtype), dlogits.sum(0).to(weight.dtype)
