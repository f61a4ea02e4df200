"""`ctxlab show`: what a positional scheme does to a score by distance, head by head, in the terminal and as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from rich.text import Text

from ctxlab.cli.main import DONE
from ctxlab.errors import ConfigError
from ctxlab.model.config import ModelConfig
from ctxlab.model.position.base import POSITIONS, Position
from ctxlab.model.position.probe import by_distance
from ctxlab.report.plots import distance_chart, distance_figure, save

if TYPE_CHECKING:
    from ctxlab.cli.invocation import Invocation
    from ctxlab.config.schema import ShowConfig


def run(config: ShowConfig, invocation: Invocation) -> int:
    """Draws a fresh scheme, or the trained one of a run. Raises ConfigError for a file that cannot be drawn into."""
    position, whose = _scheme(config, invocation)
    name = position.config.name
    file = Path(f"show-{name}.png" if config.file == "auto" else config.file).expanduser()
    if config.file != "none" and file.suffix not in (".png", ".svg"):
        raise ConfigError(f"file: expected a name that ends in .png or .svg, got '{config.file}'")
    limit = position.n_positions
    n = config.distances if limit is None else min(config.distances, limit)
    rows = by_distance(position, n).tolist()
    curves = {f"head {head}": list(enumerate(row)) for head, row in enumerate(rows, start=1)}
    if all(row == rows[0] for row in rows):
        curves = {"every head": list(enumerate(rows[0]))}
    out = invocation.stdout_console
    heading = f"{name}{whose}: score of equal content by distance, against distance 0"
    facts = [position.form, "relative" if position.relative else "absolute", f"{len(rows)} heads"]
    out.print(Text(f"{name}{whose}: {', '.join(facts)} ({position.paper})", style="bold"))
    out.print(distance_chart(heading, curves))
    if config.file != "none":
        save(distance_figure(curves, heading=heading), file)
        out.print(Text(f"drawn into {file}"))
    return DONE


def _scheme(config: ShowConfig, invocation: Invocation) -> tuple[Position, str]:
    """The scheme, and whose it is."""
    if config.run != "none":
        from ctxlab.train.checkpoint import open_run

        run = invocation.store.resolve(config.run)
        trained = getattr(open_run(run).model, "position", None)
        if trained is None:
            raise ConfigError(f"run: {run.id} has no positional scheme that could be drawn")
        return trained, f" of {run.id}"
    assert isinstance(config.position, Position.Config)  # rules.check comes first
    assert isinstance(config.model, ModelConfig)
    torch.manual_seed(config.seed)
    position = POSITIONS.get(config.position.name)(config.position, config.model, config.context)
    position.initialize()
    return position, ""
