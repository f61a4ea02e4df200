"""From a line to its cells: lines that do the same again, runs by every kind of selector, one cut of the test text."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest

from ctxlab.config.overrides import split
from ctxlab.config.prepare import Prepared, prepare, prepare_resume
from ctxlab.errors import ConfigError, CtxlabError, RecordError
from ctxlab.records.run import Run
from ctxlab.records.store import RunStore


def prepared(*words: str) -> Prepared:
    command, *rest = words
    return prepare(split(command, rest))


def segments(*words: str) -> list[Any]:
    return [cell.typed.eval.perplexity.segment for cell in prepared("train", "model=nano", "-m", *words).cells]


def with_weights(root: Path, context: int, **changes: Any) -> Run:
    """A recorded run of the given context with a file where its weights would be."""
    (cell,) = prepared("train", "model=nano", f"context={context}", "position=alibi").cells
    run = RunStore(root).create("train", f"nano-{context}", config=cell.config, line=cell.line, **changes)
    run.finish("done")
    run.checkpoints.mkdir()
    (run.checkpoints / "last").touch()
    return run


@pytest.fixture(autouse=True)
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the runs; the lines are typed beside it."""
    monkeypatch.delenv("CTXLAB_RUNS", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "runs"


# One cut of the test text for all cells of a sweep


def test_cells_of_different_contexts_share_the_segments_of_the_longest_length() -> None:
    sweep = prepared("train", "model=nano", "-m", "context=64,256", "position=rope,alibi")
    assert [cell.typed.eval.perplexity.segment for cell in sweep.cells] == [2048] * 4
    assert [cell.config["eval"]["perplexity"]["segment"] for cell in sweep.cells] == [2048] * 4
    assert [cell.config["eval"]["perplexity"]["lengths"] for cell in sweep.cells] == ["auto"] * 4


def test_the_line_of_a_cell_brings_its_segments_along() -> None:
    for cell in prepared("train", "model=nano", "-m", "context=64,256").cells:
        command, *words = shlex.split(cell.line)[1:]
        (again,) = prepare(split(command, words)).cells
        assert again.config == cell.config


def test_lengths_that_are_given_count_as_they_are() -> None:
    assert segments("eval.perplexity.lengths=[64,128],[1k]") == [1024, 1024]
    assert segments("context=64,128", "eval.perplexity.lengths=[256,512]") == ["auto", "auto"]


def test_cells_that_are_scored_at_the_same_lengths_stay_as_they_are() -> None:
    assert segments("position=rope,alibi", "seed=1,2") == ["auto"] * 4


def test_a_segment_that_is_given_stays() -> None:
    assert segments("context=64,128", "eval.perplexity.segment=4k") == [4096, 4096]
    assert segments("context=64,128", "eval.perplexity.segment=auto,512") == [1024, 512, 1024, 512]


def test_a_cell_that_is_skipped_or_not_evaluated_does_not_count() -> None:
    sweep = prepared("train", "model=nano", "-m", "context=64,8k")
    assert sweep.cells[1].skipped.startswith("trainer.batch_tokens: 4096 tokens hold no window of context=8192")
    assert sweep.cells[0].typed.eval.perplexity.segment == "auto"
    mixed = prepared("train", "model=nano", "-m", "context=64,128", "eval=perplexity,none").cells
    assert [getattr(cell.typed.eval.perplexity, "segment", "none") for cell in mixed] == [1024, "none", 1024, "none"]


def test_evaluations_of_runs_of_different_contexts_share_their_segments(runs: Path) -> None:
    short, long = with_weights(runs, 64), with_weights(runs, 128)
    sweep = prepared("eval", "-m", f"run={short.id},{long.id}")
    assert [cell.typed.eval.perplexity.segment for cell in sweep.cells] == [1024, 1024]
    alone = prepared("eval", "-m", f"run={short.id}", "seed=1,2")
    assert [cell.typed.eval.perplexity.segment for cell in alone.cells] == ["auto", "auto"]


def test_a_single_run_chooses_its_own_segments() -> None:
    (cell,) = prepared("train", "model=nano").cells
    assert cell.typed.eval.perplexity.segment == "auto"


# Lines that do the same again


@pytest.mark.parametrize(
    "words",
    [
        ("model=nano", "position=alibi", "context=2k", "trainer.max_tokens=5M"),
        ("note=it's, a=b ${5} # ~x",),
        ('note="quoted" and \\ backslash', "name=Über alles"),
        ("data=text", "data.path=my texts/pièces, #1 (a=b).txt", "data.field=Textkörper, roh"),
        ("tags=[long,'a b']", "optim.betas=[0.8,0.9]"),
        ("trainer.context_schedule=[{context:128,share:0.5}]",),
        ("experiment=quickstart_long", "seed=3"),
        ("experiment=extrapolation", "hydra.mode=RUN"),
    ],
)
def test_the_recorded_line_gives_the_same_config(words: tuple[str, ...]) -> None:
    (cell,) = prepared("train", *words).cells
    command, *again = shlex.split(cell.line)[1:]
    (same,) = prepare(split(command, again)).cells
    assert (same.config, same.line) == (cell.config, cell.line)


def test_a_cell_of_an_experiment_that_sweeps_is_one_run_by_its_line() -> None:
    sweep = prepared("train", "experiment=extrapolation", "position=rope,alibi", "-m", "note=a, b")
    assert sweep.is_sweep
    for cell in sweep.cells:
        command, *words = shlex.split(cell.line)[1:]
        again = prepare(split(command, words))
        assert not again.is_sweep
        assert again.cells[0].config == cell.config


def test_free_text_reaches_every_cell() -> None:
    sweep = prepared("train", "model=nano", "-m", "seed=1,2", "note=1,2 ${x}")
    assert [cell.config["note"] for cell in sweep.cells] == ["1,2 ${x}"] * 2


# Which run is meant


def test_every_selector_finds_its_run(runs: Path, tmp_path: Path) -> None:
    first, second = with_weights(runs, 64), with_weights(runs, 128)
    second.update(started="2999-01-01T00:00:00.000+00:00")
    for selector, found in (
        (first.id, first), ("nano-64", first), (f"runs/{first.id}", first), (str(first.path.resolve()), first),
        ("last", second),
    ):  # fmt: skip
        for words in (
            ("eval", f"run={selector}"),
            ("eval", selector),
            ("generate", selector),
            ("eval", "-m", f"run={selector}"),
        ):
            (cell,) = prepared(*words).cells
            run = cell.typed.run
            assert (run if isinstance(run, str) else run[0]) == found.id
            assert f"run={found.id}" in shlex.split(cell.line)
    (both,) = prepared("eval", f"run=[nano-64,{second.id}]", "checkpoint=best").cells
    assert (both.typed.run, both.typed.checkpoint) == ((first.id, second.id), "best")
    assert f"run=[{first.id},{second.id}]" in shlex.split(both.line)


def test_a_run_in_another_folder_keeps_its_path(runs: Path, tmp_path: Path) -> None:
    far = with_weights(tmp_path / "other runs", 64)
    (cell,) = prepared("generate", f"run={far.path}").cells
    assert cell.typed.run == str(far.path.resolve())
    assert RunStore(runs).resolve(cell.typed.run).id == far.id
    (cell,) = prepared("train", f"init={far.path}").cells
    assert (cell.typed.init, cell.typed.position.name) == (str(far.path.resolve()), "alibi")


def test_the_parts_of_a_run_are_inherited_and_the_line_wins(runs: Path) -> None:
    run = with_weights(runs, 64)
    (cell,) = prepared("train", f"init={run.id}", "context=128").cells
    assert (cell.typed.model.name, cell.typed.position.name, cell.typed.context) == ("nano", "alibi", 128)
    (cell,) = prepared("train", f"init={run.id}", "position=rope").cells
    assert cell.typed.position.name == "rope"


def test_a_run_that_goes_on_is_described_by_its_record(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = with_weights(runs, 64)
    run.update(status="interrupted")
    monkeypatch.setattr("ctxlab.config.prepare._refuse_spent", lambda run, config: None)
    cell = prepare_resume(split("train", [f"resume={run.id}", "trainer.max_steps=9", "note=it's, more"]), runs)
    assert (cell.typed.context, cell.typed.trainer.max_steps, cell.typed.note) == (64, 9, "it's, more")
    command, *words = shlex.split(cell.line)[1:]
    (again,) = prepare(split(command, words)).cells
    assert again.config == {**cell.config, "resume": "none"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("train", "init=nowhere"), r"^init: there is no run 'nowhere'"),
        (("train", "init=[a,b]"), r"^init: expected one run, got '\[a,b\]'"),
        (("generate", "run="), r"^run: expected a run id, a unique prefix of one, a path or last, got nothing"),
        (("eval", "run=[a,b]"), r"^run: there is no run 'a' in runs.*\nrun: there is no run 'b' in runs"),
        (("eval", "run=waits"), r"^run: waits-\w{4} \(ctxlab train, waiting\) has no weights$"),
        (
            ("train", "-m", "init=waits,x"),
            r"^init: waits-\w{4} .* \(cell 0\)\ninit: there is no run 'x' .* \(cell 1\)$",
        ),
        (("eval", "-m", "run=waits,x"), r"^run: waits-\w{4} .* \(cell 0\)\nrun: there is no run 'x' .* \(cell 1\)$"),
    ],
)
def test_runs_that_cannot_be_used(runs: Path, words: tuple[str, ...], message: str) -> None:
    RunStore(runs).create("train", "waits", config={}, line="", status="waiting")
    with pytest.raises(CtxlabError, match=message) as caught:
        prepared(*words)
    assert isinstance(caught.value, ConfigError | RecordError)
