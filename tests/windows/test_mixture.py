"""A mixture keeps to its weights at every position, and each source keeps its own endless order."""

from __future__ import annotations

import itertools
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from lit_gptdata.tokens.shards import Tokens
from lit_gptdata.windows.dataset import Windows
from lit_gptdata.windows.loader import window_loader
from lit_gptdata.windows.mixture import (
    BLOCK,
    EndlessOrder,
    Mixture,
    MixtureOrder,
    Slots,
    Stage,
    stage_begins,
)
from lit_gptdata.windows.steps import Position, RunSegment, Steps

FAR = 10**12 // BLOCK
L = 4


def two_of(weight: float) -> list[float]:
    return [weight, 1 - weight]


def random_weights(n: int, seed: int) -> list[float]:
    """`n` weights between 0.001 and 0.998, most of them small."""
    random = np.random.default_rng(seed).exponential(size=n) ** 3
    return (0.001 + random / random.sum() * (1 - n * 0.001)).tolist()


WEIGHTS = [
    two_of(0.001), two_of(0.5), [0.001, 0.998, 0.001], [0.6, 0.25, 0.15], [1 / 3, 1 / 7, np.pi],
    [0.901, *[0.001] * 99], [1] * 100, [0, 3, 0, 1, 0], random_weights(8, 0), random_weights(100, 1),
]  # fmt: skip


def slots(weights: list[float], seed: int = 0) -> Slots:
    return Slots(weights, np.random.default_rng(seed).integers(0, 2**64, len(weights), np.uint64))


def distances(weights: list[float], blocks: list[int], seed: int = 0) -> tuple[float, float]:
    """The largest distance from weight × n at every position of the blocks, and at the blocks' ends.

    Between two windows of a source its share grows steadily, so the distance is largest right before
    a window, right after it, or at the end.
    """
    mixture, share = slots(weights, seed), np.array(weights) / sum(weights)
    anywhere, ends = 0.0, 0.0
    for block in blocks:
        positions = np.arange(block * BLOCK, (block + 1) * BLOCK)
        sources, numbers = mixture.at(positions)
        begin, end = mixture.count(block * BLOCK), mixture.count((block + 1) * BLOCK)
        assert (end - begin).tolist() == np.bincount(sources, minlength=len(weights)).tolist()
        for source in range(len(weights)):
            assert numbers[sources == source].tolist() == list(range(begin[source], end[source]))
        before = np.abs(numbers - share[sources] * positions).max()
        after = np.abs(numbers + 1 - share[sources] * (positions + 1)).max()
        anywhere = max(anywhere, before, after)
        ends = max(ends, np.abs(end - share * (block + 1) * BLOCK).max() / (block + 1))
    return anywhere, ends


@pytest.mark.parametrize("weights", WEIGHTS, ids=lambda weights: f"{len(weights)}-{weights[0]:.3g}")
def test_every_source_stays_near_its_weight_at_every_position(weights):
    anywhere, ends = distances(weights, [0, 1, 10, 1023, 1024, 1025, 100_000, FAR])
    assert anywhere <= 128
    assert ends <= 1


@pytest.mark.heavy
@pytest.mark.parametrize("seed", range(10))
def test_every_source_stays_near_its_weight_in_many_mixtures(seed):
    random = np.random.default_rng(seed)
    worst = 0.0
    for n in (2, 3, 5, 10, 30, 100):
        blocks = [*range(40), *random.integers(0, FAR, 20).tolist()]
        anywhere, ends = distances(random_weights(n, seed), blocks, seed)
        assert ends <= 1
        worst = max(worst, anywhere)
    assert worst <= 128


@settings(max_examples=25, deadline=None)
@given(
    weights=st.lists(st.floats(0.001, 1000), min_size=2, max_size=9),
    n=st.integers(0, 10**12), seed=st.integers(0, 100),
)  # fmt: skip
def test_counts_of_the_first_positions_agree_with_the_weights(weights, n, seed):
    counts = slots(weights, seed).count(n)
    assert counts.sum() == n
    assert np.abs(counts - np.array(weights) / sum(weights) * n).max() <= 128


def test_weights_of_any_unit_give_the_same_slots():
    positions = np.arange(0, 5 * BLOCK, 7)
    fractions, percent = slots([0.5, 0.25, 0.25]), slots([50, 25, 25])
    assert np.array_equal(fractions.at(positions), percent.at(positions))


def order(
    sizes: dict[str, int], weights: list[float] | None = None, seed: int | None = 0, **stages
) -> MixtureOrder:
    weights = weights or list(sizes.values())
    return MixtureOrder(sizes, [Stage(0, tuple(weights)), *stages.get("later", [])], seed)


def stream(mixture: MixtureOrder, source: int, n: int) -> list[int]:
    """The windows of a source at the first `n` positions, in order."""
    sources, windows = mixture.at(np.arange(n))
    return windows[sources == source].tolist()


def assert_endless(windows: list[int], n: int) -> None:
    """Each run of `n` windows from the first one on is a permutation, and so are the last ones."""
    for begin in range(0, len(windows), n):
        epoch = windows[begin : begin + n]
        assert len(set(epoch)) == len(epoch)
        assert set(epoch) <= set(range(n))
        assert len(epoch) == n or begin + n > len(windows)


@settings(max_examples=30, deadline=None)
@given(
    sizes=st.lists(st.one_of(st.integers(1, 30), st.integers(1, 40_000)), min_size=1, max_size=6),
    first=st.lists(st.integers(0, 20), min_size=6, max_size=6).filter(lambda w: w[0] > 0),
    second=st.lists(st.integers(0, 20), min_size=6, max_size=6).filter(lambda w: w[0] > 0),
    begin=st.integers(1, 30_000), seed=st.integers(-(2**63), 2**70),
)  # fmt: skip
def test_no_window_is_seen_twice_before_all_of_its_source_were_seen(sizes, first, second, begin, seed):
    named = {f"s{i}": n for i, n in enumerate(sizes)}
    stages = [Stage(0, tuple(first[: len(sizes)])), Stage(begin, tuple(second[: len(sizes)]))]
    mixture = MixtureOrder(named, stages, seed)
    for source, n in enumerate(sizes):
        windows = stream(mixture, source, 60_000)
        assert_endless(windows, n)
        assert len(windows) == mixture.count(60_000)[source]
        own = EndlessOrder(n, mixture.orders[source].seed).at(np.arange(len(windows)))
        assert windows == own.tolist(), "it is the source's own order, whatever the weights are"


@pytest.mark.parametrize("n", [1, 2, 3, 103, BLOCK - 1, BLOCK, BLOCK + 1, 100_000])
def test_sources_of_every_size_are_complete_in_each_epoch(n):
    endless = EndlessOrder(n, 5)
    epochs = endless.at(np.arange(3 * n)).reshape(3, n)
    assert (np.sort(epochs) == np.arange(n)).all()
    if n > 100:
        assert not np.array_equal(epochs[0], epochs[1])
    far = endless.at(np.arange(10**9 * n, 10**9 * n + n))
    assert np.array_equal(np.sort(far), np.arange(n))


SIZES = {"web": 5000, "code": 700, "books": 40}


def test_another_source_leaves_the_orders_of_the_others_alone():
    few, many = order(SIZES, [6, 3, 1]), order({"new": 30, **SIZES}, [1, 1, 5, 2])
    for number in range(3):
        before, after = stream(few, number, 40_000), stream(many, number + 1, 40_000)
        n = min(len(before), len(after))
        assert n > 900
        assert before[:n] == after[:n]


def test_another_weight_leaves_the_order_of_each_source_alone():
    one, other = order(SIZES, [6, 3, 1]), order(SIZES, [1, 1, 1])
    for number in range(3):
        before, after = stream(one, number, 20_000), stream(other, number, 20_000)
        n = min(len(before), len(after))
        assert before[:n] == after[:n]
        assert len(before) != len(after)


def test_other_seeds_and_names_give_other_orders():
    first = stream(order(SIZES), 0, 3000)
    assert first != stream(order(SIZES, seed=1), 0, 3000)
    assert first != stream(order({"www": 5000, "code": 700, "books": 40}), 0, 3000)
    assert first == stream(order(SIZES, seed=2**64), 0, 3000), "seeds count modulo 2**64"


def test_sources_of_the_same_size_have_different_orders():
    mixture = order({"a": 500, "b": 500})
    a, b = (stream(mixture, number, 1000)[:400] for number in (0, 1))
    assert a != b


def test_without_shuffling_each_source_is_in_text_order():
    mixture = order(SIZES, [5, 3, 2], seed=None)
    for number, n in enumerate(SIZES.values()):
        windows = stream(mixture, number, 10_000)
        assert windows == [i % n for i in range(len(windows))]


def test_positions_may_be_asked_for_in_any_order():
    mixture = order(SIZES, [6, 3, 1], later=[Stage(20_000, (1, 1, 8)), Stage(50_000, (0, 1, 0))])
    positions = np.arange(80_000)
    sources, windows = mixture.at(positions)
    mixed = np.random.default_rng(0).permutation(positions)
    again = order(SIZES, [6, 3, 1], later=[Stage(20_000, (1, 1, 8)), Stage(50_000, (0, 1, 0))])
    found = again.at(mixed)
    assert np.array_equal(found, (sources[mixed], windows[mixed]))
    for begin in range(0, 80_000, 9_973):
        part = again.at(positions[begin : begin + 9_973])
        assert np.array_equal(part[1], windows[begin : begin + 9_973])
    assert again.at(positions[:0])[0].shape == (0,)


def test_each_stage_keeps_to_its_weights_and_continues_each_source():
    stages = [(0, (8, 1, 1)), (30_001, (0, 1, 9)), (60_000, (1, 0, 0))]
    mixture = order(SIZES, [8, 1, 1], later=[Stage(*stage) for stage in stages[1:]])
    sources, _ = mixture.at(np.arange(100_000))
    for (first, weights), last in zip(stages, (30_001, 60_000, 100_000), strict=True):
        counts = (sources[first:last, None] == np.arange(3)).cumsum(0)
        share, n = np.array(weights) / sum(weights), np.arange(1, last - first + 1)[:, None]
        assert np.abs(counts - share * n).max() <= 128
    for n in (0, 1, 30_000, 30_001, 30_002, 60_000, 99_999):
        assert mixture.count(n).tolist() == np.bincount(sources[:n], minlength=3).tolist()
    for number, size in enumerate(SIZES.values()):
        assert_endless(stream(mixture, number, 100_000), size)


def mixture(seed: int | None = 0, stages: list[Stage] | None = None, first_epoch: int = 0) -> Mixture:
    """Sources whose tokens are their positions: the ids of a source have its own thousands digit."""
    windows = {}
    for number, (name, n) in enumerate({"web": 90, "code": 33, "books": 7}.items()):
        ids = number * 1000 + np.arange(10 + n * L + 1, dtype=np.uint16)
        windows[name] = Windows(Tokens([ids]), begin=10, end=len(ids), max_length=L, stride=L)
    return Mixture(windows, stages or [Stage(0, (0.6, 0.3, 0.1))], seed=seed, first_epoch=first_epoch)


def test_a_batch_has_the_windows_that_locate_names():
    mixed, positions = mixture(), np.arange(500)
    names, windows = mixed.locate(positions)
    inputs, targets = mixed.batch(positions)
    begins = np.array([["web", "code", "books"].index(name) * 1000 for name in names])
    assert np.array_equal(inputs[:, 0], begins + 10 + windows * L)
    assert np.array_equal(targets, inputs + 1), "no window crosses from a source to the next"
    assert len(mixed) == 130
    counts = dict(zip(*np.unique(names[:130], return_counts=True), strict=True))
    assert mixed.count(130) == counts


def test_a_position_before_the_mixture_is_refused():
    with pytest.raises(IndexError, match="position -1 is before the first one"):
        mixture().batch([3, -1])


def test_a_mixture_that_starts_in_a_later_epoch_starts_with_its_first_windows():
    first, later = mixture(), mixture(first_epoch=2)
    positions = np.arange(300)
    assert np.array_equal(first.locate(positions), later.locate(positions + 2 * 130))
    assert later.count(260) == {"web": 0, "code": 0, "books": 0}


def batches(loader: DataLoader, n: int = 10**6) -> list[list[list[int]]]:
    return [inputs.tolist() for inputs, _ in itertools.islice(loader, n)]


STAGES = [Stage(0, (0.6, 0.3, 0.1)), Stage(60, (0.1, 0.1, 0.8))]


@pytest.mark.parametrize("workers", [0, 2])
def test_loaders_read_positions_in_order_with_and_without_workers(workers):
    mixed = mixture(stages=STAGES)
    steps = Steps(n=len(mixed), batch_size=6, tail="share")
    loader = window_loader(mixed, steps, seed=0, num_workers=workers)
    for epoch in range(2):
        rows = [row for batch in batches(loader) for row in batch]
        assert rows == mixed.batch(np.arange(epoch * 130, (epoch + 1) * 130))[0].tolist()


def test_two_ranks_and_other_batch_sizes_read_the_same_order():
    mixed = mixture(stages=STAGES)
    expected = mixed.batch(np.arange(128))[0].tolist()
    for world_size, batch_size in ((1, 8), (2, 4), (4, 2), (4, 4)):
        steps = Steps(n=len(mixed), batch_size=batch_size, world_size=world_size)
        ranks = [batches(window_loader(mixed, steps, seed=0, rank=rank)) for rank in range(world_size)]
        rows = [row for step in zip(*ranks, strict=True) for batch in step for row in batch]
        assert rows == expected


def test_a_pickled_mixture_gives_the_same_windows():
    mixed = mixture(stages=STAGES)
    expected = mixed.batch(np.arange(300))[0]
    copy = pickle.loads(pickle.dumps(mixed))
    assert np.array_equal(copy.batch(np.arange(300))[0], expected)
    assert copy.identity() == mixed.identity()


@pytest.mark.parametrize("batch_size", [6, 4, 9])
def test_a_loader_continues_from_its_state_with_another_batch_size(batch_size):
    mixed = mixture(stages=STAGES)
    loader = window_loader(mixed, Steps(n=len(mixed), batch_size=6), seed=0)
    batches(loader)
    assert len(batches(loader, 5)) == 5
    state = loader.state_dict()
    again = window_loader(mixture(stages=STAGES), Steps(n=len(mixed), batch_size=batch_size), seed=0)
    again.load_state_dict(state)
    rows = [row for batch in batches(again) for row in batch]
    first = 130 + 5 * 6
    last = first + (260 - first) // batch_size * batch_size
    assert rows == mixed.batch(np.arange(first, last))[0].tolist()


def test_a_loader_refuses_the_state_of_another_mixture():
    state = window_loader(mixture(), Steps(n=130, batch_size=6), seed=0).state_dict()
    other = window_loader(mixture(stages=STAGES), Steps(n=130, batch_size=6), seed=0)
    with pytest.raises(ValueError, match="saved with other windows"):
        other.load_state_dict(state)


@pytest.mark.parametrize(
    ("tokens", "begins"),
    [
        ([], [0]),
        ([1], [0, 8]),
        ([8 * L], [0, 8]),
        ([8 * L + 1], [0, 16]),
        ([16 * 8 * L], [0, 130]),  # an epoch, whose last two windows are left out
        ([17 * 8 * L, 8 * L], [0, 138, 146]),
    ],
)
def test_stages_start_after_whole_steps(tokens, begins):
    steps = Steps(n=130, batch_size=4, world_size=2)
    run = [RunSegment(batch=0, start=Position(0, 0), steps=steps, limit=16)]
    assert stage_begins(tokens, run, L) == begins


def test_a_limit_of_batches_moves_the_starts_of_stages():
    steps = Steps(n=130, batch_size=8)
    run = [RunSegment(batch=0, start=Position(0, 0), steps=steps, limit=3)]
    assert stage_begins([5 * 8 * L], run, L) == [0, 130 + 2 * 8]
    assert steps.done(Position(1, 16).index) == 2
