"""How an epoch is dealt out, against loops that take one step after the other."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lit_gptdata.windows.steps import Leg, Position, Steps, find

TAILS = ("drop", "share", "fill")

any_steps = st.builds(
    Steps,
    n=st.integers(0, 120),
    batch_size=st.integers(1, 9),
    world_size=st.integers(1, 5),
    tail=st.sampled_from(TAILS),
)


def begins(steps: Steps, index: int = 0) -> list[int]:
    """Where the steps of an epoch begin, from position `index` on."""
    least = {"drop": steps.width, "share": steps.world_size, "fill": 1}[steps.tail]
    found = []
    while steps.n - index >= least:
        found.append(index)
        index += steps.width
    return found


def dealt(steps: Steps, index: int) -> list[list[int]]:
    """The positions that each rank has in the step that begins at position `index`."""
    return [list(range(*steps.share(index, rank))) for rank in range(steps.world_size)]


# An epoch -------------------------------------------------------------------------------------


@given(any_steps, st.integers(0, 130))
def test_the_steps_left_and_those_before_make_an_epoch(steps, index):
    assert steps.left() == len(begins(steps))
    assert steps.left(index) == len(begins(steps, index))
    assert steps.before(index) + steps.left(index) == steps.left()
    for step, begin in enumerate(begins(steps)):
        assert steps.before(begin) == step


@given(any_steps, st.integers(0, 130))
def test_the_ranks_of_a_step_have_consecutive_positions(steps, start):
    for index in begins(steps, start):
        ranks = dealt(steps, index)
        positions = [*itertools.chain(*ranks)]
        assert positions == list(range(index, index + len(positions)))
        assert all(1 <= len(rank) <= steps.batch_size for rank in ranks)  # so all have as many steps
        if steps.tail != "share" or steps.n - index >= steps.width:
            assert len({len(rank) for rank in ranks}) == 1
        else:
            assert max(map(len, ranks)) - min(map(len, ranks)) <= 1


@given(any_steps, st.integers(0, 130))
def test_an_epoch_takes_every_position_once_but_for_its_tail(steps, start):
    taken = [p for index in begins(steps, start) for rank in dealt(steps, index) for p in rank]
    real = [p for p in taken if p < steps.n]
    assert real == list(range(start, start + len(real)))
    left_out = max(0, steps.n - start) - len(real)
    if steps.tail == "fill":
        assert left_out == 0
        assert len(taken) - len(real) < steps.world_size
    else:
        assert taken == real
        if steps.tail == "drop":
            assert left_out == max(0, steps.n - start) % steps.width
        else:
            assert left_out < steps.world_size


@given(any_steps.filter(lambda steps: steps.tail == "drop"))
def test_many_ranks_see_what_one_sees_with_as_wide_a_batch(steps):
    one = replace(steps, batch_size=steps.width, world_size=1)
    assert begins(steps) == begins(one)
    for index in begins(one):
        assert [*itertools.chain(*dealt(steps, index))] == dealt(one, index)[0]


def test_two_ranks_of_four_see_what_one_of_eight_sees():
    two, one = Steps(n=50, batch_size=4, world_size=2), Steps(n=50, batch_size=8)
    assert two.left() == one.left() == 6
    for index in range(0, 48, 8):
        first, second = dealt(two, index)
        assert [first + second] == dealt(one, index)


@pytest.mark.parametrize(
    ("tail", "last"),
    [("drop", [[4, 5], [6, 7]]), ("share", [[8], [9, 10]]), ("fill", [[8, 9], [10, 11]])],
)
def test_the_tail_of_eleven_windows(tail, last):
    steps = Steps(n=11, batch_size=2, world_size=2, tail=tail)
    assert steps.left() == (2 if tail == "drop" else 3)
    assert dealt(steps, begins(steps)[-1]) == last


# Legs -----------------------------------------------------------------------------------------


def walk(leg: Leg, n_batches: int) -> list[tuple[int, int, int]]:
    """(epoch, step of the epoch, index) of a leg's first batches, one after the other."""
    epoch, index = leg.start.epoch, leg.start.index
    step = len(begins(leg.steps)) - len(begins(leg.steps, index))
    walked = []
    while len(walked) < n_batches:
        if step >= leg.limit:
            epoch, step, index = epoch + 1, 0, 0
            continue
        walked.append((epoch, step, index))
        step, index = step + 1, index + leg.steps.width
    return walked


@st.composite
def any_leg(draw) -> Leg:
    steps = draw(any_steps.filter(lambda steps: steps.left()))
    limit = draw(st.integers(1, steps.left()))
    start = Position(draw(st.integers(0, 3)), draw(st.integers(0, steps.n)))
    return Leg(batch=draw(st.integers(0, 99)), start=start, steps=steps, limit=limit)


def is_within_its_limit(leg: Leg) -> bool:
    return leg.steps.before(leg.start.index) <= leg.limit


@given(any_leg().filter(is_within_its_limit), st.integers(1, 60))
@example(Leg(batch=7, start=Position(2, 7), steps=Steps(n=20, batch_size=3), limit=4), 9)
def test_a_leg_is_at_the_position_that_a_walk_comes_to(leg, n_batches):
    for batch, (epoch, _, index) in enumerate(walk(leg, n_batches), start=leg.batch):
        assert leg.position(batch) == Position(epoch, index)


@given(any_leg())
def test_a_leg_survives_as_json(leg):
    values = leg.as_dict()
    assert all(type(value) in (int, str) for value in values.values())
    assert "n" not in values
    assert Leg.from_dict(json.loads(json.dumps(values)), leg.steps.n) == leg


# Runs of several legs -------------------------------------------------------------------------


def run_of(n: int, tail: str, parts: list[tuple[int, int, int, int]]):
    """Legs as resuming makes them, and (steps, epoch, step of the epoch, index) of every batch.

    `parts`: batch size, ranks, limit and batches of each leg; the last goes on for an epoch or more.
    """
    legs: list[Leg] = []
    walked: list[tuple[Steps, int, int, int]] = []
    epoch, index = 0, 0
    for batch_size, world_size, limit, n_batches in parts:
        steps = Steps(n=n, batch_size=batch_size, world_size=world_size, tail=tail)
        limit = min(limit, steps.left())
        goes_on = steps.left(index) > 0
        start = Position(epoch, index) if goes_on else Position(epoch + 1, 0)
        if steps.before(start.index) < limit:
            leg = Leg(batch=len(walked), start=start, steps=steps, limit=limit)
            legs.append(leg)
            *taken, (epoch, _, index) = walk(leg, n_batches + 1)
            walked += [(steps, *at) for at in taken]
    leg, steps = legs[-1], legs[-1].steps
    walked[leg.batch :] = [(steps, *at) for at in walk(leg, len(walked) - leg.batch + 2 * leg.limit)]
    return legs, walked


def runs():
    part = st.tuples(st.integers(1, 6), st.integers(1, 3), st.integers(1, 40), st.integers(1, 30))
    parts = st.lists(part, min_size=1, max_size=5)
    return st.builds(run_of, st.integers(18, 90), st.sampled_from(TAILS), parts)


def by_number(walked) -> dict[tuple[int, int], tuple[Steps, Position]]:
    """By (epoch, step of the epoch), as Lightning counts; of two with the same numbers the later."""
    return {(epoch, step): (steps, Position(epoch, index)) for steps, epoch, step, index in walked}


@settings(deadline=None)
@given(runs())
def test_a_batch_is_found_where_the_run_had_it(run):
    legs, walked = run
    for batch, (steps, epoch, _, index) in enumerate(walked):
        assert find(legs, batch) == (steps, Position(epoch, index))


@settings(deadline=None)
@given(runs())
def test_the_steps_of_an_epoch_are_those_that_the_run_had(run):
    legs, walked = run
    expected = by_number(walked)
    last = max(step for _, step in expected)
    for epoch, step in itertools.product(range(walked[-1][1]), range(-1, last + 2)):
        if (epoch, step) in expected:
            assert find(legs, step, epoch) == expected[epoch, step]
        else:
            with pytest.raises(ValueError, match=rf"^step={step} of epoch {epoch} does not exist"):
                find(legs, step, epoch)


def test_batch_size_and_ranks_change_in_the_middle_of_an_epoch():
    narrow, wide = Steps(n=40, batch_size=4), Steps(n=40, batch_size=2, world_size=4)
    first = Leg(batch=0, start=Position(0, 0), steps=narrow, limit=10)
    second = Leg(batch=3, start=Position(0, 12), steps=wide, limit=5)
    legs = [first, second]
    assert find(legs, 1) == find(legs, 1, epoch=0) == (narrow, Position(0, 4))
    assert find(legs, 2) == (narrow, Position(0, 8))
    assert find(legs, 3) == find(legs, 2, epoch=0) == (wide, Position(0, 12))
    assert find(legs, 5) == find(legs, 4, epoch=0) == (wide, Position(0, 28))
    assert find(legs, 6) == find(legs, 0, epoch=1) == (wide, Position(1, 0))


def test_of_two_steps_with_the_same_number_the_later_is_found():
    # 6 steps of 4 windows, then one of 16: step 1 of now 2, though 6 had been counted
    narrow, wide = Steps(n=40, batch_size=4), Steps(n=40, batch_size=16)
    legs = [
        Leg(batch=0, start=Position(0, 0), steps=narrow, limit=10),
        Leg(batch=6, start=Position(0, 24), steps=wide, limit=2),
    ]
    assert find(legs, 0, epoch=0) == (narrow, Position(0, 0))
    assert find(legs, 5) == (narrow, Position(0, 20))
    assert find(legs, 6) == find(legs, 1, epoch=0) == (wide, Position(0, 24))
    assert find(legs, 5, epoch=0) == (narrow, Position(0, 20))


LEG = Leg(batch=7, start=Position(2, 8), steps=Steps(n=20, batch_size=4), limit=4)


@pytest.mark.parametrize(
    ("batch", "epoch", "message"),
    [
        (6, None, "^step=6 does not exist: the run begins with step 7, in epoch 2"),
        (-1, None, "^step=-1 does not exist"),
        (0, 1, "^step=0 of epoch 1 does not exist"),
        (4, 2, "^step=4 of epoch 2 does not exist: .* an epoch has 4 steps of batch_size=4 on 1 ranks$"),
        (4, 9, "^step=4 of epoch 9 does not exist"),
        (-1, 3, "^step=-1 of epoch 3 does not exist"),
        (1, 2, "^step=1 of epoch 2 does not exist"),
    ],
)
def test_what_does_not_exist_is_refused(batch, epoch, message):
    with pytest.raises(ValueError, match=message):
        find([LEG], batch, epoch)


def test_a_run_without_steps_has_no_batch():
    steps = Steps(n=7, batch_size=8)
    legs = [Leg(batch=0, start=Position(0, 0), steps=steps, limit=steps.left())]
    with pytest.raises(ValueError, match=r"step=0 does not exist: .* an epoch has 0 steps"):
        find(legs, 0)


def test_a_step_that_the_next_leg_counts_as_done_is_refused():
    # 2 steps of 10 windows, then steps of 2 windows, of which 10 count as done: there is no step 2
    ten, two = Steps(n=100, batch_size=10), Steps(n=100, batch_size=2)
    legs = [
        Leg(batch=0, start=Position(0, 0), steps=ten, limit=10),
        Leg(batch=2, start=Position(0, 20), steps=two, limit=50),
    ]
    with pytest.raises(ValueError, match="step=2 of epoch 0 does not exist"):
        find(legs, 2, epoch=0)


def test_the_rest_of_an_epoch_that_the_next_leg_does_not_finish_is_refused():
    # steps of 2 windows up to position 16, then one rank's step of 6 does not fit: epoch 1 begins
    legs = [
        Leg(batch=0, start=Position(0, 0), steps=Steps(n=20, batch_size=2), limit=10),
        Leg(batch=8, start=Position(1, 0), steps=Steps(n=20, batch_size=6), limit=3),
    ]
    with pytest.raises(ValueError, match="step=8 of epoch 0 does not exist"):
        find(legs, 8, epoch=0)
