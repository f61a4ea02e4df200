"""One small training for all tests of the command line: each gets a copy of its folder."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.cli.lines import SMALL, alone, ctxlab, write_text


@pytest.fixture(scope="session")
def trained_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a text, its tokens in a cache, and runs/ with one run: `nano-rope-64-XXXX`."""
    folder = tmp_path_factory.mktemp("trained")
    write_text(folder / "plays.txt")
    with pytest.MonkeyPatch.context() as patch:
        alone(patch, folder)
        done = ctxlab("train", *SMALL)
    assert done.code == 0, done.err
    return folder


@pytest.fixture
def place(trained_once: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of that folder, as the place where the test types its lines."""
    folder = tmp_path / "place"
    shutil.copytree(trained_once, folder, symlinks=True)
    alone(monkeypatch, folder)
    return folder


@pytest.fixture
def trained(place: Path) -> Path:
    """The folder of the one run in `place`."""
    (run,) = (path.parent for path in place.glob("runs/*/run.json"))
    return run
