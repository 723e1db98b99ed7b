"""What train.py needs of any model: its losses under known names, and what val_loss covers."""

import logging
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature

from lit_gptdata.configs import find_loss
from lit_gptdata.datamodule import GPTDataModule


class ValSets(L.Callback):
    """Logs what val_loss covers, and losses that the model does not log under a name of `find_loss`.

    train_loss is then what training_step returns or logs as "loss", and val_loss what it logs as "loss".
    A model may log a val loss for each set. Without add_dataloader_idx=False Lightning names them
    val_loss/dataloader_idx_0, …_1, and so on. Then val_loss is their mean, weighted by targets, over the
    sets whose source trains. `monitor` is the name of the val loss; None: see `find_loss`.
    `step` is the optimizer step of the last validation in a fit; None: there was none in this process.
    """

    step: int | None = None
    _has_logged = False

    def __init__(self, monitor: str | None = None) -> None:
        self.monitor = monitor

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        data = trainer.datamodule
        if isinstance(data, GPTDataModule) and not self._has_logged:
            self._has_logged = True
            if text := coverage(data, pl_module):
                rank_zero_only(logging.getLogger(__name__).info)("val_loss covers %s", text)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *_: Any) -> None:
        # The fit validates at its last step, too, so that the last weights may be the best ones.
        trainer.should_stop |= 0 < trainer.max_steps <= trainer.global_step
        if not find_loss(logged_names(trainer), "train"):
            loss = outputs.get("loss", trainer.callback_metrics.get("loss"))
            if loss is not None:  # Lightning divides the returned loss by the batches of a step
                loss = loss * trainer.accumulate_grad_batches if "loss" in outputs else loss
                self._log(trainer, "train_loss", loss, on_step=True, on_epoch=False, prog_bar=True)

    def _log(self, trainer: Any, name: str, value: Any, **options: Any) -> None:
        sync: dict[str, Any] = {"sync_dist": True, "sync_dist_fn": trainer.strategy.reduce}
        # Not `pl_module.log`, which would average this with a value that the model logs afterwards.
        trainer._results.log("ValSets", name, value, batch_size=1, **sync, **options)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self.step = trainer.global_step

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        split, data = "test" if trainer.testing else "val", trainer.datamodule
        names, losses = logged_names(trainer), trainer.callback_metrics
        name = find_loss(names, split, self.monitor) or find_loss(names, split) or "loss"
        total = f"{split}_loss" if name == "loss" else name
        sets = data.eval_sets(split) if isinstance(data, GPTDataModule) else []
        keys = [f"{name}/dataloader_idx_{i}" for i in range(len(sets))]
        if len(sets) < 2 or not losses.keys() >= set(keys):
            if name == "loss" and name in names:
                self._log(trainer, total, losses[name])
            return
        nats, n_total = torch.tensor(0.0), 0
        for i in [i for i, each in enumerate(sets) if each.trains] or range(len(sets)):
            windows, steps = sets[i].windows, data._steps(len(sets[i].windows), "pad")
            n_steps = steps.limited(getattr(trainer, f"limit_{split}_batches"))
            n_targets = min(windows.n_targets, n_steps * steps.width * data.max_length)
            nats, n_total = nats + n_targets * losses[keys[i]], n_total + n_targets
        self._log(trainer, total, nats / n_total)

    on_test_epoch_end = on_validation_epoch_end


def logged_names(trainer: Any) -> list[str]:
    """What the model and other callbacks have logged in this loop."""
    metas = [result.meta for result in trainer._results.result_metrics]
    return [meta.name for meta in metas if meta.fx != "ValSets"]


def coverage(data: GPTDataModule, model: L.LightningModule) -> str:
    """What `val_loss` covers, for people; "" if it is all of a corpus without names. Needs a Trainer."""
    trainer: Any = data.trainer
    if not is_overridden("validation_step", model):
        return ""
    texts, sets = [], data.eval_sets("val")
    windows = [data.val_windows]
    if is_param_in_hook_signature(model.validation_step, "dataloader_idx", explicit=True):
        sets = [found for found in sets if found.trains] or sets
        windows = [found.windows for found in sets]
    if any(found.name for found in sets):
        names = [f"{found.name or 'corpus'} ({found.windows.spans.n_tokens:,} tokens)" for found in sets]
        texts = [f"{', '.join(names)}, so compare it only with runs over the same sources"]
    steps, limit = [data._steps(len(each), "pad") for each in windows], trainer.limit_val_batches
    n = sum(min(each.n, each.limited(limit) * each.width) for each in steps)
    if 0 < n < (n_all := sum(each.n for each in steps)):
        problem = "another batch_size or number of devices scores other text"
        texts += [f"the first {n:,} of {n_all:,} windows, by limit_val_batches={limit}: {problem}"]
    return "; ".join(texts)
