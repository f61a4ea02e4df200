"""`ctxlab _run FOLDER`, hidden: one run that is already written down. So start a sweep's cells and a run's ranks."""

from __future__ import annotations

import signal
from pathlib import Path

from ctxlab.errors import ConfigError, RecordError


def run(argv: list[str]) -> int:
    """Reads command and config from the folder's record, runs the command, returns its exit code."""
    if len(argv) != 1:
        raise ConfigError("_run: expected the folder of a run")
    from ctxlab.cli.environment import set_cache, set_process_defaults
    from ctxlab.cli.execute import execute, is_first_rank
    from ctxlab.cli.invocation import Invocation
    from ctxlab.cli.main import terminate
    from ctxlab.launch import watch_parent
    from ctxlab.records.store import RunStore

    watch_parent()
    set_process_defaults()
    signal.signal(signal.SIGTERM, terminate)
    folder = Path(argv[0])
    store = RunStore(folder.parent)
    written = store.open(str(folder))
    if is_first_rank():
        if written.record.status in ("done", "skipped"):
            raise RecordError(f"_run: {written.id} is {written.record.status} already")
        written.restart()
    from ctxlab.config import plugins, schema

    record = written.record
    loaded = tuple(plugins.load(Path(path), sha256) for path, sha256 in record.plugins)
    config = dict(record.config)
    if record.command == "train" and (written.checkpoints / "last").exists():
        config["resume"] = written.id
    invocation = Invocation(
        command=record.command,
        line=record.line,
        runs=folder.parent,
        plugins=loaded,
        is_child=record.sweep is not None,
    )
    typed = schema.parse(record.command, config)
    set_cache(typed.paths.cache)
    return execute(record.command, typed, written, invocation)
