"""What a study leaves in results/: the measurements of each run, what they come to, the comparison, the figure.

ID.jsonl             the measurements of one run
summary.jsonl        changes of loss from the trained length, paired over documents; means over seeds: each with its runs
report.txt           the comparison, as it is printed
loss_by_length.png   loss by context, where it was measured
answers_by_depth.png scores on tasks by depth and length, where they were asked so
SCRIPT.txt           what a script of the study printed
"""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from ctxlab.errors import RecordError
from ctxlab.records.run import Run
from ctxlab.records.schema import Measurement
from ctxlab.records.store import RunStore
from ctxlab.report.plots import loss_figure, save, save_loss_by_length, trained_contexts
from ctxlab.report.repeats import mean_curves, repeats, repeats_tables, with_differences
from ctxlab.report.results import paired, way_of
from ctxlab.report.tables import show_evaluation, show_heading, show_lengths, show_sweep
from ctxlab.report.task_tables import save_task_maps

SUMMARY, REPORT, FIGURE, MAPS = "summary.jsonl", "report.txt", "loss_by_length.png", "answers_by_depth.png"
_WIDTH = 120


def make_folder(folder: Path) -> None:
    """Raises RecordError where the folder of results cannot be made or written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RecordError(f"results: {folder} cannot be made: {error.strerror or error}") from error
    if not os.access(folder, os.W_OK):
        raise RecordError(f"results: {folder} cannot be written")


def save_runs(runs: Sequence[Run], folder: Path) -> None:
    """The measurements of each run that has any, in a file of its own."""
    for run in runs:
        measured = run.measurements()
        if measured:
            write(folder / f"{run.id}.jsonl", _rows(measured))


def save_report(name: str, runs: Sequence[Run], folder: Path) -> None:
    """Everything that the runs of a study come to: the summary, the report, the figures. Nothing where there are none."""
    if not runs:
        return
    save_runs(runs, folder)
    summary = summarise(runs)
    if summary:
        write(folder / SUMMARY, _rows(summary))
    console = Console(file=io.StringIO(), width=_WIDTH, color_system=None, highlight=False)
    show_study(runs, console)
    assert isinstance(console.file, io.StringIO)
    write(folder / REPORT, "\n".join(line.rstrip() for line in console.file.getvalue().strip("\n").splitlines()) + "\n")
    trained = [run for run in runs if run.record.command == "train"]
    curves, bands = mean_curves(repeats(trained))
    if curves:
        heading = f"{name}: test loss by context, mean over seeds and 95%"
        save(loss_figure(curves, trained_contexts(trained), heading=heading, bands=bands), folder / FIGURE)
    elif trained:
        save_loss_by_length(trained, folder / FIGURE)
    if trained:
        save_task_maps(trained, folder / MAPS)


def show_study(runs: Sequence[Run], console: Console) -> None:
    """The comparison of a study's runs: trained, measured, evaluated again, and what was repeated."""
    for command in ("train", "profile"):
        some = [run for run in runs if run.record.command == command]
        if len(some) == 1:
            show_heading(some[0], console)
            show_lengths(some[0].measurements(), some[0].record.config.get("context"), console)
        elif some:
            show_sweep(some, console, metric="bits_per_byte")
    for run in runs:
        if run.record.command == "eval":
            store = RunStore(run.path.parent)
            console.print()
            show_evaluation(run, [store.open(run_id) for run_id in run.record.config["run"]], console)
    for grid in repeats_tables(repeats(runs)):
        console.print()
        console.print(grid)


def summarise(runs: Sequence[Run]) -> list[Measurement]:
    """Numbers that are of no single row: how loss changes from the trained length on, and means over seeds."""
    found: list[Measurement] = []
    for run in runs:
        trained = run.record.config.get("context")
        documents = {d.context: d for d in run.documents() if not d.axes}
        scored = {m.context: m for m in run.measurements() if m.name == "nats_per_token" and not way_of(m.axes)}
        start = scored.get(trained)
        if trained is None or start is None or start.value is None:
            continue
        for context, m in scored.items():
            bounds = paired(documents.get(context or 0), documents.get(trained))
            if context in (None, trained) or m.value is None or bounds is None:
                continue
            facts = {"run": run.id, "difference": m.value - start.value, "difference_context": trained}
            facts |= {"difference_low": bounds[0], "difference_high": bounds[1]}
            found.append(m.model_copy(update={"facts": facts}))
    return found + [m for _, means in with_differences(repeats(runs)) for m in means]


def write(path: Path, text: str) -> None:
    """A file of results, whole or not at all, and left alone where it says the same. Raises RecordError."""
    draft = path.with_name(f".{path.name}-{os.getpid()}")
    try:
        if path.is_file() and path.read_text(encoding="utf-8") == text:
            return
        draft.write_text(text, encoding="utf-8")
        os.replace(draft, path)
    except OSError as error:
        draft.unlink(missing_ok=True)
        raise RecordError(f"{path} cannot be written: {error.strerror or error}") from error


def _rows(measurements: Sequence[Measurement]) -> str:
    return "".join(m.model_dump_json() + "\n" for m in measurements)
