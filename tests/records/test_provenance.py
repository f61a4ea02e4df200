"""What a record says of code and machine, found without importing what it speaks of."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pydantic
import pytest

import ctxlab
from ctxlab.records import provenance
from ctxlab.records.provenance import collect, git_commit, processor

AMD = """processor\t: 0
model name\t: AMD EPYC 9B14
flags\t\t: fpu sse2 avx2 avx512f avx512_bf16 sha_ni

processor\t: 1
model name\t: AMD EPYC 9B14
flags\t\t: fpu sse2 avx2 avx512f avx512_bf16 sha_ni
"""
GRAVITON = "processor\t: 0\nBogoMIPS\t: 2100.00\nFeatures\t: fp asimd sve i8mm bf16\nCPU part\t: 0xd4f\n"


def test_versions_are_those_that_python_would_import() -> None:
    found = collect(seed=3, precision="bf16")
    assert (found.ctxlab, found.libraries["pydantic"]) == (ctxlab.__version__, pydantic.VERSION)
    assert (found.seed, found.precision) == (3, "bf16")
    assert found.python == ".".join(map(str, sys.version_info[:3]))


def test_it_imports_nothing_heavy() -> None:
    code = (
        "import sys; from ctxlab.records.provenance import collect; collect()\n"
        "print({'torch', 'wandb', 'lightning', 'numpy'} & set(sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


@pytest.mark.parametrize(
    ("text", "facts"),
    [
        (AMD, {"processor": "AMD EPYC 9B14", "flags": ["avx512_bf16", "avx512f", "avx2"]}),
        (GRAVITON, {"flags": ["bf16", "i8mm", "sve", "asimd"]}),
        ("", {"flags": []}),
    ],
)
def test_the_processor_and_what_makes_it_fast(text: str, facts: dict[str, object]) -> None:
    assert processor(text) == facts


@pytest.mark.parametrize(("said", "threads"), [("4", 4), ("2,1", 2), ("", None), ("many", None), ("0", None)])
def test_threads_are_those_of_the_environment(said: str, threads: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", said)
    assert collect().threads == threads


def test_an_unknown_fact_is_refused() -> None:
    with pytest.raises(pydantic.ValidationError, match="colour"):
        collect(colour="red")


def test_the_commit_is_that_of_the_checkout_and_says_when_files_differ(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "package"
    package.mkdir()
    (package / "code.py").write_text("one")
    assert git_commit(package) is None

    def git(*words: str) -> str:
        who = ["-c", "user.name=a", "-c", "user.email=a@b"]
        return subprocess.run(
            ["git", "-C", str(tmp_path), *who, *words], capture_output=True, text=True, check=True
        ).stdout.strip()

    git("init", "-q")
    assert git_commit(package) is None  # nothing is committed yet
    git("add", ".")
    git("commit", "-q", "-m", "one")
    head = git("rev-parse", "HEAD")
    monkeypatch.setenv("GIT_DIR", "/nowhere")  # as inside another repository's hook
    assert git_commit(package) == head[:12]
    (package / "notes.txt").write_text("untracked files are nobody's business")
    assert git_commit(package) == head[:12]
    (package / "code.py").write_text("two")
    assert git_commit(package) == f"{head[:12]}+dirty"


def test_no_git_is_no_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".git").mkdir()
    monkeypatch.setattr(provenance, "_git", lambda *_: None)
    assert git_commit(tmp_path / "package") is None
