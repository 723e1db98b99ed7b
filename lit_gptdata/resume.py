"""Exact resume under Lightning: a checkpoint keeps the position in the data, and a run continues there.

save   the Trainer's counters  ──▶ (epoch, index)  ──▶ GPTDataModule.state_dict()
load   the Trainer's counters  ◀── (epoch, index)  ◀── GPTDataModule.load_state_dict()

The Trainer's counters depend on the hook that saved: in `on_train_batch_end` one is behind, after an
exception one is ahead. Loading rewrites them to their values right after a batch, or between epochs.
"""

import random
from dataclasses import replace
from typing import Any, cast

import lightning as L
import numpy as np
import torch
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor

from lit_gptdata._lightning import overfits
from lit_gptdata.windows.sampler import WindowSampler
from lit_gptdata.windows.steps import Position, RunSegment, Steps

WINDOW_OPTIONS = ("max_length", "stride", "val_fraction", "test_fraction", "shuffle", "seed")
"""The options that determine the windows of a store and their order; a resumed run keeps them."""


class Resume(L.Callback):
    """Tracks the position of a run in its data, and moves a resumed run to its position.

    GPTDataModule adds this callback to its Trainer. `key` names the data module's state in a
    checkpoint. `identity` below is a dict of plain values that determine the windows and their order.
    """

    def __init__(self, key: str) -> None:
        self.key = key
        self._segments: list[RunSegment] = []  # of the whole run, the current one last
        self._current: RunSegment | None = None  # starts where this process starts
        self.loaded_state: dict[str, Any] | None = None  # of a checkpoint loaded without a Trainer
        self._sampler: WindowSampler | None = None
        self._rng_to_restore: dict[str, Tensor] | None = None  # (world_size, …) each
        self._rng_before_step: dict[str, Tensor] = {}  # before the first batch of an optimizer step
        self._other_ranks_save = True
        self._resumed = False  # True from `load` until the first batch

    def attach(self, trainer: L.Trainer, steps: Steps) -> None:
        """Join the Trainer's callbacks, for a run that starts at the beginning until `load`."""
        callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]  # set late
        # It comes first, because other callbacks may draw random numbers.
        callbacks[:] = [self, *(other for other in callbacks if not isinstance(other, Resume))]
        fit: Any = trainer.fit_loop
        self._current = RunSegment(
            batch=fit.epoch_loop.batch_progress.total.processed,
            start=Position(fit.epoch_progress.current.processed, 0),
            steps=steps,
            limit=steps.limited(trainer.limit_train_batches),
            text_order=overfits(trainer),
        )
        self._segments, self._rng_to_restore, self._other_ranks_save = [self._current], None, True

    def follow(self, sampler: WindowSampler, trainer: L.Trainer, steps: Steps) -> None:
        """Set a sampler to the position of the run, now and each time a checkpoint is loaded later.

        Another batch size since the last loader starts a new segment.
        """
        self._sampler = sampler
        if self._current is None:
            return
        if self._current.steps != steps:
            batches, start = self._position(trainer)
            limit = steps.limited(trainer.limit_train_batches)
            self._continue_from(
                replace(self._current, batch=batches, start=start, steps=steps, limit=limit)
            )
        sampler.start_at(self._current.start)

    def _continue_from(self, segment: RunSegment) -> None:
        """Make `segment` the current one; segments that start at the same batch or later are dropped."""
        self._segments = [before for before in self._segments if before.batch < segment.batch]
        self._segments.append(segment)
        self._current = segment

    def follow_alone(self, sampler: WindowSampler, identity: dict[str, Any]) -> None:
        """The same without a Trainer: start where a loaded state was saved."""
        self._sampler = sampler
        if (state := self.loaded_state) and not sampler.restored:  # by the state of the loader itself
            check_same(state["data"], identity)
            sampler.load_state_dict({**state, "seed": identity["seed"]})

    def segments(
        self, steps: Steps, identity: dict[str, Any], world_size: int | None
    ) -> list[RunSegment]:
        """The history of this run, or else of a loaded checkpoint, or else a new run of `steps`.

        A `world_size` other than the history's gives a new run on that number of ranks.
        """
        segments = self._segments or [RunSegment.from_beginning(steps)]
        if self.loaded_state is not None and not self._segments:
            check_same(self.loaded_state["data"], identity)
            segments = [RunSegment.from_dict(leg, steps.n) for leg in self.loaded_state["legs"]]
        if world_size in (None, segments[-1].steps.world_size):
            return segments
        return [RunSegment.from_beginning(replace(steps, world_size=world_size))]

    def save(self, trainer: L.Trainer, identity: dict[str, Any]) -> dict[str, Any]:
        """Position, history and the random states of every rank, as plain values and tensors."""
        if not self._segments:
            return {}
        batches, position = self._position(trainer)
        device = trainer.strategy.root_device
        states = rng_states(device)
        if self._inside_a_step(trainer):
            states |= self._rng_before_step
        if trainer.world_size > 1 and self._other_ranks_save:
            gather = trainer.strategy.all_gather
            states = {name: gather(state.to(device)).cpu() for name, state in states.items()}
        else:
            states = {name: state[None] for name, state in states.items()}
        return {
            "data": identity,
            "batches": batches,
            "epoch": position.epoch,
            "index": position.index,
            "legs": [segment.as_dict() for segment in self._segments],  # the key is an on-disk format
            "rng": states,
        }

    def save_alone(self, steps: Steps, identity: dict[str, Any]) -> dict[str, Any]:
        """The same without a Trainer, and without random states: the position of the followed loader.

        The last batch counts as unfinished, as in a run under a Trainer that ends inside a batch.
        """
        if self._sampler is None:
            return self.loaded_state or {}
        segments, position = self.segments(steps, identity, None), self._sampler.finished()
        if self.loaded_state and segments[-1].steps != steps:
            start = Position(self.loaded_state["epoch"], self.loaded_state["index"])
            current = RunSegment(
                batch=self.loaded_state["batches"], start=start, steps=steps, limit=steps.remaining()
            )
            segments = [*segments, current]
        return {
            "data": identity,
            "batches": segments[-1].batches_before(position),
            "epoch": position.epoch,
            "index": position.index,
            "legs": [segment.as_dict() for segment in segments],
            "rng": None,
        }

    def load_alone(self, state: dict[str, Any], identity: dict[str, Any] | None) -> None:
        """The same without a Trainer: keep the state for the next loader, and move the followed loader.

        `identity` is None before the store is open.
        """
        self.check_complete(state)
        self.loaded_state = state
        if self._sampler is not None and identity is not None:
            self.follow_alone(self._sampler, identity)

    def check_complete(self, state: dict[str, Any]) -> None:
        """Raise ValueError for a state that a subclass saved without the state of GPTDataModule."""
        if not {"data", "batches", "epoch", "index", "legs"} <= state.keys():
            raise ValueError(
                f"the checkpoint's state of {self.key} has no position in the data, only the keys "
                f"{sorted(state)}. Its state_dict() must return {{**super().state_dict(), …}}. To go on "
                "without the position, load only the weights of the model"
            )

    def _position(self, trainer: L.Trainer) -> tuple[int, Position]:
        """The number of batches that the run has done, and where its next window is.

        Gradients that wait for an optimizer step are not saved, so a resumed run repeats their batches.
        """
        fit: Any = trainer.fit_loop
        segment = self._segments[-1]
        progress, epochs = fit.epoch_loop.batch_progress, fit.epoch_progress.current
        done, epoch = progress.current.processed, epochs.processed
        if done and epochs.started == epoch:  # max_steps ended it early, but Lightning counts it as done
            epoch -= 1
        if self._epoch_is_over(trainer):
            return progress.total.processed, Position(epoch + 1, 0)
        start = segment.start if segment.start.epoch == epoch else Position(epoch, 0)
        done -= segment.steps.done(start.index)
        lost = min(done, progress.current.processed % trainer.accumulate_grad_batches)
        index = start.index + (done - lost) * segment.steps.width
        return progress.total.processed - lost, Position(epoch, index)

    def _epoch_is_over(self, trainer: L.Trainer) -> bool:
        progress: Any = trainer.fit_loop.epoch_loop.batch_progress
        done = progress.current.processed
        last = progress.is_last_batch or done >= trainer.num_training_batches
        return bool(done and done == progress.current.ready and last)

    def _inside_a_step(self, trainer: L.Trainer) -> bool:
        """Whether an optimizer step's first batch has started and its last batch has not ended."""
        current: Any = trainer.fit_loop.epoch_loop.batch_progress.current
        waiting = current.processed % trainer.accumulate_grad_batches
        return current.ready > current.processed or bool(waiting and not self._epoch_is_over(trainer))

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        loop: Any = trainer.fit_loop.epoch_loop
        if self._resumed and pl_module.automatic_optimization:
            # Loggers get this as their step. Lightning may have added one to it.
            loop._batches_that_stepped = trainer.global_step
        self._resumed = False
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self._rng_before_step = torch_states(trainer.strategy.root_device)

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        # All ranks act on a SIGTERM together. After another exception this rank may be alone, and could
        # wait forever for the others' random states.
        self._other_ranks_save = isinstance(exception, SIGTERMException)
        sharded = isinstance(trainer.strategy, (FSDPStrategy, ModelParallelStrategy))
        if sharded and not self._other_ranks_save:  # one rank alone would hang, or hide the exception
            for callback in trainer.checkpoint_callbacks:
                callback.save_on_exception = False  # type: ignore[attr-defined]

    def load(
        self, trainer: L.Trainer, state: dict[str, Any], identity: dict[str, Any], steps: Steps
    ) -> None:
        """Continue from a state. Another batch size or number of ranks starts a new segment."""
        self.check_complete(state)
        check_same(state["data"], identity)
        start = Position(state["epoch"], state["index"])
        limit, text_order = steps.limited(trainer.limit_train_batches), overfits(trainer)
        if steps.done(start.index) >= limit:
            start = Position(start.epoch + 1, 0)
        self._current = current = RunSegment(
            batch=state["batches"], start=start, steps=steps, limit=limit, text_order=text_order
        )
        self._segments = [RunSegment.from_dict(leg, steps.n) for leg in state["legs"]]
        last = self._segments[-1]
        same = (last.steps, last.limit, last.text_order) == (steps, limit, text_order)
        if not same or last.position(current.batch) != start:
            self._continue_from(current)
        self._rng_to_restore, self._resumed = state["rng"], True
        if self._sampler is not None:
            self._sampler.start_at(start)

    def on_load_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if trainer.state.fn != TrainerFn.FITTING or trainer.datamodule is None:  # type: ignore[attr-defined]
            return
        loops = checkpoint["loops"]["fit_loop"]
        if self.key in checkpoint:
            self.check_complete(checkpoint[self.key])
            batches = checkpoint[self.key]["batches"]
            if self._current is None or self._current.batch != batches:
                raise ValueError(
                    f"{self.key}.load_state_dict() does not call super().load_state_dict(state_dict), "
                    "so the run cannot continue at its position in the data. Add the call"
                )
            self._rewrite(trainer, pl_module, loops)
        elif batches := loops["epoch_loop.batch_progress"]["total"]["processed"]:
            raise ValueError(
                f"the checkpoint trained on {batches} batches but has no state of {self.key} (only of "
                f"{', '.join(checkpoint)}). Resume from one that this data module saved, or fit without "
                f"ckpt_path, with the weights of {type(pl_module).__name__}.load_from_checkpoint(path)"
            )

    def _rewrite(self, trainer: L.Trainer, pl_module: L.LightningModule, loops: dict[str, Any]) -> None:
        """Set the fit loop's counters to their values in `on_train_batch_end`, or between epochs."""
        assert self._current is not None
        current, saved = self._current, loops["epoch_loop.batch_progress"]["total"]
        validation = loops["epoch_loop.val_loop.batch_progress"]
        epoch, done = current.start.epoch, current.steps.done(current.start.index)
        inside = int(done > 0)
        validated = current.batch < saved["processed"] or (
            saved["completed"] == saved["processed"]
            and validation["total"]["ready"] == validation["total"]["completed"]
        )
        validate = inside and not validated and _validation_is_due(trainer, current, done)

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

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        rng, rank = self._rng_to_restore, trainer.global_rank
        if rng is None or rank >= len(rng["torch"]):  # a new rank has no state to restore
            return
        set_rng_states({name: ranks[rank] for name, ranks in rng.items()}, trainer.strategy.root_device)
        self._rng_to_restore = None


def check_same(saved: dict[str, Any], now: dict[str, Any]) -> None:
    """Raise ValueError unless two identities give the same windows; names each difference."""
    names = [name for name in saved if saved[name] != now.get(name)]
    if saved["store"] == now["store"]:  # a corpus may move, if its tokens stay the same
        names = [name for name in names if name in (*WINDOW_OPTIONS, "train_tokens")]
    if differ := "; ".join(f"{name} was {saved[name]!r}, now {now.get(name)!r}" for name in names):
        raise ValueError(
            f"the checkpoint's windows differ from this run's: {differ}. Set the checkpoint's values, "
            "or load only its weights; batch_size and the number of devices may change"
        )


def _validation_is_due(trainer: L.Trainer, segment: RunSegment, done: int) -> bool:
    """Whether the Trainer validates before the segment, after `done` batches of the epoch."""
    if not trainer.limit_val_batches:
        return False
    interval = getattr(trainer, "val_check_interval", None)  # Lightning leaves it unset for a duration
    epochs = trainer.check_val_every_n_epoch
    if isinstance(interval, float):
        interval = max(1, int(segment.limit * interval))
    if not isinstance(interval, int):  # a time interval
        return False
    if epochs is None:
        return segment.batch % interval == 0
    return (segment.start.epoch + 1) % epochs == 0 and done % interval == 0


def _tracker(ready: int, processed: int, completed: int) -> dict[str, int]:
    return {"ready": ready, "started": ready, "processed": processed, "completed": completed}


def torch_states(device: torch.device) -> dict[str, Tensor]:
    """States of torch's global generators, uint8: "torch" for the CPU, "device" for another device."""
    states = {"torch": torch.get_rng_state()}
    if device.type != "cpu":
        states["device"] = torch.get_device_module(device).get_rng_state()
    return states


def rng_states(device: torch.device) -> dict[str, Tensor]:
    """`torch_states`, and the states of Python's and numpy's global generators, in fixed shapes.

    "python" and "numpy" are int64 (627,): 624 words, the index of the next word, and the spare normal
    deviate (whether there is one, and its bits).
    """
    _, words, spare = random.getstate()
    _, keys, index, has_spare, numpy_spare = cast(tuple[Any, ...], np.random.get_state())
    return torch_states(device) | {
        "python": torch.tensor([*words, *_bits(spare)]),
        "numpy": torch.tensor([*keys.tolist(), index, *_bits(numpy_spare if has_spare else None)]),
    }


def set_rng_states(states: dict[str, Tensor], device: torch.device) -> None:
    """Set the global generators to the states that `rng_states` gave."""
    torch.set_rng_state(states["torch"].clone())  # torch ignores the offset of a view
    *words, has_spare, bits = states["python"].tolist()
    random.setstate((3, tuple(words), _float(bits) if has_spare else None))
    *keys, index, has_spare, bits = states["numpy"].tolist()
    np.random.set_state(("MT19937", np.array(keys, np.uint32), index, has_spare, _float(bits)))
    if "device" in states and device.type != "cpu":
        torch.get_device_module(device).set_rng_state(states["device"].clone())


def _bits(spare: float | None) -> tuple[int, int]:
    return int(spare is not None), int(np.float64(spare or 0.0).view(np.int64))


def _float(bits: int) -> float:
    return float(np.int64(bits).view(np.float64))
