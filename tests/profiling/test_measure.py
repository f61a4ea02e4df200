"""Every end that a child process can come to, told by children that do nothing else; which process runs under what."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ctxlab.errors import RunError
from ctxlab.model.position.base import POSITIONS
from ctxlab.model.position.nope import NoPE
from ctxlab.profiling import measure
from ctxlab.profiling.measure import (
    EXACT_ALLOCATOR,
    MeasureConfig,
    Point,
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
    assert spec == {**nano(recompute="block", loss_chunk=96).__dict__, "what": "memory", "plugins": []}


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
USED = {"status": "done", "peak_memory_bytes": 3_000_000, "total_bytes": 9_000_000, "source": "VmHWM"}
TIMED = {"status": "done", "step_seconds": 0.5, "best_seconds": 0.25, "n_steps": 4}


def table(
    monkeypatch: pytest.MonkeyPatch, children: Children, contexts: tuple[int, ...]
) -> dict[tuple[int | None, str], Measurement]:
    monkeypatch.setattr(measure, "run_point", children)
    rows = measure_step(nano(memory_limit=2**30), contexts, timeout=9)
    return {(row.context, row.name): row for row in rows}


def test_a_context_has_memory_time_and_speed_with_their_facts(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = table(monkeypatch, Children({(128, "memory"): USED, (128, "time"): TIMED}), (128,))
    assert set(rows) == {(128, name) for name in NAMES}
    memory = rows[128, "peak_memory_bytes"]
    assert (memory.value, memory.facts) == (3_000_000, {"total_bytes": 9_000_000, "source": "VmHWM"})
    assert (rows[128, "step_seconds"].value, rows[128, "tokens_per_second"].value) == (0.5, 256.0)
    assert rows[128, "step_seconds"].facts == {"best_seconds": 0.25, "n_steps": 4}
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
    assert children.asked == [(64, "memory", 2**30), (128, "memory", 2**30), (128, "time", None)]
    assert [(rows[64, name].status, rows[64, name].reason) for name in NAMES] == [tuple(full.values())] * 3


def test_settings_read_units() -> None:
    config = MeasureConfig.model_validate_json('{"contexts": [512, "2k"], "memory": "16GiB", "timeout": "5min"}')
    assert (config.contexts, config.memory, config.timeout) == ((512, 2048), 16 * 2**30, 300.0)
