"""Learned positions under scores that are divided by sqrt(d_k) or are not, as a plugin: all else is `position=learned`.

ctxlab train --plugin experiments/why_scale/scores.py position=scores position.divided=false model=nano
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from ctxlab.model.position.base import POSITIONS
from ctxlab.model.position.learned import Learned


@POSITIONS.register("scores")
class Scores(Learned):
    """score_ij = c q_i . k_j, c = 1 / sqrt(d_k) where `divided`, else 1.

    unit: every q_i and k_j is divided by the root of its mean square, so that its numbers have the variance 1 that the
    footnote of Vaswani et al. 2017 (arXiv:1706.03762, section 3.2.1) takes for granted, whatever the weights are.
    """

    class Config(Learned.Config):
        name: Literal["scores"] = "scores"
        divided: bool = Field(True, description="scores are divided by sqrt(d_k)")
        unit: bool = Field(False, description="queries and keys have mean square 1")

    config: Config

    @property
    def scale(self) -> float:
        return super().scale if self.config.divided else 1.0

    def query(self, q: Tensor, tables: Any, state: Any) -> Tensor:
        return torch.nn.functional.rms_norm(q, q.shape[-1:]) if self.config.unit else q

    def key(self, k: Tensor, tables: Any, state: Any) -> Tensor:
        return torch.nn.functional.rms_norm(k, k.shape[-1:]) if self.config.unit else k
