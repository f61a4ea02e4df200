"""Scores on tasks: by length, and by depth as a map of colours, in the terminal and as a picture; from records alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from ctxlab.evaluation.intervals import paired_interval
from ctxlab.records.run import Run
from ctxlab.records.schema import Measurement, TaskItem
from ctxlab.report.grid import Grid
from ctxlab.report.plots import save, styled
from ctxlab.report.results import cell, labels, signed, why_missing
from ctxlab.units import format_length

# From nothing right to all right, in steps that colour-blind readers tell apart (a part of viridis, light to dark text).
_SCALE = ("#440154", "#414487", "#2a788e", "#22a884", "#7ad151", "#fde725")


def task_rows(measurements: Sequence[Measurement]) -> list[Measurement]:
    """The results of tasks among others."""
    return [m for m in measurements if "task" in m.axes]


def show_tasks(measurements: Sequence[Measurement], console: Console) -> None:
    """Every task of one run: a table of scores by length, a map where depths were asked."""
    rows = task_rows(measurements)
    flat = [m for m in rows if "depth" not in m.axes]
    if flat:
        console.print(length_grid(flat))
    for task in dict.fromkeys(m.axes["task"] for m in rows if "depth" in m.axes):
        console.print(depth_map([m for m in rows if m.axes["task"] == task and "depth" in m.axes], heading=task))
    for line in task_notes(rows):
        console.print(Text(line, style="dim"))


def length_grid(rows: Sequence[Measurement]) -> Grid:
    """A line a task: the share of right answers at each length."""
    contexts = sorted({m.context for m in rows if m.context is not None})
    found = {(m.axes["task"], m.context): m for m in rows}
    grid = Grid(["task", *map(format_length, contexts)], heading="share of right answers by length")
    for task in dict.fromkeys(m.axes["task"] for m in rows):
        grid.add([task, *(cell(found.get((task, context)), interval=True) for context in contexts)])
    return grid


def depth_map(rows: Sequence[Measurement], *, heading: str) -> Group:
    """Depths down, lengths across, each cell coloured by its score; below them the mean and the least over the depths."""
    contexts = sorted({m.context for m in rows if m.context is not None})
    depths = sorted({m.axes["depth"] for m in rows})
    found = {(m.context, m.axes["depth"]): m for m in rows}
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    table.add_column("depth")
    for context in contexts:
        table.add_column(format_length(context), justify="right")
    for depth in depths:
        table.add_row(f"{depth:.0%}", *(_coloured(found.get((context, depth))) for context in contexts))
    for name, summary in (("mean", lambda values: sum(values) / len(values)), ("least", min)):
        cells = []
        for context in contexts:
            values = [m.value for d in depths if (m := found.get((context, d))) is not None and m.value is not None]
            cells.append(f"{summary(values):.2f}" if values else "-")
        table.add_row(name, *cells, style="bold")
    # A title of the table itself would be as narrow as that.
    return Group(Text(f"{heading}: share of right answers by depth and length", style="bold"), table)


def _coloured(measurement: Measurement | None) -> Text:
    if measurement is None or measurement.value is None:
        return Text(cell(measurement), style="dim")
    step = min(len(_SCALE) - 1, int(measurement.value * len(_SCALE)))
    ink = "black" if step >= 3 else "white"
    return Text(f" {measurement.value:.2f} ", style=f"{ink} on {_SCALE[step]}")


def task_notes(rows: Sequence[Measurement]) -> list[str]:
    """What the scores are, what chance and the oracle reach, and why some are missing."""
    lines = []
    done = [m for m in rows if m.value is not None]
    for protocol in dict.fromkeys(m.protocol for m in done):
        these = [m for m in done if m.protocol == protocol]
        counts = sorted({m.facts["items"] for m in these})
        lines.append(
            f"{protocol}: {' to '.join(map(str, counts[:1] + counts[1:][-1:]))} examples a cell, the same for every run "
            "with these settings; ± is 95% (Wilson)"
        )
    for task in dict.fromkeys(m.axes["task"] for m in done):
        these = [m for m in done if m.axes["task"] == task]
        chance = [m.facts["chance"] for m in these]
        oracle = min(m.facts["oracle"] for m in these)
        spread = f"{min(chance):.2g}" if max(chance) == min(chance) else f"{min(chance):.2g} to {max(chance):.2g}"
        lines.append(f"{task}: chance {spread}, oracle {oracle:g}")
    return lines + why_missing(rows)


Answered = tuple[str, Sequence[Measurement], Sequence[TaskItem]]  # a run's name, its results, its examples


def show_compared_tasks(runs: Sequence[Answered], console: Console) -> None:
    """Several runs on the same examples, with what the numbers are; nothing where no task was asked."""
    for grid in compared_tasks(runs):
        console.print(grid)
    for line in task_notes([m for _, rows, _ in runs for m in task_rows(rows)]):
        console.print(Text(line, style="dim"))


def compared_tasks(runs: Sequence[Answered]) -> list[Grid]:
    """Runs side by side, a table a task: scores by length (over all depths), and the difference to the first run, paired
    over the examples. Where those are not the same (other settings, another tokenizer) there is no difference.
    """
    grids = []
    for task in dict.fromkeys(m.axes["task"] for _, rows, _ in runs for m in task_rows(rows)):
        contexts = sorted(
            {m.context for _, rows, _ in runs for m in task_rows(rows) if m.axes["task"] == task and m.context}
        )
        grid = Grid(["run", *map(format_length, contexts)], heading=f"{task}: share of right answers by length")
        firsts: dict[int, tuple[set[str], dict[tuple[float | None, int], float]]] = {}
        for number, (name, rows, items) in enumerate(runs):
            cells = []
            for context in contexts:
                scores = {(i.depth, i.item): i.score for i in items if i.task == task and i.context == context}
                measured = [m for m in rows if m.axes.get("task") == task and m.context == context]
                if not scores:
                    cells.append(cell(next(iter(measured), None)))
                    continue
                text = f"{sum(scores.values()) / len(scores):.3f}"
                asked = {m.facts["examples"] for m in measured if m.value is not None}
                if number == 0:
                    firsts[context] = asked, scores
                elif context in firsts:
                    same = asked == firsts[context][0] and scores.keys() == firsts[context][1].keys()
                    text += f" ({_paired(scores, firsts[context][1]) if same else 'other examples'})"
                cells.append(text)
            grid.add([name, *cells])
        grids.append(grid)
    return grids


def _paired(scores: dict[Any, float], firsts: dict[Any, float]) -> str:
    """The difference of two means over the same examples, with half of its 95% interval."""
    mine, theirs = list(scores.values()), [firsts[key] for key in scores]
    bounds = paired_interval(mine, theirs, [1.0] * len(mine))
    return signed((sum(mine) - sum(theirs)) / len(mine), *(bounds or ()))


def save_task_maps(runs: Sequence[Run], path: Path) -> Path | None:
    """The maps of depth and length of some runs beside each other, as PNG or SVG; None where no run has one."""
    rows = []
    for name, run in zip(labels(runs), runs, strict=True):
        for m in task_rows(run.measurements()):
            if "depth" in m.axes and m.context is not None:
                whose = m.axes.get("run", name) if len(runs) > 1 or "run" in m.axes else run.record.name
                rows.append({
                    "map": f"{m.axes['task']}, {whose}", "length": m.context, "depth": round(100 * m.axes["depth"]),
                    "score": m.value, "text": cell(m) if m.value is None else f"{m.value:.2f}",
                    "interval": "" if m.low is None or m.high is None else f"{m.low:.2f}-{m.high:.2f}",
                })  # fmt: skip
    if not rows:
        return None
    save(map_figure(rows), path)
    return path


def map_figure(rows: Sequence[dict[str, Any]]) -> Any:
    """Score by depth (down) and length (across), a panel a map; the number and its 95% interval in every cell, or, on grey,
    why there is none.
    """
    import altair

    base = altair.Chart().encode(
        x=altair.X("length:O", axis=altair.Axis(title="length (tokens)", labelAngle=0)),
        y=altair.Y("depth:O", axis=altair.Axis(title="depth of the answer (%)")),
    )
    colour = altair.Color(
        "score:Q", scale=altair.Scale(domain=[0, 1], scheme="viridis"), legend=altair.Legend(title="share right")
    )
    ink = altair.condition("datum.score > 0.5", altair.value("black"), altair.value("white"))
    measured, missing = base.transform_filter("datum.score != null"), base.transform_filter("datum.score == null")
    layers = altair.layer(
        measured.mark_rect().encode(color=colour),
        missing.mark_rect(color="#eeeeee"),
        measured.mark_text(fontSize=12, dy=-4).encode(text="text:N", color=ink),
        measured.mark_text(fontSize=8, dy=8).encode(text="interval:N", color=ink),
        missing.mark_text(fontSize=9, color="#666666").encode(text="text:N"),
        data=altair.Data(values=list(rows)),
    ).properties(width=58 * len({r["length"] for r in rows}), height=44 * len({r["depth"] for r in rows}))
    maps = list(dict.fromkeys(row["map"] for row in rows))
    facet = altair.Facet("map:N", title=None, sort=maps, header=altair.Header(labelFontSize=13, labelFontWeight="bold"))
    return styled(layers.facet(facet, columns=3).resolve_axis(x="independent"))
