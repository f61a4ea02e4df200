"""A task as training data: rows in any order and any number of times, by any number of processes; its facts; its numbers."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import numpy as np
import pytest

from ctxlab.data import windows
from ctxlab.data.source import SOURCES
from ctxlab.data.stream import Batch, Stage, TrainStream, train_loader
from ctxlab.data.tasks.base import DoesNotFit, TextTask
from ctxlab.data.tasks.dataset import TaskDataset, prepare_task
from ctxlab.data.tokenizers.base import load_tokenizer
from ctxlab.data.tokenizers.ids import Ids
from ctxlab.data.windows import IGNORED, Row
from ctxlab.errors import DataError
from tests.data.tasks.tools import needles


def numbers(name: str, **settings: Any) -> TaskDataset:
    return prepare_task(SOURCES.get(name).Config(name=name, **settings), Ids.Config())


def plain(row: Row) -> tuple[list[int], list[int]]:
    assert row.segments == ()
    return row.tokens.tolist(), row.targets.tolist()


def test_rows_are_the_same_whatever_was_read_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(windows, "_REMEMBERED", 5)
    data = numbers("task/copy", examples=9)
    places = [(index, epoch) for index in range(9) for epoch in range(3)]
    expected = {place: plain(data.row("train", 32, (4, *place), place[1])) for place in places}
    rows = data.rows(32, seed=4)
    assert rows.n == 9
    order = np.random.default_rng(0).permutation(places * 3).tolist()
    assert all(plain(rows.row(index, epoch)) == expected[index, epoch] for index, epoch in order)
    assert len({repr(row) for row in expected.values()}) > 20, "every epoch has rows of its own"


@pytest.mark.parametrize(
    ("name", "settings"), [("task/mqar", {"pairs": (1, 3)}), ("task/copy", {}), ("task/induction", {})]
)
def test_the_targets_that_are_counted_are_those_that_are_read(name: str, settings: dict[str, Any]) -> None:
    rows = numbers(name, **settings).rows(40, seed=1)
    indices, epochs = np.array([3, 0, 7, 3, 5]), np.array([0, 1, 1, 2, 0])
    n = rows.n_targets(indices, epochs)
    read = [rows.row(int(i), int(e)).targets for i, e in zip(indices, epochs, strict=True)]
    assert n == sum(int(np.count_nonzero(targets != -100)) for targets in read) > 0


def contents(batches: list[Batch]) -> list[tuple[Any, ...]]:
    return [(b.tokens.tolist(), b.targets.tolist(), b.lengths.tolist(), b.n_targets_in_step) for b in batches]


def stream(data: TaskDataset, rank: int = 0, world: int = 1, micro_rows: int = 8) -> TrainStream:
    stages = (Stage(16, 8, micro_rows, 3), Stage(32, 8, micro_rows, 4))
    rows_of = functools.partial(data.rows, seed=3)
    return TrainStream(rows_of, seed=3, stages=stages, rank=rank, world=world, pad_id=data.tokenizer.pad_id)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("step", [0, 2, 5])
def test_a_loader_with_any_workers_begins_where_it_is_told(workers: int, step: int) -> None:
    whole = stream(numbers("task/copy", examples=20))
    expected = contents([whole[number] for number in range(step, whole.n_steps)])
    assert contents(list(train_loader(stream(numbers("task/copy", examples=20)), step, workers))) == expected


@pytest.mark.parametrize(("world", "micro_rows"), [(2, 4), (2, 2), (4, 1)])
def test_ranks_put_together_read_the_batch(world: int, micro_rows: int) -> None:
    data = numbers("task/copy", examples=20)
    whole, parts = stream(data), [stream(data, rank, world, micro_rows) for rank in range(world)]
    lengths = set()
    for step in range(whole.n_steps):
        rows: list[tuple[list[int], list[int]]] = []
        for one in parts:
            for number in range(one.first_of(step), one.first_of(step) + one.micro_batches(step)):
                batch = one[number]
                assert batch.n_targets_in_step == whole[step].n_targets_in_step
                rows += [
                    (tokens[:n], targets[:n])
                    for tokens, targets, n in zip(batch.tokens.tolist(), batch.targets.tolist(), batch.lengths.tolist())
                ]
        batch = whole[step]
        assert batch.segments is None
        assert rows == [
            (tokens[:n], targets[:n])
            for tokens, targets, n in zip(batch.tokens.tolist(), batch.targets.tolist(), batch.lengths.tolist())
        ]
        assert sum(target != IGNORED for _, targets in rows for target in targets) == batch.n_targets_in_step
        lengths |= set(batch.lengths.tolist())
    assert len(lengths) > 4, "rows of a copy are of many lengths"


def test_a_later_epoch_that_does_not_fit_is_found_out_at_the_start() -> None:
    """16 pairs take 64 tokens; with 8 examples an epoch they come in the third step."""
    data = numbers("task/mqar", pairs=(2, 4, 16), examples=8)
    short = functools.partial(TrainStream, functools.partial(data.rows, seed=1), seed=1)
    reached = short(stages=(Stage(16, 8, 8, 2),))
    assert [reached[number].tokens.shape for number in range(2)] == [(8, 16)] * 2
    for stages in ((Stage(16, 8, 8, 3),), (Stage(16, 8, 8, 1 << 40),), (Stage(16, 8, 8, 3), Stage(64, 2, 2, 9))):
        with pytest.raises(DoesNotFit, match=r"mqar does not fit in 16 tokens.*at least 64"):
            short(stages=stages)


def test_rows_of_a_context_that_is_too_short_are_refused() -> None:
    with pytest.raises(DoesNotFit, match=r"induction does not fit in 31 tokens.*at least 32"):
        numbers("task/induction").rows(31, seed=1)


def test_every_setting_is_pinned_by_the_facts_except_how_batches_are_read() -> None:
    known: dict[str, str] = {}
    for name, settings in [
        ("task/mqar", {}), ("task/mqar", {"pairs": (4, 8)}), ("task/mqar", {"power": 0.5}), ("task/mqar", {"vocab_size": 64}),
        ("task/mqar", {"examples": 7}), ("task/copy", {}), ("task/reverse", {}), ("task/copy", {"symbols": 5}),
    ]:  # fmt: skip
        facts = numbers(name, **settings).facts
        known[facts["text_sha256"]] = name
        assert (facts["task"], facts["haystack"]) == (name, None)
        assert (
            facts["settings"].items()
            >= {k: list(v) if isinstance(v, tuple) else v for k, v in settings.items()}.items()
        )
        assert facts["tokenizer"]["name"] == "ids"
    assert len(known) == 8
    assert numbers("task/mqar", workers=3).facts == numbers("task/mqar").facts
    sizes = [numbers("task/copy", symbols=n).facts["tokenizer"] for n in (5, 6)]
    assert [size["vocab_size"] for size in sizes] == [10, 11], "symbols, separator, end, and pad, bos, eos"
    assert sizes[0]["sha256"] != sizes[1]["sha256"]


@pytest.mark.parametrize("scored", ["all", "answers"])
@pytest.mark.parametrize("part", ["train", "test"])
def test_a_row_of_a_text_task_is_bos_prompt_answer_eos(scored: str, part: Any) -> None:
    data = needles(scored=scored)
    tokenizer = data.tokenizer
    assert isinstance(data.task, TextTask)
    for index in range(6):
        row = data.row(part, 300, (index,), None)
        ids = [*row.tokens.tolist(), int(row.targets[-1])]
        assert (ids[0], ids[-1]) == (tokenizer.bos_id, tokenizer.eos_id)
        assert len(row.tokens) <= 300
        text = tokenizer.decode(ids[1:-1])
        prompt, _, answer = text.rpartition(" ")
        assert data.task.solve(prompt) == answer
        first = len(tokenizer.encode(prompt))  # place of the input whose target begins the answer
        whole = part == "train" and scored == "all"
        assert row.targets.tolist() == [i if whole or n >= first else IGNORED for n, i in enumerate(ids[1:])]


def test_ids_are_the_numbers_and_three_more(tmp_path: Any) -> None:
    ids = Ids(Ids.Config(), 34)
    assert (ids.pad_id, ids.bos_id, ids.eos_id, ids.vocab_size) == (34, 35, 36, 37)
    assert ids.encode("3 0  33\n7") == [3, 0, 33, 7]
    assert ids.decode([3, 0, 36, 33]) == "3 0 33 "
    assert ids.encode(ids.decode(list(range(34)))) == list(range(34))
    ids.save(tmp_path)
    again = load_tokenizer(tmp_path)
    assert isinstance(again, Ids)
    assert (again.size, again.sha256) == (34, ids.sha256)
    assert again.sha256 != Ids(Ids.Config(), 33).sha256


@pytest.mark.parametrize("word", ["34", "x", "-1", "1.5", "²"])
def test_what_is_no_number_of_the_task_is_refused(word: str) -> None:
    with pytest.raises(DataError, match=rf"tokenizer: expected numbers from 0 to 33, got '{word}'"):
        Ids(Ids.Config(), 34).encode(f"1 {word} 2")


def test_ids_learn_from_no_text() -> None:
    with pytest.raises(
        DataError, match="tokenizer: ids are for tasks in numbers; text needs unigram, bpe, byte or file"
    ):
        Ids.make(Ids.Config(), itertools.repeat("x"))
