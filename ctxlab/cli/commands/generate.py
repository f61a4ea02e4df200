"""`ctxlab generate`: text that goes on from a prompt, streamed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ctxlab.errors import ConfigError, UndefinedBeyondTraining
from ctxlab.train.checkpoint import open_run
from ctxlab.train.precision import autocast, resolve_device, resolve_precision

if TYPE_CHECKING:
    from ctxlab.cli.invocation import Invocation
    from ctxlab.config.schema import GenerateConfig


def run(config: GenerateConfig, invocation: Invocation) -> int:
    """Prints the prompt and what follows it, piece by piece."""
    device = resolve_device(config.trainer.accelerator)
    precision = resolve_precision(config.trainer.precision, device)
    loaded = open_run(invocation.store.resolve(config.run), checkpoint=config.checkpoint, device=device)
    prompt = config.prompt if config.prompt_file == "none" else _read(config.prompt_file)
    out = invocation.stdout_console.file  # not through the console, which would turn tabs into spaces
    pieces = loaded.stream(prompt, config.decoding, seed=config.seed)
    shown = False
    try:
        with autocast(precision, device):
            for piece in pieces:
                out.write(piece if shown else prompt + piece)  # the prompt too only where it can be gone on from
                out.flush()
                shown = True
    except UndefinedBeyondTraining as end:
        out.write("\n" if shown else prompt + "\n")
        invocation.stderr_console.print(f"stopped: {end}", soft_wrap=True, markup=False)
        return 0
    out.write("\n" if shown else prompt + "\n")
    return 0


def _read(file: str) -> str:
    try:
        return Path(file).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"prompt_file: {file} cannot be read: {getattr(error, 'strerror', None) or error}") from error
