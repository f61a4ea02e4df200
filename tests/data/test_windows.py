"""Rows: every token read where it should be, against rules applied position by position to ids that are positions."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ctxlab.data.windows import IGNORED, EvalSegments, Packed, Row, Windows, longest_length
from ctxlab.errors import DataError
from tests.data.builders import ramp

SIZES = st.lists(st.integers(2, 60), min_size=1, max_size=12)
SEEDS = st.integers(0, 2**32)
QUICK = settings(deadline=None, max_examples=100, database=None)


def owners(sizes: list[int]) -> np.ndarray:
    """The document of every position."""
    return np.repeat(np.arange(len(sizes)), sizes)


def scored(rows: list[Row]) -> int:
    return sum(int((row.targets != IGNORED).sum()) for row in rows)


@given(
    sizes=st.lists(st.integers(1, 60), min_size=1, max_size=12), data=st.data(), seed=SEEDS, epoch=st.integers(0, 99)
)
@QUICK
def test_windows_take_every_target_at_most_once_and_stay_in_their_document(
    sizes: list[int], data: st.DataObject, seed: int, epoch: int
) -> None:
    if max(sizes) < 2:
        sizes = [*sizes, 2]
    context = data.draw(st.integers(1, max(sizes) - 1))
    owner, firsts = owners(sizes), np.cumsum([0, *sizes])
    windows = Windows(ramp(sizes), context, seed)
    rows = [windows.row(index, epoch) for index in range(windows.n)]
    for row in rows:
        assert row.tokens.tolist() == list(range(row.tokens[0], row.tokens[0] + len(row.tokens)))
        assert row.targets.tolist() == [token + 1 for token in row.tokens]
        assert len({*owner[row.tokens], *owner[row.targets]}) == 1
        assert row.segments == ()
    targets = [target for row in rows for target in row.targets.tolist()]
    assert len(targets) == len(set(targets))
    for document, size in enumerate(sizes):
        mine = [row for row in rows if owner[row.tokens[0]] == document]
        n = size - 1  # targets that the document has
        expected = [context] * (n // context) if n >= context else [n] * (n > 0)
        assert [len(row.tokens) for row in mine] == expected
        if mine:  # one behind the other, in order, with what is left over before the first and behind the last
            assert [row.tokens[0] - mine[0].tokens[0] for row in mine] == [k * context for k in range(len(mine))]
            assert mine[0].tokens[0] - firsts[document] <= n - sum(expected)
    chosen = np.array(data.draw(st.lists(st.integers(0, windows.n - 1), max_size=9)), dtype=np.int64)
    assert windows.n_targets(chosen, np.full(len(chosen), epoch)) == scored([rows[index] for index in chosen])


def test_what_is_left_over_is_shared_out_anew_in_every_epoch() -> None:
    windows = Windows(ramp([30, 28]), 10, 0)  # 29 and 27 targets: 9 and 7 are left over
    firsts = [[int(windows.row(index, epoch).tokens[0]) for index in (0, 2)] for epoch in range(200)]
    assert {first for first, _ in firsts} == set(range(10))
    assert {second - 30 for _, second in firsts} == set(range(8))
    assert max(Counter(first for first, _ in firsts).values()) < 45  # 20 expected
    assert len(set(map(tuple, firsts))) > 70  # of 80: each document by itself
    last = max(int(windows.row(3, epoch).targets[-1]) for epoch in range(200))
    assert last == 57  # the very last token is a target of some epochs


def test_a_window_is_the_same_every_time_it_is_read() -> None:
    one, again = (Windows(ramp([500] * 20), 32, 7) for _ in range(2))
    for index in (0, 17, one.n - 1):
        assert one.row(index, 5).tokens.tolist() == again.row(index, 5).tokens.tolist()


def test_a_context_longer_than_every_document_is_refused_with_the_longest() -> None:
    split = ramp([9, 33, 12])
    with pytest.raises(
        DataError,
        match=r"^context: 33 is longer than every document of the train split; the nearest valid value is 32, or pack "
        r"documents with data\.packed=true$",
    ):
        Windows(split, 33, 0)
    assert Windows(split, 32, 0).n == 3


@given(sizes=SIZES, data=st.data(), seed=SEEDS, epoch=st.integers(0, 99))
@QUICK
def test_packed_rows_are_the_text_in_pieces_of_documents(
    sizes: list[int], data: st.DataObject, seed: int, epoch: int
) -> None:
    total, owner = sum(sizes), owners(sizes)
    context = data.draw(st.integers(1, total // 2))
    packed = Packed(ramp(sizes), context, seed)
    rows = [packed.row(index, epoch) for index in range(packed.n)]
    phase = int(rows[0].tokens[0])
    assert 0 <= phase < context
    assert [token for row in rows for token in row.tokens] == list(range(phase, phase + packed.n * context))
    assert (packed.n + 1) * context <= total < (packed.n + 2) * context
    for row in rows:
        assert len(row.tokens) == context
        follows = [token + 1 < total and owner[token] == owner[token + 1] for token in row.tokens]
        assert row.targets.tolist() == [t + 1 if same else IGNORED for t, same in zip(row.tokens, follows)]
        assert row.segments == tuple(len(list(piece)) for _, piece in itertools.groupby(owner[row.tokens]))
    chosen = np.array(data.draw(st.lists(st.integers(0, packed.n - 1), max_size=9)), dtype=np.int64)
    assert packed.n_targets(chosen, np.full(len(chosen), epoch)) == scored([rows[index] for index in chosen])


def test_the_very_last_row_ends_with_the_last_token_as_target() -> None:
    packed = Packed(ramp([4, 6, 6]), 4, 0)  # 16 tokens, three rows of 4 and a phase of 0 to 3
    ends = {int(packed.row(2, epoch).tokens[0]) - 8: packed.row(2, epoch) for epoch in range(60)}
    assert sorted(ends) == [0, 1, 2, 3]
    assert ends[3].targets.tolist() == [12, 13, 14, 15]
    assert ends[3].segments == (4,)
    assert ends[1].targets.tolist() == [IGNORED, 11, 12, 13]  # token 9 is the last of its document
    assert ends[1].segments == (1, 3)


def test_rows_of_several_epochs_are_counted_each_by_its_own_phase() -> None:
    packed = Packed(ramp([3, 5, 2, 9, 4] * 6), 7, 3)
    indices, epochs = np.arange(packed.n).repeat(9), np.tile(np.arange(9), packed.n)
    assert len({int(packed.row(0, epoch).tokens[0]) for epoch in range(9)}) > 3
    expected = scored([packed.row(int(index), int(epoch)) for index, epoch in zip(indices, epochs)])
    assert packed.n_targets(indices, epochs) == expected


def test_too_few_tokens_for_a_packed_row_are_refused() -> None:
    split = ramp([7, 8])
    with pytest.raises(DataError, match=r"^context: the train split has 15 tokens, .* nearest valid value is 7$"):
        Packed(split, 8, 0)
    assert Packed(split, 7, 0).n == 1


def all_segments(segments: EvalSegments) -> list[tuple[int, list[int]]]:
    return [(document, ids.tolist()) for document, ids in map(segments.segment, range(segments.n))]


@given(sizes=st.lists(st.integers(1, 60), min_size=1, max_size=12), length=st.integers(1, 30))
@QUICK
def test_segments_take_each_target_once_from_the_first_on(sizes: list[int], length: int) -> None:
    firsts = np.cumsum([0, *sizes]).tolist()
    expected = [
        (document, list(range(start, start + length + 1)))
        for document, size in enumerate(sizes)
        for start in range(firsts[document], firsts[document] + size - length, length)
    ]
    assert all_segments(EvalSegments(ramp(sizes), length)) == expected


@given(sizes=st.lists(st.integers(1, 60), min_size=1, max_size=12), length=st.integers(1, 9), most=st.integers(0, 40))
@QUICK
def test_a_part_of_the_segments_is_as_many_from_each_document(sizes: list[int], length: int, most: int) -> None:
    whole = all_segments(EvalSegments(ramp(sizes), length))
    part = all_segments(EvalSegments(ramp(sizes), length, max_segments=most))
    assert len(part) == min(most, len(whole))
    assert all(segment in whole for segment in part)
    assert [ids[0] for _, ids in part] == sorted({ids[0] for _, ids in part})  # in order, none twice
    have = Counter(document for document, _ in whole)
    took = Counter(document for document, _ in part)
    for document, count in have.items():  # who has more to give gives at least as many as the rest, but one
        assert took[document] == count or took[document] >= max(took.values(), default=0) - 1
    for document, count in took.items():
        starts = [ids for where, ids in whole if where == document]
        spread = [starts[k * have[document] // count] for k in range(count)]
        assert [ids for where, ids in part if where == document] == spread


def test_the_remainder_is_spread_over_the_documents() -> None:
    part = EvalSegments(ramp([41] * 10), 10, max_segments=15)  # four segments a document
    assert Counter(document for document, _ in all_segments(part)) == {d: 1 + (d % 2 == 0) for d in range(10)}


@given(sizes=SIZES, lengths=st.lists(st.integers(1, 60), max_size=6), least=st.integers(1, 5))
@QUICK
def test_the_longest_length_that_enough_documents_fill(sizes: list[int], lengths: list[int], least: int) -> None:
    filled = [n for n in sorted(lengths) if len([size for size in sizes if size > n]) >= least]
    assert longest_length(ramp(sizes), lengths, min_docs=least) == (filled[-1] if filled else None)
