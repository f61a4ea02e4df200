"""`ctxlab generate`: text that goes on from a prompt, streamed, or from each line of a file."""

from __future__ import annotations

from pathlib import Path
from typing import IO, TYPE_CHECKING

from ctxlab.errors import ConfigError, UndefinedBeyondTraining
from ctxlab.train.checkpoint import open_run
from ctxlab.train.precision import autocast, precision_of_runs, resolve_device

if TYPE_CHECKING:
    from ctxlab.cli.invocation import Invocation
    from ctxlab.config.schema import GenerateConfig
    from ctxlab.train.checkpoint import LoadedRun

_BATCHES = 8  # lines of a file that are sorted by length together


def run(config: GenerateConfig, invocation: Invocation) -> int:
    """Prints the prompt and what follows it, or its translation, piece by piece."""
    device = resolve_device(config.trainer.accelerator)
    loaded = open_run(invocation.store.resolve(config.run), checkpoint=config.checkpoint, device=device)
    precision = precision_of_runs(config.trainer.precision, device, [loaded.run.record.provenance.precision])
    out = invocation.stdout_console.file  # not through the console, which would turn tabs into spaces
    if config.prompts_file != "none":
        with autocast(precision, device):
            ended = _each(loaded, config, out)
        if ended:
            invocation.stderr_console.print(f"stopped: {ended}", soft_wrap=True, markup=False)
        return 0
    prompt = config.prompt if config.prompt_file == "none" else _read("prompt_file", config.prompt_file)
    pieces = loaded.stream(prompt, config.decoding, seed=config.seed)
    begun = "" if loaded.translates else prompt
    shown = False
    try:
        with autocast(precision, device):
            for piece in pieces:
                out.write(piece if shown else begun + piece)  # the prompt too only where it can be gone on from
                out.flush()
                shown = True
    except UndefinedBeyondTraining as end:
        out.write("\n" if shown else begun + "\n")
        invocation.stderr_console.print(f"stopped: {end}", soft_wrap=True, markup=False)
        return 0
    out.write("\n" if shown else begun + "\n")
    return 0


def _each(loaded: LoadedRun, config: GenerateConfig, out: IO[str]) -> str:
    """One line for each line of the file, in order, a few batches at a time; a line's end in it is written `\\n`.

    Returns which of them ended with the model's positions; nothing where none did.
    """
    text = _read("prompts_file", config.prompts_file)
    prompts = text.removesuffix("\n").split("\n") if text else []
    many = config.batch * _BATCHES
    short: list[int] = []  # numbers of lines
    for first in range(0, len(prompts), many):
        some = prompts[first : first + many]
        ended: list[int] = []
        texts = loaded.texts(some, config.decoding, seed=config.seed + first, batch=config.batch, short=ended.append)
        for text in texts:
            out.write(text.replace("\n", "\\n") + "\n")
        out.flush()
        short += [first + place + 1 for place in ended]
    if not short:
        return ""
    lines = f"line {short[0]}" if len(short) == 1 else f"{len(short)} of {len(prompts)} lines, line {min(short)} first,"
    return f"{lines} where the model's {loaded.model.n_positions} positions end"


def _read(key: str, file: str) -> str:
    try:
        return Path(file).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{key}: {file} cannot be read: {getattr(error, 'strerror', None) or error}") from error
