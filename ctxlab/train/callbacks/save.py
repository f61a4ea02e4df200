"""Validates and saves a run as it goes: the last checkpoint and the best one are kept."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning
import torch

from ctxlab.model.base import Model
from ctxlab.model.recurrence import joined, state_of
from ctxlab.records.sinks import Sink
from ctxlab.train.callbacks.clock import Clock
from ctxlab.train.callbacks.interrupt import StopOnSignal
from ctxlab.train.checkpoint import Checkpoint, find_checkpoint, point, prune, remember, save_checkpoint
from ctxlab.train.module import LanguageModel


class ValidateAndSave(lightning.Callback):
    """Every `validate_every` steps scores the validation split; every `save_every` steps, and at the end, saves.

    A validation is followed by a checkpoint when it is the best so far. Checkpoints are taken between optimizer steps,
    where the whole state is weights, optimizer, random generators, the memory of a recurrent model, and one integer for
    the data. A run that a signal stops is saved without a validation that it would not have had: it can go on as if
    nothing had happened.
    """

    def __init__(
        self,
        *,
        folder: Path,
        sink: Sink,
        clock: Clock,
        interrupt: StopOnSignal,
        validate: Callable[[lightning.Trainer, Model, torch.device], dict[str, float]],
        validate_every: int | None,
        save_every: int | None,
        attempt: int,
        micro_rows: dict[int, int],
        saved: Checkpoint | None,
        base: str = "",
        average: int = 0,
    ) -> None:
        """`saved` is the checkpoint that the run goes on from, `base` the sha256 of the weights that adapters belong to,
        `average` how many of the last checkpoints stay to be averaged."""
        self.base, self.average = base, average
        self.due = False  # whether a checkpoint is, so that one that is saved as the best counts as one of the last too
        self.folder = folder
        self.sink = sink
        self.clock = clock
        self.interrupt = interrupt
        self.validate = validate
        self.validate_every = validate_every
        self.save_every = save_every
        self.attempt = attempt
        self.micro_rows = micro_rows
        self.best = _loss_of_best(folder) if saved else math.inf
        self.latest: float | None = None
        self.saved_step = saved.step if saved else 0
        self.validated_step = saved.step if saved and saved.validation_loss is not None else 0

    def on_train_batch_end(
        self, trainer: lightning.Trainer, module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(module, LanguageModel)
        if not module.stepped or trainer.should_stop or module.step == module.budget.n_steps:
            return  # behind the last step comes on_train_end
        validate = self.validate_every is not None and module.step % self.validate_every == 0
        save = self.save_every is not None and module.step % self.save_every == 0
        if not (validate or save):
            return
        self.clock.pause(module)
        self.due = save
        if validate:
            self._validate(trainer, module)
        if save and self.saved_step != module.step:
            self._save(trainer, module)
        self.clock.resume()

    def on_train_end(self, trainer: lightning.Trainer, module: Any) -> None:
        # Where a signal ends it a checkpoint is taken that a whole run would not have had: none to be averaged.
        periodic = self.save_every is not None and module.step % self.save_every == 0
        self.due = periodic or not self.interrupt.stopping
        if not self.interrupt.stopping and self.validate_every is not None and self.validated_step != module.step:
            self._validate(trainer, module)
        if self.saved_step != module.step:
            self._save(trainer, module)
        if trainer.is_global_zero and self.folder.exists():
            prune(self.folder)

    def _validate(self, trainer: lightning.Trainer, module: LanguageModel) -> None:
        numbers = self.validate(trainer, module.model, module.device)
        self.validated_step = module.step
        self.latest = numbers["nats_per_token"]
        self.sink.metrics(
            {
                "split": "validation",
                "step": module.step,
                "tokens": module.budget.tokens_before(module.step),
                "seconds": module.seconds,
                "attempt": self.attempt,
                **numbers,
            }
        )
        if self.latest <= self.best:  # equal: the best itself, on the second way through a part that a crash took back
            self.best = self.latest
            self._save(trainer, module, best=True)

    def _save(self, trainer: lightning.Trainer, module: LanguageModel, best: bool = False) -> None:
        generators: Any = {"cpu": torch.get_rng_state()}
        if module.device.type == "cuda":
            generators["cuda"] = torch.cuda.get_rng_state(module.device)
        own: Any = {"generators": generators, "memory": state_of(module.memories) if module.memories else None}
        ranks = [own]
        if trainer.world_size > 1:
            ranks = [None] * trainer.world_size
            torch.distributed.all_gather_object(ranks, own)
        if trainer.is_global_zero:
            optimizer: Any = module.optimizers(use_pl_optimizer=False)
            checkpoint = save_checkpoint(
                self.folder,
                model=module.model,
                training={
                    "optimizer": optimizer.state_dict(),
                    "generators": [rank["generators"] for rank in ranks],
                    "memory": joined([rank["memory"] for rank in ranks]) if module.memories else None,
                    "micro_rows": self.micro_rows,
                },
                step=module.step,
                tokens=module.budget.tokens_before(module.step),
                seconds=module.seconds,
                validation_loss=self.latest if self.validated_step == module.step else None,
                base=self.base,
            )
            if self.average and self.due:
                remember(self.folder, checkpoint, self.average)
            # `best` first: a run that dies between the two goes on from an older `last` and finds this one named.
            if best:
                point(self.folder, "best", checkpoint)
            point(self.folder, "last", checkpoint)
            prune(self.folder)
        trainer.strategy.barrier()
        self.saved_step = module.step


def _loss_of_best(folder: Path) -> float:
    """The validation loss of the best checkpoint there is, infinite without one."""
    if not (folder / "best").exists():
        return math.inf
    loss = find_checkpoint(folder, "best").validation_loss
    return math.inf if loss is None else loss
