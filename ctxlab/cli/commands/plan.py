"""`ctxlab plan`: memory of a training step by context without running one, and the longest context that fits."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

import torch

from ctxlab.cli.console import progress_bar
from ctxlab.cli.main import DONE
from ctxlab.cli.mirror import recording
from ctxlab.cli.scoring import step_facts, step_point
from ctxlab.config import catalog
from ctxlab.errors import ConfigError
from ctxlab.evaluation.perplexity import auto_lengths
from ctxlab.model.attention import native
from ctxlab.model.base import ARCHITECTURES, native_from, read_parts
from ctxlab.profiling.plan import changes, known_error, planned
from ctxlab.profiling.point import matmul_rate
from ctxlab.records.provenance import collect
from ctxlab.records.store import Run
from ctxlab.report.costs import show_plan
from ctxlab.train.memory import total_memory_bytes
from ctxlab.train.precision import resolve_precision

if TYPE_CHECKING:
    from ctxlab.cli.invocation import Invocation
    from ctxlab.config.schema import PlanConfig
    from ctxlab.profiling.measure import Point

MEASURED = "memory_scaling"  # the study that holds predictions to measurements
RATE_SECONDS = 0.4  # spent on the rate of a matmul


def run(config: PlanConfig, run: Run, invocation: Invocation) -> int:
    """Predicts every context, solves for what fits, and prints both with the known error of such predictions."""
    device = planned_device(config.trainer.accelerator)
    here = device.type == "cpu" or torch.cuda.is_available()
    precision = resolve_precision(config.trainer.precision, device) if here else "bf16"
    if not here and config.trainer.precision == "fp32":
        precision = "fp32"
    if device.type != "cpu" and config.attention != "none" and config.attention.kernel == "native":
        raise ConfigError(f"attention.kernel: native runs on a CPU, not on {device.type}; use auto or torch")
    if config.plan.memory != "auto":
        memory = config.plan.memory
    elif here:
        memory = total_memory_bytes(device)
    else:
        raise ConfigError("plan.memory: there is no GPU here whose memory auto could take; give it, e.g. 24GiB")
    point = step_point(
        config, vocab_size=config.vocab_size, precision=precision, device=device, memory=memory, counted=True
    )
    contexts = (
        auto_lengths(config.context) if config.plan.contexts == "auto" else tuple(sorted(set(config.plan.contexts)))
    )
    others = list(changes(point)) if config.plan.changes else []
    with recording(run, config.logger, job_type="plan") as opened:
        run.update(
            provenance=collect(
                seed=config.seed,
                precision=precision,
                device=device.type,
                plugins=run.record.plugins,
            ).model_copy(update={"resolved": {"memory": memory, **step_facts(point, config.context)}})
        )
        with progress_bar(invocation.stderr_console) as start:
            advance = start("predicting", len(contexts) + 1 + len(others))
            rate = matmul_rate(precision, device, RATE_SECONDS)["flops_per_second"] if here else None
            native.forget()
            rows = planned(point, contexts, memory, others=others, rate=rate, advance=lambda _: advance(1))
        ways = {str(row.facts["way"]) for row in rows if row.name == "peak_memory_bytes"}
        measured = catalog.conf_dir().parent / "experiments" / MEASURED / "results"
        # Recurrent and borrowed models call torch's own layers, which a trace on a CPU runs as a CPU does.
        operations = device.type if "attention" in ARCHITECTURES.get(config.model.architecture).parts else "cpu"
        error = None
        if operations == device.type:
            error = known_error(sorted(measured.glob(f"{MEASURED}*.txt")), device.type, precision, ways)
        provenance = run.record.provenance
        known = {
            "known_error": None if error is None else asdict(error), "operations_of": operations,
            **_kernel(point, max(contexts)),
        }  # fmt: skip
        run.update(provenance=provenance.model_copy(update={"resolved": {**provenance.resolved, **known}}))
        opened.sink.measure(rows)
        run.finish("done")
    if not invocation.is_child:
        show_plan(run, invocation.stdout_console)
    return DONE


def _kernel(point: Point, longest: int) -> dict[str, str]:
    """What computed attention in the traces, as far as they could be made, and whether it would be another, were that built."""
    fewest = native_from(read_parts(point.__dict__), point.precision) if point.device == "cpu" else None
    missing = fewest is not None and fewest <= longest and not native.is_built() and native.why_not() is None
    found = {"attention_kernel": native.ran()} if native.ran() else {}
    return {**found, "native_kernel": "not built yet"} if missing else found


def planned_device(accelerator: str) -> torch.device:
    """The device that is planned for, which need not be here."""
    wants_gpu = accelerator == "gpu" or (accelerator == "auto" and torch.cuda.is_available())
    return torch.device("cuda" if wants_gpu else "cpu")
