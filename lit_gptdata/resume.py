"""Exact resume under Lightning: what a checkpoint says of the data, and how the Trainer goes on from it.

save   the Trainer's counters  ──▶ (epoch, index)  ──▶ GPTDataModule.state_dict()
load   the Trainer's counters  ◀── (epoch, index)  ◀── GPTDataModule.load_state_dict()

The Trainer's counters differ with the hook that saved: in `on_train_batch_end` one is behind, after an
exception one is ahead, at an epoch's end they are past it. They are rewritten to what they are right
after a batch, so that every checkpoint resumes in the same way.
"""

from __future__ import annotations

import warnings
from typing import Any

import lightning as L
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor

from lit_gptdata.rng import rng_states, set_rng_states, torch_states
from lit_gptdata.windows.loader import WindowSampler
from lit_gptdata.windows.steps import Leg, Position, Steps


class Resume(L.Callback):
    """Knows where a run stands in its data, and puts a resumed run there; GPTDataModule attaches it.

    `key`: the name of the data module's state in a checkpoint.
    """

    def __init__(self, key: str) -> None:
        self.key = key
        self.legs: list[Leg] = []
        self._here: Leg | None = None  # where this process began
        self._sampler: WindowSampler | None = None
        self._rng: dict[str, Tensor] | None = None  # to be put back: (world_size, …) each
        self._rng_before: dict[str, Tensor] = {}  # before the first batch of an optimizer step
        self._alone = False

    def attach(self, trainer: L.Trainer, steps: Steps) -> None:
        """Be the trainer's callback, for a run that no checkpoint continues until one is loaded."""
        # its position is in the data module's state
        warnings.filterwarnings("ignore", ".*your dataloader is not resumable.*")
        callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]  # set late
        # The first, so that no other has drawn random numbers before it looks.
        callbacks[:] = [self, *(other for other in callbacks if not isinstance(other, Resume))]
        fit: Any = trainer.fit_loop
        self._here = Leg(
            batch=fit.epoch_loop.batch_progress.total.processed,
            start=Position(fit.epoch_progress.current.processed, 0),
            steps=steps,
            limit=steps.limited(trainer.limit_train_batches),
        )
        self.legs, self._rng, self._alone = [self._here], None, False

    def follow(self, sampler: WindowSampler) -> None:
        """Let a sampler begin where this process begins, also if a checkpoint is loaded only later."""
        self._sampler = sampler
        if self._here is not None:
            sampler.start_at(self._here.start)

    # Saving -----------------------------------------------------------------------------------

    def state_dict_of(self, trainer: L.Trainer) -> dict[str, Any]:
        """Position, legs and every rank's generators, in plain values and tensors."""
        batches, position = self._position(trainer)
        device = trainer.strategy.root_device
        states = rng_states(device)
        if self._inside_a_step(trainer):
            states |= self._rng_before
        if trainer.world_size > 1 and not self._alone:
            gather = trainer.strategy.all_gather
            states = {name: gather(state.to(device)).cpu() for name, state in states.items()}
        else:
            states = {name: state[None] for name, state in states.items()}
        return {
            "batches": batches,
            "epoch": position.epoch,
            "index": position.index,
            "legs": [leg.as_dict() for leg in self.legs],
            "rng": states,
        }

    def _position(self, trainer: L.Trainer) -> tuple[int, Position]:
        """How many batches the run has behind it, and where its next window is.

        Gradients that wait for their optimizer step are lost with the process, so that their batches
        come again.
        """
        fit: Any = trainer.fit_loop
        leg = self.legs[-1]
        progress, epochs = fit.epoch_loop.batch_progress, fit.epoch_progress.current
        done, epoch = progress.current.processed, epochs.processed
        if done and epochs.started == epoch:  # the epoch counts as over, maybe in its middle: max_steps
            epoch -= 1
        if self._epoch_is_over(trainer):
            return progress.total.processed, Position(epoch + 1, 0)
        start = leg.start if leg.start.epoch == epoch else Position(epoch, 0)
        done -= leg.steps.before(start.index)
        lost = min(done, progress.current.processed % trainer.accumulate_grad_batches)
        index = start.index + (done - lost) * leg.steps.width
        return progress.total.processed - lost, Position(epoch, index)

    def _epoch_is_over(self, trainer: L.Trainer) -> bool:
        progress: Any = trainer.fit_loop.epoch_loop.batch_progress
        done = progress.current.processed
        last = progress.is_last_batch or done >= trainer.num_training_batches
        return bool(done and done == progress.current.ready and last)

    def _inside_a_step(self, trainer: L.Trainer) -> bool:
        """After the beginning of an optimizer step's first batch and before the end of its last."""
        current: Any = trainer.fit_loop.epoch_loop.batch_progress.current
        waiting = current.processed % trainer.accumulate_grad_batches and not self._epoch_is_over(
            trainer
        )
        return current.ready > current.processed or bool(waiting)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self._rng_before = torch_states(trainer.strategy.root_device)

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        # All ranks agree on SIGTERM. Any other end may be this rank's own; to wait for the others'
        # generators would keep it from saving.
        self._alone = not isinstance(exception, SIGTERMException)
        if self._alone and isinstance(trainer.strategy, (FSDPStrategy, ModelParallelStrategy)):
            # Nor can a sharded model be saved by one rank: it would hang, or crash and hide why.
            for callback in trainer.checkpoint_callbacks:
                callback.save_on_exception = False  # type: ignore[attr-defined]

    # Loading ----------------------------------------------------------------------------------

    def load_state_dict_of(self, trainer: L.Trainer, state: dict[str, Any], steps: Steps) -> None:
        """Go on from a state; another batch size or number of ranks begins a leg of its own."""
        start = Position(state["epoch"], state["index"])
        limit = steps.limited(trainer.limit_train_batches)
        if steps.before(start.index) >= limit:
            start = Position(start.epoch + 1, 0)
        self._here = Leg(batch=state["batches"], start=start, steps=steps, limit=limit)
        self.legs = legs_of(state, steps.n)
        last = self.legs[-1]
        if (last.steps, last.limit) != (steps, limit) or last.position(self._here.batch) != start:
            self.legs = [leg for leg in self.legs if leg.batch < self._here.batch] + [self._here]
        self._rng = state["rng"]
        if self._sampler is not None:
            self._sampler.start_at(start)

    def on_load_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if trainer.state.fn != TrainerFn.FITTING or trainer.datamodule is None:  # type: ignore[attr-defined]
            return
        loops = checkpoint["loops"]["fit_loop"]
        if self.key in checkpoint:
            self._rewrite(trainer, pl_module, loops)
        elif batches := loops["epoch_loop.batch_progress"]["total"]["processed"]:
            raise ValueError(
                f"the checkpoint has trained on {batches} batches but has no state of {self.key} (it "
                f"holds {', '.join(checkpoint)}), so that the windows it has seen are not known. Go on "
                f"from a checkpoint that was saved with this data module, or load only its weights: "
                f"{type(pl_module).__name__}.load_from_checkpoint(path), then fit without ckpt_path"
            )

    def _rewrite(self, trainer: L.Trainer, pl_module: L.LightningModule, loops: dict[str, Any]) -> None:
        """Make the fit loop's counters what they are in `on_train_batch_end`, or between epochs."""
        assert self._here is not None
        here, saved = self._here, loops["epoch_loop.batch_progress"]["total"]
        validation = loops["epoch_loop.val_loop.batch_progress"]
        epoch, done = here.start.epoch, here.steps.before(here.start.index)
        inside = int(done > 0)
        validated = here.batch < saved["processed"] or (
            saved["completed"] == saved["processed"]
            and validation["total"]["ready"] == validation["total"]["completed"]
        )
        validate = inside and not validated and _validation_is_due(trainer, here, done)

        loops["epoch_progress"] = _progress(ready=epoch + inside, processed=epoch, completed=epoch)
        loops["epoch_loop.batch_progress"] = {
            **_progress(ready=here.batch, processed=here.batch, completed=here.batch - inside),
            "current": _tracker(ready=done, processed=done, completed=done - inside),
            "is_last_batch": False,
        }
        # "Begun, and no batch of it done" is what makes Lightning run the whole validation first.
        validation["total"] = _tracker(ready=int(validate), processed=0, completed=0)
        validation["current"] = _tracker(ready=0, processed=0, completed=0)
        if pl_module.automatic_optimization:
            optimizer = loops["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]
            stepped = optimizer["step"]["total"]["completed"]
            if inside and done % trainer.accumulate_grad_batches == 0:
                stepped -= 1  # Lightning adds it back
            loops["epoch_loop.state_dict"]["_batches_that_stepped"] = stepped - int(validate)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._rng is None or trainer.global_rank >= len(self._rng["torch"]):
            return
        states = {name: ranks[trainer.global_rank] for name, ranks in self._rng.items()}
        set_rng_states(states, trainer.strategy.root_device)
        self._rng = None


def legs_of(state: dict[str, Any], n: int) -> list[Leg]:
    """The legs of a saved run over `n` windows."""
    return [Leg.from_dict(values, n) for values in state["legs"]]


def check_same(saved: dict[str, Any], now: dict[str, Any]) -> None:
    """Raise ValueError, naming what differs and both values, unless both see the same windows."""
    names = [name for name in saved if saved[name] != now.get(name)]
    if saved["store"] == now["store"]:  # a corpus may have moved, as long as its tokens are the same
        names = [name for name in names if name in DECIDE_WINDOWS]
    if not names:
        return
    differ = "; ".join(f"{name} was {saved[name]!r}, now {now.get(name)!r}" for name in names)
    raise ValueError(
        f"the checkpoint was made with other windows than this run's: {differ}. Set what the checkpoint "
        "has, or load only its weights and fit without ckpt_path; batch_size and the number of devices "
        "may change"
    )


DECIDE_WINDOWS = (
    "max_length",
    "stride",
    "val_fraction",
    "test_fraction",
    "shuffle",
    "seed",
    "train_tokens",
)
"""What must not change between a checkpoint and the run that goes on from it, besides the store."""


def _validation_is_due(trainer: L.Trainer, leg: Leg, done: int) -> bool:
    """Whether the Trainer validates after this many batches of the run, and of the epoch."""
    interval, epochs = trainer.val_check_interval, trainer.check_val_every_n_epoch
    if isinstance(interval, float):
        interval = max(1, int(leg.limit * interval))
    if not isinstance(interval, int):  # by the clock
        return False
    if epochs is None:
        return leg.batch % interval == 0
    return (leg.start.epoch + 1) % epochs == 0 and done % interval == 0


def _progress(**counts: int) -> dict[str, dict[str, int]]:
    return {"total": _tracker(**counts), "current": _tracker(**counts)}


def _tracker(ready: int, processed: int, completed: int) -> dict[str, int]:
    return {"ready": ready, "started": ready, "processed": processed, "completed": completed}
