"""A loss that is no number ends a run, before anything of it is saved."""

from __future__ import annotations

import math
from typing import Any

import lightning

from ctxlab.errors import RunError
from ctxlab.train.module import LanguageModel


class RequireFinite(lightning.Callback):
    """Raises RunError, with what to try, at the first step whose loss or gradient is no finite number.

    Both are the same on every rank, so all ranks end at the same step.
    """

    def on_train_batch_end(
        self, trainer: lightning.Trainer, module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(module, LanguageModel)
        if not module.stepped or (math.isfinite(module.step_nats) and math.isfinite(module.gradient_norm)):
            return
        loss = not math.isfinite(module.step_nats)
        what, value = ("loss", module.step_nats) if loss else ("gradient's norm", module.gradient_norm)
        raise RunError(
            f"the {what} became {value} at step {module.step}: try a lower optim.learning_rate "
            f"(now {module.optimizer.config.learning_rate:g}), a longer optim.warmup_steps, or trainer.precision=fp32"
        )
