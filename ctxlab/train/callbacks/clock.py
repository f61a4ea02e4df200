"""Counts the seconds of training and ends a run whose time is up."""

from __future__ import annotations

import time
from typing import Any

import lightning

from ctxlab.train.module import LanguageModel


class Clock(lightning.Callback):
    """Adds up `module.seconds` from one optimizer step to the next, so that a resumed run goes on counting.

    `pause` and `resume` leave out what is not training (validation, saving a checkpoint).
    """

    def __init__(self, max_seconds: float) -> None:
        self.max_seconds = max_seconds
        self._since = 0.0

    def on_train_start(self, trainer: lightning.Trainer, module: Any) -> None:
        self._since = time.perf_counter()
        if module.seconds >= self.max_seconds:  # a run that goes on when its time is up already
            trainer.should_stop = True

    def on_train_batch_end(
        self, trainer: lightning.Trainer, module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(module, LanguageModel)
        if not module.stepped:
            return
        self.pause(module)
        self.resume()
        over = module.seconds >= self.max_seconds
        if trainer.world_size > 1 and self.max_seconds != float("inf"):
            over = trainer.strategy.reduce_boolean_decision(over, all=False)
        if over:
            trainer.should_stop = True

    def pause(self, module: LanguageModel) -> None:
        module.seconds += time.perf_counter() - self._since

    def resume(self) -> None:
        self._since = time.perf_counter()
