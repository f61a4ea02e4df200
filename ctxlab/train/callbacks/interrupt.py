"""Ctrl-C and SIGTERM end a run after the step in hand, with its state saved; a second one ends it at once."""

from __future__ import annotations

import signal
import time
from types import FrameType
from typing import Any

import lightning
import torch

from ctxlab.train.module import LanguageModel

SIGNALS = (signal.SIGINT, signal.SIGTERM)
ONE_SECOND = 1.0


class StopOnSignal(lightning.Callback):
    """Turns the first SIGINT or SIGTERM into a clean stop at the next optimizer step.

    `received` says which it was, `stopping` that all ranks have agreed to stop because of it. The signals are taken over
    when training starts, from Lightning too, which puts back at its end what was there at its start.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self.stopping = False
        self._when = 0.0

    def on_train_start(self, trainer: lightning.Trainer, module: Any) -> None:
        for number in SIGNALS:
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.received is None:
            self.received, self._when = signal.Signals(number), now
        elif now - self._when > ONE_SECOND:
            # What sends a signal to a process and to its group (`timeout` does) sends it twice and means it once.
            raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)

    def on_train_batch_end(
        self, trainer: lightning.Trainer, module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(module, LanguageModel)
        if not module.stepped:
            return
        number = int(self.received or 0)
        if trainer.world_size > 1:
            # Whichever rank a signal reached, all of them know which it was and stop at the same step.
            mine: Any = torch.tensor(float(number), device=module.device)
            number = int(trainer.strategy.reduce(mine, reduce_op="max"))
        if number:
            self.received = signal.Signals(number)
            self.stopping = trainer.should_stop = True
