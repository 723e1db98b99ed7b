"""What a training run says about its own speed."""

from __future__ import annotations

import time
from typing import Any

import lightning as L


class Throughput(L.Callback):
    """Logs `tokens_per_second`, over all ranks, and `data_wait`, the share of time that waits for data.

    Both over the time since they were logged last, every `Trainer(log_every_n_steps)` steps, without
    validation and what is saved after it. `data_wait`, in [0, 1], is known for GPTDataModule's loader.
    """

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._begin(trainer)

    def _begin(self, trainer: L.Trainer) -> None:
        self._tokens, self._step = 0, trainer.global_step
        self._since, self._waited = _clocks(trainer)
        self._paused: tuple[float, float] | None = None

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._paused = _clocks(trainer)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._paused is not None:
            now, waited = _clocks(trainer)
            # This batch was waited for since then, and that counts.
            self._since += now - self._paused[0] - (waited - self._paused[1])
            self._paused = None

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        self._tokens += batch[0].numel() * trainer.world_size
        step = trainer.global_step  # the same for all batches of one gradient accumulation
        every = max(1, trainer.log_every_n_steps)  # type: ignore[attr-defined]  # set late
        if step == self._step or step % every:
            return
        now, waited = _clocks(trainer)
        seconds = max(now - self._since, 1e-9)
        pl_module.log("tokens_per_second", self._tokens / seconds, on_step=True, on_epoch=False)
        if hasattr(_train_dataset(trainer), "waited"):
            wait = (waited - self._waited) / seconds
            pl_module.log("data_wait", wait, on_step=True, on_epoch=False)
        self._begin(trainer)


def _clocks(trainer: L.Trainer) -> tuple[float, float]:
    """Now, and how long the training loader has been waited for; both in seconds."""
    return time.perf_counter(), getattr(_train_dataset(trainer), "waited", 0.0)


def _train_dataset(trainer: L.Trainer) -> Any:
    return getattr(trainer.train_dataloader, "dataset", None)
