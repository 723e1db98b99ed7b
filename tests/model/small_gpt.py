"""A small GPT, and batches of random ids to train and score it."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from torch.utils.data import DataLoader

from lit_gptdata.model.gpt import GPT, IGNORE_INDEX
from lit_gptdata.model.stem import EmbeddingStem

V, MAX_LENGTH, D = 50, 8, 16

Window = tuple[torch.Tensor, torch.Tensor]  # inputs and targets, both (T,)


def make_gpt(n_layers: int = 2, n_heads: int = 4, position: str = "learned", **options: Any) -> GPT:
    torch.manual_seed(0)
    stem = EmbeddingStem(V, MAX_LENGTH, D, position, dropout=options.get("dropout", 0.0))
    return GPT(stem, n_layers=n_layers, n_heads=n_heads, **options)


def random_windows(n: int, tokens: int = MAX_LENGTH, seed: int = 0) -> list[Window]:
    ids = torch.randint(V, (n, tokens + 1), generator=torch.Generator().manual_seed(seed))
    return [(row[:-1], row[1:]) for row in ids]


def masked_windows(n: int, n_masked: int, seed: int) -> list[Window]:
    """Random windows; the last `n_masked` targets of every second window are not scored."""
    windows = [(inputs, targets.clone()) for inputs, targets in random_windows(n, seed=seed)]
    for _, targets in windows[1::2]:
        targets[-n_masked:] = IGNORE_INDEX
    return windows


def batch_of(windows: list[Window]) -> Window:
    inputs, targets = zip(*windows, strict=True)
    return torch.stack(inputs), torch.stack(targets)


class SmallData(L.LightningDataModule):
    """40 train windows in batches of 4; 7 val and 7 test windows in batches of 3, 3 and 1."""

    token_bytes = torch.arange(V) % 5  # some tokens have 0 bytes, like special tokens

    def train_dataloader(self):
        return DataLoader(random_windows(40), batch_size=4)

    def val_dataloader(self):
        return DataLoader(masked_windows(7, 5, seed=1), batch_size=3)

    def test_dataloader(self):
        return DataLoader(masked_windows(7, 3, seed=2), batch_size=3)

    predict_dataloader = val_dataloader
