"""AdamW, fused."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import nn

from ctxlab.train.optim.base import OPTIMIZERS, Optimizer, adamw_groups, by_depth, embedding_ids


@OPTIMIZERS.register("adamw")
class AdamW(Optimizer):
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019, arXiv:1711.05101, alg. 2), torch's fused kernel."""

    paper = "Loshchilov and Hutter 2019, arXiv:1711.05101"
    states = 2

    class Config(Optimizer.Config):
        name: Literal["adamw"] = "adamw"
        learning_rate: float = Field(2e-3, gt=0)
        betas: tuple[float, float] = (0.9, 0.95)
        eps: float = Field(1e-8, gt=0)

    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        config = self.config
        assert isinstance(config, AdamW.Config)
        named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        embeddings = embedding_ids(model)
        groups = [
            group
            for share, some in by_depth(model, named, config.layer_decay)
            for group in adamw_groups(
                some, lr=config.learning_rate, decay=config.weight_decay, embeddings=embeddings, share=share
            )
        ]
        return torch.optim.AdamW(groups, betas=config.betas, eps=config.eps, fused=True)
