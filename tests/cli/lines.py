"""Command lines run in this process, and what is left of them."""

from __future__ import annotations

import io
import os
import random
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import pytest

from ctxlab.cli import console
from ctxlab.cli.main import main

# A training that takes a second: the smallest model, three steps, little text.
SMALL = (
    "model=nano", "context=64", "trainer.max_steps=3", "trainer.validate_tokens=256", "profile.contexts=none",
    "eval.perplexity.max_tokens=1k", "data=text", "data.path=plays.txt", "tokenizer=byte",
)  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """What a line printed and how it ended."""

    code: int
    out: str
    err: str

    @property
    def errors(self) -> list[str]:
        """The lines of its error message, without `error:`."""
        said = self.err.splitlines()
        first = next((n for n, line in enumerate(said) if line.startswith("error: ")), len(said))
        return [line.removeprefix("error: ").strip() for line in said[first:]]


def ctxlab(*words: str) -> Outcome:
    """`ctxlab WORDS...` in this process, which is left as it was."""
    console.stdout.cache_clear()
    console.stderr.cache_clear()
    argv, environment = sys.argv[:], dict(os.environ)
    out, err = io.StringIO(), io.StringIO()
    try:
        with redirect_stdout(out), redirect_stderr(err):
            code = main(words)
    finally:
        sys.argv[:] = argv
        os.environ.clear()
        os.environ.update(environment)
    return Outcome(code, out.getvalue(), err.getvalue())


def write_text(path: Path, paragraphs: int = 240, seed: int = 0) -> None:
    """Paragraphs of words drawn at random, in one file: enough to be cut into splits whose parts have 200 bytes."""
    draw = random.Random(seed)
    words = ("the", "of", "and", "to", "in", "that", "we", "you", "is", "not", "with", "as", "for", "be", "it", "this")
    text = "\n\n".join(
        "\n".join(" ".join(draw.choices(words, k=9)) for _ in range(draw.randint(5, 9))) for _ in range(paragraphs)
    )
    path.write_text(text + "\n", encoding="utf-8")


def alone(patch: pytest.MonkeyPatch, folder: Path) -> None:
    """No settings, runs, caches or keys of the user's: all of it is in `folder`, where the lines are typed."""
    for name in list(os.environ):
        if name.startswith(("WANDB", "CTXLAB")) or name in ("NETRC", "LOCAL_RANK"):
            patch.delenv(name)
    (folder / "home").mkdir(exist_ok=True)
    patch.setenv("HOME", str(folder / "home"))
    for name in ("XDG_CONFIG_HOME", "XDG_CACHE_HOME", "XDG_DATA_HOME"):
        patch.delenv(name, raising=False)
    patch.setenv("CTXLAB_CACHE", str(folder / "cache"))
    patch.setenv("OMP_NUM_THREADS", "1")
    patch.chdir(folder)
