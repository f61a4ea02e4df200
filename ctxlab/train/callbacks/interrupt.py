"""Ctrl-C and SIGTERM end a run after the step in hand, with its state saved; a second one ends it at once."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any

import lightning

from ctxlab.train.module import LanguageModel


class StopOnSignal(lightning.Callback):
    """Turns the first SIGINT or SIGTERM into a clean stop at the next optimizer step. `received` says which it was."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def on_train_start(self, trainer: lightning.Trainer, module: Any) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number)
        # From now on the signal does what it did before: a second Ctrl-C does not wait for the step.
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)

    def on_train_batch_end(
        self, trainer: lightning.Trainer, module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(module, LanguageModel)
        if not module.stepped:
            return
        stop = self.received is not None
        if trainer.world_size > 1:
            stop = trainer.strategy.reduce_boolean_decision(stop, all=False)
        if stop:
            trainer.should_stop = True

    def teardown(self, trainer: lightning.Trainer, module: Any, stage: str) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()
