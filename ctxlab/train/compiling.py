"""Whether torch.compile pays: what it saves of a run's steps against the time that compiling takes before the first."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch

from ctxlab.errors import ConfigError, IncompatibleError
from ctxlab.model.base import ARCHITECTURES
from ctxlab.model.config import SizesConfig
from ctxlab.units import format_seconds

if TYPE_CHECKING:
    from ctxlab.train.settings import TrainerConfig

CompileSetting = Literal["auto"] | bool

SAVED = 1 - 1 / 1.41
"""Share of a training step on a GPU: 1.41 times as fast over 180 models on an A100 (Ansel et al. 2024, ASPLOS, section 6). Of
our own blocks it has not been measured."""
SECONDS = 60.0  # that compiling is taken to need on a GPU
OPERATIONS_PER_SECOND = 1e14  # of a quick GPU: a run that is worth it there is worth it on a slower one


def decide(
    setting: CompileSetting, device: torch.device, operations: float, max_seconds: float, refusal: str = ""
) -> tuple[bool, str]:
    """Whether to compile, and under `auto` why or why not, in words that end a line.

    operations: of the whole run, infinite where only the clock ends it. refusal: why the model cannot be compiled.
    On a CPU `auto` never does: attention and what goes with it run in kernels that are compiled already. Raises ConfigError
    where it is asked for and there is no compiler.
    """
    if setting is True:
        require_compiler(device)
    if setting != "auto":
        return setting, ""
    if refusal:
        return False, refusal
    if device.type == "cpu":
        return False, "on a CPU blocks run in kernels that are compiled already"
    seconds = min(operations / OPERATIONS_PER_SECOND, max_seconds)
    saved = seconds * SAVED
    if saved <= SECONDS:
        return False, f"a run of about {format_seconds(seconds)} would save less than compiling takes"
    return True, f"about {format_seconds(SECONDS)} of compiling save a third of each step"


def check_compiled(sizes: SizesConfig, trainer: TrainerConfig) -> None:
    """Raises IncompatibleError where a model of these sizes cannot be compiled in such a training."""
    architecture = ARCHITECTURES.get(sizes.architecture)
    architecture.check_training(sizes, packed=False, compiled=True, recompute=trainer.recompute)
    if trainer.offload != "none":
        raise IncompatibleError(
            "trainer.offload: torch decides by itself what a compiled block (trainer.compile) keeps; use none"
        )


def require_compiler(device: torch.device) -> None:
    """Raises ConfigError where torch.compile would find out, steps later, that there is no compiler for this device."""
    if device.type != "cpu":
        return
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise ConfigError("trainer.compile: there is no C++ compiler here (g++); use trainer.compile=false") from error
