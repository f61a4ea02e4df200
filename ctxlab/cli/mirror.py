"""A command's sink, opened once and closed with the exit code that the command really ends with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from ctxlab.cli.execute import exit_code, is_first_rank
from ctxlab.cli.main import DONE
from ctxlab.records.sinks import LoggerConfig, NullSink, RunSink, Sink, open_mirror
from ctxlab.records.store import Run


@dataclass
class Recording:
    """The open sink and what the process will exit with, unless an exception says otherwise."""

    sink: Sink
    exit_code: int = DONE


@contextmanager
def recording(run: Run, logger: LoggerConfig, job_type: str) -> Iterator[Recording]:
    """Yields the sink of a run: its files and their mirror; nothing on the other ranks of a distributed run."""
    if not is_first_rank():
        yield Recording(NullSink())
        return
    group = run.record.sweep.id if run.record.sweep else run.record.experiment
    opened = Recording(RunSink(run, open_mirror(run, logger, group=group, job_type=job_type)))
    try:
        yield opened
    except BaseException as error:
        opened.exit_code = exit_code(error, run)
        raise
    finally:
        opened.sink.finish(opened.exit_code)
