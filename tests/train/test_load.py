"""`ctxlab.load`: a trained run in Python, against forwards of its model over the whole text at once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

import ctxlab
from ctxlab.errors import RecordError, UndefinedBeyondTraining
from ctxlab.model.position.base import POSITIONS
from ctxlab.records.store import Run
from ctxlab.train.checkpoint import LoadedRun, open_run, point, save_checkpoint
from tests.train.builders import CONTEXT, command, dataset, line, settings, the_run
from tests.train.test_step import fresh_model

TEXT = "To be, or not to be: that is the question. Größe, naïve, 漢字! " * 3


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    for position in ("alibi", "learned"):
        words = (f"position={position}", "trainer.max_steps=3", "trainer.validate_every=1")
        assert command(folder, *line(folder, *words, name=position)).code == 0
    return folder


def load(runs: Path, position: str) -> LoadedRun:
    return ctxlab.load(the_run(runs, position).id, runs=runs / "runs")


@torch.no_grad()
def full_forward(run: LoadedRun, text: str) -> float:
    ids = torch.tensor(run.tokenizer.encode(text))
    return F.cross_entropy(run.model(ids[None, :-1])[0].double(), ids[1:], reduction="sum").item()


@pytest.mark.parametrize("chunk", [1, 7, 10_000])
def test_nats_are_those_of_one_forward_however_the_text_is_cut(runs: Path, chunk: int) -> None:
    run = load(runs, "alibi")
    assert len(run.tokenizer.encode(TEXT)) > 4 * CONTEXT
    assert run.nats(TEXT, chunk=chunk) == pytest.approx(full_forward(run, TEXT), rel=1e-6)


def test_nothing_to_predict_is_no_nats(runs: Path) -> None:
    run = load(runs, "alibi")
    assert run.nats("") == run.nats("T") == 0.0


def test_generate_goes_on_token_by_token_from_full_forwards(runs: Path) -> None:
    run = load(runs, "alibi")
    ids = run.tokenizer.encode("To be")
    with torch.no_grad():
        for _ in range(20):
            ids.append(int(run.model(torch.tensor([ids]))[0, -1].argmax()))
    greedy = ids[len(run.tokenizer.encode("To be")) :]
    stop = greedy.index(run.tokenizer.eos_id) if run.tokenizer.eos_id in greedy else 20
    assert run.generate("To be", max_new_tokens=20, temperature=0) == run.tokenizer.decode(greedy[:stop])
    assert run.generate("To be", max_new_tokens=40, seed=3) == run.generate("To be", max_new_tokens=40, seed=3)
    assert run.generate("To be", max_new_tokens=40, seed=3) != run.generate("To be", max_new_tokens=40, seed=4)


def test_a_table_of_positions_ends_with_the_trained_context(runs: Path) -> None:
    run = load(runs, "learned")
    fits = TEXT[: CONTEXT + 1]  # the last character is predicted, not read
    assert run.nats(fits) == pytest.approx(full_forward(run, fits), rel=1e-6)
    for act in (
        lambda: run.nats(TEXT[: CONTEXT + 2]),
        lambda: run.nats(TEXT[: CONTEXT + 2], chunk=5),
        lambda: run.generate(TEXT[:CONTEXT], max_new_tokens=2, temperature=0),
    ):
        with pytest.raises(UndefinedBeyondTraining):
            act()


def test_config_context_and_checkpoint_are_the_recorded_ones(runs: Path) -> None:
    record = json.loads((the_run(runs, "alibi").path / "run.json").read_text())
    run = load(runs, "alibi")
    assert run.config == record["config"]
    assert run.context == CONTEXT
    assert (run.checkpoint.step, run.checkpoint.tokens) == (3, 3 * 8 * CONTEXT)
    assert not run.model.training
    best = ctxlab.load(record["id"], runs=runs / "runs", checkpoint="best")
    rows = {row["step"]: row["nats_per_token"] for row in best.run.metrics() if row["split"] == "validation"}
    assert best.checkpoint.validation_loss == rows[best.checkpoint.step] == min(rows.values())


def test_last_is_the_newest_run_with_weights(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert ctxlab.load(runs=runs / "runs").run.id == the_run(runs, "learned").id
    monkeypatch.setenv("CTXLAB_RUNS", str(runs / "runs"))
    assert ctxlab.load("alibi").run.id == the_run(runs, "alibi").id
    with pytest.raises(RecordError, match="there is no run 'alibo'"):
        ctxlab.load("alibo")


@pytest.mark.parametrize("position", POSITIONS.names())
def test_every_position_is_whole_when_loaded(tmp_path: Path, runs: Path, position: str) -> None:
    """Weights are loaded into a model that was built without memory: tables that are no weights must be there too."""
    run = the_run(runs, "alibi")
    data, config = dataset(tmp_path), settings(position=position)
    model = fresh_model(config, data).eval()
    made = save_checkpoint(
        tmp_path / "checkpoints", model=model, training={}, step=1, tokens=1, seconds=0.0, validation_loss=None
    )
    point(tmp_path / "checkpoints", "last", made)
    (tmp_path / "tokenizer").mkdir()
    data.tokenizer.save(tmp_path / "tokenizer")
    record = json.loads((run.path / "run.json").read_text())
    record["config"]["position"] = POSITIONS.get(position).Config(name=position).model_dump(mode="json")
    (tmp_path / "run.json").write_text(json.dumps(record))
    loaded = open_run(Run(tmp_path))
    ids = torch.tensor([data.tokenizer.encode(TEXT[:CONTEXT])])
    with torch.no_grad():
        assert torch.equal(loaded.model(ids), model(ids))
