"""Measured points, each in a real process: repeatable, near the closed form, linear in the context, limited."""

from __future__ import annotations

import contextlib
import json
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ctxlab.errors import ConfigError, UndefinedBeyondTraining
from ctxlab.model import count
from ctxlab.model.base import build_model, read_parts
from ctxlab.model.position.base import POSITIONS
from ctxlab.model.transformer import Transformer
from ctxlab.profiling import measure
from ctxlab.profiling import point as points
from ctxlab.profiling.measure import Point, measure_step, run_point
from ctxlab.profiling.point import start_peak
from ctxlab.profiling.predict import Predictor
from ctxlab.records.run import Run
from ctxlab.records.schema import Measurement
from ctxlab.train import memory
from ctxlab.train.memory import peak_memory_bytes, total_memory_bytes
from tests.profiling.builders import MIB, closed, point
from tests.profiling.children import Parent

CPU = torch.device("cpu")
HAS_PROC = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks restart on Linux only")
LINE = (512, 1024, 2048)  # contexts that a line is laid through; the logits' part is the same at each from 128 on
kinds = pytest.mark.parametrize("kind", ["memory", "time", "turns", "generation"])
Start = Callable[[Point], "Future[dict[str, Any]]"]


@pytest.fixture(scope="module")
def start() -> Iterator[Start]:
    """Starts measuring the memory of a point in a process that begins from nothing, once for all tests that ask for it.

    Two at a time: a peak does not care who else is running.
    """
    with pytest.MonkeyPatch.context() as environment, ThreadPoolExecutor(2) as pool:
        environment.setenv("OMP_NUM_THREADS", "1")
        started: dict[str, Future[dict[str, Any]]] = {}

        def ask(asked: Point) -> Future[dict[str, Any]]:
            key = json.dumps(asked.__dict__)
            if key not in started:
                started[key] = pool.submit(run_point, asked, "memory", 300)
            return started[key]

        yield ask


@pytest.fixture(scope="module")
def forked() -> Iterator[Parent]:
    """Measures a point in a process that is forked from one for all tests."""
    parent = Parent()
    yield parent
    parent.close()


@pytest.fixture(scope="module")
def limited(forked: Parent) -> list[Measurement]:
    """The rows of two contexts whose processes may grow to 30 MiB over what the shorter takes in all; 2048 tokens take 60 MiB
    more.
    """
    limit = forked(point("nano", 64))["total_bytes"] + 30 * MIB
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "run_point", forked)
        return measure_step(point("nano", 64, memory_limit=limit, enough_seconds=0.1), (2048, 64), timeout=300)


def spec(asked: Point, what: str) -> dict[str, Any]:
    return {**asked.__dict__, "what": what, "plugins": []}


# Memory


@HAS_PROC
def test_memory_repeats_within_half_a_percent(start: Start) -> None:
    """At 220 MiB; what varies is a few hundred KiB of code that is mapped as others use it. A limit changes nothing."""
    asked = start(point("mini", 512)), start(point("mini", 512, memory_limit=16 * 2**30))
    first, again = (future.result() for future in asked)
    assert again["peak_memory_bytes"] == pytest.approx(first["peak_memory_bytes"], rel=0.005)
    assert again["source"] == "VmHWM"


@HAS_PROC
def test_memory_is_what_closed_forms_add_up_to(start: Start) -> None:
    """mini at 512, 11.4M weights: the peak stands where the backward pass begins.

    There weights, both moments and all activations are alive, and of the gradients only the head's; each further
    gradient comes as a block's activations go. So the sum of all four is an upper bound, and the sum with the head's
    gradient alone is met within 4.5%: the code of the kernels is 2% to 4% here, by the width of the processor's vectors.
    """
    at = point("mini", 512)
    result = start(at).result()
    parts = closed(at)
    head = 4 * at.vocab_size * at.model["d_model"]
    assert result["peak_memory_bytes"] < parts.all
    assert result["peak_memory_bytes"] == pytest.approx(parts.all - parts.gradients + head, rel=0.045)
    assert result["total_bytes"] - result["peak_memory_bytes"] > 100 * MIB, "torch takes more than that"


@HAS_PROC
def test_updates_within_backward_save_what_a_prediction_says(start: Start) -> None:
    """mini at 32 tokens: all gradients but one, 40 MiB of 11.4M weights."""
    at = point("mini", 32)
    points = at, replace(at, update="backward")
    measured = [future.result()["peak_memory_bytes"] for future in [start(one) for one in points]]
    predicted = [Predictor(one).memory(32).bytes for one in points]
    assert measured[0] - measured[1] == pytest.approx(predicted[0] - predicted[1], rel=0.05)
    assert measured[0] - measured[1] > 0.8 * closed(at).gradients


@HAS_PROC
def test_a_small_model_is_not_charged_for_what_a_process_needs_anyway(forked: Parent) -> None:
    """nano at 64 is 23 MiB by closed form. The code of its kernels, up to 16 MiB, is all that may come on top: what the
    first optimizer of a process imports is four times that.
    """
    used = forked(point("nano", 64))["peak_memory_bytes"]
    parts = closed(point("nano", 64))
    assert parts.all - parts.gradients < used < parts.all + 16 * MIB


def test_nothing_is_imported_between_the_idle_process_and_its_peak(forked: Parent) -> None:
    assert forked(point("nano", 64, optim="muon", recompute="block"))["imported"] == []


def slope(forked: Parent, position: str, model: str = "nano", **settings: Any) -> tuple[float, float]:
    """(bytes a token of the line through the peaks, largest distance from it over the span of the peaks)."""
    asked = [point(model, context, position, loss_chunk=128, **settings) for context in LINE]
    peaks = [forked(one)["peak_memory_bytes"] for one in asked]
    per_token, constant = np.polyfit(LINE, peaks, 1)
    off = max(abs(per_token * context + constant - peak) for context, peak in zip(LINE, peaks, strict=True))
    return per_token, off / (peaks[-1] - peaks[0])


def check_line(forked: Parent, position: str, model: str = "nano") -> None:
    """A peak of a + b L + c L^2 whose square were a tenth of the growth would stand 2% off the line."""
    per_token, off = slope(forked, position, model)
    assert off < 0.015
    low, high = (closed(point(model, context, position, loss_chunk=128)).activations for context in (LINE[0], LINE[-1]))
    assert per_token == pytest.approx((high - low) / (LINE[-1] - LINE[0]), rel=0.2)


@HAS_PROC
def test_memory_grows_linearly_with_the_context_under_a_learned_bias(forked: Parent) -> None:
    """Where a matrix of context by context would come from first. (Rope's would break the closed form above.)"""
    check_line(forked, "t5")


@HAS_PROC
def test_memory_of_a_recurrent_model_grows_linearly_and_as_the_closed_form_says(forked: Parent) -> None:
    check_line(forked, "none", "lstm_nano")


@HAS_PROC
@pytest.mark.slow
@pytest.mark.parametrize("position", ["rope", "alibi", "learned", "nope", "sinusoidal"])
def test_memory_grows_linearly_with_the_context_for_the_others(forked: Parent, position: str) -> None:
    check_line(forked, position)


@pytest.mark.slow
@pytest.mark.parametrize("position", ["rope", "alibi", "t5", "learned", "nope", "sinusoidal"])
def test_every_position_is_measured_in_every_precision_and_needs_less_with_recomputation(
    forked: Parent, position: str
) -> None:
    asked = {
        (precision, recompute): point("nano", 2048, position, precision=precision, recompute=recompute)
        for precision in ("fp32", "bf16")
        for recompute in ("none", "block")
    }
    used = {key: forked(one)["peak_memory_bytes"] for key, one in asked.items()}
    said = {key: Predictor(one).memory(one.context).bytes for key, one in asked.items()}
    frugal = [(("fp32", "none"), ("bf16", "none")), *(((p, "none"), (p, "block")) for p in ("fp32", "bf16"))]
    for lavish, other in frugal:
        saved = used[lavish] - used[other]
        assert saved > 0.1 * used[lavish]
        assert saved == pytest.approx(said[lavish] - said[other], abs=8 * MIB)  # what kernels bring is not the same


@pytest.mark.slow
def test_components_of_a_file_of_ones_own_are_measured(tmp_path: Path) -> None:
    """All of `ctxlab profile`, with a position that only a plugin knows."""
    (tmp_path / "mine.py").write_text(
        "from typing import Literal\n"
        "from ctxlab.model.position.base import POSITIONS\n"
        "from ctxlab.model.position.nope import NoPE\n"
        "@POSITIONS.register('mine')\n"
        "class Mine(NoPE):\n"
        "    class Config(NoPE.Config):\n"
        "        name: Literal['mine'] = 'mine'\n"
    )
    line = [
        "profile",
        "--plugin",
        "mine.py",
        "position=mine",
        "model=nano",
        "profile.contexts=[64,1k]",
        "paths.runs=runs",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "ctxlab", *line, "logger.mode=disabled"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (record,) = (tmp_path / "runs").glob("*/run.json")
    rows = [(m.context, m.name) for m in Run(record.parent).measurements() if m.value is not None]
    assert {context for context, name in rows if name == "step_seconds"} == {64, 1024}


# Limits


@HAS_PROC
def test_a_context_over_the_limit_is_a_row_and_the_next_is_measured(limited: Sequence[Measurement]) -> None:
    statuses = [(row.context, row.status) for row in limited]
    assert statuses == [(2048, "out_of_memory")] * 3 + [(64, "done")] * 3
    assert "does not fit in" in limited[0].reason
    used, seconds, speed = limited[3:]
    assert used.facts["total_bytes"] > (used.value or 0)
    assert seconds.facts["n_steps"] >= 3
    assert speed.value == pytest.approx(64 / (seconds.value or 0))


@kinds
def test_a_limit_below_the_idle_process_says_so(kind: str) -> None:
    with pytest.raises(MemoryError, match="before there is a model"):
        points.measure(spec(point("nano", 64, memory_limit=MIB), kind))


@HAS_PROC
@kinds
def test_every_kind_of_point_is_limited_and_the_limit_ends_with_it(kind: str) -> None:
    before = resource.getrlimit(resource.RLIMIT_DATA)
    with pytest.raises((RuntimeError, MemoryError)):
        points.measure(spec(point("small", 4096, memory_limit=start_peak(CPU) + 64 * MIB), kind))
    assert resource.getrlimit(resource.RLIMIT_DATA) == before


@pytest.mark.parametrize("kind", ["memory", "generation"])
def test_a_peak_over_the_limit_does_not_fit_where_nothing_holds_the_process_to_it(
    monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(points, "_limited", lambda limit, idle, device: contextlib.nullcontext())
    asked = spec(point("nano", 64, memory_limit=2**40), kind)
    found = points.measure(asked)
    assert found["total_bytes"] - found["peak_memory_bytes"] > 100 * MIB
    with pytest.raises(MemoryError):
        points.measure({**asked, "memory_limit": 100 * MIB})


@pytest.mark.parametrize(
    ("error", "limit", "status", "reason"),
    [
        (MemoryError(), 2**30, "out_of_memory", "does not fit in 1 GiB"),
        (MemoryError("first"), 2**30, "out_of_memory", "does not fit in 1 GiB (first)"),
        (RuntimeError("CPUAllocator: can't allocate memory"), 2**30, "out_of_memory", "does not fit in 1 GiB"),
        (MemoryError(), None, "out_of_memory", "no memory is left"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried\nmore"), None, "out_of_memory", "CUDA out of memory. Tried"),
        (RuntimeError("CUBLAS_STATUS_ALLOC_FAILED"), None, "out_of_memory", "CUBLAS_STATUS_ALLOC_FAILED"),
        (RuntimeError("mat1 and mat2\nhave shapes"), None, "failed", "RuntimeError: mat1 and mat2"),
        (ValueError("cannot allocate"), None, "failed", "ValueError: cannot allocate"),
        (KeyError(), None, "failed", "KeyError"),
        (ConfigError("position: no position is called 'x'"), None, "failed", "position: no position is called 'x'"),
        (UndefinedBeyondTraining("position 9: ends"), None, "undefined", "position 9: ends"),
    ],
)  # fmt: skip
def test_errors_become_results(error: Exception, limit: int | None, status: str, reason: str) -> None:
    assert points._without_result(error, limit) == {"status": status, "reason": reason}


# Where figures come from


@HAS_PROC
def test_a_peak_starts_anew_and_sees_what_comes_after() -> None:
    torch.ones(32 * MIB // 4)  # blocks of this size go back to the system at once
    before, _ = peak_memory_bytes()
    torch.ones(96 * MIB // 4)
    high, source = peak_memory_bytes()
    assert source == "VmHWM"
    idle = start_peak(CPU)
    assert idle < high
    torch.ones(64 * MIB // 4)
    assert peak_memory_bytes()[0] - idle == pytest.approx(64 * MIB, rel=0.02)
    assert before <= high


def test_without_proc_ru_maxrss_stands_in_and_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_STATUS", tmp_path / "missing")
    for platform, unit in (("linux", 1024), ("darwin", 1)):
        monkeypatch.setattr(sys, "platform", platform)
        expected = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        assert peak_memory_bytes(CPU) == (expected, "ru_maxrss")
    monkeypatch.undo()
    monkeypatch.setattr(memory, "_STATUS", tmp_path / "missing")
    result = points.measure(spec(point("nano", 32), "memory"))
    assert result["source"] == "ru_maxrss"
    assert 0 <= result["peak_memory_bytes"] < result["total_bytes"]


def test_a_status_file_without_a_peak_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "status").write_text("Name:\tpython\nVmRSS:\t5 kB\n")
    monkeypatch.setattr(memory, "_STATUS", tmp_path / "status")
    assert peak_memory_bytes(CPU)[1] == "ru_maxrss"


def test_the_machine_has_more_memory_than_this_process_used() -> None:
    assert peak_memory_bytes()[0] < total_memory_bytes() < 2**50


@pytest.mark.parametrize(("memory_tokens", "seen"), [(0, None), (32, 32)])
def test_every_measured_step_of_a_recurrent_model_sees_a_full_memory(
    monkeypatch: pytest.MonkeyPatch, memory_tokens: int, seen: int | None
) -> None:
    hidden, held = Transformer.hidden, []

    def recorded(self: Transformer, tokens: torch.Tensor, **options: Any) -> torch.Tensor:
        memory = options["memory"]
        held.append(None if memory is None else int(memory.held))
        return hidden(self, tokens, **options)

    monkeypatch.setattr(Transformer, "hidden", recorded)
    attention = {"name": "recurrent", "size": 16, "memory": memory_tokens}
    for what in ("memory", "time"):
        points.measure(spec(point("nano", 64, attention=attention, enough_seconds=0.1), what))
    assert len(held) > 4
    assert set(held) == {seen}


# Time


def test_time_is_of_several_steps_after_a_first_one() -> None:
    result = points.measure(spec(point("nano", 32, precision="bf16"), "time"))
    assert result["n_steps"] >= points.MIN_STEPS
    assert 0 < result["best_seconds"] <= result["step_seconds"]


def test_slow_steps_are_few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of 2 s: three make a median, unless one alone is ten times `enough_seconds`."""
    for enough, expected in ((0.1, 1), (1.0, 3), (100.0, 3)):
        clock = iter(range(0, 1000, 2))
        monkeypatch.setattr(points.time, "perf_counter", lambda clock=clock: float(next(clock)))
        result = points.measure(spec(point("nano", 8, enough_seconds=enough), "time"))
        step = {"step_seconds": 2.0, "best_seconds": 2.0, "n_steps": expected}
        assert result == {**step, "attention_kernel": "torch"}


# Generation


def reading(context: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[dict[str, Any], list[int]]:
    """What is found of a nano that reads `context` tokens, by a clock that each forward moves on by the square of its tokens;
    and how many tokens each forward had."""
    monkeypatch.setenv("CTXLAB_CACHE", str(tmp_path))  # where there is no kernel
    read: list[int] = []
    asked, clock = point("nano", context), [0.0]
    model = build_model(read_parts(asked.__dict__), vocab_size=asked.vocab_size, context=context)
    hidden = model.hidden

    def recorded(tokens: torch.Tensor, **options: Any) -> torch.Tensor:
        assert options["cache"].length == (0 if len(read) < 3 else context - 16 + len(read) - 3)
        read.append(tokens.shape[1])
        clock[0] += tokens.shape[1] ** 2
        return hidden(tokens, **options)

    monkeypatch.setattr(model, "hidden", recorded)
    monkeypatch.setattr(points.time, "perf_counter", lambda: clock[0])
    return points.generation(model, torch.zeros(1, context, dtype=torch.int64), "fp32", CPU), read


def test_generation_reads_thrice_and_decodes_what_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 116 tokens 100 are read and 16 decoded. Keys and values of a layer's 4 heads of 32 have had room for as many tokens as
    were read and get twice that with the first of the others; so have positions, 8 bytes each.
    """
    found, read = reading(116, tmp_path, monkeypatch)
    assert read == [100] * 3 + [1] * 16
    held = 4 * 2 * 4 * 32 * 4  # layers, keys and values, heads, wide, bytes of a number
    assert found == {
        "prefill_seconds": 100.0**2, "decode_seconds_per_token": 1.0, "cache_bytes": 116 * held,
        "cache_allocated_bytes": 200 * (held + 8), "prompt": 100, "decoded": 16, "decoding_kernel": "torch",
    }  # fmt: skip
    parts = read_parts(point("nano", 116).__dict__)
    assert found["cache_bytes"] == count.kv_cache_bytes(*parts, length=116)


def test_one_token_is_read_and_nothing_decoded() -> None:
    found = points.measure(spec(point("nano", 1), "generation"))
    assert (found["prompt"], found["decoded"], found["decode_seconds_per_token"]) == (1, 0, None)
    assert found["prefill_seconds"] > 0
    assert found["cache_bytes"] == 4 * 2 * 4 * 32 * 4


@pytest.mark.parametrize(
    ("kind", "context", "kernel", "ran"),
    [
        ("memory", 512, "auto", "native"), ("time", 512, "auto", "native"), ("generation", 528, "auto", "native"),
        ("generation", 64, "auto", "native and torch"),
        ("memory", 512, "torch", "torch"), ("time", 64, "auto", "torch"),
    ],
)  # fmt: skip
def test_a_point_names_the_kernel_that_ran(
    kind: str, context: int, kernel: str, ran: str, native_kernel: Callable[[], str]
) -> None:
    asked = point("nano", context, attention={"name": "full", "kernel": kernel}, enough_seconds=0.01)
    found = points.measure(spec(asked, kind))
    assert found["attention_kernel"] == ran
    assert found.get("decoding_kernel") == ("native" if kind == "generation" else None)


def test_what_has_no_softmax_names_no_kernel() -> None:
    for asked in (point("nano", 16, "nope", attention={"name": "linear"}), point("lstm_nano", 16)):
        assert "attention_kernel" not in points.measure(spec(asked, "memory"))


def test_every_registered_position_has_a_point() -> None:
    """A scheme's settings go to another process and come back as they were."""
    for name in POSITIONS.names():
        config = POSITIONS.get(name).Config(name=name)
        assert POSITIONS.config(json.loads(config.model_dump_json())) == config


class Costly:
    """Stands for a square matrix: a product of two moves the clock on by what it costs at so many operations a second."""

    clock = 0.0
    rates: dict[int, float] = {}  # noqa: RUF012

    def __init__(self, size: int, *_: Any, **__: Any) -> None:
        self.size = size

    def __matmul__(self, other: Costly) -> None:
        Costly.clock += 2 * self.size**3 / Costly.rates[self.size]


# Of the second, a product of 2,048 would take 17 s by the rate before it: that size is left out.
FAST, EMULATED = {256: 1e10, 512: 4e10, 1024: 8e10, 2048: 6e10}, {256: 1e9, 512: 2e9, 1024: 1e9, 2048: 5e9}


@pytest.mark.parametrize(("rates", "best", "at"), [(FAST, 8e10, 1024), (EMULATED, 2e9, 512)])
def test_the_rate_of_a_matmul_is_that_of_the_best_size_that_the_time_allows(
    monkeypatch: pytest.MonkeyPatch, rates: dict[int, float], best: float, at: int
) -> None:
    monkeypatch.setattr(Costly, "rates", rates)
    monkeypatch.setattr(Costly, "clock", 0.0)
    monkeypatch.setattr(points.torch, "randn", Costly)
    monkeypatch.setattr(points.time, "perf_counter", lambda: Costly.clock)
    found = points.matmul_rate("fp32", CPU, 3.0)
    assert found["flops_per_second"] == pytest.approx(best, rel=1e-9)
    assert found["size"] == at
    assert Costly.clock < 12.0
