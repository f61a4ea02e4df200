"""The pool: every end of a cell is a status. The cells here are tiny scripts, not trainings."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from ctxlab.errors import RecordError
from ctxlab.launch import (
    LOG,
    Child,
    Pool,
    Sweep,
    group_memory,
    last_metrics,
    log_lines,
    new_sweep_id,
    read_sweep,
    sweep_folder,
    write_sweep,
)
from ctxlab.records.store import Run, RunStore

PREAMBLE = """
import sys, time, os, signal
from pathlib import Path
from ctxlab.records.store import RunStore
folder = Path(sys.argv[1])
run = RunStore(folder.parent).open(str(folder))
"""
DONE = PREAMBLE + "run.finish('done')"


@pytest.fixture
def store(tmp_path: Path) -> RunStore:
    return RunStore(tmp_path / "runs")


def cell(store: RunStore, number: int = 0) -> Run:
    return store.create(
        "train",
        "cell",
        config={"seed": number},
        line="ctxlab train",
        sweep={"id": "s-abcd", "cell": number},
        status="waiting",
    )


def script(text: str) -> Callable[[Run], list[str]]:
    return lambda run: [sys.executable, "-c", textwrap.dedent(text), str(run.path)]


def after(store: RunStore, text: str, **limits: float) -> tuple[str, str]:
    """Status and reason of one cell that runs `text`."""
    run = cell(store)
    Pool(jobs=1, command=script(text), **limits).execute([run])  # type: ignore[arg-type]
    record = store.open(run.id).record
    return record.status, record.reason


def test_done(store: RunStore) -> None:
    assert after(store, DONE) == ("done", "")


def test_what_a_cell_says_itself_stays(store: RunStore) -> None:
    assert after(store, PREAMBLE + "run.finish('failed', 'the loss became nan'); sys.exit(1)") == (
        "failed",
        "the loss became nan",
    )


def test_failed_takes_the_last_line_of_the_log(store: RunStore) -> None:
    assert after(store, "import sys; print('error: no such corpus', file=sys.stderr); sys.exit(2)") == (
        "failed",
        "no such corpus",
    )


def test_failed_without_a_word(store: RunStore) -> None:
    assert after(store, "import sys; sys.exit(7)") == ("failed", "exit code 7")
    assert after(store, "pass") == ("failed", "ended without a result")


def test_killed(store: RunStore) -> None:
    status, reason = after(store, "import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    assert status == "killed"
    assert reason.startswith("killed by SIGKILL")


def test_timed_out(store: RunStore) -> None:
    status, reason = after(store, "import time; time.sleep(60)", timeout=0.3)
    assert (status, reason) == ("timed_out", "sweep.timeout: longer than 300 ms")


def test_out_of_memory(store: RunStore) -> None:
    status, reason = after(store, "import time; x = b'1' * 300_000_000; time.sleep(60)", memory=200_000_000)
    assert status == "out_of_memory"
    assert reason.endswith("191 MiB allowed")


def test_what_a_cell_wrote_before_it_was_ended_stays(store: RunStore) -> None:
    run = cell(store)
    text = PREAMBLE + "run.restart(); run.update(parameters={'all': 7}); time.sleep(60)"
    Pool(jobs=1, command=script(text), timeout=1.5).execute([run])
    record = store.open(run.id).record
    assert (record.status, record.parameters, record.started is None) == ("timed_out", {"all": 7}, False)
    assert record.wall_seconds is not None


def test_memory_of_children_counts(store: RunStore) -> None:
    """A cell's ranks and loader workers are part of it."""
    grandchild = "import time; x = b'1' * 300_000_000; time.sleep(60)"
    text = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {grandchild!r}])"
    assert after(store, text, memory=200_000_000)[0] == "out_of_memory"


def test_what_outlives_a_cell_is_ended(store: RunStore, tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    text = f"""
        import subprocess, sys
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        open({str(pid_file)!r}, "w").write(str(child.pid))
    """
    after(store, text)
    assert gone(int(pid_file.read_text()))


def gone(pid: int, patience: float = 10.0) -> bool:
    """Whether a process ends soon (a zombie, whose parent is not us, has ended)."""
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        try:
            if "\nState:\tZ" in Path(f"/proc/{pid}/status").read_text():
                return True
            os.kill(pid, 0)
        except (ProcessLookupError, FileNotFoundError):
            return True
        time.sleep(0.05)
    return False


def test_a_cell_that_dies_before_it_begins_again_says_how_it_died(store: RunStore) -> None:
    """Its record still tells of the attempt before."""
    run = cell(store)
    run.finish("failed", "as it was")
    Pool(jobs=1, command=script("import os, signal; os.kill(os.getpid(), signal.SIGKILL)")).execute([run])
    assert store.open(run.id).record.status == "killed"


def test_jobs_run_side_by_side_and_in_order(store: RunStore) -> None:
    runs = [cell(store, number) for number in range(5)]
    most, started = 0, list[str]()

    def report(running: Sequence[Child]) -> None:
        nonlocal most
        most = max(most, len(running))
        started.extend(child.run.id for child in running if child.run.id not in started)

    Pool(jobs=2, command=script(PREAMBLE + "time.sleep(0.2); run.finish('done')"), report=report).execute(runs)
    assert most == 2
    assert started == [run.id for run in runs]
    assert {store.open(run.id).record.status for run in runs} == {"done"}


def test_one_bad_cell_does_not_stop_the_others(store: RunStore) -> None:
    runs = [cell(store, number) for number in range(3)]
    text = PREAMBLE + "sys.exit(3) if run.record.config['seed'] == 1 else run.finish('done')"
    finished: list[str] = []
    Pool(jobs=1, command=script(text), finished=lambda run: finished.append(run.record.status)).execute(runs)
    assert finished == ["done", "failed", "done"]


@pytest.mark.parametrize(("number", "exception"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)])
def test_a_stopped_sweep_lets_its_cells_save(
    store: RunStore, number: signal.Signals, exception: type[BaseException]
) -> None:
    """The running cell gets the signal and its time to finish; the waiting one stays waiting."""
    text = PREAMBLE + (
        "signal.signal(signal.SIGTERM, signal.default_int_handler)\n"
        "(folder / 'ready').touch()\n"
        "try:\n    time.sleep(60)\n"
        "except KeyboardInterrupt:\n    time.sleep(0.3); run.finish('interrupted', 'saved')\n"
    )
    runs = [cell(store, 0), cell(store, 1)]

    def interrupt() -> None:
        while not (runs[0].path / "ready").exists():
            time.sleep(0.02)
        os.kill(os.getpid(), number)

    def terminate(*_: object) -> None:
        raise SystemExit(143)

    previous = signal.signal(signal.SIGTERM, terminate)
    try:
        threading.Thread(target=interrupt).start()
        with pytest.raises(exception):
            Pool(jobs=1, command=script(text)).execute(runs)
    finally:
        signal.signal(signal.SIGTERM, previous)
    assert store.open(runs[0].id).record.status == "interrupted"
    assert store.open(runs[0].id).record.reason == "saved"
    assert store.open(runs[1].id).record.status == "waiting"


def test_a_cell_ends_with_its_parent(store: RunStore, tmp_path: Path) -> None:
    """The parent is killed without a chance to say so; the cell notices."""
    run = cell(store)
    pid_file = tmp_path / "pid"
    child = f"""if True:
        import os, time
        from ctxlab.launch import watch_parent
        watch_parent()
        open({str(pid_file)!r}, "w").write(str(os.getpid()))
        time.sleep(60)
    """
    parent = f"""
        from pathlib import Path
        import sys
        from ctxlab.launch import Pool
        from ctxlab.records.store import RunStore
        run = RunStore(Path({str(run.path.parent)!r})).open({run.id!r})
        Pool(jobs=1, command=lambda run: [sys.executable, "-c", {child!r}]).execute([run])
    """
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(parent)])
    while not (pid_file.exists() and pid_file.read_text()):
        time.sleep(0.02)
    process.kill()
    process.wait()
    assert gone(int(pid_file.read_text()))


def test_memory_of_this_process_group() -> None:
    """A block of known size in a child of a group of its own."""
    code = "import sys, time; x = b'1' * 200_000_000; print('ready', flush=True); time.sleep(60)"
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, start_new_session=True)
    try:
        assert child.stdout is not None
        child.stdout.readline()
        assert 200_000_000 <= group_memory(child.pid) <= 240_000_000
    finally:
        child.kill()
        child.communicate()


def test_the_end_of_a_log_is_of_the_last_attempt(store: RunStore) -> None:
    run = cell(store)
    assert log_lines(run.path / LOG) == []
    for words in ("first attempt", "second\n\n  attempt  "):
        Pool(1, command=script(f"print({words!r}); raise SystemExit(1)")).execute([run])
    assert log_lines(run.path / LOG) == ["second", "  attempt"]
    assert "first attempt" in (run.path / LOG).read_text(encoding="utf-8")
    (run.path / LOG).write_text("a line of another program's\n" * 9999, encoding="utf-8")
    assert set(log_lines(run.path / LOG)[1:]) == {"a line of another program's"}


def test_last_metrics_reads_past_a_torn_line(store: RunStore) -> None:
    run = cell(store)
    assert last_metrics(run.path) == {}
    rows = [
        '{"split": "train", "step": 1}',
        '{"split": "train", "step": 2}',
        '{"split": "validation"}',
        '{"split": "tra',
    ]
    (run.path / "metrics.jsonl").write_text("\n".join(rows))
    assert last_metrics(run.path) == {"split": "train", "step": 2}


def test_a_sweep_is_read_as_it_was_written(tmp_path: Path) -> None:
    sweep_id = new_sweep_id(tmp_path, "position")
    sweep = Sweep(sweep_id, "train", "ctxlab train -m", ("position",), ("a-1", "b-2"), (("/x.py", "ff"),))
    write_sweep(tmp_path, sweep)
    assert read_sweep(tmp_path, sweep_id) == sweep
    assert sweep_folder(tmp_path, sweep_id).is_dir()


def test_unknown_sweep_names_the_nearest(tmp_path: Path) -> None:
    write_sweep(tmp_path, Sweep(new_sweep_id(tmp_path, "position"), "train", "", (), ()))
    with pytest.raises(RecordError, match=r"there is no sweep 'position-0000'.*did you mean 'position-"):
        read_sweep(tmp_path, "position-0000")
