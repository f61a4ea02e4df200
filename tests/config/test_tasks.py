"""What a task means for other groups, unless a line or an experiment says otherwise; what is asked of a run on one."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest

from ctxlab.config.overrides import split
from ctxlab.config.prepare import Cell, prepare
from ctxlab.records.run import Run
from ctxlab.records.store import RunStore


@pytest.fixture(autouse=True)
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the runs; the lines are typed beside it."""
    monkeypatch.delenv("CTXLAB_RUNS", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "runs"


def cells(*words: str) -> list[Cell]:
    command, *rest = words
    return list(prepare(split(command, rest)).cells)


def chosen(cell: Cell) -> tuple[str, str, list[str]]:
    """Data, tokenizer and evaluations of a cell."""
    asked = [name for name, settings in cell.config["eval"].items() if settings != "none"]
    return cell.config["data"]["name"], cell.config["tokenizer"]["name"], asked


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ((), ("shakespeare", "unigram", ["perplexity", "ngram"])),
        (("data=stdlib",), ("stdlib", "unigram", ["perplexity", "ngram"])),
        (("data=task/mqar",), ("task/mqar", "ids", ["task"])),
        (("data=task/needle",), ("task/needle", "unigram", ["task"])),
        (("data=task/needle", "tokenizer=byte"), ("task/needle", "byte", ["task"])),
        (("data=task/needle", "eval=[task,needle]"), ("task/needle", "unigram", ["task", "needle"])),
        (("data=task/mqar", "eval=none"), ("task/mqar", "ids", [])),
        (("tokenizer=ids", "eval=task", "data=task/copy"), ("task/copy", "ids", ["task"])),
        (("data=task/mqar", "data=stdlib"), ("stdlib", "unigram", ["perplexity", "ngram"])),
    ],
)
def test_data_brings_its_tokenizer_and_its_evaluation(words: tuple[str, ...], expected: Any) -> None:
    (cell,) = cells("train", *words)
    assert chosen(cell) == expected
    assert cell.skipped == ""


def test_what_the_line_says_stays_even_where_it_cannot_be() -> None:
    (cell,) = cells("train", "data=task/mqar", "tokenizer=unigram", "eval=[task]")
    assert chosen(cell) == ("task/mqar", "unigram", ["task"])
    assert cell.skipped == "tokenizer: data=task/mqar goes with ids, not with unigram"


def test_the_recorded_line_composes_the_same() -> None:
    (cell,) = cells("train", "data=task/induction", "model=nano", "context=64", "eval.task.items=3")
    (again,) = cells(*shlex.split(cell.line)[1:])
    assert again.config == cell.config


def experiment(folder: Path, text: str) -> tuple[str, ...]:
    path = folder / "conf" / "experiment" / "mine.yaml"
    path.parent.mkdir(parents=True)
    path.write_text(f"# @package _global_\n{text}")
    return "train", "--config-dir", str(folder / "conf"), "experiment=mine"


@pytest.mark.parametrize(
    ("said", "line", "expected"),
    [
        ("  - override /data: task/copy\n", (), ("task/copy", "ids", ["task"])),
        ("  - override /data: task/copy\n  - override /eval: none\n", (), ("task/copy", "ids", [])),
        ("  - override /data: task/copy\n", ("data=stdlib",), ("stdlib", "unigram", ["perplexity", "ngram"])),
        ("  - override /data: stdlib\n", ("data=task/copy",), ("task/copy", "ids", ["task"])),
        ("  - override /data: task/needle\n  - override /tokenizer: byte\n", (), ("task/needle", "byte", ["task"])),
    ],
)
def test_an_experiment_brings_them_too(said: str, line: tuple[str, ...], expected: Any, tmp_path: Path) -> None:
    (cell,) = cells(*experiment(tmp_path, f"defaults:\n{said}context: 64\n"), *line)
    assert chosen(cell) == expected
    assert cell.config["context"] == 64


def test_every_cell_of_a_sweep_has_its_own(tmp_path: Path) -> None:
    found = [chosen(cell) for cell in cells("train", "-m", "data=task/copy,stdlib,task/needle", "seed=1,2")]
    assert found[::2] == found[1::2] == [
        ("task/copy", "ids", ["task"]), ("stdlib", "unigram", ["perplexity", "ngram"]), ("task/needle", "unigram", ["task"]),
    ]  # fmt: skip
    params = "hydra:\n  mode: MULTIRUN\n  sweeper:\n    params:\n      data: task/copy,task/reverse\n"
    swept = [chosen(cell) for cell in cells(*experiment(tmp_path, params))]
    assert swept == [("task/copy", "ids", ["task"]), ("task/reverse", "ids", ["task"])]


# What is asked of recorded runs


def recorded(root: Path, stem: str, *words: str) -> Run:
    (cell,) = cells("train", "model=nano", *words)
    run = RunStore(root).create("train", stem, config=cell.config, line=cell.line)
    run.finish("done")
    run.checkpoints.mkdir()
    (run.checkpoints / "last").touch()
    return run


def asked(*words: str) -> list[str]:
    (cell,) = cells("eval", *words)
    return [name for name, settings in cell.config["eval"].items() if settings != "none"]


def test_a_run_on_a_task_is_asked_that_and_one_on_text_its_perplexity(runs: Path) -> None:
    task, text = recorded(runs, "task", "data=task/mqar"), recorded(runs, "text")
    other = recorded(runs, "other", "data=task/needle")
    as_ever = asked(f"run={text.id}")
    assert as_ever == ["perplexity", "ngram"]
    assert asked("last") == ["task"]
    assert asked(f"run={task.id}") == asked(f"run=[{task.id},{other.id}]") == ["task"]
    assert asked(f"run={other.id}", "eval=needle") == ["needle"]
    assert asked(f"run=[{task.id},{text.id}]") == as_ever, "which have no task in common"
    assert asked(f"run={text.id}", "data=task/needle") == ["task"], "the data says it"


def test_the_settings_of_the_task_evaluation_can_be_given_without_its_name(runs: Path) -> None:
    recorded(runs, "task", "data=task/mqar")
    (cell,) = cells("eval", "last", "eval.task.lengths=[32,1k]")
    assert cell.config["eval"]["task"]["lengths"] == [32, 1024]
