"""Measure the speed of a training run."""

import time
from typing import Any

import lightning as L
from torch import Tensor

from lit_gptdata.datamodule import GPTDataModule


class Throughput(L.Callback):
    """Log `tokens_per_second` over all ranks, and `data_wait`, the fraction of time spent waiting.

    `data_wait`, in [0, 1], needs the loader of GPTDataModule. Both are averages since they were last
    logged, every `Trainer(log_every_n_steps)` optimizer steps, without the time for validation and for
    checkpoints that are saved after it.
    """

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._tokens = 0
        self._start, self._start_waited = _clocks(trainer)
        self._paused: tuple[float, float] | None = None

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._paused = _clocks(trainer)

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        if self._paused is not None:
            now, waited = _clocks(trainer)
            # The pause includes the wait for this batch, which is part of training.
            self._start += now - self._paused[0] - (waited - self._paused[1])
            self._paused = None

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._tokens += count_tokens(trainer, batch) * trainer.world_size
        loop = trainer.fit_loop
        # Lightning counts batches that end a step. Manual optimization has several steps in a batch.
        step = loop.epoch_loop._batches_that_stepped + 1
        if loop._should_accumulate() or step % max(1, trainer.log_every_n_steps):
            return
        now, waited = _clocks(trainer)
        seconds = max(now - self._start, 1e-9)
        pl_module.log("tokens_per_second", self._tokens / seconds, on_step=True, on_epoch=False)
        if hasattr(trainer.train_dataloader, "waited"):
            data_wait = (waited - self._start_waited) / seconds
            pl_module.log("data_wait", data_wait, on_step=True, on_epoch=False)
        self.on_train_start(trainer, pl_module)  # for the next averages


def count_tokens(trainer: Any, batch: Any) -> int:
    """Count the input tokens of this rank's batch; an unknown format counts as a full batch."""
    inputs = batch.get("input_ids") if isinstance(batch, dict) else batch
    inputs = inputs[0] if isinstance(inputs, (tuple, list)) and inputs else inputs
    if isinstance(inputs, Tensor) and inputs.ndim == 2:
        return inputs.numel()
    data = trainer.datamodule
    return data.batch_size * data.max_length if isinstance(data, GPTDataModule) else 0


def _clocks(trainer: L.Trainer) -> tuple[float, float]:
    """Return the current time and the total time spent waiting for training batches, in seconds."""
    return time.perf_counter(), getattr(trainer.train_dataloader, "waited", 0.0)
