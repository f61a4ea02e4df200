"""`eval=lm_eval` from its line: offline tasks into a table and a record, and what is refused before anything is written."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from ctxlab.records.run import Run
from tests.cli.lines import SMALL, ctxlab
from tests.evaluation.harness_tasks import write_choices, write_texts

LM_EVAL = ("eval=lm_eval", "eval.lm_eval.include_path=tasks", "logger.mode=disabled")


@pytest.fixture
def tasks(place: Path) -> Path:
    folder = place / "tasks"
    folder.mkdir()
    write_choices(folder)
    write_texts(folder)
    return folder


def test_without_the_library_one_line_says_what_to_install(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)  # importing it fails as if it were not there
    for name in [name for name in sys.modules if name.startswith("lm_eval.")]:
        monkeypatch.delitem(sys.modules, name)
    before = sorted(trained.parent.iterdir())
    for command in (("eval", "last"), ("train", *SMALL), ("eval", "-m", "run=last", "seed=1,2")):
        done = ctxlab(*command, "eval=[perplexity,lm_eval]", "eval.lm_eval.tasks=[arc_easy]", "logger.mode=disabled")
        assert done.code == 2
        assert done.errors[0].startswith("eval.lm_eval: needs lm-eval; pip install 'ctxlab[lm-eval]'")
        assert len(done.errors) == 1
    assert sorted(trained.parent.iterdir()) == before


def test_tasks_have_to_be_named(trained: Path) -> None:
    done = ctxlab("eval", "last", "eval=lm_eval")
    assert (done.code, done.errors) == (2, ["eval.lm_eval.tasks: a value is needed here"])
    done = ctxlab("eval", "last", "eval=lm_eval", "eval.lm_eval.tasks=[]")
    assert (done.code, done.errors) == (2, ["eval.lm_eval.tasks: expected at least one value, got []"])


def test_a_run_is_scored_by_tasks(trained: Path, tasks: Path) -> None:
    pytest.importorskip("lm_eval")
    done = ctxlab("eval", "last", *LM_EVAL, "eval.lm_eval.tasks=[choices,texts]")
    assert done.code == 0, done.err
    (record,) = (Run(path) for path in trained.parent.iterdir() if path.name.startswith("eval-"))
    assert (record.record.status, record.record.parent) == ("done", trained.name)
    rows = {f"{m.axes['harness']} {m.axes['metric']}": m for m in record.measurements()}
    assert list(rows) == [
        "choices acc", "choices acc_norm", "texts word_perplexity", "texts byte_perplexity", "texts bits_per_byte",
    ]  # fmt: skip
    assert {m.facts["max_length"] for m in rows.values()} == {64}
    table = [line.split() for line in done.out.splitlines()]
    assert ["choices", "acc", "5", "0"] in [words[:4] for words in table]
    assert f"{rows['texts bits_per_byte'].value:.3f}" in done.out


def test_runs_are_scored_side_by_side_and_a_training_too(trained: Path, tasks: Path) -> None:
    pytest.importorskip("lm_eval")
    words = ("eval=[perplexity,lm_eval]", "eval.lm_eval.tasks=[choices]", "eval.lm_eval.include_path=tasks")
    done = ctxlab("train", *SMALL, *words, "logger.mode=disabled")
    assert done.code == 0, done.err
    assert "choices" in done.out
    assert "context  trained" in done.out
    (other,) = (path.name for path in trained.parent.iterdir() if path.name != trained.name and path.is_dir())
    done = ctxlab("eval", f"run=[{trained.name},{other}]", *LM_EVAL, "eval.lm_eval.tasks=[choices]")
    assert done.code == 0, done.err
    head = next(line.split() for line in done.out.splitlines() if line.startswith("task"))
    assert head == ["task", "metric", "items", "shots", trained.name, other]


def test_a_task_without_data_leaves_the_others_their_results(trained: Path, tasks: Path) -> None:
    pytest.importorskip("lm_eval")
    (tasks / "texts.json").unlink()
    done = ctxlab("eval", "last", *LM_EVAL, "eval.lm_eval.tasks=[texts,choices]")
    assert done.code == 0, done.err
    assert "Traceback" not in done.out + done.err
    assert "texts: its data are not on this machine and could not be fetched (" in done.out
    assert any(line.split()[:2] == ["choices", "acc"] for line in done.out.splitlines())
