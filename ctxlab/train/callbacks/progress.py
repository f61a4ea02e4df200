"""The line that moves while a run trains: loss, tokens a second, time left, peak memory."""

from __future__ import annotations

import math
import time
from typing import Any

import lightning
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from ctxlab.train.memory import peak_memory_bytes
from ctxlab.train.module import LanguageModel
from ctxlab.units import format_bytes, format_count, format_seconds

_WIDE = 100  # columns from which there is room for a bar of some length
_PLAIN_EVERY = 10.0  # seconds between lines where there is no terminal


class ShowProgress(lightning.Callback):
    """A bar on a terminal; elsewhere a plain line after the first step and then every ten seconds."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._bar: Progress | None = None
        self._task: Any = None
        self._started = 0.0
        self._begun = 0.0  # share of the budget that earlier attempts have spent
        self._tokens = 0  # that they have seen
        self._spoke = -math.inf
        self._smooth: float | None = None

    def on_train_start(self, trainer: lightning.Trainer, module: Any) -> None:
        self._started = time.perf_counter()
        self._begun = module.budget.progress(module.step, module.seconds)
        self._tokens = module.budget.tokens_before(module.step)
        if self.console.is_terminal:
            self._bar = Progress(
                BarColumn(bar_width=20 if self.console.width >= _WIDE else 8), TextColumn("{task.description}"),
                console=self.console, refresh_per_second=4, transient=True,
            )  # fmt: skip
            self._task = self._bar.add_task(f"step {module.step + 1}", total=1.0)
            self._bar.start()

    def on_train_batch_end(
        self, trainer: lightning.Trainer, module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(module, LanguageModel)
        if not module.stepped:
            return
        loss = module.step_nats
        self._smooth = loss if self._smooth is None else 0.9 * self._smooth + 0.1 * loss
        now = time.perf_counter()
        if self._bar is None and now - self._spoke < _PLAIN_EVERY:
            return
        if self._bar is not None and now - self._spoke < 0.1:
            return
        self._spoke = now
        done = module.budget.progress(module.step, module.seconds)
        if self._bar is not None:
            self._bar.update(self._task, completed=min(done, 1.0), description=self._text(module, done))
        else:
            self.console.print(f"training {100 * done:3.0f}%  {self._text(module, done)}", highlight=False)

    def _text(self, module: LanguageModel, done: float) -> str:
        elapsed = time.perf_counter() - self._started
        left = elapsed * (1 - done) / (done - self._begun) if done > self._begun else math.inf
        tokens = module.budget.tokens_before(module.step) - self._tokens
        of = f"/{module.budget.n_steps}" if module.budget.bounded else ""
        return (
            f"step {module.step}{of}  loss {self._smooth:.3f}  {format_count(tokens / elapsed)} tokens/s  "
            f"{format_seconds(left)} left  {format_bytes(peak_memory_bytes(module.device)[0])} peak"
        )

    def on_exception(self, trainer: lightning.Trainer, module: Any, exception: BaseException) -> None:
        self._close()

    def teardown(self, trainer: lightning.Trainer, module: Any, stage: str) -> None:
        self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
