"""A DataLoader over windows, in a seeded order.

create_dataloader(text, batch_size=4, max_length=256, stride=128)  ->  (inputs, targets), (4, 256) each
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, DistributedSampler

from lit_gptdata._checks import check_at_least
from lit_gptdata.windows.dataset import Batch, WindowDataset, Windows, split, split_into_views
from lit_gptdata.windows.order import EpochOrder
from lit_gptdata.windows.steps import Position, Steps

BLOCK = 16_384
"""Positions that are turned into windows at a time: enough that Python's cost a call disappears."""


Form = Literal["contiguous", "views", "compact"]
"""What a training loader gives: two tensors of their own, two views of one, or the windows as they lie
in the store, (B, max_length + 1), uint16 or uint32, to be split later."""


FORMS: dict[Form, Callable[[np.ndarray], Batch | Tensor]] = {
    "contiguous": split,
    "views": split_into_views,
    "compact": torch.from_numpy,
}


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
        return (window for block in self.blocks() for window in block.tolist())

    def blocks(self) -> Iterator[np.ndarray]:
        """The next epoch's windows, int64, in blocks of whole batches; the last may be smaller."""
        blocks = self.upcoming()
        self.epoch += 1
        return blocks

    def upcoming(self) -> Iterator[np.ndarray]:
        """The blocks that the next `iter()` or `blocks()` gives."""
        epoch = self.epoch
        index = self.start.index if epoch == self.start.epoch else 0
        order = EpochOrder(n=self.steps.n, seed=self.order_seed, epoch=epoch)
        return (order.at(positions) for positions in self._positions(index))

    def _positions(self, index: int) -> Iterator[np.ndarray]:
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
    """Lets a DataLoader ask for a batch's windows together: one gather, not B items and a stack."""

    def __init__(self, windows: Windows, form: Form) -> None:
        self.windows, self.form = windows, form
        self.waited = 0.0  # seconds that whoever iterates has waited for batches

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> Batch:
        return self.windows[index]

    def __getitems__(self, indices: Sequence[int]) -> Batch | Tensor:
        if self.windows.spans.fill:
            return self.windows.batch(indices)
        # Worker processes send an eighth of the bytes this way; whoever asked them splits.
        return torch.from_numpy(next(self.windows.ids(np.asarray(indices), len(indices))))

    def inline(self, sampler: WindowSampler) -> Iterator[Batch | Tensor]:
        """An epoch's batches without the DataLoader's machinery, which costs more than they do."""
        size = sampler.steps.batch_size
        for block in sampler.blocks():
            if self.windows.spans.fill:
                for begin in range(0, len(block), size):
                    yield self.windows.batch(block[begin : begin + size])
            else:
                yield from map(FORMS[self.form], self.windows.ids(block, size))


class WindowLoader(DataLoader[Any]):
    """A DataLoader that begins, and starts its workers, when the first batch is asked for.

    Lightning asks for an iterator before it has restored a checkpoint and before `set_epoch`.
    """

    dataset: _Batches

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        batches, dataset, clock = self._batches(), self.dataset, time.perf_counter
        while True:
            asked = clock()
            batch = next(batches, None)
            dataset.waited += clock() - asked
            if batch is None:
                return
            yield batch

    def _batches(self) -> Iterator[Batch | Tensor]:
        # Lightning puts another sampler, or a batch sampler that takes notes, in place to overfit
        # and to predict.
        sampler, untouched = self.sampler, type(self.batch_sampler) is BatchSampler
        if not isinstance(sampler, WindowSampler) or not untouched:
            return self._loaded()
        upcoming = sampler.upcoming()
        batches = self._loaded() if self.num_workers else self.dataset.inline(sampler)
        return self.dataset.windows.ahead(batches, upcoming, sampler.steps.batch_size)

    def _loaded(self) -> Iterator[Batch | Tensor]:
        for batch in super().__iter__():
            yield FORMS[self.dataset.form](batch.numpy()) if isinstance(batch, Tensor) else batch


def _as_it_is(batch: Any) -> Any:
    return batch


def window_loader(
    windows: Windows,
    steps: Steps,
    *,
    seed: int | None,
    rank: int = 0,
    num_workers: int = 0,
    form: Form = "contiguous",
) -> WindowLoader:
    """A DataLoader of a rank's (inputs, targets), int64 (batch_size, max_length).

    `seed=None`: in the text's order. `form`: of training windows. Raises ValueError if `num_workers`
    is negative, or if there is not one batch.
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
        _Batches(windows, form),
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
