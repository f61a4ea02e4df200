"""Two processes are one run: the same numbers, one record, one end."""

from __future__ import annotations

import json
import os
import re
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ctxlab.train.loop import TrainSettings
from tests.train.builders import (
    computed,
    dataset,
    ended,
    last_files,
    line,
    members,
    rank_rows,
    settings,
    started,
    the_run,
    the_run_soon,
    train,
    wait_for_step,
)


def shared_by_two(config: TrainSettings) -> TrainSettings:
    return replace(config, trainer=config.trainer.model_copy(update={"devices": 2}))


@pytest.mark.parametrize("packed", [False, True], ids=["windows", "packed"])
def test_two_ranks_take_the_steps_of_one(tmp_path: Path, packed: bool) -> None:
    config = settings(packed=packed, max_steps=4, micro_batch=2, validate_every=2)
    alone = train(tmp_path, dataset(tmp_path), config, "alone").rows.rows
    first, second = rank_rows(tmp_path, shared_by_two(config), 2)
    assert computed(second) == [row for row in computed(first) if row["split"] == "validation"]
    assert [(row["split"], row["step"], row["tokens"]) for row in first] == [
        (row["split"], row["step"], row["tokens"]) for row in alone
    ]
    for name, loose in (("loss", 1e-6), ("learning_rate", 1e-12), ("gradient_norm", 1e-5), ("nats_per_token", 1e-6)):
        assert [row.get(name) for row in first] == [
            None if name not in row else pytest.approx(row[name], rel=loose) for row in alone
        ], name
    one, two = (torch.load(next((tmp_path / name).glob("step-*")) / "training.pt") for name in ("alone", "ranks"))
    assert len(one["generators"]) == 1
    here, there = two["generators"]
    assert not torch.equal(here["cpu"], there["cpu"])  # each rank drops other units


@pytest.mark.parametrize("optim", ["adamw", "muon"])
def test_two_ranks_go_on_to_the_same_bits(tmp_path: Path, optim: str) -> None:
    def part(steps: int) -> TrainSettings:
        trained = settings(
            optim=optim, max_steps=steps, micro_batch=2, model={"dropout": 0.2}, optimizer={"schedule": "constant"}
        )
        return shared_by_two(trained)

    dataset(tmp_path)
    whole, _ = rank_rows(tmp_path, part(6), 2, "whole")
    first, _ = rank_rows(tmp_path, part(3), 2)
    second, _ = rank_rows(tmp_path, part(6), 2, resume=True)
    assert computed(first + second) == computed(whole)
    for name in ("weights.safetensors", "training.pt"):
        here, there = (tmp_path / run / "step-000006" / name for run in ("ranks", "whole"))
        assert here.read_bytes() == there.read_bytes(), name


def test_a_run_that_is_given_another_rank_goes_on_with_the_same_rows(tmp_path: Path) -> None:
    schedule = {"schedule": "constant"}
    whole = train(tmp_path, dataset(tmp_path), settings(max_steps=6, optimizer=schedule), "alone").rows.rows
    train(tmp_path, dataset(tmp_path), settings(max_steps=3, optimizer=schedule), "ranks")
    first, _ = rank_rows(tmp_path, shared_by_two(settings(max_steps=6, optimizer=schedule)), 2, resume=True)
    assert [row["step"] for row in first] == [4, 5, 6]
    assert [row["loss"] for row in first] == pytest.approx([row["loss"] for row in whole[3:]], rel=1e-6)


def own_lines(text: str) -> list[str]:
    """What is neither the preparation of data nor the line that moves."""
    known = r"reading the corpus|turning text into tokens|training +\d+%  step .*|scoring test at \d+|"
    return [said for said in text.splitlines() if not re.fullmatch(known, said)]


LONG = (
    "trainer.devices=2",
    "trainer.max_steps=4000",
    "trainer.checkpoint_every=5",
    "trainer.validate_every=none",
)


@pytest.mark.slow
def test_from_the_line_two_devices_are_one_quiet_run_with_one_record_and_one_mirror(tmp_path: Path) -> None:
    words = ("trainer.max_steps=6", "trainer.validate_every=3", "logger.mode=offline", "eval=perplexity")
    words = (*words, "eval.perplexity.lengths=[16,32]", "eval.perplexity.min_documents=2")
    with started(tmp_path, *line(tmp_path, *words, name="one")) as process:
        assert ended(process).code == 0
    with started(tmp_path, *line(tmp_path, *words, "trainer.devices=2", name="two")) as process:
        done = ended(process)
    assert (done.code, own_lines(done.stderr)) == (0, [])
    one, two = the_run(tmp_path, "one"), the_run(tmp_path, "two")
    assert done.stdout.count(f"run {two.id} in ") == 1
    assert two.record.status == "done"
    assert len(list((two.path / "wandb").glob("offline-run-*"))) == 1
    assert (two.path / "log.txt").read_text() == ""
    assert len((two.path / "metrics.jsonl").read_text().splitlines()) == len(one.metrics()) == 8
    for mine, theirs in zip(computed(two.metrics()), computed(one.metrics()), strict=True):
        numbers = [name for name in theirs if name != "split"]
        assert [mine[name] for name in numbers] == pytest.approx([theirs[name] for name in numbers], rel=1e-5)
    scores = [{(m.name, m.context): m.value for m in run.measurements()} for run in (one, two)]
    assert scores[0].keys() == scores[1].keys()
    assert scores[0]["nats_per_token", 32] is not None
    for name, value in scores[0].items():
        small = 1e-6 if "in_context_score" in name else None  # a difference of nats of some 5, in fp32
        assert scores[1][name] == (None if value is None else pytest.approx(value, rel=1e-5, abs=small)), name


@pytest.mark.slow
@pytest.mark.parametrize("to_all", [True, False], ids=["the terminal's", "the first process'"])
def test_ctrl_c_stops_both_saves_once_and_the_run_goes_on(tmp_path: Path, to_all: bool) -> None:
    with started(tmp_path, *line(tmp_path, *LONG, "data.workers=1")) as process:
        wait_for_step(the_run_soon(tmp_path).path, 3)
        (os.killpg if to_all else os.kill)(process.pid, signal.SIGINT)
        stopped = ended(process)
    run = the_run(tmp_path)
    step = len(run.metrics())
    assert (stopped.code, run.record.status) == (130, "interrupted")
    assert own_lines(stopped.stderr) == [f"stopped after step {step}; saved.  To go on:  ctxlab train resume={run.id}"]
    assert json.loads((last_files(run) / "checkpoint.json").read_text())["step"] == step
    with started(tmp_path, "train", f"resume={run.id}", f"trainer.max_steps={step + 3}") as process:
        done = ended(process)
    assert (done.code, own_lines(done.stderr)) == (0, [])
    run = the_run(tmp_path)
    assert (run.record.status, len(run.metrics())) == ("done", step + 3)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1], ids=["the first", "the other"])
def test_a_rank_that_is_killed_ends_the_run_and_leaves_nobody_behind(tmp_path: Path, victim: int) -> None:
    with started(tmp_path, *line(tmp_path, *LONG)) as process:
        wait_for_step(the_run_soon(tmp_path).path, 7)
        os.kill(sorted(members(process.pid))[victim], signal.SIGKILL)
        dead = ended(process)
    run = the_run(tmp_path)
    if victim == 0:
        assert (dead.code, own_lines(dead.stderr)) == (-signal.SIGKILL, [])
        assert run.record.status == "killed"
    else:
        assert dead.code == 1
        assert own_lines(dead.stderr) == ["error: rank 1 of 2 ended with SIGKILL, and the run cannot go on without it"]
        assert run.record.status == "failed"
    step = json.loads((last_files(run) / "checkpoint.json").read_text())["step"]
    assert step >= 5
    with started(tmp_path, "train", f"resume={run.id}", f"trainer.max_steps={step + 3}") as process:
        assert ended(process).code == 0


@pytest.mark.slow
def test_a_loss_that_is_no_number_is_said_once_and_both_end(tmp_path: Path) -> None:
    words = ("trainer.devices=2", "optim=adamw", "optim.learning_rate=1e30")
    with started(tmp_path, *line(tmp_path, *words)) as process:
        dead = ended(process)
    (said,) = own_lines(dead.stderr)
    assert dead.code == 1
    assert re.match(r"error: the (loss|gradient's norm) became nan at step \d+: try a lower optim.learning_rate", said)
    assert the_run(tmp_path).record.status == "failed"
