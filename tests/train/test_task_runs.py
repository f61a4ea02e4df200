"""Runs on tasks: killed and gone on with they are the same to the last bit, and any number of ranks trains the same."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.train.builders import command, computed, ended, last_files, line, started, the_run

TASKS = {
    # 40 rows an epoch, 8 a step: pairs rise while it runs
    "mqar": ("data=task/mqar", "data.pairs=[1,2,8]", "data.vocab_size=32", "data.examples=40", "data.workers=2"),
    "copy": ("data=task/copy", "data.symbols=5"),
}
OF_TEXT = ("data.path=", "data=text", "tokenizer=")


def words(folder: Path, task: str, *more: str, name: str) -> list[str]:
    said = line(
        folder, *TASKS[task], "trainer.max_steps=14", "trainer.micro_batch=4", "trainer.checkpoint_every=5",
        "trainer.validate_every=4", "trainer.validate_tokens=128", "model.dropout=0.1", *more, name=name,
    )  # fmt: skip
    return [word for word in said if not word.startswith(OF_TEXT)]


@pytest.mark.parametrize("task", TASKS)
def test_killed_and_resumed_it_is_the_same_to_the_last_bit(tmp_path: Path, task: str) -> None:
    done = command(tmp_path, *words(tmp_path, task, name="whole"))
    assert done.code == 0, done.stderr
    assert command(tmp_path, *words(tmp_path, task, "data.workers=0", name="killed"), at_step=8).code == -signal.SIGKILL
    run = the_run(tmp_path, "killed")
    assert run.record.status == "killed"
    done = command(tmp_path, "train", f"resume={run.id}")
    assert done.code == 0, done.stderr
    run, whole = the_run(tmp_path, "killed"), the_run(tmp_path, "whole")
    assert (run.record.status, run.record.attempt) == ("done", 2)
    assert computed(run.metrics()) == computed(whole.metrics())
    assert [row["step"] for row in run.metrics() if row["split"] == "train"] == list(range(1, 15))
    assert all("accuracy" in row for row in run.metrics() if row["split"] == "validation")
    for name in ("weights.safetensors", "training.pt"):
        assert (last_files(run) / name).read_bytes() == (last_files(whole) / name).read_bytes(), name


@pytest.mark.slow
def test_two_ranks_train_and_validate_as_one(tmp_path: Path) -> None:
    """The rows of a step are shared, and so are the validation's; 8 rows have other targets in each rank."""
    rows = {}
    for devices in (1, 2):
        name = f"by-{devices}"
        said = words(
            tmp_path, "copy", "model.dropout=0.0", f"trainer.devices={devices}", "trainer.max_steps=4", name=name
        )
        with started(tmp_path, *said) as process:
            assert ended(process).code == 0
        rows[devices] = the_run(tmp_path, name).metrics()
    assert len(rows[1]) == len(rows[2]) > 4
    for one, two in zip(rows[1], rows[2], strict=True):
        for key in ("split", "step", "tokens", "accuracy"):
            assert one.get(key) == two.get(key)
        for key in ("loss", "nats_per_token", "gradient_norm"):
            assert one.get(key) == (None if key not in two else pytest.approx(two[key], rel=1e-5))
