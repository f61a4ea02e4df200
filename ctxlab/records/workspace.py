"""A workspace and a report for Weights & Biases: the charts that the mirrored runs are made for, with their axes.

Saved through wandb-workspaces, which is the extra `workspaces` and needs an account. The names are those that
`wandb_sink` defines.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ctxlab.errors import ConfigError

TITLE = "ctxlab: what a context is worth, and what it costs"


@dataclass(frozen=True)
class Chart:
    """One metric against its axis, a line a value of `position.name`, over seeds the mean and the range."""

    section: str
    title: str
    metric: str
    axis: str
    axis_title: str
    log_y: bool = False

    @property
    def log_x(self) -> bool:
        return self.axis == "context"


CHARTS = (
    Chart("By context", "Perplexity", "eval/perplexity", "context", "context [tokens]"),
    Chart("By context", "Bits per byte", "eval/bits_per_byte", "context", "context [tokens]"),
    Chart("By context", "Nats per token", "eval/nats_per_token", "context", "context [tokens]"),
    Chart("Cost", "Memory of a step [B]", "scaling/peak_memory_bytes", "context", "context [tokens]", log_y=True),
    Chart("Cost", "Time of a step [s]", "scaling/step_seconds", "context", "context [tokens]", log_y=True),
    Chart("Cost", "Tokens a second", "scaling/tokens_per_second", "context", "context [tokens]"),
    Chart("Training", "Training loss [nats]", "train/loss", "tokens", "tokens trained on"),
    Chart("Training", "Validation loss [nats/token]", "val/nats_per_token", "tokens", "tokens trained on"),
    Chart("Position", "Loss by position [nats/token]", "position/nats_per_token", "index", "tokens seen before"),
)


def workspace(entity: str, project: str) -> Any:
    """A saved view of a project, a section a kind of chart."""
    found = _library("workspaces")
    sections = [
        found.Section(name=name, is_open=True, panels=[_plot(chart) for chart in CHARTS if chart.section == name])
        for name in dict.fromkeys(chart.section for chart in CHARTS)
    ]
    return found.Workspace(entity=entity, project=project, name=TITLE, sections=sections)


def report(entity: str, project: str) -> Any:
    """A page of the same charts, to be written on."""
    found = _library("reports.v2")
    blocks: list[Any] = []
    for name in dict.fromkeys(chart.section for chart in CHARTS):
        panels = [_plot(chart) for chart in CHARTS if chart.section == name]
        blocks += [found.H2(text=name), found.PanelGrid(runsets=[found.Runset()], panels=panels)]  # of its project
    return found.Report(entity=entity, project=project, title=TITLE, blocks=blocks)


def save(place: tuple[str, str]) -> list[str]:
    """Saves both in (entity, project) and returns their addresses. Raises ConfigError without the extra."""
    return [made.save().url for made in (workspace(*place), report(*place))]


def _plot(chart: Chart) -> Any:
    found = _library("reports.v2")
    return found.LinePlot(
        title=chart.title, x=chart.axis, y=[chart.metric], title_x=chart.axis_title, title_y=chart.title,
        log_x=chart.log_x, log_y=chart.log_y, groupby=found.Config("position.name"), groupby_aggfunc="mean",
        groupby_rangefunc="minmax",
    )  # fmt: skip


def _library(module: str) -> Any:
    import importlib

    try:
        return importlib.import_module(f"wandb_workspaces.{module}")
    except ImportError as error:
        raise ConfigError(
            "sync: --workspace needs wandb-workspaces; install it with: pip install 'ctxlab[workspaces]'"
        ) from error
