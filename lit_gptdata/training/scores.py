"""Loss, perplexity and bits per byte of models that are not GPT."""

from functools import partial
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lit_gptdata.model.gpt import GPT
from lit_gptdata.model.scores import ScoreSums, token_losses


class Scores(L.Callback):
    """Logs val_loss, val_perplexity and val_bits_per_byte (or test_…) of your own model, as GPT does.

    `validation_step` and `test_step` return losses in nats per token, float (B, T), or logits, float
    (B, T, V): as a tensor, or in a dict under "losses" or "logits". Targets of -100 are not scored.
    Sums are exact over all batches and ranks. If the steps take `dataloader_idx`, each val set with a
    name also has val_loss/<name> and val_bits_per_byte/<name>.
    """

    _sums: ScoreSums | None = None
    _problem = ""  # why nothing was scored

    def on_validation_epoch_start(self, trainer: Any, pl_module: L.LightningModule) -> None:
        self._sums, self._problem = None, ""

    def on_validation_batch_end(
        self,
        trainer: Any,
        pl_module: Any,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        targets, losses, logits = targets_of(batch), outputs, outputs
        if isinstance(outputs, dict):
            losses, logits = outputs.get("losses"), outputs.get("logits")
        if isinstance(logits, Tensor) and logits.ndim == 3 and logits.shape[:2] == targets.shape:
            losses = token_losses(logits, targets)
        if not isinstance(losses, Tensor) or losses.shape != targets.shape:
            self._problem = describe(outputs)
            return
        if self._sums is None:
            self._sums = ScoreSums(trainer)
        self._sums.add(losses, targets, dataloader_idx)

    def on_validation_epoch_end(self, trainer: Any, pl_module: L.LightningModule) -> None:
        if self._sums is not None:
            # Not `pl_module.log`, which would average this with a val_loss that the model logs.
            log = partial(trainer._results.log, "Scores", sync_dist_fn=trainer.strategy.reduce)
            self._sums.log(trainer, log)
        elif self._problem and not isinstance(pl_module, GPT):
            step = "test_step" if trainer.testing else "validation_step"
            needs = "losses (B, T) or logits (B, T, V), as a tensor or in a dict"
            rank_zero_warn(f"no bits per byte: {step} must return {needs}, and returns {self._problem}")

    on_test_epoch_start = on_validation_epoch_start
    on_test_batch_end = on_validation_batch_end
    on_test_epoch_end = on_validation_epoch_end


def targets_of(batch: Any) -> Tensor:
    """The targets (B, T) of a batch in either `batch_format`; no targets for an unknown format."""
    if isinstance(batch, dict):
        targets = batch.get("shift_labels")
    else:
        targets = batch[1] if isinstance(batch, tuple | list) and len(batch) == 2 else None
    return targets if isinstance(targets, Tensor) else torch.empty(0, 0)


def describe(outputs: Any) -> str:
    """What a step returns, for people: "a tensor of shape (4, 64)", "a dict with loss", "None"."""
    if isinstance(outputs, Tensor):
        return f"a tensor of shape {tuple(outputs.shape)}"
    if isinstance(outputs, dict):
        return f"a dict with {', '.join(map(str, outputs)) or 'nothing'}"
    return str(outputs) if outputs is None else type(outputs).__name__
