"""Learned absolute positions: one trained vector a position."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from ctxlab.model.config import ModelConfig
from ctxlab.model.position.base import POSITIONS, Position


@POSITIONS.register("learned")
class Learned(Position):
    """x_p += W[p], W (context, d_model) trained (Gehring et al. 2017, arXiv:1705.03122, section 3.1; GPT-2).

    A position >= context has no row: the model raises UndefinedBeyondTraining, it never wraps or clamps.
    """

    class Config(Position.Config):
        name: Literal["learned"] = "learned"

    paper = "Gehring et al. 2017, arXiv:1705.03122"
    form = "embedding"
    relative = False
    defined_beyond_training = False

    def __init__(self, config: Config, model: ModelConfig, context: int, *, causal: bool = True) -> None:
        super().__init__(config, model, context, causal=causal)
        self.weight = nn.Parameter(torch.empty(context, model.d_model))

    @classmethod
    def n_parameters(cls, config: Position.Config, model: ModelConfig, context: int) -> int:
        return context * model.d_model

    @property
    def table(self) -> nn.Parameter:
        return self.weight

    def initialize(self) -> None:
        nn.init.normal_(self.weight, std=0.02)

    def embed(self, x: Tensor, positions: Tensor) -> Tensor:
        return x + nn.functional.embedding(positions, self.weight)
