"""The page on adding a scheme does what it says: its file is written outside the package and its lines are run."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from tests.cli.lines import SMALL, ctxlab

PAGE = (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)


def lines() -> list[list[str]]:
    found = [shlex.split(line, comments=True) for block in blocks("sh") for line in block.splitlines()]
    return [words[1:] for words in found if words[:1] == ["ctxlab"]]


def test_the_page_has_an_example_of_each_kind() -> None:
    assert [words[0] for words in lines()] == ["show", "train", "train"]
    assert len(blocks("python")) == 1


@pytest.fixture
def plugin(place: Path) -> Path:
    (code,) = blocks("python")
    file = place / "mine.py"
    file.write_text(code, encoding="utf-8")
    return file


def test_the_scheme_of_the_page_is_drawn(plugin: Path) -> None:
    done = ctxlab(*lines()[0])
    assert done.code == 0, done.err
    assert done.out.startswith("mine: toeplitz, relative, 4 heads (nobody yet)")


def test_the_scheme_of_the_page_trains_evaluates_and_generates(plugin: Path) -> None:
    done = ctxlab(*lines()[1], *SMALL[1:], "logger.mode=disabled")
    assert done.code == 0, done.err
    (folder,) = plugin.parent.glob("runs/nano-mine-64-*")
    record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    assert record["config"]["position"] == {"name": "mine", "rate": 0.1}
    assert [Path(path).name for path, _ in record["provenance"]["plugins"]] == ["mine.py"]
    rows = [json.loads(line) for line in (folder / "measurements.jsonl").read_text(encoding="utf-8").splitlines()]
    assert {row["context"] for row in rows if row["value"] is not None} >= {32, 64}
    done = ctxlab("generate", "--plugin", "mine.py", folder.name, "the", "decoding.max_new_tokens=4")
    assert done.code == 0, done.err


def test_a_sweep_over_it_composes(plugin: Path) -> None:
    done = ctxlab(*lines()[2], *SMALL[1:], "--cfg", "job")
    assert done.code == 0, done.err
    assert [name for name in ("mine", "alibi", "rope") if f"position={name}" in done.out] == ["mine", "alibi", "rope"]


def test_the_page_names_every_hook_and_fact_that_it_promises() -> None:
    from ctxlab.model.position.base import Position

    for name in ("embed", "query", "key", "distance_bias", "form", "relative", "bidirectional"):
        assert f"`{name}`" in PAGE
        assert name in dir(Position) or name in Position.__annotations__
