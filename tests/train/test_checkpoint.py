"""Checkpoints are whole or not there: crashes between any two files, damaged files, a disk that takes no more."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from ctxlab.data.prepare import TextDataset
from ctxlab.errors import RecordError, RunError
from ctxlab.train import checkpoint as module
from ctxlab.train.callbacks import save
from ctxlab.train.checkpoint import (
    Checkpoint,
    find_checkpoint,
    load_training,
    load_weights,
    point,
    prune,
    save_checkpoint,
)
from tests.train.builders import Trained, command, dataset, last_files, line, settings, the_run, train

FILES = ("weights.safetensors", "training.pt", "checkpoint.json")
EVERY = {"max_steps": 9, "validate_every": 3, "checkpoint_every": 3, "model": {"dropout": 0.1}}


class Crash(BaseException):
    """The process is gone from here on: nothing in the way catches this."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TextDataset:
    return dataset(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, data: TextDataset) -> Trained:
    return train(tmp_path_factory.mktemp("whole"), data, settings(**EVERY))


def saved(folder: Path, step: int, size: int = 1000) -> Checkpoint:
    torch.manual_seed(step)
    model = torch.nn.Linear(size, 1)
    training = {
        "optimizer": {"m": torch.zeros(size)},
        "generators": [{"cpu": torch.get_rng_state()}],
        "micro_rows": {8: 4},
    }
    return save_checkpoint(
        folder, model=model, training=training, step=step, tokens=100 * step, seconds=0.5, validation_loss=None
    )


def read_all(folder: Path) -> None:
    found = find_checkpoint(folder)
    load_weights(found)
    load_training(found)


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def crash_after(name: str, calls: int) -> Callable[[pytest.MonkeyPatch], None]:
    """A crash right behind the n-th call of a function that saving a checkpoint goes through."""
    where: Any = {"save_file": module, "rmtree": shutil, "replace": os, "point": save, "prune": save}.get(name, torch)

    def arm(patch: pytest.MonkeyPatch) -> None:
        original, left = getattr(where, name), [calls]

        def call(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            left[0] -= 1
            if left[0] == 0:
                raise Crash(name)
            return result

        patch.setattr(where, name, call)

    return arm


@pytest.mark.parametrize(
    ("name", "calls"),
    [
        *(("save_file", n) for n in (1, 2)),
        *(("save", n) for n in (1, 2)),
        *(("replace", n) for n in range(1, 10)),
        *(("prune", n) for n in (1, 2, 3)),
    ],
)
def test_a_crash_anywhere_in_saving_leaves_a_run_that_goes_on_to_the_same_end(
    tmp_path: Path, data: TextDataset, whole: Trained, name: str, calls: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        crash_after(name, calls)(patch)
        with pytest.raises(Crash):
            train(tmp_path, data, settings(**EVERY))
    folder = tmp_path / "run"
    for pointer in ("last", "best"):
        if (folder / pointer).exists():
            found = find_checkpoint(folder, pointer)
            assert load_weights(found).keys() == whole.weights.keys()
            assert load_training(found).keys() == {"optimizer", "generators", "memory", "micro_rows"}
    train(tmp_path, data, settings(**EVERY), resume=(folder / "last").exists())
    assert {path.name for path in folder.iterdir()} == {
        "last", "best", *((folder / pointer).read_text().strip() for pointer in ("last", "best"))
    }  # fmt: skip
    for pointer in ("last", "best"):
        now, then = find_checkpoint(folder, pointer), find_checkpoint(whole.folder, pointer)
        assert (now.step, now.tokens, now.validation_loss) == (then.step, then.tokens, then.validation_loss)
        for file in FILES[:2]:
            assert (now.path / file).read_bytes() == (then.path / file).read_bytes(), (pointer, file)


def test_the_crash_points_cover_every_save_of_the_run(whole: Trained) -> None:
    """Each of the three validations is the best so far, so there are three saves of three moves each."""
    assert find_checkpoint(whole.folder, "best").step == find_checkpoint(whole.folder).step == 9


def test_a_checkpoint_that_is_pointed_to_is_never_taken_away_to_be_written_again(tmp_path: Path) -> None:
    first = saved(tmp_path, 7)
    point(tmp_path, "last", first)
    second = saved(tmp_path, 7)
    assert second.path != first.path
    assert find_checkpoint(tmp_path).path == first.path
    point(tmp_path, "last", second)
    prune(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"last", second.path.name}
    assert load_weights(find_checkpoint(tmp_path))["weight"].shape == (1, 1000)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
@pytest.mark.parametrize("name", FILES)
def test_a_truncated_file_is_one_line(tmp_path: Path, name: str, share: float) -> None:
    point(tmp_path, "last", saved(tmp_path, 3))
    path = tmp_path / "step-000003" / name
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(RecordError) as refused:
        read_all(tmp_path)
    assert str(path) in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_one_line(tmp_path: Path, name: str) -> None:
    point(tmp_path, "last", saved(tmp_path, 3))
    (tmp_path / "step-000003" / name).unlink()
    with pytest.raises(RecordError, match=name) as refused:
        read_all(tmp_path)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("pointer", [b"", b"\n", b"step-000004\n", b"\xff\xfe\n", b"last\n"])
def test_a_pointer_to_nothing_is_one_line(tmp_path: Path, pointer: bytes) -> None:
    point(tmp_path, "last", saved(tmp_path, 3))
    (tmp_path / "last").write_bytes(pointer)
    with pytest.raises(RecordError, match=r"^checkpoint=last: .* cannot be read: [^\n]*$"):
        find_checkpoint(tmp_path)


@pytest.mark.parametrize("content", [b"garbage", b"\x80\x02}q\x00.", b"PK\x03\x04"])
def test_another_file_in_the_place_of_the_state_is_one_line(tmp_path: Path, content: bytes) -> None:
    point(tmp_path, "last", saved(tmp_path, 3))
    (tmp_path / "step-000003" / "training.pt").write_bytes(content)
    with pytest.raises(RecordError, match=r"training.pt cannot be read: [^\n]+$"):
        load_training(find_checkpoint(tmp_path))


@contextmanager
def no_file_beyond(size: int) -> Iterator[None]:
    """Real writes that fail, in C as in Python: no file of this process grows beyond `size` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, previous)


# The weights of `saved` are 4 kB, its state 4 kB and 5 kB of generators: the first, the second, or the third is refused.
@pytest.mark.parametrize("size", [1, 2000, 6000], ids=["at once", "weights", "state"])
def test_a_write_that_fails_says_why_and_leaves_the_checkpoint_before(tmp_path: Path, size: int) -> None:
    point(tmp_path, "last", saved(tmp_path, 3))
    before = files_of(tmp_path)
    with no_file_beyond(size), pytest.raises(RunError) as refused:
        saved(tmp_path, 4)
    said = str(refused.value)
    assert said.startswith(f"the checkpoint of step 4 could not be written to {tmp_path}: ")
    assert os.strerror(27) in said  # File too large
    assert "\n" not in said
    assert files_of(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    assert find_checkpoint(tmp_path).step == 3


def test_a_pointer_that_cannot_be_written_leaves_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    point(tmp_path, "last", saved(tmp_path, 3))
    after = saved(tmp_path, 4)

    def full(*_: Any) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunError, match=r"^checkpoint=last could not be written to .*: No space left on device$"):
        point(tmp_path, "last", after)
    assert find_checkpoint(tmp_path).step == 3


def fill_the_disk_at_the_second_save() -> None:
    writes = [0]
    original = module.save_file

    def save_file(*args: Any) -> None:
        writes[0] += 1
        if writes[0] == 2:
            raise OSError(28, os.strerror(28))
        original(*args)

    module.save_file = save_file


def test_a_disk_that_fills_up_ends_the_run_with_one_line_and_it_goes_on_when_there_is_room(tmp_path: Path) -> None:
    words = ("trainer.max_steps=9", "trainer.checkpoint_every=3", "trainer.validate_every=none")
    ended = command(tmp_path, *line(tmp_path, *words), before=fill_the_disk_at_the_second_save)
    run = the_run(tmp_path)
    reason = f"the checkpoint of step 6 could not be written to runs/{run.id}/checkpoints: No space left on device"
    assert ended.code == 1
    assert ended.stderr.splitlines()[-1] == f"error: {reason}"
    assert "Traceback" not in ended.stderr
    assert (run.record.status, run.record.reason) == ("failed", reason)
    assert find_checkpoint(run.checkpoints).step == 3
    assert command(tmp_path, "train", f"resume={run.id}").code == 0
    assert command(tmp_path, *line(tmp_path, *words, name="whole")).code == 0
    assert (last_files(the_run(tmp_path)) / FILES[0]).read_bytes() == (
        last_files(the_run(tmp_path, "whole")) / FILES[0]
    ).read_bytes()


@pytest.mark.parametrize("name", FILES)
def test_a_run_whose_checkpoint_is_damaged_is_refused_in_one_line(tmp_path: Path, name: str) -> None:
    command(tmp_path, *line(tmp_path, "trainer.checkpoint_every=2"), at_step=5)
    run = the_run(tmp_path)
    path = last_files(run) / name
    path.write_bytes(path.read_bytes()[:-20])
    ended = command(tmp_path, "train", f"resume={run.id}")
    assert ended.code == 2
    errors = [text for text in ended.stderr.splitlines() if text.startswith("error: ")]
    assert len(errors) == 1
    assert f"{run.id}/checkpoints/step-000004/{name} cannot be read: " in errors[0]
    assert ended.stderr.splitlines()[-1] == errors[0]
    assert the_run(tmp_path).record.status == "killed"


def test_facts_are_those_of_the_step(tmp_path: Path) -> None:
    found = saved(tmp_path, 3)
    assert json.loads((found.path / "checkpoint.json").read_text()) == {
        "step": 3, "tokens": 300, "seconds": 0.5, "validation_loss": None
    }  # fmt: skip
