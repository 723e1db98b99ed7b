"""Train batches that travel to a GPU as they are in the store, and are split and widened there.

(B, L + 1) uint16  ──transfer──▶  inputs (B, L), targets (B, L) int64          1/8 of the bytes
"""

from typing import Any

import lightning as L
from lightning.pytorch.trainer.states import TrainerStatus
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor


def sends_compact(trainer: L.Trainer) -> bool:
    """Whether this fit can split batches on its device without the model's own hooks seeing them."""
    model = trainer.lightning_module
    if trainer.state.fn != "fit" or trainer.state.status != TrainerStatus.RUNNING:
        return False
    if trainer.strategy.root_device.type != "cuda":
        return False
    hooks = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")
    takes_iterator = is_param_in_hook_signature(model.training_step, "dataloader_iter", explicit=True)
    return not takes_iterator and not any(is_overridden(hook, model) for hook in hooks)


def split_on_device(batch: Any, dataloader_idx: int) -> Any:
    """Split windows (B, L + 1) into (inputs, targets), int64. Validation batches are split already."""
    if not isinstance(batch, Tensor):
        return batch
    return batch[:, :-1].long(), batch[:, 1:].long()  # .long() copies the slice, so it is contiguous
