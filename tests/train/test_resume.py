"""A run that dies and goes on in another process is the run that never died, to the last bit."""

from __future__ import annotations

import functools
import json
import signal
from pathlib import Path

import pytest

from ctxlab.cli.commands import train as train_command
from ctxlab.data.tokens import read_split
from ctxlab.data.windows import Windows
from ctxlab.records.store import Run
from tests.train.builders import (
    CONTEXT,
    command,
    computed,
    ended,
    last_files,
    line,
    raw_rows,
    started,
    the_run,
    the_run_soon,
    wait_for_step,
)

STEPS = 20
LINE = (
    f"trainer.max_steps={STEPS}", "trainer.micro_batch=4", "trainer.checkpoint_every=3", "trainer.validate_every=7",
    "model.dropout=0.1", "data.workers=2",
)  # fmt: skip


def run_steps(run: Run) -> int:
    return int(run.record.config["trainer"]["max_steps"])


def assert_same_run(run: Run, whole: Run) -> None:
    assert computed(run.metrics()) == computed(whole.metrics())
    assert [row["step"] for row in run.metrics() if row["split"] == "train"] == list(range(1, run_steps(run) + 1))
    for name in ("weights.safetensors", "training.pt"):
        assert (last_files(run) / name).read_bytes() == (last_files(whole) / name).read_bytes(), name
    for pointer in ("last", "best"):
        assert (run.checkpoints / pointer).read_text() == (whole.checkpoints / pointer).read_text()


@pytest.fixture(scope="module", params=["adamw", "muon"])
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, tuple[str, ...]]:
    """A folder with a run that nothing disturbed, and its line."""
    folder = tmp_path_factory.mktemp(request.param)
    words = (*LINE, f"optim={request.param}")
    assert command(folder, *line(folder, *words, name="whole")).code == 0
    # The runs below go on in the middle of one epoch, behind step 11 or 12 of 8 rows, and end in that of another.
    (facts,) = (folder / "cache" / "tokens").glob("*/facts.json")
    epoch = Windows(read_split(facts.parent, "train", 260), CONTEXT, 1).n
    assert 12 * 8 < epoch < STEPS * 8
    return folder, words


def test_the_same_seed_gives_the_same_bits(runs: tuple[Path, tuple[str, ...]]) -> None:
    folder, words = runs
    assert command(folder, *line(folder, *words, "data.workers=0", name="twin")).code == 0
    assert_same_run(the_run(folder, "twin"), the_run(folder, "whole"))


def test_killed_and_resumed_it_is_the_same_to_the_last_bit(runs: tuple[Path, tuple[str, ...]]) -> None:
    folder, words = runs
    assert command(folder, *line(folder, *words, name="killed"), at_step=14).code == -signal.SIGKILL
    run = the_run(folder, "killed")
    assert run.record.status == "killed"
    assert json.loads((last_files(run) / "checkpoint.json").read_text())["step"] == 12
    assert command(folder, "train", f"resume={run.id}").code == 0
    run = the_run(folder, "killed")
    assert (run.record.status, run.record.attempt) == ("done", 2)
    assert [row["step"] for row in raw_rows(run) if row["attempt"] == 2 and row["split"] == "train"] == list(
        range(13, STEPS + 1)
    )
    assert_same_run(run, the_run(folder, "whole"))


@pytest.mark.parametrize(
    ("number", "code", "status"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "killed")]
)
def test_stopped_by_a_signal_to_its_group_it_saves_and_goes_on_as_if_nothing_had_happened(
    runs: tuple[Path, tuple[str, ...]], number: signal.Signals, code: int, status: str
) -> None:
    folder, words = runs
    name = f"stopped-{code}"
    ended = command(folder, *line(folder, *words, name=name), at_step=10, number=number)
    run = the_run(folder, name)
    assert ended.code == code
    assert (run.record.status, run.record.reason) == (status, f"{number.name} after step 11")
    assert ended.stderr.splitlines()[-1] == f"stopped after step 11; saved.  To go on:  ctxlab train resume={run.id}"
    assert "Traceback" not in ended.stderr
    assert json.loads((last_files(run) / "checkpoint.json").read_text())["step"] == 11
    assert command(folder, "train", f"resume={run.id}").code == 0
    assert_same_run(the_run(folder, name), the_run(folder, "whole"))


def test_a_run_killed_before_its_first_checkpoint_says_so_and_starts_over(runs: tuple[Path, tuple[str, ...]]) -> None:
    folder, words = runs
    assert command(folder, *line(folder, *words, name="early"), at_step=2).code == -signal.SIGKILL
    run = the_run(folder, "early")
    ended = command(folder, "train", f"resume={run.id}")
    assert ended.code == 0
    assert f"{run.id} was stopped before its first checkpoint: it starts over" in ended.stderr.splitlines()
    assert_same_run(the_run(folder, "early"), the_run(folder, "whole"))


def stop_with(error: BaseException) -> None:
    def stop(*_: object, **__: object) -> None:
        raise error

    train_command.score = stop  # type: ignore[assignment]


@pytest.mark.parametrize(
    ("error", "code", "status", "word"),
    [(KeyboardInterrupt(), 130, "interrupted", "interrupted"), (SystemExit(143), 143, "killed", "terminated")],
)
def test_a_run_stopped_in_its_evaluation_goes_on_with_that(
    tmp_path: Path, error: BaseException, code: int, status: str, word: str
) -> None:
    words = (*LINE[:2], "eval=perplexity", f"eval.perplexity.lengths=[{CONTEXT}]")
    stopped = command(tmp_path, *line(tmp_path, *words), before=functools.partial(stop_with, error))
    run = the_run(tmp_path)
    assert (stopped.code, run.record.status) == (code, status)
    assert stopped.stderr.splitlines()[-1] == f"{word}.  To go on:  ctxlab train resume={run.id}"
    before = last_files(run), (last_files(run) / "weights.safetensors").read_bytes(), raw_rows(run)
    assert command(tmp_path, "train", f"resume={run.id}").code == 0
    run = the_run(tmp_path)
    assert run.record.status == "done"
    assert {m.name for m in run.measurements()} == {"nats_per_token", "perplexity", "bits_per_byte"}
    assert (last_files(run), (last_files(run) / "weights.safetensors").read_bytes(), raw_rows(run)) == before


def test_a_text_that_has_changed_is_not_what_the_run_goes_on_with(tmp_path: Path) -> None:
    command(tmp_path, *line(tmp_path, "trainer.checkpoint_every=2"), at_step=5)
    run = the_run(tmp_path)
    first = min((tmp_path / "text").iterdir())
    text = first.read_text()
    first.write_text(text.upper())
    refused = command(tmp_path, "train", f"resume={run.id}")
    assert refused.code == 2
    assert refused.stderr.splitlines()[-1].startswith(f"error: data: the text has changed since {run.id} read it")
    assert the_run(tmp_path).record.status == "killed"
    first.write_text(text)  # as it was, but for its time
    assert command(tmp_path, "train", f"resume={run.id}").code == 0


@pytest.mark.parametrize("limit", ["max_steps", "max_tokens"])
def test_a_larger_budget_goes_on_as_if_it_had_been_there_from_the_start(tmp_path: Path, limit: str) -> None:
    unit = 1 if limit == "max_steps" else 8 * CONTEXT
    words = (
        "optim=adamw", "optim.schedule=constant", "model.dropout=0.1", "trainer.checkpoint_every=4",
        "trainer.validate_every=4", "trainer.max_steps=none",
    )  # fmt: skip
    assert command(tmp_path, *line(tmp_path, *words, f"trainer.{limit}={12 * unit}", name="whole")).code == 0
    assert command(tmp_path, *line(tmp_path, *words, f"trainer.{limit}={8 * unit}")).code == 0
    run = the_run(tmp_path)
    assert command(tmp_path, "train", f"resume={run.id}", f"trainer.{limit}={12 * unit}").code == 0
    run, whole = the_run(tmp_path), the_run(tmp_path, "whole")
    assert computed(run.metrics()) == computed(whole.metrics())
    assert (last_files(run) / "training.pt").read_bytes() == (last_files(whole) / "training.pt").read_bytes()
    assert run.record.config["trainer"][limit] == 12 * unit


@pytest.mark.parametrize("words", [(), ("trainer.max_steps=4",)], ids=["as it is", "a smaller budget"])
def test_a_run_that_has_reached_its_budget_is_refused_and_left_as_it_is(tmp_path: Path, words: tuple[str, ...]) -> None:
    assert command(tmp_path, *line(tmp_path, "trainer.max_steps=6")).code == 0
    run = the_run(tmp_path)
    before = (run.path / "run.json").read_bytes()
    ended = command(tmp_path, "train", f"resume={run.id}", *words)
    said = words[0].partition("=")[2] if words else "6"
    assert ended.code == 2
    assert ended.stderr.splitlines() == [
        f"error: trainer.max_steps: {run.id} is at step 6 and has reached {said}; give a larger trainer.max_steps to go on"
    ]
    assert (run.path / "run.json").read_bytes() == before


@pytest.mark.slow
@pytest.mark.parametrize("optim", ["adamw", "muon"])
def test_from_the_line_a_run_killed_at_any_moment_goes_on_to_the_last_bit(tmp_path: Path, optim: str) -> None:
    """As a user has it: interpreters of their own, the mirror on, two kills at whatever moment they come."""
    words = (*LINE, f"optim={optim}", "trainer.max_steps=300", "logger.mode=offline")
    with started(tmp_path, *line(tmp_path, *words, name="whole")) as process:
        assert ended(process).code == 0
    with started(tmp_path, *line(tmp_path, *words)) as process:
        wait_for_step(the_run_soon(tmp_path).path, 40)
        process.kill()
        assert ended(process).code == -signal.SIGKILL
    run = the_run(tmp_path)
    with started(tmp_path, "train", f"resume={run.id}") as process:
        wait_for_step(run.path, 120)
        process.kill()
        assert ended(process).code == -signal.SIGKILL
    assert the_run(tmp_path).record.status == "killed"
    with started(tmp_path, "train", f"resume={run.id}") as process:
        assert ended(process).code == 0
    assert the_run(tmp_path).record.attempt == 3
    assert_same_run(the_run(tmp_path), the_run(tmp_path, "whole"))
