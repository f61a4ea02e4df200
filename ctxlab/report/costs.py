"""What a step costs by context: the closing screens of `ctxlab profile` and `ctxlab plan`, from records alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from ctxlab.records.run import Run
from ctxlab.records.schema import Measurement
from ctxlab.report.grid import Grid
from ctxlab.report.plots import curve, memory_chart, save, scaling_figure, time_chart
from ctxlab.report.results import by_context, cell, labels, title
from ctxlab.report.tables import COSTS, footnotes, show_beside, show_heading, show_next
from ctxlab.units import format_bytes, format_length, format_operations, format_seconds

# Columns: a metric, or one of the facts beside it, in bytes, under a title of its own.
STEP = (
    "peak_memory_bytes", ("peak_memory_bytes", "total_bytes", "total"), "step_seconds", "tokens_per_second",
    "flops_per_second", "flops_utilization",
)  # fmt: skip
GENERATION = (
    "prefill_seconds", "decode_seconds_per_token", "cache_bytes", ("cache_bytes", "cache_allocated_bytes", "allocated"),
    ("cache_bytes", "peak_memory_bytes", "memory"), ("cache_bytes", "total_bytes", "total"),
)  # fmt: skip
CLOSED_FORM = "closed form"  # as predictions name it, which need torch
PARTS = ("weights", "gradients", "optimizer", "activations", "logits", "temporaries", "process")


def show_plan(run: Run, console: Console) -> None:
    """What `ctxlab plan` ends with: memory by context and its parts, what fits, what would change that, how far it errs."""
    measurements = run.measurements()
    resolved = run.record.provenance.resolved
    show_heading(run, console)
    console.print(plan_table(measurements))
    peaks = [m for m in measurements if m.name == "peak_memory_bytes"]
    for line in (
        *_ways(peaks, run.record.provenance.device, resolved.get("operations_of", "cpu")),
        *_traced_kernel(resolved),
        *policy_lines(run, peaks),
        *known_error_lines(run),
    ):
        console.print(Text(line, style="dim"), soft_wrap=False)
    console.print()
    console.print(work_table(measurements))
    for line in _work_lines(peaks):
        console.print(Text(line, style="dim"), soft_wrap=False)
    longest = {str(m.axes["change"]): m for m in measurements if m.name == "longest_context"}
    if longest:
        console.print()
        console.print(changes_table(longest, resolved["memory"]))
    batch = next((m for m in measurements if m.name == "largest_batch"), None)
    if batch is not None:
        rows = f"{batch.value:,.0f} rows" if batch.value else "not one row"
        console.print(Text(f"at {format_length(batch.context or 0)} tokens {rows} fit at once (trainer.micro_batch)"))
    console.print()
    console.print(Text(f"run {run.id} in {run.path}"), soft_wrap=True)
    show_next(console, (f"ctxlab profile {_choices(run)}", "measure it"))


def show_profile(run: Run, console: Console) -> None:
    """What `ctxlab profile` ends with: what a step costs, what its memory is there for, generation, the curves and exponents."""
    measurements = run.measurements()
    show_heading(run, console)
    console.print(_by_context(measurements, STEP))
    peak = next((m.facts["matmul_flops_per_second"] for m in measurements if m.name == "flops_utilization"), None)
    lines = [*footnotes(measurements), *policy_lines(run, measurements)]
    if any(m.name == "peak_memory_bytes" and "total_bytes" in m.facts for m in measurements):
        lines.append("total: memory and the idle process together")
    if peak is not None:
        lines.append(
            f"of matmul peak: a step's operations against the best matmul measured here, {format_operations(peak)}/s"
        )
    lines += kernel_lines(measurements)
    for line in lines:
        console.print(Text(line, style="dim"))
    parts = parts_by_context(measurements)
    if parts:
        console.print()
        grid = Grid(["context", *_shown(parts)], heading="what the memory is there for")
        for context, here in sorted(parts.items()):
            grid.add([format_length(context), *(format_bytes(here.get(part, 0.0)) for part in _shown(parts))])
        console.print(grid)
        console.print(
            Text("traced on tensors without memory, at the worst moment of the step; not measured", style="dim")
        )
    if any(m.name == "prefill_seconds" for m in measurements):
        console.print()
        console.print(_by_context(measurements, GENERATION, heading="generation"))
        some = next((m for m in measurements if m.name == "prefill_seconds" and "decoded" in m.facts), None)
        if some is not None:
            text = f"batch 1; the last {some.facts['decoded']} tokens of a context are decoded one by one"
            console.print(Text(text, style="dim"))
        for kernel in sorted({m.facts["decoding_kernel"] for m in measurements if "decoding_kernel" in m.facts}):
            console.print(Text(f"decoding kernel: {kernel}", style="dim"))
        if any("cache_allocated_bytes" in m.facts for m in measurements):
            text = "allocated: the cache with its room for more; memory: peak of model and cache over the idle process"
            console.print(Text(text, style="dim"))
    _show_scaling(measurements, console)
    console.print()
    picture = " (scaling.png, scaling.svg)" if (run.path / "scaling.png").is_file() else ""
    console.print(Text(f"run {run.id} in {run.path}{picture}"), soft_wrap=True)


def _by_context(
    measurements: Sequence[Measurement], columns: Sequence[str | tuple[str, str, str]], *, heading: str = ""
) -> Grid:
    """One row a context of some columns, those that nobody has left out; why there is no number is said once a row."""
    rows = by_context(measurements)
    of = [(column, "", title(column)) if isinstance(column, str) else column for column in columns]
    shown = [
        (name, fact, head)
        for name, fact, head in of
        if any(name in row and (not fact or fact in row[name].facts) for row in rows.values())
    ]
    grid = Grid(["context", *(head for _, _, head in shown)], heading=heading)
    for context, row in rows.items():
        cells = [_fact(row.get(name), fact) if fact else _cell(row.get(name)) for name, fact, _ in shown]
        missing = [name in row and row[name].value is None for name, _, _ in shown]
        cells = ["-" if gone and any(missing[:n]) else text for n, (gone, text) in enumerate(zip(missing, cells))]
        grid.add([format_length(context), *cells])
    return grid


def _cell(m: Measurement | None) -> str:
    if m is not None and m.name == "flops_utilization" and m.value is not None:
        return f"{m.value:.0%}"
    return cell(m)


def _fact(m: Measurement | None, fact: str) -> str:
    return format_bytes(m.facts[fact]) if m is not None and fact in m.facts else "-"


def kernel_lines(measurements: Sequence[Measurement]) -> list[str]:
    """Which attention kernel ran in a step, at which contexts if not in all alike."""
    ran: dict[str, list[int]] = {}
    for context, row in by_context(measurements).items():
        steps = [row[name].facts for name in COSTS if name in row]
        for kernel in sorted({facts["attention_kernel"] for facts in steps if "attention_kernel" in facts}):
            ran.setdefault(kernel, []).append(context)
    told = [f"{kernel} at {', '.join(map(format_length, at))}" for kernel, at in ran.items()]
    return [f"attention kernel: {'; '.join(told if len(ran) > 1 else ran)}"] if ran else []


def _show_scaling(measurements: Sequence[Measurement], console: Console) -> None:
    """Memory and time by context on log axes, beside each other where there is room, and their exponents."""
    charts = [
        chart
        for chart in (memory_chart(measurements, trained=None, height=9), time_chart(measurements, height=9))
        if chart is not None
    ]
    if charts:
        console.print()
        show_beside(charts, console)
    for m in measurements:
        if m.name == "scaling_exponent":
            console.print(Text(exponent_line(m)))


def exponent_line(m: Measurement) -> str:
    """`activation memory grows as context^1.00 (95%: 0.99 to 1.02, 5 contexts)`."""
    interval = "" if m.low is None else f"95%: {m.low:.2f} to {m.high:.2f}, "
    return f"{m.axes['of']} grows as context^{m.value:.2f} ({interval}{m.facts['n_points']} contexts)"


def save_scaling(runs: Sequence[Run], path: Path) -> Path | None:
    """Memory and time of a step by context of some runs, on log axes, as PNG or SVG by the ending; None without a curve."""
    names = labels(runs)
    panels = []
    for metric, axis, factor in (
        ("peak_memory_bytes", "peak memory (MiB)", 2**20),
        ("step_seconds", "seconds a step", 1),
    ):
        curves = {}
        for name, run in zip(names, runs, strict=True):
            points = [(context, value / factor) for context, value in curve(run.measurements(), metric)]
            if len(points) > 1:
                curves[name] = points
        if curves:
            panels.append((axis, curves))
    if not panels:
        return None
    heading = f"{runs[0].record.name}: a training step by context" if len(runs) == 1 else "a training step by context"
    save(scaling_figure(panels, heading=heading), path)
    return path


def plan_table(measurements: Sequence[Measurement]) -> Grid:
    """One row a context: the predicted peak, its parts, and whether it fits."""
    parts = parts_by_context(measurements)
    grid = Grid(["context", "memory", "fits", *_shown(parts)])
    for m in measurements:
        if m.name == "peak_memory_bytes" and m.context is not None:
            fits = "yes" if m.facts.get("fits") else "no"
            here = parts.get(m.context, {})
            sizes = [format_bytes(here[part]) if part in here else "-" for part in _shown(parts)]
            grid.add([format_length(m.context), cell(m), fits, *sizes])
    return grid


def work_table(measurements: Sequence[Measurement]) -> Grid:
    """One row a context: a step's operations, the seconds that they take at least where the rate of a matmul is known, and the
    cache of so many tokens."""
    caches = {m.context: m for m in measurements if m.name == "cache_bytes"}
    peaks = [m for m in measurements if m.name == "peak_memory_bytes" and m.context is not None]
    timed = any("least_seconds" in m.facts for m in peaks)
    grid = Grid(["context", "operations", *(["at least"] if timed else []), "cache"])
    for m in peaks:
        seconds = [format_seconds(m.facts["least_seconds"])] if timed else []
        grid.add(
            [format_length(m.context or 0), format_operations(m.facts["flops"]), *seconds, cell(caches[m.context])]
        )
    return grid


def policy_lines(run: Run, measurements: Sequence[Measurement]) -> list[str]:
    """What recompute=auto is at each context, one line; none where the policy was given."""
    if run.record.config.get("trainer", {}).get("recompute") != "auto":
        return []
    chosen: dict[str, list[str]] = {}
    for m in measurements:
        if m.name == "peak_memory_bytes" and m.context is not None and "recompute" in m.facts:
            chosen.setdefault(str(m.facts["recompute"]), []).append(format_length(m.context))
    texts = [f"{policy} ({', '.join(at)})" for policy, at in chosen.items()]
    return [f"trainer.recompute=auto: {', '.join(texts)}"] if texts else []


def parts_by_context(measurements: Sequence[Measurement]) -> dict[int, dict[str, float]]:
    """context -> part -> bytes."""
    found: dict[int, dict[str, float]] = {}
    for m in measurements:
        if m.name == "part_bytes" and m.context is not None and m.value is not None:
            found.setdefault(m.context, {})[str(m.axes["part"])] = m.value
    return found


def _shown(parts: Mapping[int, Mapping[str, float]]) -> list[str]:
    return [part for part in PARTS if any(part in here for here in parts.values())]


def changes_table(longest: Mapping[str, Measurement], memory: int) -> Grid:
    """What else could be set, and how long a context then fits."""
    base = longest["none"].value or 0.0
    grid = Grid(["longest context that fits", format_bytes(memory), "gain"])
    for change, m in longest.items():
        reached = format_length(int(m.value)) if m.value else "none"
        gain = "" if change == "none" or not base or not m.value else f"{m.value / base:.2f}x"
        grid.add(["as it is" if change == "none" else change, reached, gain], style="bold" if change == "none" else "")
    return grid


def known_error_lines(run: Run) -> list[str]:
    """How far such predictions were from measurements."""
    where = run.record.provenance
    error: dict[str, Any] | None = where.resolved.get("known_error")
    if error is None:
        return [f"known error on {where.device} in {where.precision}: unmeasured"]
    small = (
        "" if error["worst_bytes"] is None else f"of steps under 256 MB at most {format_bytes(error['worst_bytes'])}; "
    )
    return [
        f"known error on {where.device} in {where.precision}: median {error['median']:.1%}, worst {error['worst']:.1%};",
        f"{small}over {error['n_points']} measured points",
    ]


def _work_lines(peaks: Sequence[Measurement]) -> list[str]:
    """What the seconds are, and are not."""
    if any("least_seconds" in m.facts for m in peaks):
        return ["at least: if all of a step ran at the rate of a matmul here; the time of a step is unmeasured"]
    return ["the time of a step is unmeasured"]


def _traced_kernel(resolved: Mapping[str, Any]) -> list[str]:
    """Which attention kernel was traced; memory is not the same with another."""
    if "attention_kernel" not in resolved:
        return []
    lines = [f"attention kernel: {resolved['attention_kernel']}"]
    if "native_kernel" in resolved:
        lines.append(f"the native one is {resolved['native_kernel']}: ctxlab profile or a long training does it")
    return lines


def _ways(peaks: Sequence[Measurement], device: str | None, operations_of: str) -> list[str]:
    """How the peaks were found, a line a way; traces ran the operations of a kind of device."""
    found: dict[str, list[int]] = {}
    for m in peaks:
        found.setdefault(str(m.facts.get("way")), []).append(m.context or 0)
    texts = [f"{way} ({', '.join(map(format_length, at))})" for way, at in found.items()]
    lines = [
        "predicted over the idle process, batch 1, parts at the worst moment",
        "; ".join(texts if len(found) > 1 else found),
    ]
    if CLOSED_FORM in found:
        lines.append(f"a {CLOSED_FORM} adds up parts that are never there together, and says rather too much")
    if device != "cpu" and set(found) != {CLOSED_FORM}:
        if operations_of == device:
            lines.append("what is allocated: with what torch's allocator holds free it is a few per cent more")
        else:
            lines.append(f"traced with the CPU's operations: those of {device} may keep more or less")
    return lines


def _choices(run: Run) -> str:
    config = run.record.config
    words = [f"model={config['model']['name']}"]
    words += [f"position={config['position']['name']}"] if config["position"] != "none" else []
    contexts = [m.context for m in run.measurements() if m.name == "peak_memory_bytes" and m.context]
    return " ".join([*words, f"profile.contexts=[{','.join(map(format_length, contexts[:5]))}]"])
