"""Which windows a rank reads in an epoch, and where a run is in its data.

WindowSampler(steps, seed=0)  ──start_epoch()──▶  EpochSlice  ──blocks()──▶  windows, int64
        ▲                                                         │
        └──────────── start_at(Position) ◀── position() ◀─────────┘
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch.utils.data import DistributedSampler, SequentialSampler

from lit_gptdata.windows.dataset import Block
from lit_gptdata.windows.order import EpochPermutation
from lit_gptdata.windows.ranks import DrawnSeed, Ranks, accelerate_reads, check_launched, current_ranks
from lit_gptdata.windows.steps import Position, RunSegment, Steps, epoch_batches, find_batch

BLOCK = 16_384  # positions that become windows in one call, whose cost is then negligible


@dataclass(frozen=True, kw_only=True)
class EpochSlice:
    """One rank's windows of an epoch, from position `start` on."""

    steps: Steps
    rank: int
    start: Position
    permutation: EpochPermutation
    parts: Sequence[tuple[int, Steps, int]]
    """Where the batch size changes: (index, steps, number of steps)."""

    def blocks(self) -> Iterator[Block]:
        """The windows, int64, about BLOCK at a time, in whole batches except for the last."""
        for index, steps, number in self.parts:
            full = min(number, max(0, steps.n - index) // steps.width)
            block_steps = max(1, BLOCK // steps.batch_size)
            for step in range(0, full, block_steps):
                begins = index + np.arange(step, min(step + block_steps, full)) * steps.width  # (S,)
                slices = begins[:, None] + (self.rank * steps.batch_size + np.arange(steps.batch_size))
                yield self.permutation.at(slices.ravel()), steps.batch_size  # (S, B) → (S * B,)
            if number > full:
                last = np.arange(*steps.rank_slice(index + full * steps.width, self.rank))
                yield self.permutation.at(last), steps.batch_size

    def position(self, n_batches: int) -> Position:
        """The position after `n_batches` of this rank's batches, at most the end of the epoch."""
        index = self.start.index
        for begin, steps, number in self.parts:
            index = min(begin + min(n_batches, number) * steps.width, steps.n)
            n_batches -= min(n_batches, number)
            if not n_batches:
                break
        return Position(self.start.epoch, index)


def epoch_parts(segments: Sequence[RunSegment], start: Position) -> list[tuple[int, Steps, int]]:
    """The sizes of an epoch from `start` on: [(index, steps, number of steps), …].

    The Trainer may take fewer: see `epoch_batches`.
    """
    before = [s for s in segments if (s.start.epoch, s.start.index) <= (start.epoch, start.index)]
    later = [s for s in segments if s.start.epoch == start.epoch and s.start.index > start.index]
    parts, index = [], start.index
    for segment, after in zip([*before[-1:], *later], [*later, None], strict=True):
        steps = segment.steps
        number = (after.start.index - index) // steps.width if after else steps.remaining(index)
        if not segment.skip:
            parts.append((index, steps, number))
        index = after.start.index if after else index
    return parts


def positions_of(steps: Steps, step: int, rank: int, world_size: int | None = None) -> np.ndarray:
    """The positions of a rank in a step, int64 (B,); raises ValueError if it does not exist."""
    steps = replace(steps, world_size=world_size or steps.world_size)
    if not (0 <= step < steps.remaining() and 0 <= rank < steps.world_size):
        sizes = f"{steps.remaining()} steps on {steps.world_size} ranks"
        raise ValueError(f"step={step}, rank={rank} does not exist: there are {sizes}")
    return np.arange(*steps.rank_slice(step * steps.width, rank))


def windows_of_batch(
    segments: Sequence[RunSegment],
    step: int,
    epoch: int | None,
    *,
    rank: int,
    seed: int | None,
    order: type[EpochPermutation] = EpochPermutation,
) -> np.ndarray:
    """The windows of a rank in the batch that `find_batch` finds: int64 (B,)."""
    segment, position = find_batch(segments, step, epoch)
    steps = segment.steps
    if not 0 <= rank < steps.world_size:
        raise ValueError(f"rank={rank} does not exist: give a rank in [0, {steps.world_size})")
    if segment.text_order:
        seed, order = None, EpochPermutation
    permutation = order(n=steps.n, seed=seed, epoch=position.epoch)
    return permutation.at(np.arange(*steps.rank_slice(position.index, rank)))


class WindowSampler(DistributedSampler[Any]):
    """One rank's slice of every step of an epoch, in the order that (seed, epoch) gives.

    `seed=None` means text order. `rank=None` means the rank and world size that torch.distributed has
    when an epoch starts. Without `set_epoch`, each `iter()` starts the next epoch. Lightning and Fabric
    call `set_epoch` on a DistributedSampler and do not replace it, so this class is one.
    """

    def __init__(
        self,
        steps: Steps,
        *,
        seed: int | DrawnSeed | None,
        rank: int | None = None,
        order: type[EpochPermutation] = EpochPermutation,
    ) -> None:
        self._steps, self._rank, self.order_seed, self._order = steps, rank, seed, order
        self._plan: Sequence[RunSegment] = ()
        self.start_at(Position(0, 0))

    @property
    def ranks(self) -> Ranks:
        """The rank of this process and the world size, now."""
        return current_ranks() if self._rank is None else Ranks(self._rank, self._steps.world_size)

    @property
    def steps(self) -> Steps:
        """The steps of an epoch on the present number of ranks."""
        return replace(self._steps, world_size=self.ranks.world_size)

    @property
    def n_batches(self) -> int:
        """Batches of the next epoch, or of the one that `set_epoch` chose."""
        return epoch_batches(self._plan, self.epoch) if self._plan else self.steps.remaining()

    def start_at(self, position: Position, plan: Sequence[RunSegment] = ()) -> None:
        """Start iterating at the epoch and index of `position`; later epochs start at index 0.

        `plan`: the segments of the run, if its batch size changes.
        """
        self._plan = plan
        self.start, self.epoch = position, position.epoch
        self._epoch_offset, self._epoch_set = 0, -1  # what `set_epoch` adds, and what it got last
        self.restored = False  # True after `load_state_dict`, until the caller sets an epoch
        self._current: EpochSlice | None = None
        self.is_foreign = False  # whether a loader that is not ours iterates
        self._n_batches = 0  # of `_current` that the consumer has

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next `iter()`.

        The first call after `load_state_dict` means the pass in which the state was saved. Its number
        differs if the caller counts from 0 again, as Fabric does in a new process, or never stopped to
        count. The difference is then added to later calls.
        """
        if not self.restored:
            self.epoch = epoch + self._epoch_offset
        elif epoch != self._epoch_set:
            self._epoch_offset = self.epoch - epoch
        self._epoch_set, self.restored = epoch, False

    def start_epoch(self, ranks: Ranks | None = None) -> EpochSlice:
        """Start the next epoch. Raises RuntimeError if this process cannot know its rank."""
        if self._rank is None:
            check_launched()
        rank, world_size = ranks or self.ranks
        steps = replace(self._steps, world_size=world_size)
        start, seed = Position(self.epoch, self._index), self.order_seed
        seed = seed.share() if isinstance(seed, DrawnSeed) else seed
        permutation = self._order(n=steps.n, seed=seed, epoch=start.epoch)
        alone = [(start.index, steps, steps.remaining(start.index))]
        parts = epoch_parts(self._plan, start) if self._plan else alone
        self._current = EpochSlice(
            steps=steps, rank=rank, start=start, permutation=permutation, parts=parts
        )
        self._n_batches = 0
        self.start, self.epoch = Position(start.epoch + 1, 0), start.epoch + 1
        return self._current

    @property
    def _index(self) -> int:
        """Where the epoch that `iter()` would start begins."""
        return self.start.index if self.epoch == self.start.epoch else 0

    def consumed(self, epoch: EpochSlice, n_batches: int) -> None:
        """Note that the consumer has `n_batches` batches of the epoch that started last."""
        if epoch is self._current:
            self._n_batches = n_batches

    def position(self, unfinished: int = 0) -> Position:
        """Where the next window of the run is, if the last `unfinished` batches are to be repeated."""
        if self._current is None:
            return Position(self.epoch, self._index)
        return self._current.position(max(0, self._n_batches - unfinished))

    def finish(self, epoch: EpochSlice) -> None:
        """Note that the epoch that started last is over."""
        if epoch is self._current:
            self._current = None

    @property
    def _foreign_ranks(self) -> Ranks:
        """The ranks for a DataLoader that is not ours; accelerate divides its batches itself."""
        return Ranks(0, 1) if accelerate_reads(1) else self.ranks

    def __iter__(self) -> Iterator[int]:
        """The windows for a DataLoader that is not ours."""
        current, n_windows = self.start_epoch(self._foreign_ranks), 0
        self.is_foreign = True
        ahead = accelerate_reads(self.ranks.world_size)  # it fetches a step ahead
        for block, _ in current.blocks():
            for window in block.tolist():
                n_windows += 1
                n_batches, rest = divmod(n_windows, current.steps.batch_size)
                if not rest:
                    self.consumed(current, max(0, n_batches - n_batches % max(1, ahead) - ahead))
                yield window
        self.finish(current)

    def __len__(self) -> int:
        """Windows that a DataLoader that is not ours has in a whole epoch."""
        rank, world_size = self._foreign_ranks
        return replace(self._steps, world_size=world_size).windows_of_rank(rank)

    def state_dict(self) -> dict[str, Any]:
        """Where the next window is, the seed of the order, and what `set_epoch` got, in plain values."""
        position, seed = self.position(), self.order_seed
        seed = seed.value if isinstance(seed, DrawnSeed) else seed
        counts = [self._epoch_set if self._current else -1, self._epoch_offset]
        return {"epoch": position.epoch, "index": position.index, "seed": seed, "set_epoch": counts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue at a saved position. Raises ValueError if the state has another seed."""
        if isinstance(self.order_seed, DrawnSeed) and state["seed"] is not None:
            self.order_seed.set(state["seed"])
        elif state["seed"] != self.order_seed:
            seeds = f"seed={state['seed']!r}, this loader has seed={self.order_seed!r}"
            raise ValueError(f"the state was saved with {seeds}: set the same seed and shuffle")
        epoch, index = state["epoch"], state["index"]
        is_over = index and not self.steps.remaining(index)
        self.start_at(Position(epoch + 1, 0) if is_over else Position(epoch, index))
        self._epoch_set, self._epoch_offset = state.get("set_epoch", (-1, 0))
        if is_over:  # the caller's next pass is the next epoch, whatever its number
            self._epoch_set = -1
        self.restored = True


class TextOrderSampler(WindowSampler, SequentialSampler):
    """Windows in text order. To overfit, Lightning replaces samplers that are not sequential."""
