"""runs/index.sqlite: what lists and pages need of every run, so that 2,000 runs are one read and not 2,000 folders of files.

Of each run its record, its results at each context, and its curves thinned to POINTS points. The files are the truth and
this is a copy: a row is used only while size, time of change and inode of the file behind it are what they were when it was
read, so the index may be deleted at any time, copied, out of date, or written by several processes at once.
"""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from ctxlab.errors import RecordError
from ctxlab.records.run import MEASUREMENTS_FILE, METRICS_FILE, RUN, Run, measurement_rows, metric_rows
from ctxlab.records.schema import METRICS, ROW_KEYS, Measurement, RunRecord, is_headline

INDEX = "index.sqlite"
POINTS = 300
"""Points of a kept curve: the first, the last, and between them the lowest and the highest of each of 149 equal stretches."""
_VERSION = 1  # of the tables and of what is in them; another one is thrown away
_PATIENCE = 5.0  # seconds to wait for another process that writes
_AT_ONCE = 50  # runs whose curves are written together
_COLUMNS = "folder, stamp, results_stamp, id, started, context, status, record, results"
_TABLES = {
    "runs": "folder TEXT PRIMARY KEY, stamp TEXT, results_stamp TEXT, id TEXT, started TEXT, context INTEGER,"
    " status TEXT, record TEXT, results TEXT",
    "thinned": "folder TEXT PRIMARY KEY, stamp TEXT",
    "curves": "split TEXT, name TEXT, folder TEXT, n INTEGER, points BLOB, PRIMARY KEY (split, name, folder)",
}

Statement = tuple[str, Sequence[Any]]
Packed = tuple[int, bytes]  # rows behind a curve; its steps, tokens, seconds and values as doubles
Curves = dict[tuple[str, str], Packed]  # by split and name
Answer = TypeVar("Answer")


class Result(NamedTuple):
    """A measurement in short: one number of one name at one context."""

    name: str
    context: int | None
    value: float | None
    low: float | None = None
    high: float | None = None
    status: str = "done"
    reason: str = ""

    def measurement(self) -> Measurement:
        """As a row that tables print."""
        return Measurement(unit=METRICS[self.name].unit, **self._asdict())


@dataclass(frozen=True)
class Curve:
    """A metric over training, thinned: `n` rows lie behind these points, in order of step."""

    n: int
    steps: Sequence[float]
    tokens: Sequence[float]
    seconds: Sequence[float]
    values: Sequence[float]


@dataclass(frozen=True)
class Summary:
    """One run as lists and pages show it. What is not asked for is not parsed."""

    path: Path
    id: str
    started: str | None
    context: int | None
    status: str
    written: str  # the record as JSON
    measured: str  # the results as JSON

    @cached_property
    def record(self) -> RunRecord:
        return RunRecord.model_validate_json(self.written)

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The config's dotted keys, `position` and `position.theta`."""
        return flatten(json.loads(self.written)["config"])

    @cached_property
    def results(self) -> dict[tuple[str, int | None], Result]:
        """The headline results: one a name and context, of windows that follow one another."""
        return {(row[0], row[1]): Result(*row) for row in json.loads(self.measured)}

    def run(self) -> Run:
        """All that there is of it."""
        return Run(self.path)


class RunIndex:
    """The index of one folder of runs. Opened anew for every question, so it may be asked from any thread."""

    def __init__(self, root: Path) -> None:
        self.root = Path(root)

    def summaries(self) -> list[Summary]:
        """All readable runs as they are now, newest first; runs that wait come last."""
        names = self._names()
        found = self._ask(lambda table: self._summaries(table, names)) if names else []
        return sorted(found, key=lambda one: (one.started or "", one.id), reverse=True)

    def curves(self, runs: Iterable[Summary], name: str, *, split: str = "train") -> dict[str, Curve]:
        """The thinned curve of a metric by run id, of the runs that have one."""
        ids = {one.path.name: one.id for one in runs}

        def read(table: sqlite3.Connection) -> dict[str, Packed]:
            fresh = self._thinned(table, ids)
            asked = table.execute("SELECT folder, n, points FROM curves WHERE split = ? AND name = ?", (split, name))
            found = {folder: (n, points) for folder, n, points in asked if folder not in fresh}
            return found | {folder: own[split, name] for folder, own in fresh.items() if (split, name) in own}

        found = self._ask(read)
        return {ids[folder]: _unpacked(*found[folder]) for folder in ids if folder in found}

    def remember(self, folder: Path) -> None:
        """Takes one run in, with its curves, so that whoever looks next does not wait for that."""
        with contextlib.suppress(RecordError):
            self._ask(
                lambda table: (self._summaries(table, [folder.name], only=True), self._thinned(table, [folder.name]))
            )

    def _summaries(self, table: sqlite3.Connection, names: Sequence[str], *, only: bool = False) -> list[Summary]:
        where, what = (" WHERE folder = ?", names) if only else ("", ())
        kept = {row[0]: row[1:] for row in table.execute(f"SELECT {_COLUMNS} FROM runs{where}", what)}
        found, changes = [], [_forget(folder) for folder in kept.keys() - set(names)]
        for name in names:
            folder = self.root / name
            stamp = _stamp(folder / RUN)
            if not stamp:
                continue
            row = kept.get(name)
            if row is None or row[:2] != (stamp, _stamp(folder / MEASUREMENTS_FILE)):
                try:
                    row = _read(folder)
                except RecordError:
                    continue
                changes.append([("INSERT OR REPLACE INTO runs VALUES (?,?,?,?,?,?,?,?,?)", (name, *row))])
            found.append(_summary(folder, row))
        _write(table, changes)
        return found

    def _thinned(self, table: sqlite3.Connection, names: Iterable[str]) -> dict[str, Curves]:
        """Brings the curves of these folders up to date; returns those that had to be read anew."""
        kept = dict(table.execute("SELECT folder, stamp FROM thinned"))
        fresh: dict[str, Curves] = {}
        changes = []
        for name in names:
            file = self.root / name / METRICS_FILE
            stamp = _stamp(file)
            if kept.get(name) == stamp:
                continue
            try:
                fresh[name] = own = _thin_all(metric_rows(file))
            except RecordError:
                continue
            changes.append([
                ("DELETE FROM curves WHERE folder = ?", (name,)),
                *(("INSERT INTO curves VALUES (?,?,?,?,?)", (*key, name, *packed)) for key, packed in own.items()),
                ("INSERT OR REPLACE INTO thinned VALUES (?,?)", (name, stamp)),
            ])  # fmt: skip
            if len(changes) == _AT_ONCE:
                _write(table, changes)
                changes = []
        _write(table, changes)
        return fresh

    def _names(self) -> list[str]:
        try:
            return sorted(name for name in os.listdir(self.root) if not name.startswith("."))
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            raise RecordError(f"paths.runs: {self.root} cannot be read: {error.strerror or error}") from error

    def _ask(self, question: Callable[[sqlite3.Connection], Answer]) -> Answer:
        """The answer by way of the file; where that cannot be used (read-only, locked, broken), of the runs alone.

        A broken file is thrown away.
        """
        file = self.root / INDEX
        try:
            with contextlib.closing(sqlite3.connect(file, timeout=_PATIENCE, isolation_level=None)) as table:
                if table.execute("PRAGMA user_version").fetchone() != (_VERSION,):
                    _make(table)
                return question(table)
        except sqlite3.DatabaseError as error:
            if getattr(error, "sqlite_errorcode", 0) & 0xFF in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
                with contextlib.suppress(OSError):
                    file.unlink()
        with contextlib.closing(sqlite3.connect(":memory:", isolation_level=None)) as table:
            _make(table)
            return question(table)


def flatten(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as dotted keys; a part's `name` is the part: `position` and `position.theta`."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix.removesuffix(".") if key == "name" and prefix else f"{prefix}{key}"] = value
    return flat


def thin(values: Sequence[float], most: int = POINTS) -> list[int]:
    """Which of many values to keep, at most `most`, so that no peak is lost.

    The first, the last, and the lowest and highest of each of (most - 2) / 2 stretches of equal length between them.
    """
    last = len(values) - 1
    if last < most:
        return list(range(last + 1))
    stretches = (most - 2) // 2
    kept = {0, last}
    for number in range(stretches):
        stretch = range(1 + number * (last - 1) // stretches, 1 + (number + 1) * (last - 1) // stretches)
        kept |= {min(stretch, key=values.__getitem__), max(stretch, key=values.__getitem__)}
    return sorted(kept)


def _make(table: sqlite3.Connection) -> None:
    """Empty tables in place of what is there."""
    table.execute("BEGIN IMMEDIATE")
    if table.execute("PRAGMA user_version").fetchone() != (_VERSION,):  # another process was quicker
        for name, columns in _TABLES.items():
            table.execute(f"DROP TABLE IF EXISTS {name}")
            table.execute(f"CREATE TABLE {name} ({columns}) WITHOUT ROWID")
        table.execute(f"PRAGMA user_version = {_VERSION}")
    table.execute("COMMIT")


def _write(table: sqlite3.Connection, changes: Sequence[Sequence[Statement]]) -> None:
    """All changes or none. What cannot be written (read-only, locked for too long, a full disk) is read again next time."""
    if not changes:
        return
    try:
        table.execute("BEGIN IMMEDIATE")
        for one in changes:
            for statement, values in one:
                table.execute(statement, values)
        table.execute("COMMIT")
    except sqlite3.OperationalError:
        with contextlib.suppress(sqlite3.OperationalError):
            table.execute("ROLLBACK")


def _forget(folder: str) -> list[Statement]:
    return [(f"DELETE FROM {name} WHERE folder = ?", (folder,)) for name in _TABLES]


def _stamp(file: Path) -> str:
    """What changes whenever a file does; empty where there is none."""
    try:
        about = os.stat(file)
    except OSError:
        return ""
    return f"{about.st_mtime_ns}:{about.st_size}:{about.st_ino}"


def _read(folder: Path) -> tuple[Any, ...]:
    """A row of `runs`. The stamps are taken first: what changes while it is read is read again."""
    stamps = _stamp(folder / RUN), _stamp(folder / MEASUREMENTS_FILE)
    record = Run(folder).written()
    results = {(m.name, m.context): Result(
        m.name, m.context, m.value, m.low, m.high, m.status, m.reason
    ) for m in measurement_rows(folder / MEASUREMENTS_FILE) if is_headline(m.axes)}  # fmt: skip
    context = record.config.get("context")
    return (
        *stamps, record.id, record.started, context if isinstance(context, int) else None, record.status,
        record.model_dump_json(by_alias=True), json.dumps(list(results.values())),
    )  # fmt: skip


def _summary(folder: Path, row: Sequence[Any]) -> Summary:
    """A row as a summary. Whether a run that says so still runs is seen anew every time."""
    _, _, run_id, started, context, status, record, results = row
    if status == "running":
        with contextlib.suppress(RecordError):
            now = Run(folder).record
            status, record = now.status, now.model_dump_json(by_alias=True)
    return Summary(folder, run_id, started, context, status, record, results)


def _thin_all(rows: Sequence[dict[str, Any]]) -> Curves:
    """Every metric of every split, thinned. What is not finite has no point."""
    found: Curves = {}
    for split in {str(row.get("split")) for row in rows}:
        mine = [row for row in rows if row.get("split") == split]
        for name in {name for row in mine for name in row} - set(ROW_KEYS):
            having = [row for row in mine if isinstance(row.get(name), int | float)]
            if not having:
                continue
            kept = thin([row[name] for row in having])
            columns = [[float(having[n].get(key) or 0) for n in kept] for key in ("step", "tokens", "seconds", name)]
            found[split, name] = len(having), b"".join(array("d", column).tobytes() for column in columns)
    return found


def _unpacked(n: int, points: bytes) -> Curve:
    numbers = array("d")
    numbers.frombytes(points)
    size = len(numbers) // 4
    return Curve(n, *(numbers[part * size : (part + 1) * size] for part in range(4)))
