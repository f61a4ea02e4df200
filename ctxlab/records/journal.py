"""What the lines of a study came to: which began, which runs each made, how each ended. One file a study, append-only.

runs/studies/NAME/journal.jsonl   {"line": ..., "event": "began" | "made" | "ended", "run": ID, "code": N}

The process that works through a study tells its children in the environment whose line they are; a run that is created
there enters itself, so nothing has to be guessed after a crash.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ctxlab.errors import RecordError
from ctxlab.records.run import append_lines, read_rows

STUDIES = "studies"  # folder below the runs'
_TRIES, _PAUSE_SECONDS = 5, 0.1
STUDY, LINE = "CTXLAB_STUDY", "CTXLAB_STUDY_LINE"  # environment variables of a line's process


@dataclass
class Entry:
    """One line: the ids of its runs, oldest first, and what it ended with (None: it has not)."""

    runs: list[str] = field(default_factory=list)
    code: int | None = None
    began: bool = False


class Journal:
    """The journal of one study over one folder of runs."""

    def __init__(self, root: Path, name: str) -> None:
        self.name = name
        self.folder = root / STUDIES / name
        self._file = self.folder / "journal.jsonl"

    def began(self, line: str) -> None:
        self._write(line, "began")

    def made(self, line: str, run_id: str) -> None:
        self._write(line, "made", run=run_id)

    def ended(self, line: str, code: int) -> None:
        self._write(line, "ended", code=code)

    def entries(self) -> dict[str, Entry]:
        """line -> what is known of it."""
        found: dict[str, Entry] = {}
        for row in read_rows(self._file):
            entry = found.setdefault(str(row.get("line")), Entry())
            match row.get("event"):
                case "began":
                    entry.began, entry.code = True, None
                case "made":
                    entry.runs.append(str(row.get("run")))
                case "ended":
                    entry.code = row.get("code")
        return found

    @contextlib.contextmanager
    def held(self) -> Iterator[int]:
        """Holds the study against others and yields the lock's file, which a child that inherits it goes on holding.

        Raises RecordError when somebody else is at it.
        """
        handle = self._lock()
        try:
            for _ in range(_TRIES):  # a status that looks holds the lock for a moment
                if _locked(handle):
                    break
                time.sleep(_PAUSE_SECONDS)
            else:
                raise RecordError(f"{self.name}: is running already, over the runs in {self.folder.parent.parent}")
            yield handle
        finally:
            os.close(handle)

    def is_held(self) -> bool:
        """Whether somebody is at work on the study."""
        if not self.folder.is_dir():
            return False
        handle = self._lock()
        try:
            return not _locked(handle)
        finally:
            os.close(handle)

    def _lock(self) -> int:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            return os.open(self.folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise RecordError(f"{self.folder} cannot be written: {error.strerror or error}") from error

    def _write(self, line: str, event: str, **more: Any) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RecordError(f"{self.folder} cannot be made: {error.strerror or error}") from error
        row = {"line": line, "event": event, **more}
        append_lines(self._file, [json.dumps(row, ensure_ascii=False) + "\n"])


@dataclass(frozen=True)
class LineAtWork:
    """The line of a study that this process belongs to."""

    name: str
    line: str
    journal: Journal

    def made(self, run_id: str) -> None:
        self.journal.made(self.line, run_id)


def line_at_work(root: Path) -> LineAtWork | None:
    """Whose line this process is, as its environment says; None where it is nobody's."""
    name, line = os.environ.get(STUDY), os.environ.get(LINE)
    return LineAtWork(name, line, Journal(root, name)) if name and line else None


def _locked(handle: int) -> bool:
    """Takes the lock, if it is free. (A file system without locks has one user, as a rule.)"""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True
