"""`ctxlab`: finds the command, turns errors into one line and an exit code. Nothing heavy is imported to print help."""

from __future__ import annotations

import errno
import importlib
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from types import FrameType

from ctxlab.errors import CtxlabError

DONE, DIED, REFUSED, INTERRUPTED, TERMINATED = 0, 1, 2, 130, 143


@dataclass(frozen=True)
class Command:
    """One word after `ctxlab`. `composed` commands take Hydra's overrides, the others flags."""

    name: str
    arguments: str
    summary: str
    composed: bool = False


COMMANDS = (
    Command("train", "[group=option] [key=value] [-m]", "train, validate, evaluate at many lengths", composed=True),
    Command("eval", "RUN [key=value]", "evaluate one or more runs again, side by side", composed=True),
    Command("generate", 'RUN "PROMPT" [key=value]', "stream text from a trained run", composed=True),
    Command("attention", 'RUN "TEXT" [key=value]', "what every head of a run attends to in a text", composed=True),
    Command("profile", "[group=option] [key=value]", "memory and time of a training step by context", composed=True),
    Command(
        "plan",
        "[plan.memory=16GiB] [key=value]",
        "predict a step's memory, the longest context that fits",
        composed=True,
    ),
    Command("show", "[position=NAME] [key=value]", "draw a positional scheme by distance, head by head", composed=True),
    Command("runs", "[FILTER...]", "list, show, compare, tag and remove run records"),
    Command(
        "report", "[RUN|SWEEP|EXPERIMENT ...] [-o FILE]", "runs as one page of figures and tables; --figures: SVG, PNG"
    ),
    Command("dashboard", "[DIR] [--port N] [--open]", "the same page in the browser, live while runs train"),
    Command("experiment", "list|run|status|report NAME", "studies: a question, the lines that answer it, its findings"),
    Command("sync", "[RUN...]", "upload the Weights & Biases mirrors of offline runs"),
    Command("list", "[KIND]", "what can be composed, one line each, with its paper"),
    Command("doctor", "", "what this machine offers"),
    Command("completion", "bash|zsh", 'shell completion: eval "$(ctxlab completion bash)"'),
)
# Called by ctxlab itself and by the shell: module and function below ctxlab.cli.commands.
_HIDDEN = {
    "_run": ("run_cell", "run"), "_complete": ("completion", "answer"), "_check": ("experiment", "check"),
    "_need": ("need", "run"),
}  # fmt: skip
_EXAMPLES = (
    ("ctxlab train", "a small decoder on a real book corpus, minutes on 2 cores"),
    ("ctxlab train model=tiny context=512 position=alibi", ""),
    ("ctxlab train -m position=rope,alibi,nope context=256,512", "a sweep: one process a cell"),
    ('ctxlab generate last "To be"', "go on from a prompt with the newest run"),
    ("ctxlab runs", "what has been run"),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command line and returns its exit code: 0 done, 2 refused, 1 died, 130 interrupted, 143 terminated."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        return _dispatch(words)
    except CtxlabError as error:
        _say(str(error))
        return error.exit_code
    except KeyboardInterrupt:
        _say("interrupted")
        return INTERRUPTED
    except BrokenPipeError:
        # Whoever read our output has closed it (`| head`): nothing is wrong, and nobody is left to tell.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE
    except OSError as error:
        if _wants_traceback():
            traceback.print_exc()
        _say(explain_os(error))
        return DIED if error.errno == errno.ENOSPC else REFUSED
    except Exception as error:
        if _wants_traceback():
            traceback.print_exc()
        _say(f"{type(error).__name__}: {error} (a bug in ctxlab; CTXLAB_TRACEBACK=1 shows where)")
        return DIED


def terminate(number: int, frame: FrameType | None) -> None:
    """SIGTERM as an exception, so that a run in hand is closed properly on the way out."""
    raise SystemExit(TERMINATED)


def _dispatch(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        print(_help())
        return DONE
    name, *rest = words
    if name in ("--version", "-V"):
        from ctxlab import __version__

        print(f"ctxlab {__version__}")
        return DONE
    if name in _HIDDEN:
        module, function = _HIDDEN[name]
        return int(getattr(importlib.import_module(f"ctxlab.cli.commands.{module}"), function)(rest))
    command = next((c for c in COMMANDS if c.name == name), None)
    if command is None:
        from ctxlab.registry import nearest

        raise _Refused(f"ctxlab has no command '{name}'{nearest(name, [c.name for c in COMMANDS])}")
    if not command.composed:
        try:
            return int(importlib.import_module(f"ctxlab.cli.commands.{name}").run(rest))
        except SystemExit as stop:  # argparse has printed its help
            return int(stop.code or DONE)
    if _asks_for_help(rest):
        from ctxlab.cli.help import command_help

        print(command_help(command, rest))
        return DONE
    from ctxlab.cli.start import start

    previous = signal.signal(signal.SIGTERM, terminate)
    try:
        return start(name, rest)
    finally:
        signal.signal(signal.SIGTERM, previous)


class _Refused(CtxlabError):
    exit_code = REFUSED


def _asks_for_help(words: list[str]) -> bool:
    before_text = words[: words.index("--")] if "--" in words else words
    return any(word in ("-h", "--help") for word in before_text)


def _help() -> str:
    width = max(len(command.name) for command in COMMANDS)
    lines = [
        "ctxlab: compose a Transformer; see how well it models text at every length, and what every length costs.",
        "",
    ]
    lines += [f"  ctxlab {command.name:<{width}}  {command.summary}" for command in COMMANDS]
    lines += ["", "Each command has its own --help. ctxlab --version prints the version.", ""]
    example_width = max(len(line) for line, _ in _EXAMPLES)
    lines += [f"  {line:<{example_width}}  {what}".rstrip() for line, what in _EXAMPLES]
    return "\n".join(lines)


def _wants_traceback() -> bool:
    return os.environ.get("CTXLAB_TRACEBACK", "") not in ("", "0")


def explain_os(error: OSError) -> str:
    """One line for what the system refused: which file, and why."""
    where = f"{error.filename}: " if error.filename else ""
    return f"{where}{error.strerror or error}"


def _say(message: str) -> None:
    from ctxlab.cli import console

    console.error(message)


if __name__ == "__main__":
    sys.exit(main())
