"""Where rows go: the run's own files always, Weights & Biases as a mirror of them."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

from pydantic import Field

from ctxlab.errors import ConfigError
from ctxlab.fields import OrAuto, OrNone
from ctxlab.records.run import Run
from ctxlab.records.schema import Measurement
from ctxlab.records.wandb_sink import WandbSink, require_key
from ctxlab.registry import ComponentConfig, nearest

Mode = Literal["offline", "online", "disabled"]

# What WANDB_MODE may say: the last two are its older words.
_MODES: dict[str, Mode] = {
    "offline": "offline", "online": "online", "disabled": "disabled", "dryrun": "offline", "run": "online",
}  # fmt: skip
_LOG = logging.getLogger("ctxlab")


class LoggerConfig(ComponentConfig):
    """The mirror of the record in Weights & Biases. What the line does not say, the WANDB_* variables do."""

    name: Literal["wandb"] = "wandb"
    mode: OrAuto | Mode = Field(default="auto", description="auto: WANDB_MODE, else offline")
    project: str = Field(default="auto", min_length=1, description="auto: WANDB_PROJECT, else ctxlab")
    entity: OrNone | OrAuto | str = Field(default="auto", description="auto: WANDB_ENTITY, else the account's own")


class Sink(Protocol):
    """Takes the rows of a run as they come."""

    def metrics(self, row: dict[str, Any]) -> None: ...
    def measure(self, measurements: Sequence[Measurement]) -> None: ...
    def image(self, name: str, path: Path) -> None: ...
    def finish(self, exit_code: int) -> None: ...


class NullSink:
    """Takes everything and keeps nothing: a disabled mirror, the other ranks of a distributed run."""

    def metrics(self, row: dict[str, Any]) -> None: ...
    def measure(self, measurements: Sequence[Measurement]) -> None: ...
    def image(self, name: str, path: Path) -> None: ...
    def finish(self, exit_code: int) -> None: ...


class RunSink:
    """The run's own files first, then the mirror."""

    def __init__(self, run: Run, mirror: Sink) -> None:
        self.run = run
        self.mirror = mirror

    def metrics(self, row: dict[str, Any]) -> None:
        self.run.log(row)
        self.mirror.metrics(row)

    def measure(self, measurements: Sequence[Measurement]) -> None:
        self.run.measure(*measurements)
        self.mirror.measure(measurements)

    def image(self, name: str, path: Path) -> None:
        self.mirror.image(name, path)

    def finish(self, exit_code: int) -> None:
        self.run.close()
        self.mirror.finish(exit_code)


def resolve_mode(config: LoggerConfig) -> Mode:
    """online, offline or disabled: the line's word, else WANDB_MODE, else offline. Raises ConfigError for another."""
    if config.mode != "auto":
        return config.mode
    said = os.environ.get("WANDB_MODE") or "offline"
    if said.lower() not in _MODES:
        raise ConfigError(f"WANDB_MODE: there is no mode '{said}'{nearest(said, ('offline', 'online', 'disabled'))}")
    return _MODES[said.lower()]


def check_mirror(config: LoggerConfig) -> None:
    """Raises ConfigError where `open_mirror` would refuse without asking a server: a wrong mode, online without a key."""
    if resolve_mode(config) == "online":
        import wandb

        wandb.setup(settings=wandb.Settings(silent=True))
        require_key(wandb)


def open_mirror(
    run: Run,
    config: LoggerConfig,
    *,
    group: str | None = None,
    job_type: str,
    warn: Callable[[str], None] = _LOG.warning,
) -> Sink:
    """The W&B run of a record, or nothing when it is disabled.

    Raises ConfigError when online is asked for and there is no key, or it is refused. `warn` is told, once, that the
    mirror cannot start, has gone offline or has broken: none of these ends a run.
    """
    mode = resolve_mode(config)
    if mode == "disabled":
        return NullSink()
    project = (os.environ.get("WANDB_PROJECT") or "ctxlab") if config.project == "auto" else config.project
    entity = os.environ.get("WANDB_ENTITY") or None if config.entity == "auto" else config.entity
    try:
        return WandbSink(
            run,
            mode=mode,
            project=project,
            entity=None if entity == "none" else entity,
            group=group,
            job_type=job_type,
            warn=warn,
        )
    except ConfigError:
        raise
    except Exception as error:  # wandb's own, or of its helper process: a dozen types, each the same to a run
        reason = str(error).partition("\n")[0]
        warn(f"W&B cannot start ({type(error).__name__}: {reason}); the run goes on without a mirror")
        return NullSink()
