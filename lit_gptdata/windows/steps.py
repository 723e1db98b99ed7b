"""How an epoch is divided into steps, and each step into one slice per rank. Nothing is read.

A step takes the next world_size × batch_size positions of the epoch's permutation:

positions   0 1 2 3 4 5 6 7 8 9       n=10, batch_size=2, world_size=2
step 0      [0 1] [2 3]               rank 0, rank 1
step 1              [4 5] [6 7]
tail                      8 9         dropped with drop_last, otherwise a smaller last step
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal

Tail = Literal["drop", "share", "pad"]
"""What happens to the last windows of an epoch, which do not fill a step.

"drop": they are left out. "share": a last step divides them among the ranks, unless there are fewer
windows than ranks. "pad": a last step gives each rank the same number of positions, and positions from
`n` on are padding."""


@dataclass(frozen=True)
class Position:
    """A point of a run: its next window is at `index` of the permutation of `epoch`."""

    epoch: int
    index: int


@dataclass(frozen=True, kw_only=True)
class Steps:
    """The steps of an epoch of `n` windows."""

    n: int
    batch_size: int
    world_size: int = 1
    tail: Tail = "drop"

    @property
    def width(self) -> int:
        """Windows of a full step, over all ranks."""
        return self.batch_size * self.world_size

    def remaining(self, index: int = 0) -> int:
        """Number of steps from position `index` to the end of the epoch."""
        full, rest = divmod(max(0, self.n - index), self.width)
        least = {"drop": self.width, "share": self.world_size, "pad": 1}[self.tail]
        return full + (rest >= least)

    def done(self, index: int) -> int:
        """Number of steps before position `index`: an epoch's steps minus the remaining ones."""
        return self.remaining() - self.remaining(index)

    def limited(self, limit: int | float, done: int = 0, index: int = 0) -> int:
        """Steps per epoch under `Trainer(limit_train_batches=limit)`, a number or a fraction.

        `done`: steps of another size, which the epoch takes before it continues at `index`.
        """
        total = done + self.remaining(index)
        return min(limit, total) if isinstance(limit, int) else int(total * limit)

    def windows_of_rank(self, rank: int) -> int:
        """Number of windows that a rank has in an epoch."""
        full = self.n // self.width
        begin, end = self.rank_slice(full * self.width, rank) if self.remaining() > full else (0, 0)
        return full * self.batch_size + end - begin

    def rank_slice(self, index: int, rank: int) -> tuple[int, int]:
        """Positions [begin, end) of a rank in the step that starts at position `index`."""
        windows = min(self.width, self.n - index)
        if self.tail == "pad":
            size = -(-windows // self.world_size)
            return index + rank * size, index + (rank + 1) * size
        return index + rank * windows // self.world_size, index + (rank + 1) * windows // self.world_size


@dataclass(frozen=True, kw_only=True)
class RunSegment:
    """A part of a run during which the batch size and the number of ranks stay the same."""

    batch: int
    """Number of batches that the run trained on before, counted on one rank."""
    start: Position
    steps: Steps
    limit: int
    """Steps that the Trainer takes per epoch: all of `steps`, or fewer."""
    text_order: bool = False
    """True if the Trainer overfits: each epoch has its first windows in text order."""
    step: int = -1
    """Batches of its first epoch before it, as Lightning counts; -1: measured in its own steps."""
    end: int = -1
    """Batches that the Trainer takes in its first epoch, with the `step` earlier ones; -1: `limit`."""
    skipped: int = 0
    """Batches of the run that were skipped before it."""
    skip: int = 0
    """More than 0: a gap. The run skips so many batches, and the next segment has the same `batch`."""

    def __post_init__(self) -> None:
        if self.step < 0:
            object.__setattr__(self, "step", self.steps.done(self.start.index))
        if self.end < 0:
            object.__setattr__(self, "end", self.limit)

    def first_batch(self, epoch: int) -> int:
        """The batch number of step 0 of an epoch, as if the segment had taken all its steps."""
        later = epoch - self.start.epoch
        return self.batch - self.step + (self.end + (later - 1) * self.limit if later > 0 else 0)

    def position(self, batch: int) -> Position:
        """Where batch `batch` of the run starts. It must not be before the segment's first batch."""
        epoch, step = self.step_of(batch)
        if epoch == self.start.epoch:  # its steps may have another size before its start
            return Position(epoch, self.start.index + (step - self.step) * self.steps.width)
        return Position(epoch, step * self.steps.width)

    def step_of(self, batch: int) -> tuple[int, int]:
        """The epoch of batch `batch`, and its number in the epoch, as Lightning counts."""
        step = self.step + batch - self.batch
        if step < self.end or not self.limit:
            return self.start.epoch, step
        epochs, step = divmod(step - self.end, self.limit)
        return self.start.epoch + 1 + epochs, step

    @property
    def number(self) -> int:
        """The number of its first batch in the run, where skipped batches count."""
        return self.batch + self.skipped

    def skipped_in(self, epoch: int) -> int:
        """Number of batches of an epoch that a gap skips; 0 for other segments."""
        begin, end = self.first_batch(epoch), self.first_batch(epoch + 1)
        return max(0, min(end, self.batch + self.skip) - max(begin, self.batch))

    def batches_before(self, position: Position) -> int:
        """Number of batches of the run before `position`, which is where a step starts or ends."""
        done = self.steps.done(position.index)
        if position.epoch == self.start.epoch:
            return self.batch + done - self.steps.done(self.start.index)
        return self.first_batch(position.epoch) + done

    def batch_of(self, step: int, epoch: int) -> int:
        """The run's batch that is step `step` of `epoch`; less than `self.batch` if there is none."""
        limit = self.end if epoch == self.start.epoch else self.limit
        if not 0 <= step < limit or epoch < self.start.epoch:
            return -1
        return self.first_batch(epoch) + step

    def windows_before(self, batch: int) -> int:
        """Windows of all ranks from the segment's first batch up to `batch`."""
        at, n, width = self.position(batch), self.steps.n, self.steps.width
        if at.epoch == self.start.epoch:
            return at.index - self.start.index
        first = min((self.end - self.step) * width, n - self.start.index)
        return first + (at.epoch - self.start.epoch - 1) * min(self.limit * width, n) + at.index

    def updates_before(self, batch: int, accumulate: int) -> int:
        """Optimizer steps of `accumulate` batches from the segment's first batch up to `batch`.

        As in Lightning, the batches that accumulate are counted from an epoch's start, and its last
        optimizer step may have fewer.
        """
        epoch, step = self.step_of(batch)
        updates = step // accumulate - self.step // accumulate
        if later := epoch - self.start.epoch:
            updates += -(-self.end // accumulate) + (later - 1) * -(-self.limit // accumulate)
        return updates

    def rest(self, batch: int) -> RunSegment:
        """The segment from batch `batch` on."""
        epoch, step = self.step_of(batch)
        end = self.end if epoch == self.start.epoch else self.limit
        return replace(self, batch=batch, start=self.position(batch), step=step, end=end)

    def as_dict(self) -> dict[str, Any]:
        """The segment in plain values, as a checkpoint holds it. These keys are an on-disk format."""
        values = asdict(self)
        values |= values.pop("start") | values.pop("steps")
        del values["n"]  # the number of windows follows from the data
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any], n: int) -> RunSegment:
        """Read what `as_dict` wrote, for a run over `n` windows."""
        steps = Steps(n=n, **{name: values[name] for name in ("batch_size", "world_size", "tail")})
        start = Position(values["epoch"], values["index"])
        own = {each.name: values[each.name] for each in fields(cls) if each.name in values}
        return cls(start=start, steps=steps, **own)


def plan_run(
    batch: int,
    start: Position,
    sizes: Sequence[tuple[int | None, Steps]],
    *,
    skip: Sequence[Sequence[int]] = (),
    before: Sequence[RunSegment] = (),
    step: int = -1,
    limit: int | float = 1.0,
    accumulate: int = 1,
    text_order: bool = False,
) -> list[RunSegment]:
    """The segments of a run from batch `batch` on, which starts at `start` after the segments `before`.

    `sizes`: the batch sizes in turn, [(windows, steps), …]. A size ends with the optimizer step in which
    the run has trained on `windows` windows of all ranks since `batch`; the last one has None. `skip`:
    sorted ranges [begin, end) of batches that do not train, in the numbers of the run. `step`: as in
    RunSegment. `limit`, `accumulate`: the Trainer's limit_train_batches and accumulate_grad_batches.
    Raises ValueError for a range that has trained, or that leaves no batch of an epoch.
    """
    skipped = before[-1].skipped + before[-1].skip if before else 0
    for begin, end in skip:
        first, last = (trained_before(before, min(n, batch + skipped)) for n in (begin, end))
        if first < last:
            advice = f"resume from a checkpoint before batch {begin:,}, or leave out this range"
            raise ValueError(f"skip_steps [{begin:,}, {end:,}): the run has trained on it: {advice}")
    planner = _Planner(
        sizes=sizes, skip=skip, limit=limit, accumulate=accumulate, text_order=text_order,
        start=start, batch=batch, skipped=skipped, step=step,
        missed=sum(segment.skipped_in(start.epoch) for segment in before),
    )  # fmt: skip
    if before and before[-1].skip:  # the optimizer step may have started before this gap
        planner.gap, opened = before[-1], batch - max(0, step) % accumulate
        planner.windows_of_step = count_windows(before, opened) - count_windows(before, batch)
    return planner.plan()


@dataclass(kw_only=True)
class _Planner:
    """Walks ahead in a run, from event to event: a size ends, a gap starts, an epoch ends."""

    sizes: Sequence[tuple[int | None, Steps]]
    skip: Sequence[Sequence[int]]
    limit: int | float
    accumulate: int
    text_order: bool
    planned: list[RunSegment] = field(default_factory=list)
    # Where the walk is. After an epoch's last batch it is still in this epoch, because a smaller batch
    # may fit into the rest.
    start: Position
    batch: int  # batches of the run that have trained
    skipped: int  # batches of the run that were skipped
    step: int  # batches of the epoch that have trained; -1 at first: measured in the first size
    missed: int  # batches of the epoch that were skipped
    gap: RunSegment | None = None  # the gap that ends here
    windows: int = 0  # windows of all ranks that have trained since the walk started
    windows_of_step: int = 0  # `windows` when the optimizer step started; they decide its batch size

    def plan(self) -> list[RunSegment]:
        """Walk until no event is ahead."""
        while True:
            until, here = self.segment()
            gap = next((pair for pair in self.skip if pair[1] > here.number), None)
            if not here.limit:  # the Trainer takes no batch
                return [*self.planned, here]
            if here.step == here.end:
                self.end_epoch()
            elif gap and gap[0] <= here.number:
                self.skip_over(replace(here, skip=gap[1] - here.number))
            else:
                self.planned.append(here)
                stops = [gap[0] - here.skipped] if gap else []
                stops += [self.end_of_size(until)] if until is not None else []
                if not stops:
                    return self.planned
                self.train_to(min(stops))

    def segment(self) -> tuple[int | None, RunSegment]:
        """The windows with which the present size ends, and the segment that starts here."""
        if self.step % self.accumulate == 0:  # an optimizer step starts
            self.windows_of_step = self.windows
        until, steps = next(
            size for size in self.sizes if size[0] is None or size[0] > self.windows_of_step
        )
        if self.step < 0:
            self.step = max(0, steps.done(self.start.index) - self.missed)
        limit = self.limit - self.missed if isinstance(self.limit, int) else self.limit
        return until, RunSegment(
            batch=self.batch, start=self.start, steps=steps, limit=steps.limited(self.limit),
            text_order=self.text_order, step=self.step, skipped=self.skipped,
            end=max(self.step, steps.limited(limit, self.step, self.start.index)),
        )  # fmt: skip

    def end_of_size(self, until: int) -> int:
        """The batch before which `until` windows have trained and an optimizer step ends."""
        here, missing = self.planned[-1], until - self.windows
        batches = range(here.batch, here.batch + missing)  # a batch has at least one window
        batch = here.batch + bisect_left(batches, missing, key=here.windows_before)
        rest = here.rest(batch)
        return batch + min(rest.end, -(-rest.step // self.accumulate) * self.accumulate) - rest.step

    def train_to(self, batch: int) -> None:
        """Go to the end of batch `batch` - 1."""
        here = self.planned[-1]
        last = here.rest(batch - 1)
        if last.start.epoch > here.start.epoch:
            self.missed = 0
        self.windows += here.windows_before(batch)
        self.batch, self.step, self.gap = batch, last.step + 1, None
        self.start = Position(last.start.epoch, last.start.index + last.steps.width)

    def skip_over(self, gap: RunSegment) -> None:
        """Go to the end of a gap. Raises ValueError if an epoch ends in it without a batch."""
        after = gap.position(gap.batch + gap.skip)  # as if its batches trained
        self.gap = gap
        while self.start.epoch < after.epoch:
            self.end_epoch()
        self.planned.append(gap)
        self.start, self.skipped = after, self.skipped + gap.skip
        self.missed += gap.skipped_in(after.epoch)

    def end_epoch(self) -> None:
        """Start the next epoch. If the last segment would continue in this one, shorten it."""
        epoch = self.start.epoch
        if self.gap and not self.step:
            raise ValueError(_no_batch_of(epoch, self.gap))
        if self.planned and self.planned[-1].position(self.batch).epoch == epoch:
            *self.planned, last = self.planned
            if last.start.epoch < epoch:
                self.planned.append(last)
                last = last.rest(self.batch - self.step)
            self.planned.append(replace(last, end=self.step))
        self.start, self.step, self.missed = Position(epoch + 1, 0), 0, 0


def _no_batch_of(epoch: int, gap: RunSegment) -> str:
    first, after = (gap.first_batch(e) + gap.skipped for e in (epoch, epoch + 1))
    skip = f"skip_steps [{gap.number:,}, {gap.number + gap.skip:,})"
    which = f"epoch {epoch}, which would have [{first:,}, {after:,})"
    return f"{skip} leaves no batch to train in {which}: keep at least one batch of each epoch"


def epoch_batches(segments: Sequence[RunSegment], epoch: int) -> int:
    """The number of batches that the Trainer takes in an epoch of a run."""
    segment = [segment for segment in segments if segment.start.epoch <= epoch][-1]
    if segment.skip:
        return segment.step
    return segment.end if segment.start.epoch == epoch else segment.limit


def trained_before(segments: Sequence[RunSegment], number: int) -> int:
    """How many of the first `number` batches of a run train."""
    for segment in reversed(segments):
        if segment.number <= number:
            return segment.batch if segment.skip else number - segment.skipped
    return number - sum(segment.skipped for segment in segments[:1])


def number_after(segments: Sequence[RunSegment], batches: int) -> int:
    """The number of the batch that follows `batches` trained ones, where skipped batches count."""
    last = [segment for segment in segments if segment.batch < batches] or segments[:1]
    return batches + sum(segment.skipped for segment in last[-1:])


def parts_before(segments: Sequence[RunSegment], stop: int) -> Iterator[tuple[RunSegment, int]]:
    """The segments that have batches before `stop`, each with the batch where it ends by then."""
    starts = [segment.batch for segment in segments]
    for segment, after in zip(segments, [*starts[1:], stop], strict=False):
        if segment.limit and segment.batch < (end := min(after, stop)):
            yield segment, end


def count_windows(segments: Sequence[RunSegment], stop: int) -> int:
    """Windows of all ranks in the batches of a run before `stop`."""
    return sum(segment.windows_before(end) for segment, end in parts_before(segments, stop))


def count_updates(segments: Sequence[RunSegment], stop: int, accumulate: int) -> int:
    """Optimizer steps in the batches of a run before `stop`, with accumulate_grad_batches."""
    parts = parts_before(segments, stop)
    return sum(segment.updates_before(end, accumulate) for segment, end in parts)


def find_batch(
    segments: Sequence[RunSegment], step: int, epoch: int | None = None
) -> tuple[RunSegment, Position]:
    """Find the segment that a batch belongs to, and the position where it starts.

    `step` counts from 0 over the whole run, also batches that are skipped. With `epoch` it counts within
    the epoch and equals Lightning's batch_idx, which leaves them out. After a change of batch size it
    continues from the steps done by then, measured in new steps. Raises ValueError for a step that the
    run does not have.
    """
    after = None  # the first batch of the following segment
    for segment in reversed(segments):
        skipped = segment.skipped if epoch is None else 0
        batch = step - skipped if epoch is None else segment.batch_of(step, epoch)
        if segment.limit and batch >= segment.batch and (after is None or batch + skipped < after):
            return segment, segment.position(batch)
        after = segment.batch + skipped
    where = "" if epoch is None else f" of epoch {epoch}"
    first, last = segments[0], segments[-1]
    raise ValueError(
        f"step={step}{where} does not exist: the run starts with step {first.number}, in epoch "
        f"{first.start.epoch}, and an epoch has {last.limit} steps of "
        f"batch_size={last.steps.batch_size} on {last.steps.world_size} ranks"
    )
