"""A DataLoader over windows, in a seeded order.

create_dataloader(text, batch_size=4, max_length=256, stride=128)  ->  (inputs, targets), (4, 256) each
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from lit_gptdata.windows.dataset import WindowDataset, Windows
from lit_gptdata.windows.order import EpochOrder
from lit_gptdata.windows.spans import check_at_least
from lit_gptdata.windows.steps import Position, Steps

Batch = tuple[Tensor, Tensor]

BLOCK = 16_384
"""Positions that are turned into windows at a time: enough that Python's cost a call disappears."""


class WindowSampler(DistributedSampler[Any]):
    """A rank's slice of every step of an epoch, in the order of (seed, epoch).

    `seed=None`: in the text's order. Each `iter()` begins the next epoch, if `set_epoch` does not say
    which. It is a DistributedSampler because Lightning calls its `set_epoch` and leaves it in place.
    """

    def __init__(self, steps: Steps, *, seed: int | None, rank: int = 0) -> None:
        self.steps, self.order_seed, self.rank = steps, seed, rank
        self.start_at(Position(0, 0))

    def start_at(self, position: Position) -> None:
        """Begin with this epoch, at this index; other epochs begin at 0."""
        self.start, self.epoch = position, position.epoch

    def set_epoch(self, epoch: int) -> None:
        """The epoch of the next `iter()`, counted from 0."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        epoch = self.epoch
        self.epoch += 1
        index = self.start.index if epoch == self.start.epoch else 0
        order = EpochOrder(n=self.steps.n, seed=self.order_seed, epoch=epoch)
        return (window for block in self._blocks(index) for window in order.at(block).tolist())

    def _blocks(self, index: int) -> Iterator[np.ndarray]:
        """The rank's positions from position `index` on, about BLOCK at a time."""
        steps = self.steps
        left, full = steps.left(index), (steps.n - index) // steps.width
        at_a_time = max(1, BLOCK // steps.batch_size)
        for step in range(0, full, at_a_time):
            begins = index + np.arange(step, min(step + at_a_time, full)) * steps.width  # (S,)
            slices = begins[:, None] + (self.rank * steps.batch_size + np.arange(steps.batch_size))
            yield slices.ravel()  # (S, B) → (S * B,)
        if left > full:
            yield np.arange(*steps.share(index + full * steps.width, self.rank))

    def __len__(self) -> int:
        """Windows that the rank has of a whole epoch, whatever of the first is left to do."""
        steps = self.steps
        full = steps.n // steps.width
        begin, end = steps.share(full * steps.width, self.rank) if steps.left() > full else (0, 0)
        return full * steps.batch_size + end - begin


class _Batches(Dataset[Batch]):
    """Lets DataLoader ask for a batch's windows together: one gather instead of B items and a stack."""

    def __init__(self, windows: Windows) -> None:
        self.windows = windows

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> Batch:
        return self.windows[index]

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        return self.windows.batch(indices)


class WindowLoader(DataLoader[Batch]):
    """A DataLoader that begins, and starts its workers, when the first batch is asked for.

    Lightning asks for an iterator before it has restored a checkpoint and before `set_epoch`.
    """

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        yield from super().__iter__()


def _as_it_is(batch: Any) -> Batch:
    return batch  # type: ignore[no-any-return]


def window_loader(
    windows: Windows,
    steps: Steps,
    *,
    seed: int | None,
    rank: int = 0,
    num_workers: int = 0,
) -> WindowLoader:
    """A DataLoader of a rank's (inputs, targets), int64 (batch_size, max_length), contiguous.

    `seed=None`: in the text's order. Raises ValueError if `num_workers` is negative, or if there is
    not one batch.
    """
    check_at_least("num_workers", num_workers, 0, "the number of processes that load batches")
    if not steps.left():
        ranks = f" on {steps.world_size} ranks" if steps.world_size > 1 else ""
        raise ValueError(
            f"batch_size={steps.batch_size}{ranks} with drop_last={steps.tail == 'drop'} leaves no "
            f"batch: there are {steps.n} windows. Set batch_size <= {steps.n // steps.world_size}, "
            "a smaller stride, or drop_last=False"
        )
    return WindowLoader(
        _Batches(windows),
        batch_size=steps.batch_size,
        sampler=WindowSampler(steps, seed=seed, rank=rank),
        drop_last=steps.tail == "drop",
        num_workers=num_workers,
        collate_fn=_as_it_is,
        generator=torch.Generator(),  # else each iter() draws from the global one, which dropout uses
    )


def create_dataloader(
    text: str,
    batch_size: int = 4,
    max_length: int = 256,
    stride: int = 128,
    shuffle: bool = True,
    drop_last: bool = True,
    num_workers: int = 0,
) -> DataLoader[Batch]:
    """The course's helper: a text, encoded as gpt2, as batches of windows.

    Unshuffled, the windows come in the text's order; shuffled, each `iter()` has every window once in
    an order of its own, which `torch.manual_seed` before this call decides.
    """
    check_at_least("batch_size", batch_size, 1, "the number of windows in a batch")
    windows = WindowDataset(text, "gpt2", max_length=max_length, stride=stride)
    steps = Steps(n=len(windows), batch_size=batch_size, tail="drop" if drop_last else "share")
    seed = int(torch.empty((), dtype=torch.int64).random_().item())
    return window_loader(windows, steps, seed=seed if shuffle else None, num_workers=num_workers)
