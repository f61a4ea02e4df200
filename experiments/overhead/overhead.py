"""What Lightning, the record, W&B and the progress line add to a training step: a run of `fit` against a bare loop.

Both train the same model on the same batches and take turns, a round each; a step is the time from one optimizer step to the
next. The model is as small as a model can be, so that what is measured is everything but the model.

    python experiments/overhead/overhead.py [ROUNDS] [STEPS]
"""

from __future__ import annotations

import functools
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

from ctxlab.cli.environment import set_process_defaults

set_process_defaults()  # before torch is imported

import torch
from rich.console import Console
from rich.table import Table

from ctxlab.data.prepare import TextDataset, prepare
from ctxlab.data.source import SOURCES
from ctxlab.data.stream import Stage, TrainStream
from ctxlab.data.tokenizers.base import TOKENIZERS
from ctxlab.model.attention.base import ATTENTIONS
from ctxlab.model.config import ModelConfig
from ctxlab.model.position.base import POSITIONS
from ctxlab.model.transformer import Transformer
from ctxlab.records.sinks import LoggerConfig, RunSink, open_mirror
from ctxlab.records.store import RunStore
from ctxlab.train.loop import TrainSettings, fit
from ctxlab.train.objectives.causal import Causal
from ctxlab.train.optim.base import OPTIMIZERS, rate_factor
from ctxlab.train.settings import TrainerConfig
from ctxlab.units import format_seconds

CONTEXT, ROWS, WARM = 16, 4, 20


def settings(steps: int) -> TrainSettings:
    return TrainSettings(
        model=ModelConfig(d_model=32, n_layers=1, n_heads=2, n_kv_heads=2, head_dim=16, d_ff=64),
        position=POSITIONS.config({"name": "rope"}),
        attention=ATTENTIONS.config({"name": "full"}),
        optim=OPTIMIZERS.config({"name": "adamw"}),
        trainer=TrainerConfig(
            max_steps=steps, batch_tokens=CONTEXT * ROWS, precision="fp32", validate_every="none", checkpoint_every="none"
        ),
        seed=1,
        context=CONTEXT,
        packed=False,
        workers=0,
    )  # fmt: skip


def bare(plan: TrainSettings, text: TextDataset, steps: int) -> list[float]:
    """Seconds of each step of the plainest loop that does the same to the weights."""
    torch.manual_seed(plan.seed)
    model = Transformer(
        plan.model, plan.position, plan.attention, vocab_size=text.tokenizer.vocab_size, context=CONTEXT
    )
    rows_of = functools.partial(Causal(plan.objective).rows, text, seed=plan.seed, packed=False)
    stream = TrainStream(rows_of, seed=plan.seed, stages=(Stage(CONTEXT, ROWS, ROWS, steps),))
    optimizer = OPTIMIZERS.get("adamw")(plan.optim).build(model)
    seconds, since = [], time.perf_counter()
    for step in range(steps):
        batch = stream[step]
        nats = model.nats(model.hidden(batch.tokens), batch.targets).sum() / batch.n_targets_in_step
        nats.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), plan.optim.clip)
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * rate_factor(plan.optim, step, step / steps)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        nats.item()
        now = time.perf_counter()
        seconds.append(now - since)
        since = now
    return seconds


def whole(plan: TrainSettings, text: TextDataset, folder: Path) -> list[float]:
    """Seconds of each step of a real run that logs every step to its record and to W&B and shows its progress."""
    run = RunStore(folder).create("train", "overhead", config={"context": CONTEXT}, line="")
    sink = RunSink(run, open_mirror(run, LoggerConfig(mode="offline"), job_type="train"))
    fit(plan, text, folder=run.checkpoints, sink=sink, console=Console(stderr=True))
    sink.finish(0)
    run.finish("done")
    at = [row["seconds"] for row in run.metrics()]
    return [b - a for a, b in zip(at, at[1:])]


def main() -> None:
    words = sys.argv[1:]
    rounds, steps = (int(word) for word in (words + ["5", "400"][len(words) :])[:2])
    plan = settings(steps)
    text = prepare(SOURCES.config({"name": "stdlib"}), TOKENIZERS.config({"name": "byte"}))
    found: dict[str, list[float]] = {"bare": [], "run": []}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(rounds):
            found["bare"].append(statistics.median(bare(plan, text, steps)[WARM:]))
            found["run"].append(statistics.median(whole(plan, text, Path(folder))[WARM:]))
    found["added"] = [run - loop for run, loop in zip(found["run"], found["bare"])]
    table = Table("a step", "median", "best round")
    for name, values in found.items():
        row = {"step": name, "median_seconds": statistics.median(values), "best_seconds": min(values)}
        print(json.dumps(row))
        table.add_row(name, format_seconds(row["median_seconds"]), format_seconds(row["best_seconds"]))
    where = "a terminal" if sys.stderr.isatty() else "no terminal"
    Console().print(table, f"{rounds} rounds of {steps} steps in turns, {where}")


main()
