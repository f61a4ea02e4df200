"""Answers of a model: labelled places as a loop over rows would score them, generation as one prompt at a time would."""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from ctxlab.data.source import SOURCES
from ctxlab.data.tasks.dataset import TaskDataset, prepare_task
from ctxlab.data.tokenizers.ids import Ids
from ctxlab.data.windows import IGNORED, Row
from ctxlab.errors import UndefinedBeyondTraining
from ctxlab.model.generation import DecodingConfig, generate
from ctxlab.model.transformer import Transformer
from ctxlab.train.answers import Labels, answer_freely, answer_labels, task_validation
from tests.model.builders import VOCAB, build, tokens

CPU = torch.device("cpu")
# A rotary scheme, two with a bias, one of both kinds of layer.
SCHEMES = ("rope", "alibi", "t5", "rope_nope")


def ragged(count: int = 13, *, seed: int = 0) -> list[Row]:
    """Rows of 3 to 20 random tokens, a third of their places labelled and one at least."""
    draw = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        n = int(draw.integers(3, 21))
        targets = np.where(draw.random(n) < 1 / 3, draw.integers(0, VOCAB, n), IGNORED)
        targets[int(draw.integers(n))] = draw.integers(0, VOCAB)
        rows.append(Row(draw.integers(0, VOCAB, n), targets, ()))
    return rows


def with_some_right(model: Transformer, rows: list[Row]) -> list[Row]:
    """The rows with every other label replaced by what the model says there."""
    changed = []
    for row in rows:
        targets = row.targets.copy()
        said = model(torch.from_numpy(row.tokens)[None])[0].argmax(-1).numpy()
        places = np.flatnonzero(targets != IGNORED)[::2]
        targets[places] = said[places]
        changed.append(Row(row.tokens, targets, ()))
    return changed


def one_by_one(model: Transformer, rows: list[Row]) -> Labels:
    """Labels, right ones and nats of each row, place after place in float64 from the row's own logits."""
    found = []
    for row in rows:
        logits = model(torch.from_numpy(row.tokens)[None])[0].double()
        labels = right = 0
        nats = 0.0
        for place, target in enumerate(row.targets.tolist()):
            if target != IGNORED:
                labels += 1
                right += int(logits[place].argmax()) == target
                nats -= float(logits[place].log_softmax(-1)[target])
        found.append((labels, right, nats))
    return Labels(*np.array(found, dtype=float).T)


score: Any = functools.partial(answer_labels, pad_id=0, device=CPU, precision="fp32")


@torch.no_grad()
@pytest.mark.parametrize("position", SCHEMES)
@pytest.mark.parametrize("batch_tokens", [1, 45, 100_000])
def test_labelled_places_are_scored_as_row_by_row(position: str, batch_tokens: int) -> None:
    model = build(position).double()
    rows = with_some_right(model, ragged())
    expected = one_by_one(model, rows)
    told: list[int] = []
    found = score(model, rows, batch_tokens=batch_tokens, advance=told.append)
    assert np.array_equal(found.labels, expected.labels)
    assert np.array_equal(found.right, expected.right)
    assert 0 < found.right.sum() < found.labels.sum()
    np.testing.assert_allclose(found.nats, expected.nats, rtol=2e-6)  # of fp32 logits
    assert sum(told) == len(rows)
    assert max(told) <= {1: 1, 45: 15, 100_000: 13}[batch_tokens]


@torch.no_grad()
def test_parts_over_ranks_add_up() -> None:
    model = build()
    rows = with_some_right(model, ragged(17))
    whole = score(model, rows, batch_tokens=45)
    for world in (2, 3, 50):
        parts = [score(model, rows, batch_tokens=45, part=(rank, world)) for rank in range(world)]
        assert np.array_equal(np.sum(parts, axis=0), whole)
        scored = np.array([part.labels > 0 for part in parts])
        assert (scored.sum(axis=0) == 1).all(), "every row by one rank"


@torch.no_grad()
def test_more_labels_than_logits_exist_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build()
    rows = ragged()
    whole = score(model, rows, batch_tokens=100_000)
    monkeypatch.setattr("ctxlab.train.answers._LOGITS", 7)
    pieces = score(model, rows, batch_tokens=100_000)
    for one, other in zip(whole, pieces, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6)


def one_prompt(model: Transformer, prompt: list[int], most: int, stop: int) -> list[int]:
    config = DecodingConfig(temperature=0.0, max_new_tokens=most)
    return list(generate(model, prompt, config, stop_ids=[stop]))


@pytest.mark.parametrize("position", SCHEMES)
@pytest.mark.parametrize("batch_tokens", [1, 60, 100_000])
def test_generation_is_that_of_one_prompt_at_a_time(position: str, batch_tokens: int) -> None:
    model = build(position, context=16)
    prompts = [tokens(1, n, seed=number)[0].tolist() for number, n in enumerate((5, 9, 5, 20, 9, 5, 1))]
    most = [6, 4, 6, 12, 7, 3, 9]
    free = [one_prompt(model, prompt, n, -1) for prompt, n in zip(prompts, most, strict=True)]
    stop = free[0][2]  # some are stopped, others not
    expected = [one_prompt(model, prompt, n, stop) for prompt, n in zip(prompts, most, strict=True)]
    assert {len(ids) for ids in expected} - set(most)
    assert [len(ids) for ids in free] == most
    told: list[int] = []
    said = answer_freely(
        model, prompts, most, stop_id=stop, device=CPU, precision="fp32", batch_tokens=batch_tokens, advance=told.append
    )
    assert said == expected
    assert sum(told) == len(prompts)


def freely(model: Transformer, prompts: torch.Tensor, n_new: int) -> list[list[int]]:
    return answer_freely(
        model, prompts.tolist(), [n_new] * len(prompts), stop_id=-1, device=CPU, precision="fp32", batch_tokens=100
    )


@pytest.mark.parametrize(("n_new", "defined"), [(4, True), (5, False)])
def test_learned_positions_end_with_the_trained_context(n_new: int, defined: bool) -> None:
    """8 positions: behind a prompt of 5, position 7 is read for the 4th token and position 8 would be for the 5th."""
    model = build("learned", context=8)
    prompts = tokens(2, 5)
    if defined:
        assert freely(model, prompts, n_new) == [one_prompt(model, prompt, n_new, -1) for prompt in prompts.tolist()]
        return
    with pytest.raises(UndefinedBeyondTraining, match="position 8: learned positions are defined up to 7 only"):
        freely(model, prompts, n_new)
    with pytest.raises(UndefinedBeyondTraining):
        score(model, [Row(np.zeros(9, dtype=int), np.zeros(9, dtype=int), ())], batch_tokens=99)


# Validation during training


def numbers(name: str, **settings: Any) -> TaskDataset:
    return prepare_task(SOURCES.get(name).Config(name=name, **settings), Ids.Config())


@torch.no_grad()
@pytest.mark.parametrize(("name", "settings"), [("task/mqar", {"pairs": (3,)}), ("task/copy", {"symbols": 2})])
def test_validation_is_of_places_where_there_are_many_questions_and_of_answers_where_there_is_one(
    name: str, settings: dict[str, Any]
) -> None:
    data = numbers(name, **settings)
    model = build(vocab_size=data.tokenizer.vocab_size, context=16)
    validation = task_validation(data, 16, max_tokens=16 * 9, precision="fp32")
    rows = [data.row("validation", 16, (index,), None) for index in range(9)]
    validation.rows = with_some_right(model, rows[:4]) + [
        Row(row.tokens, torch.where(torch.from_numpy(row.targets) == IGNORED, IGNORED, said).numpy(), ())
        for row in rows[4:]
        for said in [model(torch.from_numpy(row.tokens)[None])[0].argmax(-1)]
    ]
    expected = one_by_one(model, validation.rows)
    model.train()
    found = validation(SimpleNamespace(global_rank=0, world_size=1), model, CPU)  # type: ignore[arg-type]
    assert model.training
    assert found["nats_per_token"] == pytest.approx(expected.nats.sum() / expected.labels.sum(), rel=1e-5)
    of_places, of_rows = expected.right.sum() / expected.labels.sum(), np.mean(expected.right == expected.labels)
    assert of_rows >= 5 / 9
    assert of_places != of_rows
    assert found["accuracy"] == pytest.approx(of_rows if name == "task/copy" else of_places, abs=1e-12)


def test_validation_is_of_the_same_examples_in_every_run_and_of_none_that_is_tested() -> None:
    data = numbers("task/mqar", pairs=(3,))
    one, other = (task_validation(data, 16, max_tokens=n, precision="fp32").rows for n in (16 * 4, 16 * 4 + 15))
    assert [row.tokens.tolist() for row in one] == [row.tokens.tolist() for row in other]
    tested = [data.row("test", 16, (index,), None).tokens.tolist() for index in range(4)]
    assert not any(row.tokens.tolist() in tested for row in one)
    assert len(task_validation(data, 16, max_tokens=1, precision="fp32").rows) == 1
