"""How an epoch is divided into steps, and each step into one slice per rank. Nothing is read.

A step takes the next world_size × batch_size positions of the epoch's permutation:

positions   0 1 2 3 4 5 6 7 8 9       n=10, batch_size=2, world_size=2
step 0      [0 1] [2 3]               rank 0, rank 1
step 1              [4 5] [6 7]
tail                      8 9         dropped with drop_last, otherwise a smaller last step
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from lit_gptdata.windows.order import EpochPermutation

Tail = Literal["drop", "share", "pad"]
"""What happens to the last windows of an epoch, which do not fill a step.

"drop": they are left out. "share": a last step divides them among the ranks, unless there are fewer
windows than ranks. "pad": a last step gives each rank the same number of positions, and positions from
`n` on are padding."""


@dataclass(frozen=True)
class Position:
    """A point of a run: its next window is at `index` of the permutation of `epoch`."""

    epoch: int
    index: int


@dataclass(frozen=True, kw_only=True)
class Steps:
    """The steps of an epoch of `n` windows."""

    n: int
    batch_size: int
    world_size: int = 1
    tail: Tail = "drop"

    @property
    def width(self) -> int:
        """Windows of a full step, over all ranks."""
        return self.batch_size * self.world_size

    def remaining(self, index: int = 0) -> int:
        """Number of steps from position `index` to the end of the epoch."""
        full, rest = divmod(max(0, self.n - index), self.width)
        least = {"drop": self.width, "share": self.world_size, "pad": 1}[self.tail]
        return full + (rest >= least)

    def done(self, index: int) -> int:
        """Number of steps before position `index`: an epoch's steps minus the remaining ones."""
        return self.remaining() - self.remaining(index)

    def limited(self, limit: int | float) -> int:
        """Steps per epoch under `Trainer(limit_train_batches=limit)`, a number or a fraction."""
        total = self.remaining()
        return min(limit, total) if isinstance(limit, int) else int(total * limit)

    def windows_of_rank(self, rank: int) -> int:
        """Number of windows that a rank has in an epoch."""
        full = self.n // self.width
        begin, end = self.rank_slice(full * self.width, rank) if self.remaining() > full else (0, 0)
        return full * self.batch_size + end - begin

    def rank_slice(self, index: int, rank: int) -> tuple[int, int]:
        """Positions [begin, end) of a rank in the step that starts at position `index`."""
        windows = min(self.width, self.n - index)
        if self.tail == "pad":
            size = -(-windows // self.world_size)
            return index + rank * size, index + (rank + 1) * size
        return index + rank * windows // self.world_size, index + (rank + 1) * windows // self.world_size


@dataclass(frozen=True, kw_only=True)
class RunSegment:
    """A part of a run during which the batch size and the number of ranks stay the same."""

    batch: int
    """Number of batches that the run took before, counted on one rank."""
    start: Position
    steps: Steps
    limit: int
    """Steps that the Trainer takes per epoch: all of `steps`, or fewer."""
    text_order: bool = False
    """True if the Trainer overfits: each epoch has its first windows in text order."""

    @classmethod
    def from_beginning(cls, steps: Steps) -> RunSegment:
        """A run of these steps that starts with the first window."""
        return cls(batch=0, start=Position(0, 0), steps=steps, limit=steps.remaining())

    @property
    def _epoch_batch(self) -> int:
        """The batch number of step 0 of the first epoch, as if the segment had taken all its steps."""
        return self.batch - self.steps.done(self.start.index)

    def position(self, batch: int) -> Position:
        """Where batch `batch` of the run starts. It must not be before the segment's first batch."""
        epochs, step = divmod(batch - self._epoch_batch, self.limit)
        if not epochs:  # the segment may start at an index that its own steps never reach
            return Position(self.start.epoch, self.start.index + (batch - self.batch) * self.steps.width)
        return Position(self.start.epoch + epochs, step * self.steps.width)

    def batches_before(self, position: Position) -> int:
        """Number of batches of the run before `position`, which is where a step starts or ends."""
        epochs = position.epoch - self.start.epoch
        return self._epoch_batch + epochs * self.limit + self.steps.done(position.index)

    def batch_of(self, step: int, epoch: int) -> int:
        """The run's batch that is step `step` of `epoch`; less than `self.batch` if there is none."""
        if not 0 <= step < self.limit or epoch < self.start.epoch:
            return -1
        return self._epoch_batch + (epoch - self.start.epoch) * self.limit + step

    def as_dict(self) -> dict[str, Any]:
        """The segment in plain values, as a checkpoint holds it. These keys are an on-disk format."""
        values = asdict(self)
        values |= values.pop("start") | values.pop("steps")
        del values["n"]  # the number of windows follows from the data
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any], n: int) -> RunSegment:
        """Read what `as_dict` wrote, for a run over `n` windows."""
        steps = Steps(n=n, **{name: values[name] for name in ("batch_size", "world_size", "tail")})
        start = Position(values["epoch"], values["index"])
        text_order = values.get("text_order", False)  # absent from older checkpoints
        batch, limit = values["batch"], values["limit"]
        return cls(batch=batch, start=start, steps=steps, limit=limit, text_order=text_order)


def find_batch(
    segments: Sequence[RunSegment], step: int, epoch: int | None = None
) -> tuple[RunSegment, Position]:
    """Find the segment that a batch belongs to, and the position where it starts.

    `step` counts from 0 over the whole run. With `epoch` it counts within the epoch and equals
    Lightning's batch_idx. After a change of batch size it continues from the steps done by then,
    measured in new steps. Raises ValueError for a step that the run does not have.
    """
    next_batch = None  # the first batch of the following segment
    for segment in reversed(segments):
        batch = step if epoch is None else segment.batch_of(step, epoch)
        if segment.limit and batch >= segment.batch and (next_batch is None or batch < next_batch):
            return segment, segment.position(batch)
        next_batch = segment.batch
    where = "" if epoch is None else f" of epoch {epoch}"
    first, last = segments[0], segments[-1]
    raise ValueError(
        f"step={step}{where} does not exist: the run starts with step {first.batch}, in epoch "
        f"{first.start.epoch}, and an epoch has {last.limit} steps of "
        f"batch_size={last.steps.batch_size} on {last.steps.world_size} ranks"
    )


def trained_ranges(segments: Sequence[RunSegment], stop: int) -> list[tuple[int, int]]:
    """The positions [begin, end) of all ranks' batches before `stop`; epoch e starts at e * n."""
    ranges: list[tuple[int, int]] = []
    ends = [*(segment.batch for segment in segments[1:]), stop]
    for segment, end in zip(segments, ends, strict=True):
        if segment.text_order:
            raise ValueError("the run overfits: each of its epochs has the same first windows")
        batch, steps = segment.batch, segment.steps
        while segment.limit and batch < (end := min(end, stop)):
            position = segment.position(batch)
            last = segment.batches_before(Position(position.epoch, 0)) + segment.limit  # of the epoch
            begin, batches = position.epoch * steps.n + position.index, min(last, end) - batch
            to = min(begin + batches * steps.width, (position.epoch + 1) * steps.n)
            if ranges and ranges[-1][1] == begin:
                begin = ranges.pop()[0]
            ranges.append((begin, to))
            batch += batches
    return ranges


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
