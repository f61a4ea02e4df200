"""The composed commands from their line to their end: print the config, run once, run a sweep, or go on with a run."""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ctxlab.cli import console
from ctxlab.cli.environment import set_cache, set_process_defaults
from ctxlab.cli.invocation import Invocation
from ctxlab.cli.preflight import check, check_cells
from ctxlab.config.overrides import Line, key_of, split
from ctxlab.errors import ConfigError

if TYPE_CHECKING:
    from ctxlab.config.prepare import Cell, Prepared

RECORDED = ("train", "eval", "profile", "plan")  # commands that write records


def start(command: str, argv: list[str]) -> int:
    """Runs a composed command and returns its exit code."""
    line = split(command, argv)
    if line.multirun and command not in RECORDED:
        raise ConfigError(f"-m: ctxlab {command} makes no record, so there is nothing to sweep over")
    threads_are_given = "OMP_NUM_THREADS" in os.environ
    set_process_defaults()
    from ctxlab.config.prepare import prepare

    if line.launcher:
        from ctxlab.cli.launcher import check_launcher

        check_launcher(line.launcher)
    if line.sweeper:
        from ctxlab.config.sweepers import ADAPTIVE, chosen_sweeper

        if not line.multirun:
            raise ConfigError("hydra/sweeper: says which cells a sweep has; this line is one run (add -m for a sweep)")
        if any(key_of(o) == "sweep.resume" for o in line.overrides):
            raise ConfigError("hydra/sweeper: a sweep that goes on has its cells already; leave it out")
        if chosen_sweeper(line.sweeper) in ADAPTIVE:
            from ctxlab.cli.search import run_search

            return run_search(line, share_threads=not threads_are_given)
    if line.selectors.get("resume", ("none",)) != ("none",) or "resume" in map(key_of, line.overrides):
        return _resume(line)
    with console.progress_bar(console.stderr()) as bar:
        prepared = prepare(line, validate=not line.print_config, each=lambda rows: _counted(rows, bar))
    if line.print_config:
        _print_configs(prepared)
        return 0
    going_on = getattr(getattr(prepared.cells[0].typed, "sweep", None), "resume", "none") != "none"
    if prepared.is_sweep or going_on:
        from ctxlab.cli.sweep import run_sweep

        if not going_on:  # the cells of one that goes on were checked when they were written down
            with console.progress_bar(console.stderr()) as bar:
                check_cells(prepared.cells, bar)
        return run_sweep(prepared, share_threads=not threads_are_given)
    if line.launcher:
        raise ConfigError("hydra/launcher: runs the cells of a sweep; this line is one run (add -m for a sweep)")
    return _run_once(prepared)


def _run_once(prepared: Prepared) -> int:
    cell = prepared.cells[0]
    command = prepared.line.command
    if cell.skipped:
        raise ConfigError(cell.skipped)
    set_cache(cell.typed.paths.cache)
    with console.progress_bar(console.stderr()) as bar:
        check(cell.typed, bar)
    invocation = Invocation(
        command=command,
        line=prepared.line.text,
        runs=prepared.runs,
        overrides=prepared.line.overrides,
        plugins=prepared.plugins,
        as_json=prepared.line.as_json,
    )
    if command not in RECORDED:
        body = importlib.import_module(f"ctxlab.cli.commands.{command}")
        return int(body.run(cell.typed, invocation))
    from ctxlab.cli.execute import discard, execute

    run = invocation.store.create(command, stem(command, cell.typed), **record_fields(cell, prepared))
    return execute(command, cell.typed, run, invocation, undo=lambda: discard(run))


def _resume(line: Line) -> int:
    from ctxlab.cli.execute import execute, put_back
    from ctxlab.config.prepare import prepare_resume

    if line.command != "train" or line.multirun:
        raise ConfigError("resume: goes on with one training run; a sweep goes on with sweep.resume=ID")
    runs = Path(line.free_text.get("paths.runs") or os.environ.get("CTXLAB_RUNS") or "runs").expanduser()
    cell = prepare_resume(line, runs)
    if line.print_config:
        _print_config(cell)
        return 0
    set_cache(cell.typed.paths.cache)
    with console.progress_bar(console.stderr()) as bar:
        check(cell.typed, bar)
    invocation = Invocation(command=line.command, line=line.text, runs=runs, overrides=line.overrides)
    run = invocation.store.open(cell.typed.resume)
    if run.record.status == "running":
        raise ConfigError(f"resume: {run.id} is running")
    before = run.record
    # What the run is from now on; the other ranks of a distributed run read it there.
    said = {key_of(o) for o in line.overrides} | line.free_text.keys()
    now = {"tags": tuple(cell.typed.tags), "note": cell.typed.note}
    changes = {key: value for key, value in now.items() if key in said}
    run.update(config={**cell.config, "resume": "none"}, line=cell.line, **changes)
    run.restart()
    return execute(line.command, cell.typed, run, invocation, undo=lambda: put_back(run, before))


def stem(command: str, config: Any) -> str:
    """What a run's id begins with: its name, or what it is."""
    if config.name != "auto":
        return str(config.name)
    if command == "eval":
        return f"eval-{Path(config.run[0]).name.rpartition('-')[0]}"
    parts = config.model.name if config.position == "none" else f"{config.model.name}-{config.position.name}"
    return f"{command}-{parts}" if command in ("profile", "plan") else f"{parts}-{config.context}"


def record_fields(cell: Cell, prepared: Prepared) -> dict[str, Any]:
    """What every record says about how it came to be."""
    config = cell.typed
    parent = None
    if prepared.line.command == "eval":
        parent = Path(config.run[0]).name if len(config.run) == 1 else None
    elif getattr(config, "init", "none") != "none":
        parent = Path(config.init).name
    return {
        "config": cell.config,
        "line": cell.line,
        "parent": parent,
        "experiment": None if config.experiment == "none" else config.experiment,
        "tags": list(config.tags),
        "note": config.note,
        "plugins": [(str(plugin.path), plugin.sha256) for plugin in prepared.plugins],
    }


def _print_configs(prepared: Prepared) -> None:
    for number, cell in enumerate(prepared.cells):
        if prepared.is_sweep:
            swept = " ".join(o for o in cell.overrides if key_of(o) in prepared.swept)
            print(f"# cell {number}{f': {swept}' if swept else ''}")
        _print_config(cell)
        if prepared.is_sweep and number + 1 < len(prepared.cells):
            print("---")


def _print_config(cell: Cell) -> None:
    import yaml  # type: ignore[import-untyped]

    print(yaml.safe_dump(json.loads(json.dumps(cell.config)), allow_unicode=True, sort_keys=False), end="")


def _counted(rows: Iterable[list[str]], bar: Any) -> Iterator[list[str]]:
    listed = list(rows)
    if len(listed) < 20:
        yield from listed
        return
    advance = bar(f"checking {len(listed)} cells", len(listed))
    for row in listed:
        yield row
        advance(1)
