"""`ctxlab show`: a chart in the terminal, a picture in a file, the trained scheme of a run."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from tests.cli.lines import ctxlab


def test_draws_in_the_terminal_and_into_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = ctxlab("show", "position=alibi", "model=nano")
    assert done.code == 0, done.err
    assert "alibi: separable, relative, 4 heads (Press et al. 2022, arXiv:2108.12409)" in done.out
    assert all(f"head {head}" in done.out for head in (1, 2, 3, 4))
    assert done.out.splitlines()[-1] == "drawn into show-alibi.png"
    with Image.open("show-alibi.png") as picture:
        drawn = {colour: n for n, colour in picture.convert("RGB").getcolors(maxcolors=10**6)}
    # A line of its own colour for each head, all the way across.
    for head in ("#4c78a8", "#f58518", "#e45756", "#72b7b2"):
        red, green, blue = (int(head[n : n + 2], 16) for n in (1, 3, 5))
        assert drawn[red, green, blue] > 2000, head


def test_a_scheme_without_heads_of_its_own_is_one_curve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = ctxlab("show", "position=rope", "file=none", "distances=100")
    assert done.code == 0, done.err
    assert "head 1" not in done.out
    assert list(tmp_path.iterdir()) == []


def test_the_trained_scheme_of_a_run(trained: Path) -> None:
    done = ctxlab("show", "run=last", "file=curve.svg")
    assert done.code == 0, done.err
    assert done.out.startswith(f"rope of {trained.name}: separable")
    assert Path("curve.svg").read_text().startswith("<svg")


def test_refuses_a_file_that_is_no_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = ctxlab("show", "file=alibi.gif")
    assert (done.code, done.errors) == (2, ["file: expected a name that ends in .png or .svg, got 'alibi.gif'"])
