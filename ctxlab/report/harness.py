"""The table of tasks of an evaluation harness: a row a task and metric, a column a run, and what the numbers are."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.text import Text

from ctxlab.records.schema import Measurement
from ctxlab.report.grid import Grid
from ctxlab.report.results import cell


def harness_rows(measurements: Sequence[Measurement]) -> list[Measurement]:
    return [m for m in measurements if "harness" in m.axes]


def task_and_metric(m: Measurement) -> tuple[str, str]:
    """`arc_easy`, `acc`; the filter of the answers beside the metric, where there is one."""
    metric, filtered = m.axes.get("metric", "-"), m.axes.get("filter", "none")
    return m.axes["harness"], metric if filtered == "none" else f"{metric}, {filtered}"


def harness_table(rows: Sequence[Measurement]) -> Grid:
    """Scores with half of their 95% intervals, items and solved examples; of several runs, a column of scores each."""
    found: dict[tuple[str, str], dict[str, Measurement]] = {}
    for m in rows:
        found.setdefault(task_and_metric(m), {})[m.axes.get("run", "")] = m
    runs = list(dict.fromkeys(m.axes.get("run", "") for m in rows))
    grid = Grid(["task", "metric", "items", "shots", *(run or "score" for run in runs)], keys=2)
    for (task, metric), by_run in found.items():
        one = next(iter(by_run.values()))
        shots = one.facts.get("num_fewshot")
        counts = ["-" if one.n_docs is None else f"{one.n_docs:,}", "-" if shots is None else str(shots)]
        grid.add([task, metric, *counts, *(cell(by_run.get(run), interval=True) for run in runs)])
    return grid


def harness_notes(rows: Sequence[Measurement]) -> list[str]:
    """What the numbers are, whose contexts were too long, and why some are missing, in a line each."""
    lines = []
    longest = sorted({m.facts["max_length"] for m in rows if "max_length" in m.facts})
    if longest:
        bounded = any(m.low is not None for m in rows)
        lines.append(
            f"{rows[0].protocol}, requests of at most {' or '.join(map(str, longest))} tokens"
            + ("; ± is 95%: 1.96 standard errors, of perplexities over documents" if bounded else "")
        )
    limits = sorted({m.axes["limit"] for m in rows if "limit" in m.axes})
    if limits:
        lines.append(f"of each task the first {' or '.join(map(str, limits))} items only: comparable with nothing else")
    said: dict[str, None] = {}
    for m in rows:
        task = " ".join([m.axes["harness"], *([f"({m.axes['run']})"] if "run" in m.axes else [])])
        if m.facts.get("cut_requests"):
            what = (
                f"{m.facts['cut_requests']:,} of {m.facts['requests']:,} contexts were longer and lost their beginning"
            )
            said[f"{task}: {what}"] = None
        if m.facts.get("shortened_answers"):
            what = f"{m.facts['shortened_answers']:,} of {m.facts['requests']:,} answers ended at the last position there is"
            said[f"{task}: {what}"] = None
        if m.value is None:
            said[f"{task}: {m.reason}"] = None
    return [*lines, *said]


def show_harness(measurements: Sequence[Measurement], console: Console) -> None:
    """The table and its notes, where there is anything of a harness."""
    rows = harness_rows(measurements)
    if not rows:
        return
    console.print(harness_table(rows))
    for line in harness_notes(rows):
        console.print(Text(line, style="dim"))
