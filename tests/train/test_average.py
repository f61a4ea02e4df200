"""The mean of the last checkpoints: which they are, what they add up to, what is kept of them."""

from __future__ import annotations

import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from safetensors.numpy import load_file
from torch import nn

from ctxlab.errors import RecordError
from ctxlab.train.checkpoint import (
    find_checkpoint,
    load_weights,
    point,
    prune,
    remember,
    save_checkpoint,
    weights_sha256,
)
from ctxlab.train.settings import TrainerConfig
from tests.train import builders
from tests.train.builders import Rows, Trained, dataset, settings, train


def config(**trainer: Any) -> Any:
    every = {"max_steps": 9, "average": 3, "checkpoint_every": 2, "validate_every": 3}
    return settings(optimizer={"schedule": "constant"}, **{**every, **trainer})


def steps(run: Trained) -> list[int]:
    return [int(path.name.removeprefix("step-")) for path in find_checkpoint(run.folder, "average").averaged]


def by_hand(run: Trained) -> dict[str, np.ndarray]:
    files = [load_file(path / "weights.safetensors") for path in find_checkpoint(run.folder, "average").averaged]
    return {name: np.mean([file[name].astype(np.float64) for file in files], axis=0) for name in files[0]}


def test_it_is_the_mean_of_the_last_three(tmp_path: Path) -> None:
    """Saved at every second step, at the end, and as the best at every third: the last count, the best do not."""
    data = dataset(tmp_path)
    run = train(tmp_path, data, config())
    assert steps(run) == [6, 8, 9]
    found = find_checkpoint(run.folder, "average")
    assert (found.step, found.validation_loss) == (9, None)
    hashes = {
        weights_sha256(one) for one in (found, find_checkpoint(run.folder), replace(found, averaged=found.averaged[1:]))
    }
    assert len(hashes) == 3  # adapters on it know it again
    expected, weights = by_hand(run), load_weights(found)
    assert weights.keys() == expected.keys() == run.weights.keys()
    for name, weight in weights.items():
        assert weight.dtype == torch.float32
        np.testing.assert_array_equal(weight.numpy(), expected[name].astype(np.float32))
        assert not torch.equal(weight, run.weights[name])
    six = train(tmp_path, data, config(max_steps=6, average="none"), "six")
    kept = load_file(run.folder / "step-000006" / "weights.safetensors")
    assert all(np.array_equal(kept[name], weight.numpy()) for name, weight in six.weights.items())
    files = {path.name: (path / "training.pt").exists() for path in run.folder.glob("step-*")}
    whole = {(run.folder / name).read_text().strip() for name in ("last", "best")}
    assert files == {name: name in whole for name in {"step-000006", "step-000008", "step-000009"} | whole}


@pytest.mark.parametrize("at", [4, 5])
def test_a_run_that_was_stopped_averages_what_a_whole_one_does(tmp_path: Path, at: int) -> None:
    """By a signal at a step where a checkpoint was due, or at one where it was not."""
    data = dataset(tmp_path)

    class Stopping(Rows):
        def metrics(self, row: dict[str, Any]) -> None:
            super().metrics(row)
            if row["split"] == "train" and row["step"] == at - 1:  # it stops behind the step in hand
                signal.raise_signal(signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builders, "Rows", Stopping)
        stopped = train(tmp_path, data, config(), "parts")
    assert stopped.outcome.step == at
    assert steps(stopped) == [2, 4]
    parts, whole = train(tmp_path, data, config(), "parts", resume=True), train(tmp_path, data, config(), "whole")
    assert steps(parts) == steps(whole) == [6, 8, 9]
    expected, found = by_hand(whole), load_weights(find_checkpoint(parts.folder, "average"))
    assert all(np.array_equal(weight.numpy(), expected[name].astype(np.float32)) for name, weight in found.items())


def test_a_step_that_a_crash_took_back_counts_once(tmp_path: Path) -> None:
    def saved(step: int) -> Any:
        how: dict[str, Any] = {"training": {}, "tokens": 0, "seconds": 0.0, "validation_loss": None}
        return save_checkpoint(tmp_path, model=nn.Linear(2, 1), step=step, **how)

    for step in (2, 4, 6, 4):  # the crash came before `last` named step 6, and took the run back to 2
        found = saved(step)
        remember(tmp_path, found, 3)
    assert found.path.name == "step-000004-2"
    point(tmp_path, "last", found)
    prune(tmp_path)
    assert [path.name for path in find_checkpoint(tmp_path, "average").averaged] == ["step-000002", "step-000004-2"]
    assert sorted(path.name for path in tmp_path.glob("*step-*")) == ["step-000002", "step-000004-2"]
    assert not (tmp_path / "step-000002" / "training.pt").exists()
    assert find_checkpoint(tmp_path).path == found.path


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(
        RecordError, match=r"checkpoint=average: .* has no 'average' checkpoint; a run keeps what is averaged with"
    ):
        find_checkpoint(tmp_path, "average")
    with pytest.raises(ValidationError, match=r"average: expected a number >= 2 or none, got 1"):
        TrainerConfig(max_steps=1, average=1)
    run = train(tmp_path, dataset(tmp_path), config(max_steps=4))
    (run.folder / "step-000002" / "weights.safetensors").write_bytes(b"not whole")
    with pytest.raises(RecordError, match=r"step-000002/weights.safetensors cannot be read"):
        load_weights(find_checkpoint(run.folder, "average"))
