"""p-RoPE: rotary positions without the slowest frequencies, which then carry content alone."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from ctxlab.model.position.base import POSITIONS
from ctxlab.model.position.rope import Rope


@POSITIONS.register("p_rope")
class PRope(Rope):
    """RoPE that keeps the floor(p D/2) fastest frequencies, theta_k = theta^(-2k/D), and sets the others to 0.

    Barbero et al. 2024, arXiv:2410.06205. p = 1 is RoPE, p = 0 is NoPE. Hugging Face calls it `proportional`.
    """

    class Config(Rope.Config):
        name: Literal["p_rope"] = "p_rope"  # type: ignore[assignment]
        p: float = Field(0.75, ge=0, le=1, description="share of the frequencies that is kept, the fastest first")

    paper = "Barbero et al. 2024, arXiv:2410.06205"

    def frequencies(self, device: torch.device) -> Tensor:
        assert isinstance(self.config, PRope.Config)
        kept = super().frequencies(device)
        kept[int(self.config.p * len(kept)) :] = 0.0
        return kept
