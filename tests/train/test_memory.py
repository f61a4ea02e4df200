"""Training with a memory: rows go on from step to step, whatever the micro-batches, the ranks and the interruptions."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from ctxlab.data.prepare import TextDataset
from ctxlab.data.stream import Stage, TrainStream
from ctxlab.train.loop import TrainSettings
from tests.train.builders import CONTEXT, Rows, computed, dataset, rank_rows, settings, train
from tests.train.test_step import fresh_model

HALF = CONTEXT // 2


def recurrent(**trainer: Any) -> TrainSettings:
    """Rows of two segments, a memory of two: what a row sees of the step before it has all been a row of its own."""
    attention = {"name": "recurrent", "size": HALF, "memory": CONTEXT}
    schedule = {"schedule": "constant"}
    return settings(position="transformer_xl", attention=attention, optimizer=schedule, **trainer)


def losses_by_hand(config: TrainSettings, data: TextDataset, steps: int) -> list[float]:
    """One row at a time, with what each remembers in a list; the weights stand still."""
    model = fresh_model(config, data)
    rows = config.trainer.batch_tokens // config.context
    stages = (Stage(config.context, rows, rows, steps),)
    stream = TrainStream(
        lambda context: data.rows(context, seed=config.seed, packed=False),
        seed=config.seed,
        stages=stages,
        pad_id=data.tokenizer.pad_id,
        in_order=True,
    )
    remembered: list[Tensor] = [torch.zeros(0, dtype=torch.int64)] * rows
    losses = []
    for step in range(steps):
        batch, total = stream[step], 0.0
        assert batch.goes_on is not None
        for row, length in enumerate(batch.lengths.tolist()):
            past = remembered[row] if batch.goes_on[row] else remembered[row][:0]
            whole = torch.cat([past, batch.tokens[row, :length]])
            with torch.no_grad():  # all that the row has read of its document, in one forward
                logits = model(whole[None])[0, len(past) :]
            total += float(F.cross_entropy(logits.double(), batch.targets[row, :length], reduction="sum"))
            remembered[row] = whole
        losses.append(total / batch.n_targets_in_step)
    return losses


def test_a_row_sees_what_it_read_in_the_steps_before(tmp_path: Path) -> None:
    data = dataset(tmp_path, documents=40, longest=900)
    still = recurrent(micro_batch=2)
    still = replace(still, optim=still.optim.model_copy(update={"learning_rate": 1e-30, "weight_decay": 0.0}))
    found = [row["loss"] for row in train(tmp_path, data, still).rows.of("train")]
    expected = losses_by_hand(still, data, 8)
    assert found == pytest.approx(expected, rel=1e-5)
    attention = {"name": "recurrent", "size": HALF, "memory": 0}
    without = replace(still, attention=type(still.attention).model_validate(attention))
    assert losses_by_hand(without, data, 8) != pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("optim", ["adamw", "muon"])
def test_a_run_goes_on_with_its_memory_to_the_same_bits(tmp_path: Path, optim: str) -> None:
    def part(steps: int) -> TrainSettings:
        return replace(recurrent(micro_batch=2, max_steps=steps), optim=settings(optim=optim).optim.model_copy(
            update={"schedule": "constant"}
        ))  # fmt: skip

    data = dataset(tmp_path)
    whole = train(tmp_path, data, part(6), "whole")
    first = train(tmp_path, data, part(3), "parts")
    state = torch.load(next((tmp_path / "parts").glob("step-*")) / "training.pt")
    assert [tuple(layer.shape) for layer in state["memory"]["layers"]] == [(8, CONTEXT, 16)] * 2
    second = train(tmp_path, data, part(6), "parts", resume=True)
    assert computed(first.rows.rows + second.rows.rows) == computed(whole.rows.rows)
    for name in ("weights.safetensors", "training.pt"):
        here, there = (tmp_path / run / "step-000006" / name for run in ("parts", "whole"))
        assert here.read_bytes() == there.read_bytes(), name


def test_two_ranks_carry_what_one_does_and_go_on_from_it(tmp_path: Path) -> None:
    whole = train(tmp_path, dataset(tmp_path), recurrent(max_steps=6, micro_batch=4), "alone").rows.rows
    train(tmp_path, dataset(tmp_path), recurrent(max_steps=3, micro_batch=4), "ranks")
    config = recurrent(max_steps=6, micro_batch=2)
    shared = replace(config, trainer=config.trainer.model_copy(update={"devices": 2}))
    first, _ = rank_rows(tmp_path, shared, 2, resume=True)
    assert [row["loss"] for row in first] == pytest.approx([row["loss"] for row in whole[3:]], rel=1e-6)
    one, two = (torch.load(tmp_path / name / "step-000006" / "training.pt") for name in ("alone", "ranks"))
    assert torch.equal(one["memory"]["held"], two["memory"]["held"])
    for here, there in zip(one["memory"]["layers"], two["memory"]["layers"], strict=True):
        torch.testing.assert_close(here, there, atol=1e-5, rtol=0)


class Crash(Exception):
    """What ends a run from outside."""


RISING = {"micro_batch": 4, "context_schedule": ({"context": HALF, "share": 0.5},)}  # 4 steps of 16 rows, 4 of 8
UP_AND_DOWN = {
    "micro_batch": 1, "batch_tokens": CONTEXT,  # 2 steps of 1 row, 4 of 2, 2 of 1
    "context_schedule": ({"context": CONTEXT, "share": 0.25}, {"context": HALF, "share": 0.5}),
}  # fmt: skip


@pytest.mark.parametrize(
    ("stages", "saved"), [(RISING, 3), (RISING, 4), (RISING, 6), (UP_AND_DOWN, 2), (UP_AND_DOWN, 5), (UP_AND_DOWN, 6)]
)
def test_a_curriculum_goes_on_to_the_same_bits_from_any_stage_and_from_between_two(
    tmp_path: Path, stages: dict[str, Any], saved: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = dataset(tmp_path)
    config = recurrent(**stages, validate_every=saved, checkpoint_every=saved)
    whole = train(tmp_path, data, config, "whole").rows.rows

    def metrics(self: Rows, row: dict[str, Any]) -> None:
        if row["step"] > saved:
            raise Crash
        self.rows.append(row)

    with monkeypatch.context() as patched:
        patched.setattr(Rows, "metrics", metrics)
        with pytest.raises(Crash):
            train(tmp_path, data, config, "parts")
    rest = train(tmp_path, data, config, "parts", resume=True).rows.rows
    assert computed(rest) == computed([row for row in whole if row["step"] > saved])
    for name in ("weights.safetensors", "training.pt"):
        here, there = (tmp_path / run / "step-000008" / name for run in ("parts", "whole"))
        assert here.read_bytes() == there.read_bytes(), name
