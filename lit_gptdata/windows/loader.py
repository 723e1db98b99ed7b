"""A DataLoader over windows in a seeded order.

create_dataloader(text, batch_size=4, max_length=256, stride=128)  ->  (inputs, targets), (4, 256) each
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, default_collate

from lit_gptdata._checks import check_flag, check_integer
from lit_gptdata.windows.dataset import (
    FORMATS,
    Batch,
    BatchFormat,
    WindowDataset,
    Windows,
    batches_of,
    split,
)
from lit_gptdata.windows.order import EpochPermutation
from lit_gptdata.windows.ranks import DrawnSeed
from lit_gptdata.windows.sampler import EpochSlice, TextOrderSampler, WindowSampler
from lit_gptdata.windows.steps import Steps

WORKER_OPTIONS = (
    "num_workers", "worker_init_fn", "multiprocessing_context", "prefetch_factor", "pin_memory",
    "timeout", "generator",
)  # fmt: skip


class _StoredWindows(Dataset[np.ndarray]):
    """Windows as worker processes send them: as in the store, an eighth of the bytes of a batch."""

    def __init__(self, windows: Windows) -> None:
        self.windows = windows

    def __getitem__(self, indices: np.ndarray) -> np.ndarray:
        return self.windows.rows(indices)


class WindowLoader(DataLoader[Any]):
    """A DataLoader that starts, and starts its workers, only when the first batch is requested.

    Lightning calls `iter()` before it restores a checkpoint and calls `set_epoch`. That is too early.
    """

    dataset: Windows
    batch_format: BatchFormat = "tuple"
    is_compact = False  # True: the windows' rows, (B, max_length + 1), for `split_on_device`
    keeps_state = True  # False: the data module keeps the position, under a Trainer
    waited = 0.0  # seconds that the consumer has waited for batches

    def __iter__(self) -> _Pass:  # type: ignore[override]
        return _Pass(self)

    def __len__(self) -> int:
        return self._ours.n_batches if self._ours else super().__len__()

    @property
    def _ours(self) -> WindowSampler | None:
        """Our sampler, unless Lightning replaced it, or the batch sampler as it does to predict."""
        sampler, untouched = self.sampler, type(self.batch_sampler) is BatchSampler
        return sampler if untouched and isinstance(sampler, WindowSampler) else None

    def batches(self) -> Iterator[Any]:
        """Start the next epoch: its batches."""
        if (sampler := self._ours) is None:
            yield from super().__iter__()
            return
        epoch = sampler.start_epoch()
        if self.keeps_state:  # otherwise the number of ranks was known when the loader was made
            check_not_empty(epoch.steps)
        batches = self._loaded(epoch) if self.num_workers else self._inline(epoch)
        batches = self.dataset.ahead(batches, epoch.blocks())
        to_format = FORMATS[self.batch_format]
        for n_batches, rows in enumerate(batches, 1):
            sampler.consumed(epoch, n_batches)
            yield torch.from_numpy(rows) if self.is_compact else to_format(*split(rows))
        sampler.finish(epoch)

    def _inline(self, epoch: EpochSlice) -> Iterator[np.ndarray]:
        """The rows without DataLoader's machinery, which costs more than the batches."""
        for block, size in epoch.blocks():
            yield from self.dataset.ids(block, size)

    def _loaded(self, epoch: EpochSlice) -> Iterator[np.ndarray]:
        """The rows from worker processes. The main process splits them."""
        options: dict[str, Any] = {name: getattr(self, name) for name in WORKER_OPTIONS}
        windows, indices = _StoredWindows(self.dataset), batches_of(epoch.blocks())
        for rows in DataLoader(windows, batch_size=None, sampler=indices, **options):
            yield rows.numpy()

    def state_dict(self) -> dict[str, Any]:
        """Where the next batch is, in plain values; {} under a Trainer, whose data module keeps it."""
        if not self.keeps_state or self._ours is None:
            return {}
        if self._ours.is_foreign and self.num_workers:
            problem = "read ahead in a loader that is not this one, so the position is not known"
            advice = "set num_workers=0, which is faster, too"
            raise RuntimeError(f"num_workers={self.num_workers} {problem}: {advice}")
        return {"windows": self.dataset.identity(), **self._ours.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was called; raises ValueError for other windows or orders."""
        if not self.keeps_state or self._ours is None:
            return
        if not state:
            origin = "it is of Trainer.fit(model, datamodule=…): the data module keeps the position"
            raise ValueError(f"the state of this loader is empty: {origin}. Resume in the same way")
        self.dataset.restore(state["windows"])
        self._ours.load_state_dict(state)


class _Pass(Iterator[Any]):
    """One pass over a loader. It starts when the first batch is requested."""

    def __init__(self, loader: WindowLoader) -> None:
        self._loader = loader
        self._batches = loader.batches()

    def __len__(self) -> int:
        return len(self._loader)

    def __next__(self) -> Any:
        asked = time.perf_counter()
        try:
            return next(self._batches)
        finally:
            self._loader.waited += time.perf_counter() - asked


def collate(pairs: list[tuple[Tensor, Tensor]], batch_format: BatchFormat) -> Any:
    """Stack (inputs, targets) pairs, int64 (L,) each, into a batch, int64 (B, L) each."""
    return FORMATS[batch_format](*default_collate(pairs))


def window_loader(
    windows: Windows,
    steps: Steps,
    *,
    seed: int | DrawnSeed | None,
    rank: int | None = None,
    num_workers: int = 0,
    batch_format: BatchFormat = "tuple",
    is_compact: bool = False,
    keeps_state: bool = True,
    may_be_empty: bool = False,
    order: type[EpochPermutation] | None = None,
) -> WindowLoader:
    """Make a DataLoader of one rank's batches, int64 (batch_size, max_length).

    `seed=None` means text order. `rank=None`: rank and world size of torch.distributed when an epoch
    starts. `order=None`: the order of the windows. Raises ValueError without a batch.
    """
    check_integer("num_workers", num_workers, 0, "the number of processes that load batches")
    if not may_be_empty:
        check_not_empty(steps)
    sampler_type = TextOrderSampler if seed is None else WindowSampler
    loader = WindowLoader(
        windows,
        batch_size=steps.batch_size,
        sampler=sampler_type(steps, seed=seed, rank=rank, order=order or windows.order),
        drop_last=steps.tail == "drop",
        num_workers=num_workers,
        collate_fn=partial(collate, batch_format=batch_format),
        # Without a generator, each iter() draws from the global one, which dropout uses.
        generator=torch.Generator(),
    )
    loader.batch_format, loader.is_compact, loader.keeps_state = batch_format, is_compact, keeps_state
    return loader


def check_not_empty(steps: Steps) -> None:
    """Raise ValueError if an epoch has no step."""
    if not steps.remaining():
        ranks = f" on {steps.world_size} ranks" if steps.world_size > 1 else ""
        options = f"batch_size={steps.batch_size}{ranks} with drop_last={steps.tail == 'drop'}"
        least = f"batch_size <= {steps.n // steps.world_size}, a smaller stride, or drop_last=False"
        raise ValueError(f"{options} leaves no batch: there are {steps.n} windows. Set {least}")


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
    a new order, which `torch.manual_seed` before this call determines. In a process group, each rank
    gets its own batches, in the order that rank 0 drew.
    """
    batch_size = check_integer("batch_size", batch_size, 1, "the number of windows in a batch")
    shuffle, drop_last = check_flag("shuffle", shuffle), check_flag("drop_last", drop_last)
    windows = WindowDataset(text, "gpt2", max_length=max_length, stride=stride)
    steps = Steps(n=len(windows), batch_size=batch_size, tail="drop" if drop_last else "share")
    seed = DrawnSeed(int(torch.empty((), dtype=torch.int64).random_().item())) if shuffle else None
    return window_loader(windows, steps, seed=seed, num_workers=num_workers)


def create_dataloader_v1(
    txt: str,
    batch_size: int = 4,
    max_length: int = 256,
    stride: int = 128,
    shuffle: bool = True,
    drop_last: bool = True,
    num_workers: int = 0,
) -> DataLoader[Batch]:
    """`create_dataloader` with the course's name and arguments: `txt` is the text."""
    return create_dataloader(txt, batch_size, max_length, stride, shuffle, drop_last, num_workers)
