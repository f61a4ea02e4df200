"""`ctxlab COMMAND --help` for the composed commands, read from the comments of conf/ alone."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ctxlab.config import catalog

if TYPE_CHECKING:
    from ctxlab.cli.main import Command

_FLAGS = (
    ("-m, --multirun", "run every combination of comma-separated values, one process a cell"),
    ("--config-dir DIR", "a folder of your own with position/mine.yaml, experiment/mine.yaml, ..."),
    ("--plugin FILE.py", "a file of your own that registers components"),
    ("--cfg job", "print the composed config (of every cell, with -m) and stop"),
    ("hydra/launcher=NAME", "with -m: joblib, submitit_slurm or ray runs the cells (each is an extra)"),
    (
        "hydra/sweeper=NAME",
        "with -m: optuna searches for the best sweep.metric, list takes lists side by side (extras)",
    ),
    ("--json", "of eval: the whole record and its results, for programs, in place of tables"),
)
_SHOWN_OPTIONS = 12
_WIDTH = 118


def command_help(command: Command, words: Sequence[str]) -> str:
    """What the command does, its groups with their options, its values with their comments, flags, an example."""
    path = catalog.conf_dir() / f"{command.name}.yaml"
    title, *examples = _first_comment(path).split(catalog.EXAMPLE)
    width = min(shutil.get_terminal_size((_WIDTH, 24)).columns, _WIDTH)
    groups = catalog.groups(config_dirs(words))
    lines = [f"{title}.", "", f"  ctxlab {command.name} {command.arguments}", ""]

    defaults = catalog.defaults(command.name)
    if defaults:
        lines.append("Groups (group=option; * is what you get without asking):")
        column = max(len(default.group) for default in defaults)
        for default in defaults:
            names = [_starred(option.name, default) for option in groups.get(default.group, [])]
            shown = ", ".join(names[:_SHOWN_OPTIONS]) + (
                f", ... ({len(names)} in all)" if len(names) > _SHOWN_OPTIONS else ""
            )
            lines += _hanging(f"  {default.group:<{column}}  ", shown, width)
            if default.comment:
                lines.append(f"{'':<{column + 4}}{default.comment}")
        lines += ["", f"  Every option with its paper: ctxlab list. Every key of one: ctxlab {command.name} --cfg job"]
        lines.append("")

    values = list(catalog.entries(path))
    column = max(len(_assignment(entry)) for entry in values)
    lines.append("Values (key=value), with their defaults:")
    for entry in values:
        lines += _hanging(f"  {_assignment(entry):<{column}}  ", entry.comment, width)
    lines += ["", "Flags:"]
    column = max(len(flag) for flag, _ in _FLAGS)
    lines += [f"  {flag:<{column}}  {what}" for flag, what in _FLAGS]
    if examples:
        lines += ["", "Examples:"]
        lines += [f"  {line}" for example in examples for line in example.split("    ")]
    return "\n".join(lines)


def config_dirs(words: Sequence[str]) -> list[Path]:
    """The folders given with --config-dir on a line that asks for help: their options are listed too."""
    found = []
    for index, word in enumerate(words):
        flag, assigned, value = word.partition("=")
        if flag in ("--config-dir", "-cd"):
            text = value if assigned else words[index + 1] if index + 1 < len(words) else ""
            if text and Path(text).is_dir():
                found.append(Path(text))
    return found


def _starred(name: str, default: catalog.Default) -> str:
    chosen = default.option.strip("[]").split(",")
    return f"{name}*" if name in (option.strip() for option in chosen) else name


def _assignment(entry: catalog.Entry) -> str:
    return f"{entry.key}={entry.value}" if entry.value else f"{entry.key}.*"


def _hanging(start: str, text: str, width: int) -> list[str]:
    if not text:
        return [start.rstrip()]
    return textwrap.wrap(text, width, initial_indent=start, subsequent_indent=" " * len(start), break_on_hyphens=False)


def _first_comment(path: Path) -> str:
    with path.open(encoding="utf-8") as file:
        return file.readline().lstrip("# ").strip()
