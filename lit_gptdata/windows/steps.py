"""How an epoch is dealt out in steps, and each step to the ranks: pure integer arithmetic.

A step takes the next world_size × batch_size positions of the epoch's order, each rank its slice:

positions   0 1 2 3 4 5 6 7 8 9       n=10, batch_size=2, world_size=2
step 0      [0 1] [2 3]               rank 0, rank 1
step 1              [4 5] [6 7]
tail                      8 9         left out with drop_last, else a last, smaller step
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Position:
    """Where a run stands: the next window is at `index` of the order of `epoch`."""

    epoch: int
    index: int


@dataclass(frozen=True, kw_only=True)
class Steps:
    """The steps of an epoch of `n` windows.

    `tail`, the windows that do not fill a step: "drop": left out; "share": a last step, shared out
    evenly, or left out if they are fewer than ranks; "fill": a last step with as many on every rank,
    positions from `n` on being fillers.
    """

    n: int
    batch_size: int
    world_size: int = 1
    tail: Literal["drop", "share", "fill"] = "drop"

    @property
    def width(self) -> int:
        """Windows of a full step, over all ranks."""
        return self.batch_size * self.world_size

    def left(self, index: int = 0) -> int:
        """How many steps there are from position `index` to the epoch's end."""
        full, rest = divmod(max(0, self.n - index), self.width)
        least = {"drop": self.width, "share": self.world_size, "fill": 1}[self.tail]
        return full + (rest >= least)

    def limited(self, limit: int | float) -> int:
        """Steps of an epoch under `Trainer(limit_train_batches=limit)`: a number, or a share."""
        return min(limit, self.left()) if isinstance(limit, int) else int(self.left() * limit)

    def before(self, index: int) -> int:
        """Steps that count as done at position `index`: with those left, they make a whole epoch."""
        return self.left() - self.left(index)

    def share(self, index: int, rank: int) -> tuple[int, int]:
        """Positions [begin, end) of a rank in the step that begins at position `index`."""
        windows = min(self.width, self.n - index)
        if self.tail == "fill":
            size = -(-windows // self.world_size)
            return index + rank * size, index + (rank + 1) * size
        return index + rank * windows // self.world_size, index + (rank + 1) * windows // self.world_size


@dataclass(frozen=True, kw_only=True)
class Leg:
    """A stretch of a run with one batch size and number of ranks, from one position on."""

    batch: int
    """How many batches the run had before, counted on every rank alike."""

    start: Position
    steps: Steps

    limit: int
    """Steps that the trainer takes of an epoch: `steps.left()`, or fewer."""

    @classmethod
    def whole(cls, steps: Steps) -> Leg:
        """A run of these steps from its beginning on."""
        return cls(batch=0, start=Position(0, 0), steps=steps, limit=steps.left())

    @property
    def first(self) -> int:
        """How many batches the leg takes of its first epoch."""
        return self.limit - self.steps.before(self.start.index)

    def position(self, batch: int) -> Position:
        """Where the run stands before its batch `batch`, which is not before the leg's first."""
        ahead = batch - self.batch
        if ahead < self.first:
            return Position(self.start.epoch, self.start.index + ahead * self.steps.width)
        epochs, ahead = divmod(ahead - self.first, self.limit)
        return Position(self.start.epoch + 1 + epochs, ahead * self.steps.width)

    def batch_of(self, step: int, epoch: int) -> int:
        """The batch of the run that is step `step` of `epoch`, below `self.batch` if there is none."""
        if not 0 <= step < self.limit or epoch < self.start.epoch:
            return -1
        if epoch == self.start.epoch:
            return self.batch + step - self.steps.before(self.start.index)
        return self.batch + self.first + (epoch - self.start.epoch - 1) * self.limit + step

    def as_dict(self) -> dict[str, Any]:
        """Plain values, without the number of windows."""
        return {
            "batch": self.batch,
            "epoch": self.start.epoch,
            "index": self.start.index,
            "batch_size": self.steps.batch_size,
            "world_size": self.steps.world_size,
            "tail": self.steps.tail,
            "limit": self.limit,
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any], n: int) -> Leg:
        """What `as_dict` gave, over `n` windows."""
        steps = Steps(
            n=n,
            batch_size=values["batch_size"],
            world_size=values["world_size"],
            tail=values["tail"],
        )
        start = Position(values["epoch"], values["index"])
        return cls(batch=values["batch"], start=start, steps=steps, limit=values["limit"])


def find(legs: Sequence[Leg], step: int, epoch: int | None = None) -> tuple[Steps, Position]:
    """The steps that a batch is one of, and where it begins.

    `step` is counted from 0 over the whole run, or within `epoch`, where it is what Lightning calls
    batch_idx: after a change of batch size, the count that makes the epoch's steps whole. Raises
    ValueError for a step that the run does not have.
    """
    end = None
    for leg in reversed(legs):
        batch = step if epoch is None else leg.batch_of(step, epoch)
        if leg.limit and batch >= leg.batch and (end is None or batch < end):
            return leg.steps, leg.position(batch)
        end = leg.batch
    where = "" if epoch is None else f" of epoch {epoch}"
    last = legs[-1]
    raise ValueError(
        f"step={step}{where} does not exist: the run begins with step {legs[0].batch}, in epoch "
        f"{legs[0].start.epoch}, and an epoch has {last.limit} steps of "
        f"batch_size={last.steps.batch_size} on {last.steps.world_size} ranks"
    )
