"""A DataLoader over windows, in a seeded order.

create_dataloader(text, batch_size=4, max_length=256, stride=128)  ->  (inputs, targets), (4, 256) each
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, SequentialSampler

from lit_gptdata.windows.dataset import WindowDataset, Windows
from lit_gptdata.windows.order import EpochOrder
from lit_gptdata.windows.spans import check_at_least

Batch = tuple[Tensor, Tensor]

BLOCK = 16_384
"""Positions that are turned into windows at a time: enough that Python's cost a call disappears."""


class EpochSampler(Sampler[int]):
    """Every window once an epoch, in the order of (seed, epoch); each `iter()` begins the next epoch.

    Lightning calls `set_epoch` before it iterates.
    """

    def __init__(self, n: int, seed: int) -> None:
        self.n, self.seed, self.epoch = n, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """The epoch of the next `iter()`, counted from 0."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        order = EpochOrder(n=self.n, seed=self.seed, epoch=self.epoch)
        self.epoch += 1
        return (
            index
            for start in range(0, self.n, BLOCK)
            for index in order.block(start, min(start + BLOCK, self.n)).tolist()
        )

    def __len__(self) -> int:
        return self.n


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


def _as_it_is(batch: Any) -> Batch:
    return batch  # type: ignore[no-any-return]


def window_loader(
    windows: Windows,
    *,
    batch_size: int,
    shuffle: bool,
    seed: int,
    drop_last: bool,
    num_workers: int,
) -> DataLoader[Batch]:
    """A DataLoader of (inputs, targets), int64 (batch_size, max_length), contiguous.

    Raises ValueError if `batch_size` or `num_workers` is too small, or if there is not one batch.
    """
    check_at_least("batch_size", batch_size, 1, "the number of windows in a batch")
    check_at_least("num_workers", num_workers, 0, "the number of processes that load batches")
    n = len(windows)
    if drop_last and n < batch_size:
        raise ValueError(
            f"batch_size={batch_size} with drop_last=True leaves no batch: there are {n} windows. Set "
            f"batch_size <= {n}, a smaller stride, or drop_last=False"
        )
    return DataLoader(
        _Batches(windows),
        batch_size=batch_size,
        sampler=EpochSampler(n, seed) if shuffle else SequentialSampler(range(n)),
        drop_last=drop_last,
        num_workers=num_workers,
        collate_fn=_as_it_is,
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
    windows = WindowDataset(text, "gpt2", max_length=max_length, stride=stride)
    seed = int(torch.empty((), dtype=torch.int64).random_().item())
    return window_loader(
        windows,
        batch_size=batch_size,
        shuffle=shuffle,
        seed=seed,
        drop_last=drop_last,
        num_workers=num_workers,
    )
