"""`ctxlab runs --watch`: runs as they go, drawn again every two seconds: how far each is, its loss, how long it has left."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from ctxlab.errors import RecordError
from ctxlab.launch import last_metrics, share_done
from ctxlab.records.index import RunIndex, Summary
from ctxlab.report.grid import Grid
from ctxlab.report.terminal import Chart
from ctxlab.units import format_count, format_seconds

_EVERY = 2.0  # seconds
_ROWS = 20  # runs that are listed where the line does not say
_CURVES = 6  # runs whose loss is drawn


def watch(
    index: RunIndex, choose: Callable[[Sequence[Summary]], Sequence[Summary]], console: Console, *, limit: int | None
) -> int:
    """Shows the chosen runs until Ctrl-C. Raises RecordError where there is no terminal to draw in."""
    if not console.is_terminal:
        raise RecordError("ctxlab runs: --watch draws in a terminal; for programs: ctxlab runs --json")
    try:
        with Live(console=console, screen=True, auto_refresh=False) as live:
            while True:
                chosen = choose(index.summaries())
                live.update(
                    watched(index, chosen[: _ROWS if limit is None else limit or None], len(chosen)), refresh=True
                )
                time.sleep(_EVERY)
    except KeyboardInterrupt:
        return 0


def watched(index: RunIndex, shown: Sequence[Summary], of: int) -> RenderableType:
    """The table of runs, those at work first, and the loss of the first few that have one."""
    ordered = sorted(shown, key=lambda one: one.status != "running")
    grid = Grid(["run", "status", "step", "done", "loss", "took", "left"])
    for one in ordered:
        grid.add(_cells(one), style="" if one.status == "running" else "dim")
    parts: list[RenderableType] = [grid if shown else Text("no run fits")]
    curves = index.curves(ordered, "loss")
    points = {run_id: list(zip(curve.tokens, curve.values)) for run_id, curve in list(curves.items())[:_CURVES]}
    points = {run_id: drawn for run_id, drawn in points.items() if len(drawn) > 1}
    if points:
        last = max(x for drawn in points.values() for x, _ in drawn)
        ticks = [last * part / 4 for part in range(5)]
        heading = "training loss by tokens seen (nats/token)"
        parts += [Text(), Chart(heading, points, ticks, format_count, lambda y: f"{y:g}", log_x=False)]
    running = sum(one.status == "running" for one in shown)
    parts += [Text(f"{running} at work, {len(shown)} of {of} runs; Ctrl-C ends this", style="dim")]
    return Group(*parts)


def _cells(one: Summary) -> list[str]:
    record = one.record
    row = last_metrics(one.path)
    step, loss = str(row.get("step", "-")), row.get("loss")
    cells = [one.id, one.status, step, "-", "-" if loss is None else f"{loss:.3f}"]
    if one.status != "running":
        return [*cells, "-" if record.wall_seconds is None else format_seconds(record.wall_seconds), "-"]
    took = record.wall_seconds or 0.0
    if "begun" in record.process:
        took += (datetime.now(UTC) - datetime.fromisoformat(record.process["begun"])).total_seconds()
    share = share_done(record.config, row)
    cells[3] = f"{share:.0%}"
    return [*cells, format_seconds(took), format_seconds(took * (1 - share) / share) if share else "-"]
