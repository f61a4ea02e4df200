"""One training run from its settings to its last checkpoint."""

from __future__ import annotations

import bisect
import functools
import logging
import math
import multiprocessing
import re
import signal
import subprocess
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import lightning
import torch
from rich.console import Console
from rich.text import Text
from torch.utils.data import DataLoader

from ctxlab.data.by_length import ExampleStream
from ctxlab.data.labelled.questions import QuestionDataset
from ctxlab.data.labelled.texts import LabelDataset
from ctxlab.data.pairs.dataset import PairDataset
from ctxlab.data.pairs.stream import PairOrder, PairStream
from ctxlab.data.prepare import TextDataset
from ctxlab.data.stream import Batch, Stream, TrainStream, train_loader
from ctxlab.data.tasks.dataset import TaskDataset
from ctxlab.data.tokenizers.sides import Tokenizers
from ctxlab.errors import ConfigError, CtxlabError, IncompatibleError, RunError
from ctxlab.model.attention import native
from ctxlab.model.attention.base import Attention
from ctxlab.model.base import Model, Parts, build_model, native_from
from ctxlab.model.config import SizesConfig
from ctxlab.model.count import (
    JUDGED_SHARE,
    activation_bytes,
    chosen_recompute,
    flops_per_token,
    rows_at_once,
    standing_bytes,
)
from ctxlab.model.loss import chunk_for
from ctxlab.model.offload import require_elsewhere
from ctxlab.model.position.base import Position
from ctxlab.model.recurrence import SegmentMemory
from ctxlab.model.remake import Recompute
from ctxlab.records.sinks import Sink
from ctxlab.train import lora
from ctxlab.train.answers import example_validation, objective_validation, task_validation
from ctxlab.train.budget import Budget, plan_budget
from ctxlab.train.callbacks.clock import Clock
from ctxlab.train.callbacks.finite import RequireFinite
from ctxlab.train.callbacks.interrupt import StopOnSignal
from ctxlab.train.callbacks.log import LogMetrics
from ctxlab.train.callbacks.progress import ShowProgress
from ctxlab.train.callbacks.save import ValidateAndSave
from ctxlab.train.checkpoint import Checkpoint, find_checkpoint, load_training, load_weights
from ctxlab.train.compiling import check_compiled, decide
from ctxlab.train.initial import Begun, Initial, begin, listed, load_into
from ctxlab.train.memory import total_memory_bytes
from ctxlab.train.module import LanguageModel
from ctxlab.train.objectives.base import OBJECTIVES, Objective
from ctxlab.train.objectives.causal import Causal
from ctxlab.train.objectives.windows import Denoising
from ctxlab.train.optim.base import OPTIMIZERS, Optimizer
from ctxlab.train.pairs import PairValidation
from ctxlab.train.precision import Precision, resolve_device, resolve_precision
from ctxlab.train.scoring import Validation
from ctxlab.train.settings import TrainerConfig
from ctxlab.train.trained import freeze
from ctxlab.units import format_bytes

Dataset = TextDataset | TaskDataset | PairDataset | QuestionDataset | LabelDataset
"""What a run is trained on."""

VALIDATIONS_IN_A_RUN = 5
CHECKPOINTS_IN_A_RUN = 10
ACTIVATION_SHARE = 0.4  # of the machine's memory, for one micro-batch: weights, optimizer and the caches need the rest
MOST_ROWS = 2**20  # of a micro-batch


@dataclass(frozen=True)
class TrainSettings:
    """Everything that decides what a run computes, as validated components."""

    model: SizesConfig
    position: Position.Config | Literal["none"]
    attention: Attention.Config | Literal["none"]
    optim: Optimizer.Config
    trainer: TrainerConfig
    seed: int
    context: int
    packed: bool
    workers: int
    objective: Objective.Config = field(default_factory=Causal.Config)


@dataclass
class Outcome:
    """What a finished `fit` hands on: the model in place, where and how it ran, the signal that ended it, if any."""

    model: Model
    device: torch.device
    precision: Precision
    step: int
    tokens: int
    seconds: float
    signal: signal.Signals | None
    rank: int
    resolved: dict[str, Any]  # what `auto` settings became


def fit(
    settings: TrainSettings,
    dataset: Dataset,
    *,
    folder: Path,
    sink: Sink,
    console: Console,
    attempt: int = 1,
    resume: bool = False,
    initial: Initial | None = None,
    begun: Callable[[Begun], None] = lambda _: None,
) -> Outcome:
    """Trains until the budget or a signal ends it; every state on disk can be resumed bitwise.

    `folder` is the checkpoints folder. With `resume` the run goes on from its last checkpoint: weights, optimizer,
    random generators and the data's one integer. `initial` are weights of another run to start from, which adapters need to
    go on too; `begun` hears what became of them before the first step.
    """
    _quieten()
    config = settings.trainer
    device = resolve_device(config.accelerator)
    require_elsewhere(config.offload, device)
    precision = resolve_precision(config.precision, device)
    vocab_size = dataset.tokenizer.vocab_size
    saved = find_checkpoint(folder) if resume else None
    state = load_training(saved) if saved else None

    model = fresh_model(settings, dataset)
    model.loss_chunk = None if config.loss_chunk == "auto" else config.loss_chunk
    if config.lora.r != "none":
        assert initial is not None, "rules.py comes first"
        _adapt(model, settings, initial, dataset, saved, begun)
    elif saved:
        load_into(model, load_weights(saved), "resume")
    elif initial is not None:
        begun(begin(model, initial, tokenizers_of(dataset)))
    else:
        model.take_pretrained()
    freeze(model, config.freeze)
    if model.task_head is not None:
        leave_unread(model)
    trained = lora.n_trained(model)
    standing = standing_bytes(model.n_parameters(), trained, OPTIMIZERS.get(settings.optim.name).states)
    model.recompute = chosen_policy(settings, vocab_size, precision, device, total_memory_bytes(device), standing)

    launched = _lightning(device, config, precision)
    budget, stream = plan(
        settings,
        dataset,
        before=state["micro_rows"] if state else {},
        fitting=lambda context: fitting_rows(
            settings, vocab_size, precision, device, context, recompute=model.recompute, standing=standing
        ),
        rank=launched.global_rank,
        in_order=model.carries,
    )
    if config.recompute == "auto":
        said = f"trainer.recompute=auto: {model.recompute}, by {format_bytes(total_memory_bytes(device))} of memory"
        console.print(Text(said, style="dim"), soft_wrap=True)
    _prepare_attention(settings, budget, vocab_size, device, precision, console)
    compiled = _compiles(settings, budget, vocab_size, device, console)
    if compiled:
        model.compile_blocks()
    optimizer = OPTIMIZERS.get(settings.optim.name)(settings.optim)
    if config.update == "backward":
        require_one_micro_batch(config, stream, budget)
    module = LanguageModel(
        model,
        optimizer,
        stream,
        budget,
        smoothing=settings.objective.label_smoothing,
        update=config.update,
        offload=config.offload,
    )
    if saved:
        module.step, module.seconds = saved.step, saved.seconds

    clock = Clock(budget.max_seconds)
    interrupt = StopOnSignal()
    saver = ValidateAndSave(
        folder=folder,
        sink=sink,
        clock=clock,
        interrupt=interrupt,
        validate=_validation(settings, dataset, precision),
        validate_every=_every(config.validate_every, budget, VALIDATIONS_IN_A_RUN),
        save_every=_every(config.checkpoint_every, budget, CHECKPOINTS_IN_A_RUN),
        attempt=attempt,
        micro_rows={stage.context: stage.micro_rows for stage in budget.stages},
        saved=saved,
        base=initial.sha256 if initial is not None else "",
        average=0 if config.average == "none" else config.average,
    )
    callbacks: list[lightning.Callback] = [RequireFinite(), clock, interrupt, SetState(settings.seed, state)]
    if launched.is_global_zero:
        callbacks += [LogMetrics(sink, config.log_every, attempt), ShowProgress(console)]
    launched.callbacks.extend([*callbacks, saver])  # type: ignore[attr-defined]

    model.train()
    _run(launched, module, train_loader(stream, module.step, settings.workers))
    model.to(device)  # Lightning has put it back on the CPU
    lora.merge(model)
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
            "recompute": model.recompute,
            "n_steps": budget.n_steps if budget.bounded else module.step,
            "validate_every": saver.validate_every,
            "checkpoint_every": saver.save_every,
            **({"compile": compiled} if config.compile == "auto" else {}),
            **({"attention_kernel": native.ran()} if native.ran() else {}),
            **({"trained_parameters": trained} if config.lora.r != "none" else {}),
        },
    )


def fresh_model(settings: TrainSettings, dataset: Dataset) -> Model:
    """The model that a run draws, the same each time. Moves torch's random state: initial weights and dropout; the order of the
    data has a key of its own."""
    torch.manual_seed(settings.seed)
    model = build_model(
        Parts(settings.model, settings.position, settings.attention),
        vocab_size=dataset.tokenizer.vocab_size,
        context=settings.context,
        source_vocab_size=tokenizers_of(dataset).source.vocab_size,
        prefix=OBJECTIVES.get(settings.objective.name).prefix,
    )
    model.task_head = OBJECTIVES.get(settings.objective.name)(settings.objective).head(settings.model, dataset.facts)
    return model


def leave_unread(model: Model) -> None:
    """Takes out of training what only the model's own head reads: beside a task head nothing does."""
    for part in (model.head, getattr(model, "head_layer", None)):
        if part is not None:
            part.requires_grad_(False)


def _adapt(
    model: Model,
    settings: TrainSettings,
    initial: Initial,
    dataset: Dataset,
    saved: Checkpoint | None,
    begun: Callable[[Begun], None],
) -> None:
    """The weights of another run and adapters on them, new or as they were saved."""
    found = begin(model, initial, tokenizers_of(dataset))
    learned = () if model.task_head is None else lora.HEADS  # or read by nobody
    left = {name: shape for name, shape in found.new.items() if not name.startswith(learned)}
    if left or found.rows.get("new"):
        raise ConfigError(
            f"trainer.lora.r: adapters alone are trained, and {listed(left) or 'new rows of ' + ' and '.join(found.rows_of)} "
            "would stay as drawn; train without adapters first, or leave architecture, positions and tokenizer as they are in "
            "the run"
        )
    lora.adapt(model, settings.trainer.lora)
    if saved is None:
        begun(found)
    else:
        lora.load_adapters(model, saved.path / lora.ADAPTERS, initial.sha256)


def _prepare_attention(
    settings: TrainSettings,
    budget: Budget,
    vocab_size: int,
    device: torch.device,
    precision: Precision,
    console: Console,
) -> None:
    """Builds the native kernel for a run on CPU that can use it and is long enough, or demands it."""
    native.forget()
    if settings.attention == "none" or device.type != "cpu":
        return
    parts = Parts(settings.model, settings.position, settings.attention)
    if native_from(parts, precision) is None:
        return
    operations = _operations(settings, budget, vocab_size)
    if not budget.bounded:
        operations = budget.max_seconds * native.OPERATIONS_PER_SECOND
    native.prepare(
        settings.attention.kernel, operations, lambda line: console.print(Text(line, style="dim"), soft_wrap=True)
    )


def _compiles(settings: TrainSettings, budget: Budget, vocab_size: int, device: torch.device, console: Console) -> bool:
    """Whether the run's blocks are compiled; says what `auto` has chosen."""
    trainer, refusal = settings.trainer, ""
    if trainer.compile == "auto":
        try:
            check_compiled(settings.model, trainer)
        except IncompatibleError as error:
            refusal = str(error).partition(": ")[2].partition(";")[0]
    operations = _operations(settings, budget, vocab_size) if budget.bounded else math.inf
    compiled, why = decide(trainer.compile, device, operations, budget.max_seconds, refusal)
    if why:
        said = "blocks are compiled" if compiled else "blocks are not compiled"
        console.print(Text(f"{said} (trainer.compile=auto): {why}", style="dim"), soft_wrap=True)
    return compiled


def _operations(settings: TrainSettings, budget: Budget, vocab_size: int) -> float:
    """Floating-point operations of the whole run."""
    return budget.n_tokens * flops_per_token(
        settings.model, settings.attention, vocab_size=vocab_size, context=settings.context
    )


def plan(
    settings: TrainSettings,
    dataset: Dataset,
    *,
    before: Mapping[int, int],
    fitting: Callable[[int], int],
    rank: int,
    in_order: bool,
) -> tuple[Budget, Stream]:
    """The stages of a run and what its rank reads in them. `before`: the rows at once of each context that a run goes on
    with; `fitting`: how many rows of a context fit."""
    config = settings.trainer
    objective = OBJECTIVES.get(settings.objective.name)(settings.objective)
    if isinstance(dataset, PairDataset | QuestionDataset | LabelDataset):
        # A step has batch_tokens tokens whatever its examples' lengths: one row of that many, cut in micro-batches.
        step = config.batch_tokens
        single = config.model_copy(update={"micro_batch": 1})
        budget = plan_budget(single, step, world=1, fitting_rows=lambda _: 1)
        share = step // config.devices
        fits = fitting(settings.context) * settings.context // 2  # source and target, and the padding of both
        if config.micro_batch != "auto":
            fits = config.micro_batch * settings.context
        shares = {
            "n_steps": budget.n_steps, "n_micro": -(-share // max(fits, 1)), "rank": rank, "world": config.devices,
            "pad_id": dataset.tokenizer.pad_id,
        }  # fmt: skip
        if not isinstance(dataset, PairDataset):
            examples = objective.examples(dataset, "train", settings.context)
            return budget, ExampleStream(examples, batch_tokens=step, seed=settings.seed, **shares)
        order = PairOrder(dataset.splits["train"], batch_tokens=step, seed=settings.seed, longest=settings.context)
        return budget, PairStream(order, **shares)
    budget = plan_budget(
        config,
        settings.context,
        world=config.devices,
        fitting_rows=lambda context: before.get(context) or fitting(context),
    )
    return budget, TrainStream(
        functools.partial(objective.rows, dataset, seed=settings.seed, packed=settings.packed),
        seed=settings.seed,
        stages=budget.stages,
        rank=rank,
        world=config.devices,
        pad_id=dataset.tokenizer.pad_id,
        in_order=in_order,
    )


def tokenizers_of(dataset: Dataset) -> Tokenizers:
    """Of what is read and of what is written, which of everything but pairs is one."""
    if isinstance(dataset, PairDataset):
        return dataset.tokenizers
    return Tokenizers.joint(dataset.tokenizer)


def fitting_rows(
    settings: TrainSettings,
    vocab_size: int,
    precision: Precision,
    device: torch.device,
    context: int,
    *,
    recompute: Recompute,
    standing: int,
) -> int:
    """How many rows of `context` tokens fit at once, by closed form from total (not free) memory: always the same. They have
    ACTIVATION_SHARE of it, or what is left beside the bytes that are `standing`."""
    total = total_memory_bytes(device)

    def needed(rows: int) -> int:
        return activation_bytes(
            settings.model,
            settings.position,
            settings.attention,
            context=context,
            rows=rows,
            vocab_size=vocab_size,
            precision=precision,
            recompute=recompute,
            loss_chunk=_chunk(settings.trainer, vocab_size, device),
        )

    room = min(ACTIVATION_SHARE * total, JUDGED_SHARE * total - standing)
    return max(1, bisect.bisect_right(range(1, MOST_ROWS + 1), room, key=needed))


def _chunk(trainer: TrainerConfig, vocab_size: int, device: torch.device) -> int:
    """Tokens whose logits exist at once."""
    return chunk_for(vocab_size, device.type, None if trainer.loss_chunk == "auto" else trainer.loss_chunk)


def chosen_policy(
    settings: TrainSettings, vocab_size: int, precision: Precision, device: torch.device, memory: int, standing: int
) -> Recompute:
    """What `trainer.recompute` is of a run that has `memory` bytes, of which `standing` are weights and what goes with them."""
    return chosen_recompute(
        settings.trainer.recompute,
        settings.model,
        settings.position,
        settings.attention,
        vocab_size=vocab_size,
        context=settings.context,
        rows=rows_at_once(
            settings.trainer.micro_batch, settings.trainer.batch_tokens // settings.trainer.devices, settings.context
        ),
        precision=precision,
        loss_chunk=_chunk(settings.trainer, vocab_size, device),
        standing=standing,
        memory=memory,
    )


def require_one_micro_batch(config: TrainerConfig, stream: Stream, budget: Budget) -> None:
    """Raises ConfigError where a step's gradient is a sum over several backward passes, which has to be kept until the last."""
    first = 0
    for stage in budget.stages:
        n, tokens = stream.micro_batches(first), stage.rows * stage.context
        if n > 1:
            given = config.micro_batch != "auto"
            instead = (
                f"trainer.micro_batch={config.micro_batch * n}" if given else f"trainer.batch_tokens={tokens // n}"
            )
            raise ConfigError(
                f"trainer.update: backward sees a step's gradients in one pass, and {tokens} tokens at context={stage.context} "
                f"take {n} micro-batches; use step, or {instead}"
            )
        first += stage.steps


class SetState(lightning.Callback):
    """Sets random generators, and puts back optimizer state and memory, once Lightning has built the optimizer.

    Every rank draws dropout from a generator of its own: ranks with equal ones would drop the same units.
    """

    def __init__(self, seed: int, state: dict[str, Any] | None) -> None:
        self.seed = seed
        self.state = state

    def on_train_start(self, trainer: lightning.Trainer, module: Any) -> None:
        rank = trainer.global_rank
        if rank:
            torch.manual_seed(self.seed + rank)
        if self.state is None:
            return
        module.optimizers(use_pl_optimizer=False).load_state_dict(self.state["optimizer"])
        memory = self.state["memory"]
        if memory is not None:
            share = len(memory["held"]) // trainer.world_size
            module.memories = [
                SegmentMemory.restored(memory, slice(start, start + rows), module.device)
                for rows in [share // module.stream.micro_batches(module.step - 1)]  # as the last step left them
                for start in range(rank * share, (rank + 1) * share, rows)
            ]
        ranks = self.state["generators"]
        if rank < len(ranks):
            torch.set_rng_state(ranks[rank]["cpu"])
            if module.device.type == "cuda" and "cuda" in ranks[rank]:
                torch.cuda.set_rng_state(ranks[rank]["cuda"], module.device)


def _lightning(device: torch.device, config: TrainerConfig, precision: Precision) -> lightning.Trainer:
    """Lightning as the machine that steps, with nothing of its own around it."""
    return lightning.Trainer(
        accelerator="gpu" if device.type == "cuda" else "cpu",
        devices=config.devices,
        strategy="ddp" if config.devices > 1 else config.strategy,
        precision="bf16-mixed" if precision == "bf16" else "32-true",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )


def _run(launched: lightning.Trainer, module: LanguageModel, loader: DataLoader[Batch]) -> None:
    """Lightning's loop, whose ends are made ours: Ctrl-C is Ctrl-C, and the other ranks end with the first."""
    threads = torch.get_num_threads()
    if launched.world_size > 1 and launched.strategy.root_device.type == "cpu":
        torch.set_num_threads(max(1, threads // launched.world_size))
    try:
        launched.fit(module, train_dataloaders=loader)
    except BaseException as error:
        dead = None if isinstance(error, CtxlabError) else _dead_rank(_ranks(launched))
        for rank in _ranks(launched):
            rank.kill()
        if dead is not None and isinstance(error, Exception):
            raise RunError(f"{dead}, and the run cannot go on without it") from error
        # Lightning turns a KeyboardInterrupt into sys.exit(1).
        if isinstance(error, SystemExit) and isinstance(error.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from error
        raise
    finally:
        # Lightning's watch over the ranks would kill this process, in the middle of what comes next, because of one
        # that has served its purpose.
        _ranks(launched).clear()
        # A loader's workers let the first SIGTERM pass: those that an error has left would be waited for without end.
        for worker in multiprocessing.active_children():
            worker.kill()
        torch.set_num_threads(threads)


def _ranks(launched: lightning.Trainer) -> list[subprocess.Popen[bytes]]:
    """The processes of the other ranks that this one has started."""
    ranks: list[subprocess.Popen[bytes]] = getattr(launched.strategy.launcher, "procs", [])
    return ranks


def _dead_rank(ranks: list[subprocess.Popen[bytes]]) -> str | None:
    """Which rank has ended by itself, and how, where its end is why this one lost the connection."""
    for number, rank in enumerate(ranks, start=1):
        with suppress(subprocess.TimeoutExpired):
            code = rank.wait(timeout=1.0)
            how = f"exit code {code}" if code >= 0 else signal.Signals(-code).name
            return f"rank {number} of {len(ranks) + 1} ended with {how}"
    return None


def _validation(
    settings: TrainSettings, dataset: Dataset, precision: Precision
) -> Callable[[lightning.Trainer, Model, torch.device], dict[str, float]]:
    context, most = settings.context, settings.trainer.validate_tokens
    objective = OBJECTIVES.get(settings.objective.name)(settings.objective)
    if isinstance(dataset, PairDataset):
        return PairValidation(dataset, longest=context, max_tokens=most, precision=precision)
    if isinstance(dataset, QuestionDataset | LabelDataset):
        examples = objective.examples(dataset, "validation", context)
        return example_validation(examples, max_tokens=most, pad_id=dataset.tokenizer.pad_id, precision=precision)
    if isinstance(dataset, TaskDataset):
        return task_validation(dataset, context, max_tokens=most, precision=precision)
    if isinstance(objective, Denoising):
        return objective_validation(objective, dataset, context, max_tokens=most, precision=precision)
    return Validation(dataset, context, max_tokens=most, precision=precision)


def _every(setting: str | int, budget: Budget, in_a_run: int) -> int | None:
    if setting == "none":
        return None
    if setting == "auto":
        return max(1, budget.n_steps // in_a_run) if budget.bounded else 200
    return int(setting)


def _quieten() -> None:
    """Lightning's hints and tips are not the user's business, nor what torch.compile thinks of what it is given."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for module in ("lightning", "torch._inductor"):
        warnings.filterwarnings("ignore", module=re.escape(module))
