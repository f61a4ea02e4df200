"""One run's folder. Every change of run.json is whole or not at all; the .jsonl files only grow.

run.json             what the run is, how it went, how to do it again
metrics.jsonl        a row a logging step
measurements.jsonl   a row a result
documents.jsonl      a row a context: the sums behind its results, document by document
items.jsonl          a row an example of a task, with what was answered
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

from ctxlab.errors import RecordError
from ctxlab.records.process import Heartbeat, is_alive, this_process
from ctxlab.records.schema import DocumentSums, Measurement, RunRecord, TaskItem, check_row, read_record

RUN, METRICS_FILE, MEASUREMENTS_FILE, DOCUMENTS_FILE, ITEMS_FILE = (
    "run.json", "metrics.jsonl", "measurements.jsonl", "documents.jsonl", "items.jsonl",
)  # fmt: skip
_HEARTBEAT, _LOCK = ".heartbeat", ".lock"


class Sums(Protocol):
    """Sums by document, as an evaluation hands them over."""

    names: list[str]
    nats: list[float]
    targets: list[int]
    n_bytes: list[int]


class Run:
    """One run's folder and what is in it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.record = self._read()
        self._metrics: int | None = None
        self._heartbeat: Heartbeat | None = None

    @property
    def id(self) -> str:
        return self.record.id

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def has_weights(self) -> bool:
        return (self.checkpoints / "last").exists()

    def reload(self) -> RunRecord:
        """Reads run.json again: another process may have changed it."""
        self.record = self._read()
        return self.record

    def update(self, **changes: Any) -> None:
        """Changes some fields of run.json, atomically and to disk; what other processes changed meanwhile stays."""
        with self._locked():
            written = self.written()
            self.record = RunRecord.model_validate({**dict(written), **changes})
            write_record(self.path, self.record)

    def restart(self) -> None:
        """A waiting run begins, or one that ended goes on: by this process, one attempt more if it ran before."""
        again = self.record.started is not None
        self.update(
            status="running",
            reason="",
            started=self.record.started or now(),
            finished=None,
            attempt=self.record.attempt + 1 if again else 1,
            process=this_attempt(),
        )
        self.beat()

    def finish(self, status: str, reason: str = "") -> None:
        """Sets how a run ended, when, and how long it took: the time of all attempts, not the pauses between them."""
        ended, begun = now(), self.record.process.get("begun")
        wall = self.record.wall_seconds
        if begun is not None:
            wall = (wall or 0.0) + (datetime.fromisoformat(ended) - datetime.fromisoformat(begun)).total_seconds()
        self.close()
        self.update(status=status, reason=reason, finished=ended, wall_seconds=wall, process={})

    def beat(self) -> None:
        """From now on says every ten seconds that this process is at work on the run, until `finish` or `close`."""
        if self._heartbeat is None:
            self._heartbeat = Heartbeat(self.path / _HEARTBEAT)

    def close(self) -> None:
        """Lets go of the open file and stops the heartbeat. The run can be written to again."""
        if self._heartbeat is not None:
            self._heartbeat.stop()
            self._heartbeat = None
        if self._metrics is not None:
            os.close(self._metrics)
            self._metrics = None

    def log(self, row: dict[str, Any]) -> None:
        """Appends one row of metrics. Raises ValueError for a name that the table of metrics does not have."""
        check_row(row)
        path = self.path / METRICS_FILE
        try:
            if self._metrics is None:
                self._metrics = _open_to_append(path)
            _append(self._metrics, _json_line(row))
        except OSError as error:
            raise RecordError(f"{path} cannot be written: {error.strerror or error}") from error

    def measure(self, *measurements: Measurement) -> None:
        """Appends results, to disk."""
        append_lines(self.path / MEASUREMENTS_FILE, [m.model_dump_json() + "\n" for m in measurements])

    def write_documents(
        self, documents: Mapping[int, Sums], *, split: str = "test", axes: Mapping[str, Any] | None = None
    ) -> None:
        """Appends the sums by document of each context, to disk."""
        self.add_documents(*(
            DocumentSums(
                context=context, split=split, axes=dict(axes or {}), names=tuple(sums.names),
                nats=tuple(sums.nats), targets=tuple(sums.targets), n_bytes=tuple(sums.n_bytes),
            )
            for context, sums in documents.items()
        ))  # fmt: skip

    def add_documents(self, *rows: DocumentSums) -> None:
        """Appends sums by document, to disk."""
        append_lines(self.path / DOCUMENTS_FILE, [row.model_dump_json() + "\n" for row in rows])

    def metrics(self) -> list[dict[str, Any]]:
        """All rows in order of step, the last one written of each step and split (a resumed run writes some again)."""
        return metric_rows(self.path / METRICS_FILE)

    def measurements(self) -> list[Measurement]:
        """All results, the last one written of each name, context, split, protocol and axes."""
        return measurement_rows(self.path / MEASUREMENTS_FILE)

    def documents(self) -> list[DocumentSums]:
        """The sums by document, the last ones written of each context, split and axes."""
        found: dict[tuple[Any, ...], DocumentSums] = {}
        for line in _lines(self.path / DOCUMENTS_FILE):
            with contextlib.suppress(ValueError):
                one = DocumentSums.model_validate_json(line)
                found[(one.context, one.split, axes_key(one.axes))] = one
        return list(found.values())

    def write_items(self, items: Sequence[TaskItem]) -> None:
        """Appends examples of tasks with their answers, to disk."""
        append_lines(self.path / ITEMS_FILE, [item.model_dump_json() + "\n" for item in items])

    def items(self) -> list[TaskItem]:
        """The examples of tasks, the last one written of each."""
        found: dict[tuple[Any, ...], TaskItem] = {}
        for line in _lines(self.path / ITEMS_FILE):
            with contextlib.suppress(ValueError):
                one = TaskItem.model_validate_json(line)
                found[(one.task, one.context, one.depth, one.item, axes_key(one.axes))] = one
        return list(found.values())

    def _read(self) -> RunRecord:
        record = self.written()
        if record.status == "running" and not is_alive(record.process, self._heartbeat_age()):
            return record.model_copy(update={"status": "killed", "reason": record.reason or "its process is gone"})
        return record

    def written(self) -> RunRecord:
        """The record as its file has it: a run whose process is gone still says that it runs."""
        file = self.path / RUN
        try:
            return read_record(file.read_text(encoding="utf-8"), str(file))
        except (OSError, UnicodeDecodeError) as error:
            raise RecordError(f"{file}: {getattr(error, 'strerror', None) or error}") from error

    def _heartbeat_age(self) -> float:
        for name in (_HEARTBEAT, RUN):
            with contextlib.suppress(OSError):
                return time.time() - (self.path / name).stat().st_mtime
        return math.inf

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """One writer of run.json at a time: a run that ends while its user tags it."""
        try:
            handle = os.open(self.path / _LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise RecordError(f"{self.path / RUN} cannot be written: {error.strerror or error}") from error
        try:
            with contextlib.suppress(OSError):  # a file system without locks: one writer, as a rule
                fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        finally:
            os.close(handle)


def write_record(path: Path, record: RunRecord) -> None:
    """run.json, replaced in one move after its bytes are on disk. Raises RecordError where the disk refuses."""
    draft = path / f".{RUN}-{os.getpid()}"
    try:
        with open(draft, "w", encoding="utf-8") as file:
            file.write(json.dumps(record.model_dump(mode="json", by_alias=True), indent=1, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path / RUN)
        _flush_folder(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            draft.unlink(missing_ok=True)
        raise RecordError(f"{path / RUN} cannot be written: {error.strerror or error}") from error


def append_lines(path: Path, lines: Iterable[str]) -> None:
    """Appends whole lines to a file that only grows, to disk. Raises RecordError where the disk refuses."""
    try:
        file = _open_to_append(path)
        try:
            _append(file, "".join(lines).encode())
            os.fsync(file)
        finally:
            os.close(file)
    except OSError as error:
        raise RecordError(f"{path} cannot be written: {error.strerror or error}") from error


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The whole rows of such a file, in order; none where there is no file."""
    for row in map(_parse, _lines(path)):
        if row is not None:
            yield row


def metric_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl in order of step, the last one written of each step and split."""
    rows: dict[tuple[int, str], dict[str, Any]] = {}
    for row in read_rows(path):
        rows[(row.get("step", 0), row.get("split", ""))] = row
    return sorted(rows.values(), key=lambda row: row.get("step", 0))


def measurement_rows(path: Path) -> list[Measurement]:
    """The results in a measurements.jsonl, the last one written of each name, context, split, protocol and axes."""
    found: dict[tuple[Any, ...], Measurement] = {}
    for line in _lines(path):
        with contextlib.suppress(ValueError):  # half a line, or a name of a newer version's
            one = Measurement.model_validate_json(line)
            found[(one.name, one.context, one.split, one.protocol, one.normaliser, axes_key(one.axes))] = one
    return list(found.values())


def axes_key(axes: Mapping[str, Any]) -> str:
    """The axes of an evaluation as something to compare by."""
    return repr(sorted(axes.items()))


def now() -> str:
    """The time in UTC as records write it."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def this_attempt() -> dict[str, Any]:
    """What a record says of the process at work on it, and since when."""
    return {**this_process(), "begun": now()}


def _flush_folder(path: Path) -> None:
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _open_to_append(path: Path) -> int:
    """A file to append whole lines to: what a crash left half written at its end becomes a line of its own."""
    file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
    size = os.fstat(file).st_size
    if size and os.pread(file, 1, size - 1) != b"\n":
        os.write(file, b"\n")
    return file


def _append(file: int, data: bytes) -> None:
    while data:
        data = data[os.write(file, data) :]


def _json_line(row: dict[str, Any]) -> bytes:
    try:
        return json.dumps(row, allow_nan=False).encode() + b"\n"
    except ValueError:
        # JSON knows no nan and no infinity: null.
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        return json.dumps(finite, allow_nan=False).encode() + b"\n"


def _lines(path: Path) -> Iterator[bytes]:
    try:
        with open(path, "rb") as file:
            yield from file
    except FileNotFoundError:
        return
    except OSError as error:
        raise RecordError(f"{path} cannot be read: {error.strerror or error}") from error


def _parse(line: bytes) -> dict[str, Any] | None:
    """A whole row, or None for what a crash left half written."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None
