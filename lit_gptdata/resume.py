"""Exact resume under Lightning: a checkpoint keeps the position in the data, and a run continues there.

save   the Trainer's counters  ──▶ (epoch, index)  ──▶ GPTDataModule.state_dict()
load   the Trainer's counters  ◀── (epoch, index)  ◀── GPTDataModule.load_state_dict()

The Trainer's counters depend on the hook that saved: in `on_train_batch_end` one is behind, after an
exception one is ahead. Loading rewrites them to their values right after a batch, or between epochs.
"""

import math
from bisect import bisect_right
from dataclasses import asdict, replace
from typing import Any, Literal, get_args

import lightning as L
import numpy as np
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor

from lit_gptdata._checks import check_choice, check_integer
from lit_gptdata._lightning import (
    OptimizerSteps,
    epoch_is_over,
    has_trained,
    inside_a_step,
    log_gaps,
    log_info,
    overfits,
    rewrite_loops,
    set_epoch_batches,
    trains_with,
)
from lit_gptdata.random_states import rng_states, set_rng_states, torch_states
from lit_gptdata.windows.dataset import Windows
from lit_gptdata.windows.identity import check_complete, check_same, differences, segments_of, windows_of
from lit_gptdata.windows.loader import check_not_empty
from lit_gptdata.windows.sampler import WindowSampler, positions_of, windows_of_batch
from lit_gptdata.windows.steps import (
    Position,
    RunSegment,
    Steps,
    count_windows,
    epoch_batches,
    plan_run,
    trained_before,
)

OnChange = Literal["refuse", "continue"]
"""What happens if the data of a resumed run is not the data of its checkpoint."""


class Resume(L.Callback):
    """Tracks the position of a run in its data, and moves a resumed run to its position.

    GPTDataModule adds this callback to its Trainer.
    """

    def __init__(self, data: Any, on_change: OnChange) -> None:
        """`data`: the GPTDataModule."""
        self._data, self.on_change = data, check_choice("on_change", on_change, get_args(OnChange))
        self.key = type(data).__qualname__  # of the data module's state in a checkpoint
        self._earlier: list[dict[str, Any]] = []  # identity and segments of data that was continued from
        self._segments: list[RunSegment] = []  # of the whole run, the current one last
        self._current: RunSegment | None = None  # starts where this process starts
        options = {"batch_schedule": data._data.batch_schedule, "skip_steps": data._data.skip_steps}
        self.planned_by = next((name for name, value in options.items() if value), "")
        self.loaded_state: dict[str, Any] | None = None  # of a checkpoint loaded without a Trainer
        self._steps = OptimizerSteps()
        self._sampler: WindowSampler | None = None
        self._rng_to_restore: dict[str, Tensor] | None = None  # (world_size, …) each
        self._rng_before_step: dict[str, Tensor] = {}  # before the first batch of an optimizer step
        self._other_ranks_save = True
        self.resumed = False  # True from `load` until the first batch

    def attach(self, trainer: Any) -> None:
        """Join the Trainer's callbacks, for a run that starts at the beginning until `load`."""
        others = [other for other in trainer.callbacks if not isinstance(other, Resume)]
        trainer.callbacks[:] = [self, *others]  # first, because others may draw random numbers
        fit = trainer.fit_loop
        start = Position(fit.epoch_progress.current.processed, 0)
        batch = fit.epoch_loop.batch_progress.total.processed
        self._rng_to_restore, self._other_ranks_save, self.resumed = None, True, False
        if not (has_trained(trainer) and self._segments):  # else a second fit of the same Trainer
            self._segments, self._earlier, self._steps = [], [], OptimizerSteps([])
        self._continue_from(batch, start)
        self._steps.resume(batch, trainer.global_step, self._accumulate, self._segments)

    def follow(self, sampler: WindowSampler, trainer: L.Trainer | None) -> None:
        """Set a sampler to the position of the run, now and each time a checkpoint is loaded later."""
        before, self._sampler = self._sampler, sampler
        if trainer is None:
            self._follow_alone(before, sampler)
            return
        if self._current is None:
            return
        if not self._data._data.batch_schedule and self._current.steps != self._data.train_steps:
            if self.resumed:
                advice = "change it before Trainer.fit(), and leave out BatchSizeFinder"
                raise ValueError(f"batch_size changed after the checkpoint was loaded: {advice}")
            # another batch size since the last loader
            self._continue_from(*self._position(trainer))
        sampler.start_at(self._current.start, self._segments if self.planned_by else ())

    @property
    def _accumulate(self) -> int:
        trainer = self._data.trainer
        return 1 if trainer is None else max(1, trainer.accumulate_grad_batches)

    def plan(
        self, batch: int, start: Position, before: list[RunSegment], step: int = -1,
        steps: Steps | None = None,
    ) -> list[RunSegment]:  # fmt: skip
        """The segments of a run from a batch on, which starts at `start` after the segments `before`."""
        trainer, steps, sizes = self._data.trainer, steps or self._data.train_steps, []
        end = -self.tokens_before(batch, before)  # of each size, in tokens from here
        for part in self._data._data.batch_schedule or []:
            end += part["tokens"] or 0
            size = replace(steps, batch_size=part["batch_size"])
            check_not_empty(size)
            sizes.append((part["tokens"] and -(-end // self._data.max_length), size))
        skip, before = self._data._data.skip_steps, [*self._earlier_ones, *before] if batch else before
        options: dict[str, Any] = {"accumulate": self._accumulate, "step": step, "skip": skip or []}
        if trainer is not None:
            options |= {"limit": trainer.limit_train_batches, "text_order": overfits(trainer)}
        return plan_run(batch, start, sizes or [(None, steps)], before=before, **options)

    def plan_of_data(self) -> list[RunSegment]:
        """The segments from where this data starts, if no batch of it is done."""
        return self._segments if self.resumed else self.plan(0, Position(0, 0), [])

    def _continue_from(self, batch: int, start: Position) -> None:
        """Plan the run from `batch` on; segments that start there or later are dropped."""
        before = [segment for segment in self._segments if segment.batch < batch]
        planned = self.plan(batch, start, before)
        self._segments = [*before, *planned]
        self._current = next(segment for segment in planned if not segment.skip).rest(batch)

    def _continues_as_planned(self, batch: int, start: Position) -> bool:
        """Plan the last segment again, and continue in it if the run would come to the same position."""
        *before, last = self._segments
        planned = self.plan(last.batch, last.start, before, last.step)
        same = replace(planned[0], end=last.end) == last  # another gap may end its first epoch
        *_, current = (segment for segment in planned if segment.batch <= batch)
        gap = next((segment for segment in planned if segment.skip and segment.batch <= batch), None)
        there = gap.start if gap else current.position(batch)
        ended = start.index and there == Position(start.epoch + 1, 0)  # the epoch has no batch left
        if not (same and current.limit and (there == start or ended)):
            return False
        self._segments, self._current = [*before, *planned], current.rest(batch)
        return True

    def _follow_alone(self, before: WindowSampler | None, sampler: WindowSampler) -> None:
        """Without a Trainer: start where the loaded state was saved."""
        if (state := self.loaded_state) and not sampler.restored:  # by the state of the loader itself
            identity = self._data._identity
            check_same(state["data"], identity)
            if before not in (None, sampler):  # a later loader continues where this one is
                state = {**state, **before.state_dict()}
            sampler.load_state_dict({**state, "seed": identity["seed"]})

    def _history_of_data(self, world_size: int | None) -> list[RunSegment]:
        """The segments of this run or of a loaded checkpoint; for another `world_size`, of a new run."""
        segments = self._segments
        if self.loaded_state and not segments:
            check_same(self.loaded_state["data"], self._data._identity)
            segments = segments_of(self.loaded_state)
        if segments and world_size in (None, segments[-1].steps.world_size):
            return segments
        steps = self._data.train_steps
        steps = replace(steps, world_size=world_size or steps.world_size)
        return self.plan(0, Position(0, 0), [], steps=steps)

    def tokens_at(self, batch: int | None = None, step: int | None = None) -> int | float:
        """See `GPTDataModule.tokens_at`."""
        if batch is not None:
            batch = trained_before(self.all_segments, check_integer("batch", batch, 0))
        elif step is not None:
            batch = self._steps.batch_of(check_integer("step", step, 0), self.all_segments)
        else:
            batch = self._end
        return math.inf if batch is None else self.tokens_before(batch)

    def tokens_before(self, batch: int, segments: list[RunSegment] | None = None) -> int:
        """Input tokens of all ranks in the first `batch` batches that train."""
        segments = self._history_of_data(None) if segments is None else segments
        tokens = count_windows(segments, batch) * int(self._data.max_length)
        start = segments[0].batch if segments else batch
        for data in reversed(self._earlier):
            tokens += count_windows(segments_of(data), min(start, batch)) * data["data"]["max_length"]
            start = data["legs"][0]["batch"]
        return tokens

    def steps_within(self, tokens: int) -> int:
        """The number of optimizer steps of the whole run that take at most `tokens` tokens."""
        start = self._current.batch if self._current else 0
        most = (tokens - self.tokens_before(start)) // self._data.max_length + 1  # windows
        batches = range(start + 1, start + max(0, most) + 1)
        stop = start + bisect_right(batches, tokens, key=self.tokens_before)
        return self._steps.before(stop, self.all_segments)

    @property
    def _earlier_ones(self) -> list[RunSegment]:
        return [segment for data in self._earlier for segment in segments_of(data)]

    @property
    def all_segments(self) -> list[RunSegment]:
        """The segments of all data of the run."""
        return [*self._earlier_ones, *self._history_of_data(None)]

    @property
    def _end(self) -> int | None:
        """The number of batches after which the Trainer's limits end the run; None: no limit."""
        if (trainer := self._data.trainer) is None:
            return None
        ends = []
        if trainer.max_steps != -1:
            ends.append(self._steps.batch_of(trainer.max_steps, self.all_segments))
        if (epochs := trainer.max_epochs) not in (None, -1):
            segments = self._history_of_data(None)
            started = [segment for segment in segments if segment.start.epoch <= epochs]
            ends.append((started or segments)[-1].first_batch(epochs))
        return min(ends, default=None)

    def find_batch(
        self, step: int, epoch: int | None, rank: int | None, n: int | None, split: str = "train"
    ) -> tuple[Windows, np.ndarray]:
        """The windows that a batch is from, and its indices in them, for `n` ranks; see `windows_at`."""
        step, rank = check_integer("step", step), self._data._ranks.rank if rank is None else rank
        if check_choice("split", split, ("train", "val", "test")) != "train":
            windows = self._data._data.eval_windows(split)
            return windows, positions_of(self._data._steps(len(windows)), step, rank, n)
        if self._data._draws and not self._data._drawn_seed.is_shared:
            raise RuntimeError("seed=None: the ranks share a seed when they read their first batch")
        runs = [(data["data"], segments_of(data)) for data in self.history(n)]
        if epoch is None:
            begun = [run for run in runs if run[1][0].number <= step]
        else:
            begun = [run for run in runs if run[1][0].start.epoch <= epoch]
        data, segments = (begun or runs)[-1]
        is_present = data is runs[-1][0]
        windows = self._data.train_windows if is_present else windows_of(data, self._data._data)
        seed = data["seed"] if data["shuffle"] else None
        found = windows_of_batch(segments, step, epoch, rank=rank, seed=seed, order=windows.order)
        return windows, found

    def history(self, world_size: int | None = None) -> list[dict[str, Any]]:
        """Identity and segments of all data of the run, in plain values, the present data last."""
        legs = [segment.as_dict() for segment in self._history_of_data(world_size)]
        return [*self._earlier, {"data": self._data._identity, "legs": legs}]

    def save(self, trainer: L.Trainer) -> dict[str, Any]:
        """Position, history and the random states of every rank, as plain values and tensors."""
        if not self._segments:
            return {}
        batches, position = self._position(trainer)
        device = trainer.strategy.root_device
        states = rng_states(device)
        if inside_a_step(trainer):
            states |= self._rng_before_step
        gathers, gather = trainer.world_size > 1 and self._other_ranks_save, trainer.strategy.all_gather
        for name, state in states.items():
            states[name] = gather(state.to(device)).cpu() if gathers else state[None]
        return self._state(self._segments, batches, position, states)

    def save_alone(self) -> dict[str, Any]:
        """The same without a Trainer, and without random states: the position of the followed loader."""
        if self._sampler is None:
            return self.loaded_state or {}
        # the last batch is treated as unfinished, like one in which a Trainer stops
        segments, position = self._history_of_data(None), self._sampler.position(unfinished=1)
        steps = self._data.train_steps
        if (state := self.loaded_state) and segments[-1].steps != steps:
            start, n = Position(state["epoch"], state["index"]), steps.remaining()
            segments = [*segments, RunSegment(batch=state["batches"], start=start, steps=steps, limit=n)]
        return self._state(segments, segments[-1].batches_before(position), position, None)

    def _state(
        self, segments: list[RunSegment], batches: int, position: Position, rng: dict[str, Tensor] | None
    ) -> dict[str, Any]:
        """What a checkpoint keeps. These keys are an on-disk format."""
        legs = [segment.as_dict() for segment in segments]
        state = {"data": self._data._identity, "batches": batches, **asdict(position), "legs": legs}
        state |= {"steps": self._steps.starts, "rng": rng}
        return state | ({"earlier": self._earlier} if self._earlier else {})

    def load_alone(self, state: dict[str, Any]) -> None:
        """The same without a Trainer, for the next loader and, with an open store, the followed one."""
        check_complete(state, self.key)
        self.loaded_state, self._earlier = state, state.get("earlier", [])
        self._steps = OptimizerSteps(state.get("steps", [[0, 0, 1]]))
        if self._sampler is not None and self._data._data.is_open:
            self._follow_alone(self._sampler, self._sampler)

    def _position(self, trainer: L.Trainer) -> tuple[int, Position]:
        """The number of batches that the run has done, and where its next window is."""
        fit: Any = trainer.fit_loop
        progress, epochs = fit.epoch_loop.batch_progress, fit.epoch_progress.current
        done, epoch = progress.current.processed, epochs.processed
        if done and epochs.started == epoch:  # max_steps ended it early, but Lightning counts it as done
            epoch -= 1
        # gradients that wait for an optimizer step are not saved, so a resumed run repeats their batches
        first = self._current.step if self._current and self._current.start.epoch == epoch else 0
        is_over = epoch_is_over(trainer)
        lost = 0 if is_over else min(done - first, done % trainer.accumulate_grad_batches)
        done, batch = done - lost, progress.total.processed - lost
        begun = [s for s in self._segments if (s.start.epoch, s.step) <= (epoch, done)]
        segment = (begun or self._segments)[-1]
        index = done * segment.steps.width
        if segment.start.epoch == epoch:  # its steps before may have had another size
            index += segment.start.index - segment.step * segment.steps.width
        for gap in self._segments:
            if gap.skip and gap.batch == batch:
                return batch, gap.start
        return batch, Position(epoch + 1, 0) if is_over else Position(epoch, index)

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        if self.planned_by:
            set_epoch_batches(trainer, epoch_batches(self._segments, trainer.current_epoch))

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if self.resumed and pl_module.automatic_optimization:
            # Loggers get this as their step. Lightning may have added one to it.
            trainer.fit_loop.epoch_loop._batches_that_stepped = trainer.global_step
        self.resumed = False
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self._rng_before_step = torch_states(trainer.strategy.root_device)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        # All ranks act on a SIGTERM together. After another exception this rank may be alone, and could
        # wait forever for the others' random states.
        self._other_ranks_save = isinstance(exception, SIGTERMException)
        sharded = isinstance(trainer.strategy, (FSDPStrategy, ModelParallelStrategy))
        if sharded and not self._other_ranks_save:  # one rank alone would hang, or hide the exception
            for callback in trainer.checkpoint_callbacks:
                callback.save_on_exception = False

    def load(self, trainer: Any, state: dict[str, Any]) -> int | None:
        """Continue from a state; returns the epoch in which new data starts, None for the same data."""
        check_complete(state, self.key)
        identity, steps = self._data._identity, self._data.train_steps
        changes = differences(state["data"], identity)
        if self.on_change == "refuse":
            check_same(state["data"], identity)
        batch, start = state["batches"], Position(state["epoch"], state["index"])
        legs = [leg for leg in state["legs"] if leg["batch"] < batch]  # the others are a plan
        self._earlier = state.get("earlier", [])
        if changes:
            log_info(f"continue with new data at batch {batch:,}: {'; '.join(changes)}")
            if legs:
                self._earlier = [*self._earlier, {"data": state["data"], "legs": legs}]
            legs = []
        self._segments = [RunSegment.from_dict(leg, steps.n) for leg in legs]
        if not self._segments or not self._continues_as_planned(batch, start):
            inside = changes and start.index  # new data starts with an epoch
            self._continue_from(batch, Position(start.epoch + 1, 0) if inside else start)
        self._steps = OptimizerSteps(state.get("steps", []))  # absent from older checkpoints
        self._rng_to_restore, self.resumed = state["rng"], True
        gaps = [(segment.batch, segment.skip) for segment in self._segments if segment.skip]
        planned = [(leg["batch"], leg["skip"]) for leg in state["legs"] if leg.get("skip")]
        if self._data._stage_begins and gaps != planned:  # stages to come start as in a new run
            at = (start.epoch - self._data._first_epoch) * steps.n + start.index
            begins = zip(self._data._stage_begins, self._data._new_stage_begins, strict=True)
            self._data._stage_begins = [old if old <= at else max(at, new) for old, new in begins]
        if self._sampler is not None:
            self.follow(self._sampler, trainer)
        return self._segments[0].start.epoch if changes else None

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        if trainer.state.fn != TrainerFn.FITTING or trainer.datamodule is None:
            return
        loops = checkpoint["loops"]["fit_loop"]
        if self.resumed and self._current is not None:
            step, segments = checkpoint["global_step"], self.all_segments
            self._steps.resume(self._current.batch, step, self._accumulate, segments)
            n_batches = epoch_batches(self._segments, self._current.start.epoch)
            rewrite_loops(trainer, pl_module, loops, self._current, n_batches)
        elif self.key in checkpoint:
            check_complete(checkpoint[self.key], self.key)
            problem = "does not call super().load_state_dict(state_dict), so the position is lost"
            raise ValueError(f"{self.key}.load_state_dict() {problem}. Add the call")
        elif batches := loops["epoch_loop.batch_progress"]["total"]["processed"]:
            raise ValueError(
                f"the checkpoint trained on {batches} batches but has no state of {self.key} (only of "
                f"{', '.join(checkpoint)}). Resume from one that this data module saved, or fit without "
                f"ckpt_path, with the weights of {type(pl_module).__name__}.load_from_checkpoint(path)"
            )

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        if self.resumed and not trains_with(trainer, self._sampler):
            problem = "does not return the loader of GPTDataModule"
            advice = "Return super().train_dataloader() to continue at the position in the data"
            raise ValueError(f"{self.key}.train_dataloader() {problem}. {advice}")
        log_gaps(self._segments)
        rng, rank = self._rng_to_restore, trainer.global_rank
        if rng is None or rank >= len(rng["torch"]):  # a new rank has no state to restore
            return
        set_rng_states({name: ranks[rank] for name, ranks in rng.items()}, trainer.strategy.root_device)
        self._rng_to_restore = None
