"""A sweep from its line to its table: cells written down, run by the pool, shown meanwhile, compared at the end."""

from __future__ import annotations

import os
import shlex
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from ctxlab.cli import console
from ctxlab.cli.environment import set_process_defaults
from ctxlab.cli.main import DIED, DONE, INTERRUPTED, TERMINATED
from ctxlab.cli.outcomes import explain_memory, show_log_ends, show_outcomes
from ctxlab.cli.start import record_fields, stem
from ctxlab.config import plugins, schema
from ctxlab.config.identity import differences, identity, identity_fields
from ctxlab.config.overrides import key_of
from ctxlab.errors import ConfigError, RecordError
from ctxlab.launch import (
    FINAL,
    Child,
    Pool,
    Sweep,
    cell_command,
    last_metrics,
    new_sweep_id,
    read_sweep,
    share_done,
    sweep_folder,
    write_sweep,
)
from ctxlab.records.store import Run, RunStore
from ctxlab.units import format_seconds

if TYPE_CHECKING:
    from ctxlab.config.prepare import Prepared

# Keys that a line with sweep.resume may set without changing a cell.
_FREE_ON_RESUME = ("sweep.", "paths.", "hydra.")


def run_sweep(prepared: Prepared, *, share_threads: bool) -> int:
    """Writes a sweep down (or reads one that goes on), runs its unfinished cells, prints the comparison.

    With `share_threads` each of the cells that run side by side gets its part of the cores, whatever this process has.
    Exit code 0 when every cell is done or skipped, 1 when one died, 130 and 143 when it was stopped.
    """
    store = RunStore(prepared.runs)
    settings = prepared.cells[0].typed.sweep
    if settings.resume == "none":
        sweep = write_cells(prepared, store)
    else:
        sweep = read_sweep(store.root, settings.resume)
        for path, sha256 in sweep.plugins:
            plugins.load(Path(path), sha256)
        refuse_changes(prepared, sweep, store)
    runs = [store.open(run_id) for run_id in sweep.cells]
    to_run = [run for run in runs if run.record.status not in FINAL]
    alive = [run.id for run in to_run if run.record.status == "running"]
    if alive:
        raise RecordError(f"sweep.resume: {', '.join(alive)} of {sweep.id} is running")

    again = resume_line(prepared, sweep)
    if prepared.line.launcher:
        return _launched(prepared, sweep, store, [run.id for run in to_run], again)
    if share_threads:
        os.environ.pop("OMP_NUM_THREADS", None)
    set_process_defaults(share=min(settings.jobs, max(1, len(to_run))))
    view = SweepView(console.stderr(), sweep, {run.id: run for run in runs})
    pool = Pool(
        jobs=settings.jobs,
        memory=None if settings.memory == "none" else settings.memory,
        timeout=None if settings.timeout == "none" else settings.timeout,
        command=cell_command,
        report=view.update,
        finished=view.finished,
    )
    try:
        with view.shown():
            pool.execute(to_run)
    except KeyboardInterrupt:
        return stopped(sweep, store, again, INTERRUPTED)
    except SystemExit:
        return stopped(sweep, store, again, TERMINATED)
    return conclude(sweep, store, settings.metric, again)


def _launched(prepared: Prepared, sweep: Sweep, store: RunStore, to_run: Sequence[str], again: str) -> int:
    """The same by one of Hydra's launchers: its jobs end when they end, and the records say how."""
    from ctxlab.cli.launcher import launch_cells

    said = " ".join(prepared.line.launcher)
    console.stderr().print(Text(f"sweep {sweep.id}: {len(to_run)} cells to run, by {said}"), soft_wrap=True)
    try:
        launch_cells(prepared.line.launcher, store.root, sweep, [sweep.cells.index(run_id) for run_id in to_run])
    except KeyboardInterrupt:
        return stopped(sweep, store, again, INTERRUPTED)
    except SystemExit as stop:
        if stop.code == TERMINATED:
            return stopped(sweep, store, again, TERMINATED)
    return conclude(sweep, store, prepared.cells[0].typed.sweep.metric, again)


def write_cells(prepared: Prepared, store: RunStore) -> Sweep:
    """Every cell's record, `waiting` or `skipped` with the reason, then the sweep itself: all of it or nothing."""
    command = prepared.line.command
    sweep_id = new_sweep_id(store.root, sweep_name(prepared))
    runs: list[Run] = []
    try:
        for number, cell in enumerate(prepared.cells):
            run = store.create(
                command,
                stem(command, cell.typed),
                **record_fields(cell, prepared),
                sweep={"id": sweep_id, "cell": number},
                status="waiting",
            )
            runs.append(run)
            if cell.skipped:
                run.finish("skipped", cell.skipped)
        sweep = Sweep(
            id=sweep_id,
            command=command,
            line=prepared.line.text,
            swept=prepared.swept,
            cells=tuple(run.id for run in runs),
            plugins=tuple((str(plugin.path), plugin.sha256) for plugin in prepared.plugins),
        )
        write_sweep(store.root, sweep)
    except BaseException:  # a full disk, Ctrl-C: half a sweep cannot go on
        for path in (*(run.path for run in runs), sweep_folder(store.root, sweep_id)):
            shutil.rmtree(path, ignore_errors=True)
        with suppress(OSError):  # unless it holds other sweeps
            sweep_folder(store.root, sweep_id).parent.rmdir()
        raise
    return sweep


def sweep_name(prepared: Prepared) -> str:
    """What a sweep's id begins with: its experiment, or the keys that it sweeps over."""
    experiment = prepared.cells[0].typed.experiment
    keys = "-".join(key.rpartition(".")[2] for key in prepared.swept)
    return str(experiment) if experiment != "none" else keys or "sweep"


def refuse_changes(prepared: Prepared, sweep: Sweep, store: RunStore) -> None:
    """A sweep goes on with the cells it was written with: a line that says otherwise is refused, naming the key."""
    line = prepared.line
    if sweep.command != line.command:
        raise ConfigError(f"sweep.resume: {sweep.id} is a sweep of ctxlab {sweep.command}")
    says = [key_of(o) for o in line.overrides if not key_of(o).startswith(_FREE_ON_RESUME)]
    says += [key for key in line.free_text if not key.startswith(_FREE_ON_RESUME)]
    if not says:
        return
    if len(prepared.cells) != len(sweep.cells):
        raise ConfigError(
            f"sweep.resume: this line has {len(prepared.cells)} cells, {sweep.id} has {len(sweep.cells)}; "
            f"to go on with it as it is: ctxlab {line.command} sweep.resume={sweep.id}"
        )
    for number, (cell, run_id) in enumerate(zip(prepared.cells, sweep.cells, strict=True)):
        written = schema.parse(sweep.command, store.open(run_id).record.config)
        if identity(cell.typed) != identity(written):
            changed = differences(identity_fields(cell.typed), identity_fields(written))
            raise ConfigError(
                f"sweep.resume: cell {number} of {sweep.id} was written down with another config: {changed[0]}"
            )


def conclude(sweep: Sweep, store: RunStore, metric: str, again: str) -> int:
    """Prints the comparison and every outcome, saves the figure beside the sweep, says what to do about cells that died."""
    from ctxlab.report.repeats import repeats, repeats_tables, save_compared
    from ctxlab.report.tables import show_sweep

    out, err = console.stdout(), console.stderr()
    runs = [store.open(run_id) for run_id in sweep.cells]
    explain_memory(runs)
    show_sweep(runs, out, metric=metric)
    for grid in repeats_tables(repeats(runs)):
        out.print()
        out.print(grid)
    show_outcomes(runs, out)
    figure = save_compared(runs, sweep_folder(store.root, sweep.id) / "loss_by_length.png")
    out.print(Text(f"sweep {sweep.id} in {sweep_folder(store.root, sweep.id)}{f' ({figure.name})' if figure else ''}"))
    bad = [run for run in runs if run.record.status not in FINAL]
    show_log_ends(bad, err)
    if bad:
        err.print(Text(f"try the cells that died again:  {again}"), soft_wrap=True)
    return DIED if bad else DONE


def resume_line(prepared: Prepared, sweep: Sweep) -> str:
    """What to type to go on with a sweep, in the folder and with the limits that it was given."""
    words = [o for o in prepared.line.overrides if key_of(o).startswith("sweep.") and key_of(o) != "sweep.resume"]
    words += [f"{key}={value}" for key, value in prepared.line.free_text.items() if key.startswith("paths.")]
    return shlex.join(["ctxlab", sweep.command, f"sweep.resume={sweep.id}", *words])


def stopped(sweep: Sweep, store: RunStore, again: str, code: int) -> int:
    """Says how far a sweep came that was stopped, and how to go on; returns the exit code."""
    statuses = [store.open(run_id).record.status for run_id in sweep.cells]
    counts = ", ".join(f"{statuses.count(s)} {s}" for s in dict.fromkeys(statuses))
    console.stderr().print(Text(f"stopped: {counts}. To go on:  {again}"), soft_wrap=True)
    return code


@dataclass
class SweepView:
    """What a sweep shows while it runs: one line a running cell in a terminal, a line a finished cell elsewhere."""

    console: Console
    sweep: Sweep
    runs: dict[str, Run]
    heading: str = ""  # in place of how many cells there are, where that is not known
    _live: Live | None = None
    _ended: dict[str, str] = field(default_factory=dict)
    _announced: set[str] = field(default_factory=set)
    _drawn: float = 0.0

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Draws in place in a terminal, in lines elsewhere."""
        self._ended = {run.id: run.record.status for run in self.runs.values() if run.record.status in FINAL}
        cells = f"{len(self.sweep.cells)} cells, {len(self.sweep.cells) - len(self._ended)} to run"
        self.console.print(Text(f"sweep {self.sweep.id}: {self.heading or cells}"))
        for run in self.runs.values():
            if run.record.status == "skipped":
                self.console.print(Text(f"{self.label(run)}: skipped: {run.record.reason}"), soft_wrap=True)
        if not self.console.is_terminal:
            yield
            return
        with Live(console=self.console, transient=True, refresh_per_second=4) as self._live:
            yield
        self._live = None

    def update(self, running: Sequence[Child]) -> None:
        """Called often with the cells that are running."""
        for child in running:
            if child.run.id not in self._announced:
                self._announced.add(child.run.id)
                if self._live is None:
                    self.console.print(
                        Text(f"{self.label(child.run)}: started, log in {child.run.path}/log.txt"), soft_wrap=True
                    )
        if self._live is not None and time.monotonic() - self._drawn > 0.5:
            self._drawn = time.monotonic()
            self._live.update(self._draw(running))

    def finished(self, run: Run) -> None:
        """Called with each cell as it ends."""
        self._ended[run.id] = run.record.status
        seconds = run.record.wall_seconds
        took = f" in {format_seconds(seconds)}" if seconds else ""
        reason = f": {run.record.reason}" if run.record.reason else ""
        counted = f"[{len(self._ended)}/{len(self.sweep.cells)}]"
        self.console.print(Text(f"{counted} {self.label(run)}: {run.record.status}{took}{reason}"), soft_wrap=True)

    def label(self, run: Run) -> str:
        """A cell by the values that it was swept to: `position=rope context=256`."""
        parts = [f"{key}={_at(run.record.config, key)}" for key in self.sweep.swept]
        return " ".join(parts) or run.id

    def _draw(self, running: Sequence[Child]) -> RenderableType:
        table = Table(box=None, show_header=False, pad_edge=False)
        for child in running:
            row = last_metrics(child.run.path)
            share = share_done(child.run.record.config, row)
            loss = f"loss {row['loss']:.3f}" if "loss" in row else ""
            table.add_row(
                self.label(child.run),
                ProgressBar(total=1.0, completed=share, width=30),
                f"step {row.get('step', 0)}",
                loss,
                format_seconds(time.monotonic() - child.started),
            )
        waiting = len(self.sweep.cells) - len(self._ended) - len(running)
        return Group(
            table, Text(f"{len(self._ended)} of {len(self.sweep.cells)} cells ended, {waiting} waiting", style="dim")
        )


def _at(config: dict[str, Any], key: str) -> Any:
    """The value at a swept key; a group is shown by the name that was chosen."""
    node: Any = config
    for part in key.split("."):
        node = node.get(part) if isinstance(node, dict) else None
    return node.get("name", "?") if isinstance(node, dict) else node
