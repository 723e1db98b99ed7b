"""The learning rate over tokens is one curve, however a run divides its tokens into steps."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import lightning as L
import pytest
from lightning.pytorch.callbacks import ModelCheckpoint

from lit_gptdata import EmbeddingStem, TokenBudget
from lit_gptdata.model.learning_rate import learning_rate_scale
from tests.runs import LENGTH, VOCABULARY, StoppableGPT, make_data, make_trainer, windows_of, write_text

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*exists and is not empty.*"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks.*"),
]

STEP = 4 * LENGTH  # tokens of a step of 4 windows
TOTAL = 60 * STEP  # more than two epochs of 25 steps


class Curve(L.Callback):
    """Records the windows, and of each optimizer step the tokens before, the rate, and tokens after."""

    def __init__(self, tokens: int = 0) -> None:
        self.tokens = self.stepped = tokens
        self.points: list[tuple[int, float, int]] = []
        self.seen: list[list[int]] = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        self.tokens += batch[0].numel()
        self.seen.append(windows_of(batch[0]))

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        self.points.append((self.stepped, optimizer.param_groups[0]["lr"], self.tokens))
        self.stepped = self.tokens


def fit(folder: Path, tokens: int | None = TOTAL, *, done: int = 0, ckpt_path: Path | None = None,
        save: int = 0, data: dict[str, Any] | None = None, model: dict[str, Any] | None = None,
        **options: Any) -> Curve:  # fmt: skip
    """Train for `tokens` tokens; `done` of them are in the checkpoint."""
    stem = EmbeddingStem(vocab_size=VOCABULARY, max_length=LENGTH, embedding_dim=8)
    schedule = {"learning_rate": 1.0, "warmup_tokens": 0.1} | (model or {})
    module = StoppableGPT(stem, n_layers=0, **schedule)
    curve = Curve(done)
    callbacks: list[L.Callback] = [curve, TokenBudget(tokens)]
    if save:
        callbacks.append(ModelCheckpoint(folder, "{step}", every_n_train_steps=save, save_top_k=-1))
    limits = {"max_epochs": -1, "limit_val_batches": 0, "enable_checkpointing": bool(save)}
    trainer = make_trainer(callbacks=callbacks, **limits | options)
    curve.data = make_data(folder, **(data or {}))
    trainer.fit(module, datamodule=curve.data, ckpt_path=ckpt_path, weights_only=True)
    curve.trainer = trainer
    return curve


def assert_on_the_curve(curve: Curve, total: int = TOTAL) -> None:
    """Each rate is on the curve at the tokens before the step; `total`: the tokens of the run."""
    warmup = round(0.1 * total)
    rates = [learning_rate_scale(a, total, warmup, 0.1, own=b - a) for a, _, b in curve.points]
    assert [rate for _, rate, _ in curve.points] == rates
    assert curve.tokens == total
    for before, _, after in curve.points:
        assert before < after


@pytest.fixture(scope="module")
def half(tmp_path_factory) -> tuple[Path, Curve]:
    """The checkpoint of a run of 60 steps at its step 30, and its curve."""
    folder = tmp_path_factory.mktemp("half")
    return folder / "step=30.ckpt", fit(folder, save=30)


def test_the_rate_of_a_run_that_continues_with_batch_8_stays_on_its_curve(half, tmp_path):
    ckpt, whole = half
    assert_on_the_curve(whole)
    wide = fit(tmp_path, done=30 * STEP, ckpt_path=ckpt, data={"batch_size": 8})
    assert_on_the_curve(wide)
    assert len(wide.points) == 15
    assert wide.points[0][1] == whole.points[30][1]


# 3 divides neither the 5 batches that the epoch has done nor its 25: its last steps have one batch
@pytest.mark.parametrize(("accumulate", "steps"), [(2, 16), (3, 11)])
def test_the_rate_stays_on_its_curve_when_accumulation_changes(half, tmp_path, accumulate, steps):
    total = TOTAL - (STEP if accumulate == 3 else 0)  # the budget is rounded down to whole steps
    curve = fit(tmp_path, done=30 * STEP, ckpt_path=half[0], accumulate_grad_batches=accumulate)
    assert len(curve.points) == steps
    assert curve.points[0][1] == half[1].points[30][1]
    curve.points = curve.points[1:]  # its rate is in the checkpoint
    assert_on_the_curve(curve, total)


@pytest.mark.parametrize("drop_last", [True, False])
@pytest.mark.parametrize("accumulate", [1, 4])
def test_tokens_at_counts_the_tokens_of_batches_and_of_steps(tmp_path, drop_last, accumulate):
    data = {"drop_last": drop_last, "batch_size": 5}
    curve = fit(tmp_path, data=data, accumulate_grad_batches=accumulate)
    tokens = [0, *accumulate_tokens(curve.seen)]
    assert [curve.data.tokens_at(batch) for batch in range(len(tokens))] == tokens
    ends = [0, *(after for _, _, after in curve.points)]
    assert [curve.data.tokens_at(step=step) for step in range(len(ends))] == ends
    assert curve.data.tokens_at() == ends[-1]


def accumulate_tokens(seen: list[list[int]]) -> list[int]:
    return list(itertools.accumulate(len(batch) * LENGTH for batch in seen))


def test_a_limit_of_epochs_ends_the_curve(tmp_path):
    data = {"drop_last": False}
    curve = fit(tmp_path, None, data=data, max_epochs=2, model={"schedule": "warmup-stable-decay"})
    total = 2 * 103 * LENGTH
    assert curve.data.tokens_at() == total == curve.tokens
    rates = [
        learning_rate_scale(a, total, round(0.1 * total), 0.1, own=b - a, decay=round(0.2 * total))
        for a, _, b in curve.points
    ]
    assert [rate for _, rate, _ in curve.points] == rates
    unlimited = fit(tmp_path, None, max_time={"seconds": 0}, model={"warmup_tokens": 99})
    assert unlimited.data.tokens_at() == math.inf


def test_a_longer_second_run_decays_from_where_the_first_was_constant(half, tmp_path):
    trapezoid = {"schedule": "warmup-stable-decay", "warmup_tokens": 6 * STEP, "decay_tokens": 10 * STEP}
    fit(tmp_path, save=40, model=trapezoid)
    longer = fit(
        tmp_path, 2 * TOTAL, done=40 * STEP, ckpt_path=tmp_path / "step=40.ckpt", model=trapezoid
    )
    rates = [rate for _, rate, _ in longer.points]
    assert rates[:71] == [1.0] * 71
    assert rates[71:] == pytest.approx([1 - 0.09 * i for i in range(1, 10)])


def test_steps_of_the_warmup_have_the_tokens_of_the_run(tmp_path):
    curve = fit(tmp_path, 20 * STEP, model={"warmup_tokens": None, "warmup_steps": 3})
    rates = [learning_rate_scale(i, 20, 3, 0.1) for i in range(20)]
    assert [rate for _, rate, _ in curve.points] == rates, "as a schedule in steps"


def test_new_data_continues_the_curve_and_the_count(tmp_path):
    fit(tmp_path, save=30)
    other = tmp_path / "other.txt"
    other.write_text(write_text(tmp_path).read_text()[: -9 * LENGTH])
    data = {"corpus": str(other), "on_change": "continue", "batch_size": 6}
    curve = fit(tmp_path, done=30 * STEP, ckpt_path=tmp_path / "step=30.ckpt", data=data)
    assert_on_the_curve(curve)
    assert curve.data.tokens_at(30) == 30 * STEP
    assert curve.data.tokens_at(31) == 30 * STEP + 6 * LENGTH
    assert curve.data.tokens_at(7) == 7 * STEP


def test_a_second_fit_of_a_trainer_continues_the_curve(tmp_path):
    curve = fit(tmp_path, None, max_steps=20)
    trainer, model = curve.trainer, curve.trainer.lightning_module
    trainer.fit_loop.epoch_loop.max_steps = 30
    curve.points = []
    trainer.fit(model, datamodule=curve.data)
    total = 30 * STEP
    assert [rate for _, rate, _ in curve.points] == [
        learning_rate_scale(i * STEP, total, round(0.1 * total), 0.1, own=STEP) for i in range(20, 30)
    ]
