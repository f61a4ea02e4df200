"""The order of pairs: every pair once an epoch, equal tokens a batch, the same for any number of processes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ctxlab.data.by_length import LengthOrder, even_parts
from ctxlab.data.pairs.dataset import Pairs
from ctxlab.data.pairs.stream import PairOrder, PairStream
from ctxlab.data.sides import Side
from ctxlab.data.windows import IGNORED
from ctxlab.errors import DataError

PAD = 0


def side(sizes: np.ndarray, seed: int) -> Side:
    starts = np.concatenate([[0], np.cumsum(sizes)])
    return Side(np.random.default_rng(seed).integers(1, 99, starts[-1]), starts)


def pairs(n: int = 700, seed: int = 0) -> Pairs:
    random = np.random.default_rng(seed)
    return Pairs("train", side(random.integers(1, 30, n), 1), side(random.integers(2, 30, n), 2))


def order(longest: int = 64, batch_tokens: int = 500, seed: int = 3) -> PairOrder:
    return PairOrder(pairs(), batch_tokens=batch_tokens, seed=seed, longest=longest)


def test_an_epoch_has_every_pair_once() -> None:
    made = order()
    epochs = [
        np.concatenate([made.batch(epoch * made.n_batches + k) for k in range(made.n_batches)]) for epoch in range(3)
    ]
    for found in epochs:
        assert sorted(found.tolist()) == list(range(700))
    assert not np.array_equal(epochs[0], epochs[1])
    assert {frozenset(made.batch(k).tolist()) for k in range(made.n_batches)} != {
        frozenset(made.batch(made.n_batches + k).tolist()) for k in range(made.n_batches)
    }  # not only in another order: cut in another way


def test_batches_have_equal_tokens_and_like_lengths() -> None:
    made = order()
    data = pairs()
    tokens = data.source.sizes + data.target.sizes - 1
    filled = sorted(int(tokens[made.batch(k)].sum()) for k in range(made.n_batches))
    assert all(abs(count - 500) <= tokens.max() for count in filled[1:]), "all but the epoch's last"
    spread = [np.ptp(tokens[made.batch(k)]) for k in range(made.n_batches)]
    assert np.mean(spread) < 0.35 * np.ptp(tokens)


def test_both_sides_of_a_batch_have_like_lengths() -> None:
    """Of what is padded where only their sum counts, less than half is left."""
    data, made = pairs(), order()
    sides = np.stack([data.source.sizes, data.target.sizes - 1])
    by_sum = LengthOrder(sides.sum(0), np.arange(data.n), batch_tokens=500, seed=3)
    padding = []
    for one in (made, by_sum):
        batches = [one.batch(k) for k in range(one.n_batches)]
        assert sum(map(len, batches)) == data.n
        padding.append(sum(len(batch) * sides[:, batch].max(1).sum() for batch in batches) - sides.sum())
    assert 0 < padding[0] < 0.5 * padding[1]


def test_a_batch_is_a_function_of_seed_and_number() -> None:
    first, again, other = order(), order(), order(seed=4)
    for k in (0, 5, 60, 3):
        assert np.array_equal(first.batch(k), again.batch(k))
    assert any(not np.array_equal(first.batch(k), other.batch(k)) for k in range(4))


def test_long_pairs_are_left_out() -> None:
    data = pairs()
    kept = (data.source.sizes <= 12) & (data.target.sizes - 1 <= 12)
    made = order(longest=12)
    found = np.concatenate([made.batch(k) for k in range(made.n_batches)])
    assert sorted(found.tolist()) == np.flatnonzero(kept).tolist()
    shortest = int(np.maximum(data.source.sizes, data.target.sizes - 1).min())
    if shortest > 1:
        with pytest.raises(DataError, match=f"the nearest valid value is {shortest}"):
            order(longest=shortest - 1)


@pytest.mark.parametrize(("world", "n_micro"), [(1, 1), (2, 1), (3, 2)])
def test_ranks_and_micro_batches_share_a_step(world: int, n_micro: int) -> None:
    data, made = pairs(), order(batch_tokens=200)
    for step in range(5):
        rows = []
        for rank in range(world):
            stream = PairStream(made, n_steps=9, n_micro=n_micro, rank=rank, world=world, pad_id=PAD)
            assert stream.first_of(step) == step * n_micro
            for micro in range(n_micro):
                batch = stream[step * n_micro + micro]
                assert batch.source is not None
                assert batch.source_lengths is not None
                for row in range(len(batch.tokens)):
                    scored = batch.targets[row] != IGNORED
                    if scored.any():
                        assert int(scored.sum()) == int(batch.lengths[row])
                        n, m = int(batch.lengths[row]), int(batch.source_lengths[row])
                        assert torch.equal(batch.tokens[row, 1:n], batch.targets[row, : n - 1])
                        assert (batch.tokens[row, n:] == PAD).all()
                        assert (batch.source[row, m:] == PAD).all()
                        rows.append((batch.source[row, :m].tolist(), batch.tokens[row, :n].tolist()))
                assert batch.n_targets_in_step == int((data.target.sizes[made.batch(step)] - 1).sum())
        expected = [
            (data.source.sentence(int(i)).tolist(), data.target.sentence(int(i))[:-1].tolist())
            for i in made.batch(step)
        ]
        assert sorted(rows) == sorted(expected)


def test_a_batch_smaller_than_the_world_leaves_ranks_with_nothing_to_score(tmp_path: Path) -> None:
    made = order(batch_tokens=20)
    streams = [PairStream(made, n_steps=9, rank=rank, world=8, pad_id=PAD) for rank in range(8)]
    scored = [int((stream[2].targets != IGNORED).sum()) for stream in streams]
    assert sum(scored) == streams[0][2].n_targets_in_step
    assert 0 in scored


def test_no_batch_is_empty() -> None:
    """Where pairs are longer than a batch, and where the epoch's last tokens hold no pair's beginning."""
    for batch_tokens in (3, 20, 57, 499):
        made = order(batch_tokens=batch_tokens)
        batches = [made.batch(k) for k in range(made.n_batches)]
        assert all(len(batch) for batch in batches)
        assert set(np.concatenate(batches).tolist()) == set(range(700))


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=0, max_size=60), st.integers(1, 120))
def test_parts_that_are_read_together_fill_what_they_may_and_no_more(sizes: list[int], most: int) -> None:
    rising = np.sort(np.array(sizes, dtype=np.int64))
    parts = list(even_parts(np.arange(len(rising)), rising, most))
    assert [int(n) for part in parts for n in part] == list(range(len(rising)))
    for part, after in zip(parts, [*parts[1:], None]):
        assert len(part) == 1 or len(part) * rising[part[-1]] <= most
        if after is not None:  # not one more would have had room
            assert (len(part) + 1) * rising[after[0]] > most
