"""The shuffle: a permutation for any size and key, equal to its definition in Python's integers, and even."""

from __future__ import annotations

import hashlib
import itertools
import struct
from collections import Counter
from collections.abc import Iterable

import numpy as np
import pytest

from ctxlab.data.permutation import permute, uniform

_WORD = (1 << 64) - 1


def naive_keys(key: tuple[int, ...]) -> list[int]:
    return list(struct.unpack("<6Q", hashlib.blake2b(repr(key).encode(), digest_size=48).digest()))


def naive_mix(x: int) -> int:
    """splitmix64's finalizer."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & _WORD
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & _WORD
    return x ^ (x >> 31)


def naive_place(index: int, n: int, key: tuple[int, ...]) -> int:
    """One index through six Feistel rounds over the smallest 2k bits that hold n, again while it is not below n."""
    half = next(k for k in itertools.count(1) if 4**k >= n)
    while True:
        left, right = divmod(index, 2**half)
        for word in naive_keys(key):
            left, right = right, left ^ naive_mix((right + word) & _WORD) % 2**half
        index = left * 2**half + right
        if index < n:
            return index


def chi_square(draws: Iterable[object], kinds: int) -> float:
    counts = Counter(draws)
    assert len(counts) == kinds
    expected = counts.total() / kinds
    return sum((count - expected) ** 2 for count in counts.values()) / expected


def bound(kinds: int) -> float:
    """Five standard deviations above the mean of a chi-square with `kinds` - 1 degrees of freedom."""
    return kinds - 1 + 5 * (2 * (kinds - 1)) ** 0.5


def test_every_place_is_taken_once_for_every_small_size() -> None:
    for n in range(1, 201):
        assert sorted(permute(np.arange(n), n, 7, n % 3).tolist()) == list(range(n))


@pytest.mark.parametrize("n", [2**16, 2**20 + 1, 2**31 - 1, 10**12, 2**40])
def test_no_two_share_a_place_in_large_sizes(n: int) -> None:
    indices = np.unique(np.random.default_rng(0).integers(n, size=20_000))
    places = permute(indices, n, 1)
    assert len(set(places.tolist())) == len(indices)
    assert 0 <= places.min() <= places.max() < n


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 16, 17, 1000, 65_537, 10**9 + 7, 10**12])
def test_places_are_those_of_the_definition(n: int) -> None:
    indices = np.unique(np.random.default_rng(n).integers(n, size=40))
    for key in [(0,), (3, 0, 11), (2**40, 5)]:
        assert permute(indices, n, *key).tolist() == [naive_place(int(index), n, key) for index in indices]


def test_together_as_one_by_one_and_in_any_order() -> None:
    indices = np.random.default_rng(1).permutation(777)[:300]
    before = indices.copy()
    together = permute(indices, 777, 5)
    assert together.tolist() == [permute(np.array([index]), 777, 5)[0] for index in indices]
    assert (indices == before).all()
    assert permute(np.arange(0), 777, 5).tolist() == []


def test_keys_that_differ_shuffle_differently() -> None:
    keys = [(seed, epoch) for seed in range(30) for epoch in range(3)] + [(seed,) for seed in range(30)]
    keys += [(1, 23), (12, 3), (1, 2, 3), (123,)]
    assert len({tuple(permute(np.arange(100), 100, *key)) for key in keys}) == len(keys)


@pytest.mark.parametrize("n", [7, 16, 30])
def test_one_index_is_as_often_at_every_place(n: int) -> None:
    draws = (int(permute(np.array([n // 2]), n, key)[0]) for key in range(100 * n))
    assert chi_square(draws, n) < bound(n)


def test_two_indices_are_as_often_at_every_pair_of_places() -> None:
    draws = (tuple(permute(np.array([0, 1]), 6, key).tolist()) for key in range(3000))
    assert chi_square(draws, 30) < bound(30)


def test_neighbours_are_not_kept_together() -> None:
    """In a random permutation of n a step to the next place happens for (n - 1) / n neighbours on average."""
    places = [permute(np.arange(500), 500, key) for key in range(200)]
    kept = sum(int((np.diff(each) == 1).sum()) for each in places) / 200
    assert abs(kept - 499 / 500) < 5 * (1 / 200) ** 0.5  # close to Poisson with mean 1


def test_uniform_is_in_range_even_and_a_function_of_the_index() -> None:
    indices = np.arange(13_000)
    drawn = uniform(indices, np.full(13_000, 13), 4, 2)
    assert chi_square(drawn.tolist(), 13) < bound(13)
    one_by_one = [uniform(np.array([index]), np.array([13]), 4, 2)[0] for index in indices[:50]]
    assert drawn[:50].tolist() == one_by_one
    mixed = [naive_mix(index + naive_keys((4, 2))[0] & _WORD) for index in range(50)]
    assert drawn[:50].tolist() == [(word >> 11) * 13 >> 53 for word in mixed]  # the top 53 bits as a share of 13


def test_uniform_stays_below_each_of_its_bounds() -> None:
    bounds = np.resize([1, 2, 3, 1000, 2**31, 2**40 + 1], 6000)
    drawn = uniform(np.arange(6000), bounds, 9)
    assert ((drawn >= 0) & (drawn < bounds)).all()
    assert (drawn[bounds == 1] == 0).all()
    assert set(drawn[bounds == 3]) == {0, 1, 2}
