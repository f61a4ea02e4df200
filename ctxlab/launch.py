"""Waiting cells in, finished cells out: the folder of a sweep, its children, their limits, the pool.

A cell is a run whose record is written, with status `waiting`, before anything starts. Each runs as a process of its
own, `ctxlab _run FOLDER`, in a session of its own, so that its memory is its own and a limit can end all of it at once.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ctxlab.errors import RecordError
from ctxlab.records.run import METRICS_FILE, now
from ctxlab.records.store import Run
from ctxlab.units import format_bytes, format_seconds

SWEEPS = "sweeps"  # folder below the runs'; holds one folder a sweep: sweep.json and its figures
LOG = "log.txt"
PARENT = "CTXLAB_PARENT"  # environment variable: pid of the process whose death ends a cell
_BEGINNING = "--- started "  # in a cell's log, a line an attempt
_POLL_SECONDS = 0.1
_LIMIT_SECONDS = 0.5
_GRACE_SECONDS = 30.0  # for a cell to save its state after a signal
_ALPHABET = "abcdefghijkmnpqrstuvwxyz23456789"

# Statuses that a resumed sweep leaves as they are.
FINAL = ("done", "skipped")


@dataclass(frozen=True)
class Sweep:
    """What is written down of a sweep: the line, the keys it sweeps over, its plugins, its cells in order."""

    id: str
    command: str
    line: str
    swept: tuple[str, ...]
    cells: tuple[str, ...]  # run ids
    plugins: tuple[tuple[str, str], ...] = ()  # (path, sha256)


def new_sweep_id(root: Path, stem: str) -> str:
    """Makes a new folder for a sweep and returns its name: the stem and four random characters.

    Raises RecordError where that is impossible.
    """
    while True:
        name = f"{stem}-{''.join(secrets.choice(_ALPHABET) for _ in range(4))}"
        folder = root / SWEEPS / name
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            folder.mkdir()
        except FileExistsError as error:
            if folder.exists():
                continue
            raise RecordError(f"paths.runs: {folder.parent} is not a folder") from error
        except OSError as error:
            raise RecordError(f"paths.runs: {folder} cannot be made: {error.strerror or error}") from error
        return name


def sweep_folder(root: Path, sweep_id: str) -> Path:
    return root / SWEEPS / sweep_id


def write_sweep(root: Path, sweep: Sweep) -> None:
    """Writes sweep.json, whole or not at all. Raises RecordError where the disk refuses."""
    path = sweep_folder(root, sweep.id) / "sweep.json"
    draft = path.with_suffix(".draft")
    try:
        draft.write_text(json.dumps(asdict(sweep), indent=1, ensure_ascii=False), encoding="utf-8")
        os.replace(draft, path)
    except OSError as error:
        raise RecordError(f"{path} cannot be written: {error.strerror or error}") from error


def read_sweep(root: Path, sweep_id: str) -> Sweep:
    """Raises RecordError when there is no such sweep."""
    from ctxlab.registry import nearest

    path = sweep_folder(root, sweep_id) / "sweep.json"
    try:
        plain = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        known = [entry.name for entry in (root / SWEEPS).glob("*") if (entry / "sweep.json").is_file()]
        raise RecordError(
            f"sweep.resume: there is no sweep '{sweep_id}' in {root}{nearest(sweep_id, known)}"
        ) from error
    except (OSError, ValueError) as error:
        raise RecordError(f"sweep.resume: {path} cannot be read: {error}") from error
    try:
        for name in ("swept", "cells"):
            plain[name] = tuple(plain[name])
        plain["plugins"] = tuple((plugin, sha256) for plugin, sha256 in plain["plugins"])
        return Sweep(**plain)
    except (KeyError, TypeError, ValueError) as error:
        raise RecordError(f"sweep.resume: {path} is no sweep ({type(error).__name__}: {error})") from error


def cell_command(run: Run) -> list[str]:
    """How a cell is started: by this very Python, from the folder that holds all it needs."""
    return [sys.executable, "-m", "ctxlab", "_run", str(run.path.absolute())]


@dataclass
class Child:
    """One cell while it runs."""

    run: Run
    process: subprocess.Popen[bytes]
    started: float
    finished_before: str | None = None  # when its last attempt ended: what its record says until this one begins
    ended_by: str = ""  # the status that we, not the cell, decided on
    reason: str = ""
    peak: int = 0


@dataclass
class Pool:
    """Runs waiting cells, `jobs` at a time, each under the same limits.

    `command` makes a child's command line (a test's child is not ours); `report` is called often, with the runs that
    are running, and shows them.
    """

    jobs: int
    memory: int | None = None
    timeout: float | None = None
    command: Callable[[Run], list[str]] = cell_command
    report: Callable[[Sequence[Child]], None] = lambda _: None
    finished: Callable[[Run], None] = lambda _: None

    def execute(self, runs: Sequence[Run]) -> None:
        """Runs every cell to its end, in order. On Ctrl-C and SIGTERM the running cells save their state and end as
        `interrupted`, the waiting ones stay `waiting`, and the exception goes on.
        """
        waiting, running = list(runs), list[Child]()
        checked = time.monotonic()
        try:
            while waiting or running:
                while waiting and len(running) < self.jobs:
                    running.append(self._start(waiting.pop(0)))
                if time.monotonic() - checked >= _LIMIT_SECONDS:
                    checked = time.monotonic()
                    for child in running:
                        self._limit(child)
                for child in [c for c in running if c.process.poll() is not None]:
                    running.remove(child)
                    self._settle(child)
                self.report(running)
                time.sleep(_POLL_SECONDS)
        except (KeyboardInterrupt, SystemExit) as stop:
            self._stop(running, signal.SIGINT if isinstance(stop, KeyboardInterrupt) else signal.SIGTERM)
            raise
        finally:
            for child in running:
                _signal_group(child, signal.SIGKILL)

    def _start(self, run: Run) -> Child:
        environment = dict(os.environ)
        environment[PARENT] = str(os.getpid())
        with (run.path / LOG).open("ab") as log:
            log.write(f"{_BEGINNING}{now()}\n".encode())
            log.flush()
            process = subprocess.Popen(
                self.command(run),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )
        return Child(run, process, time.monotonic(), run.record.finished)

    def _limit(self, child: Child) -> None:
        elapsed = time.monotonic() - child.started
        if self.timeout is not None and elapsed > self.timeout and not child.ended_by:
            child.ended_by = "timed_out"
            child.reason = f"sweep.timeout: longer than {format_seconds(self.timeout)}"
            _signal_group(child, signal.SIGKILL)
        if self.memory is None or child.ended_by:
            return
        child.peak = max(child.peak, group_memory(child.process.pid))
        if child.peak > self.memory:
            child.ended_by = "out_of_memory"
            child.reason = f"sweep.memory: {format_bytes(child.peak)} in use, {format_bytes(self.memory)} allowed"
            _signal_group(child, signal.SIGKILL)

    def _settle(self, child: Child, otherwise: tuple[str, str] | None = None) -> None:
        """Gives a cell its last status: what we did to it, else what it says itself, else what its end says."""
        _signal_group(child, signal.SIGKILL)  # ranks and loader workers that outlived it
        run = child.run
        record = run.reload()
        if child.ended_by:
            run.finish(child.ended_by, child.reason)
        elif record.finished in (None, child.finished_before):
            run.finish(*(otherwise or _end_of(child.process.returncode, run.path / LOG)))
        self.finished(run)

    def _stop(self, running: list[Child], number: signal.Signals) -> None:
        """Passes a signal on and waits for the cells to save; a second signal, or too long a wait, kills them."""
        for child in running:
            _signal_group(child, number)
        deadline = time.monotonic() + _GRACE_SECONDS
        try:
            while any(child.process.poll() is None for child in running) and time.monotonic() < deadline:
                time.sleep(_POLL_SECONDS)
        except (KeyboardInterrupt, SystemExit):
            pass
        for child in list(running):
            if child.process.poll() is None:
                _signal_group(child, signal.SIGKILL)
                child.process.wait()
            running.remove(child)
            self._settle(child, otherwise=("interrupted", f"the sweep was stopped by {number.name}"))


def _end_of(code: int, log: Path) -> tuple[str, str]:
    """Status and reason of a cell that ended without saying so itself."""
    if code < 0:
        name = signal.Signals(-code).name
        hint = ", often the system's way to free memory" if -code == signal.SIGKILL else ""
        return "killed", f"killed by {name}{hint}"
    if code == 0:
        return "failed", "ended without a result"
    lines = log_lines(log)
    return "failed", lines[-1].removeprefix("error: ").strip() if lines else f"exit code {code}"


def log_lines(log: Path) -> list[str]:
    """The lines that are not empty of a cell's last attempt, of the last 64 KiB at most; none where there is no log."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 2**16))
            text = file.read().decode(errors="replace")
    except OSError:
        return []
    lines = [line.rstrip() for line in text.rpartition(_BEGINNING)[2].splitlines()]
    return [line for line in (lines[1:] if _BEGINNING in text else lines) if line]


def _signal_group(child: Child, number: signal.Signals) -> None:
    # Either error means that the whole group is gone (macOS says so with EPERM for a zombie).
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child.process.pid, number)


def group_memory(group: int) -> int:
    """Bytes in use by all processes of a process group: proportional set sizes on Linux, resident ones elsewhere.

    (Proportional: a page that forked workers share counts once.)
    """
    if not Path("/proc/self/stat").exists():
        listed = subprocess.run(["ps", "-A", "-o", "pgid=,rss="], capture_output=True, text=True, check=False).stdout
        rows = (line.split() for line in listed.splitlines())
        return sum(int(rss) * 1024 for pgid, rss in rows if int(pgid) == group)
    total = 0
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            # The name in parentheses may hold spaces: the group is the third field after the last one.
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
            if int(fields[2]) == group:
                total += _proportional(entry)
        except (OSError, ValueError, IndexError):
            continue  # it ended while we looked
    return total


def _proportional(process: Path) -> int:
    for line in (process / "smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    return 0


def watch_parent() -> None:
    """In a cell: ends the cell's whole process group when the parent is gone. SIGTERM first, so that it can save."""
    import threading

    parent = int(os.environ.pop(PARENT, "0"))  # not for our own children: the ranks of a distributed run
    if not parent:
        return

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os.killpg(os.getpgid(0), signal.SIGTERM)
        time.sleep(_GRACE_SECONDS)
        os.killpg(os.getpgid(0), signal.SIGKILL)

    threading.Thread(target=watch, name="watch-parent", daemon=True).start()


def last_metrics(folder: Path) -> dict[str, Any]:
    """The newest row of a run's training metrics, read from the end of the file; empty before the first."""
    path = folder / METRICS_FILE
    try:
        with path.open("rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - 8192))
            lines = file.read().splitlines()
    except OSError:
        return {}
    for line in reversed(lines):
        try:
            row = json.loads(line)
        except ValueError:
            continue  # the line that is being written, or one cut by our window
        if isinstance(row, dict) and row.get("split") == "train":
            return row
    return {}


def share_done(config: Mapping[str, Any], row: Mapping[str, Any]) -> float:
    """How much of its budget in tokens or steps a run has spent, by its newest row; 0 where it has neither."""
    trainer = config.get("trainer", {})
    shares = [
        row[have] / trainer[limit]
        for have, limit in (("tokens", "max_tokens"), ("step", "max_steps"))
        if have in row and isinstance(trainer.get(limit), int)
    ]
    return min(1.0, max(shares, default=0.0))
