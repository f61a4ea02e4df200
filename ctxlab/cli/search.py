"""A sweep whose sweeper is adaptive (optuna): each trial is composed when it is asked for, and is a cell like any other."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace

from hydra.core.utils import JobReturn, JobStatus
from rich.text import Text

from ctxlab.cli import console
from ctxlab.cli.environment import set_process_defaults
from ctxlab.cli.main import INTERRUPTED, TERMINATED
from ctxlab.cli.preflight import check
from ctxlab.cli.start import record_fields, stem
from ctxlab.cli.sweep import SweepView, conclude, resume_line, stopped, sweep_name
from ctxlab.config.overrides import Line, key_of
from ctxlab.config.prepare import Search, prepare_search
from ctxlab.config.sweepers import sweep_with
from ctxlab.data.progress import silent
from ctxlab.errors import ConfigError, CtxlabError, RunError
from ctxlab.launch import Pool, Sweep, new_sweep_id, sweep_folder, write_sweep
from ctxlab.records.schema import METRICS
from ctxlab.records.store import Run, RunStore
from ctxlab.report.results import by_context, number, title


def run_search(line: Line, *, share_threads: bool) -> int:
    """Runs the trials of a line's sweeper, `sweep.jobs` at a time, and prints them compared, the best one last.

    What is fixed on the line is checked before anything starts; a trial that cannot be run is a cell that failed. Exit code
    as of any sweep.
    """
    with prepare_search(line) as search:
        prepared = search.prepared
        fixed = prepared.cells[0].typed
        with console.progress_bar(console.stderr()) as bar:
            check(fixed, bar)
        settings, store = fixed.sweep, RunStore(prepared.runs)
        if share_threads:
            os.environ.pop("OMP_NUM_THREADS", None)
        set_process_defaults(share=settings.jobs)
        sweep_id = new_sweep_id(store.root, sweep_name(prepared))
        sweep = Sweep(
            id=sweep_id,
            command=line.command,
            line=line.text,
            swept=prepared.swept,
            cells=(),
            plugins=tuple((str(plugin.path), plugin.sha256) for plugin in prepared.plugins),
        )
        view = SweepView(console.stderr(), sweep, {}, heading=f"a search by {' '.join(line.sweeper)}")
        trials = Trials(
            search,
            store,
            view,
            Pool(
                jobs=settings.jobs,
                memory=None if settings.memory == "none" else settings.memory,
                timeout=None if settings.timeout == "none" else settings.timeout,
                report=view.update,
                finished=view.finished,
            ),
        )
        try:
            with view.shown():
                sweep_with(
                    [*line.sweeper, *_defaults(line, settings.metric, settings.jobs)],
                    search.arguments,
                    trials,
                    sweep_folder(store.root, sweep_id).absolute(),
                )
        except KeyboardInterrupt:
            return stopped(view.sweep, store, resume_line(prepared, view.sweep), INTERRUPTED)
        except SystemExit:
            return stopped(view.sweep, store, resume_line(prepared, view.sweep), TERMINATED)
        except (CtxlabError, ValueError, AssertionError, NotImplementedError) as error:
            if not view.sweep.cells:  # a space that it cannot search
                shutil.rmtree(sweep_folder(store.root, sweep_id), ignore_errors=True)
                raise ConfigError(_named(error)) from error
            if isinstance(error, CtxlabError):
                raise
            # After its last trial it asks for the best of those that ended well, of which there is none.
        code = conclude(view.sweep, store, settings.metric, resume_line(prepared, view.sweep))
        _say_best([store.open(run_id) for run_id in view.sweep.cells], settings.metric, view)
        return code


class Returned(JobReturn):
    """A trial's result. Hydra's own also writes to stderr of one that failed, which the sweep has said already."""

    @property
    def return_value(self) -> float:
        if self.status is JobStatus.COMPLETED:
            return float(self._return_value)
        raise self._return_value


@dataclass
class Trials:
    """What the sweeper gives its trials to: it gets back what each reached in sweep.metric, or why it has none."""

    search: Search
    store: RunStore
    view: SweepView
    pool: Pool

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Writes the trials of one batch down, runs them, and returns their results in order."""
        trials = [list(map(str, overrides)) for overrides in job_overrides]
        runs = [self._written(trial, initial_job_idx + n) for n, trial in enumerate(trials)]
        self.pool.execute([run for run in runs if run.record.status == "waiting"])
        return [self._returned(run, trial) for run, trial in zip(runs, trials, strict=True)]

    def _written(self, trial: list[str], number: int) -> Run:
        """The record of a trial, `waiting`, or ended already where it cannot be run; the sweep knows it from then on."""
        reason = ""
        try:
            cell = self.search.cell(trial)
            check(cell.typed, silent)  # beside the live table there is no room for a bar
        except CtxlabError as error:
            cell, reason = self.search.asked(trial), "; ".join(str(error).splitlines())
        prepared, sweep = self.search.prepared, self.view.sweep
        run = self.store.create(
            sweep.command,
            stem(sweep.command, cell.typed),
            **record_fields(cell, prepared),
            sweep={"id": sweep.id, "cell": number},
            status="waiting",
        )
        self.view.sweep = replace(sweep, cells=(*sweep.cells, run.id))
        self.view.runs[run.id] = run
        write_sweep(self.store.root, self.view.sweep)
        if reason or cell.skipped:
            run.finish("failed" if reason else "skipped", reason or cell.skipped)
            self.view.finished(run)
        return run

    def _returned(self, run: Run, trial: list[str]) -> JobReturn:
        run.reload()
        metric = self.search.prepared.cells[0].typed.sweep.metric
        value = reached(run, metric) if run.record.status == "done" else None
        if value is not None:
            return Returned(overrides=trial, status=JobStatus.COMPLETED, _return_value=value)
        why = RunError(f"{run.id}: {run.record.status}: {run.record.reason or f'no {metric} at its context'}")
        return Returned(overrides=trial, status=JobStatus.FAILED, _return_value=why)


def reached(run: Run, metric: str) -> float | None:
    """What a run reached in a metric at the context that it was trained at."""
    found = by_context(run.measurements()).get(run.record.config.get("context", -1), {}).get(metric)
    return None if found is None else found.value


def _defaults(line: Line, metric: str, jobs: int) -> list[str]:
    """What the sweeper needs to know of us, unless the line says otherwise."""
    said = set(map(key_of, line.sweeper))
    better = "minimize" if METRICS[metric].lower_is_better else "maximize"
    ours = {"direction": better, "n_jobs": jobs, "max_failure_rate": 1.0}
    return [f"hydra.sweeper.{key}={value}" for key, value in ours.items() if f"hydra.sweeper.{key}" not in said]


def _say_best(runs: Sequence[Run], metric: str, view: SweepView) -> None:
    """The line of the best trial, where one has a value."""
    values = {run.id: value for run in runs if (value := reached(run, metric)) is not None}
    if not values:
        return
    about = METRICS[metric]
    best = min(values, key=lambda run_id: values[run_id] if about.lower_is_better else -values[run_id])
    run = next(run for run in runs if run.id == best)
    text = f"best of {len(values)} in {title(metric)}: {number(values[best], about.unit, name=metric)}"
    console.stdout().print(Text(f"{text}, {view.label(run)} ({best})"), soft_wrap=True)


def _named(error: Exception) -> str:
    text = str(error) or type(error).__name__
    return text if text.startswith("hydra") else f"hydra/sweeper: {text}"
