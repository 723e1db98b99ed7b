"""How an epoch is divided into steps, and each step into one slice per rank. Nothing is read.

A step takes the next world_size × batch_size positions of the epoch's permutation:

positions   0 1 2 3 4 5 6 7 8 9       n=10, batch_size=2, world_size=2
step 0      [0 1] [2 3]               rank 0, rank 1
step 1              [4 5] [6 7]
tail                      8 9         dropped with drop_last, otherwise a smaller last step
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
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


OPTIONAL = ("text_order", "step", "end", "skipped", "skip")  # older checkpoints have fewer of these


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
        ahead = batch - self.batch
        if self.step + ahead < self.end or not self.limit:  # its own steps may never reach its start
            return Position(self.start.epoch, self.start.index + ahead * self.steps.width)
        epochs, step = divmod(self.step + ahead - self.end, self.limit)
        return Position(self.start.epoch + 1 + epochs, step * self.steps.width)

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
        rest = self.rest(batch)
        updates = rest.step // accumulate - self.step // accumulate
        if later := rest.start.epoch - self.start.epoch:
            updates += -(-self.end // accumulate) + (later - 1) * -(-self.limit // accumulate)
        return updates

    def rest(self, batch: int) -> RunSegment:
        """The segment from batch `batch` on."""
        start = self.position(batch)
        end = self.end if start.epoch == self.start.epoch else self.limit
        step = batch - self.first_batch(start.epoch)
        return replace(self, batch=batch, start=start, step=step, end=end)

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
        newer = {name: values[name] for name in OPTIONAL if name in values}
        return cls(batch=values["batch"], start=start, steps=steps, limit=values["limit"], **newer)


def plan_segments(
    batch: int,
    start: Position,
    sizes: Sequence[tuple[int | None, Steps]],
    *,
    limit: int | float = 1.0,
    accumulate: int = 1,
    step: int = -1,
    text_order: bool = False,
    done: int = 0,
    missed: int = 0,
    skipped: int = 0,
) -> list[RunSegment]:
    """The segments of a run from batch `batch` on, which starts at `start`.

    `sizes`: the windows of all ranks before the next size, and the steps; the last one has no end. A
    size starts with the first optimizer step after these windows. They are counted from the first batch
    of the present optimizer step, which has `done` windows already. `step`, `skipped`: as in RunSegment.
    `missed`: batches of the first epoch that were skipped. `limit`, `accumulate`: the Trainer's
    limit_train_batches and accumulate_grad_batches.
    """
    segments: list[RunSegment] = []
    epoch, left = start.epoch, (start, step)

    def limit_of(epoch_: int) -> int | float:
        return limit - missed if isinstance(limit, int) and epoch_ == epoch else limit

    for windows, steps in sizes:
        if windows is not None and windows <= (done if segments else 0):
            continue
        if steps.remaining(left[0].index):
            start, step = left
        step = max(0, steps.done(start.index) - missed) if step < 0 else step
        end = max(step, steps.limited(limit_of(start.epoch), step, start.index))
        where: Any = {"batch": batch, "start": start, "step": step, "end": end, "skipped": skipped}
        segment = RunSegment(steps=steps, limit=steps.limited(limit), text_order=text_order, **where)
        segments.append(segment)
        if windows is None or not segment.limit:
            break
        batches = range(batch, batch + windows - done)  # a batch has at least one window
        batch += bisect_left(batches, windows - done, key=segment.windows_before)
        rest = segment.rest(batch)
        batch += min(rest.end, -(-rest.step // accumulate) * accumulate) - rest.step
        done, start = done + segment.windows_before(batch), segment.position(batch)
        step, last = batch - segment.first_batch(start.epoch), segment.position(batch - 1)
        left, taken = (start, step), batch - segment.first_batch(last.epoch)
        most = limit_of(last.epoch)
        is_over = start.epoch > last.epoch and not (isinstance(most, int) and taken >= most)
        if is_over and taken % accumulate == 0:  # a smaller batch may fit into the rest of the epoch
            left = Position(last.epoch, last.index + steps.width), taken
    return segments


def plan_run(
    batch: int,
    start: Position,
    sizes: Sequence[tuple[int | None, Steps]],
    *,
    skip: Sequence[Sequence[int]] = (),
    before: Sequence[RunSegment] = (),
    step: int = -1,
    accumulate: int = 1,
    **options: Any,
) -> list[RunSegment]:
    """The segments of a run after the segments `before`, as in `plan_segments`, and its gaps.

    `skip`: sorted ranges [begin, end) of batches that do not train, in the numbers of the run. Raises
    ValueError if an epoch has no other batches.
    """
    run, skipped = list(before), before[-1].skipped + before[-1].skip if before else 0
    for begin, end in skip:
        first, last = (trained_before(run, min(n, batch + skipped)) for n in (begin, end))
        if first < last:
            advice = f"resume from a checkpoint before batch {begin:,}, or leave out this range"
            raise ValueError(f"skip_steps [{begin:,}, {end:,}): the run has trained on it: {advice}")
    first = count_windows(run, batch)  # `sizes` count from here
    for pair in [*(pair for pair in skip if pair[1] > batch + skipped), None]:
        # an optimizer step continues after a gap, with the same batch size
        opened = batch - (step % accumulate if step > 0 and run and run[-1].skip else 0)
        windows = count_windows(run, opened)
        rest = [(size and size + first - windows, steps) for size, steps in sizes]
        options["missed"] = sum(gap.skipped_in(start.epoch) for gap in run if gap.skip)
        options["done"] = count_windows(run, batch) - windows
        planned = plan_segments(
            batch, start, rest, step=step, accumulate=accumulate, skipped=skipped, **options
        )
        if step == 0 and run and run[-1].skip and planned[-1].limit and not planned[0].end:
            raise ValueError(_no_batch_of(start.epoch, run[-1]))  # the rest is too small for a batch
        if pair is None or not planned[-1].limit:
            break
        begin, end = pair
        batch = max(begin - skipped, batch)
        at = [segment for segment in planned if segment.batch <= batch][-1].rest(batch)
        gap = replace(at, skip=end - skipped - batch)
        start, step = gap.position(batch + gap.skip), gap.step
        run += [segment for segment in planned if segment.batch < batch]
        if start.epoch > gap.start.epoch:
            empty = gap.start.epoch + (step > 0)
            if start.epoch > empty:
                raise ValueError(_no_batch_of(empty, gap))
            if step and planned[0].batch < batch:  # the gap ends the epoch
                if run[-1].start.epoch < gap.start.epoch:
                    run.append(run[-1].rest(batch - step))
                run[-1] = replace(run[-1], end=step)
            step = 0
        run.append(gap)
        skipped += gap.skip
    return [*run[len(before) :], *planned]


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
