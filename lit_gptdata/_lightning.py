"""What this package has to know about Lightning: its Trainer's state and steps, warnings, options."""

import inspect
import logging
import traceback
import warnings
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, get_args

import lightning as L
from lightning.pytorch.callbacks import BatchSizeFinder
from lightning.pytorch.trainer.states import TrainerStatus
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor

from lit_gptdata._checks import check_choice, check_flag, check_integer, check_number
from lit_gptdata.windows.dataset import FORMATS, IGNORE_INDEX, BatchFormat, WindowKind, Windows
from lit_gptdata.windows.ranks import Ranks
from lit_gptdata.windows.steps import RunSegment, count_updates

# Lightning's warnings that no user of this module can act on.
IGNORED_WARNINGS = (
    ".*does not have many workers.*",  # windows load inline on purpose: a worker costs 20 times more
    ".*LeafSpec.*",  # Lightning uses a deprecated torch class in every fit
    ".*Total length of `list` across ranks is zero.*",  # there is no val split, on purpose
    ".*functional.all_gather is deprecated.*",  # Lightning uses it when ranks save a checkpoint
)

log_info = rank_zero_only(logging.getLogger("lightning.pytorch.lit_gptdata").info)
"""Logs a message in scripts with a Trainer, and in `train`, which hides Lightning's own messages."""

OPTIONS: dict[str, Callable[[Any], Any]] = {
    "max_length": lambda value: check_integer("max_length", value, 1, "a window's length in tokens"),
    "stride": lambda value: check_integer("stride", value, 1, "the tokens between two windows"),
    "windows": lambda value: check_choice("windows", value, get_args(WindowKind)),
    "eval_windows": lambda value: check_choice("eval_windows", value, get_args(WindowKind)),
    "batch_size": lambda value: check_integer("batch_size", value, 1, "the windows in a batch"),
    "batch_format": lambda value: check_choice("batch_format", value, get_args(BatchFormat)),
    "num_workers": lambda value: check_integer("num_workers", value, 0, "the loader's processes"),
    "shuffle": lambda value: check_flag("shuffle", value),
    "drop_last": lambda value: check_flag("drop_last", value),
    "drop_padded": lambda value: check_flag("drop_padded", value),
    "seed": lambda value: value if value is None else check_integer("seed", value),
    "val_fraction": lambda value: check_number("val_fraction", value, 1),
    "test_fraction": lambda value: check_number("test_fraction", value, 1),
}
"""Options that are attributes of GPTDataModule, which users may set later: name → check, plain value."""


def ignore_warnings() -> None:
    """Ignore the warnings that no user of this module can act on."""
    for message in IGNORED_WARNINGS:
        warnings.filterwarnings("ignore", message)


def save_hyperparameters(module: L.LightningDataModule, arguments: dict[str, Any]) -> None:
    """Save `arguments` only, in plain values, which a checkpoint can hold for weights_only=True."""
    arguments |= {name: getattr(module, name) for name in OPTIONS}
    # Starting at `frame`, Lightning walks up the callers and compares the arguments of each __init__
    # with this dict. That fails for a numpy array of a subclass. The outermost frame has no caller.
    *_, (outermost, _) = traceback.walk_stack(inspect.currentframe())
    module.save_hyperparameters(arguments, frame=outermost)


def ranks_of(trainer: L.Trainer) -> Ranks:
    """This process's rank among the processes that read different batches, and their number."""
    kwargs = trainer.distributed_sampler_kwargs
    return Ranks(kwargs["rank"], kwargs["num_replicas"]) if kwargs else Ranks(0, 1)


def overfits(trainer: Any) -> bool:
    """Whether each epoch repeats the first windows in text order: `Trainer(overfit_batches=…)`."""
    return bool(trainer.overfit_batches)


def finds_batch_size(trainer: Any) -> bool:
    """Whether the Trainer has the callback that tries batch sizes."""
    return any(isinstance(callback, BatchSizeFinder) for callback in trainer.callbacks)


def has_trained(trainer: Any) -> bool:
    """Whether the Trainer has trained on a batch, here or in the run that it resumes."""
    return bool(trainer.fit_loop.epoch_loop.batch_progress.total.processed)


def trains_with(trainer: Any, sampler: Any) -> bool:
    """Whether the Trainer's train loader has this sampler; a wrapper of a loader may have none."""
    loaders = trainer.fit_loop._combined_loader.flattened
    samplers = [loader.sampler for loader in loaders if hasattr(loader, "sampler")]
    return sampler is not None and (not samplers or sampler in samplers)


def log_gaps(segments: Sequence[RunSegment]) -> None:
    """Log which batches are skipped, and how this changes the Trainer's counts."""
    for gap in segments:
        if gap.skip:
            end = gap.number + gap.skip
            counts = f"from there the Trainer counts {gap.skipped + gap.skip:,} batches fewer"
            log_info(f"skip_steps: no training on batches [{gap.number:,}, {end:,}); {counts}")


def epoch_is_over(trainer: Any) -> bool:
    """Whether the last train batch of the epoch has ended."""
    progress = trainer.fit_loop.epoch_loop.batch_progress
    done = progress.current.processed
    last = progress.is_last_batch or done >= trainer.num_training_batches
    return bool(done and done == progress.current.ready and last)


def inside_a_step(trainer: Any) -> bool:
    """Whether an optimizer step's first batch has started and its last batch has not ended."""
    current = trainer.fit_loop.epoch_loop.batch_progress.current
    waiting = current.processed % trainer.accumulate_grad_batches
    return current.ready > current.processed or bool(waiting and not epoch_is_over(trainer))


def sets_to_load(data: Any, split: str) -> list[Windows]:
    """The windows of each loader of `data`: one for all sets if the model cannot tell them apart."""
    sets = [found.windows for found in data.eval_sets(split)]
    trainer = data.trainer
    if not sets and trainer is not None and trainer.state.fn != "fit":
        rank_zero_warn(f"no {split} split to run on: set data.{split}_fraction, such as 0.1")
    if len(sets) < 2:
        return sets
    if trainer is not None:
        names = {"test": "test_step", "predict": "predict_step"}
        step = getattr(trainer.lightning_module, names.get(trainer.state.fn, "validation_step"))
        if is_param_in_hook_signature(step, "dataloader_idx", explicit=True):
            return sets
    return [data._data.eval_windows(split)]


def check_trainer(trainer: L.Trainer | None) -> None:
    """Raise TypeError for a Trainer of the package pytorch_lightning."""
    if type(trainer).__module__.partition(".")[0] == "pytorch_lightning":
        advice = "Write `import lightning as L` and use L.Trainer and L.LightningModule"
        raise TypeError(f"the Trainer is from pytorch_lightning, not from lightning. {advice}")


def check_plan(option: str, trainer: Any, tuned: bool) -> None:
    """Raise ValueError for a fit that cannot follow `option`; `tuned`: by BatchSizeFinder."""
    problem = "needs a fixed batch size: leave out BatchSizeFinder" if tuned else ""
    if trainer is None:
        advice = "set batch_size" if option == "batch_schedule" else "leave out these batches yourself"
        problem = f"needs Trainer.fit(model, datamodule=…). In your own loop, {advice}"
    elif isinstance(limit := trainer.limit_train_batches, float) and limit != 1:
        name = "overfit_batches" if overfits(trainer) else "limit_train_batches"
        problem = f"needs trainer.{name} as a number of batches, got the fraction {limit}"
    if problem:
        raise ValueError(f"{option} {problem}")


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


def splits_on_device(data: Any) -> bool:
    """Make `data` split train batches on the device if its Trainer allows it; return whether it does.

    Rows have an eighth of the bytes of a batch, or a quarter with padding.
    """
    vars(data).pop("on_after_batch_transfer", None)
    if data.trainer is None or not sends_compact(data.trainer):
        return False
    # Set on the object, because Lightning prefers a hook of the class to the model's own hook.
    vars(data)["on_after_batch_transfer"] = partial(split_on_device, batch_format=data.batch_format)
    return True


def split_on_device(batch: Any, dataloader_idx: int, batch_format: BatchFormat = "tuple") -> Any:
    """Split rows (B, L + 1) into inputs and targets, int64. Validation batches are split already."""
    if not isinstance(batch, Tensor):
        return batch
    inputs, targets = batch[:, :-1].long(), batch[:, 1:].long()  # copies, so they are contiguous
    if batch.dtype.is_signed:
        inputs = inputs.masked_fill_(targets == IGNORE_INDEX, 0)
    return FORMATS[batch_format](inputs, targets)


def set_epoch_batches(trainer: Any, n_batches: int) -> None:
    """Set the number of train batches of the epoch that starts now; Lightning counts them only once."""
    trainer.fit_loop.max_batches = n_batches
    trainer.fit_loop._combined_loader.limits = n_batches
    if isinstance(interval := getattr(trainer, "val_check_interval", None), float):
        trainer.val_check_batch = max(1, int(n_batches * interval))


def rewrite_loops(
    trainer: Any, pl_module: Any, loops: dict[str, Any], current: RunSegment, n_batches: int
) -> None:
    """Set the fit loop's counters to their values in `on_train_batch_end`, or between epochs.

    `n_batches`: of the epoch in which `current` starts.
    """
    saved = loops["epoch_loop.batch_progress"]["total"]
    validation = loops["epoch_loop.val_loop.batch_progress"]
    epoch, done = current.start.epoch, current.step
    inside = int(done > 0)
    validated = current.batch < saved["processed"] or (
        saved["completed"] == saved["processed"]
        and validation["total"]["ready"] == validation["total"]["completed"]
    )
    validate = inside and not validated and _validation_is_due(trainer, current, n_batches)

    epochs = _tracker(ready=epoch + inside, processed=epoch, completed=epoch)
    loops["epoch_progress"] = {"total": epochs, "current": epochs}
    batches = current.batch
    loops["epoch_loop.batch_progress"] = {
        "total": _tracker(ready=batches, processed=batches, completed=batches - inside),
        "current": _tracker(ready=done, processed=done, completed=done - inside),
        "is_last_batch": False,
    }
    # A validation that has started without finishing a batch makes Lightning run all of it first.
    validation["total"] = _tracker(ready=int(validate), processed=0, completed=0)
    validation["current"] = _tracker(ready=0, processed=0, completed=0)
    if pl_module.automatic_optimization:
        optimizer = loops["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]
        stepped = optimizer["step"]["total"]["completed"]
        if inside and done % trainer.accumulate_grad_batches == 0:
            stepped -= 1  # Lightning adds it again
        loops["epoch_loop.state_dict"]["_batches_that_stepped"] = stepped - int(validate)


def _validation_is_due(trainer: L.Trainer, segment: RunSegment, n_batches: int) -> bool:
    """Whether the Trainer validates before the segment, in an epoch of `n_batches` batches."""
    if not trainer.limit_val_batches:
        return False
    interval = getattr(trainer, "val_check_interval", None)  # Lightning leaves it unset for a duration
    epochs = trainer.check_val_every_n_epoch
    if isinstance(interval, float):
        interval = max(1, int(n_batches * interval))
    if not isinstance(interval, int):  # a time interval
        return False
    if epochs is None:
        return segment.batch % interval == 0
    return (segment.start.epoch + 1) % epochs == 0 and segment.step % interval == 0


def _tracker(ready: int, processed: int, completed: int) -> dict[str, int]:
    return {"ready": ready, "started": ready, "processed": processed, "completed": completed}


class OptimizerSteps:
    """Which batches of a run an optimizer step has; their number may change when the run resumes."""

    def __init__(self, starts: Iterable[Sequence[int]] = ((0, 0, 1),)) -> None:
        """`starts`: (batch, optimizer step, batches per step) of each change, the first one at 0."""
        self.starts = [list(start) for start in starts]

    def before(self, batch: int, segments: Sequence[RunSegment]) -> int:
        """The number of optimizer steps that end in the run's first `batch` batches."""
        begun = [start for start in self.starts if start[0] <= batch]
        first, step, accumulate = (begun or self.starts)[-1]
        first, last = (count_updates(segments, end, accumulate) for end in (first, batch))
        return step + last - first

    def batch_of(self, step: int, segments: Sequence[RunSegment]) -> int:
        """The number of batches before an optimizer step."""
        first, done, accumulate = self.starts[-1]
        ahead = max(0, step - done)  # each of these steps has 1 to `accumulate` batches
        least, batches = first + ahead if step >= done else 0, range(first + ahead * accumulate)
        return bisect_left(batches, step, least, key=lambda batch: self.before(batch, segments))

    def resume(self, batch: int, step: int, accumulate: int, segments: Sequence[RunSegment]) -> None:
        """Note that a run is at this batch and step, and how many batches its next steps have."""
        self.starts = [start for start in self.starts if start[0] <= batch] or [[0, 0, accumulate]]
        if self.starts[-1][2] != accumulate or self.before(batch, segments) != step:
            self.starts.append([batch, step, accumulate])
