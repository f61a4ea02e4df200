"""One run from `running` to its last status, whatever ends it: shared by a single run and by a cell of a sweep."""

from __future__ import annotations

import errno
import importlib
import logging
import os
import signal
import sys
import traceback
from typing import TYPE_CHECKING, Any

from ctxlab.cli.main import DIED, DONE, INTERRUPTED, REFUSED, TERMINATED
from ctxlab.errors import CtxlabError

if TYPE_CHECKING:
    from ctxlab.cli.invocation import Invocation
    from ctxlab.records.store import Run

LOG = "log.txt"


def execute(command: str, config: Any, run: Run, invocation: Invocation) -> int:
    """Runs `command` inside its record and returns the exit code. Every error becomes one line, a status and a reason.

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
    except CtxlabError as error:
        return _fail(run, "failed", str(error), DIED if run.metrics() else error.exit_code)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        code = DIED if error.errno == errno.ENOSPC or run.metrics() else REFUSED
        return _fail(run, "failed", f"{where}{error.strerror or error}", code)
    except Exception as error:
        logging.getLogger("ctxlab").error("".join(traceback.format_exception(error)))
        text = str(error).strip().splitlines()
        reason = f"{type(error).__name__}: {text[0] if text else ''}"
        if is_out_of_memory(error):
            return _fail(run, "out_of_memory", f"out of memory ({reason})", DIED)
        return _fail(run, "failed", f"{reason} (traceback in {run.path / LOG})", DIED)
    finally:
        if handler is not None:
            logging.getLogger().removeHandler(handler)
            handler.close()


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


def _open_log(run: Run) -> logging.Handler | None:
    if not is_first_rank():
        return None
    handler = logging.FileHandler(run.path / LOG, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.getLogger().addHandler(handler)
    return handler


def _fail(run: Run, status: str, reason: str, code: int) -> int:
    from ctxlab.cli import console

    console.error(reason)
    try:
        _close(run, status, reason)
    except (OSError, CtxlabError) as error:
        # A full disk refuses the record too; the reason has been said, and the record reads as killed from now on.
        console.error(f"the record of {run.id} could not be closed: {error}")
    return code


def _close(run: Run, status: str, reason: str) -> None:
    """Sets the last status unless the command has set one itself."""
    if is_first_rank() and run.record.status in ("waiting", "running"):
        run.finish(status, reason)
