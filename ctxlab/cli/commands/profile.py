"""`ctxlab profile`: memory and time of a training step and of generation by context, each point in processes of its own."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from rich.text import Text

from ctxlab.cli.console import progress_bar
from ctxlab.cli.main import DIED, DONE
from ctxlab.cli.mirror import recording
from ctxlab.cli.scoring import cost_contexts, measure_cost, memory_source, step_facts, step_point
from ctxlab.model.attention import native
from ctxlab.model.base import Parts, native_from
from ctxlab.profiling.fit import exponents
from ctxlab.profiling.measure import arithmetic, run_point
from ctxlab.profiling.plan import part_rows
from ctxlab.profiling.policy import predictor_of
from ctxlab.records.provenance import collect
from ctxlab.records.store import Run
from ctxlab.report.costs import save_scaling, show_profile
from ctxlab.train.precision import Precision, resolve_device, resolve_precision

if TYPE_CHECKING:
    import torch

    from ctxlab.cli.invocation import Invocation
    from ctxlab.config.schema import ProfileConfig
    from ctxlab.profiling.measure import Point
    from ctxlab.records.sinks import Sink


def run(config: ProfileConfig, run: Run, invocation: Invocation) -> int:
    """Measures every point, fits and splits, and prints the tables. A point that does not fit is a row; no point at all is a
    failure."""
    device = resolve_device(config.trainer.accelerator)
    precision = resolve_precision(config.trainer.precision, device)
    with recording(run, config.logger, job_type="profile") as opened:
        point = step_point(config, vocab_size=config.vocab_size, precision=precision, device=device, counted=True)
        run.update(
            provenance=collect(
                seed=config.seed,
                precision=precision,
                device=device.type,
                memory_source=memory_source(device),
                plugins=run.record.plugins,
                resolved=step_facts(point, config.context),
            )
        )
        _prepare_attention(config, device, precision, invocation)
        measure_cost(config.profile, point, None, sink=opened.sink, console=invocation.stderr_console)
        _say_what_ran(run)
        measured = [m for m in run.measurements() if m.value is not None]
        if measured:
            _explain(run, point, config.profile.timeout, opened.sink, invocation)
        opened.exit_code = DONE if measured else DIED
        run.finish("done" if measured else "failed", "" if measured else "no point could be measured")
    if not invocation.is_child:
        show_profile(run, invocation.stdout_console)
    return opened.exit_code


def _prepare_attention(
    config: ProfileConfig, device: torch.device, precision: Precision, invocation: Invocation
) -> None:
    """Builds the native kernel before anything is measured, if one of the points can use it: no point then depends on what
    happened to be built before. Generation decodes in it, whatever the attention."""
    contexts = cost_contexts(config.profile, config.context, None)
    if config.attention == "none" or config.attention.kernel == "torch" or device.type != "cpu" or not contexts:
        return
    shortest = native_from(Parts(config.model, config.position, config.attention), precision)
    attends = shortest is not None and (config.attention.kernel == "native" or max(contexts) >= shortest)
    if not attends and not config.profile.generates(config.model.architecture):
        return
    console = invocation.stderr_console
    native.prepare(
        config.attention.kernel, math.inf, lambda line: console.print(Text(line, style="dim"), soft_wrap=True)
    )


def _say_what_ran(run: Run) -> None:
    """The attention kernels of all points, into the provenance."""
    ran = {word for m in run.measurements() for word in str(m.facts.get("attention_kernel", "")).split(" and ") if word}
    if ran:
        where = run.record.provenance
        resolved = {**where.resolved, "attention_kernel": " and ".join(sorted(ran))}
        run.update(provenance=where.model_copy(update={"resolved": resolved}))


def _explain(run: Run, point: Point, timeout: float, sink: Sink, invocation: Invocation) -> None:
    """What the measured points say: their rate against a matmul's, exponents, and what the memory is there for."""
    measured = run.measurements()
    contexts = sorted({m.context for m in measured if m.name == "peak_memory_bytes" and m.context is not None})
    with progress_bar(invocation.stderr_console) as start:
        advance = start("fitting and splitting", 1 + len(contexts))
        best = run_point(point, "matmul", timeout)
        advance(1)
        predictor = predictor_of(point)
        found = arithmetic(point, measured, best.get("flops_per_second"))
        for context in contexts:
            found += part_rows(predictor.memory(context))
            advance(1)
        found += exponents(measured, predictor)
    sink.measure(found)
    picture = save_scaling([run], run.path / "scaling.png")
    if picture is not None:
        save_scaling([run], run.path / "scaling.svg")
        sink.image("scaling", picture)
