"""Fixed sinusoidal positions, added to the embeddings."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ctxlab.errors import IncompatibleError
from ctxlab.model.config import ModelConfig
from ctxlab.model.position.base import POSITIONS, Position


@POSITIONS.register("sinusoidal")
class Sinusoidal(Position):
    """x = sqrt(d_model) x + PE[p], PE[p,2k] = sin(p / theta^(2k/d_model)), PE[p,2k+1] = cos(the same).

    Vaswani et al. 2017, arXiv:1706.03762, sections 3.4 (the factor) and 3.5. Angles are computed in float64.
    """

    class Config(Position.Config):
        name: Literal["sinusoidal"] = "sinusoidal"

    paper = "Vaswani et al. 2017, arXiv:1706.03762"
    form = "embedding"
    relative = False

    @classmethod
    def check(cls, config: Position.Config, model: ModelConfig, *, causal: bool = True) -> None:
        super().check(config, model, causal=causal)
        if model.d_model % 2:
            raise IncompatibleError(f"model.d_model: sinusoidal positions need an even number, got {model.d_model}")

    @classmethod
    def embedding_scale(cls, model: ModelConfig) -> float:
        return model.d_model**0.5

    def embed(self, x: Tensor, positions: Tensor) -> Tensor:
        return x * self.embedding_scale(self.model) + sinusoids(positions, self.model.d_model).to(x.dtype)


def sinusoids(positions: Tensor, width: int, theta: float = 10_000.0) -> Tensor:
    """PE of positions (...) in float64, (..., width): sines in the even places, cosines in the odd ones."""
    exponents = torch.arange(0, width, 2, dtype=torch.float64, device=positions.device) / width
    angles = positions.to(torch.float64).unsqueeze(-1) * theta**-exponents  # (..., width / 2)
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(-2)
