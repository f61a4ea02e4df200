"""bf16 by itself only where the hardware multiplies it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ctxlab.errors import ConfigError
from ctxlab.train import precision
from ctxlab.train.precision import precision_of_runs, resolve_device, resolve_precision

CPU = torch.device("cpu")
X86 = "processor\t: 0\nmodel name\t: {}\nflags\t\t: fpu sse2 avx2 avx512f avx512_vnni {}\nbogomips\t: 4400.00\n"
ARM = "processor\t: 0\nBogoMIPS\t: 243.75\nFeatures\t: fp asimd evtstrm aes {} sve\nCPU implementer\t: 0x41\n"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (X86.format("a", "avx512_bf16"), "bf16"),
        (X86.format("a", "amx_bf16 amx_tile"), "bf16"),
        (X86.format("a", ""), "fp32"),
        (X86.format("a", "avx512_bf16x amx_int8 avx512_fp16"), "fp32"),
        (ARM.format("bf16"), "bf16"),
        (ARM.format("svebf16x i8mm"), "fp32"),
        ("", "fp32"),
    ],
)
def test_auto_is_bf16_where_the_processor_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, expected: str
) -> None:
    (tmp_path / "cpuinfo").write_text(text)
    monkeypatch.setattr(precision, "_CPUINFO", tmp_path / "cpuinfo")
    assert resolve_precision("auto", CPU) == expected
    assert resolve_precision("fp32", CPU) == "fp32"
    assert resolve_precision("bf16", CPU) == "bf16"


def test_auto_is_fp32_where_nobody_can_be_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "_CPUINFO", tmp_path / "nothing")
    assert resolve_precision("auto", CPU) == "fp32"


def test_a_gpu_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"^trainer.accelerator: no CUDA device is available here"):
        resolve_device("gpu")
    assert resolve_device("auto") == resolve_device("cpu") == CPU


def test_a_run_trained_in_fp32_is_used_again_in_fp32(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cpuinfo").write_text("flags : amx_bf16\n")
    monkeypatch.setattr(precision, "_CPUINFO", tmp_path / "cpuinfo")
    assert precision_of_runs("auto", CPU, ["bf16", None]) == "bf16"
    assert precision_of_runs("auto", CPU, ["bf16", "fp32"]) == "fp32"
    assert precision_of_runs("bf16", CPU, ["fp32"]) == "bf16"
    monkeypatch.setattr(precision, "_CPUINFO", tmp_path / "nothing")
    assert precision_of_runs("auto", CPU, ["bf16"]) == "fp32"
