"""What every optimizer shares: its settings, which parameters decay, the learning-rate curve."""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import takewhile
from typing import Literal

import torch
from pydantic import Field
from torch import nn

from ctxlab.model.heads import TaskHead
from ctxlab.registry import ComponentConfig, Registry


class Optimizer(ABC):
    """Builds a torch optimizer for a model. Each param group carries `peak_lr`, the rate that the schedule scales."""

    paper: str = ""
    states: int = 1  # numbers that are kept of a weight between steps: of most of them, where they differ

    class Config(ComponentConfig):
        name: str
        learning_rate: float = Field(gt=0)
        weight_decay: float = Field(0.1, ge=0, description="on matrices only; vectors and embeddings are never decayed")
        clip: float = Field(1.0, ge=0, description="largest norm of the whole gradient; 0 turns clipping off")
        layer_decay: float = Field(
            1.0, gt=0, le=1, description="the rate of a layer over that of the layer above it; 1: all learn alike"
        )
        schedule: Literal["cosine", "wsd", "noam", "constant"] = "cosine"
        warmup_steps: int = Field(20, ge=0)
        final_ratio: float = Field(0.1, ge=0, le=1, description="last learning rate over the peak")
        decay_fraction: float = Field(0.3, gt=0, le=1, description="last part of a wsd run, in which the rate falls")

    def __init__(self, config: Config) -> None:
        self.config = config

    @abstractmethod
    def build(self, model: nn.Module) -> torch.optim.Optimizer: ...


_BELOW = ("position", "embedding_norm")  # modules that stand below the layers, besides embeddings

OPTIMIZERS: Registry[Optimizer] = Registry("optim", "ctxlab.train.optim")


def rate_factor(config: Optimizer.Config, step: int, progress: float) -> float:
    """The learning rate at optimizer step `step` (from 0) as a fraction of the peak.

    Warm-up is linear over `warmup_steps`. With p = `progress` in [0, 1), the share of the budget already spent, and
    r = `final_ratio`: cosine is r + (1 - r)(1 + cos(pi p)) / 2 (Loshchilov and Hutter 2017, arXiv:1608.03983, eq. 5);
    wsd stays at 1 and falls linearly to r over the last `decay_fraction` of the run (Hu et al. 2024, arXiv:2404.06395).
    noam, with s = step + 1 and w = `warmup_steps`, is min(s / w, sqrt(w / s)): with a peak of (d_model w)^-0.5 that is
    d_model^-0.5 min(s^-0.5, s w^-1.5) (Vaswani et al. 2017, eq. 3).
    """
    if config.schedule == "noam":
        warmup = max(1, config.warmup_steps)
        return min((step + 1) / warmup, math.sqrt(warmup / (step + 1)))
    warm = min(1.0, (step + 1) / (config.warmup_steps + 1))
    low = config.final_ratio
    if config.schedule == "cosine":
        return warm * (low + (1 - low) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0))))
    if config.schedule == "wsd":
        left = max(0.0, 1 - progress) / config.decay_fraction
        return warm * (low + (1 - low) * min(1.0, left))
    return warm


def is_hidden_matrix(name: str, parameter: nn.Parameter, embeddings: set[int]) -> bool:
    """Whether a parameter is a matrix between hidden layers: no embedding, head, bias, norm or position table."""
    return parameter.ndim == 2 and id(parameter) not in embeddings and ".position." not in f".{name}"


def embedding_ids(model: nn.Module) -> set[int]:
    """ids of the parameters that map to or from the vocabulary, or to the choices of a task: embeddings and output heads."""
    ids = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    ids |= {id(p) for module in model.modules() if isinstance(module, TaskHead) for p in module.parameters()}
    head = getattr(model, "head", None)
    if isinstance(head, nn.Linear):
        ids.add(id(head.weight))
    return ids


def stacked(model: nn.Module) -> dict[int, int]:
    """id of a parameter -> how many matrices stand in it, one below the other: torch keeps an LSTM's four gates so."""
    layers = [module for module in model.modules() if isinstance(module, nn.LSTM)]
    return {id(p): 4 for module in layers for p in module.parameters() if p.ndim == 2}


def by_depth(
    model: nn.Module, named: list[tuple[str, nn.Parameter]], decay: float
) -> list[tuple[float, list[tuple[str, nn.Parameter]]]]:
    """The parameters by how fast they learn, fastest first: decay^k of the rate, k the layers from the top down to theirs.

    Clark et al. 2020 (ELECTRA), arXiv:2003.10555, appendix B, counted as in BEiT (Bao et al. 2022, arXiv:2106.08254): of n
    layers, what stands above them has k = 0, layer l (from 0) k = n - l, and what stands below, embeddings and positions,
    n + 1, an embedding that is the output matrix too. Each stack of an encoder-decoder is counted from its own top. Frozen
    layers count.
    """
    if decay == 1:
        return [(1.0, named)]
    depths = depths_from_top(model)
    alike: dict[int, list[tuple[str, nn.Parameter]]] = {}
    for name, parameter in named:
        alike.setdefault(depths[name], []).append((name, parameter))
    return [(decay**depth, alike[depth]) for depth in sorted(alike)]


def depths_from_top(model: nn.Module) -> dict[str, int]:
    """k of every parameter, as `by_depth` says it."""
    below = {name for name, module in model.named_modules() if isinstance(module, nn.Embedding)}
    below |= {name for name, _ in model.named_modules() if name.rpartition(".")[2] in _BELOW}
    stacks = {name: len(module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    stacks |= {name: module.num_layers for name, module in model.named_modules() if isinstance(module, nn.LSTM)}
    found = {}
    for name, _ in model.named_parameters():
        own = next((stack for stack in stacks if name.startswith(f"{stack}.")), None)
        if own is not None:
            layer = re.search(r"^\d+(?=\.)|(?<=_l)\d+$", name.removeprefix(f"{own}."))
            assert layer is not None, name
            found[name] = stacks[own] - int(layer[0])
        elif any(name.startswith(f"{part}.") for part in below) and stacks:
            nearest = max(stacks, key=lambda stack: _shared(stack.split("."), name.split(".")))
            found[name] = stacks[nearest] + 1
        else:
            found[name] = 0
    return found


def _shared(a: Sequence[str], b: Sequence[str]) -> int:
    """How many words two names begin with in common."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b)))


def adamw_groups(
    named: list[tuple[str, nn.Parameter]], *, lr: float, decay: float, embeddings: set[int], share: float = 1.0
) -> list[dict[str, object]]:
    """Two groups, decayed matrices and undecayed rest, empty ones left out. They learn at `share` of the rate."""
    lr *= share
    matrices = [p for n, p in named if is_hidden_matrix(n, p, embeddings)]
    rest = [p for n, p in named if not is_hidden_matrix(n, p, embeddings)]
    groups = [
        {"params": matrices, "lr": lr, "peak_lr": lr, "weight_decay": decay},
        {"params": rest, "lr": lr, "peak_lr": lr, "weight_decay": 0.0},
    ]
    return [group | of_share(share) for group in groups if group["params"]]


def of_share(share: float) -> dict[str, object]:
    """What a group that learns at a share of the rate says of itself."""
    return {} if share == 1 else {"layer_share": share}
