"""Muon on the hidden matrices, AdamW on the rest, stepping as one optimizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from pydantic import Field
from torch import nn

from ctxlab.train.optim.base import (
    OPTIMIZERS,
    Optimizer,
    adamw_groups,
    by_depth,
    embedding_ids,
    is_hidden_matrix,
    of_share,
    stacked,
)
from ctxlab.train.optim.orthogonal import Orthogonal


class Together(torch.optim.Optimizer):
    """Several optimizers over disjoint parameters behind the interface of one.

    `param_groups` are the parts' own dictionaries, so a learning rate set here is set there. (Two optimizers in a
    LightningModule would mean manual optimization: accumulation and clipping by hand.)
    """

    def __init__(self, *parts: torch.optim.Optimizer) -> None:
        groups = [group for part in parts for group in part.param_groups]
        super().__init__([dict(group) for group in groups], {})
        self.parts = parts
        self.param_groups = groups

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts:
            part.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self.param_groups = [group for part in self.parts for group in part.param_groups]


@OPTIMIZERS.register("muon")
class Muon(Optimizer):
    """Momentum made orthogonal for every hidden matrix (Jordan et al. 2024), as `orthogonal.py` says; AdamW for the others.

    A matrix' step is scaled by 0.2 sqrt(max(rows, columns)), which gives it the size of an AdamW step
    (Liu et al. 2025, arXiv:2502.16982, eq. 4), so that one learning-rate scale serves both parts.

    Matrices that are only kept together are made orthogonal apart, as Jordan et al. found better for queries, keys and values:
    of the one step of a stack, the matrix with the largest gradient would leave the others little. The gates of an LSTM are
    such a stack, of torch's making. That it suits recurrent matrices is no published finding; `optim=adamw` is the traditional
    choice for them.
    """

    paper = "Jordan et al. 2024, kellerjordan.github.io/posts/muon; Liu et al. 2025, arXiv:2502.16982"

    class Config(Optimizer.Config):
        name: Literal["muon"] = "muon"
        learning_rate: float = Field(1e-2, gt=0, description="of the hidden matrices")
        adamw_learning_rate: float = Field(5e-3, gt=0, description="of embeddings, head, norms and biases")
        momentum: float = Field(0.95, ge=0, lt=1)
        betas: tuple[float, float] = (0.9, 0.95)
        eps: float = Field(1e-8, gt=0)

    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        config = self.config
        assert isinstance(config, Muon.Config)
        embeddings = embedding_ids(model)
        named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        hidden = [(n, p) for n, p in named if is_hidden_matrix(n, p, embeddings)]
        rest = [(n, p) for n, p in named if not is_hidden_matrix(n, p, embeddings)]
        parts: list[torch.optim.Optimizer] = []
        if hidden:
            parts.append(
                Orthogonal(
                    [
                        {
                            "params": [p for _, p in some],
                            "lr": config.learning_rate * share,
                            "peak_lr": config.learning_rate * share,
                            **of_share(share),
                        }
                        for share, some in by_depth(model, hidden, config.layer_decay)
                    ],
                    lr=config.learning_rate,
                    weight_decay=config.weight_decay,
                    momentum=config.momentum,
                    stacks=stacked(model),
                )
            )
        groups = [
            group
            for share, some in by_depth(model, rest, config.layer_decay)
            for group in adamw_groups(
                some, lr=config.adamw_learning_rate, decay=0.0, embeddings=embeddings, share=share
            )
        ]
        if groups:
            parts.append(torch.optim.AdamW(groups, betas=config.betas, eps=config.eps, fused=True))
        return Together(*parts)
