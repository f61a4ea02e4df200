"""How the cells of a sweep ended, beside its table: every reason, what was predicted to be needed, the ends of logs."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.text import Text

from ctxlab.launch import LOG, log_lines
from ctxlab.records.store import Run
from ctxlab.report.results import labels
from ctxlab.units import format_bytes, format_length

_PATIENCE = 120.0  # seconds for the predictions of one sweep, imports and all
_TAIL = 8  # lines of a log that are shown
_PREDICTED = "a training step was predicted to need"


def explain_memory(runs: Sequence[Run]) -> None:
    """Says in the record of each training that memory ended, or may have, what one of its steps was predicted to need.

    Nothing of a run whose prediction fails or was made before: the outcome stands without it.
    """
    asked = [run for run in runs if _by_memory(run) and run.record.command == "train" and _has_tokenizer(run)]
    found = _predicted([run for run in asked if _PREDICTED not in run.record.reason])
    for run in asked:
        if run.id in found:
            need = found[run.id]
            said = f"{_PREDICTED} {format_bytes(need['bytes'])} over the idle process"
            said += f" ({need['rows']} rows of {format_length(need['context'])} at once)"
            run.update(reason=f"{run.record.reason}; {said}")


def _predicted(asked: Sequence[Run]) -> dict[str, dict[str, Any]]:
    """What `ctxlab _need` says, by run. Where it dies of a run, it is asked again about those after that one."""
    found: dict[str, dict[str, Any]] = {}
    left = list(asked)
    while left:
        line = [sys.executable, "-m", "ctxlab", "_need", *(str(run.path.absolute()) for run in left)]
        try:
            out = subprocess.run(line, capture_output=True, timeout=_PATIENCE, check=False).stdout
        except subprocess.TimeoutExpired as late:
            out = late.stdout or b""
        rows = [json.loads(text) for text in out.decode().splitlines() if text.startswith("{") and text.endswith("}")]
        found |= {row["run"]: row for row in rows}
        left = [run for run in left if run.id not in found][1:]
    return found


def show_outcomes(runs: Sequence[Run], console: Console) -> None:
    """A line for each run that is not done: which, how it ended, why."""
    for name, run in zip(labels(runs), runs, strict=True):
        if run.record.status != "done":
            text = Text.assemble((f"{run.record.status} ", "bold"), f"{name} ({run.id}): {run.record.reason}")
            console.print(text, soft_wrap=True)


def show_log_ends(runs: Sequence[Run], console: Console) -> None:
    """The last lines of the log of each run that failed."""
    for run in runs:
        lines = log_lines(run.path / LOG) if run.record.status == "failed" else []
        if lines and lines[-1].startswith("error: "):
            del lines[-1]  # it is the reason
        if lines:
            console.print(Text(f"{run.path / LOG} ends with"), soft_wrap=True)
            for line in lines[-_TAIL:]:
                console.print(Text(f"  {line}", style="dim"), soft_wrap=True)


def _by_memory(run: Run) -> bool:
    return run.record.status == "out_of_memory" or "SIGKILL" in run.record.reason


def _has_tokenizer(run: Run) -> bool:
    return (run.path / "tokenizer").is_dir()
