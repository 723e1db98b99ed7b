"""Steps and run segments, compared with loops that take one step at a time."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lit_gptdata.tokens.options import read_skip_steps
from lit_gptdata.windows.sampler import epoch_parts
from lit_gptdata.windows.steps import (
    Position,
    RunSegment,
    Steps,
    count_updates,
    count_windows,
    epoch_batches,
    find_batch,
    number_after,
    plan_run,
    trained_before,
)

TAILS = ("drop", "share", "pad")

any_steps = st.builds(
    Steps,
    n=st.integers(0, 120),
    batch_size=st.integers(1, 9),
    world_size=st.integers(1, 5),
    tail=st.sampled_from(TAILS),
)


def found(segments, step: int, epoch: int | None = None) -> tuple[Steps, Position]:
    segment, position = find_batch(segments, step, epoch)
    return segment.steps, position


def starts(steps: Steps, index: int = 0) -> list[int]:
    """Where the steps of an epoch start, from position `index` on."""
    least = {"drop": steps.width, "share": steps.world_size, "pad": 1}[steps.tail]
    return list(range(index, steps.n - least + 1, steps.width))


def slices(steps: Steps, index: int) -> list[list[int]]:
    """The positions of each rank in the step that starts at position `index`."""
    return [list(range(*steps.rank_slice(index, rank))) for rank in range(steps.world_size)]


@given(any_steps, st.integers(0, 130))
def test_steps_done_and_remaining_make_an_epoch(steps, index):
    assert steps.remaining() == len(starts(steps))
    assert steps.remaining(index) == len(starts(steps, index))
    assert steps.done(index) + steps.remaining(index) == steps.remaining()
    for step, begin in enumerate(starts(steps)):
        assert steps.done(begin) == step


@given(any_steps, st.integers(0, 130))
def test_the_ranks_of_a_step_have_consecutive_positions(steps, start):
    for index in starts(steps, start):
        ranks = slices(steps, index)
        positions = list(itertools.chain(*ranks))
        assert positions == list(range(index, index + len(positions)))
        sizes = {len(rank) for rank in ranks}
        assert 1 <= min(sizes) <= max(sizes) <= steps.batch_size  # all have the same number of steps
        if steps.tail != "share" or steps.n - index >= steps.width:
            assert len(sizes) == 1
        else:
            assert max(sizes) - min(sizes) <= 1


@given(any_steps, st.integers(0, 130))
def test_an_epoch_takes_every_position_once_except_for_its_tail(steps, start):
    taken = [p for index in starts(steps, start) for rank in slices(steps, index) for p in rank]
    real = [p for p in taken if p < steps.n]
    assert real == list(range(start, start + len(real)))
    left_out = max(0, steps.n - start) - len(real)
    if steps.tail == "pad":
        assert left_out == 0
        assert len(taken) - len(real) < steps.world_size
        return
    assert taken == real
    if steps.tail == "drop":
        assert left_out == max(0, steps.n - start) % steps.width
    else:
        assert left_out < steps.world_size


@given(any_steps.filter(lambda steps: steps.tail == "drop"))
def test_many_ranks_see_what_one_rank_sees_with_an_equally_wide_batch(steps):
    one = replace(steps, batch_size=steps.width, world_size=1)
    assert starts(steps) == starts(one)
    for index in starts(one):
        assert list(itertools.chain(*slices(steps, index))) == slices(one, index)[0]


@pytest.mark.parametrize(
    ("tail", "last"),
    [("drop", [[4, 5], [6, 7]]), ("share", [[8], [9, 10]]), ("pad", [[8, 9], [10, 11]])],
)
def test_the_tail_of_eleven_windows(tail, last):
    steps = Steps(n=11, batch_size=2, world_size=2, tail=tail)
    assert steps.remaining() == (2 if tail == "drop" else 3)
    assert slices(steps, starts(steps)[-1]) == last


def walk(segment: RunSegment, n_batches: int) -> list[tuple[int, int, int]]:
    """(epoch, step of the epoch, index) of a segment's first batches, one after the other."""
    epoch, index = segment.start.epoch, segment.start.index
    step = len(starts(segment.steps)) - len(starts(segment.steps, index))
    walked = []
    while len(walked) < n_batches:
        if step >= segment.limit:
            epoch, step, index = epoch + 1, 0, 0
            continue
        walked.append((epoch, step, index))
        step, index = step + 1, index + segment.steps.width
    return walked


@st.composite
def any_segment(draw) -> RunSegment:
    steps = draw(any_steps.filter(lambda steps: steps.remaining()))
    limit = draw(st.integers(1, steps.remaining()))
    start = Position(draw(st.integers(0, 3)), draw(st.integers(0, steps.n)))
    return RunSegment(batch=draw(st.integers(0, 99)), start=start, steps=steps, limit=limit)


def is_within_its_limit(segment: RunSegment) -> bool:
    return segment.steps.done(segment.start.index) <= segment.limit


@given(any_segment().filter(is_within_its_limit), st.integers(1, 60))
@example(RunSegment(batch=7, start=Position(2, 7), steps=Steps(n=20, batch_size=3), limit=4), 9)
def test_the_position_of_a_batch_equals_that_of_a_walk(segment, n_batches):
    for batch, (epoch, _, index) in enumerate(walk(segment, n_batches), start=segment.batch):
        assert segment.position(batch) == Position(epoch, index)


@given(any_segment())
def test_a_segment_survives_as_json(segment):
    values = segment.as_dict()
    assert all(type(value) in (int, str, bool) for value in values.values())
    assert "n" not in values
    assert RunSegment.from_dict(json.loads(json.dumps(values)), segment.steps.n) == segment


def run_of(n: int, tail: str, parts: list[tuple[int, int, int, int]]):
    """Segments as resuming makes them, and (steps, epoch, step of the epoch, index) of every batch.

    `parts`: batch size, ranks, limit and number of batches of each segment. The last segment continues
    for at least an epoch.
    """
    segments: list[RunSegment] = []
    walked: list[tuple[Steps, int, int, int]] = []
    epoch, index = 0, 0
    for batch_size, world_size, limit, n_batches in parts:
        steps = Steps(n=n, batch_size=batch_size, world_size=world_size, tail=tail)
        limit = min(limit, steps.remaining())
        continues = steps.remaining(index) > 0
        start = Position(epoch, index) if continues else Position(epoch + 1, 0)
        if steps.done(start.index) < limit:
            segment = RunSegment(batch=len(walked), start=start, steps=steps, limit=limit)
            segments.append(segment)
            *taken, (epoch, _, index) = walk(segment, n_batches + 1)
            walked += [(steps, *at) for at in taken]
    segment, steps = segments[-1], segments[-1].steps
    n_batches = len(walked) - segment.batch + 2 * segment.limit
    walked[segment.batch :] = [(steps, *at) for at in walk(segment, n_batches)]
    return segments, walked


def runs():
    part = st.tuples(st.integers(1, 6), st.integers(1, 3), st.integers(1, 40), st.integers(1, 30))
    parts = st.lists(part, min_size=1, max_size=5)
    return st.builds(run_of, st.integers(18, 90), st.sampled_from(TAILS), parts)


def by_number(walked) -> dict[tuple[int, int], tuple[Steps, Position]]:
    """By (epoch, step of the epoch), as Lightning counts; the later one of two equal numbers."""
    return {(epoch, step): (steps, Position(epoch, index)) for steps, epoch, step, index in walked}


@settings(deadline=None)
@given(runs())
def test_every_batch_of_a_run_is_found(run):
    segments, walked = run
    for batch, (steps, epoch, _, index) in enumerate(walked):
        assert found(segments, batch) == (steps, Position(epoch, index))


@settings(deadline=None)
@given(runs())
def test_every_step_of_an_epoch_is_found_and_no_other(run):
    segments, walked = run
    expected = by_number(walked)
    last = max(step for _, step in expected)
    for epoch, step in itertools.product(range(walked[-1][1]), range(-1, last + 2)):
        if (epoch, step) in expected:
            assert found(segments, step, epoch) == expected[epoch, step]
        else:
            with pytest.raises(ValueError, match=rf"^step={step} of epoch {epoch} does not exist"):
                find_batch(segments, step, epoch)


@settings(deadline=None)
@given(runs(), st.integers(1, 5))
def test_windows_and_optimizer_steps_are_counted_batch_by_batch(run, accumulate):
    segments, walked = run
    windows = updates = 0
    for batch, (steps, _, step, index) in enumerate(walked):
        segment, _ = find_batch(segments, batch)
        if batch == segment.batch:  # gradients that wait when a run stops are lost
            updates = count_updates(segments, batch, accumulate)
        assert count_windows(segments, batch) == windows
        assert count_updates(segments, batch, accumulate) == updates
        windows += min(steps.width, steps.n - index)
        updates += (step + 1) % accumulate == 0 or step + 1 == segment.limit


def walk_schedule(n, tail, world_size, sizes, limit, accumulate, n_batches):
    """(steps, epoch, step of the epoch, index) of each batch: a step at a time, as Lightning counts."""
    walked, epoch, step, index, done = [], 0, 0, 0, 0
    while len(walked) < n_batches:
        if step % accumulate == 0:  # an optimizer step starts
            size = next(size for until, size in sizes if until is None or done < until)
        steps = Steps(n=n, batch_size=size, world_size=world_size, tail=tail)
        if (isinstance(limit, int) and step == limit) or not steps.remaining(index):
            epoch, step, index = epoch + 1, 0, 0
            continue
        walked.append((steps, epoch, step, index))
        done += min(steps.width, n - index)
        step, index = step + 1, index + steps.width
    return walked


@st.composite
def schedules(draw):
    """The arguments of `walk_schedule`, and the segments that are planned for them."""
    n, tail, world_size = (
        draw(st.integers(18, 60)),
        draw(st.sampled_from(TAILS)),
        draw(st.integers(1, 3)),
    )
    untils = sorted(draw(st.lists(st.integers(1, 250), max_size=4)))
    sizes = [(until, draw(st.integers(1, 6))) for until in [*untils, None]]
    limit, accumulate = draw(st.one_of(st.just(1.0), st.integers(1, 30))), draw(st.integers(1, 5))
    steps = Steps(n=n, batch_size=1, world_size=world_size, tail=tail)
    planned = [(until, replace(steps, batch_size=size)) for until, size in sizes]
    segments = plan_run(0, Position(0, 0), planned, limit=limit, accumulate=accumulate)
    arguments = (n, tail, world_size, sizes, limit, accumulate)
    return walk_schedule(*arguments, n_batches=150), segments, planned, limit, accumulate


@settings(deadline=None)
@given(schedules())
def test_a_schedule_of_batch_sizes_equals_a_walk(run):
    walked, segments, *_ = run
    windows = 0
    for batch, (steps, epoch, step, index) in enumerate(walked):
        assert found(segments, batch) == (steps, Position(epoch, index))
        assert found(segments, step, epoch) == (steps, Position(epoch, index))
        assert count_windows(segments, batch) == windows
        windows += min(steps.width, steps.n - index)
        begins = [
            (begin + i * each.width, each)
            for begin, each, number in epoch_parts(segments, Position(epoch, index))
            for i in range(number)
        ]
        rest = [(at, each) for each, e, _, at in walked[batch:] if e == epoch]
        assert begins[: len(rest)] == rest
    for epoch in range(walked[-1][1]):
        assert epoch_batches(segments, epoch) == sum(at == epoch for _, at, _, _ in walked)


@settings(deadline=None)
@given(schedules(), st.integers(0, 149))
def test_a_schedule_is_planned_again_from_its_last_segment(run, batch):
    _, segments, planned, limit, accumulate = run
    begun = [segment for segment in segments if segment.batch <= batch]
    last = begun[-1]
    done = count_windows(segments, last.batch)
    later = [(until if until is None else until - done, steps) for until, steps in planned]
    later = [(until, steps) for until, steps in later if until is None or until > 0]
    options = {"limit": limit, "accumulate": accumulate, "step": last.step}
    again = plan_run(last.batch, last.start, later, **options)
    assert [*begun[:-1], *again] == segments
    rest = [segment for segment in segments if segment.batch > batch]
    assert found([*begun[:-1], last.rest(batch), *rest], batch) == found(segments, batch)


def walk_with_gaps(n, tail, world_size, sizes, limit, accumulate, skip, n_batches):
    """(does it train, steps, epoch, index, step of the epoch as Lightning counts) of each batch.

    None if an epoch has no batch that trains.
    """
    walked, epoch, index, taken, done, steps = [], 0, 0, 0, 0, None
    step = 0  # batches of the epoch that train; `taken` also counts the others
    while len(walked) < n_batches or not step:
        trains = not any(begin <= len(walked) < end for begin, end in skip)
        if step % accumulate == 0 and (trains or not walked or walked[-1][0]):
            size = next(size for until, size in sizes if until is None or done < until)
            steps = Steps(n=n, batch_size=size, world_size=world_size, tail=tail)
        most = limit if isinstance(limit, int) else n
        if not (is_over := taken == most or not steps.remaining(index)):
            walked.append((trains, steps, epoch, index, step))
            done += trains * min(steps.width, steps.n - index)
            step, taken, index = step + trains, taken + 1, index + steps.width
            is_over = not trains and (taken == most or not steps.remaining(index))
        if is_over:
            if not step:
                return None
            epoch, index, step, taken = epoch + 1, 0, 0, 0
    return walked


@st.composite
def runs_with_gaps(draw):
    """The arguments of `walk_with_gaps`, and those of `plan_run`."""
    n, tail = draw(st.integers(18, 60)), draw(st.sampled_from(TAILS))
    untils = sorted(draw(st.lists(st.integers(1, 250), max_size=2)))
    sizes = [(until, draw(st.integers(1, 6))) for until in [*untils, None]]
    limit, accumulate = draw(st.one_of(st.just(1.0), st.integers(1, 30))), draw(st.integers(1, 5))
    ranges = draw(st.lists(st.tuples(st.integers(0, 80), st.integers(1, 12)), max_size=4))
    skip = read_skip_steps({"skip_steps": [[first, first + length] for first, length in ranges]})
    steps = Steps(n=n, batch_size=1, world_size=draw(st.integers(1, 3)), tail=tail)
    planned = [(until, replace(steps, batch_size=size)) for until, size in sizes]
    walk = walk_with_gaps(n, tail, steps.world_size, sizes, limit, accumulate, skip, n_batches=150)
    return walk, planned, {"limit": limit, "accumulate": accumulate, "skip": skip}


@settings(deadline=None)
@given(runs_with_gaps())
def test_a_run_with_gaps_equals_a_walk(run):
    walked, planned, options = run
    if walked is None:
        with pytest.raises(ValueError, match="leaves no batch"):
            plan_run(0, Position(0, 0), planned, **options)
        return
    segments = plan_run(0, Position(0, 0), planned, **options)
    lengths = Counter(epoch for trains, _, epoch, *_ in walked if trains)
    batches = windows = updates = 0
    for number, (trains, steps, epoch, index, step) in enumerate(walked):
        assert found(segments, number) == (steps, Position(epoch, index))
        assert trained_before(segments, number) == batches
        assert count_windows(segments, batches) == windows
        if not trains:
            continue
        if epoch < walked[-1][2]:
            assert count_updates(segments, batches, options["accumulate"]) == updates
        assert found(segments, step, epoch) == (steps, Position(epoch, index))
        batches += 1
        assert number_after(segments, batches) == number + 1
        windows += min(steps.width, steps.n - index)
        updates += (step + 1) % options["accumulate"] == 0 or step + 1 == lengths[epoch]
    for epoch in range(walked[-1][2]):
        assert epoch_batches(segments, epoch) == lengths[epoch]
        begins = [
            (begin + i * each.width, each)
            for begin, each, number in epoch_parts(segments, Position(epoch, 0))
            for i in range(number)
        ]
        trained = [(index, steps) for trains, steps, at, index, _ in walked if at == epoch and trains]
        assert begins[: len(trained)] == trained


@settings(deadline=None)
@given(runs_with_gaps(), st.integers(1, 120))
def test_a_run_with_gaps_is_planned_again_from_its_last_segment(run, batch):
    walked, planned, options = run
    if walked is None:
        return
    segments = plan_run(0, Position(0, 0), planned, **options)
    *before, last = [segment for segment in segments if segment.batch < batch]
    done = count_windows(segments, last.batch)
    later = [(until if until is None else until - done, steps) for until, steps in planned]
    again = plan_run(last.batch, last.start, later, step=last.step, before=before, **options)
    assert [*before, *again] == segments


def test_an_epoch_that_a_larger_size_ends_before_a_gap_has_fewer_batches():
    sizes = [(199, 10), (234, 4), (None, 12)]  # after step 8 of epoch 3, 12 windows do not fit
    planned = [(until, Steps(n=64, batch_size=size)) for until, size in sizes]
    segments = plan_run(0, Position(0, 0), planned, accumulate=3, skip=[[27, 30]])
    walked = walk_with_gaps(64, "drop", 1, sizes, 1.0, 3, [[27, 30]], n_batches=40)
    trained = Counter(epoch for trains, _, epoch, *_ in walked if trains)
    assert [epoch_batches(segments, epoch) for epoch in range(5)] == [trained[e] for e in range(5)]
    assert trained[3] == 9


def test_batch_size_and_ranks_change_in_the_middle_of_an_epoch():
    narrow, wide = Steps(n=40, batch_size=4), Steps(n=40, batch_size=2, world_size=4)
    first = RunSegment(batch=0, start=Position(0, 0), steps=narrow, limit=10)
    second = RunSegment(batch=3, start=Position(0, 12), steps=wide, limit=5)
    segments = [first, second]
    assert found(segments, 1) == found(segments, 1, epoch=0) == (narrow, Position(0, 4))
    assert found(segments, 2) == (narrow, Position(0, 8))
    assert found(segments, 3) == found(segments, 2, epoch=0) == (wide, Position(0, 12))
    assert found(segments, 5) == found(segments, 4, epoch=0) == (wide, Position(0, 28))
    assert found(segments, 6) == found(segments, 0, epoch=1) == (wide, Position(1, 0))


def test_of_two_steps_with_the_same_number_the_later_is_found():
    # 6 steps of 4 windows, then one of 16: it is step 1 of 2 wide ones, although 6 steps were done
    narrow, wide = Steps(n=40, batch_size=4), Steps(n=40, batch_size=16)
    first = RunSegment(batch=0, start=Position(0, 0), steps=narrow, limit=10)
    segments = [first, RunSegment(batch=6, start=Position(0, 24), steps=wide, limit=2)]
    assert found(segments, 0, epoch=0) == (narrow, Position(0, 0))
    assert found(segments, 5) == (narrow, Position(0, 20))
    assert found(segments, 6) == found(segments, 1, epoch=0) == (wide, Position(0, 24))
    assert found(segments, 5, epoch=0) == (narrow, Position(0, 20))


SEGMENT = RunSegment(batch=7, start=Position(2, 8), steps=Steps(n=20, batch_size=4), limit=4)


def test_steps_that_do_not_exist_are_refused():
    for batch, epoch, message in (
        (6, None, "^step=6 does not exist: the run starts with step 7, in epoch 2"),
        (-1, None, "^step=-1 does not exist"),
        (0, 1, "^step=0 of epoch 1 does not exist"),
        (4, 2, "^step=4 of epoch 2 does not exist: .* an epoch has 4 steps of batch_size=4 on 1 ranks$"),
        (4, 9, "^step=4 of epoch 9 does not exist"),
        (-1, 3, "^step=-1 of epoch 3 does not exist"),
        (1, 2, "^step=1 of epoch 2 does not exist"),
    ):
        with pytest.raises(ValueError, match=message):
            find_batch([SEGMENT], batch, epoch)


def test_a_run_without_steps_has_no_batch():
    steps = Steps(n=7, batch_size=8)
    segments = [RunSegment(batch=0, start=Position(0, 0), steps=steps, limit=steps.remaining())]
    with pytest.raises(ValueError, match=r"step=0 does not exist: .* an epoch has 0 steps"):
        find_batch(segments, 0)


def test_steps_that_the_next_segment_skips_are_refused():
    ten, six, two = (Steps(n=100, batch_size=size) for size in (10, 6, 2))
    start = RunSegment(batch=0, start=Position(0, 0), steps=ten, limit=10)
    # After 2 steps of 10 windows, the steps of 2 windows start with number 10. There is no step 2.
    segments = [start, RunSegment(batch=2, start=Position(0, 20), steps=two, limit=50)]
    with pytest.raises(ValueError, match="step=2 of epoch 0 does not exist"):
        find_batch(segments, 2, epoch=0)
    # A step of 6 windows does not fit after position 98, so epoch 1 starts. Epoch 0 ends with step 48.
    start = RunSegment(batch=0, start=Position(0, 0), steps=two, limit=50)
    segments = [start, RunSegment(batch=49, start=Position(1, 0), steps=six, limit=16)]
    with pytest.raises(ValueError, match="step=49 of epoch 0 does not exist"):
        find_batch(segments, 49, epoch=0)
