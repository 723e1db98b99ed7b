"""What val_loss covers if there are several val sets, and val_loss of models other than GPT."""

import logging
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature

from lit_gptdata.datamodule import GPTDataModule


class ValSets(L.Callback):
    """Logs what val_loss covers, and val_loss itself if the model logs one for each set.

    `step` is the optimizer step of the last validation in a fit; None: there was none in this process.
    Without add_dataloader_idx=False Lightning names them val_loss/dataloader_idx_0, …_1, and so on. Then
    val_loss is their mean, weighted by targets, over the sets whose source trains.
    """

    step: int | None = None
    _has_logged = False

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        data = trainer.datamodule
        if isinstance(data, GPTDataModule) and not self._has_logged:
            self._has_logged = True
            if text := coverage(data, pl_module):
                rank_zero_only(logging.getLogger(__name__).info)("val_loss covers %s", text)

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        # The fit validates at its last step, too, so that the last weights may be the best ones.
        trainer.should_stop |= 0 < trainer.max_steps <= trainer.global_step

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self.step = trainer.global_step

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        split, data = "test" if trainer.testing else "val", trainer.datamodule
        name, losses = f"{split}_loss", trainer.callback_metrics
        sets = data.eval_sets(split) if isinstance(data, GPTDataModule) else []
        keys = [f"{name}/dataloader_idx_{i}" for i in range(len(sets))]
        if len(sets) < 2 or not losses.keys() >= set(keys):
            return
        total, n_total = torch.tensor(0.0), 0
        for i in [i for i, found in enumerate(sets) if found.trains] or range(len(sets)):
            windows, steps = sets[i].windows, data._steps(len(sets[i].windows), "pad")
            n_steps = steps.limited(getattr(trainer, f"limit_{split}_batches"))
            n_targets = min(windows.spans.n_tokens - 1, n_steps * steps.width * data.max_length)
            total, n_total = total + n_targets * losses[keys[i]], n_total + n_targets
        sync: dict[str, Any] = {"sync_dist": True, "sync_dist_fn": trainer.strategy.reduce}
        # Not `pl_module.log`, which would average this with a val_loss that the model logs afterwards.
        trainer._results.log("ValSets", name, total / n_total, batch_size=1, **sync)

    on_test_epoch_end = on_validation_epoch_end


def coverage(data: GPTDataModule, model: L.LightningModule) -> str:
    """What `val_loss` covers, for people; "" if it is all of a corpus without names. Needs a Trainer."""
    trainer: Any = data.trainer
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
