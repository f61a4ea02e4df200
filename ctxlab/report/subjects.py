"""What a page is about: runs with their results, evaluations with the runs that they are of, and results that a study left.

Rows and curves are read when they are first asked for, so that a thousand runs are listed without opening a thousand files.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from ctxlab.errors import RecordError
from ctxlab.records.run import Run
from ctxlab.records.schema import Measurement
from ctxlab.report.results import settings

SPLITS = ("train", "validation")
AGAIN = "eval."  # before the settings of an evaluation, beside those of the run that it is of
_SUMMARY = "summary.jsonl"

Curve = list[tuple[int, float]]  # (tokens, nats per token)


@dataclass
class Subject:
    """One thing with results: a run, one run of an evaluation, or a file of results. `run` is the record, where there is one."""

    id: str
    command: str
    settings: dict[str, Any]
    run: Run | None = None
    whose: str | None = None  # of an evaluation: the run whose weights it looked at
    results: Path | None = None
    own: dict[str, list[Measurement]] | None = field(default=None, repr=False)  # an evaluation's rows, by run
    thinned: dict[str, Curve] | None = field(default=None, repr=False)  # its curves, where the index has them

    @property
    def trained(self) -> int | None:
        """The context that its weights were trained at."""
        found = self.settings.get("context")
        return found if isinstance(found, int) and not isinstance(found, bool) else None

    @cached_property
    def measurements(self) -> list[Measurement]:
        """Its results, without those of a baseline of the same text."""
        if self.run is None:
            rows = [] if self.results is None else read_measurements(self.results)
        elif self.own is not None:
            rows = self.own[self.whose or ""]
        else:
            rows = self.run.measurements()
        return [m for m in rows if "baseline" not in m.axes]

    @cached_property
    def curves(self) -> dict[str, Curve]:
        """split -> loss by tokens seen, as it was logged, or thinned."""
        if self.thinned is not None:
            return self.thinned
        found: dict[str, Curve] = {}
        for row in self.run.metrics() if self.run is not None and self.own is None else ():
            loss = row.get("nats_per_token", row.get("loss"))
            if row.get("split") in SPLITS and isinstance(row.get("tokens"), int) and isinstance(loss, float):
                found.setdefault(row["split"], []).append((row["tokens"], loss))
        return found


def subjects_of(runs: Sequence[Run], known: Mapping[str, Run] | None = None) -> list[Subject]:
    """What `runs` are about, in order: an evaluation once for each run that it is of, with that run's settings.

    `known` are runs by id that evaluations may be of though they are not asked for themselves.
    """
    by_id = {**(known or {}), **{run.id: run for run in runs}}
    found = []
    for run in runs:
        if run.record.command != "eval":
            found.append(Subject(run.id, run.record.command, settings(run.record.config), run))
            continue
        rows: dict[str, list[Measurement]] = {}
        for m in run.measurements():
            rows.setdefault(str(m.axes.get("run") or run.record.parent or ""), []).append(m)
        own = {f"{AGAIN}{k}": v for k, v in settings(run.record.config).items() if k not in ("run", "seed")}
        for whose in rows:
            theirs = by_id.get(whose) or _beside(run, whose)
            told = {**(settings(theirs.record.config) if theirs else {}), **own}
            found.append(Subject(run.id, "eval", told, run, whose or None, own=rows))
    return found


def subjects_in(folder: Path) -> list[Subject]:
    """The results that a study left in a folder: a file a run. Runs that its summary takes together are grouped as there."""
    together = {
        run_id: str(m.facts["of"])
        for m in (read_measurements(folder / _SUMMARY) if (folder / _SUMMARY).is_file() else ())
        if m.facts.get("of")
        for run_id in m.facts.get("runs", ())
    }
    files = sorted(path for path in folder.glob("*.jsonl") if path.name != _SUMMARY)
    return [
        Subject(path.stem, "results", {"run": together.get(path.stem, path.stem)}, results=path)
        for path in files
        if read_measurements(path)
    ]


def with_evaluations(chosen: Iterable[Run], every: Iterable[Run]) -> list[Run]:
    """The chosen runs, then the evaluations of any of them."""
    runs = list({run.path.resolve(): run for run in chosen}.values())
    ids = {run.id for run in runs}
    for run in every:
        if run.record.command == "eval" and run.id not in ids:
            of = run.record.config.get("run")
            if ids.intersection([run.record.parent, *(of if isinstance(of, list) else [])]):
                runs.append(run)
    return runs


def read_measurements(path: Path) -> list[Measurement]:
    """The results in a file, what cannot be read passed over. Raises RecordError where the file cannot be opened."""
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise RecordError(f"{path} cannot be read: {error.strerror or error}") from error
    found = []
    for line in lines:
        with contextlib.suppress(ValueError):
            found.append(Measurement.model_validate_json(line))
    return found


def _beside(run: Run, whose: str) -> Run | None:
    """The run that an evaluation names, in the same folder of runs."""
    if not whose or Path(whose).name != whose:
        return None
    try:
        return Run(run.path.parent / whose)
    except RecordError:
        return None
