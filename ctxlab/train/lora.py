"""Low-rank adapters: the weights of another run stay, and what is learned is a small product added to some of its matrices.

The head of a task, which is new or goes with its answers, is learned whole beside them, as peft's `modules_to_save` are.
The matrices are wrapped by peft (optional: `pip install 'ctxlab[lora]'`), which is imported inside functions. A checkpoint
holds the merged weights under the names that they have without adapters, and the adapters beside them: whatever reads a run
(eval, generate, attention, another init) then neither knows of adapters nor needs the run that they were trained on. Only a
resume does, since what is merged cannot be taken apart to the last bit.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ctxlab.errors import ConfigError, RecordError
from ctxlab.registry import nearest
from ctxlab.train.settings import LoraConfig

ADAPTERS = "adapters.safetensors"
INSTALL = "trainer.lora.r: needs peft; pip install 'ctxlab[lora]'"
_NAME = "default"  # of the one adapter that there is
TASK_HEAD = "task_head."
HEADS = ("head.", "head_layer.", TASK_HEAD)  # what says: their weights are read past the modules, or are learned whole
_BASE = "base"


def check_installed() -> None:
    """Raises ConfigError, one line, where peft is not there or does not work."""
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise ConfigError(INSTALL + ("" if error.name == "peft" else f" ({error})")) from error


def adapt(model: nn.Module, config: LoraConfig) -> None:
    """Wraps the chosen matrices W in x -> W x + (alpha / r) B A dropout(x), and takes all but A, B and the head of a task out of
    training.

    Hu et al. 2022, arXiv:2106.09685, section 4.1: A (r,in) is drawn, B (out,r) is 0, so nothing changes before the first step.
    Raises ConfigError where no matrix has one of the names.
    """
    check_installed()
    from peft import LoraConfig as Settings
    from peft import inject_adapter_in_model

    there = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    there = [name for name in there if not f"{name}.".startswith(HEADS)]
    known = {name.rpartition(".")[2] for name in there}
    for target in config.targets:
        if target not in known:
            said = nearest(target, known) if known else "; the model has none that could be adapted"
            raise ConfigError(f"trainer.lora.targets: no matrix is called '{target}'{said}")
    chosen = [name for name in there if name.rpartition(".")[2] in config.targets]
    settings = Settings(
        r=int(config.r), lora_alpha=config.alpha, lora_dropout=config.dropout, target_modules=chosen  # type: ignore[arg-type]
    )  # fmt: skip
    inject_adapter_in_model(settings, model, adapter_name=_NAME)
    for name, parameter in model.named_parameters():
        if name.startswith(TASK_HEAD):
            parameter.requires_grad_(True)


def plain_weights(model: nn.Module) -> dict[str, Tensor]:
    """All weights under the names that they have without adapters, these merged: W + (alpha / r) B A."""
    merged = {f"{name}.weight": _merged(module) for name, module in _adapted(model).items()}
    weights = {}
    for name, tensor in model.state_dict().items():
        if ".lora_" not in name:
            plain = name.replace(".base_layer.", ".")
            weights[plain] = merged.get(plain, tensor)
    return weights


def merge(model: nn.Module) -> None:
    """Puts merged matrices in the place of the adapted ones."""
    for name, module in _adapted(model).items():
        base = module.base_layer
        base.weight = nn.Parameter(_merged(module), requires_grad=base.weight.requires_grad)
        model.set_submodule(name, base)


def save_adapters(model: nn.Module, file: Path, base: str) -> None:
    """Writes A and B of every adapted matrix, and the head of a task; `base` is the sha256 of the weights that they belong to."""
    save_file(_learned(model), file, metadata={_BASE: base})


def load_adapters(model: nn.Module, file: Path, base: str) -> None:
    """Reads back what `save_adapters` wrote. Raises RecordError where it is not whole, or belongs to other weights."""
    try:
        with safe_open(file, framework="pt") as opened:
            before = (opened.metadata() or {}).get(_BASE)
            found = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise RecordError(f"{file} cannot be read: {error}") from error
    if before != base:
        raise RecordError(
            f"resume: the adapters in {file.parent} belong to weights (sha256 {str(before)[:12]}) that are not the last of "
            f"the run that they were trained on any more (now {base[:12]}); start from what they have become, merged, by "
            "init= with this run's id"
        )
    own = _learned(model)
    if {name: t.shape for name, t in own.items()} != {name: t.shape for name, t in found.items()}:
        raise RecordError(f"{file} does not fit the run's config")
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(found[name])


def n_trained(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def is_adapted(model: nn.Module) -> bool:
    return bool(_adapted(model))


def _adapted(model: nn.Module) -> dict[str, Any]:
    return {name: module for name, module in model.named_modules() if hasattr(module, "get_delta_weight")}


def _learned(model: nn.Module) -> dict[str, Tensor]:
    """All that is not as it was in the run whose weights are adapted."""
    return {name: t for name, t in model.state_dict().items() if ".lora_" in name or name.startswith(TASK_HEAD)}


@torch.no_grad()
def _merged(module: Any) -> Tensor:
    merged: Tensor = module.base_layer.weight + module.get_delta_weight(_NAME)
    return merged
