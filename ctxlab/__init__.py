"""ctxlab: compose a model size, a context length and a positional scheme; measure what every length buys and costs."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from ctxlab.train.checkpoint import LoadedRun

__version__ = "0.1.0"
__all__ = ["__version__", "load"]


def load(selector: str = "last", *, runs: str | Path | None = None, checkpoint: str = "last") -> LoadedRun:
    """The model of a run, ready to use: `load("last").nats("To be, or not to be")`.

    `selector` is a run id, a unique prefix of one, a path, or "last"; `runs` the folder of the runs (CTXLAB_RUNS, else
    "runs"); `checkpoint` is "last", "best" or "average".
    The import of torch waits until the first call, so that `ctxlab --help` stays instant.
    """
    from ctxlab.train.checkpoint import load_run

    return load_run(selector, runs=runs, checkpoint=checkpoint)
