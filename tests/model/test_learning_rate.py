import math

import lightning as L
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lit_gptdata.model.learning_rate import learning_rate_scale, make_schedule
from tests.model.small_gpt import SmallData, make_gpt
from tests.runs import make_trainer

pytestmark = pytest.mark.usefixtures("one_thread")


def test_the_learning_rate_warms_up_and_then_falls():
    scales = [learning_rate_scale(step, 104, 4, 0.1) for step in range(110)]
    assert scales[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert scales[54] == pytest.approx((1 + 0.1) / 2)  # half of the cosine
    assert scales[29] == pytest.approx(0.1 + 0.9 * (1 + math.sqrt(0.5)) / 2)  # a quarter of it
    assert scales[104:] == pytest.approx([0.1] * 6)
    assert scales[4:105] == sorted(scales[4:105], reverse=True)
    for unknown in (math.inf, -1, 0):
        assert learning_rate_scale(3, unknown, 4, 0.1) == 0.8
        assert learning_rate_scale(10**6, unknown, 4, 0.1) == 1
    assert learning_rate_scale(0, 10, 0, 0.1) == 1
    assert learning_rate_scale(5, 10, 20, 0.1) == 6 / 21  # the run ends during the warm-up
    assert learning_rate_scale(20, 10, 20, 0.1) == pytest.approx(1)


@given(st.integers(0, 99), st.integers(1, 99), st.integers(0, 40), st.floats(0, 1))
def test_warmup_stable_decay_is_a_trapezoid(warmup, decay, stable, ratio):
    total = warmup + stable + decay
    tokens = range(warmup, total + 9)
    scales = [learning_rate_scale(t, total, warmup, ratio, decay=decay) for t in tokens]
    corners = [warmup + stable, total]
    assert scales == pytest.approx(np.interp(tokens, corners, [1, ratio]).tolist())


def test_a_decay_that_is_longer_than_the_run_starts_after_the_warmup():
    assert learning_rate_scale(4, 10, 4, 0.1, decay=99) == 1
    assert learning_rate_scale(7, 10, 4, 0.1, decay=99) == pytest.approx(0.55)
    assert learning_rate_scale(10**9, math.inf, 4, 0.1, decay=None) == 1
    assert learning_rate_scale(9, 10, 4, 0.1, decay=0) == 1


@given(st.integers(1, 50), st.integers(0, 60), st.integers(1, 500))
def test_equal_steps_give_the_same_factors_in_tokens_and_in_steps(total, warmup, own):
    for decay in (None, total // 5):
        in_steps = [learning_rate_scale(s, total, warmup, 0.1, decay=decay) for s in range(total)]
        scaled = None if decay is None else decay * own
        args = (total * own, warmup * own, 0.1)
        in_tokens = [learning_rate_scale(s * own, *args, own=own, decay=scaled) for s in range(total)]
        assert in_tokens == in_steps, "bit for bit"


class LearningRates(L.Callback):
    def __init__(self) -> None:
        self.rates: list[float] = []

    def on_before_optimizer_step(self, trainer, module, optimizer) -> None:
        self.rates.append(optimizer.param_groups[0]["lr"])


@pytest.mark.parametrize(
    ("max_steps", "max_epochs", "total"), [(4, None, 4), (-1, 1, 10), (5, -1, 5), (30, 1, 10)]
)
def test_each_step_uses_the_scheduled_learning_rate(max_steps, max_epochs, total):
    seen = LearningRates()
    limits = {"max_steps": max_steps, "max_epochs": max_epochs, "limit_val_batches": 0}
    model = make_gpt(learning_rate=0.5, warmup_steps=3, min_learning_rate_ratio=0.2)
    make_trainer(callbacks=[seen], **limits).fit(model, SmallData())
    assert seen.rates == [0.5 * learning_rate_scale(i, total, 3, 0.2) for i in range(total)]


@pytest.mark.parametrize(("warmup_steps", "expected"), [(0.25, 3), (3, 3), (0.0, 0)])
def test_warmup_steps_are_a_number_or_a_fraction_of_all_steps(warmup_steps, expected):
    trainer = make_trainer(max_steps=12)
    trainer.fit(make_gpt(warmup_steps=warmup_steps), SmallData())
    scale = trainer.lr_scheduler_configs[0].scheduler.lr_lambdas[0]
    steps = range(12)
    assert [scale(i) for i in steps] == [learning_rate_scale(i, 12, expected, 0.1) for i in steps]


def test_a_fraction_of_an_unlimited_run_is_rejected():
    trainer = make_trainer(max_steps=-1, max_epochs=-1)
    with pytest.raises(ValueError, match=r"warmup_steps=0\.1 is a fraction .* give an integer"):
        trainer.fit(make_gpt(warmup_steps=0.1), SmallData())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"warmup_tokens": 99}, "warmup_tokens=99, but the data module does not count tokens: give a"),
        ({"schedule": "warmup-stable-decay", "decay_tokens": 9}, "decay_tokens=9, but the data"),
        ({"warmup_tokens": 9, "warmup_steps": 9}, "give either warmup_tokens or warmup_steps"),
    ],
)
def test_schedules_that_cannot_work_are_rejected(options, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(max_steps=2).fit(make_gpt(**options), SmallData())


def test_a_constant_rate_needs_no_end():
    class Trainer:
        global_step, estimated_stepping_batches, datamodule = 0, math.inf, None

    options = {"warmup_steps": 2, "warmup_tokens": None, "min_learning_rate_ratio": 0.1}
    decay = {"schedule": "warmup-stable-decay", "decay_tokens": 0.2}
    scale = make_schedule(options | decay, Trainer())
    assert [scale(step) for step in (0, 2, 10**9)] == [1 / 3, 1, 1]
