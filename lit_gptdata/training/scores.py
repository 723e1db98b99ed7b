"""Loss, perplexity and bits per byte of models that are not GPT."""

from functools import partial
from typing import Any

import lightning as L
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lit_gptdata.model.gpt import inputs_and_targets
from lit_gptdata.model.scores import ScoreSums, token_losses


class Scores(L.Callback):
    """Logs val_loss, val_perplexity and val_bits_per_byte (or test_…) of your own model, as GPT does.

    `validation_step` and `test_step` return losses in nats per token, float (B, T), or logits, float
    (B, T, V): as a tensor, or in a dict under "losses" or "logits". Targets of -100 are not scored.
    Sums are exact over all batches and ranks. If the steps take `dataloader_idx`, each val set with a
    name also has val_loss/<name> and val_bits_per_byte/<name>.
    """

    _sums: ScoreSums | None = None

    def on_validation_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        self._sums = None

    def on_validation_batch_end(
        self,
        trainer: Any,
        pl_module: Any,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        targets = inputs_and_targets(batch)[1]
        if (losses := read_losses(outputs, targets)) is not None:
            self._sums = self._sums or ScoreSums(trainer)
            self._sums.add(losses, targets, dataloader_idx)
        elif outputs is not None:
            rank_zero_warn(
                "Scores needs a validation_step that returns losses (B, T) or logits (B, T, V)"
            )

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        if self._sums is not None:
            # Not `pl_module.log`, which would average this with a val_loss that the model logs.
            log = partial(trainer._results.log, "Scores", sync_dist_fn=trainer.strategy.reduce)
            self._sums.log(trainer, log)

    on_test_epoch_start = on_validation_epoch_start
    on_test_batch_end = on_validation_batch_end
    on_test_epoch_end = on_validation_epoch_end


def read_losses(outputs: Any, targets: Tensor) -> Tensor | None:
    """The losses (B, T) in what a step returns, see `Scores`; None if it returns neither."""
    losses = logits = outputs
    if isinstance(outputs, dict):
        losses, logits = outputs.get("losses"), outputs.get("logits")
    if isinstance(logits, Tensor) and logits.ndim == 3 and logits.shape[:2] == targets.shape:
        losses = token_losses(logits, targets)
    return losses if isinstance(losses, Tensor) and losses.shape == targets.shape else None
