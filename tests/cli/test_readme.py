"""Every command of the README composes; those that take less than a minute run; both languages say the same ones."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from ctxlab.cli.main import COMMANDS
from tests.cli.lines import ctxlab

ROOT = Path(__file__).parents[2]
READMES = ("README.md", "README.zh.md")
COMPOSED = {command.name for command in COMMANDS if command.composed}
# Trainings and measurements are composed only, a study's lines are read only; everything else runs as it is written.
LONG = ("train", "profile", "plan")
STUDY = ("experiment", "run")
# What needs an extra, and data from elsewhere, is composed only, too.
ELSEWHERE = "eval=lm_eval"
ENDLESS = "dashboard"  # serves until it is interrupted: its help is enough here
SHORTER = ("eval.perplexity.max_tokens=1k", "decoding.max_new_tokens=8")
FEW = {
    "eval=needle": ("eval.needle.lengths=[128,256]", "eval.needle.depths=2", "eval.needle.items=2"),
    "eval=ruler": ("eval.ruler.items=2", "eval.ruler.tasks=[niah_single_1,vt]"),
}


def blocks(readme: str, language: str) -> list[str]:
    return re.findall(
        rf"^```{language}\n(.*?)^```", (ROOT / readme).read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
    )


def lines(readme: str) -> list[tuple[str, ...]]:
    """The words of every `ctxlab ...` line, those inside `eval "$(...)"` too, without comments, and of those in tables."""
    found = []
    for block in blocks(readme, "sh"):
        for line in block.splitlines():
            command = re.search(r"\$\((ctxlab .*?)\)", line)
            words = shlex.split(command[1] if command else line, comments=True)
            if words and words[0] == "ctxlab":
                found.append(tuple(words[1:]))
    found += [tuple(shlex.split(line)[1:]) for row in rows(readme) for line in row]
    return list(dict.fromkeys(found))


def rows(readme: str) -> list[list[str]]:
    """The `ctxlab ...` lines of every row of a table that has some."""
    text = re.sub(r"^```.*?^```", "", (ROOT / readme).read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    found = (re.findall(r"`(ctxlab [^`]*)`", row) for row in re.findall(r"^\|.*", text, re.MULTILINE))
    return [row for row in found if row]


@pytest.mark.parametrize("readme", READMES)
def test_has_the_two_lines_that_start_from_nothing(readme: str) -> None:
    """Each makes its own environment and leaves it active; CI runs both."""
    starts = [
        line for block in blocks(readme, "sh") for line in block.splitlines() if line.startswith("python3 -m venv")
    ]
    assert [line.rpartition("&& ")[2] for line in starts] == ["ctxlab train", "pytest"]
    assert all("&& . .venv/bin/activate && pip install -e " in line for line in starts)


def test_both_languages_have_the_same_commands() -> None:
    assert lines("README.md") == lines("README.zh.md")
    assert rows("README.md") == rows("README.zh.md")
    assert len(lines("README.md")) >= 10
    assert len(rows("README.md")) >= 10, "a table with a row for each part of the story"


@pytest.mark.parametrize("words", [w for w in lines("README.md") if w[0] in COMPOSED], ids=" ".join)
def test_every_composed_command_composes(words: tuple[str, ...], trained: Path) -> None:
    resumes = any(word.startswith("resume=") for word in words)
    done = ctxlab(*words, "--cfg", "job") if not resumes else ctxlab(*words[:1], "--cfg", "job", words[2])
    assert (done.code, done.err) == (0, "")


@pytest.mark.parametrize(
    "words", [w for w in lines("README.md") if w[0] not in LONG and ELSEWHERE not in w], ids=" ".join
)
def test_every_short_command_runs(words: tuple[str, ...], trained: Path) -> None:
    shorter = next((few for kind, few in FEW.items() if kind in words), None) or [
        word for word in SHORTER if word.startswith(words[0][:4]) or (words[0], word[:8]) == ("generate", "decoding")
    ]
    if words[0] == ENDLESS:
        shorter = ["--help"]
    done = ctxlab(*(("experiment", "status", *words[2:]) if words[:2] == STUDY else (*words, *shorter)))
    assert done.code == 0, done.err
    assert done.out.strip()


@pytest.mark.parametrize("readme", READMES)
def test_the_python_example_runs(readme: str, trained: Path) -> None:
    (example,) = blocks(readme, "python")
    names: dict[str, object] = {}
    exec(example.replace("max_new_tokens=40", "max_new_tokens=4"), names)
    assert names["model"].context == 64  # type: ignore[attr-defined]


@pytest.mark.parametrize("readme", READMES)
def test_every_file_that_it_points_to_is_there(readme: str) -> None:
    targets = re.findall(r"\]\((?!https?://)([^)#]+)\)", (ROOT / readme).read_text(encoding="utf-8"))
    assert targets
    assert [target for target in targets if not (ROOT / target).exists()] == []
