"""Every end that a child process can come to, told by children that do nothing else; which process runs under what."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ctxlab.errors import IncompatibleError, RunError
from ctxlab.model.position.base import POSITIONS
from ctxlab.model.position.nope import NoPE
from ctxlab.profiling import measure
from ctxlab.profiling.measure import (
    EXACT_ALLOCATOR,
    MeasureConfig,
    Point,
    arithmetic,
    measure_generation,
    measure_step,
    plugin_files,
    run_point,
    steps_in_turns,
)
from ctxlab.records.schema import Measurement
from tests.profiling.builders import point

Child = Callable[[str], None]


@pytest.fixture
def child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Child:
    """Sets what the child process does instead of measuring: a shell script."""

    def do(script: str) -> None:
        file = tmp_path / "python"
        file.write_text(f"#!/bin/sh\n{script}\n")
        file.chmod(0o700)
        monkeypatch.setattr(sys, "executable", str(file))

    return do


def nano(**settings: Any) -> Point:
    return point("nano", 64, **settings)


# Several processes in turns


def test_points_run_one_step_each_in_turn(child: Child, tmp_path: Path) -> None:
    log = tmp_path / "log"
    child(f"""read -r spec; name=$(echo "$spec" | grep -o '"context": [0-9]*'); echo ready
        while read -r line; do echo "$name" >> {log}; echo ready; done
        echo '{{"status": "done", "seconds": [1.5, 2.5]}}'""")
    points = [point("nano", context) for context in (64, 128)]
    assert steps_in_turns(points, 2) == [[1.5, 2.5], [1.5, 2.5]]
    assert log.read_text().splitlines() == ['"context": 64', '"context": 128'] * 2


def test_a_point_that_cannot_be_measured_ends_the_turns_of_all(child: Child, tmp_path: Path) -> None:
    child(f"""echo $$ >> {tmp_path}/pids; read -r spec
        case "$spec" in *'"context": 64'*) echo ready; exec sleep 60;; esac
        echo '{{"status": "failed", "reason": "no room here"}}'""")
    with pytest.raises(RunError, match=r"^no room here$"):
        steps_in_turns([point("nano", 64), point("nano", 128)], 1)
    for pid in (tmp_path / "pids").read_text().split():
        assert not Path(f"/proc/{pid}").exists()
    child("read -r spec; exit 3")
    with pytest.raises(RunError, match=r"^a point ended with exit code 3$"):
        steps_in_turns([point("nano", 64)], 1)


def test_steps_in_turns_are_real_steps() -> None:
    found = steps_in_turns([nano(), nano(recompute="block")], 2)
    assert [len(seconds) for seconds in found] == [2, 2]
    assert all(second > 0 for seconds in found for second in seconds)


# One process


def test_a_child_gets_the_whole_point_and_its_line_is_the_result(child: Child, tmp_path: Path) -> None:
    child(f"""cat > {tmp_path}/spec; echo '{{"status": "done", "peak_memory_bytes": 5}}'""")
    assert run_point(nano(recompute="block", loss_chunk=96), "memory", 10) == {"status": "done", "peak_memory_bytes": 5}
    spec = json.loads((tmp_path / "spec").read_text())
    asked = nano(recompute="block", loss_chunk=96).__dict__
    assert spec == {**asked, "freeze": [], "what": "memory", "plugins": []}  # JSON has no tuples


def test_memory_is_measured_under_the_exact_allocator_and_time_under_the_default_one(
    child: Child, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = sorted(EXACT_ALLOCATOR)
    shown = ", ".join(f'"{name}": "\'"${name}"\'"' for name in names)
    child(f"""echo '{{"status": "done", {shown}}}'""")
    monkeypatch.setenv(names[0], "1234")  # what a user's own shell says counts for neither
    used, timed = run_point(nano(), "memory", 10), run_point(nano(), "time", 10)
    assert {name: used[name] for name in names} == EXACT_ALLOCATOR
    assert {name: timed[name] for name in names} == dict.fromkeys(names, "")
    assert EXACT_ALLOCATOR == {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}


@pytest.mark.parametrize(
    ("script", "status", "reason"),
    [
        ("kill -9 $$", "out_of_memory", "killed by the system"),
        ("kill -11 $$", "failed", "killed by SIGSEGV"),
        ("echo Traceback >&2; echo 'ImportError: no torch' >&2; exit 1", "failed", "ImportError: no torch"),
        ("exit 3", "failed", "exit code 3"),
        ("exit 0", "failed", "exit code 0"),
        ("printf '\\377\\n' >&2; exit 1", "failed", "�"),
        ("""echo '{"status": "out_of_memory", "reason": "does not fit"}'""", "out_of_memory", "does not fit"),
    ],
)
def test_an_end_without_a_number_is_a_result(child: Child, script: str, status: str, reason: str) -> None:
    child(script)
    assert run_point(nano(), "memory", 10) == {"status": status, "reason": reason}


def test_a_child_looks_for_the_kernel_where_its_parent_keeps_it(child: Child, monkeypatch: pytest.MonkeyPatch) -> None:
    child("""echo '{"status": "done", "cache": "'"$CTXLAB_CACHE"'"}'""")
    monkeypatch.setenv("CTXLAB_CACHE", "/somewhere/else")
    assert run_point(nano(), "time", 10)["cache"] == "/somewhere/else"


def test_a_child_that_takes_too_long_is_killed(child: Child, tmp_path: Path) -> None:
    child(f"echo $$ > {tmp_path}/pid; exec sleep 600")
    assert run_point(nano(), "time", 0.5) == {"status": "timed_out", "reason": "took longer than 500 ms"}
    pid = (tmp_path / "pid").read_text().strip()
    assert not Path("/proc/self").exists() or not Path(f"/proc/{pid}").exists()


def test_components_from_outside_the_package_go_along(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "mine.py"
    file.write_text("")
    monkeypatch.setitem(sys.modules, "of_mine", type(sys)("of_mine"))
    monkeypatch.setattr(sys.modules["of_mine"], "__file__", str(file), raising=False)
    POSITIONS.names()
    monkeypatch.setitem(POSITIONS._classes, "mine", type("Mine", (NoPE,), {"__module__": "of_mine"}))
    assert plugin_files(nano(position="mine")) == [("of_mine", str(file))]
    assert plugin_files(nano(position="alibi", optim="muon")) == []


# The table


class Children:
    """Stands for `run_point`: results by (context, what), and what was asked."""

    def __init__(self, results: dict[tuple[int, str], dict[str, Any]]) -> None:
        self.results = results
        self.asked: list[tuple[int, str, int | None]] = []

    def __call__(self, point: Point, what: str, timeout: float) -> dict[str, Any]:
        self.asked.append((point.context, what, point.memory_limit))
        return dict(self.results[point.context, what])


NAMES = ("peak_memory_bytes", "step_seconds", "tokens_per_second")
USED = {
    "status": "done", "peak_memory_bytes": 3_000_000, "total_bytes": 9_000_000, "source": "VmHWM",
    "attention_kernel": "native",
}  # fmt: skip
TIMED = {"status": "done", "step_seconds": 0.5, "best_seconds": 0.25, "n_steps": 4, "attention_kernel": "torch"}
READ = {
    "status": "done", "prefill_seconds": 0.5, "decode_seconds_per_token": 0.125, "cache_bytes": 4096,
    "cache_allocated_bytes": 8192, "prompt": 112, "decoded": 16, "peak_memory_bytes": 3_000_000, "total_bytes": 9_000_000,
    "source": "VmHWM", "attention_kernel": "native and torch", "decoding_kernel": "native",
}  # fmt: skip
GIB = 2**30


def table(
    monkeypatch: pytest.MonkeyPatch, children: Children, contexts: tuple[int, ...]
) -> dict[tuple[int | None, str], Measurement]:
    monkeypatch.setattr(measure, "run_point", children)
    rows = measure_step(nano(memory_limit=2**30), contexts, timeout=9)
    return {(row.context, row.name): row for row in rows}


def without(result: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in result.items() if name not in names}


def test_a_context_has_memory_time_and_speed_with_their_facts(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = table(monkeypatch, Children({(128, "memory"): USED, (128, "time"): TIMED}), (128,))
    assert set(rows) == {(128, name) for name in NAMES}
    memory = rows[128, "peak_memory_bytes"]
    facts = {"recompute": "none", **without(USED, "status", "peak_memory_bytes")}
    assert (memory.value, memory.facts) == (3_000_000, facts)
    assert (rows[128, "step_seconds"].value, rows[128, "tokens_per_second"].value) == (0.5, 256.0)
    assert rows[128, "step_seconds"].facts == without(TIMED, "status", "step_seconds")
    assert rows[128, "tokens_per_second"].facts["attention_kernel"] == "torch"
    assert {row.protocol for row in rows.values()} == {"one training step, batch 1"}


def test_a_point_without_a_number_is_rows_and_the_next_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    late = {"status": "timed_out", "reason": "took longer than 9 s"}
    children = Children(
        {
            (64, "memory"): USED, (64, "time"): late,
            (128, "memory"): {"status": "failed", "reason": "killed by SIGSEGV"}, (128, "time"): TIMED,
            (256, "memory"): USED, (256, "time"): TIMED,
        }
    )  # fmt: skip
    rows = table(monkeypatch, children, (64, 128, 256))
    statuses = {context: [rows[context, name].status for name in NAMES] for context in (64, 128, 256)}
    assert statuses == {
        64: ["done", "timed_out", "timed_out"],
        128: ["failed", "done", "done"],
        256: ["done", "done", "done"],
    }
    assert rows[64, "tokens_per_second"].reason == "took longer than 9 s"


def test_what_does_not_fit_is_not_run_again_for_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    full = {"status": "out_of_memory", "reason": "does not fit in 1 GiB"}
    children = Children({(64, "memory"): full, (128, "memory"): USED, (128, "time"): TIMED})
    rows = table(monkeypatch, children, (64, 128))
    assert [asked[:2] for asked in children.asked] == [(64, "memory"), (128, "memory"), (128, "time")]
    assert [(rows[64, name].status, rows[64, name].reason) for name in NAMES] == [tuple(full.values())] * 3


@pytest.mark.parametrize(
    ("device", "limit", "machine", "timing"),
    [
        ("cpu", GIB, 16 * GIB, 2 * GIB),
        ("cpu", GIB, 3 * GIB // 2, 3 * GIB // 2),
        ("cpu", GIB, GIB // 2, GIB),
        ("cuda", GIB, 16 * GIB, GIB),
        ("cpu", None, 16 * GIB, None),
    ],
)
def test_time_is_held_to_the_limit_with_room_for_what_its_allocator_keeps(
    monkeypatch: pytest.MonkeyPatch, device: str, limit: int | None, machine: int, timing: int | None
) -> None:
    monkeypatch.setattr(measure, "total_memory_bytes", lambda: machine)
    children = Children({(64, "memory"): USED, (64, "time"): TIMED, (64, "generation"): READ})
    monkeypatch.setattr(measure, "run_point", children)
    limited = nano(memory_limit=limit, device=device)
    measure_step(limited, (64,), timeout=9)
    measure_generation(limited, (64,), timeout=9)
    assert children.asked == [(64, "memory", limit), (64, "time", timing), (64, "generation", limit)]


def test_a_step_that_only_its_time_has_no_room_for_keeps_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    full = {"status": "out_of_memory", "reason": "does not fit in 2 GiB"}
    rows = table(monkeypatch, Children({(64, "memory"): USED, (64, "time"): full}), (64,))
    assert rows[64, "peak_memory_bytes"].value == 3_000_000
    for name in NAMES[1:]:
        row = rows[64, name]
        assert (row.value, row.status) == (None, "out_of_memory")
        assert row.reason == "does not fit in 2 GiB under the default allocator, where a step is timed"


def test_generation_is_rows_with_their_facts(monkeypatch: pytest.MonkeyPatch) -> None:
    full = {"status": "out_of_memory", "reason": "does not fit in 1 GiB"}
    alone = {**READ, "prompt": 1, "decoded": 0, "decode_seconds_per_token": None}
    children = Children({(1, "generation"): alone, (128, "generation"): READ, (256, "generation"): full})
    monkeypatch.setattr(measure, "run_point", children)
    said: list[str] = []
    rows = measure_generation(nano(), (1, 128, 256), timeout=9, advance=said.append)
    assert said == ["generation at 1", "generation at 128", "generation at 256"]
    assert {row.protocol for row in rows} == {"generation, batch 1"}
    found = [(row.context, row.name, row.value, row.unit) for row in rows]
    assert found == [
        (1, "prefill_seconds", 0.5, "s"), (1, "cache_bytes", 4096, "B"),
        (128, "prefill_seconds", 0.5, "s"), (128, "cache_bytes", 4096, "B"),
        (128, "decode_seconds_per_token", 0.125, "s/token"),
        (256, "prefill_seconds", None, "s"), (256, "cache_bytes", None, "B"),
        (256, "decode_seconds_per_token", None, "s/token"),
    ]  # fmt: skip
    assert {row.reason for row in rows if row.context == 256} == {"does not fit in 1 GiB"}
    expected = without(READ, "status", "source", "prefill_seconds", "decode_seconds_per_token", "cache_bytes")
    assert all(row.facts == expected for row in rows if row.context == 128)


def test_the_rate_of_a_step_by_hand() -> None:
    """nano at 64: blocks of 4 128^2 + 3 128 384 = 212,992 weights, four of them, and a head of 2,048 x 128 make N = 1,114,112.

    6 N + 12 L H D context = 6,684,672 + 12 4 4 32 64 = 7,077,888 a token, 452,984,832 a step.
    """
    used, timed, speed = (
        Measurement(name=name, value=0.5, unit=unit, context=64)
        for name, unit in zip(NAMES, ("B", "s", "tokens/s"), strict=True)
    )
    late = Measurement(name="step_seconds", value=None, unit="s", context=128, status="timed_out", reason="late")
    rate, share = arithmetic(nano(), [used, timed, speed, late], 2e9)
    assert (rate.name, rate.context, rate.value, rate.unit) == ("flops_per_second", 64, 905_969_664.0, "FLOP/s")
    assert rate.facts == {"flops": 452_984_832.0}
    assert (share.name, share.value) == ("flops_utilization", pytest.approx(0.452984832, rel=1e-12))
    assert share.facts == {"matmul_flops_per_second": 2e9}
    assert arithmetic(nano(), [used, timed, speed, late], None) == [rate]


@pytest.mark.parametrize(
    ("generation", "architecture", "expected"),
    [
        ("auto", "decoder", True), ("auto", "encoder_decoder", True), ("auto", "lstm", True), ("auto", "encoder", False),
        (True, "decoder", True), (False, "decoder", False), (False, "encoder", False),
    ],
)  # fmt: skip
def test_generation_is_of_models_that_write(generation: Any, architecture: str, expected: bool) -> None:
    assert MeasureConfig(generation=generation).generates(architecture) is expected


def test_generation_of_a_model_that_writes_nothing_is_refused() -> None:
    with pytest.raises(IncompatibleError, match=r"^profile\.generation: model\.architecture=encoder writes no text"):
        MeasureConfig(generation=True).generates("encoder")


def test_settings_read_units() -> None:
    config = MeasureConfig.model_validate_json('{"contexts": [512, "2k"], "memory": "16GiB", "timeout": "5min"}')
    assert (config.contexts, config.memory, config.timeout) == ((512, 2048), 16 * 2**30, 300.0)
