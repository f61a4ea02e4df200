"""Studies written by hand."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ctxlab.study.readme import Study

COMMANDS = ("train", "eval", "profile", "show", "runs", "experiment")


def make_study(
    root: Path, run: str = "ctxlab train", findings: str = "", *, name: str = "mine", above: str = "",
    files: Mapping[str, str] | None = None,
) -> Study:  # fmt: skip
    """experiments/NAME below `root`, with the lines under *Run*, the findings, and further files."""
    folder = root / "experiments" / name
    folder.mkdir(parents=True, exist_ok=True)
    text = f"# Does it?\n\n{above}\n\n## Run\n\n```sh\n{run}\n```\n\nTakes a second.\n\n## Findings\n\n{findings}\n"
    (folder / "README.md").write_text(text, encoding="utf-8")
    for path, content in (files or {}).items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(content, encoding="utf-8")
    return Study(folder)
