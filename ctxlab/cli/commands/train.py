"""`ctxlab train`: train, validate, evaluate at many lengths, measure what each length costs; one table, one run."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING

import torch
from rich.text import Text

from ctxlab.cli.execute import is_first_rank
from ctxlab.cli.main import DONE, INTERRUPTED, TERMINATED
from ctxlab.cli.mirror import Recording, recording
from ctxlab.cli.scoring import measure_cost, memory_source, prepare_text, score, step_point
from ctxlab.data.tokenizers.base import Tokenizer, load_tokenizer
from ctxlab.records.provenance import collect
from ctxlab.records.store import Run
from ctxlab.report.tables import show_training
from ctxlab.train.checkpoint import find_checkpoint, load_weights
from ctxlab.train.loop import Outcome, TrainSettings, fit

if TYPE_CHECKING:
    from ctxlab.cli.invocation import Invocation
    from ctxlab.config.schema import TrainConfig
    from ctxlab.data.prepare import TextDataset


def run(config: TrainConfig, run: Run, invocation: Invocation) -> int:
    """Trains one run to its end, or to the signal that stops it, and returns the exit code."""
    with recording(run, config.logger, job_type="train") as opened:
        opened.exit_code = _train(config, run, opened, invocation)
        return opened.exit_code


def _train(config: TrainConfig, run: Run, opened: Recording, invocation: Invocation) -> int:
    console = invocation.stderr_console
    resume = config.resume != "none" and run.has_weights
    dataset = prepare_text(config.data, _tokenizer(config, run, invocation), config.paths.cache, console)
    if is_first_rank():
        if not resume:
            dataset.tokenizer.save(run.path / "tokenizer")
        run.update(provenance=collect(seed=config.seed, data=dataset.facts, plugins=run.record.plugins))
    outcome = fit(
        TrainSettings(
            model=config.model,
            position=config.position,
            attention=config.attention,
            optim=config.optim,
            trainer=config.trainer,
            seed=config.seed,
            context=config.context,
            packed=config.data.packed,
            workers=config.data.workers,
        ),
        dataset,
        folder=run.checkpoints,
        sink=opened.sink,
        console=console,
        attempt=run.record.attempt,
        resume=resume,
        initial=_initial_weights(config, invocation),
    )
    if outcome.rank > 0:
        return DONE
    _record_outcome(config, run, dataset, outcome)
    if outcome.signal is not None:
        return _interrupted(run, outcome, invocation)
    score(
        outcome.model, dataset, config.eval,
        context=config.context, device=outcome.device, precision=outcome.precision,
        run=run, sink=opened.sink, console=console,
    )  # fmt: skip
    point = step_point(
        config, vocab_size=dataset.tokenizer.vocab_size, precision=outcome.precision, device=outcome.device
    )
    measure_cost(config.profile, point, config.eval, sink=opened.sink, console=console)
    run.finish("done")
    if not invocation.is_child:
        show_training(run, invocation.stdout_console)
    return DONE


def _tokenizer(config: TrainConfig, run: Run, invocation: Invocation) -> Tokenizer | Tokenizer.Config:
    """The run's own tokenizer when it goes on, the parent's when it starts from one, else what the config says."""
    if (run.path / "tokenizer").is_dir():
        return load_tokenizer(run.path / "tokenizer")
    if config.init != "none":
        return load_tokenizer(invocation.store.open(config.init).path / "tokenizer")
    return config.tokenizer


def _initial_weights(config: TrainConfig, invocation: Invocation) -> dict[str, torch.Tensor] | None:
    if config.init == "none":
        return None
    return load_weights(find_checkpoint(invocation.store.open(config.init).checkpoints))


def _record_outcome(config: TrainConfig, run: Run, dataset: TextDataset, outcome: Outcome) -> None:
    run.update(
        parameters={
            "all": outcome.model.n_parameters(),
            "without_embeddings": outcome.model.n_parameters(embeddings=False),
        },
        provenance=run.record.provenance.model_copy(
            update={
                "precision": outcome.precision,
                "device": outcome.device.type,
                "memory_source": memory_source(outcome.device),
                "resolved": outcome.resolved,
            }
        ),
        artifacts={"tokenizer": "tokenizer", "checkpoints": "checkpoints", "wandb": "wandb"},
    )


def _interrupted(run: Run, outcome: Outcome, invocation: Invocation) -> int:
    terminated = outcome.signal == signal.SIGTERM
    run.finish("killed" if terminated else "interrupted", f"{outcome.signal.name} after step {outcome.step}")  # type: ignore[union-attr]
    invocation.stderr_console.print(
        Text(f"stopped after step {outcome.step}; saved. To go on:  ctxlab train resume={run.id}"), soft_wrap=True
    )
    return TERMINATED if terminated else INTERRUPTED
