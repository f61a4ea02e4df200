"""Which valid parts do not go together: every rule across components, in one place."""

from __future__ import annotations

from ctxlab.config.schema import CommandConfig, ProfileConfig, TrainConfig
from ctxlab.errors import IncompatibleError
from ctxlab.model.position.base import POSITIONS
from ctxlab.units import format_length


def check(config: CommandConfig) -> None:
    """Raises IncompatibleError, one line, for the first rule that a config breaks."""
    if isinstance(config, TrainConfig | ProfileConfig):
        POSITIONS.get(config.position.name).check(config.position, config.model)
    if isinstance(config, TrainConfig):
        _budget(config)
        _curriculum(config)
        _lengths(config)


def _budget(config: TrainConfig) -> None:
    trainer = config.trainer
    if config.context > trainer.batch_tokens:
        raise IncompatibleError(
            f"trainer.batch_tokens: {trainer.batch_tokens} tokens hold no window of context={config.context}; "
            f"set trainer.batch_tokens to {config.context} or more"
        )
    rows = trainer.batch_tokens // config.context
    if trainer.devices > rows or rows % trainer.devices:
        raise IncompatibleError(
            f"trainer.devices: {trainer.devices} processes cannot share the {rows} windows of a step evenly "
            f"(batch_tokens {trainer.batch_tokens} / context {config.context})"
        )
    only_time = trainer.max_tokens == trainer.max_steps == "none"
    if only_time and config.optim.schedule == "cosine":
        raise IncompatibleError(
            "trainer.max_time: a cosine needs to know its last step; use optim.schedule=wsd or constant, "
            "or give trainer.max_tokens too"
        )


def _curriculum(config: TrainConfig) -> None:
    for index, stage in enumerate(config.trainer.context_schedule):
        if stage.context > config.context:
            raise IncompatibleError(
                f"trainer.context_schedule.{index}.context: {format_length(stage.context)} is longer than "
                f"context={format_length(config.context)}, which the schedule ends at"
            )


def _lengths(config: TrainConfig) -> None:
    perplexity = config.eval.perplexity
    if perplexity == "none" or perplexity.lengths == "auto" or perplexity.segment == "auto":
        return
    longest = max(perplexity.lengths)
    if longest > perplexity.segment:
        raise IncompatibleError(
            f"eval.perplexity.lengths: {longest} is longer than eval.perplexity.segment={perplexity.segment}"
        )
