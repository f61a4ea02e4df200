"""`ctxlab train`: train, validate, evaluate at many lengths, measure what each length costs; one table, one run."""

from __future__ import annotations

import os
import signal
import time
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from ctxlab.cli.execute import is_first_rank
from ctxlab.cli.main import DIED, DONE, INTERRUPTED, TERMINATED
from ctxlab.cli.mirror import Recording, recording
from ctxlab.cli.scoring import measure_cost, memory_source, prepare_data, score, step_point, training_corpora
from ctxlab.data.tokenizers.base import Tokenizer
from ctxlab.data.tokenizers.sides import SOURCE, TARGET, Tokenizers, are_apart, load_tokenizers
from ctxlab.errors import DataError, RecordError, RunError
from ctxlab.evaluation.qa import QAConfig
from ctxlab.model.base import ARCHITECTURES, Model, architecture_of
from ctxlab.records.provenance import collect
from ctxlab.records.store import Run
from ctxlab.report.tables import show_training
from ctxlab.train.checkpoint import find_checkpoint, load_weights, reads_both_ways, weights_sha256
from ctxlab.train.initial import Begun, Initial, begin
from ctxlab.train.loop import Dataset, Outcome, TrainSettings, fit, fresh_model, tokenizers_of

if TYPE_CHECKING:
    from ctxlab.cli.invocation import Invocation
    from ctxlab.config.schema import TrainConfig


def run(config: TrainConfig, run: Run, invocation: Invocation) -> int:
    """Trains one run to its end, or to the signal that stops it, and returns the exit code."""
    if not is_first_rank():
        return _follow(config, run, invocation)
    try:
        with recording(run, config.logger, job_type="train") as opened:
            opened.exit_code = _train(config, run, opened, invocation)
            return opened.exit_code
    except (KeyboardInterrupt, SystemExit) as stop:
        _say_how_to_go_on(run, "interrupted" if isinstance(stop, KeyboardInterrupt) else "terminated", invocation)
        raise


def _follow(config: TrainConfig, run: Run, invocation: Invocation) -> int:
    """Another rank of a distributed run: trains along, and is quiet where the first rank speaks or is no more."""
    parent = os.getppid()
    try:
        with recording(run, config.logger, job_type="train") as opened:
            return _train(config, run, opened, invocation)
    except RunError:
        return DIED
    except Exception:
        time.sleep(1.0)  # connections of a process that is killed close before it is gone
        if os.getppid() != parent:
            return DIED
        raise


def _train(config: TrainConfig, run: Run, opened: Recording, invocation: Invocation) -> int:
    console = invocation.stderr_console
    resume = config.resume != "none" and run.has_weights
    dataset = prepare_data(config.data, _tokenizer(config, run, invocation), config.paths.cache, console)
    if resume:
        _require_same_text(run, dataset)
    if is_first_rank():
        if not resume:
            tokenizers_of(dataset).save(run.path)
        begun = run.record.provenance.resolved.get("init") if resume else None  # said once, before the first step
        resolved = {} if begun is None else {"init": begun}
        run.update(
            provenance=collect(seed=config.seed, data=dataset.facts, plugins=run.record.plugins, resolved=resolved)
        )
    if config.resume != "none" and not resume and is_first_rank():
        console.print(Text(f"{run.id} was stopped before its first checkpoint: it starts over"), soft_wrap=True)
    settings = TrainSettings(
        model=config.model,
        position=config.position,
        attention=config.attention,
        objective=config.objective,
        optim=config.optim,
        trainer=config.trainer,
        seed=config.seed,
        context=config.context,
        packed=config.data.packs,
        workers=config.data.workers,
    )
    outcome = fit(
        settings,
        dataset,
        folder=run.checkpoints,
        sink=opened.sink,
        console=console,
        attempt=run.record.attempt,
        resume=resume,
        initial=None if resume and config.trainer.lora.r == "none" else _initial(config, dataset, run, invocation),
        begun=lambda found: _say_begun(run, found, console),
    )
    if outcome.rank > 0:
        return DONE
    _record_outcome(config, run, dataset, outcome)
    if outcome.signal is not None:
        return _interrupted(run, outcome, invocation)
    score(
        outcome.model, dataset, config.eval,
        context=config.context, device=outcome.device, precision=outcome.precision, seed=config.seed,
        run=run, sink=opened.sink, console=console, objective_config=config.objective,
        learned=training_corpora(run, invocation.store), facts=dataset.facts,
        untuned=_untuned(config, settings, dataset, outcome, run, invocation),
    )  # fmt: skip
    said = tokenizers_of(dataset)
    point = step_point(
        config,
        vocab_size=said.target.vocab_size,
        source_vocab_size=said.source.vocab_size,
        precision=outcome.precision,
        device=outcome.device,
    )
    measure_cost(config.profile, point, config.eval, sink=opened.sink, console=console)
    run.finish("done")
    if not invocation.is_child:
        show_training(run, invocation.stdout_console)
    return DONE


def _tokenizer(config: TrainConfig, run: Run, invocation: Invocation) -> Tokenizers | Tokenizer.Config:
    """The run's own tokenizer when it goes on, the parent's when it starts from one, else what the config says."""
    apart = are_apart(config.tokenizer.model_dump())
    if run.has_weights:
        return load_tokenizers(run.path, apart=apart)
    if config.init != "none":
        parent = invocation.store.open(config.init)
        sentinels = {"sentinels": config.tokenizer.sentinels}  # more of them change no other piece
        if parent.record.config["tokenizer"] | sentinels == config.tokenizer.model_dump(mode="json"):
            return load_tokenizers(parent.path, apart=apart).with_sentinels(config.tokenizer.sentinels)
    return config.tokenizer


def _require_same_text(run: Run, dataset: Dataset) -> None:
    """A run that goes on reads the text that it began with, or it is another run."""
    before, now = run.record.provenance.data.get("text_sha256"), dataset.facts["text_sha256"]
    if before is not None and before != now:
        raise DataError(f"data: the text has changed since {run.id} read it (sha256 {before[:12]}, now {now[:12]})")


def _initial(config: TrainConfig, dataset: Dataset, run: Run, invocation: Invocation) -> Initial | None:
    """What the run starts from, if from another: without the head of another task, or for other labels."""
    if config.init == "none":
        return None
    adapted = config.trainer.lora.r != "none"
    try:
        parent = invocation.store.open(config.init)
        saved = find_checkpoint(parent.checkpoints, config.checkpoint)
        weights = load_weights(saved)
    except RecordError as error:
        if not (adapted and run.has_weights):
            raise
        raise RecordError(
            f"resume: {run.id} trains adapters on the weights of {config.init}, which cannot be read ({error}); put that run "
            f"back, or start from what it has learned, merged: init={run.id}"
        ) from error
    before = parent.record.config
    task = before.get("objective", {}).get("name"), parent.record.provenance.data.get("labels")
    if task != (config.objective.name, dataset.facts.get("labels")):
        weights = {name: weight for name, weight in weights.items() if not name.startswith("task_head.")}
    position, named = before["position"], architecture_of(before["model"])
    architecture = ARCHITECTURES.get(named)
    return Initial(
        weights,
        None if position == "none" else position["name"],
        load_tokenizers(parent.path, apart=are_apart(before["tokenizer"])),
        None if architecture.reads_source else architecture.causal and not reads_both_ways(before),
        named,
        weights_sha256(saved) if adapted else "",
    )


def _untuned(
    config: TrainConfig, settings: TrainSettings, dataset: Dataset, outcome: Outcome, run: Run, invocation: Invocation
) -> Model | None:
    """The model as it was before the first step, where its answers are asked for too."""
    if not (isinstance(config.eval.qa, QAConfig) and config.eval.qa.untuned):
        return None
    model, initial = fresh_model(settings, dataset), _initial(config, dataset, run, invocation)
    if initial is None:
        model.take_pretrained()
    else:
        begin(model, initial, tokenizers_of(dataset))
    return model.eval().to(outcome.device)


def _say_begun(run: Run, begun: Begun, console: Console) -> None:
    if not begun.facts or not is_first_rank():
        return
    for line in begun.lines:
        console.print(Text(line), soft_wrap=True)
    provenance = run.record.provenance
    resolved = {**provenance.resolved, "init": begun.facts}
    run.update(provenance=provenance.model_copy(update={"resolved": resolved}))


def _record_outcome(config: TrainConfig, run: Run, dataset: Dataset, outcome: Outcome) -> None:
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
                "resolved": {**run.record.provenance.resolved, **outcome.resolved},
            }
        ),
        artifacts={name: name for name in (TARGET, SOURCE, "checkpoints", "wandb") if (run.path / name).is_dir()},
    )


def _interrupted(run: Run, outcome: Outcome, invocation: Invocation) -> int:
    terminated = outcome.signal == signal.SIGTERM
    run.finish("killed" if terminated else "interrupted", f"{outcome.signal.name} after step {outcome.step}")  # type: ignore[union-attr]
    _say_how_to_go_on(run, f"stopped after step {outcome.step}; saved", invocation)
    return TERMINATED if terminated else INTERRUPTED


def _say_how_to_go_on(run: Run, what: str, invocation: Invocation) -> None:
    how = f"  To go on:  ctxlab train resume={run.id}" if run.has_weights else ""
    invocation.stderr_console.print(Text(f"{what}.{how}"), soft_wrap=True)
