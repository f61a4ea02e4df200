"""What of a model is trained: all of it, or all but what is frozen."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn

from ctxlab.errors import ConfigError
from ctxlab.registry import nearest


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
