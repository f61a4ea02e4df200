"""The dispatcher: help without anything heavy, exit codes, one line an error."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from ctxlab import __version__
from ctxlab.cli import main as cli
from ctxlab.cli.main import COMMANDS, main
from ctxlab.config import catalog
from ctxlab.errors import DataError, RunError

BUG = "(a bug in ctxlab; CTXLAB_TRACEBACK=1 shows where)"
COMPOSED = [command.name for command in COMMANDS if command.composed]


def ctxlab(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "ctxlab", *words],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        check=False,
    )


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"ctxlab {__version__}\n"


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"], ["help"]])
def test_help_names_every_command(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 0
    out = capsys.readouterr().out
    assert all(f"ctxlab {command.name}" in out for command in COMMANDS)


@pytest.mark.parametrize("command", COMPOSED)
def test_help_of_a_composed_command(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Every group with every option, every value of the YAML with its default."""
    assert main([command, "--help"]) == 0
    out = capsys.readouterr().out
    groups = catalog.groups()
    for default in catalog.defaults(command):
        assert re.search(rf"^  {default.group}\s", out, re.MULTILINE)
        assert all(option.name in out for option in groups[default.group][:12])
    for entry in catalog.entries(catalog.conf_dir() / f"{command}.yaml"):
        assert f"  {entry.key}={entry.value}" in out or f"  {entry.key}.*" in out


@pytest.mark.parametrize(
    "words",
    [
        ("--help",),
        ("--version",),
        *((command, "--help") for command in COMPOSED),
        ("runs", "--help"),
        ("list",),
        ("_complete", "train", "po"),
        ("_complete", "train", "position=al"),
        ("completion", "bash"),
    ],
)
def test_help_and_completion_import_nothing_heavy(words: tuple[str, ...]) -> None:
    code = (
        "import sys; from ctxlab.cli.main import main; main(sys.argv[1:]);"
        "heavy = {'torch', 'wandb', 'hydra', 'omegaconf', 'lightning', 'numpy', 'yaml', 'altair'};"
        "print(sorted(heavy & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trian"], "error: ctxlab has no command 'trian'; did you mean 'train'?"),
        (["list", "position"], ""),
        (["list", "positons"], "error: list: there is no kind 'positons'; did you mean 'positions'?"),
        (["completion", "fish"], "error: completion: expected bash or zsh, got 'fish'"),
        (["completion"], "error: completion: expected bash or zsh, got ''"),
        (["doctor", "now"], "error: doctor: takes no arguments, got 'now'"),
        (["_run"], "error: _run: expected the folder of a run"),
        (
            ["generate", "-m", "run=a,b"],
            "error: -m: ctxlab generate makes no record, so there is nothing to sweep over",
        ),
    ],
)
def test_refusals_are_one_line_and_exit_2(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    code = main(words)
    captured = capsys.readouterr()
    if not message:
        assert code == 0
        return
    assert (code, captured.out, captured.err.strip()) == (2, "", message)


def raising(error: BaseException):
    def dispatch(words: list[str]) -> int:
        raise error

    return dispatch


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (DataError("data.path: no such file"), 2, "error: data.path: no such file"),
        (RunError("the loss became nan"), 1, "error: the loss became nan"),
        (KeyboardInterrupt(), 130, "error: interrupted"),
        (PermissionError(13, "Permission denied", "/runs"), 2, "error: /runs: Permission denied"),
        (OSError(28, "No space left on device", "/runs/x"), 1, "error: /runs/x: No space left on device"),
        (ZeroDivisionError("division by zero"), 1, "error: ZeroDivisionError: division by zero " + BUG),
    ],
)  # fmt: skip
def test_exceptions_become_exit_codes(
    error: BaseException, code: int, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "_dispatch", raising(error))
    monkeypatch.delenv("CTXLAB_TRACEBACK", raising=False)
    assert main([]) == code
    assert capsys.readouterr().err.strip() == message


def test_traceback_on_request(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(cli, "_dispatch", raising(ZeroDivisionError("x")))
    monkeypatch.setenv("CTXLAB_TRACEBACK", "1")
    assert main([]) == 1
    assert "Traceback (most recent call last)" in capsys.readouterr().err


def test_closed_pipe_is_no_error() -> None:
    done = subprocess.run(
        f"{sys.executable} -m ctxlab list | head -1", shell=True, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_output_is_plain_when_piped() -> None:
    assert "\x1b" not in ctxlab("list").stdout
    assert "\x1b" not in ctxlab("trian", NO_COLOR="1").stderr
