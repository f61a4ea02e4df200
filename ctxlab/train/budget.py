"""From a budget in tokens, steps or seconds to the stages that the data stream runs through."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ctxlab.data.stream import Stage
from ctxlab.errors import ConfigError
from ctxlab.train.settings import TrainerConfig

UNBOUNDED_STEPS = 1 << 40  # a run that only the clock ends


@dataclass(frozen=True)
class Budget:
    """The stages of a run, its limit in seconds (infinite without `max_time`), and which setting limits its steps."""

    stages: tuple[Stage, ...]
    max_seconds: float
    limit: str  # max_tokens or max_steps; max_time where neither is set

    @property
    def n_steps(self) -> int:
        return sum(stage.steps for stage in self.stages)

    @property
    def bounded(self) -> bool:
        return self.n_steps < UNBOUNDED_STEPS

    @property
    def n_tokens(self) -> int:
        return sum(stage.steps * stage.rows * stage.context for stage in self.stages)

    def tokens_before(self, step: int) -> int:
        """Training tokens (targets' slots) of the first `step` optimizer steps."""
        done = 0
        for stage in self.stages:
            steps = min(step, stage.steps)
            done += steps * stage.rows * stage.context
            step -= steps
        return done

    def progress(self, step: int, seconds: float) -> float:
        """The share of the budget that is spent: the larger of steps and seconds, what the learning rate follows."""
        return max(step / self.n_steps if self.bounded else 0.0, seconds / self.max_seconds)

    def spent(self, step: int, seconds: float) -> str | None:
        """The setting whose limit a run has reached, or None."""
        if step >= self.n_steps:
            return self.limit
        return "max_time" if seconds >= self.max_seconds else None


def rows_per_step(config: TrainerConfig, context: int, world: int) -> int:
    """Rows of `context` tokens in one optimizer step: `batch_tokens` / context, shared evenly by the ranks."""
    if context > config.batch_tokens:
        raise ConfigError(
            f"trainer.batch_tokens: {config.batch_tokens} tokens hold no window of context={context}; "
            f"the nearest valid value is {context}"
        )
    rows = config.batch_tokens // context
    if rows % world:
        raise ConfigError(
            f"trainer.devices: {world} devices cannot share {rows} rows "
            f"(batch_tokens {config.batch_tokens} / context {context}) evenly; "
            f"the nearest valid trainer.batch_tokens is {-(-rows // world) * world * context}"
        )
    return rows


def micro_rows(rows_per_rank: int, largest: int) -> int:
    """The largest divisor of a rank's rows that is at most `largest`: every micro-batch is then alike."""
    return next(n for n in range(min(rows_per_rank, max(1, largest)), 0, -1) if rows_per_rank % n == 0)


def plan_budget(config: TrainerConfig, context: int, *, world: int, fitting_rows: Callable[[int], int]) -> Budget:
    """The stages of a run. `fitting_rows(context)` says how many rows fit memory at once when micro_batch is auto.

    The whole budget in tokens is max_tokens, or max_steps steps of the final context's batch; each stage of the
    curriculum takes its share of it, the final context the rest, in whole optimizer steps.
    """

    def stage(length: int, steps: int) -> Stage:
        rows = rows_per_step(config, length, world)
        largest = fitting_rows(length) if config.micro_batch == "auto" else config.micro_batch
        return Stage(context=length, rows=rows, micro_rows=micro_rows(rows // world, largest), steps=steps)

    step_tokens = rows_per_step(config, context, world) * context
    limits = {}
    if config.max_tokens != "none":
        limits["max_tokens"] = max(1, config.max_tokens // step_tokens)
    if config.max_steps != "none":
        limits["max_steps"] = config.max_steps
    seconds = float("inf") if config.max_time == "none" else config.max_time
    if not limits:
        if config.context_schedule:
            raise ConfigError(
                "trainer.context_schedule: a length curriculum needs max_tokens or max_steps, not max_time"
            )
        return Budget((stage(context, UNBOUNDED_STEPS),), seconds, "max_time")
    limit = min(limits, key=lambda name: limits[name])
    total = limits[limit] * step_tokens
    stages, left = [], total
    for part in config.context_schedule:
        tokens = rows_per_step(config, part.context, world) * part.context
        steps = max(1, round(part.share * total / tokens))
        stages.append(stage(part.context, steps))
        left -= steps * tokens
    stages.append(stage(context, max(1, left // step_tokens)))
    return Budget(tuple(stages), seconds, limit)
