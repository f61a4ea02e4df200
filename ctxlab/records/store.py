"""Runs on disk: made, found, changed, thrown away. run.py is one of them."""

from __future__ import annotations

import os
import re
import secrets
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ctxlab.errors import RecordError
from ctxlab.records.journal import line_at_work
from ctxlab.records.run import RUN, Run, now, this_attempt, write_record
from ctxlab.records.schema import SCHEMA, Provenance, RunRecord, SweepCell
from ctxlab.registry import nearest

__all__ = ["Run", "RunStore"]

_ALPHABET = "abcdefghijkmnpqrstuvwxyz23456789"  # no l, o, 0, 1: they are misread
_LONGEST_STEM = 80  # characters: file systems stop at 255 bytes a name
_TRASH = ".trash"


class RunStore:
    """The folder of all runs."""

    def __init__(self, root: Path) -> None:
        self.root = Path(root)

    def create(
        self,
        command: str,
        stem: str,
        *,
        config: dict[str, Any],
        line: str,
        parent: str | None = None,
        sweep: dict[str, Any] | None = None,
        experiment: str | None = None,
        tags: Sequence[str] = (),
        note: str = "",
        status: str = "running",
        plugins: Sequence[tuple[str, str]] = (),
    ) -> Run:
        """Makes the folder of a new run and writes its record. Raises RecordError where that is impossible.

        A run that a line of a study makes is that study's, whatever else it was composed from.
        """
        study = line_at_work(self.root)
        path = self._new_folder(stem)
        running = status == "running"
        record = RunRecord(
            schema_number=SCHEMA,
            id=path.name,
            name=stem,
            command=command,
            line=line,
            status=status,
            started=now() if running else None,
            parent=parent,
            sweep=None if sweep is None else SweepCell(**sweep),
            experiment=experiment if study is None else study.name,
            tags=tuple(tags),
            note=note,
            config=config,
            provenance=Provenance(plugins=tuple(plugins)),
            process=this_attempt() if running else {},
        )
        try:
            if study is not None:  # before there is a record: a run that the journal lacks would be lost to its line
                study.made(path.name)
            write_record(path, record)
        except RecordError:
            shutil.rmtree(path, ignore_errors=True)
            raise
        run = Run(path)
        if running:
            run.beat()
        return run

    def open(self, run: str | Path) -> Run:
        """A run by id or by path. Raises RecordError when there is none."""
        path = Path(run) if (Path(run) / RUN).is_file() else self.root / str(run)
        if not (path / RUN).is_file():
            raise RecordError(f"run: there is no run '{run}' in {self.root}{nearest(str(run), self._ids())}")
        return Run(path)

    def resolve(self, selector: str) -> Run:
        """A run by id, unique prefix, path, or `last`: the newest run with weights.

        Raises RecordError when nothing fits (naming the nearest id) or when several do (naming them).
        """
        if selector == "last":
            for run in self.runs():
                if run.has_weights:
                    return run
            raise RecordError(f"run: no run in {self.root} has weights yet; make one with: ctxlab train")
        if (self.root / selector / RUN).is_file() or (Path(selector) / RUN).is_file():
            return self.open(selector)
        matches = sorted(run_id for run_id in self._ids() if run_id.startswith(selector))
        if len(matches) > 1:
            shown = ", ".join(matches[:5])
            raise RecordError(
                f"run: '{selector}' begins {len(matches)} runs: {shown}{' ...' if len(matches) > 5 else ''}"
            )
        return self.open(matches[0] if matches else selector)

    def resolve_all(self, selectors: Sequence[str]) -> list[Run]:
        """The runs that several selectors name, in their order, each once; a prefix is of all finished runs that it begins, the
        oldest first.

        Raises RecordError where a selector fits none, as `resolve` does.
        """
        found: dict[str, Run] = {}
        finished = [run for run in reversed(self.runs()) if run.record.status == "done"]
        for selector in selectors:
            begun = [run for run in finished if run.id.startswith(selector)]
            for run in begun or [self.resolve(selector)]:
                found.setdefault(run.id, run)
        return list(found.values())

    def runs(self) -> list[Run]:
        """All readable runs, newest first. A folder that is no run is passed over; runs that wait come last."""
        found = []
        for path in self._folders():
            try:
                found.append(Run(path))
            except RecordError:
                continue
        found.sort(key=lambda run: (run.record.started or "", run.id), reverse=True)
        return found

    def remove(self, run: Run) -> Path:
        """Moves a run to the folder's .trash and returns where it is now. Raises RecordError while it runs."""
        if run.record.status == "running":
            raise RecordError(f"run: {run.id} is running; stop it first")
        trash = self.root / _TRASH
        target = trash / run.path.resolve().name
        try:
            trash.mkdir(exist_ok=True)
            if target.exists():
                target = trash / f"{target.name}-{_random()}"
            os.rename(run.path, target)
        except OSError as error:
            raise RecordError(f"run: {run.path} cannot be moved to {trash}: {error.strerror or error}") from error
        return target

    def restore(self, name: str) -> Run:
        """Moves a run back from .trash: its folder's name there, or a unique prefix. Raises RecordError where it cannot."""
        trash = self.root / _TRASH
        thrown = sorted(path.name for path in trash.glob("*") if (path / RUN).is_file())
        matches = [name] if name in thrown else [found for found in thrown if found.startswith(name)]
        if len(matches) != 1:
            many = f"'{name}' begins {len(matches)} runs in {trash}: {', '.join(matches[:5])}"
            raise RecordError(
                f"run: {many if matches else f'there is no run {name!r} in {trash}{nearest(name, thrown)}'}"
            )
        # Of two that were thrown away under the same name, one lies there under another.
        run_id = Run(trash / matches[0]).id
        target = self.root / run_id
        try:
            if target.exists():
                raise RecordError(f"run: {target} is there already")
            os.rename(trash / matches[0], target)
        except OSError as error:
            raise RecordError(f"run: {trash / matches[0]} cannot be moved back: {error.strerror or error}") from error
        return Run(target)

    def _new_folder(self, stem: str) -> Path:
        """A folder that was not there before: of two processes that draw the same name one draws again."""
        words = re.sub(r"[^A-Za-z0-9._]+", "-", stem)[:_LONGEST_STEM].strip("-._") or "run"
        words = words if words[0].isalpha() else f"run-{words}"  # Hydra's lexer wants a letter first
        try:
            self.root.mkdir(parents=True, exist_ok=True)
        except FileExistsError as error:
            raise RecordError(f"paths.runs: {self.root} is not a folder") from error
        except OSError as error:
            raise RecordError(f"paths.runs: {self.root} cannot be made: {error.strerror or error}") from error
        while True:
            path = self.root / f"{words}-{_random()}"
            try:
                path.mkdir()
            except FileExistsError:
                continue
            except OSError as error:
                raise RecordError(f"paths.runs: {self.root} cannot be written: {error.strerror or error}") from error
            return path

    def _folders(self) -> Iterator[Path]:
        try:
            entries = sorted(os.listdir(self.root))
        except (FileNotFoundError, NotADirectoryError):
            return
        except OSError as error:
            raise RecordError(f"paths.runs: {self.root} cannot be read: {error.strerror or error}") from error
        yield from (self.root / name for name in entries if not name.startswith("."))

    def _ids(self) -> list[str]:
        return [path.name for path in self._folders() if (path / RUN).is_file()]


def _random() -> str:
    return "".join(secrets.choice(_ALPHABET) for _ in range(4))
