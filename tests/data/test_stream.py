"""The stream of batches: one order, however many ranks, rows at once, loader processes and interruptions share it."""

from __future__ import annotations

import itertools
import tracemalloc
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from ctxlab.data.permutation import permute
from ctxlab.data.stream import Batch, Stage, TrainStream, train_loader
from ctxlab.data.tokens import Split
from ctxlab.data.windows import IGNORED, Packed, Windows
from ctxlab.errors import DataError
from tests.data.builders import Ramp, ramp

SIZES = [40, 7, 90, 3, 25, 61, 18, 33, 5, 77]  # some shorter than the contexts below
STAGES = (Stage(8, 8, 8, 6), Stage(16, 4, 4, 7), Stage(8, 8, 8, 6))
PAD = 999

Rows = list[tuple[list[int], list[int], list[int]]]  # tokens, targets, segments


def stream(stages: Sequence[Stage] = STAGES, seed: int = 3, packed: bool = False, **options: Any) -> TrainStream:
    rows = Packed if packed else Windows
    split = ramp(SIZES)
    return TrainStream(
        lambda context: rows(split, context, seed), seed=seed, stages=tuple(stages), pad_id=PAD, **options
    )


def unpadded(batch: Batch) -> Rows:
    """The rows of a batch, after a look at what is behind them."""
    rows = []
    for number, length in enumerate(batch.lengths.tolist()):
        assert (batch.tokens[number, length:] == PAD).all()
        assert (batch.targets[number, length:] == IGNORED).all()
        segments = [] if batch.segments is None else batch.segments[number]
        rows.append((batch.tokens[number, :length].tolist(), batch.targets[number, :length].tolist(), segments))
    assert batch.tokens.shape == batch.targets.shape == (len(rows), max(batch.lengths))
    assert (batch.tokens.dtype, batch.targets.dtype) == (torch.int64, torch.int64)
    return rows


def step_rows(streams: Sequence[TrainStream], step: int) -> Rows:
    """The rows of one step over all ranks, rank by rank."""
    rows: Rows = []
    for one in streams:
        first = one.first_of(step)
        for number in range(first, first + one.micro_batches(step)):
            rows += unpadded(one[number])
    return rows


def ranks(world: int, micro_rows: int, **options: Any) -> list[TrainStream]:
    stages = [replace(stage, micro_rows=micro_rows) for stage in STAGES]
    return [stream(stages, rank=rank, world=world, **options) for rank in range(world)]


def identity(row: tuple[list[int], list[int], list[int]], context: int) -> tuple[int, int]:
    """A window by its document and its number in it, wherever the epoch has shifted it to."""
    firsts = np.cumsum([0, *SIZES])
    document = int(np.searchsorted(firsts, row[0][0], side="right")) - 1
    return document, (row[0][0] - int(firsts[document])) // context


@pytest.mark.parametrize("packed", [False, True])
def test_batches_are_the_places_of_an_endless_sequence(packed: bool) -> None:
    one, kind = stream(packed=packed), Packed if packed else Windows
    step, first = 0, 0
    for stage in STAGES:
        rows = kind(ramp(SIZES), stage.context, 3)
        place = 0
        for _ in range(stage.steps):
            expected = []
            for _ in range(stage.rows):
                epoch, index = divmod(place, rows.n)
                place += 1
                row = rows.row(int(permute(np.array([index]), rows.n, 3, first, epoch)[0]), epoch)
                expected.append((row.tokens.tolist(), row.targets.tolist(), list(row.segments)))
            assert step_rows([one], step) == expected
            step += 1
        assert place > rows.n  # more than an epoch, and batches that two epochs share
        first = step


@pytest.mark.parametrize(("world", "micro_rows"), [(1, 1), (1, 2), (2, 1), (2, 2), (4, 1)])
@pytest.mark.parametrize("packed", [False, True])
def test_ranks_and_micro_batches_put_together_are_the_batch(world: int, micro_rows: int, packed: bool) -> None:
    whole, parts = stream(packed=packed), ranks(world, micro_rows, packed=packed)
    for step in range(whole.n_steps):
        assert step_rows(parts, step) == step_rows([whole], step)
        assert len(step_rows(parts[:1], step)) * world == len(step_rows([whole], step))


@pytest.mark.parametrize("packed", [False, True])
def test_every_micro_batch_says_the_targets_of_its_whole_step(packed: bool) -> None:
    parts = ranks(2, 2, packed=packed)
    counts = set()
    for step in range(parts[0].n_steps):
        n = sum(target != IGNORED for _, targets, _ in step_rows(parts, step) for target in targets)
        for one in parts:
            numbers = range(one.first_of(step), one.first_of(step) + one.micro_batches(step))
            assert {one[number].n_targets_in_step for number in numbers} == {n}
        counts.add(n)
    assert len(counts) > 1  # short documents and ends of documents make steps differ


def test_packed_batches_have_their_segments_and_others_have_none() -> None:
    assert stream()[0].segments is None
    batch = stream(packed=True)[0]
    assert batch.segments is not None
    assert [sum(segments) for segments in batch.segments] == [8] * 8


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("step", [0, 7, 18])
def test_a_loader_that_starts_later_goes_on_where_the_run_was(workers: int, step: int) -> None:
    one = ranks(2, 2)[1]
    whole = [one[number] for number in range(one.first_of(one.n_steps))]
    loaded = list(train_loader(one, step, workers))
    assert len(loaded) == len(whole) - one.first_of(step) > 0
    for batch, expected in zip(loaded, whole[one.first_of(step) :]):
        assert unpadded(batch) == unpadded(expected)
        assert batch.n_targets_in_step == expected.n_targets_in_step


def test_micro_batches_are_numbered_through_the_stages() -> None:
    one = ranks(2, 2)[0]  # 4, 2 and 4 rows a rank and step, two at once
    assert one.n_steps == 19
    assert [one.micro_batches(step) for step in (0, 5, 6, 12, 13, 18)] == [2, 2, 1, 1, 2, 2]
    assert [one.first_of(step) for step in (0, 1, 6, 7, 13, 14, 19)] == [0, 2, 12, 13, 19, 21, 31]
    with pytest.raises(IndexError):
        one[31]


def test_a_run_that_only_the_clock_ends_can_be_loaded() -> None:
    one = stream([Stage(8, 4, 4, 1 << 40)])
    loaded = list(itertools.islice(train_loader(one, (1 << 39) + 5, 0), 2))
    assert [unpadded(batch) for batch in loaded] == [unpadded(one[(1 << 39) + 5]), unpadded(one[(1 << 39) + 6])]


def test_an_epoch_visits_every_window_once_and_no_epoch_is_like_another() -> None:
    n = Windows(ramp(SIZES), 8, 3).n
    one = stream([Stage(8, 1, 1, 4 * n)])
    visits = [identity(row, 8) for step in range(4 * n) for row in step_rows([one], step)]
    epochs = [visits[start : start + n] for start in range(0, 4 * n, n)]
    for epoch in epochs:
        assert Counter(epoch) == {
            (document, k): 1 for document, size in enumerate(SIZES) for k in range(max((size - 1) // 8, 1))
        }
    assert len(set(map(tuple, epochs))) == 4


def test_a_stage_that_comes_back_has_an_order_of_its_own() -> None:
    one = stream()
    first, again = ([row for step in range(k, k + 6) for row in step_rows([one], step)] for k in (0, 13))
    assert [identity(row, 8) for row in first] != [identity(row, 8) for row in again]


def test_a_stage_is_the_same_whatever_is_read_at_once_before_it() -> None:
    other = stream([replace(STAGES[0], rows=2, micro_rows=1), STAGES[1], STAGES[2]])
    for step in range(6, 19):
        assert step_rows([other], step) == step_rows([stream()], step)


def test_the_seed_changes_the_order_and_not_what_is_read() -> None:
    n = Windows(ramp(SIZES), 8, 0).n
    orders = []
    for seed in range(6):
        one = stream([Stage(8, 1, 1, n)], seed=seed)
        orders.append(tuple(identity(row, 8) for step in range(n) for row in step_rows([one], step)))
    assert len(set(orders)) == 6
    assert len({tuple(sorted(order)) for order in orders}) == 1


def test_a_stage_longer_than_every_document_is_refused() -> None:
    with pytest.raises(DataError, match=r"context: 90 is longer than every document .* nearest valid value is 89"):
        stream([STAGES[0], Stage(90, 2, 1, 1)])


@pytest.mark.parametrize("packed", [False, True])
def test_ten_million_documents_cost_a_few_numbers_each(packed: bool) -> None:
    n, size, context = 10_000_000, 1000, 96
    rows = Packed if packed else Windows
    split = Split("train", Ramp(n * size), np.arange(n + 1) * size, ())  # type: ignore[arg-type]
    tracemalloc.start()
    try:
        one = TrainStream(lambda c: rows(split, c, 0), seed=0, stages=(Stage(context, 64, 64, 10**6),))
        kept, peak = tracemalloc.get_traced_memory()
        assert kept <= 4 * 8 * n
        assert peak <= 6 * 8 * n
        tracemalloc.reset_peak()
        batch = one[999_999]
        assert tracemalloc.get_traced_memory()[1] - kept < 1 << 20  # a batch is made without a pass over the documents
    finally:
        tracemalloc.stop()
    firsts = batch.tokens[:, 0]
    assert (batch.tokens == firsts[:, None] + torch.arange(context)).all()
    assert len(set((firsts // size).tolist())) == 64  # from all over the text
    assert int(firsts.max() - firsts.min()) > n * size // 2
    ends = (batch.tokens + 1) % size == 0  # last tokens of documents
    assert (batch.targets == torch.where(ends, IGNORED, batch.tokens + 1)).all()
    assert batch.n_targets_in_step == 64 * context - int(ends.sum())
    assert bool(ends.any()) == packed


def test_rows_in_order_go_through_documents_window_by_window() -> None:
    """Token ids are positions: a row goes on exactly where it begins with the token behind the last one of the step before."""
    rows = 3
    n = Windows(ramp(SIZES), 8, 3).n
    steps = n // rows  # of an epoch
    one = stream([Stage(8, rows, rows, 3 * steps)], in_order=True)
    firsts = set(np.cumsum([0, *SIZES]).tolist())
    orders, went_on = [], 0
    before: Rows = []
    for step in range(3 * steps):
        batch = one[step]
        assert batch.goes_on is not None
        now = unpadded(batch)
        for number, ((tokens, targets, _), goes_on) in enumerate(zip(now, batch.goes_on.tolist(), strict=True)):
            assert targets == [token + 1 for token in tokens]
            follows = bool(before) and tokens[0] == before[number][0][-1] + 1
            assert goes_on == (step % steps > 0 and follows and tokens[0] not in firsts)
            went_on += goes_on
        before = now
        orders.append([identity(row, 8) for row in now])
    assert went_on > steps
    epochs = [[window for order in orders[e * steps : (e + 1) * steps] for window in order] for e in range(3)]
    for epoch in epochs:
        assert len(set(epoch)) == len(epoch) == steps * rows  # no window twice, at most `rows` - 1 left out
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_ranks_and_micro_batches_share_the_rows_in_order() -> None:
    whole, parts = stream(in_order=True), ranks(2, 2, in_order=True)
    for step in range(whole.n_steps):
        (batch,) = (whole[number] for number in range(whole.first_of(step), whole.first_of(step + 1)))
        shared = [one[number] for one in parts for number in range(one.first_of(step), one.first_of(step + 1))]
        assert torch.cat([part.goes_on for part in shared]).equal(batch.goes_on)
        assert step_rows(parts, step) == step_rows([whole], step)


def test_more_rows_in_order_than_windows_are_refused() -> None:
    with pytest.raises(
        DataError, match=r"trainer\.batch_tokens: 64 rows in order of 8 tokens are more than the 4\d windows"
    ):
        stream([Stage(8, 64, 64, 1)], in_order=True)
