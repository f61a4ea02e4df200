"""What of a model is trained: all of it, all but what is frozen, or adapters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from ctxlab.errors import ConfigError
from ctxlab.registry import nearest


def train_only(model: nn.Module, frozen: Sequence[str], adapters: Mapping[str, Any] | None) -> None:
    """Leaves in training what a run with these settings of `trainer.freeze` and, unless None, `trainer.lora` trains."""
    if adapters is not None:
        from ctxlab.train import lora  # what else it imports is in no other step
        from ctxlab.train.settings import LoraConfig

        lora.adapt(model, LoraConfig.model_validate(adapters, strict=False))
    freeze(model, frozen)


def freeze(model: nn.Module, patterns: Sequence[str]) -> None:
    """Takes parameters out of training: those with one of these names, below one of them, or matched by a pattern.

    Raises ConfigError for a name that there is none of, and where nothing is left to train.
    """
    names = [name for name, _ in model.named_parameters()]
    for pattern in patterns:
        found = [name for name in names if fnmatchcase(name, pattern) or name.startswith(f"{pattern}.")]
        if not found:
            parts = {name.rpartition(".")[0] for name in names} | {name.partition(".")[0] for name in names}
            raise ConfigError(f"trainer.freeze: no parameter is called '{pattern}'{nearest(pattern, parts)}")
        for name in found:
            model.get_parameter(name).requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError("trainer.freeze: nothing is left to train")
