"""The LightningModule: the loss and the optimizer step, nothing else."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import lightning
import torch
from torch import Tensor

from ctxlab.data.stream import Batch, Stream
from ctxlab.data.windows import IGNORED
from ctxlab.model.base import Model
from ctxlab.model.offload import OffloadSetting, offloading
from ctxlab.model.recurrence import SegmentMemory
from ctxlab.train.budget import Budget
from ctxlab.train.objectives.prefix import prefix_lengths
from ctxlab.train.optim.base import Optimizer, rate_factor
from ctxlab.train.optim.early import EarlyUpdates, Update


class LanguageModel(lightning.LightningModule):
    """Trains a model to predict tokens, the next of a text or those of a target from its source, or to choose by a task head.

    One optimizer step sees the whole global batch: with N the scored targets of that batch over all ranks and
    micro-batches, the loss is (sum of nats) / N exactly, whatever the micro-batch and however ragged the rows
    (a mean of means is not). Optimization is manual, because the number of micro-batches changes along a length
    curriculum, and because the step count must belong to the run and not to this process.

    State that callbacks read after each micro-batch: `step` (optimizer steps done), `stepped` (whether this micro-batch
    completed one), `step_loss` and `step_nats` (of that step, a target: what is minimised, and nats, which are never
    smoothed), `gradient_norm` (before clipping), `rate`.
    """

    def __init__(
        self,
        model: Model,
        optimizer: Optimizer,
        stream: Stream,
        budget: Budget,
        *,
        smoothing: float = 0.0,
        update: Update = "step",
        offload: OffloadSetting = "none",
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.model = model
        self.optimizer = optimizer
        self.stream = stream
        self.smoothing = smoothing
        self.update = update
        self.offload = offload
        self.budget = budget
        self.step = 0
        self.seconds = 0.0  # of training, over all attempts; a callback keeps it
        self.stepped = False
        self.step_loss = 0.0
        self.step_nats = 0.0
        self.gradient_norm = 0.0
        self.rate = 0.0
        self.memories: list[SegmentMemory] = []  # of a recurrent model, one for each micro-batch of a step
        self._micro = 0
        self._early: EarlyUpdates | None = None
        self._sums: Tensor | None = None  # loss and nats of the micro-batches so far

    def configure_optimizers(self) -> torch.optim.Optimizer:
        built = self.optimizer.build(self.model)
        if self.update == "backward":
            self._early = EarlyUpdates(built)
        return built

    def on_train_end(self) -> None:
        if self._early is not None:
            self._early.end()

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        # Ranks exchange gradients once a step, with its last micro-batch (read by DDP at the start of its forward).
        wrapped: Any = self.trainer.strategy.model
        if hasattr(wrapped, "require_backward_grad_sync"):
            wrapped.require_backward_grad_sync = self._micro + 1 == self.stream.micro_batches(self.step)

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        source: Any = {} if batch.source is None else {"source": batch.source, "source_lengths": batch.source_lengths}
        prefix: Any = {"prefix": prefix_lengths(batch.targets)} if self.model.prefix else {}
        with self._kept():
            hidden = self.model.hidden(
                batch.tokens,
                lengths=batch.lengths,
                segments=batch.segments,
                memory=self._memory(batch),
                **source,
                **prefix,
            )  # (B, T, d_model)
        targets = batch.targets
        if self.model.task_head is not None:
            losses, nats = self.model.task_head.losses(hidden, targets, batch.lengths, self.smoothing)
        else:
            if batch.few_targets:
                scored = targets != IGNORED
                hidden, targets = hidden[scored].unsqueeze(0), targets[scored].unsqueeze(0)  # (1, n, d_model), (1, n)
            losses, nats = self.model.losses(hidden, targets, self.smoothing)
        del hidden  # backward frees it once the head has been there
        n_targets = max(1, batch.n_targets_in_step)  # of no targets the loss is 0
        loss = losses.sum() / n_targets
        if self._early is not None:
            self._set_rates()
        # DDP averages gradients over ranks where the sum is meant.
        self.manual_backward(loss * self.trainer.world_size)
        sums = torch.stack([loss.detach(), nats.sum() / n_targets])  # (2,)
        self._sums = sums if self._sums is None else self._sums + sums
        self._micro += 1
        self.stepped = self._micro == self.stream.micro_batches(self.step)
        if self.stepped:
            self._update()

    def _kept(self) -> AbstractContextManager[None]:
        """Where what backward needs is kept until then."""
        return offloading(self.offload, self.model.parameters())

    def _memory(self, batch: Batch) -> SegmentMemory | None:
        """What the rows of a micro-batch remember: nothing where they begin something new."""
        if batch.goes_on is None:
            return None
        if self._micro == 0:
            del self.memories[self.stream.micro_batches(self.step) :]  # of a stage with more of them
        if self._micro < len(self.memories) and len(self.memories[self._micro].held) == len(batch.tokens):
            self.memories[self._micro].keep(batch.goes_on)
        else:  # the first step of all, or of a stage with rows of another length
            del self.memories[self._micro :]
            self.memories.append(self.model.new_memory(len(batch.tokens)))
        return self.memories[self._micro]

    def _update(self) -> None:
        optimizer: Any = self.optimizers(use_pl_optimizer=False)
        if self._early is not None:
            norm = self._early.take_norm(list(self.model.parameters()))
        else:
            clip = self.optimizer.config.clip
            norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), clip if clip > 0 else float("inf"))
            self._set_rates()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        assert self._sums is not None
        total = self._sums
        if self.trainer.world_size > 1:
            total = self.trainer.strategy.reduce(total, reduce_op="sum")
        # One synchronisation a step (matters on CUDA); nothing else reads a tensor.
        self.step_loss, self.step_nats, self.gradient_norm = torch.cat([total.float(), norm.float()[None]]).tolist()
        first = optimizer.param_groups[0]
        self.rate = first["lr"] / first.get("layer_share", 1.0)
        self.step += 1
        self._micro = 0
        self._sums = None

    def _set_rates(self) -> None:
        """Learning rates of the step in hand."""
        optimizer: Any = self.optimizers(use_pl_optimizer=False)
        factor = rate_factor(self.optimizer.config, self.step, self.budget.progress(self.step, self.seconds))
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor
