"""Completion: the words, and the scripts driven by real shells."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ctxlab.cli.commands.completion import complete
from ctxlab.cli.main import COMMANDS


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "runs"
    for name in ("nano-rope-256-k3f9", "nano-alibi-256-a2b3", ".trash/thrown-away-aaaa"):
        (folder / name).mkdir(parents=True)
        (folder / name / "run.json").write_text("{}")
    monkeypatch.setenv("CTXLAB_RUNS", str(folder))
    return folder


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["tr"], ["train"]),
        (["--v"], ["--version"]),
        (["sync", "nano-a"], ["nano-alibi-256-a2b3"]),
        (["train", "posi"], ["position.", "position="]),
        (["train", "conte"], ["context="]),
        (["train", "position=al"], ["position=alibi"]),
        (["train", "position=rope,al"], ["position=rope,alibi"]),
        (["train", "optim=m"], ["optim=muon"]),
        (["train", "data=task/m"], ["data=task/mqar"]),
        (["train", "data=text,task/re"], ["data=text,task/repeat", "data=text,task/reverse"]),
        (["train", "data.pai"], ["data.pairs="]),
        (["train", "eval.task.de"], ["eval.task.depths="]),
        (["train", "optim.sched"], ["optim.schedule="]),
        (["train", "optim.schedule="], [f"optim.schedule={name}" for name in ("constant", "cosine", "noam", "wsd")]),
        (["train", "trainer.compile=t"], ["trainer.compile=true"]),
        (["train", "eval.perplexity.l"], ["eval.perplexity.lengths="]),
        (["train", "--mu"], ["--multirun"]),
        (["train", "swee"], ["sweep."]),
        (["train", "run="], []),
        (["train", "init=nano-r"], ["init=nano-rope-256-k3f9"]),
        (["eval", "nano-"], ["nano-alibi-256-a2b3", "nano-rope-256-k3f9"]),
        (["eval", "run=nano-a"], ["run=nano-alibi-256-a2b3"]),
        (["generate", "la"], ["last"]),
        (["list", "pos"], ["positions"]),
        (["completion", "z"], ["zsh"]),
        (["experiment", ""], ["list", "run", "status", "report"]),
        (["experiment", "run", "over"], ["overhead"]),
        (["experiment", "status", "pos"], ["position_cost"]),
        (["experiment", "list", ""], []),
        (["experiment", "run", "overhead", ""], []),
        (["runs", "sh"], ["show"]),
        (["runs", "show", "nano-r"], ["nano-rope-256-k3f9"]),
        (["runs", "re"], ["restore"]),
        (["runs", "restore", ""], ["thrown-away-aaaa"]),
        (["nonsense", "x"], []),
    ],
)
def test_words(words: list[str], expected: list[str], runs: Path) -> None:
    assert complete(words) == expected


def test_every_command_is_offered() -> None:
    assert {command.name for command in COMMANDS} <= set(complete([""]))


def test_own_options_are_offered(tmp_path: Path) -> None:
    (tmp_path / "position").mkdir()
    (tmp_path / "position" / "zebra.yaml").write_text("# Mine\nname: zebra\n")
    assert complete(["train", "--config-dir", str(tmp_path), "position=z"]) == ["position=zebra"]


@pytest.fixture
def path_with_ctxlab(tmp_path: Path) -> dict[str, str]:
    """An environment in which `ctxlab` is this package, whether it is installed or not."""
    script = tmp_path / "bin" / "ctxlab"
    script.parent.mkdir()
    script.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m ctxlab "$@"\n')
    script.chmod(0o755)
    root = str(Path(__file__).parents[2])
    return {**os.environ, "PATH": f"{script.parent}:{os.environ['PATH']}", "PYTHONPATH": root}


def bash_completes(line: str, environment: dict[str, str]) -> list[str]:
    """What a bash offers for `line`: it evaluates the script, then its own completion function runs on COMP_*."""
    program = f"""
        eval "$(ctxlab completion bash)"
        COMP_LINE={line!r}; COMP_POINT=${{#COMP_LINE}}
        complete -p ctxlab | grep -q -- '-F _ctxlab_complete' || exit 3
        _ctxlab_complete
        printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    done = subprocess.run(["bash", "-i", "-c", program], capture_output=True, text=True, env=environment, check=True)
    return done.stdout.split()


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash here")
@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("ctxlab tr", ["train"]),
        # Readline has split the word at `=`: only what follows it is replaced.
        ("ctxlab train position=al", ["alibi"]),
        ("ctxlab train context=512 optim.sche", ["optim.schedule="]),
        ("ctxlab train optim.schedule=w", ["wsd"]),
        ("ctxlab list pos", ["positions"]),
    ],
)
def test_bash(line: str, expected: list[str], path_with_ctxlab: dict[str, str]) -> None:
    assert bash_completes(line, path_with_ctxlab) == expected


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash here")
def test_bash_after_a_space_offers_everything(path_with_ctxlab: dict[str, str]) -> None:
    offered = bash_completes("ctxlab train ", path_with_ctxlab)
    assert {"position=", "model=", "context=", "sweep."} <= set(offered)


@pytest.mark.skipif(shutil.which("zsh") is None, reason="no zsh here")
@pytest.mark.parametrize(("words", "expected"), [("tr", ["train"]), ("train position=al", ["position=alibi"])])
def test_zsh(words: str, expected: list[str], path_with_ctxlab: dict[str, str]) -> None:
    """zsh's compadd only works inside its line editor: here it is replaced by one that prints."""
    program = f"""
        compdef() {{ : }}; _default() {{ : }}
        compadd() {{ while [[ $1 == -* ]]; do [[ $1 == -S ]] && shift; shift; done; print -l -- "$@" }}
        eval "$(ctxlab completion zsh)"
        words=(ctxlab {words}); CURRENT=${{#words}}
        _ctxlab_complete
    """
    done = subprocess.run(
        ["zsh", "-f", "-c", program], capture_output=True, text=True, env=path_with_ctxlab, check=True
    )
    assert done.stdout.split() == expected
