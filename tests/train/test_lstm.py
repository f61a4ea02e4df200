"""Training a recurrent model: the steps are those by hand, a state is carried from step to step, a resume is bitwise."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ctxlab.data.prepare import TextDataset
from ctxlab.model.config import LSTMConfig
from ctxlab.train.loop import TrainSettings, fitting_rows
from tests.train.builders import CONTEXT, computed, dataset, settings, train
from tests.train.test_memory import losses_by_hand
from tests.train.test_step import by_hand


def recurrent(model: dict[str, Any] | None = None, **how: Any) -> TrainSettings:
    """A run of a very small LSTM, 2 layers of 24 behind embeddings of 16."""
    sizes = LSTMConfig(**{"d_model": 16, "d_hidden": 24, "n_layers": 2} | (model or {}))
    return replace(settings(**how), model=sizes, position="none", attention="none")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TextDataset]:
    return dataset(tmp_path_factory.mktemp("data"), documents=40, longest=900)


@pytest.mark.parametrize("packed", [False, True], ids=["windows", "packed"])
def test_every_step_is_the_one_by_hand(tmp_path: Path, data: TextDataset, packed: bool) -> None:
    config = recurrent(micro_batch=2, packed=packed, max_steps=4)
    expected = by_hand(config, data, 4)
    run = train(tmp_path, data, config)
    rows = run.rows.of("train")
    assert [row["loss"] for row in rows] == pytest.approx(expected.losses, rel=1e-6)
    assert [row["gradient_norm"] for row in rows] == pytest.approx(expected.norms, rel=1e-5)
    for name, parameter in expected.model.named_parameters():
        torch.testing.assert_close(run.weights[name], parameter.detach(), atol=2e-5, rtol=1e-4, msg=name)


def test_a_carried_state_is_all_that_a_row_has_read_of_its_document(tmp_path: Path, data: TextDataset) -> None:
    still = recurrent({"carry_state": True}, micro_batch=2, optimizer={"schedule": "constant"})
    still = replace(still, optim=still.optim.model_copy(update={"learning_rate": 1e-30, "weight_decay": 0.0}))
    found = [row["loss"] for row in train(tmp_path, data, still).rows.of("train")]
    expected = losses_by_hand(still, data, 8)
    assert found == pytest.approx(expected, rel=1e-6)
    anew = replace(still, model=still.model.model_copy(update={"carry_state": False}))
    assert [row["loss"] for row in train(tmp_path, data, anew, "anew").rows.of("train")] != pytest.approx(
        expected, rel=1e-6
    )


@pytest.mark.parametrize("optim", ["adamw", "muon"])
@pytest.mark.parametrize("carry", [False, True])
def test_a_run_goes_on_to_the_same_bits(tmp_path: Path, data: TextDataset, optim: str, carry: bool) -> None:
    def part(steps: int) -> TrainSettings:
        model = {"carry_state": carry, "dropout": 0.2}
        return recurrent(model, optim=optim, optimizer={"schedule": "constant"}, micro_batch=2, max_steps=steps)

    whole = train(tmp_path, data, part(6), "whole")
    first = train(tmp_path, data, part(3), "parts")
    state = torch.load(next((tmp_path / "parts").glob("step-*")) / "training.pt")
    if carry:
        assert [tuple(layer.shape) for layer in state["memory"]["layers"]] == [(8, 1, 24)] * 4
    second = train(tmp_path, data, part(6), "parts", resume=True)
    assert computed(first.rows.rows + second.rows.rows) == computed(whole.rows.rows)
    for name in ("weights.safetensors", "training.pt"):
        here, there = (tmp_path / run / "step-000006" / name for run in ("parts", "whole"))
        assert here.read_bytes() == there.read_bytes(), name


def test_rows_that_fit_are_counted_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from ctxlab.model.count import activation_bytes

    config = recurrent()
    cpu = torch.device("cpu")

    def rows(n: int) -> int:
        return activation_bytes(config.model, "none", "none", vocab_size=260, context=CONTEXT, rows=n, loss_chunk=8065)

    total = int(rows(10) / 0.4) + 1
    monkeypatch.setattr("ctxlab.train.loop.total_memory_bytes", lambda _: total)
    assert fitting_rows(config, 260, "fp32", cpu, CONTEXT, recompute="none", standing=0) == 10
    standing = int(0.9 * total) - rows(6) - 2
    assert fitting_rows(config, 260, "fp32", cpu, CONTEXT, recompute="none", standing=standing) == 6
    assert fitting_rows(config, 260, "fp32", cpu, CONTEXT, recompute="none", standing=total) == 1
    narrow = activation_bytes(config.model, "none", "none", vocab_size=260, context=CONTEXT, rows=10, loss_chunk=64)
    monkeypatch.setattr("ctxlab.train.loop.total_memory_bytes", lambda _: int(narrow / 0.4) + 1)
    fewer = fitting_rows(config, 260, "fp32", cpu, CONTEXT, recompute="none", standing=0)
    assert rows(fewer) <= narrow < rows(fewer + 1)  # the logits of a chunk are there once, however many rows there are
