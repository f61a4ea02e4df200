"""Which number format a run computes in, and on which device."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Literal

import torch

from ctxlab.errors import ConfigError

Precision = Literal["fp32", "bf16"]

_CPUINFO = Path("/proc/cpuinfo")
_BF16_FLAGS = {"amx_bf16", "avx512_bf16", "bf16"}  # the last one is Arm's


def resolve_device(accelerator: str) -> torch.device:
    """`auto` takes a CUDA device when there is one; asking for a GPU that is not there is refused."""
    if accelerator == "gpu" and not torch.cuda.is_available():
        raise ConfigError("trainer.accelerator: no CUDA device is available here (gpu); use cpu or auto")
    use_gpu = accelerator in ("auto", "gpu") and torch.cuda.is_available()
    return torch.device("cuda" if use_gpu else "cpu")


def multiplies_bf16(device: torch.device) -> bool:
    """Whether a device multiplies bf16 in hardware; where not, a bf16 matmul is many times slower than an fp32 one."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return cpu_accelerates_bf16()


def cpu_accelerates_bf16() -> bool:
    """Whether this CPU multiplies bf16 in hardware (AMX, AVX512-bf16, Arm bf16), not only stores it."""
    if not _CPUINFO.exists():
        return False
    return not _BF16_FLAGS.isdisjoint(_CPUINFO.read_text().split())


def resolve_precision(setting: str, device: torch.device) -> Precision:
    """`auto` is bf16 (autocast, fp32 weights) where the hardware accelerates it, else fp32."""
    if setting == "fp32":
        return "fp32"
    if setting == "bf16":
        return "bf16"
    return "bf16" if multiplies_bf16(device) else "fp32"


def precision_of_runs(setting: str, device: torch.device, trained: Iterable[str | None]) -> Precision:
    """For runs that are used again: as `resolve_precision`, but where one was trained in fp32, `auto` is fp32 for all.

    `trained` is what they were trained in, None where that is not known. So a run is scored as it was at the end of its training.
    """
    return "fp32" if setting == "auto" and "fp32" in trained else resolve_precision(setting, device)


def autocast(precision: Precision, device: torch.device) -> AbstractContextManager[object]:
    """The context in which a forward pass of this precision runs. Weights stay fp32; cached casts are kept."""
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(device_type=device.type, dtype=torch.bfloat16)
