"""Masked and denoising models in the terminal: what they leave unsaid on held-out text."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.text import Text

from ctxlab.records.schema import Measurement
from ctxlab.report.grid import Grid
from ctxlab.report.results import cell


def denoising_rows(measurements: Sequence[Measurement]) -> list[Measurement]:
    """The results of objectives among others."""
    return [m for m in measurements if "objective" in m.axes]


def show_denoising(rows: Sequence[Measurement], console: Console) -> None:
    """One line a run: nats of the tokens that were hidden, their perplexity, and how often the likeliest is right."""
    names = ("nats_per_token", "perplexity", "accuracy")
    grid = Grid(
        ["run", "nats/token", "perplexity", "right"], heading=f"{rows[0].protocol} on the {rows[0].split} split"
    )
    for run in dict.fromkeys(m.axes.get("run", "") for m in rows):
        here = {m.name: m for m in rows if m.axes.get("run", "") == run}
        grid.add([run or "this one", *(cell(here.get(name), interval=name != "perplexity") for name in names)])
    console.print(grid)
    for line in dict.fromkeys(
        f"of the {m.n_targets:,} tokens to be said in windows of {m.n_docs} documents; ± is 95% over documents"
        for m in rows
    ):
        console.print(Text(line, style="dim"))
