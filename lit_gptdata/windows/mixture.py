"""A mixture of sources by weight: what is at position n of a run is a pure function of n.

position n  ──Slots──▶  source s, and j: this is the j-th window of s in the run
j           ──EndlessOrder──▶  a window of s, in epoch j // n_windows of the source's own order

Positions never end. The length of an epoch is the number of windows of all sources. A small source with
a large weight repeats within it. A large one continues in the next epoch, where it stopped.

To evaluate, windows of several sources follow each other; see `ChainedWindows`.
"""

import functools
import hashlib
import itertools
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import numpy as np

from lit_gptdata.tokens.shards import Tokens, join
from lit_gptdata.windows.dataset import Block, Windows, batches_of
from lit_gptdata.windows.order import EpochPositions, epoch_key, feistel, groups_of, mix, sort_epochs
from lit_gptdata.windows.ranks import DrawnSeed
from lit_gptdata.windows.steps import RunSegment, count_windows, find_batch, number_after

BLOCK = 16_384  # positions that become slots together
BITS = 40  # of the fraction of a share, as an integer: the same on every machine
CHUNK = 1 << 20  # windows to mark at a time
MAX_EPOCHS = 4  # up to which repeated text is nearly as good as new: Muennighoff et al., NeurIPS 2023
TABLES = 2  # blocks or groups of epochs that are kept, because neighboring positions need the same ones


class Slots:
    """Divides positions among sources by weight, and spreads each source's positions evenly.

    A block gives source s the whole part of a = BLOCK × weight, or one more. All sources are rounded at
    once, with one offset per block (Madow, "On the theory of systematic sampling, II", 1949), from a van
    der Corput sequence, so that errors of different blocks cancel. Inside a block, slot i of m has a
    random place in the i-th of m equal parts (jittered sampling).
    """

    def __init__(self, weights: Sequence[float], keys: np.ndarray) -> None:
        """`weights`: (S,), at least 0, any sum above 0. `keys`: (S,) uint64, for the random places."""
        ends = np.cumsum(weights, dtype=np.float64)
        ends *= BLOCK / ends[-1]
        ends[ends >= ends[-1]] = BLOCK  # exact also for sources of weight 0 at the end
        fixed = np.floor(ends * 2**BITS).astype(np.int64)
        self._keys, self._whole, self._parts = keys, fixed >> BITS, fixed & (2**BITS - 1)
        self._table = functools.lru_cache(TABLES)(self._make_table)

    def at(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The source of each position, and how many of its windows come before: int64 (B,) each."""
        sources, numbers = np.empty_like(positions), np.empty_like(positions)
        blocks, slots = np.divmod(positions, BLOCK)
        for block, chosen in groups_of(blocks):
            table = self._table(block)
            sources[chosen], numbers[chosen] = (column[slots[chosen]] for column in table)
        return sources, numbers

    def count(self, n: int) -> np.ndarray:
        """How many of the first `n` positions each source has: int64 (S,)."""
        block, rest = divmod(n, BLOCK)
        part = np.bincount(self._table(block)[0][:rest], minlength=len(self._keys))
        return self._before(block) + part

    def _before(self, block: int) -> np.ndarray:
        """How many positions each source has before a block, in O(log block): int64 (S,)."""
        ends, offset = block * self._whole, 0
        for bit in reversed(range(block.bit_length())):
            if block >> bit & 1:  # 2**bit blocks, whose offsets are evenly spaced
                ends = ends + ((self._parts + offset) >> (BITS - bit))
                offset += 1 << (BITS - 1 - bit)
        return np.diff(ends, prepend=0)

    def _make_table(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        before = self._before(block)
        shares = self._before(block + 1) - before
        sources = np.repeat(np.arange(len(shares)), shares)  # (BLOCK,)
        slot = np.arange(BLOCK) - np.repeat(np.cumsum(shares) - shares, shares)  # of its source
        random = mix(mix(self._keys[sources] ^ np.uint64(block)) ^ slot.astype(np.uint64))
        places = (slot << 32) + (random >> np.uint64(32)).astype(np.int64)  # below 2**46
        order = np.argsort(places * BLOCK // shares[sources], kind="stable")
        return sources[order], (before[sources] + slot)[order]


class EndlessOrder:
    """The windows of one source without end: every epoch has each window once, in a seeded order."""

    def __init__(self, n: int, seed: int | None, largest_table: int = BLOCK) -> None:
        """`n`: windows of the source, at least 1. `seed`: None: text order."""
        self.n, self.seed, self._has_table = n, seed, n <= largest_table
        self._epochs = max(1, BLOCK // n)  # that share a table
        self._table = functools.lru_cache(TABLES)(self._make_table)

    def at(self, numbers: np.ndarray) -> np.ndarray:
        """The windows with these numbers, each at least 0: int64 (B,) → int64 (B,)."""
        if self.seed is None:
            return numbers % self.n
        windows = np.empty_like(numbers)
        groups, rest = np.divmod(numbers, self._epochs * self.n)
        for group, chosen in groups_of(groups):
            if self._has_table:
                windows[chosen] = self._table(group)[rest[chosen]]
            else:
                key = epoch_key(self.seed, np.array([group], np.uint64))
                windows[chosen] = feistel(rest[chosen], self.n, key)
        return windows

    def _make_table(self, group: int) -> np.ndarray:
        assert self.seed is not None
        epochs = np.arange(group * self._epochs, (group + 1) * self._epochs, dtype=np.uint64)
        orders = sort_epochs(self.n, epoch_key(self.seed, epochs)).ravel()
        return orders.astype(np.min_scalar_type(self.n))


@dataclass(frozen=True)
class Stage:
    """The weights of the sources from position `begin` of a run to the next stage."""

    begin: int
    weights: tuple[float, ...]


class MixtureOrder:
    """Which window of which source is at each position, for one seed."""

    def __init__(self, sizes: Mapping[str, int], stages: Sequence[Stage], seed: int | None) -> None:
        """`sizes`: windows of each source. `seed=None`: each source in text order."""
        self._begins = np.array([stage.begin for stage in stages])
        keys = [_seed_of(name, seed or 0) for name in sizes]
        self._slots = [Slots(stage.weights, np.array(keys, np.uint64)) for stage in stages]
        self._before = [np.zeros(len(sizes), np.int64)]  # windows of each source before a stage
        for slots, length in zip(self._slots, np.diff(self._begins).tolist(), strict=False):
            self._before.append(self._before[-1] + slots.count(length))
        seeds = (None if seed is None else key for key in keys)
        self.orders = [EndlessOrder(n, key) for n, key in zip(sizes.values(), seeds, strict=True)]

    def at(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The source and its window at each position: int64 (B,) → int64 (B,) each."""
        sources, windows = np.empty_like(positions), np.empty_like(positions)
        stages = np.searchsorted(self._begins, positions, side="right") - 1
        for stage, chosen in groups_of(stages):
            found, numbers = self._slots[stage].at(positions[chosen] - self._begins[stage])
            sources[chosen], windows[chosen] = found, numbers + self._before[stage][found]
        for source, chosen in groups_of(sources):
            windows[chosen] = self.orders[source].at(windows[chosen])
        return sources, windows

    def count(self, n: int) -> np.ndarray:
        """How many of the first `n` positions each source has: int64 (S,)."""
        stage = int(np.searchsorted(self._begins, n, side="right")) - 1
        total: np.ndarray = self._before[stage] + self._slots[stage].count(n - int(self._begins[stage]))
        return total


class JoinedWindows(Windows):
    """The windows of several parts. A subclass has an order of them.

    A batch is one gather in the tokens of all parts, if windows have no padding and all tokens are on
    this machine. Otherwise each part reads its own windows.
    """

    def __init__(self, parts: Sequence[Windows], *, pad: bool) -> None:
        """`pad`: whether windows of `parts` may have padding."""
        tokens, spans = [part.tokens for part in parts], parts[0].spans
        pad = pad or any(type(each) is not Tokens for each in tokens)
        joined = min(tokens, key=attrgetter("read_at_once")) if pad else join(tokens)
        lengths = {"max_length": spans.max_length, "stride": spans.stride}
        super().__init__(joined, begin=0, end=sum(map(len, tokens)), **lengths, pad=pad)
        self.parts, self.kind = parts, parts[0].kind

    def locate_parts(self, indices: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The number of the part of each window, and its index there: (B,) → int64 (B,) each."""
        raise NotImplementedError

    def _read(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        numbers, local = self.locate_parts(indices)
        rows = np.empty((len(local), self.spans.max_length + 1), self.tokens.dtype)
        n_ids = np.empty(len(local), np.int64)
        for number, chosen in groups_of(numbers):
            rows[chosen], n_ids[chosen] = self.parts[number]._read(local[chosen])
        return rows, n_ids

    def target_tokens(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """See `Windows.target_tokens`; each number is in the store of the window's part."""
        numbers, local = self.locate_parts(indices)
        tokens = np.empty((len(local), self.spans.max_length), np.int64)
        for number, chosen in groups_of(numbers):
            tokens[chosen] = self.parts[number].target_tokens(local[chosen])
        return tokens

    def ranges(self, indices: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        raise TypeError(f"{self!r} have several stores: use `locate_parts`, and the windows in `parts`")

    def ahead(self, batches: Iterator[Any], blocks: Iterator[Block]) -> Iterator[Any]:
        plans = itertools.tee(map(self.locate_parts, batches_of(blocks)), len(self.parts))
        for number, plan in enumerate(plans):
            edges = map(functools.partial(self._edges_in, number), plan)
            batches = self.parts[number].tokens.ahead(batches, edges)
        return batches

    def _edges_in(self, part: int, located: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
        numbers, local = located
        return self.parts[part]._edges(local[numbers == part])


class ChainedWindows(JoinedWindows):
    """The val or test windows of several sets, one set after the other."""

    def __init__(self, sets: Sequence[Windows]) -> None:
        super().__init__(sets, pad=True)
        self.ends = np.cumsum([len(windows) for windows in sets])

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __str__(self) -> str:
        return f"{len(self):,} windows of {self.spans.max_length} tokens, of {len(self.parts)} sets"

    def identity(self) -> list[int]:
        """The number of windows, max_length and stride; states of val and test loaders have these."""
        return [0, len(self), self.spans.max_length, self.spans.stride]

    @property
    def n_targets(self) -> int:
        return sum(part.n_targets for part in self.parts)

    def locate_parts(self, indices: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        indices = np.asarray(indices, dtype=np.int64)
        numbers = np.minimum(np.searchsorted(self.ends, indices, side="right"), len(self.ends) - 1)
        return numbers, indices - np.append(0, self.ends)[numbers]


class Mixture(JoinedWindows):
    """The train windows of named sources, at the positions of a run: 0, 1, 2, … without end.

    `len` is one epoch, the number of windows of all sources. Indices are positions.
    """

    order = EpochPositions

    def __init__(
        self,
        sources: Mapping[str, Windows],
        stages: Sequence[Stage],
        *,
        seed: int | DrawnSeed | None,
        first_epoch: int = 0,
    ) -> None:
        """Each stage has a weight per source. The mixture starts in `first_epoch` of the run."""
        parts = list(sources.values())
        super().__init__(parts, pad=parts[0].spans.pad)
        self.sources = dict(sources)
        self.sizes = {name: len(windows) for name, windows in sources.items()}
        self.stages, self.seed, self.first_epoch = tuple(stages), seed, first_epoch
        lengths = [len(windows.tokens) for windows in parts]
        self._begins = np.cumsum(lengths) - lengths + [windows.begin for windows in parts]
        self._orders: dict[int | None, MixtureOrder] = {}

    def __len__(self) -> int:
        return sum(self.sizes.values())

    @property
    def _order(self) -> MixtureOrder:
        seed = self.seed.value if isinstance(self.seed, DrawnSeed) else self.seed
        if seed not in self._orders:
            self._orders = {seed: MixtureOrder(self.sizes, self.stages, seed)}
        return self._orders[seed]

    def move(self, begins: Sequence[int], first_epoch: int) -> None:
        """Start the stages at these positions of the mixture, which itself starts in `first_epoch`."""
        stages = tuple(Stage(begin, s.weights) for begin, s in zip(begins, self.stages, strict=True))
        if (stages, first_epoch) != (self.stages, self.first_epoch):
            self.stages, self.first_epoch, self._orders = stages, first_epoch, {}

    def locate(self, positions: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The source's name, and the index in its train windows: (B,) → str (B,), int64 (B,)."""
        sources, windows = self.locate_parts(positions)
        return np.array(list(self.sizes))[sources], windows

    def count(self, n: int) -> dict[str, int]:
        """How many of the first `n` positions each source has."""
        counts = self._order.count(n - self.first_epoch * len(self))
        return dict(zip(self.sizes, counts.tolist(), strict=True))

    def taken(self, ranges: Sequence[tuple[int, int]]) -> dict[str, tuple[int, np.ndarray]]:
        """`taken_windows` of each source, at positions [begin, end) of the run."""
        counts = [(self.count(begin), self.count(end)) for begin, end in ranges]
        return {
            name: taken_windows(order, [(first[name], last[name]) for first, last in counts])
            for name, order in zip(self.sizes, self._order.orders, strict=True)
        }

    def starts(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        sources, windows = self.locate_parts(indices)
        starts: np.ndarray = self._begins[sources] + windows * self.spans.stride
        return starts

    def locate_parts(self, indices: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        local = np.asarray(indices, dtype=np.int64) - self.first_epoch * len(self)
        if len(local) and local.min() < 0:
            raise IndexError(f"position {indices[int(local.argmin())]} is before the first one, 0")
        return self._order.at(local)

    @property
    def padding(self) -> float:
        counts = self._order.count(len(self))  # of its first epoch
        return float(np.average([part.padding for part in self.parts], weights=counts))

    def identity(self) -> dict[str, Any]:
        stride = self.spans.stride if self.kind == "sliding" else self.kind
        return {
            "sizes": self.sizes,
            "lengths": [self.spans.max_length, stride],
            "first_epoch": self.first_epoch,
            "stages": [[stage.begin, list(stage.weights)] for stage in self.stages],
        }

    def restore(self, saved: Any) -> None:
        if isinstance(saved, dict) and len(saved["stages"]) == len(self.stages):
            self.move([begin for begin, _ in saved["stages"]], saved["first_epoch"])
        super().restore(saved)

    def __getstate__(self) -> dict[str, Any]:  # caches of functions cannot be pickled
        state = {**vars(self), "_orders": {}}
        return state if self.spans.pad else {**state, "sources": {}, "parts": []}  # `tokens` has all

    def __str__(self) -> str:
        every = f"every {self.spans.stride} tokens" if self.kind == "sliding" else f"tokens, {self.kind}"
        windows = f"{len(self):,} windows of {self.spans.max_length} {every}"
        return f"{windows}, from {len(self.sizes)} sources"


def taken_windows(order: EndlessOrder, ranges: Sequence[tuple[int, int]]) -> tuple[int, np.ndarray]:
    """How many windows numbers [begin, end) of an order have, and which ones: bool (n,)."""
    taken, n = np.zeros(order.n, bool), order.n
    for begin, end in ranges:
        taken |= end - -(-begin // n) * n >= n  # has a whole epoch
        if taken.all():
            break
        for number in range(begin, end, CHUNK):
            taken[order.at(np.arange(number, min(number + CHUNK, end)))] = True
    return sum(end - begin for begin, end in ranges), taken


def _seed_of(name: str, seed: int) -> int:
    """A seed that depends on the name of a source, but not on the other sources."""
    digest = hashlib.sha256(f"{seed % 2**64}/{name}".encode()).digest()
    return int.from_bytes(digest[:8], "little")


def stage_begins(tokens: Sequence[int], segments: Sequence[RunSegment], max_length: int) -> list[int]:
    """Where stages start, as positions of a run; the first one starts at 0, and the last one has no end.

    `tokens`: lengths of the other stages, in input tokens of all ranks, each rounded up to whole steps.
    `segments`: of the run from its beginning, or from where this data starts.
    """
    batch, first = segments[0].batch, segments[0].start.epoch
    begins = [0]
    for length in tokens:
        if not segments[-1].limit:  # no batch trains
            begins.append(begins[-1] - (-length // max_length))
            continue
        windows = count_windows(segments, batch) - (-length // max_length)
        batches = range(batch, batch + windows)  # a batch has at least one window
        batch += bisect_left(batches, windows, key=lambda end: count_windows(segments, end))
        start = find_batch(segments, number_after(segments, batch))[1]
        begins.append((start.epoch - first) * segments[0].steps.n + start.index)
    return begins


def epochs_of(
    tokens: int, max_length: int, stages: Sequence[int], weights: Sequence[Mapping[str, float]],
    sizes: Mapping[str, int],
) -> dict[str, float]:  # fmt: skip
    """How many epochs of each source a run of `tokens` training tokens takes, without rounding.

    `stages`: lengths in tokens of all stages but the last. `weights`: of each stage. `sizes`: windows.
    """
    epochs = dict.fromkeys(sizes, 0.0)
    for length, shares in zip([*stages, tokens], weights, strict=True):
        taken = min(tokens, length)
        tokens -= taken
        for name, size in sizes.items():
            epochs[name] += taken / max_length * shares[name] / sum(shares.values()) / size
    return epochs
