"""Measure and show the speed of a training run."""

import math
import sys
import time
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import TQDMProgressBar
from torch import Tensor

from lit_gptdata._io import is_terminal, progress_bar
from lit_gptdata.datamodule import GPTDataModule


class Throughput(L.Callback):
    """Log `tokens_per_second` over all ranks, and `data_wait`, the fraction of time spent waiting.

    `data_wait`, in [0, 1], needs the loader of GPTDataModule. Both are averages since they were last
    logged, every `Trainer(log_every_n_steps)` optimizer steps, without the time for validation and for
    checkpoints that are saved after it. `mean` is the tokens per second of the whole fit.
    """

    _total_tokens, _total_seconds = 0, 0.0

    @property
    def mean(self) -> float | None:
        """Tokens per second since the fit started; None before the first batch of this process."""
        return self._total_tokens / self._total_seconds if self._total_seconds else None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._total_tokens, self._total_seconds = 0, 0.0
        self._restart(trainer)

    def _restart(self, trainer: L.Trainer) -> None:
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
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, *_: Any
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
        self._total_tokens += self._tokens
        self._total_seconds += seconds
        self._restart(trainer)  # for the next averages


class TokenBar(TQDMProgressBar):
    """Lightning's progress bar, in tokens of the whole run instead of batches of an epoch.

    If the output is not a terminal, it prints a line every half minute instead.
    """

    _shown = 0.0

    @property
    def is_disabled(self) -> bool:
        return super().is_disabled or not is_terminal(sys.stdout)

    def _should_update(self, current: int, total: Any) -> bool:
        if due := current == total or time.monotonic() - self._shown >= 0.3:
            self._shown = time.monotonic()
        return due and self.is_enabled

    def on_train_start(self, *_: Any) -> None:
        self._train_progress_bar = None

    def on_train_epoch_start(self, *_: Any) -> None:
        pass  # the bar counts the whole run

    def on_train_epoch_end(self, *_: Any) -> None:
        pass

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if self._train_progress_bar is not None:
            return
        self._tokens_per_batch = count_tokens(trainer, batch) * trainer.world_size
        batches, done = trainer.estimated_stepping_batches, batches_done(trainer)
        total = batches * trainer.accumulate_grad_batches * self._tokens_per_batch
        start = done * self._tokens_per_batch
        if isinstance(data := trainer.datamodule, GPTDataModule):
            total, start = data.tokens_at(), data._resume.tokens_before(done)
        self.train_progress_bar = progress_bar(
            desc="training", disable=super().is_disabled, file=sys.stdout, unit=" tokens", smoothing=0,
            total=total if 0 < total < math.inf else None, miniters=1, initial=start, mininterval=0.3,
            bar_format=self.BAR_FORMAT,
        )  # fmt: skip

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, *_: Any
    ) -> None:
        bar = self.train_progress_bar
        if not bar.disable and time.time() - bar.last_print_t >= bar.mininterval:
            bar.set_postfix(self.get_metrics(trainer, pl_module), refresh=False)
        bar.update(count_tokens(trainer, batch) * trainer.world_size)

    def on_train_end(self, *_: Any) -> None:
        if self._train_progress_bar is not None:
            self.train_progress_bar.close()


def batches_done(trainer: Any) -> int:
    """Count the training batches of the whole run, earlier epochs included."""
    return int(trainer.fit_loop.epoch_loop.batch_progress.total.processed)


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
