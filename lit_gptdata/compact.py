"""Training batches on their way to a GPU: windows as the store has them, split and widened there.

(B, L + 1) uint16  ──transfer──▶  inputs (B, L), targets (B, L) int64          1/8 of the bytes
"""

from __future__ import annotations

from typing import Any

import lightning as L
from lightning.pytorch.trainer.states import TrainerStatus
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor


def sends_compact(trainer: L.Trainer) -> bool:
    """Whether batches of this running fit are split on its device, unseen by the model's own hooks."""
    model = trainer.lightning_module
    if trainer.state.fn != "fit" or trainer.state.status != TrainerStatus.RUNNING:
        return False
    if trainer.strategy.root_device.type != "cuda":
        return False
    hooks = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")
    takes_iterator = is_param_in_hook_signature(model.training_step, "dataloader_iter", explicit=True)
    return not takes_iterator and not any(is_overridden(hook, model) for hook in hooks)


def split_on_device(batch: Any, dataloader_idx: int) -> Any:
    """A whole window's ids → (inputs, targets), int64; batches for validation are that already."""
    if not isinstance(batch, Tensor):
        return batch
    return batch[:, :-1].long(), batch[:, 1:].long()  # contiguous: sliced first, then copied
