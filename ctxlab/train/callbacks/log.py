"""One row of metrics per logging step, into the run record and its mirrors."""

from __future__ import annotations

from typing import Any

import lightning

from ctxlab.records.sinks import Sink
from ctxlab.train.memory import peak_memory_bytes
from ctxlab.train.module import LanguageModel


class LogMetrics(lightning.Callback):
    """Writes loss, rate, gradient norm, speed and peak memory every `every` optimizer steps, and at the last."""

    def __init__(self, sink: Sink, every: int, attempt: int) -> None:
        self.sink = sink
        self.every = every
        self.attempt = attempt
        self._previous: tuple[int, float] = (0, 0.0)

    def on_train_start(self, trainer: lightning.Trainer, module: Any) -> None:
        self._previous = (module.budget.tokens_before(module.step), module.seconds)

    def on_train_batch_end(
        self, trainer: lightning.Trainer, module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(module, LanguageModel)
        if not module.stepped:
            return
        last = trainer.should_stop or module.step == module.budget.n_steps
        if module.step % self.every and not last:
            return
        tokens = module.budget.tokens_before(module.step)
        elapsed = module.seconds - self._previous[1]
        speed = (tokens - self._previous[0]) / elapsed if elapsed > 0 else 0.0
        self._previous = (tokens, module.seconds)
        self.sink.metrics(
            {
                "split": "train",
                "step": module.step,
                "tokens": tokens,
                "seconds": module.seconds,
                "attempt": self.attempt,
                "loss": module.step_loss,
                "nats_per_token": module.step_nats,
                "learning_rate": module.rate,
                "gradient_norm": module.gradient_norm,
                "tokens_per_second": speed,
                "peak_memory_bytes": peak_memory_bytes(module.device)[0],
            }
        )
