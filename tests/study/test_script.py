"""What a study's script leans on: runs by its words, the folder of its figures, means over seeds, its end."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from ctxlab.errors import ConfigError
from ctxlab.study.script import cache_of, given_runs, mean, results_folder, run_script
from tests.records.builders import make_run


def test_runs_are_those_of_the_folder_of_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CTXLAB_RUNS", str(tmp_path))
    made = make_run(tmp_path, stem="a", config={"paths": {"cache": "~/cache"}})
    made.finish("done")
    (found,) = given_runs(["a"])
    assert found.id == made.id
    assert cache_of(found) == Path.home() / "cache"
    auto = make_run(tmp_path)
    assert cache_of(auto) is None
    auto.finish("done")
    with pytest.raises(ConfigError, match="expected ids of runs"):
        given_runs([])


def test_figures_go_where_the_study_is_run_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CTXLAB_RESULTS", raising=False)
    assert results_folder("mine").resolve() == tmp_path / "experiments/mine/results"
    monkeypatch.setenv("CTXLAB_RESULTS", str(tmp_path / "elsewhere"))
    assert results_folder("mine") == tmp_path / "elsewhere"
    assert (tmp_path / "elsewhere").is_dir()


def test_a_mean_has_the_interval_of_student() -> None:
    half = 4.302653 / 3**0.5  # t(0.975, 2) times the deviation 1 over the root of three
    assert mean([1.0, 2.0, 3.0], "x") == pytest.approx({"x": 2.0, "x_low": 2 - half, "x_high": 2 + half}, abs=1e-6)
    assert mean([4.0], "x") == {"x": 4.0, "x_low": None, "x_high": None}


def test_an_end_is_one_line_and_its_code(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def main(words: Sequence[str]) -> None:
        raise ConfigError(f"run: there is no {words[0]}")

    monkeypatch.setattr(sys, "argv", ["script.py", "mine"])
    with pytest.raises(SystemExit) as end:
        run_script(main)
    assert end.value.code == 2
    assert capsys.readouterr().err == "error: run: there is no mine\n"
