"""`ctxlab _need FOLDER...`, hidden: what a training step of each run is predicted to need, a JSON object a line.

A process of its own, since a prediction builds the model: what a plugin does there happens to no sweep.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ctxlab.cli.scoring import step_point
from ctxlab.config import plugins, schema
from ctxlab.data.tokenizers.sides import are_apart, load_tokenizers
from ctxlab.profiling.predict import Predictor
from ctxlab.records.run import Run
from ctxlab.train.budget import micro_rows, rows_per_step
from ctxlab.train.loop import fitting_rows
from ctxlab.train.precision import resolve_device, resolve_precision


def run(argv: list[str]) -> int:
    """Prints {"run": id, "bytes": n, "rows": n, "context": n} of each run that came as far as its tokenizer."""
    for folder in argv:
        print(json.dumps(predicted_need(Run(Path(folder)))), flush=True)
    return 0


def predicted_need(run: Run) -> dict[str, Any]:
    """Peak bytes, beside the idle process, of a training step with as many rows at once as the run would take."""
    for path, sha256 in run.record.plugins:
        plugins.load(Path(path), sha256)
    config: Any = schema.parse(run.record.command, run.record.config)
    device = resolve_device(config.trainer.accelerator)
    precision = resolve_precision(config.trainer.precision, device)
    said = load_tokenizers(run.path, apart=are_apart(run.record.config["tokenizer"]))
    vocab_size = said.target.vocab_size
    rows = rows_per_step(config.trainer, config.context, config.trainer.devices) // config.trainer.devices
    asked = step_point(
        config, vocab_size=vocab_size, source_vocab_size=said.source.vocab_size, precision=precision, device=device,
        counted=True,
    )  # fmt: skip
    point = asked.at(config.context)
    largest = config.trainer.micro_batch
    if largest == "auto":
        assert point.recompute != "auto"
        largest = fitting_rows(
            config, vocab_size, precision, device, config.context,
            recompute=point.recompute, standing=point.standing(config.context),
        )  # fmt: skip
    rows = micro_rows(rows, largest)
    needed = Predictor(point).rows_bytes(config.context, rows)
    return {"run": run.id, "bytes": needed, "rows": rows, "context": config.context}
