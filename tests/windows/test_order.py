"""The permutation of an epoch: pinned, one to one, and as random as `torch.randperm`."""

from __future__ import annotations

import functools
import itertools
import math
import tracemalloc
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lit_gptdata.windows import order
from lit_gptdata.windows.order import SMALL, EpochPermutation, feistel, mix
from lit_gptdata.windows.sampler import BLOCK

SIGMAS = 5
MAX = 2**63 - 1


def permutation(n: int, seed: int | None, epoch: int = 0) -> np.ndarray:
    return EpochPermutation(n=n, seed=seed, epoch=epoch).at(np.arange(n))


def key(seed: int) -> np.ndarray:
    return mix(np.array([seed], np.uint64))


def has_every_window_once(windows: np.ndarray, n: int) -> bool:
    return len(windows) == n and bool((np.bincount(windows, minlength=n) == 1).all())


def test_small_permutations_never_change():
    assert permutation(10, seed=0, epoch=0).tolist() == [2, 6, 5, 3, 0, 4, 7, 1, 8, 9]
    assert permutation(10, seed=0, epoch=1).tolist() == [3, 2, 7, 5, 4, 1, 8, 6, 9, 0]
    assert permutation(10, seed=1, epoch=0).tolist() == [7, 8, 9, 1, 0, 3, 5, 6, 4, 2]


@pytest.mark.parametrize(
    ("n", "seed", "epoch", "windows"),
    [
        (2**20 - 1, 0, 0, [148_747, 58_565, 709_433, 794_638]),  # the last n with a table
        (2**20 - 1, 1, 1, [880_059, 656_595, 606_309, 396_827]),
        (2**20, 0, 0, [653_884, 418_722, 417_795, 701_054]),  # the first without
        (2**20, 0, 1, [266_717, 630_702, 393_212, 783_605]),
        (2**20, 1, 0, [588_869, 922_506, 788_859, 392_518]),
        (2**20, 1, 1, [1_047_149, 138_136, 885_522, 174_355]),
        (2**21, 0, 0, [534_187, 1_511_240, 703_290, 1_668_043]),
        (10**7, 0, 0, [5_424_587, 968_901, 3_316_777, 4_855_402]),
        (10**7, 0, 1, [6_481_064, 5_652_453, 5_849_210, 849_519]),
        (10**7, 1, 0, [3_422_107, 4_575_761, 4_078_470, 69_285]),
        (10**7, 1, 1, [3_976_801, 3_327_450, 5_490_031, 6_823_268]),
        (10**12, 0, 0, [206_245_674_028, 283_080_707_610, 28_692_228_790, 655_890_236_924]),
        (10**12, 0, 1, [545_636_843_482, 542_607_493_940, 768_422_058_098, 809_418_744_492]),
        (10**12, 1, 0, [16_498_872_514, 313_586_315_909, 111_268_142_354, 33_893_662_278]),
        (10**12, 1, 1, [667_782_962_600, 246_596_450_512, 425_055_314_381, 224_521_992_130]),
        (2**40 + 1, 0, 0, [1_037_523_912_737, 692_059_958_029, 1_061_109_042_378, 854_656_774_902]),
        (2**40 + 1, 0, 1, [494_518_420_938, 658_200_840_242, 1_084_973_453_646, 680_743_437_246]),
        (2**40 + 1, 1, 0, [585_590_826_909, 1_096_192_972_927, 873_271_446_714, 666_951_330_172]),
        (2**40 + 1, 1, 1, [322_869_957_019, 402_708_702_115, 357_143_759_990, 378_696_434_130]),
        (MAX, 1, 1, [0x6B7262B9BD50964B, 0x49CD9521D04A7EA6, 0x5D4A2CFFB36A6558, 0x2787AE8F686B3615]),
    ],
)
def test_big_permutations_never_change(n, seed, epoch, windows):
    positions = np.array([0, 1, n // 2, n - 1])
    assert EpochPermutation(n=n, seed=seed, epoch=epoch).at(positions).tolist() == windows


def test_without_a_seed_every_epoch_is_in_text_order():
    positions = np.array([5, 0, 3, 10**12 - 1])
    for n, epoch in itertools.product((10, SMALL, 10**12), (0, 1, 9)):
        windows = EpochPermutation(n=n, seed=None, epoch=epoch).at(positions)
        assert windows.tolist() == positions.tolist()


def test_only_small_permutations_keep_a_table():
    for n, has_table in ((SMALL - 1, True), (SMALL, False)):
        epoch_permutation = EpochPermutation(n=n, seed=3, epoch=2)
        windows = epoch_permutation.at(np.arange(n))
        assert has_every_window_once(windows, n)
        assert windows.dtype == np.int64
        assert ("_table" in vars(epoch_permutation)) == has_table


@given(n=st.integers(0, 2000), seed=st.integers(-(2**70), 2**70), epoch=st.integers(0, 2**40))
def test_an_epoch_has_every_window_once(n, seed, epoch):
    order = EpochPermutation(n=n, seed=seed, epoch=epoch)
    assert sorted(order.at(np.arange(n)).tolist()) == list(range(n))
    half = n // 2
    first, second = order.at(np.arange(half)), order.at(np.arange(half, n))
    assert [*first, *second] == order.at(np.arange(n)).tolist()


@pytest.mark.parametrize(
    "sizes",
    [
        [*range(1, 301), *range(307, 10**4, 97), 10**4, 2**16 - 1, 2**16, 2**16 + 1, 10**5 + 7, 2**20],
        pytest.param(range(1, 10**4 + 1), marks=pytest.mark.heavy),
    ],
    ids=["some", "all"],
)
def test_the_feistel_network_has_every_window_once(sizes):
    for n in sizes:
        assert has_every_window_once(feistel(np.arange(n), n, key(n)), n), n


@pytest.mark.heavy
def test_every_small_epoch_has_every_window_once():
    for n in range(10**4 + 1):
        assert has_every_window_once(permutation(n, seed=n, epoch=n % 7), n), n


@settings(deadline=None)
@given(
    n=st.integers(1, 2**48),
    seed=st.integers(0, 2**64 - 1),
    epoch=st.integers(0, 2**40),
    draw=st.integers(0, 2**32),
    cuts=st.lists(st.integers(0, 2000), max_size=4),
)
@example(n=SMALL - 1, seed=0, epoch=0, draw=0, cuts=[1])
@example(n=SMALL, seed=0, epoch=0, draw=0, cuts=[1])
def test_distinct_positions_hold_distinct_windows_in_one_call_or_many(n, seed, epoch, draw, cuts):
    rng = np.random.default_rng(draw)
    positions = rng.permutation(np.unique(rng.integers(0, n, 2000)))
    epoch_permutation = EpochPermutation(n=n, seed=seed, epoch=epoch)
    windows = epoch_permutation.at(positions)
    assert windows.dtype == np.int64
    assert windows.min() >= 0
    assert windows.max() < n
    assert len(np.unique(windows)) == len(positions)
    parts = np.split(positions, sorted(cuts))
    assert np.array_equal(np.concatenate([epoch_permutation.at(part) for part in parts]), windows)


def test_the_biggest_n_works():
    positions = np.concatenate([np.arange(10**5), MAX - 1 - np.arange(10**5)])
    windows = EpochPermutation(n=MAX, seed=0, epoch=0).at(positions)
    assert windows.min() >= 0
    assert windows.max() < MAX
    assert len(np.unique(windows)) == len(positions)
    assert np.corrcoef(positions, windows)[0, 1] == pytest.approx(0, abs=SIGMAS / len(positions) ** 0.5)


@pytest.mark.parametrize(("n_positions", "limit"), [(1, 1_000_000), (BLOCK, 4_000_000)])
def test_a_trillion_windows_need_little_memory(n_positions, limit):
    tracemalloc.start()
    EpochPermutation(n=10**12, seed=0, epoch=0).at(np.arange(n_positions))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < limit


def test_every_seed_and_epoch_gives_another_permutation():
    seen = {tuple(permutation(50, seed=s, epoch=e)) for s in range(9) for e in range(9)}
    assert len(seen) == 81


@pytest.mark.parametrize("n", [10**5, pytest.param(10**5 + SMALL, marks=pytest.mark.heavy)])
def test_two_epochs_or_seeds_are_uncorrelated(n):
    pairs = [((s, e), other) for s in range(3) for e in range(3) for other in ((s, e + 1), (s + 1, e))]
    pairs += [((0, 1), (1, 0)), ((2, 3), (3, 2)), ((0, 0), (2**32, 0)), ((0, 0), (0, 2**32))]
    for one, other in pairs:
        a, b = permutation(n, *one), permutation(n, *other)
        assert (a == b).sum() < 12  # Poisson(1)
        assert (np.diff(a) == np.diff(b)).sum() < 12
        assert abs(np.corrcoef(a, b)[0, 1]) < SIGMAS / n**0.5


Shuffle = Callable[[int, int], np.ndarray]  # (n, seed) → a permutation of [0, n)


def in_blocks(n: int, at: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    return np.concatenate([at(np.arange(i, min(i + BLOCK, n))) for i in range(0, n, BLOCK)])


def by_epoch_permutation(n: int, seed: int) -> np.ndarray:
    return in_blocks(n, EpochPermutation(n=n, seed=seed, epoch=seed % 3).at)


def by_feistel(n: int, seed: int) -> np.ndarray:
    return in_blocks(n, lambda positions: feistel(positions, n, key(seed)))


def by_torch(n: int, seed: int) -> np.ndarray:
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed)).numpy()


def degrees(n: int) -> tuple[int, int]:
    """Blocks a side, and bins of differences, at least 5 expected counts in each."""
    return min(16, math.isqrt(n // 5)), min(256, n // 5)


def chi_squares(windows: np.ndarray, n: int) -> tuple[float, float]:
    """Chi-square over degrees of freedom: of position block × value block, of successive differences."""
    blocks, bins = degrees(n)
    edges = [i * n // blocks for i in range(blocks + 1)]
    rows = [windows[a:b] * blocks // n for a, b in itertools.pairwise(edges)]
    counts = np.array([np.bincount(row, minlength=blocks) for row in rows])
    expected = np.outer(counts.sum(1), counts.sum(0)) / n
    steps = np.diff(windows)
    steps[steps < 0] += n
    binned = np.bincount(steps * bins // n, minlength=bins)
    possible = np.diff([-(-i * n // bins) for i in range(bins + 1)])  # differences in each bin,
    possible[0] -= 1  # of which 0 never occurs; each other one is expected once in n - 1
    return (
        float(((counts - expected) ** 2 / expected).sum() / (blocks - 1) ** 2),
        float(((binned - possible) ** 2 / possible).sum() / (bins - 1)),
    )


@functools.cache
def mean_chi_squares(shuffle: Shuffle, n: int, n_seeds: int) -> np.ndarray:
    return np.mean([chi_squares(shuffle(n, seed), n) for seed in range(n_seeds)], axis=0)


def deviations(shuffle: Shuffle, n: int, n_seeds: int, n_torch: int) -> np.ndarray:
    """How many standard errors the two mean chi-squares are from those of `torch.randperm`."""
    blocks, bins = degrees(n)
    df = np.array([(blocks - 1) ** 2, bins - 1])
    error = np.sqrt(2 / df * (1 / n_seeds + 1 / n_torch))  # a chi-square's variance is 2 df
    return (mean_chi_squares(shuffle, n, n_seeds) - mean_chi_squares(by_torch, n, n_torch)) / error


@pytest.mark.parametrize(
    ("shuffle", "n", "n_seeds", "n_torch"),
    [
        (by_epoch_permutation, 10**3, 50, 50),
        (by_epoch_permutation, 10**5, 50, 50),
        (by_feistel, 10**5 + 7, 50, 50),
        pytest.param(by_epoch_permutation, 10**3, 200, 200, marks=pytest.mark.heavy),
        pytest.param(by_epoch_permutation, 10**5, 200, 200, marks=pytest.mark.heavy),
        pytest.param(by_epoch_permutation, 10**6, 200, 200, marks=pytest.mark.heavy),
        pytest.param(by_epoch_permutation, 10**7, 200, 20, marks=pytest.mark.heavy),
        pytest.param(by_feistel, 10**5 + 7, 200, 200, marks=pytest.mark.heavy),
        pytest.param(by_feistel, 10**6, 200, 200, marks=pytest.mark.heavy),
    ],
)
def test_permutations_are_as_random_as_randperm(shuffle, n, n_seeds, n_torch):
    assert np.abs(deviations(shuffle, n, n_seeds, n_torch)).max() < SIGMAS


def test_the_randomness_test_detects_two_rounds(monkeypatch):
    monkeypatch.setattr(order, "ROUNDS", 2)
    by_two_rounds = functools.partial(by_feistel)  # another object, because results are cached
    assert np.abs(deviations(by_two_rounds, 10**6, 5, 5)).max() > SIGMAS
