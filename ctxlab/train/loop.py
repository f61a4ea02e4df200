"""One training run from its settings to its last checkpoint."""

from __future__ import annotations

import logging
import signal
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning
import torch
from rich.console import Console

from ctxlab.data.prepare import TextDataset
from ctxlab.data.stream import TrainStream, train_loader
from ctxlab.errors import ConfigError
from ctxlab.model.attention.base import Attention
from ctxlab.model.config import ModelConfig
from ctxlab.model.count import activation_bytes
from ctxlab.model.position.base import Position
from ctxlab.model.transformer import Transformer
from ctxlab.records.sinks import Sink
from ctxlab.train.budget import Budget, plan_budget
from ctxlab.train.callbacks.clock import Clock
from ctxlab.train.callbacks.interrupt import StopOnSignal
from ctxlab.train.callbacks.log import LogMetrics
from ctxlab.train.callbacks.progress import ShowProgress
from ctxlab.train.callbacks.save import ValidateAndSave
from ctxlab.train.checkpoint import Checkpoint, find_checkpoint, load_training, load_weights
from ctxlab.train.memory import total_memory_bytes
from ctxlab.train.module import LanguageModel
from ctxlab.train.optim.base import OPTIMIZERS, Optimizer
from ctxlab.train.precision import Precision, resolve_device, resolve_precision
from ctxlab.train.scoring import Validation
from ctxlab.train.settings import TrainerConfig

VALIDATIONS_IN_A_RUN = 5
CHECKPOINTS_IN_A_RUN = 10
ACTIVATION_SHARE = 0.4  # of the machine's memory, for one micro-batch: weights, optimizer and the caches need the rest


@dataclass(frozen=True)
class TrainSettings:
    """Everything that decides what a run computes, as validated components."""

    model: ModelConfig
    position: Position.Config
    attention: Attention.Config
    optim: Optimizer.Config
    trainer: TrainerConfig
    seed: int
    context: int
    packed: bool
    workers: int


@dataclass
class Outcome:
    """What a finished `fit` hands on: the model in place, where and how it ran, and the signal that ended it, if any."""

    model: Transformer
    device: torch.device
    precision: Precision
    step: int
    tokens: int
    seconds: float
    signal: signal.Signals | None
    rank: int
    resolved: dict[str, Any]  # what `auto` settings became


def seed_everything(seed: int) -> None:
    """Seeds torch for initial weights and dropout. Data order has its own key (seed, step) and reads no global state."""
    torch.manual_seed(seed)


def fitting_rows(settings: TrainSettings, vocab_size: int, precision: Precision, device: torch.device, context: int) -> int:
    """How many rows of `context` tokens fit at once, by closed form from total (not free) memory: the same every time."""
    row = activation_bytes(
        settings.model,
        settings.position,
        context=context,
        rows=1,
        vocab_size=vocab_size,
        precision=precision,
        recompute=settings.trainer.recompute,
    )
    return max(1, int(ACTIVATION_SHARE * total_memory_bytes(device) / row))


def fit(
    settings: TrainSettings,
    dataset: TextDataset,
    *,
    folder: Path,
    sink: Sink,
    console: Console,
    attempt: int = 1,
    resume: bool = False,
    initial: dict[str, torch.Tensor] | None = None,
) -> Outcome:
    """Trains until the budget or a signal ends it; every state on disk can be resumed bitwise.

    `folder` is the checkpoints folder. With `resume` the run goes on from its last checkpoint: weights, optimizer,
    random generators and the data's one integer. `initial` are weights of another run to start from.
    """
    trainer_config = settings.trainer
    device = resolve_device(trainer_config.accelerator)
    precision = resolve_precision(trainer_config.precision, device)
    world = trainer_config.devices
    seed_everything(settings.seed)

    saved: Checkpoint | None = find_checkpoint(folder) if resume else None
    state: dict[str, Any] = load_training(saved) if saved else {}

    model = Transformer(
        settings.model,
        settings.position,
        settings.attention,
        vocab_size=dataset.tokenizer.vocab_size,
        context=settings.context,
    )
    model.recompute = trainer_config.recompute
    model.loss_chunk = None if trainer_config.loss_chunk == "auto" else trainer_config.loss_chunk
    weights = load_weights(saved) if saved else initial
    if weights is not None:
        load_into(model, weights)

    recorded_rows: dict[int, int] = state.get("micro_rows", {})
    budget = plan_budget(
        trainer_config,
        settings.context,
        world=world,
        fitting_rows=lambda context: (
            recorded_rows.get(context)
            or fitting_rows(settings, dataset.tokenizer.vocab_size, precision, device, context)
        ),
    )
    launched = lightning.Trainer(
        accelerator="gpu" if device.type == "cuda" else "cpu",
        devices=world,
        strategy="ddp" if world > 1 else "auto",
        precision="bf16-mixed" if precision == "bf16" else "32-true",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    stream = TrainStream(
        dataset.splits["train"],
        seed=settings.seed,
        stages=budget.stages,
        rank=launched.global_rank,
        world=world,
        packed=settings.packed,
        pad_id=dataset.tokenizer.pad_id,
    )
    module = LanguageModel(model, OPTIMIZERS.get(settings.optim.name)(settings.optim), stream, budget)
    if saved:
        module.step, module.seconds = saved.step, saved.seconds
        if budget.bounded and saved.step >= budget.n_steps:
            raise ConfigError(
                f"trainer.max_steps: the run is already at step {saved.step} of {budget.n_steps}; "
                "give a larger budget to go on"
            )
    if trainer_config.compile:
        model.compile_blocks()

    clock = Clock(budget.max_seconds)
    interrupt = StopOnSignal()
    saver = ValidateAndSave(
        folder=folder,
        sink=sink,
        clock=clock,
        validate=Validation(dataset, settings.context, max_tokens=trainer_config.validate_tokens, precision=precision),
        validate_every=_every(trainer_config.validate_every, budget, VALIDATIONS_IN_A_RUN),
        save_every=_every(trainer_config.checkpoint_every, budget, CHECKPOINTS_IN_A_RUN),
        attempt=attempt,
        best=state.get("best"),
        micro_rows={stage.context: stage.micro_rows for stage in budget.stages},
    )
    callbacks: list[lightning.Callback] = [clock, interrupt, RestoreState(state)]
    if launched.is_global_zero:
        callbacks.append(LogMetrics(sink, trainer_config.log_every, attempt))
        callbacks.append(ShowProgress(console))
    callbacks.append(saver)
    launched.callbacks.extend(callbacks)  # type: ignore[attr-defined]

    _quieten()
    model.train()
    launched.fit(module, train_dataloaders=train_loader(stream, module.step, settings.workers))
    return Outcome(
        model=model,
        device=device,
        precision=precision,
        step=module.step,
        tokens=budget.tokens_before(module.step),
        seconds=module.seconds,
        signal=interrupt.received,
        rank=launched.global_rank,
        resolved={
            "micro_rows": {str(stage.context): stage.micro_rows for stage in budget.stages},
            "n_steps": budget.n_steps if budget.bounded else module.step,
            "validate_every": saver.validate_every,
            "checkpoint_every": saver.save_every,
        },
    )


def load_into(model: Transformer, weights: dict[str, torch.Tensor]) -> None:
    """Copies weights into a model of the same shape, or says which part does not fit."""
    own = model.state_dict()
    missing, extra = own.keys() - weights.keys(), weights.keys() - own.keys()
    wrong = [n for n in own.keys() & weights.keys() if own[n].shape != weights[n].shape]
    if missing or extra or wrong:
        first = sorted(missing | extra | set(wrong))[0]
        raise ConfigError(f"init: the weights do not fit this model ({len(missing | extra) + len(wrong)} differ, first: {first})")
    model.load_state_dict(weights)


class RestoreState(lightning.Callback):
    """Puts optimizer state and random generators back, once Lightning has built the optimizer."""

    def __init__(self, state: dict[str, Any]) -> None:
        self.state = state

    def on_train_start(self, trainer: lightning.Trainer, module: Any) -> None:
        if not self.state:
            return
        module.optimizers(use_pl_optimizer=False).load_state_dict(self.state["optimizer"])
        ranks = self.state["generators"]
        if trainer.global_rank < len(ranks):
            torch.set_rng_state(ranks[trainer.global_rank]["cpu"])
            if module.device.type == "cuda" and "cuda" in ranks[trainer.global_rank]:
                torch.cuda.set_rng_state(ranks[trainer.global_rank]["cuda"], module.device)


def _every(setting: str | int, budget: Budget, in_a_run: int) -> int | None:
    if setting == "none":
        return None
    if setting == "auto":
        return max(1, budget.n_steps // in_a_run) if budget.bounded else 200
    return int(setting)


def _quieten() -> None:
    """Lightning's hints and tips are not the user's business; its warnings about loaders do not fit our loader."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
