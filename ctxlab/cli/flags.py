"""Commands of flags: one parser for all, whose mistakes read like everybody else's, and the flag that they share."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from ctxlab.errors import ConfigError


class FlagParser(argparse.ArgumentParser):
    """Says what is wrong in one line, like every other command."""

    def __init__(self, name: str, text: str, epilog: str | None = None) -> None:
        super().__init__(
            prog=name, description=text, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        self.add_argument("--runs", metavar="DIR", help="folder of the run records (CTXLAB_RUNS, else runs)")

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{self.prog}: {message}")

    def read(self, argv: Sequence[str]) -> argparse.Namespace:
        return self.parse_intermixed_args(argv)


def runs_folder(given: argparse.Namespace) -> Path:
    """The folder of the run records that a line is about."""
    return Path(given.runs or os.environ.get("CTXLAB_RUNS") or "runs").expanduser()
