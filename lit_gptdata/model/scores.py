"""Loss, perplexity and bits per byte of val and test sets, from exact sums over all ranks.

    logits (B, T, V) ──► token_losses (B, T) ──► ScoreSums.add, each batch ──► ScoreSums.log, once

B: batch, T: tokens in a sequence, V: vocab_size, or more with columns that are never targets.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.nn import functional as F

IGNORE_INDEX = -100  # a target with this value is not scored; torch's default in cross_entropy


def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the loss of each target in nats, float32 (B, T), with 0 where the target is -100."""
    logits = logits.float().flatten(0, 1)  # (B·T, V)
    nats = F.cross_entropy(logits, targets.flatten(), ignore_index=IGNORE_INDEX, reduction="none")
    return nats.reshape(targets.shape)


class ScoreSums:
    """The sums of a validation or test over the scored targets of each loader.

    `sums`, float (loaders, 4): nats, targets, their UTF-8 bytes, targets without bytes. Bytes need a
    data module with `token_bytes`, an int64 array (V,) with the bytes of each token, 0 for special ones.
    """

    def __init__(self, trainer: Any) -> None:
        device = trainer.strategy.root_device
        # float64 counts tokens exactly up to 2⁵³, float32 only up to 16 million. MPS has no float64.
        dtype = torch.float32 if device.type == "mps" else torch.float64
        n_batches = trainer.num_test_batches if trainer.testing else trainer.num_val_batches
        self.sums = torch.zeros(len(n_batches), 4, dtype=dtype, device=device)
        token_bytes = getattr(trainer.datamodule, "token_bytes", None)
        self.token_bytes = None if token_bytes is None else torch.as_tensor(token_bytes).to(device)

    def add(self, losses: Tensor, targets: Tensor, dataloader_idx: int = 0) -> None:
        """Add a batch: `losses` in nats, float (B, T), and `targets`, integers (B, T)."""
        scored = targets != IGNORE_INDEX  # (B, T)
        sums = self.sums[dataloader_idx]
        sums[0] += losses.where(scored, 0.0).sum(dtype=sums.dtype)
        sums[1] += scored.sum()
        if self.token_bytes is not None:
            n_bytes = self.token_bytes[targets.clamp(min=0)]  # (B, T)
            sums[2] += (n_bytes * scored).sum()
            sums[3] += ((n_bytes == 0) & scored).sum()

    def log(self, trainer: Any, log: Callable[..., None]) -> None:
        """Add the sums of all ranks, and log their metrics with `log(name, value, …)`."""
        split, data = "test" if trainer.testing else "val", trainer.datamodule
        self.sums = trainer.strategy.reduce(self.sums, reduce_op="sum")
        # A data module may offer `eval_sets`: the name of each loader's set, and whether its source
        # trains. And `scored_bytes`, to count special tokens that stand for text.
        sets = [("", True)]
        if eval_sets := getattr(data, "eval_sets", None):
            sets = [(each.name, each.trains) for each in eval_sets(split)]
        scored_bytes = None if trainer.sanity_checking else getattr(data, "scored_bytes", None)
        if (n := len(self.sums)) != len(sets):  # a single loader over all sets, or unknown loaders
            sets = [(str(i) if n > 1 else "", True) for i in range(n)]
            scored_bytes = None
        scores = self.sums.tolist()
        for (name, _), score in zip(sets, scores, strict=True):
            if scored_bytes:
                counts = map(int, score[1:])
                score[2] = scored_bytes(split, *counts, *([name] if name else []))
            if name:
                self._log_set(log, split, f"/{name}", score)
        # If no source that trains has a val split, the total covers `val_corpus`.
        scores = [score for (_, trains), score in zip(sets, scores, strict=True) if trains] or scores
        total = [sum(column) for column in zip(*scores, strict=True)]
        if any(n_targets and not n_bytes for _, n_targets, n_bytes, _ in scores):
            total[2] = 0  # not known, as for this set
        self._log_set(log, split, "", total)

    def _log_set(self, log: Callable[..., None], split: str, suffix: str, score: list[float]) -> None:
        """Log the metrics of a row of `sums`; without the bits per byte, if it has no bytes."""
        nats, n_targets, n_bytes, _ = score
        if not n_targets:
            rank_zero_warn(f"{split}_loss{suffix} is not logged: every target was {IGNORE_INDEX}")
            return
        loss = nats / n_targets
        metrics = {"loss": loss}
        if not suffix:  # math.exp raises OverflowError above 709
            metrics["perplexity"] = math.inf if loss >= 709 else math.exp(loss)
        if n_bytes:
            metrics["bits_per_byte"] = nats / math.log(2) / n_bytes
        for name, value in metrics.items():
            metric = torch.tensor(value, dtype=self.sums.dtype, device=self.sums.device)
            in_bar = name == "loss" and not suffix
            # All ranks log the same value, but Lightning warns without sync_dist.
            log(f"{split}_{name}{suffix}", metric, prog_bar=in_bar, sync_dist=True, batch_size=1)
