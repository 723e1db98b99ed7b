"""The checkpoints that train.py keeps: the best one by the val loss, and the last one."""

import io
import shlex
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lit_gptdata._io import write_whole
from lit_gptdata.configs import find_loss, quote_value, typed_command
from lit_gptdata.training.folder import in_sweep
from lit_gptdata.training.throughput import batches_done


class WholeFileIO(TorchCheckpointIO):
    """Writes a local checkpoint next to its final name, and renames it when it is complete.

    Lightning writes to the folder for temporary files. If that is on another disk, Lightning copies the
    file over the previous checkpoint, and a kill or a full disk leaves a broken one.
    """

    def save_checkpoint(self, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
        if "://" in str(path):
            return super().save_checkpoint(checkpoint, path, storage_options)
        torch.save(checkpoint, buffer := io.BytesIO())
        folder = Path(path).parent
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in folder.glob(".*.ckpt.*.tmp"):  # of a killed run
            leftover.unlink(missing_ok=True)
        write_whole(Path(path), buffer.getbuffer())


class _Checkpoint(ModelCheckpoint):
    """Keeps only weights in a sweep, because the optimizer's state has twice their size."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **({"save_weights_only": in_sweep()} | options))

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = WholeFileIO()


class BestCheckpoint(_Checkpoint):
    """Keeps the weights with the lowest val loss. If the model never logs it, the run only warns.

    `monitor` is its name; None: see `find_loss`.
    """

    _warned = False

    def __init__(self, *args: Any, monitor: str | None = None, **options: Any) -> None:
        self._given = None if monitor == "val_loss" else monitor
        super().__init__(*args, monitor=monitor or "val_loss", **options)

    @property
    def state_key(self) -> str:  # as in checkpoints of earlier versions
        return super().state_key.replace(type(self).__qualname__, ModelCheckpoint.__qualname__, 1)

    def _monitor_candidates(self, trainer: L.Trainer) -> dict[str, Tensor]:
        found = super()._monitor_candidates(trainer)
        name = find_loss(found, "val", self._given)
        return found if name is None else found | {str(self.monitor): found[name]}

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.monitor in self._monitor_candidates(trainer):
            super().on_train_epoch_end(trainer, pl_module)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.monitor in self._monitor_candidates(trainer):
            super().on_validation_end(trainer, pl_module)
        elif trainer.state.fn == TrainerFn.FITTING and not (trainer.sanity_checking or self._warned):
            self._warned = True
            problem = f"the model logs {', '.join(trainer.callback_metrics)}, and not {self.monitor}"
            rank_zero_warn(f"no best checkpoint is kept: {problem}. Set monitor, or callbacks.best=null")


class LastCheckpoint(_Checkpoint):
    """Keeps one checkpoint to resume from, in `dirpath`/last.ckpt.

    It saves after each validation, at the end of the fit, and on an error, Ctrl-C or SIGTERM. Without
    val batches it saves when a validation would be due.
    """

    _saved_batch: int | None = None  # None: training has not started, so there is nothing new to save

    def __init__(self, dirpath: str | None = None, filename: str = "last", **options: Any) -> None:
        defaults = {"save_on_exception": True, "enable_version_counter": False}
        super().__init__(dirpath, filename, **(defaults | options))

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._saved_batch = batches_done(trainer)

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        n_val = trainer.num_val_batches
        has_val = trainer.enable_validation and (sum(n_val) if isinstance(n_val, list) else n_val)
        if not has_val and self._validation_is_due(trainer):
            self._save(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._save(trainer)

    on_train_end = on_validation_end

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        pass  # ModelCheckpoint may save here

    def on_exception(self, trainer: Any, *_: Any) -> None:
        if self.save_on_exception:
            self._save(trainer)

    def _save(self, trainer: Any) -> None:
        """Save unless this batch is already saved. ModelCheckpoint compares steps, not batches."""
        if trainer.state.fn != TrainerFn.FITTING or trainer.sanity_checking or trainer.fast_dev_run:
            return
        if self._saved_batch in (None, batch := batches_done(trainer)):
            return
        self._save_topk_checkpoint(trainer, self._monitor_candidates(trainer))
        self._saved_batch = batch

    def _validation_is_due(self, trainer: Any) -> bool:
        """Whether `val_check_interval` (number, share or duration) asks for validation now."""
        loop = trainer.fit_loop.epoch_loop
        every_n_epochs, every = trainer.check_val_every_n_epoch, trainer.val_check_batch
        if every_n_epochs and (trainer.current_epoch + 1) % every_n_epochs:
            return False
        if every is None:  # a duration
            now = time.monotonic()
            due = now - (self._last_time_checked or now) >= trainer._val_check_time_interval
            if due := trainer.strategy.broadcast(due):
                self._last_time_checked = now
            return bool(due)
        if every == float("inf"):  # the loader does not know its length
            return bool(loop.batch_progress.is_last_batch)
        done = loop.batch_idx if every_n_epochs else loop.total_batch_idx
        return bool((done + 1) % every == 0)


def kept_checkpoint(trainer: Any) -> str:
    """The path of the checkpoint that this run saved to resume from, or ""."""
    saves = [each for each in trainer.checkpoint_callbacks if isinstance(each, LastCheckpoint)]
    return str(saves[-1].best_model_path) if saves else ""


def resume_command(folder: str, *overrides: str) -> str:
    """The command that continues the run in `folder`: what the user typed, with `overrides`."""
    overrides = (quote_value(f"output_dir={folder}"), "ckpt_path=last", *overrides)
    replaced = {word.partition("=")[0] for word in (*overrides, "hydra.run.dir=")}
    words = [word for word in typed_command() if word.partition("=")[0] not in replaced]
    return shlex.join([*words, *overrides])
