"""A DataLoader over windows in a seeded order.

create_dataloader(text, batch_size=4, max_length=256, stride=128)  ->  (inputs, targets), (4, 256) each
"""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, DistributedSampler

from lit_gptdata._checks import check_at_least
from lit_gptdata.windows.dataset import Batch, WindowDataset, Windows, split
from lit_gptdata.windows.order import EpochPermutation
from lit_gptdata.windows.steps import Position, Steps

BLOCK = 16_384  # positions that become windows in one call, whose cost is then negligible

BatchFormat = Literal["tuple", "compact"]
"""What a train loader yields. "tuple": (inputs, targets). "compact": windows as they are in the store,
(B, max_length + 1), uint16 or uint32, which are split later on the device."""

CONVERTERS: dict[BatchFormat, Callable[..., Any]] = {"tuple": split, "compact": torch.from_numpy}


class WindowSampler(DistributedSampler[Any]):
    """One rank's slice of every step of an epoch, in the order that (seed, epoch) gives.

    `seed=None` means text order. Without `set_epoch`, each `iter()` starts the next epoch. Lightning
    calls `set_epoch` on a DistributedSampler and does not replace it, so this class is one.
    """

    def __init__(self, steps: Steps, *, seed: int | None, rank: int = 0) -> None:
        self.steps, self.order_seed, self.rank = steps, seed, rank
        self.start_at(Position(0, 0))

    def start_at(self, position: Position) -> None:
        """Start iterating at the epoch and index of `position`; later epochs start at index 0."""
        self.start, self.epoch = position, position.epoch

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        return (window for block in self.blocks() for window in block.tolist())

    def blocks(self) -> Iterator[np.ndarray]:
        """Start the next epoch: its windows, int64, in blocks of whole batches except for the last."""
        blocks = self.upcoming()
        self.epoch += 1
        return blocks

    def upcoming(self) -> Iterator[np.ndarray]:
        """The blocks that the next `iter()` or `blocks()` will give."""
        epoch = self.epoch
        index = self.start.index if epoch == self.start.epoch else 0
        permutation = EpochPermutation(n=self.steps.n, seed=self.order_seed, epoch=epoch)
        return (permutation.at(positions) for positions in self._positions(index))

    def _positions(self, index: int) -> Iterator[np.ndarray]:
        """The rank's positions from `index` on, about BLOCK at a time."""
        steps = self.steps
        full = (steps.n - index) // steps.width
        block_steps = max(1, BLOCK // steps.batch_size)
        for step in range(0, full, block_steps):
            begins = index + np.arange(step, min(step + block_steps, full)) * steps.width  # (S,)
            slices = begins[:, None] + (self.rank * steps.batch_size + np.arange(steps.batch_size))
            yield slices.ravel()  # (S, B) → (S * B,)
        if steps.remaining(index) > full:
            yield np.arange(*steps.rank_slice(index + full * steps.width, self.rank))

    def __len__(self) -> int:
        """Windows that the rank has in a whole epoch, even if the first one starts later."""
        steps = self.steps
        full = steps.n // steps.width
        tail = steps.rank_slice(full * steps.width, self.rank) if steps.remaining() > full else (0, 0)
        return full * steps.batch_size + tail[1] - tail[0]


class _Batches(Dataset[Batch]):
    """Gives a DataLoader all windows of a batch in one gather, without a stack of single items."""

    def __init__(self, windows: Windows, batch_format: BatchFormat) -> None:
        self.windows, self.batch_format = windows, batch_format
        self.waited = 0.0  # seconds that the consumer of the loader has waited for batches

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> Batch:
        return self.windows[index]

    def __getitems__(self, indices: Sequence[int]) -> Batch | Tensor:
        if self.windows.spans.pad:
            return self.windows.batch(indices)
        # A worker process sends compact windows, an eighth of the bytes. The main process splits them.
        return torch.from_numpy(next(self.windows.ids(np.asarray(indices), len(indices))))

    def inline(self, sampler: WindowSampler) -> Iterator[Batch | Tensor]:
        """The batches of an epoch without DataLoader's machinery, which costs more than the batches."""
        size = sampler.steps.batch_size
        for block in sampler.blocks():
            if self.windows.spans.pad:
                for begin in range(0, len(block), size):
                    yield self.windows.batch(block[begin : begin + size])
            else:
                yield from map(CONVERTERS[self.batch_format], self.windows.ids(block, size))


class WindowLoader(DataLoader[Any]):
    """A DataLoader that starts, and starts its workers, only when the first batch is requested.

    Lightning calls `iter()` before it restores a checkpoint and calls `set_epoch`. That is too early.
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
        # Lightning replaces the sampler to overfit, and the batch sampler to predict.
        sampler, untouched = self.sampler, type(self.batch_sampler) is BatchSampler
        if not isinstance(sampler, WindowSampler) or not untouched:
            return self._loaded()
        upcoming = sampler.upcoming()
        batches = self._loaded() if self.num_workers else self.dataset.inline(sampler)
        return self.dataset.windows.ahead(batches, upcoming, sampler.steps.batch_size)

    def _loaded(self) -> Iterator[Batch | Tensor]:
        convert = CONVERTERS[self.dataset.batch_format]
        for batch in super().__iter__():
            yield convert(batch.numpy()) if isinstance(batch, Tensor) else batch


def _identity(batch: Any) -> Any:
    return batch


def window_loader(
    windows: Windows,
    steps: Steps,
    *,
    seed: int | None,
    rank: int = 0,
    num_workers: int = 0,
    batch_format: BatchFormat = "tuple",
) -> WindowLoader:
    """Make a DataLoader of one rank's (inputs, targets), int64 (batch_size, max_length).

    `seed=None` means text order. `batch_format` applies to train windows. Raises ValueError if the
    windows do not make a single batch.
    """
    check_at_least("num_workers", num_workers, 0, "the number of processes that load batches")
    if not steps.remaining():
        ranks = f" on {steps.world_size} ranks" if steps.world_size > 1 else ""
        raise ValueError(
            f"batch_size={steps.batch_size}{ranks} with drop_last={steps.tail == 'drop'} leaves no "
            f"batch: there are {steps.n} windows. Set batch_size <= {steps.n // steps.world_size}, "
            "a smaller stride, or drop_last=False"
        )
    return WindowLoader(
        _Batches(windows, batch_format),
        batch_size=steps.batch_size,
        sampler=WindowSampler(steps, seed=seed, rank=rank),
        drop_last=steps.tail == "drop",
        num_workers=num_workers,
        collate_fn=_identity,
        # Without a generator, each iter() draws from the global one, which dropout uses.
        generator=torch.Generator(),
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
    """The course's helper: a text, tokenized as gpt2, in batches of windows.

    Without `shuffle`, the windows are in text order. With it, each `iter()` gives every window once in
    a new order, which `torch.manual_seed` before this call determines.
    """
    check_at_least("batch_size", batch_size, 1, "the number of windows in a batch")
    windows = WindowDataset(text, "gpt2", max_length=max_length, stride=stride)
    steps = Steps(n=len(windows), batch_size=batch_size, tail="drop" if drop_last else "share")
    seed = int(torch.empty((), dtype=torch.int64).random_().item())
    return window_loader(windows, steps, seed=seed if shuffle else None, num_workers=num_workers)
