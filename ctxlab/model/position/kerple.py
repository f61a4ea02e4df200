"""KERPLE: a learned penalty on the score, logarithmic or a power of the distance, for each head."""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from ctxlab.model.config import ModelConfig
from ctxlab.model.position.base import POSITIONS, Position

_SMALLEST = 0.01  # both parameters are kept at least so large, as in the authors' code
_LARGEST_POWER = 2.0  # beyond it the kernel is no longer conditionally positive definite


@POSITIONS.register("kerple")
class Kerple(Position):
    """log: bias = -p_h ln(1 + a_h (i - j)); power: bias = -a_h (i - j)^p_h, 0 < p_h <= 2. One set for all layers.

    Chi et al. 2022, arXiv:2205.09921 (their r1 and r2 are p and a in `log`, a and p in `power`). Both start
    uniform, p in (0, 2) and a in (0, 1). `power` with p = 1 is ALiBi with learned slopes.
    """

    class Config(Position.Config):
        name: Literal["kerple"] = "kerple"
        kind: Literal["log", "power"] = Field("log", description="how the penalty grows with the distance")

    paper = "Chi et al. 2022, arXiv:2205.09921"
    form = "toeplitz"
    relative = True
    bidirectional = False

    def __init__(self, config: Config, model: ModelConfig, context: int, *, causal: bool = True) -> None:
        super().__init__(config, model, context, causal=causal)
        self.p = nn.Parameter(torch.empty(model.n_heads))
        self.a = nn.Parameter(torch.empty(model.n_heads))

    @classmethod
    def n_parameters(cls, config: Position.Config, model: ModelConfig, context: int) -> int:
        return 2 * model.n_heads

    def initialize(self) -> None:
        nn.init.uniform_(self.p, 0.0, 2.0)
        nn.init.uniform_(self.a, 0.0, 1.0)

    def distance_bias(self, distances: Tensor, state: Any) -> Tensor:
        assert isinstance(self.config, Kerple.Config)
        p, a = self.p[:, None].clamp(min=_SMALLEST), self.a[:, None].clamp(min=_SMALLEST)  # (H,1)
        d = distances.clamp(min=0).to(torch.promote_types(p.dtype, torch.float32))  # (n,)
        if self.config.kind == "log":
            return -p * torch.log1p(a * d)
        return -a * d ** p.clamp(max=_LARGEST_POWER)
