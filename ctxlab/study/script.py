"""What a study's script needs: the runs that it was given, where its figures go, means over seeds, an end like a command's."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from ctxlab.errors import ConfigError, CtxlabError
from ctxlab.evaluation.intervals import ratio_interval
from ctxlab.records.run import Run
from ctxlab.records.store import RunStore
from ctxlab.study.readme import FOLDER

RESULTS = "CTXLAB_RESULTS"  # environment variable of a script: the folder of its study's results


def given_runs(selectors: Sequence[str]) -> list[Run]:
    """The runs that a script's words name, in the folder of runs: ids, or what those of several begin with.

    Raises ConfigError where there are no words, RecordError where one fits no run.
    """
    if not selectors:
        raise ConfigError("run: expected ids of runs, or what they begin with, got none")
    return RunStore(Path(os.environ.get("CTXLAB_RUNS", "runs")).expanduser()).resolve_all(selectors)


def results_folder(study: str) -> Path:
    """Where figures go: the folder that `ctxlab experiment run` names, else the study's own where the user stands."""
    folder = Path(os.environ.get(RESULTS, f"{FOLDER}/{study}/results"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def cache_of(run: Run) -> Path | None:
    """The cache that a run read its data from; None for the user's own."""
    said = run.record.config["paths"]["cache"]
    return None if said == "auto" else Path(said).expanduser()


def mean(values: Sequence[float], name: str) -> dict[str, float | None]:
    """NAME, NAME_low, NAME_high: the mean of repetitions and its 95% interval by Student's t; of one there is none."""
    low, high = ratio_interval(values, [1.0] * len(values)) or (None, None)
    return {name: sum(values) / len(values), f"{name}_low": low, f"{name}_high": high}


def run_script(main: Callable[[Sequence[str]], None]) -> None:
    """Calls a script's main with its words; what ctxlab says to its user is one line, and the exit code is its own."""
    try:
        main(sys.argv[1:])
    except CtxlabError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
