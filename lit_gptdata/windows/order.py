"""The order of an epoch: what stands at position p of epoch e is a pure function of (seed, e, p).

EpochOrder(n=5, seed=0, epoch=0).at(np.arange(5))  ->  array([...]) some permutation of 0..4
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

SMALL = 2**20
"""Below it an order is a table of 4 bytes a window; from it on nothing is kept at all."""

ROUNDS = 6
"""Of the Feistel network; 4 already look random in a chi-square test, so there is some to spare."""

# SplitMix64's constants: Steele, Lea, Flood, "Fast splittable pseudorandom number generators",
# OOPSLA 2014. It is a mixer of 64 bits, not a cipher.
_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)
_HALF = np.uint64(32)


def mix(values: np.ndarray) -> np.ndarray:
    """SplitMix64's output function on uint64, a bijection of 64 bits."""
    z = values + _GAMMA  # array arithmetic wraps silently, as wanted
    z = (z ^ (z >> np.uint64(30))) * _MIX_1
    z = (z ^ (z >> np.uint64(27))) * _MIX_2
    mixed: np.ndarray = z ^ (z >> np.uint64(31))
    return mixed


@dataclass(frozen=True, kw_only=True)
class EpochOrder:
    """A seeded permutation of [0, n), the same on every machine and with every library version."""

    n: int
    """How many windows; below 2**63."""

    seed: int | None
    """Any integer; taken modulo 2**64. None: the text's own order, in every epoch."""

    epoch: int
    """Counted from 0; every epoch has an order of its own."""

    def at(self, positions: np.ndarray) -> np.ndarray:
        """The windows at `positions`, each within [0, n): int64 (B,) → int64 (B,)."""
        if self.seed is None:
            return positions
        if self.n >= SMALL:
            return feistel(positions, self.n, self._key(self.seed))
        windows: np.ndarray = self._table[positions].astype(np.int64)
        return windows

    def _key(self, seed: int) -> np.ndarray:
        return mix(mix(np.array([seed % 2**64], dtype=np.uint64)) ^ np.uint64(self.epoch))

    @functools.cached_property
    def _table(self) -> np.ndarray:
        assert self.seed is not None
        # A stable argsort of keyed hashes: it is unbiased however small n is, which a Feistel network
        # is not, and stays the same for good, unlike the results of numpy's or torch's shuffle.
        keyed = mix(mix(np.arange(self.n, dtype=np.uint64)) ^ self._key(self.seed))
        return np.argsort(keyed, kind="stable").astype(np.int32)


def feistel(positions: np.ndarray, n: int, key: np.ndarray) -> np.ndarray:
    """A keyed permutation of [0, n) without a table: int64 (B,) → int64 (B,); `key`: uint64 (1,).

    Generalised Feistel network and cycle-walking: Black and Rogaway, "Ciphers with arbitrary finite
    domains", CT-RSA 2002. A position is (left, right) with `right` of half the bits and `left` in
    [0, n_left), so that n_left * 2**bits exceeds n by less than 2**bits and walking is rare.
    """
    bits = (n - 1).bit_length() // 2
    n_left = np.uint64(-(-n >> bits))
    keys = mix(key + np.arange(ROUNDS, dtype=np.uint64) * _GAMMA)
    permuted = _rounds(positions.astype(np.uint64), np.uint64(bits), n_left, keys)
    outside = np.flatnonzero(permuted >= n)
    while len(outside):  # the cycle that began inside comes back inside
        walked = _rounds(permuted[outside], np.uint64(bits), n_left, keys)
        permuted[outside] = walked
        outside = outside[walked >= n]
    return permuted.astype(np.int64)


def _rounds(x: np.ndarray, bits: np.uint64, n_left: np.uint64, keys: np.ndarray) -> np.ndarray:
    left, right = x >> bits, x & ((np.uint64(1) << bits) - np.uint64(1))
    for i in range(0, ROUNDS, 2):
        # The upper 32 bits of the hash as a fraction of n_left, added modulo n_left.
        left += ((_hash(right, keys[i]) >> _HALF) * n_left) >> _HALF
        np.minimum(left, left - n_left, out=left)  # unsigned: left < n_left wraps to a huge number
        right ^= _hash(left, keys[i + 1]) >> (np.uint64(64) - bits)
    joined: np.ndarray = (left << bits) | right
    return joined


def _hash(half: np.ndarray, key: np.uint64) -> np.ndarray:
    z = half ^ key
    z *= _MIX_1
    z ^= z >> _HALF
    z *= _MIX_2
    return z
