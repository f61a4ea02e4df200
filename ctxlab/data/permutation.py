"""A shuffle that is a function: the place of each number is computed, nothing is stored, any size is the same work."""

from __future__ import annotations

import hashlib

import numpy as np

_ROUNDS = 6


def permute(indices: np.ndarray, n: int, *key: int) -> np.ndarray:
    """The places of `indices` (int64, 0 <= i < n) under the permutation of range(n) that `key` names.

    A balanced Feistel network over the smallest even number of bits that holds n, with cycle walking: results >= n go
    through it again (Black and Rogaway 2002, Ciphers with Arbitrary Finite Domains, sections 4 and 5).
    """
    half = max(1, ((n - 1).bit_length() + 1) // 2)
    mask = np.uint64((1 << half) - 1)
    keys = _round_keys(key)
    places = _network(indices.astype(np.uint64), half, mask, keys)
    while (outside := places >= n).any():
        places[outside] = _network(places[outside], half, mask, keys)
    return places.astype(np.int64)


def uniform(indices: np.ndarray, bounds: np.ndarray, *key: int) -> np.ndarray:
    """For each index a number from 0 to its bound - 1 (bounds >= 1), a function of the index and the key."""
    (first, *_) = _round_keys(key)
    mixed = _mix(indices.astype(np.uint64) + first)
    return ((mixed >> np.uint64(11)).astype(np.float64) * 2.0**-53 * bounds).astype(np.int64)


def _network(values: np.ndarray, half: int, mask: np.uint64, keys: list[np.uint64]) -> np.ndarray:
    left, right = values >> np.uint64(half), values & mask
    for key in keys:
        left, right = right, left ^ (_mix(right + key) & mask)
    return (left << np.uint64(half)) | right


def _mix(x: np.ndarray) -> np.ndarray:
    """The finalizer of splitmix64 (Steele et al. 2014): every bit of x reaches every bit of the result."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _round_keys(key: tuple[int, ...]) -> list[np.uint64]:
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8 * _ROUNDS).digest()
    return [np.uint64(k) for k in np.frombuffer(digest, dtype="<u8")]
