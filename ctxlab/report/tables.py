"""Tables and closing screens, made from records alone."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ctxlab.records.run import Run
from ctxlab.records.schema import Measurement
from ctxlab.report.denoising import denoising_rows, show_denoising
from ctxlab.report.grid import Grid
from ctxlab.report.harness import show_harness
from ctxlab.report.labelled import labelled_rows, show_labelled
from ctxlab.report.plots import curve, loss_chart, memory_chart, save_loss_by_length, trained_contexts
from ctxlab.report.repeats import curves_with_means
from ctxlab.report.results import (
    by_context,
    cell,
    labels,
    number,
    rise,
    signed,
    telling_keys,
    title,
    training_speed,
    value_at,
    why_missing,
)
from ctxlab.report.task_tables import show_compared_tasks, show_tasks, task_rows
from ctxlab.report.terminal import Chart
from ctxlab.report.translation import is_translation, show_translation
from ctxlab.report.ways import show_context_use, side_by_side, way_text, ways
from ctxlab.units import format_count, format_length, format_seconds

_SCORES = ("nats_per_token", "perplexity", "bits_per_byte")
COSTS = ("peak_memory_bytes", "step_seconds")
_SIDE_BY_SIDE = 78  # columns from which two charts stand beside each other


def lengths_table(measurements: Sequence[Measurement], trained: int | None) -> Grid:
    """One row a context: how well the text is modelled there and what a training step costs there."""
    rows = by_context(measurements)
    named = {name for row in rows.values() for name in row}
    scores = [name for name in _SCORES if name in named]
    costs = [name for name in COSTS if name in named]
    multiple = trained is not None and bool(scores)
    grid = Grid(["context", *(["trained"] if multiple else []), *map(title, scores), *map(title, costs)])
    for context, row in rows.items():
        cells = [format_length(context)]
        if multiple:
            cells.append(f"{context / trained:g}x")  # type: ignore[operator]
        cells += _group([row.get(name) for name in scores], intervals=("nats_per_token", "bits_per_byte"))
        cells += _group([row.get(name) for name in costs])
        grid.add(cells, style="bold" if context == trained else "")
    return grid


def way_table(measurements: Sequence[Measurement], way: Mapping[str, Any]) -> Grid:
    """One row a context: the same targets scored in another way, and what that changes, paired over documents."""
    rows = by_context(measurements, way)
    names = [name for name in _SCORES if any(name in row for row in rows.values())]
    grid = Grid(["context", *map(title, names), "change"], heading=way_text(way))
    for context, row in rows.items():
        cells = _group([row.get(name) for name in names], intervals=("nats_per_token", "bits_per_byte"))
        facts = next(iter(row.values())).facts
        grid.add([format_length(context), *cells, _difference(facts) if "difference" in facts else "-"])
    return grid


def _difference(facts: dict[str, Any]) -> str:
    """A difference in nats per token, with half of its paired interval."""
    return signed(facts["difference"], facts.get("difference_low"), facts.get("difference_high"))


def _group(measurements: Sequence[Measurement | None], *, intervals: Sequence[str] = ()) -> list[str]:
    """Cells of what was measured together: why there is no number is said once, in the first of them."""
    cells = [cell(m, interval=m is not None and m.name in intervals) for m in measurements]
    missing = [m is not None and m.value is None for m in measurements]
    if cells and all(missing):
        return [cells[0], *("-" for _ in cells[1:])]
    return cells


def footnotes(measurements: Sequence[Measurement], *, intervals: bool = True) -> list[str]:
    """What the numbers of a table of lengths are, and why some are missing, in a line each."""
    lines = []
    scored = next((m for m in measurements if m.name == "nats_per_token" and m.context and m.value is not None), None)
    if scored is not None:
        counted = f"the same {scored.n_targets:,} tokens of {scored.n_docs} documents " if scored.n_targets else ""
        has_interval = intervals and any(m.low is not None for m in measurements)
        lines.append(
            f"{scored.split} split, {scored.protocol} windows: {counted}at every context, each scored once"
            + ("; ± is 95% over documents" if has_interval else "")
        )
    cost = next((m for m in measurements if m.name in COSTS and m.value is not None), None)
    if cost is not None:
        memory = next((m for m in measurements if m.name == "peak_memory_bytes" and m.value is not None), None)
        source = f" ({memory.facts['source']})" if memory is not None and "source" in memory.facts else ""
        lines.append(f"memory and step: {cost.protocol}; peak over the idle process{source}, median time")
    return lines + why_missing(measurements)


def counting_notes(measured: Sequence[tuple[str, Sequence[Measurement]]]) -> list[str]:
    """What models of n-grams reach on the same tokens, and how far each run, (name, measurements), is from them.

    Runs of one text and tokenizer have one such model: it is said once.
    """
    found: dict[str, list[str]] = {}
    for name, measurements in measured:
        for counted in measurements:
            if counted.name != "nats_per_token" or "baseline" not in counted.axes:
                continue
            in_bits = next((m for m in measurements if m.name == "bits_per_byte" and m.axes == counted.axes), None)
            line = f"{counted.protocol}, on the same tokens: {cell(counted)} nats/token, {cell(in_bits)} bits/byte"
            distances = found.setdefault(line, [])
            if "difference" in counted.facts:
                text = _difference(counted.facts)
                at = format_length(counted.facts["difference_context"])
                whose = counted.axes.get("run", name)
                distances.append(f"{whose} at {at} is {text[1:]} {'above' if text[0] == '+' else 'below'} it")
    return ["; ".join([line, *distances]) for line, distances in found.items()]


def comparison_table(runs: Sequence[Run], *, metric: str = "bits_per_byte") -> Grid:
    """One row a run: what differs, how it ended, nats per token by context, their rise, the metric, speed, cost, id."""
    configs = [run.record.config for run in runs]
    keys = telling_keys(configs)
    results = [by_context(run.measurements()) for run in runs]
    contexts = sorted({context for rows in results for context in rows if "nats_per_token" in rows[context]})
    trained = trained_contexts(runs)
    speeds = [training_speed(run) for run in runs]
    costed = any(name in row for rows in results for row in rows.values() for name in COSTS)
    ended = any(run.record.status != "done" for run in runs)
    at = f", trained at {format_length(trained[0])}" if len(trained) == 1 else ""

    titles = [_short(key, keys) for key in keys] or ["run"]
    titles += ["status"] if ended else []
    numbers = [format_length(context) for context in contexts]
    if contexts:
        numbers += ["rise 1x-4x", title(metric)]
    if any(speeds):
        numbers.append(title("tokens_per_second"))
    if costed:
        numbers += list(map(title, COSTS))
    columns = [*titles, *numbers, *(["run"] if keys else [])]
    grid = Grid(columns, keys=len(titles), heading=f"nats/token by context{at}" if contexts else "")
    grid.left = frozenset([len(columns) - 1] if keys else [])
    for run, rows, config, speed in zip(runs, results, configs, speeds, strict=True):
        here = rows.get(config.get("context", -1), {})
        cells = [value_at(config, key) for key in keys] or [run.id]
        cells += [run.record.status] if ended else []
        cells += [cell(rows.get(context, {}).get("nats_per_token")) for context in contexts]
        if contexts:
            cells += [rise(run, rows), cell(here.get(metric))]
        if any(speeds):
            cells.append("-" if speed is None else number(speed, "tokens/s"))
        if costed:
            cells += _group([here.get(name) for name in COSTS])
        grid.add([*cells, *([run.id] if keys else [])])
    return grid


def cost_tables(runs: Sequence[Run]) -> list[Grid]:
    """Of runs that measured cost alone: memory and time of a step by context, a row a run, against the first run."""
    keys = telling_keys([run.record.config for run in runs])
    results = [by_context(run.measurements()) for run in runs]
    contexts = sorted({context for rows in results for context in rows})
    ended = any(run.record.status != "done" for run in runs)
    grids = []
    for name, heading in zip(COSTS, ("peak memory of a step by context", "time of a step by context"), strict=True):
        titles = [*([_short(key, keys) for key in keys] or ["run"]), *(["status"] if ended else [])]
        columns = [*titles, *map(format_length, contexts), *(["run"] if keys else [])]
        left = frozenset([len(columns) - 1] if keys else [])
        grid = Grid(columns, keys=len(titles), heading=heading, left=left)
        for run, rows in zip(runs, results, strict=True):
            cells = [value_at(run.record.config, key) for key in keys] or [run.id]
            cells += [run.record.status] if ended else []
            for context in contexts:
                cells.append(_against(rows.get(context, {}).get(name), results[0].get(context, {}).get(name)))
            grid.add([*cells, *([run.id] if keys else [])])
        grids.append(grid)
    return grids


def _against(measurement: Measurement | None, first: Measurement | None) -> str:
    """A measurement, and how many times that of the first run it is."""
    text = cell(measurement)
    if measurement is None or first is None or measurement is first or not measurement.value or not first.value:
        return text
    return f"{text} ({measurement.value / first.value:.2f}x)"


def show_training(run: Run, console: Console) -> None:
    """What `ctxlab train` ends with: the table of lengths, loss and memory drawn by context, and what to type next."""
    record = run.record
    measurements = run.measurements()
    trained = record.config["context"]
    show_heading(run, console)
    if is_translation(measurements):
        show_translation([m for m in measurements if m.context is None], run.items(), console)
    elif labelled_rows(measurements):
        show_labelled([("this one", measurements, run.items())], console)
    elif measurements:
        show_lengths(measurements, trained, console)
    figure = save_loss_by_length([run], run.path / "loss_by_length.png")
    console.print()
    console.print(Text(f"run {record.id} in {run.path}{f' ({figure.name})' if figure else ''}"), soft_wrap=True)
    where = _elsewhere(run)
    prompt = f"{where}ctxlab generate {record.id} {_prompt(run)}"
    look = f"{where}ctxlab runs show {record.id}", "look at it"
    if record.config.get("data", {}).get("name") == "parallel":
        more = f"{where}ctxlab eval {record.id} eval.translation.num_beams=8"
        show_next(console, (prompt, "translate"), (more, "score it again"), look)
        return
    if labelled_rows(measurements):
        show_next(console, (f"{where}ctxlab eval {record.id}", "score it again"), look)
        return
    if denoising_rows(measurements):
        writes = record.config["model"].get("architecture", "decoder") == "decoder"
        goes_on = [(prompt, "go on from a prompt")] if writes else []
        show_next(console, *goes_on, (f"{where}ctxlab eval {record.id}", "score it again"), look)
        return
    position = value_at(record.config, "position")
    other = "alibi" if position != "alibi" else "rope"
    schemes = "" if position == "none" else f" position={position},{other}"
    sweep = f"model={record.config['model']['name']}{schemes} context={trained},{2 * trained}"
    show_next(console, (prompt, "go on from a prompt"), (f"{where}ctxlab train -m {sweep}", "a sweep around it"), look)


def _prompt(run: Run) -> str:
    """Something to go on from in what the run speaks, or of the test sentences a short one to translate; for a shell."""
    config = run.record.config
    if config.get("data", {}).get("name") != "parallel":
        return '"1 2 3 4"' if config.get("tokenizer", {}).get("name") == "ids" else '"To be, or not to be"'
    sources = [item.wanted[0] for item in run.items() if item.wanted and item.wanted[0].isprintable()]
    sentence = min(
        (s for s in sources if len(s.split()) > 2), key=len, default=min(sources, key=len, default="a sentence")
    )
    words = shlex.quote(sentence if _is_bare(sentence) else f"prompt={sentence}")
    return f"{words} decoding.num_beams=4"


def _is_bare(text: str) -> bool:
    """Whether a command line takes a word for text, and not for a setting or a flag."""
    return "=" not in text and not text.startswith("-")


def _elsewhere(run: Run) -> str:
    """What a line needs to find a run again that is not in the folder where it looks by itself."""
    root = str(run.path.parent)
    return "" if root == (os.environ.get("CTXLAB_RUNS") or "runs") else f"CTXLAB_RUNS={shlex.quote(root)} "


def show_next(console: Console, *lines: tuple[str, str]) -> None:
    """What to type next, each line whole, to be copied; and why, where there is room beside it."""
    width = max(len(line) for line, _ in lines)
    fits = all(2 + width + 4 + len(why) <= console.width for _, why in lines)
    for line, why in lines:
        text = ("  ", line.ljust(width), (f"  # {why}", "dim")) if fits else ("  ", line)
        console.print(Text.assemble(*text), soft_wrap=True)


def show_lengths(measurements: Sequence[Measurement], trained: int | None, console: Console) -> None:
    """The table of lengths with what its numbers are, its curves, and the scores on tasks, ours and a harness's."""
    if task_rows(measurements):
        show_tasks(measurements, console)
    show_harness(measurements, console)
    if denoising_rows(measurements):
        show_denoising(denoising_rows(measurements), console)
    measurements = [m for m in measurements if not {"task", "harness", "objective"} & m.axes.keys()]
    if not measurements:
        return
    console.print(lengths_table(measurements, trained))
    for way in ways(measurements):
        if way:
            console.print(way_table(measurements, way))
    show_footnotes(measurements, console)
    show_curves(measurements, trained, console)


def show_footnotes(measurements: Sequence[Measurement], console: Console) -> None:
    for line in [*footnotes(measurements), *counting_notes([("the run", measurements)])]:
        console.print(Text(line, style="dim"))


def show_curves(measurements: Sequence[Measurement], trained: int | None, console: Console) -> None:
    """Loss and memory by context, drawn beside each other where there is room."""
    points = curve(measurements, "nats_per_token")
    curves = {"nats/token": points} if len(points) > 1 else {}
    charts = [
        chart
        for chart in (
            loss_chart(curves, trained=trained, height=9),
            memory_chart(measurements, trained=trained, height=9),
        )
        if chart is not None
    ]
    if charts:
        console.print()
        show_beside(charts, console)


def show_beside(charts: Sequence[Chart], console: Console) -> None:
    """Two charts beside each other where there is room, else one below the other."""
    if len(charts) == 2 and console.width >= _SIDE_BY_SIDE:
        beside = Table.grid(expand=True, padding=(0, 2, 0, 0))
        beside.add_column(ratio=1)
        beside.add_column(ratio=1)
        beside.add_row(*charts)
        console.print(beside)
    else:
        for chart in charts:
            console.print(chart)


def show_evaluation(run: Run, parents: Sequence[Run], console: Console) -> None:
    """What `ctxlab eval` ends with: the table of one run, or one table of all side by side."""
    measurements = run.measurements()
    if is_translation(measurements):
        items = run.items()
        first = [item for item in items if item.axes.get("run") in (None, parents[0].id)]
        show_translation([m for m in measurements if m.context is None], first, console)
    elif labelled_rows(measurements):
        shown = [
            (parent.id, [m for m in measurements if m.axes.get("run", parent.id) == parent.id]) for parent in parents
        ]
        items = run.items()
        named = [(name, rows, [i for i in items if i.axes.get("run", name) == name]) for name, rows in shown]
        show_labelled(named, console)
    elif len(parents) == 1:
        console.print(Text(f"{parents[0].id}, evaluated again", style="bold"))
        trained = parents[0].record.config["context"]
        show_lengths(measurements, trained, console)
        show_context_use(measurements, trained, console)
    else:
        items = run.items()
        show_compared_tasks(
            [
                (
                    parent.id,
                    [m for m in measurements if m.axes.get("run") == parent.id],
                    [item for item in items if item.axes.get("run") == parent.id],
                )
                for parent in parents
            ],
            console,
        )
        show_harness(measurements, console)
        if denoising_rows(measurements):
            show_denoising(denoising_rows(measurements), console)
        measurements = [m for m in measurements if not {"task", "harness", "objective"} & m.axes.keys()]
        for grid in side_by_side(measurements, parents) if measurements else ():
            console.print(grid)
        show_footnotes(measurements, console)
        contexts = trained_contexts(parents)
        show_context_use(measurements, contexts[0] if len(contexts) == 1 else None, console)
    console.print()
    console.print(Text(f"run {run.id} in {run.path}"), soft_wrap=True)


def show_sweep(runs: Sequence[Run], console: Console, *, metric: str) -> None:
    """The comparison of a sweep's runs: the table, what its numbers are, and the curves of loss by length."""
    named = list(zip(labels(runs), runs, strict=True))
    show_compared_tasks([(name, run.measurements(), run.items()) for name, run in named], console)
    measured = [m for run in runs for m in run.measurements() if "task" not in m.axes]
    if answering := [run for run in runs if labelled_rows(run.measurements())]:
        pairs = zip(labels(answering), answering, strict=True)
        show_labelled([(name, run.measurements(), run.items()) for name, run in pairs], console)
        return
    if measured and not any(m.name in _SCORES for m in measured):
        for grid in cost_tables(runs):
            console.print(grid)
        for line in footnotes(measured):
            console.print(Text(line, style="dim"))
        return
    console.print(comparison_table(runs, metric=metric))
    lines = footnotes(measured, intervals=any(run.documents() for run in runs))
    if lines:
        lines[0] += f"; {title(metric)}, memory and step at the trained context"
        if any(training_speed(run) for run in runs):
            lines[0] += "; tokens/s is the median over training"
    lines += counting_notes([(name, run.measurements()) for name, run in named])
    for line in lines:
        console.print(Text(line, style="dim"))
    trained = trained_contexts(runs)
    curves, _ = curves_with_means(runs)
    chart = loss_chart(curves, trained=trained[0] if len(trained) == 1 else None)
    if chart is not None:
        console.print()
        console.print(chart)


def show_heading(run: Run, console: Console) -> None:
    """What a run is, in one line: its size, precision and device, how long it took."""
    record = run.record
    everything, inner = record.parameters.get("all"), record.parameters.get("without_embeddings")
    parts = []
    if everything and inner:
        parts.append(f"{format_count(everything)} parameters ({format_count(inner)} without embeddings)")
    where = record.provenance
    if where.precision and where.device:
        parts.append(f"{where.precision} on {where.device}")
    if record.wall_seconds:
        parts.append(format_seconds(record.wall_seconds))
    console.print()
    console.print(Text(": ".join([record.name, ", ".join(parts)]) if parts else record.name, style="bold"))


def _short(key: str, keys: Sequence[str]) -> str:
    """The last part of a dotted key, where that is enough to know it."""
    last = key.rpartition(".")[2]
    return last if sum(other.rpartition(".")[2] == last for other in keys) == 1 else key
