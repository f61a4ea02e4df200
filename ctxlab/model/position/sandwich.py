"""Sandwich: the inner products of sinusoidal positions as a bias, nothing learned."""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from ctxlab.errors import IncompatibleError
from ctxlab.fields import OrAuto
from ctxlab.model.config import ModelConfig
from ctxlab.model.position.base import POSITIONS, Position


@POSITIONS.register("sandwich")
class Sandwich(Position):
    """bias = (sum_k cos((i - j) / 10000^(2k/w)) - w/2) / (8h/H), k = 1 .. w/2, h = 1 .. H: Chi et al. 2023, arXiv:2212.10356.

    w is `width`: head_dim where it is `auto`. Causal only: the bias does not tell left from right.
    """

    class Config(Position.Config):
        name: Literal["sandwich"] = "sandwich"
        width: OrAuto | int = Field("auto", description="columns of the sinusoids; auto: head_dim")

    paper = "Chi et al. 2023, arXiv:2212.10356"
    form = "toeplitz"
    relative = True
    bidirectional = False

    @classmethod
    def check(cls, config: Position.Config, model: ModelConfig, *, causal: bool = True) -> None:
        super().check(config, model, causal=causal)
        assert isinstance(config, Sandwich.Config)
        width = model.head_dim if config.width == "auto" else config.width
        if width < 2 or width % 2:
            raise IncompatibleError(f"position.width: expected an even number >= 2, got {width}")

    def distance_bias(self, distances: Tensor, state: Any) -> Tensor:
        assert isinstance(self.config, Sandwich.Config)
        width, H = self.model.head_dim if self.config.width == "auto" else self.config.width, self.model.n_heads
        total = torch.zeros(len(distances), dtype=torch.float64, device=distances.device)
        for m in range(2, width + 1, 2):  # one at a time: n x w/2 numbers would be most of the memory
            total += torch.cos(distances.to(torch.float64) * 10_000.0 ** (-m / width))
        steepness = 8 * torch.arange(1, H + 1, dtype=torch.float64, device=distances.device) / H
        return (total - width / 2)[None, :] / steepness[:, None]
