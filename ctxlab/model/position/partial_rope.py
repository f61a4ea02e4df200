"""Partial rotary positions: only the first columns of each head are rotated, the rest knows no position."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from ctxlab.errors import IncompatibleError
from ctxlab.model.config import ModelConfig
from ctxlab.model.position.base import POSITIONS, Position
from ctxlab.model.position.rope import Rope, inverse_frequencies


@POSITIONS.register("partial_rope")
class PartialRope(Rope):
    """RoPE on the first r = fraction * D columns, theta_k = theta^(-2k/r): GPT-NeoX-20B, arXiv:2204.06745.

    Not p-RoPE, which keeps the exponents of the whole head. Hugging Face calls the fraction `partial_rotary_factor`.
    """

    class Config(Rope.Config):
        name: Literal["partial_rope"] = "partial_rope"  # type: ignore[assignment]
        fraction: float = Field(0.25, gt=0, le=1, description="columns that are rotated, over head_dim")

    paper = "Black et al. 2022, arXiv:2204.06745"

    @classmethod
    def check(cls, config: Position.Config, model: ModelConfig, *, causal: bool = True) -> None:
        super().check(config, model, causal=causal)
        assert isinstance(config, PartialRope.Config)
        if rotated(config, model) < 2:
            raise IncompatibleError(
                f"position.fraction: {config.fraction:g} of head_dim {model.head_dim} is not one pair; "
                f"the nearest valid value is {2 / model.head_dim:g}"
            )

    def frequencies(self, device: torch.device) -> Tensor:
        assert isinstance(self.config, PartialRope.Config)
        return inverse_frequencies(rotated(self.config, self.model), self.config.theta, device)


def rotated(config: PartialRope.Config, model: ModelConfig) -> int:
    """Columns that are rotated: the fraction, down to whole pairs."""
    return int(config.fraction * model.head_dim) // 2 * 2
