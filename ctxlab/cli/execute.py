"""One run from `running` to its last status, whatever ends it: shared by a single run and by a cell of a sweep."""

from __future__ import annotations

import errno
import importlib
import logging
import os
import shutil
import signal
import sys
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ctxlab.cli.main import DIED, DONE, INTERRUPTED, REFUSED, TERMINATED, explain_os
from ctxlab.errors import CtxlabError
from ctxlab.records.index import RunIndex

if TYPE_CHECKING:
    from ctxlab.cli.invocation import Invocation
    from ctxlab.records.schema import RunRecord
    from ctxlab.records.store import Run

LOG = "log.txt"


def execute(
    command: str, config: Any, run: Run, invocation: Invocation, *, undo: Callable[[], None] | None = None
) -> int:
    """Runs `command` inside its record and returns the exit code. Every error becomes one line, a status and a reason.

    `undo` takes back what was written down for a line that is refused before it has a result: no run is left of it, and
    one that was to go on is as it was. A cell of a sweep has none: why it could not run is its result.

    Lightning starts the other ranks of a distributed run by calling this process's line again: from here on that line
    is `_run FOLDER`, so that a rank joins the run instead of making one.
    """
    sys.argv[1:] = ["_run", str(run.path)]
    handler = _open_log(run)
    try:
        body = importlib.import_module(f"ctxlab.cli.commands.{command}")
        code = int(body.run(config, run, invocation))
        _close(run, "done" if code == DONE else "failed", "")
        return code
    except KeyboardInterrupt:
        _close(run, "interrupted", "Ctrl-C")
        return INTERRUPTED
    except SystemExit as stop:
        if stop.code == TERMINATED:
            _close(run, "killed", f"terminated by {signal.SIGTERM.name}")
            return TERMINATED
        _close(run, "failed", f"exit code {stop.code}")
        return DIED
    except (CtxlabError, OSError) as error:
        code = exit_code(error, run)
        if code == REFUSED and undo is not None:
            _say(str(error) if isinstance(error, CtxlabError) else explain_os(error))
            undo()
            return code
        return _fail(run, "failed", str(error) if isinstance(error, CtxlabError) else explain_os(error), code)
    except Exception as error:
        logging.getLogger("ctxlab").error("".join(traceback.format_exception(error)))
        text = str(error).strip().splitlines()
        reason = f"{type(error).__name__}: {text[0] if text else ''}"
        if is_out_of_memory(error):
            return _fail(run, "out_of_memory", f"out of memory ({reason})", DIED)
        return _fail(run, "failed", f"{reason} (traceback in {run.path / LOG})", DIED)
    finally:
        logging.getLogger().removeHandler(handler)
        handler.close()
        if is_first_rank() and run.path.is_dir():
            RunIndex(run.path.parent).remember(run.path)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out: Python's, CUDA's, or the CPU allocator's plain RuntimeError."""
    name = type(error).__name__
    text = str(error)
    return (
        isinstance(error, MemoryError)
        or name == "OutOfMemoryError"
        or "DefaultCPUAllocator" in text
        or "bad_alloc" in text
    )


def is_first_rank() -> bool:
    """Whether this process owns the record: the only process, or rank 0 of a distributed run."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def exit_code(error: BaseException, run: Run) -> int:
    """What a process ends with because of an error: 2 only where nothing has run yet, and where another line would."""
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else DIED
    if not isinstance(error, CtxlabError | OSError) or _is_disk(error) or _has_results(run):
        return DIED
    return error.exit_code if isinstance(error, CtxlabError) else REFUSED


def discard(run: Run) -> None:
    """Removes a run of which nothing has run."""
    run.close()
    shutil.rmtree(run.path, ignore_errors=True)


def put_back(run: Run, before: RunRecord) -> None:
    """A run that was to go on and is refused: its record is what it was."""
    run.close()
    run.update(**dict(before))


def _is_disk(error: BaseException) -> bool:
    """Whether the disk gave out, rather than that something on the line is wrong."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
            return True
        error = error.__cause__  # type: ignore[assignment]
    return False


def _has_results(run: Run) -> bool:
    """Whether this attempt got as far as a result: what ends it from then on is no refusal."""
    if run.record.command == "train":
        return any(row.get("attempt") == run.record.attempt for row in run.metrics())
    return bool(run.measurements())


def _open_log(run: Run) -> logging.Handler:
    handler = logging.FileHandler(run.path / LOG, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.getLogger().addHandler(handler)
    return handler


def _fail(run: Run, status: str, reason: str, code: int) -> int:
    _say(reason)
    try:
        _close(run, status, reason)
    except (OSError, CtxlabError) as error:
        # A full disk refuses the record too; the reason has been said, and the record reads as killed from now on.
        _say(f"the record of {run.id} could not be closed: {error}")
    return code


def _say(message: str) -> None:
    from ctxlab.cli import console

    console.error(message)


def _close(run: Run, status: str, reason: str) -> None:
    """Sets the last status unless the command has set one itself."""
    if is_first_rank() and run.record.status in ("waiting", "running"):
        run.finish(status, reason)
