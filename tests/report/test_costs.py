"""The screen that a profile ends with, at the widths of a terminal and a wide one."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from ctxlab.records.run import Run
from ctxlab.records.schema import Measurement
from ctxlab.report.costs import kernel_lines, show_profile
from tests.records.builders import make_run, result
from tests.report.builders import written

GENERATION = "generation, batch 1"
STEP = "one training step, batch 1"
MIB = 2**20


def step(context: int, kernel: str = "native") -> list[Measurement]:
    memory: dict[str, Any] = {"total_bytes": (330 + 60) * MIB, "source": "VmHWM", "attention_kernel": kernel}
    said: dict[str, Any] = {"protocol": STEP, "facts": {"attention_kernel": kernel}}
    share: dict[str, Any] = {"protocol": STEP, "facts": {"matmul_flops_per_second": 95.5e9}}
    return [
        result("peak_memory_bytes", 60 * MIB, context, protocol=STEP, facts=memory),
        result("step_seconds", 0.25, context, **said),
        result("tokens_per_second", context / 0.25, context, **said),
        result("flops_per_second", 57.3e9, context, protocol=STEP),
        result("flops_utilization", 0.6, context, **share),
    ]


def generation(context: int) -> list[Measurement]:
    facts = {
        "prompt": context - 16, "decoded": 16, "cache_allocated_bytes": 8 * MIB, "peak_memory_bytes": 28 * MIB,
        "total_bytes": 345 * MIB, "attention_kernel": "native and torch", "decoding_kernel": "native",
    }  # fmt: skip
    return [
        result("prefill_seconds", 0.0883, context, protocol=GENERATION, facts=facts),
        result("decode_seconds_per_token", 0.0027, context, protocol=GENERATION, facts=facts),
        result("cache_bytes", 4 * MIB, context, protocol=GENERATION, facts=facts),
    ]


def without(names: Sequence[str], context: int, reason: str) -> list[Measurement]:
    return [result(name, None, context, status="out_of_memory", reason=reason) for name in names]


@pytest.fixture
def profiled(tmp_path: Path) -> Run:
    """A context that was measured and one that does not fit, neither in a step nor in generation."""
    run = make_run(tmp_path, status="done")
    run.measure(*step(1024), *generation(1024))
    run.measure(
        *without(("peak_memory_bytes", "step_seconds", "tokens_per_second"), 65536, "does not fit in 1 GiB"),
        *without(("prefill_seconds", "cache_bytes", "decode_seconds_per_token"), 65536, "does not fit in 1 GiB"),
    )
    return run


@pytest.mark.parametrize("width", [80, 120])
def test_a_profile_shows_totals_beside_peaks_and_what_ran(profiled: Run, width: int) -> None:
    console = Console(width=width, file=io.StringIO(), color_system=None)
    show_profile(profiled, console)
    lines = written(console).split("\n")
    assert max(map(len, lines)) <= width or lines[-1].startswith("run ")
    at = next(n for n, line in enumerate(lines) if line.startswith("context "))
    assert [line.split() for line in lines[at : at + 3]] == [
        ["context", "memory", "total", "step", "tokens/s", "FLOP/s", "of", "matmul", "peak"],
        ["1k", "60", "MiB", "390", "MiB", "250", "ms", "4.1k", "57.3", "G", "60%"],
        ["64k", "out", "of", "memory", "-", "-", "-", "-", "-"],
    ]
    assert "total: memory and the idle process together" in lines
    text = " ".join(lines)
    assert "of matmul peak: a step's operations against the best matmul measured here, 95.5 GFLOP/s" in text
    assert "MFU" not in text
    assert "attention kernel: native" in lines
    assert "decoding kernel: native" in lines
    at = lines.index("generation")
    assert [line.split() for line in lines[at + 1 : at + 4]] == [
        ["context", "prefill", "s/token", "cache", "allocated", "memory", "total"],
        ["1k", "88.3", "ms", "2.7", "ms", "4", "MiB", "8", "MiB", "28", "MiB", "345", "MiB"],
        ["64k", "out", "of", "memory", "-", "-", "-", "-", "-"],
    ]


def test_a_record_without_totals_has_no_column_of_them(tmp_path: Path) -> None:
    run = make_run(tmp_path, status="done")
    run.measure(*(m.model_copy(update={"facts": {}}) for m in step(1024)[:3]))
    console = Console(width=80, file=io.StringIO(), color_system=None)
    show_profile(run, console)
    lines = written(console).split("\n")
    assert ["context", "memory", "step", "tokens/s"] in [line.split() for line in lines]
    assert not any(line.startswith(("total", "attention kernel")) for line in lines)


def test_kernels_are_told_by_context_where_they_differ() -> None:
    assert kernel_lines([*step(256, "torch"), *step(512), *step(1024)]) == [
        "attention kernel: torch at 256; native at 512, 1k"
    ]
    assert kernel_lines([*step(512), *generation(512)]) == ["attention kernel: native"]
    assert kernel_lines(generation(512)) == []
