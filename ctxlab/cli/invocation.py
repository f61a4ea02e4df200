"""How a command was called: what it needs beyond its typed config."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ctxlab.cli import console

if TYPE_CHECKING:
    from rich.console import Console

    from ctxlab.config.plugins import Plugin
    from ctxlab.records.store import RunStore


@dataclass(frozen=True)
class Invocation:
    """One call of a command. `line` does the same again; `is_child` means a cell of a sweep, whose parent reports; `as_json`
    asks for the record in place of a screen."""

    command: str
    line: str
    runs: Path
    overrides: tuple[str, ...] = ()
    plugins: tuple[Plugin, ...] = ()
    is_child: bool = False
    as_json: bool = False

    @functools.cached_property
    def store(self) -> RunStore:
        from ctxlab.records.store import RunStore

        return RunStore(self.runs)

    @property
    def stdout_console(self) -> Console:
        return console.stdout()

    @property
    def stderr_console(self) -> Console:
        return console.stderr()
