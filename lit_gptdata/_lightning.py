"""What this package has to know about Lightning: its Trainer's state, its warnings, hyperparameters."""

import inspect
import traceback
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import BatchSizeFinder

from lit_gptdata.windows.ranks import Ranks

# Lightning's warnings that no user of this module can act on.
IGNORED_WARNINGS = (
    ".*does not have many workers.*",  # windows load inline on purpose: a worker costs 20 times more
    ".*LeafSpec.*",  # Lightning uses a deprecated torch class in every fit
    ".*Total length of `list` across ranks is zero.*",  # there is no val split, on purpose
    ".*functional.all_gather is deprecated.*",  # Lightning uses it when ranks save a checkpoint
)


PLAIN_ATTRIBUTES = [
    *("max_length", "stride", "val_fraction", "test_fraction"),
    *("batch_size", "shuffle", "drop_last", "num_workers", "seed"),
]
"""Options that GPTDataModule keeps as attributes of the same name, in plain values."""


def save_hyperparameters(module: L.LightningDataModule, arguments: dict[str, Any]) -> None:
    """Save `arguments` only, in plain values, which a checkpoint can hold for weights_only=True."""
    arguments |= {name: getattr(module, name) for name in PLAIN_ATTRIBUTES}
    # Starting at `frame`, Lightning walks up the callers and compares the arguments of each __init__
    # with this dict. That fails for a numpy array of a subclass. The outermost frame has no caller.
    *_, (outermost, _) = traceback.walk_stack(inspect.currentframe())
    module.save_hyperparameters(arguments, frame=outermost)


def ranks_of(trainer: L.Trainer) -> Ranks:
    """This process's rank among the processes that read different batches, and their number."""
    kwargs = trainer.distributed_sampler_kwargs
    return Ranks(kwargs["rank"], kwargs["num_replicas"]) if kwargs else Ranks(0, 1)


def overfits(trainer: L.Trainer) -> bool:
    """Whether each epoch repeats the first windows in text order: `Trainer(overfit_batches=…)`."""
    return bool(trainer.overfit_batches)  # type: ignore[attr-defined]  # the Trainer adds it later


def finds_batch_size(trainer: L.Trainer) -> bool:
    """Whether the Trainer tries batch sizes. It ends without an error where no full batch is left."""
    callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return any(isinstance(callback, BatchSizeFinder) for callback in callbacks)


def check_trainer(trainer: L.Trainer | None) -> None:
    """Raise TypeError for a Trainer of the package pytorch_lightning."""
    if type(trainer).__module__.partition(".")[0] == "pytorch_lightning":
        raise TypeError(
            "the Trainer comes from the package pytorch_lightning, but GPTDataModule is a module of "
            "lightning, and the two do not mix. Write `import lightning as L` and use L.Trainer and "
            "L.LightningModule"
        )
