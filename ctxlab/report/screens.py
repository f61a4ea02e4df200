"""What `ctxlab runs show` and `ctxlab runs diff` print of finished records."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime

from rich.console import Console
from rich.text import Text

from ctxlab.records.index import Summary
from ctxlab.records.run import Run, axes_key
from ctxlab.records.schema import METRICS, DocumentSums, Measurement
from ctxlab.report.grid import Grid
from ctxlab.report.harness import task_and_metric
from ctxlab.report.plots import training_chart
from ctxlab.report.results import cell, differing_keys, number, paired, settings, title, value_at, way_of
from ctxlab.report.tables import comparison_table, show_footnotes, show_heading, show_lengths
from ctxlab.report.ways import position_grid, show_context_use, way_text
from ctxlab.units import format_bytes, format_length, format_seconds

# Units of what a step costs: a difference is told as a share.
_RATIOS = ("B", "s", "s/token", "tokens/s", "FLOP/s")


def show_run(run: Run, others: Sequence[Run | Summary], console: Console) -> None:
    """One run whole: what it is, how it went, its results and curves, its settings, and who evaluated it again."""
    record = run.record
    show_heading(run, console)
    for name, text in facts(run, others):
        console.print(Text.assemble((f"{name:<12}", "dim"), text), soft_wrap=True)
    chart = training_chart(run.metrics())
    if chart is not None:
        console.print()
        console.print(chart)
    measurements = run.measurements()
    if measurements:
        console.print()
        show_lengths(measurements, record.config.get("context"), console)
        show_context_use(measurements, record.config.get("context"), console)
    console.print()
    console.print(Text("settings", style="bold"))
    chosen = settings(record.config)
    width = max((len(key) for key in chosen), default=0)
    for key, value in chosen.items():
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        console.print(Text.assemble((f"{key:<{width}}  ", "dim"), text), soft_wrap=True)


def facts(run: Run, others: Sequence[Run | Summary]) -> list[tuple[str, str]]:
    """name -> text of what a record says beside its settings and results, where it says something."""
    record, where = run.record, run.record.provenance
    took = f", {format_seconds(record.wall_seconds)}" if record.wall_seconds else ""
    attempts = f", {record.attempt} attempts" if record.attempt > 1 else ""
    machine = where.hardware
    memory = f", {format_bytes(machine['memory_bytes'])}" if machine.get("memory_bytes") else ""
    versions = [f"ctxlab {where.ctxlab}"] if where.ctxlab else []
    versions += [f"commit {where.commit}"] if where.commit else []
    versions += [
        f"{name} {where.libraries[name]}" for name in ("torch", "lightning", "wandb") if name in where.libraries
    ]
    children = [other.id for other in others if other.record.parent == record.id]
    rows = [
        ("run", record.id),
        ("status", record.status + (f": {record.reason}" if record.reason else "")),
        ("started", f"{_time(record.started)}{took}{attempts}" if record.started else ""),
        ("line", record.line),
        ("tags", ", ".join(record.tags)),
        ("note", record.note),
        ("experiment", record.experiment or ""),
        ("sweep", f"{record.sweep.id}, cell {record.sweep.cell}" if record.sweep else ""),
        ("parent", record.parent or ""),
        ("followed by", ", ".join(children)),
        ("code", ", ".join(versions)),
        ("plugins", ", ".join(f"{path} ({digest[:12]})" for path, digest in where.plugins)),
        ("machine", f"{machine['processor']}, {machine['cores']} cores{memory}" if "processor" in machine else ""),
        ("folder", str(run.path)),
    ]
    return [(name, text) for name, text in rows if text]


def show_difference(runs: Sequence[Run], console: Console) -> None:
    """What differs in settings, then the results: of two runs with their differences, of more side by side."""
    configs = [run.record.config for run in runs]
    keys = differing_keys(configs)
    if keys:
        grid = Grid(["setting", *(run.id for run in runs)], heading="settings that differ")
        grid.left = frozenset(range(1, len(runs) + 1))
        for key in keys:
            grid.add([key, *(value_at(config, key) for config in configs)])
        console.print(grid)
    else:
        console.print(Text("the settings are the same"))
    console.print()
    if len(runs) > 2:
        console.print(comparison_table(runs))
        return
    first, second = runs
    console.print(difference_table(first, second))
    by_index = position_grid(first, second)
    if by_index is not None:
        console.print()
        console.print(by_index)
    show_footnotes(first.measurements(), console)


def difference_table(first: Run, second: Run) -> Grid:
    """One row a result of two runs: both values, and the second less the first, paired over documents if it can be."""
    ours, theirs = _named(first), _named(second)
    sums = [{(d.context, d.split, axes_key(d.axes)): d for d in run.documents()} for run in (first, second)]
    grid = Grid(["result", first.id, second.id, "difference"], heading="results")
    for key in dict.fromkeys([*ours, *theirs]):
        name, context = key[0], key[1]
        at = f" at {format_length(context)}" if context is not None else ""
        one, other = ours.get(key), theirs.get(key)
        axes = (one or theirs[key]).axes
        way = way_of(axes)
        ours_by, theirs_by = (found.get((context or 0, key[2] or "", axes_key(way))) for found in sums)
        how = f", {way_text(way)}" if way else ""
        of = f", {axes['baseline']}" if "baseline" in axes else ""
        of = f", {' '.join(task_and_metric(one or theirs[key]))}" if "harness" in axes else of
        grid.add([f"{title(name)}{at}{how}{of}", cell(one), cell(other), _difference(one, other, ours_by, theirs_by)])
    return grid


def _named(run: Run) -> dict[tuple[str, int | None, str | None, str], Measurement]:
    """Results by what they are of: name, context, split, the axes of their evaluation. Loss by position is not among them."""
    order = list(METRICS)
    found = sorted(
        (m for m in run.measurements() if "from" not in m.axes), key=lambda m: (order.index(m.name), m.context or 0)
    )
    return {(m.name, m.context, m.split, axes_key(m.axes)): m for m in found}


def _difference(
    one: Measurement | None, other: Measurement | None, ours: DocumentSums | None, theirs: DocumentSums | None
) -> str:
    if one is None or other is None or one.value is None or other.value is None:
        return "-"
    change = other.value - one.value
    if one.unit in _RATIOS and one.value:
        return f"{change / one.value:+.1%}"
    text = ("-" if change < 0 else "+") + number(abs(change), one.unit, name=one.name)
    bounds = paired(theirs, ours) if one.name == "nats_per_token" else None
    return text if bounds is None else f"{text} ±{(bounds[1] - bounds[0]) / 2:.3f}"


def _time(text: str) -> str:
    return datetime.fromisoformat(text).astimezone().strftime("%Y-%m-%d %H:%M")
