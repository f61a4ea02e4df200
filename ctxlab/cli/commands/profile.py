"""`ctxlab profile`: memory and time of one training step by context, each point in processes of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ctxlab.cli.main import DIED, DONE
from ctxlab.cli.mirror import recording
from ctxlab.cli.scoring import measure_cost, memory_source, step_point
from ctxlab.records.provenance import collect
from ctxlab.records.store import Run
from ctxlab.report.tables import show_profile
from ctxlab.train.precision import resolve_device, resolve_precision

if TYPE_CHECKING:
    from ctxlab.cli.invocation import Invocation
    from ctxlab.config.schema import ProfileConfig


def run(config: ProfileConfig, run: Run, invocation: Invocation) -> int:
    """Measures every point and prints the table. A point that does not fit is a row; no point at all is a failure."""
    device = resolve_device(config.trainer.accelerator)
    precision = resolve_precision(config.trainer.precision, device)
    with recording(run, config.logger, job_type="profile") as opened:
        run.update(
            provenance=collect(
                seed=config.seed,
                precision=precision,
                device=device.type,
                memory_source=memory_source(device),
                plugins=run.record.plugins,
            )
        )
        point = step_point(config, vocab_size=config.vocab_size, precision=precision, device=device)
        measure_cost(config.profile, point, None, sink=opened.sink, console=invocation.stderr_console)
        measured = [m for m in run.measurements() if m.value is not None]
        opened.exit_code = DONE if measured else DIED
        run.finish("done" if measured else "failed", "" if measured else "no point could be measured")
    if not invocation.is_child:
        show_profile(run, invocation.stdout_console)
    return opened.exit_code
