"""The order of an epoch: what stands at position p of epoch e is a pure function of (seed, e, p).

EpochOrder(n=5, seed=0, epoch=0).block(0, 5)  ->  array([...]) some permutation of 0..4
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

# SplitMix64's constants: Steele, Lea, Flood, "Fast splittable pseudorandom number generators",
# OOPSLA 2014. It is a mixer of 64 bits, not a cipher.
_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


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
    """How many windows."""

    seed: int
    """Any integer; taken modulo 2**64."""

    epoch: int
    """Counted from 0; every epoch has an order of its own."""

    def block(self, start: int, stop: int) -> np.ndarray:
        """The windows at positions [start, stop), int64."""
        return self._permutation[start:stop].astype(np.int64)

    @functools.cached_property
    def _permutation(self) -> np.ndarray:
        # A stable argsort of keyed hashes, rather than numpy's or torch's shuffle, whose results
        # may change between versions.
        key = mix(mix(np.array([self.seed % 2**64], dtype=np.uint64)) ^ np.uint64(self.epoch))
        keyed = mix(mix(np.arange(self.n, dtype=np.uint64)) ^ key)
        return np.argsort(keyed, kind="stable")
