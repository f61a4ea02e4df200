"""How long a run is, what it validates and what it keeps, against a count and a scoring of its own."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from ctxlab.data.prepare import TextDataset
from ctxlab.data.stream import Batch
from ctxlab.model.transformer import Transformer
from ctxlab.train.callbacks import clock, save
from ctxlab.train.loop import TrainSettings
from ctxlab.train.module import LanguageModel
from ctxlab.train.scoring import Validation
from tests.train.builders import CONTEXT, dataset, settings, train

STEP_TOKENS = 8 * CONTEXT


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TextDataset:
    return dataset(tmp_path_factory.mktemp("data"))


def model_of(config: TrainSettings, data: TextDataset, weights: Path) -> Transformer:
    model = Transformer(
        config.model, config.position, config.attention, vocab_size=data.tokenizer.vocab_size, context=config.context
    )
    model.load_state_dict(load_file(weights / "weights.safetensors"))
    return model.eval()


@torch.no_grad()
def validation_nats(model: Transformer, data: TextDataset, most: int) -> tuple[float, int]:
    """Summed nats and bytes of all whole windows of the validation split, each in a forward of its own.

    Fails where that is more windows than a validation scores.
    """
    split = data.splits["validation"]
    documents = [torch.from_numpy(split.document(i).astype("int64")) for i in range(split.n_documents)]
    counts = [(len(tokens) - 1) // CONTEXT for tokens in documents]
    assert sum(counts) <= most
    total, n_bytes = 0.0, 0
    for tokens, count in zip(documents, counts, strict=True):
        for start in range(0, count * CONTEXT, CONTEXT):
            window = tokens[start : start + CONTEXT + 1]
            logits = model(window[None, :-1])[0].double()
            total += F.cross_entropy(logits, window[1:], reduction="sum").item()
            n_bytes += len(data.tokenizer.decode(window[1:].tolist()).encode())
    assert n_bytes > 0
    return total, n_bytes


@pytest.mark.parametrize(
    ("limits", "steps"),
    [
        ({"max_steps": 5}, 5),
        ({"max_steps": "none", "max_tokens": 5 * STEP_TOKENS}, 5),
        ({"max_steps": "none", "max_tokens": 6 * STEP_TOKENS - 1}, 5),  # never more tokens than said
        ({"max_steps": 3, "max_tokens": 5 * STEP_TOKENS}, 3),
        ({"max_steps": 9, "max_tokens": 4 * STEP_TOKENS}, 4),
    ],
)
def test_the_first_limit_reached_ends_a_run(
    tmp_path: Path, data: TextDataset, limits: dict[str, Any], steps: int
) -> None:
    run = train(tmp_path, data, settings(**limits))
    assert [row["step"] for row in run.rows.of("train")] == list(range(1, steps + 1))
    assert [row["tokens"] for row in run.rows.of("train")] == [STEP_TOKENS * n for n in range(1, steps + 1)]
    assert (run.outcome.step, run.outcome.tokens) == (steps, steps * STEP_TOKENS)
    assert facts(run.folder, "last")["step"] == steps


class FakeTime:
    """A clock that stands still unless something takes its time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(clock, "time", self)
        self.patch = monkeypatch

    def perf_counter(self) -> float:
        return self.now

    def takes(self, where: Any, name: str, seconds: float) -> None:
        original = getattr(where, name)

        def slow(*args: Any, **kwargs: Any) -> Any:
            self.now += seconds
            return original(*args, **kwargs)

        self.patch.setattr(where, name, slow)


def test_a_run_of_so_many_seconds_ends_in_time_with_its_rate_brought_down(
    tmp_path: Path, data: TextDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    FakeTime(monkeypatch).takes(LanguageModel, "_update", 1.0)
    optimizer = {"schedule": "wsd", "warmup_steps": 0, "decay_fraction": 0.5, "final_ratio": 0.1}
    run = train(tmp_path, data, settings(max_steps="none", max_time=10.0, optimizer=optimizer))
    rows = run.rows.of("train")
    assert [row["seconds"] for row in rows] == [1.0 * n for n in range(1, 11)]
    spent = [n / 10 for n in range(10)]  # at the start of each step
    expected = [2e-3 * (0.1 + 0.9 * min(1.0, (1 - p) / 0.5)) for p in spent]
    assert [row["learning_rate"] for row in rows] == pytest.approx(expected, rel=1e-9)
    assert facts(run.folder, "last") == {
        "step": 10, "tokens": 10 * STEP_TOKENS, "seconds": 10.0, "validation_loss": None
    }  # fmt: skip


def test_the_time_of_validation_and_of_checkpoints_is_not_training(
    tmp_path: Path, data: TextDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    time = FakeTime(monkeypatch)
    time.takes(LanguageModel, "_update", 1.0)
    time.takes(Validation, "__call__", 100.0)
    time.takes(save, "save_checkpoint", 1000.0)
    run = train(tmp_path, data, settings(max_steps=6, validate_every=2, checkpoint_every=1))
    assert [row["seconds"] for row in run.rows.of("train")] == [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    assert time.now > 3000.0


def test_max_time_on_a_real_clock(tmp_path: Path, data: TextDataset) -> None:
    optimizer = {"schedule": "constant"}
    run = train(tmp_path, data, settings(max_steps="none", max_time=0.5, optimizer=optimizer))
    seconds = [row["seconds"] for row in run.rows.of("train")]
    assert all(second < 0.5 for second in seconds[:-1])
    assert seconds[-1] >= 0.5


def test_a_curriculum_runs_through_its_stages(
    tmp_path: Path, data: TextDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Of 32, 16 and 8 rows a step, 4 at once: a stage is 3, 6 and 3 steps of 8, 4 and 2 micro-batches.
    schedule = ({"context": 8, "share": 0.25}, {"context": 16, "share": 0.5})
    widths: list[int] = []
    step = LanguageModel.training_step

    def look(self: LanguageModel, batch: Batch, batch_idx: int) -> None:
        widths.append(batch.tokens.shape[1])
        step(self, batch, batch_idx)

    monkeypatch.setattr(LanguageModel, "training_step", look)
    run = train(tmp_path, data, settings(max_steps=12, micro_batch=4, context_schedule=schedule))
    rows = run.rows.of("train")
    assert [row["tokens"] for row in rows] == [STEP_TOKENS * n for n in range(1, 13)]
    assert run.outcome.resolved["micro_rows"] == {"8": 4, "16": 4, "32": 4}
    assert widths == [8] * (3 * 8) + [16] * (6 * 4) + [32] * (3 * 2)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_validation_is_the_mean_of_full_forwards_over_its_tokens(
    tmp_path: Path, data: TextDataset, dropout: float
) -> None:
    config = settings(max_steps=4, validate_every=2, checkpoint_every=2, model={"dropout": dropout})
    run = train(tmp_path, data, config)
    rows = run.rows.of("validation")
    assert [row["step"] for row in rows] == [2, 4]
    model = model_of(config, data, run.folder / (run.folder / "last").read_text().strip())
    total, n_bytes = validation_nats(model, data, config.trainer.validate_tokens // CONTEXT)
    split = data.splits["validation"]
    n_targets = sum((int(size) - 1) // CONTEXT * CONTEXT for size in split.sizes)
    assert rows[-1]["nats_per_token"] == pytest.approx(total / n_targets, rel=1e-6)
    assert rows[-1]["perplexity"] == pytest.approx(math.exp(total / n_targets), rel=1e-6)
    assert rows[-1]["bits_per_byte"] == pytest.approx(total / n_bytes / math.log(2), rel=1e-6)


def test_validation_and_checkpoints_disturb_nothing(tmp_path: Path, data: TextDataset) -> None:
    model = {"dropout": 0.3}
    quiet = train(tmp_path, data, settings(model=model), "quiet")
    busy = train(tmp_path, data, settings(model=model, validate_every=1, checkpoint_every=1), "busy")
    for name in ("loss", "gradient_norm", "learning_rate", "tokens"):
        assert [row[name] for row in busy.rows.of("train")] == [row[name] for row in quiet.rows.of("train")], name
    assert weights_of(busy.folder, "last") == weights_of(quiet.folder, "last")


def test_last_and_best_are_what_they_say_and_nothing_else_is_kept(tmp_path: Path, data: TextDataset) -> None:
    # So large a rate that the loss goes up again.
    config = settings(
        max_steps=12, validate_every=2, checkpoint_every=3, optimizer={"learning_rate": 2.0, "schedule": "constant"}
    )
    run = train(tmp_path, data, config)
    losses = {row["step"]: row["nats_per_token"] for row in run.rows.of("validation")}
    best = min(losses, key=lambda step: losses[step])
    assert best != 12
    assert facts(run.folder, "best")["step"] == best
    assert facts(run.folder, "best")["validation_loss"] == losses[best]
    assert facts(run.folder, "last")["step"] == 12
    assert facts(run.folder, "last")["validation_loss"] == losses[12]
    assert sorted(path.name for path in run.folder.iterdir()) == sorted(
        ["last", "best", f"step-{best:06d}", "step-000012"]
    )
    for pointer, step in (("best", best), ("last", 12)):
        model = model_of(config, data, run.folder / (run.folder / pointer).read_text().strip())
        total, _ = validation_nats(model, data, config.trainer.validate_tokens // CONTEXT)
        n_targets = sum((int(size) - 1) // CONTEXT * CONTEXT for size in data.splits["validation"].sizes)
        assert losses[step] == pytest.approx(total / n_targets, rel=1e-6)


@pytest.mark.parametrize(("every", "rows"), [(1, [1, 2, 3, 4, 5, 6, 7]), (3, [3, 6, 7]), (100, [7])])
def test_the_last_step_is_logged_whatever_the_interval(
    tmp_path: Path, data: TextDataset, every: int, rows: list[int]
) -> None:
    run = train(tmp_path, data, settings(max_steps=7, log_every=every))
    assert [row["step"] for row in run.rows.of("train")] == rows


def test_auto_intervals_are_a_fifth_and_a_tenth_of_the_run(tmp_path: Path, data: TextDataset) -> None:
    run = train(tmp_path, data, settings(max_steps=20, validate_every="auto", checkpoint_every="auto"))
    assert [row["step"] for row in run.rows.of("validation")] == [4, 8, 12, 16, 20]
    assert run.outcome.resolved["checkpoint_every"] == 2


def facts(folder: Path, pointer: str) -> dict[str, Any]:
    return json.loads((folder / (folder / pointer).read_text().strip() / "checkpoint.json").read_text())  # type: ignore[no-any-return]


def weights_of(folder: Path, pointer: str) -> bytes:
    return (folder / (folder / pointer).read_text().strip() / "weights.safetensors").read_bytes()
