"""The order of an epoch. The window at position p of epoch e is a pure function of (seed, e, p).

EpochPermutation(n=5, seed=0, epoch=0).at(np.arange(5))  ->  the numbers 0 to 4 in some order
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

SMALL = 2**20  # a permutation of fewer windows is a table of 4 bytes per window; others store nothing
ROUNDS = 6  # of the Feistel network; four pass a chi-square test of randomness, and two are a reserve

# SplitMix64's constants: Steele, Lea, Flood, "Fast splittable pseudorandom number generators",
# OOPSLA 2014. It mixes 64 bits; it is not a cipher.
_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)
_HALF = np.uint64(32)


def mix(values: np.ndarray) -> np.ndarray:
    """SplitMix64's output function, a bijection on uint64."""
    z = values + _GAMMA  # overflow is intended; numpy arrays wrap without a warning
    z = (z ^ (z >> np.uint64(30))) * _MIX_1
    z = (z ^ (z >> np.uint64(27))) * _MIX_2
    return z ^ (z >> np.uint64(31))  # type: ignore[no-any-return]


@dataclass(frozen=True, kw_only=True)
class EpochPermutation:
    """A seeded permutation of [0, n), the same on every machine and with every library version."""

    n: int
    """Number of windows, below 2**63."""
    seed: int | None
    """Any integer, taken modulo 2**64. None: text order in every epoch."""
    epoch: int
    """Counted from 0. Every epoch has a different permutation."""

    def at(self, positions: np.ndarray) -> np.ndarray:
        """The windows at `positions`, each in [0, n): int64 (B,) → int64 (B,)."""
        if self.seed is None:
            return positions
        if self.n >= SMALL:
            return feistel(positions, self.n, self._key)
        return self._table[positions].astype(np.int64)  # type: ignore[no-any-return]

    @property
    def _key(self) -> np.ndarray:
        assert self.seed is not None
        return epoch_key(self.seed, np.array([self.epoch], dtype=np.uint64))

    @functools.cached_property
    def _table(self) -> np.ndarray:
        table: np.ndarray = sort_epochs(self.n, self._key)[0].astype(np.int32)
        return table


@dataclass(frozen=True, kw_only=True)
class EpochPositions(EpochPermutation):
    """The positions of a run that an epoch has, for a mixture, which knows what is at each position."""

    def at(self, positions: np.ndarray) -> np.ndarray:
        """The positions in the run of `positions` in the epoch, each in [0, n): int64 (B,)."""
        return positions + self.epoch * self.n


def epoch_key(seed: int, epochs: np.ndarray) -> np.ndarray:
    """The keys of epochs: uint64 (E,) → uint64 (E,)."""
    return mix(mix(np.array([seed % 2**64], dtype=np.uint64)) ^ epochs)


def sort_epochs(n: int, keys: np.ndarray) -> np.ndarray:
    """A permutation of [0, n) for each key: uint64 (E,) → int64 (E, n).

    A stable argsort of keyed hashes is unbiased for every n, while a Feistel network is biased for a
    small one. It also never changes, unlike the results of numpy's or torch's shuffle.
    """
    return np.argsort(mix(mix(np.arange(n, dtype=np.uint64)) ^ keys[:, None]), kind="stable")


def feistel(positions: np.ndarray, n: int, key: np.ndarray) -> np.ndarray:
    """A keyed permutation of [0, n) without a stored table: int64 (B,) → int64 (B,); `key`: uint64 (1,).

    A generalized Feistel network with cycle-walking: Black and Rogaway, "Ciphers with arbitrary finite
    domains", CT-RSA 2002. A position is (left, right): `right` has half of the bits, and `left` is in
    [0, n_left). So n_left * 2**bits exceeds n by less than 2**bits, and walking is rare.
    """
    bits = (n - 1).bit_length() // 2
    n_left = np.uint64(-(-n >> bits))
    keys = mix(key + np.arange(ROUNDS, dtype=np.uint64) * _GAMMA)
    permuted = _rounds(positions.astype(np.uint64), np.uint64(bits), n_left, keys)
    outside = np.flatnonzero(permuted >= n)
    while len(outside):  # each cycle started inside [0, n), so it returns there
        walked = _rounds(permuted[outside], np.uint64(bits), n_left, keys)
        permuted[outside] = walked
        outside = outside[walked >= n]
    return permuted.astype(np.int64)


def _rounds(x: np.ndarray, bits: np.uint64, n_left: np.uint64, keys: np.ndarray) -> np.ndarray:
    left, right = x >> bits, x & ((np.uint64(1) << bits) - np.uint64(1))
    for i in range(0, ROUNDS, 2):
        # The upper 32 bits of the hash, as a fraction of n_left, are added modulo n_left.
        left += ((_hash(right, keys[i]) >> _HALF) * n_left) >> _HALF
        np.minimum(left, left - n_left, out=left)  # unsigned: a negative difference wraps to a huge one
        right ^= _hash(left, keys[i + 1]) >> (np.uint64(64) - bits)
    return (left << bits) | right  # type: ignore[no-any-return]


def _hash(half: np.ndarray, key: np.uint64) -> np.ndarray:
    z = half ^ key
    z *= _MIX_1
    z ^= z >> _HALF
    z *= _MIX_2
    return z


def groups_of(numbers: np.ndarray) -> Iterator[tuple[int, slice | np.ndarray]]:
    """Each distinct number, int64 (B,), and where it stands; mostly all are equal."""
    if len(numbers) and numbers.min() == numbers.max():
        yield int(numbers[0]), slice(None)
        return
    for number in np.unique(numbers).tolist():
        yield number, numbers == number
