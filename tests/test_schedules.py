"""The learning rate over tokens is one curve, however a run divides its tokens into steps."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import BatchSizeFinder, ModelCheckpoint

from lit_gptdata import EmbeddingStem, GPTDataModule, TokenBudget
from lit_gptdata.model.learning_rate import learning_rate_scale
from tests.runs import (
    LENGTH,
    VOCABULARY,
    StoppableGPT,
    make_data,
    make_model,
    make_trainer,
    opened,
    train,
    windows_of,
    write_sources,
    write_text,
)
from tests.test_resume import ranks_job, results, run_jobs, seen_by_all

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*exists and is not empty.*"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed.*"),
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


SCHEDULE = [{"tokens": 30 * STEP, "batch_size": 4}, {"batch_size": 8}]
SIZES = [  # change inside the first epoch, and inside the second one, where a batch of 16 ends it early
    {"tokens": 10 * STEP, "batch_size": 4},
    {"tokens": 32 * STEP, "batch_size": 8},
    {"batch_size": 16},
]


def test_a_batch_schedule_follows_the_curve_of_an_uninterrupted_run(half, tmp_path):
    ckpt, whole = half
    scheduled = fit(tmp_path, data={"batch_schedule": SCHEDULE})
    wide = fit(tmp_path, done=30 * STEP, ckpt_path=ckpt, data={"batch_size": 8})
    for curve in (whole, scheduled, wide):
        assert_on_the_curve(curve)
    assert scheduled.points == whole.points[:30] + wide.points
    assert scheduled.seen == whole.seen[:30] + wide.seen
    taken = list(itertools.chain(*whole.seen))
    assert list(itertools.chain(*scheduled.seen))[: 100 + 20] == taken[: 100 + 20]
    assert len(set(taken[:100])) == 100, "each window once in an epoch"


@pytest.mark.parametrize("drop_last", [True, False])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_batch_sizes_change_at_tokens_and_each_epoch_has_its_windows_once(
    tmp_path, accumulate, drop_last
):
    data = {"batch_schedule": SIZES, "drop_last": drop_last, "batch_size": 2}
    curve = fit(tmp_path, data=data, accumulate_grad_batches=accumulate, log_every_n_steps=1)
    assert_on_the_curve(curve, curve.data.tokens_at())
    assert [windows_of(curve.data.batch_at(i)[0]) for i in range(len(curve.seen))] == curve.seen
    first = next(i for i, batch in enumerate(curve.seen) if len(batch) == 8)
    second = next(i for i, batch in enumerate(curve.seen) if len(batch) == 16)
    group = STEP * accumulate
    assert 0 <= curve.data.tokens_at(first) - 10 * STEP < group
    assert 0 <= curve.data.tokens_at(second) - 42 * STEP < 2 * group
    length = curve.data._resume._segments[1].end  # batches of the first epoch
    taken = list(itertools.chain(*curve.seen[:length]))
    assert len(set(taken)) == len(taken) > 103 - 8
    assert drop_last or len(taken) == 103
    assert 0 <= TOTAL - curve.tokens < 4 * group


RUNS = {
    "steps": ({}, {"max_steps": 34, "val_check_interval": 5}),
    "epochs": ({"drop_last": False}, {"max_epochs": 3, "accumulate_grad_batches": 3}),
    "accumulation": ({}, {"max_epochs": 3, "accumulate_grad_batches": 2, "val_check_interval": 0.5}),
    "limit": ({"drop_last": False, "num_workers": 1}, {"max_steps": 34, "limit_train_batches": 11}),
}


@pytest.mark.parametrize("run", [pytest.param(run, marks=pytest.mark.heavy) for run in RUNS])
def test_every_checkpoint_of_a_batch_schedule_resumes_exactly(tmp_path, run):
    assert_resumes(tmp_path, *RUNS[run], stops=range(0, 99))


@pytest.mark.parametrize("stop", ["", "exception"])
def test_a_batch_schedule_resumes_next_to_a_change(tmp_path, stop):
    assert_resumes(tmp_path, *RUNS["accumulation"], stops=(8, 10, 12, 27), stop=stop)


@pytest.mark.heavy
def test_a_batch_schedule_and_stages_change_at_the_same_time(tmp_path):
    stages = [
        {"tokens": 10 * STEP, "weights": {"web": 1, "code": 0, "books": 0}},
        {"tokens": 20 * STEP, "weights": {"web": 0, "code": 1, "books": 0}},
        {"weights": {"web": 0, "code": 0, "books": 1}},
    ]
    data = {"corpus": write_sources(tmp_path), "stages": stages}
    whole = assert_resumes(tmp_path, data, {"max_steps": 34}, stops=range(0, 99, 3))
    windows = whole.data.train_windows
    of_web = [windows.locate(whole.data.windows_at(i))[0].tolist() for i in range(34)]
    assert of_web[:10] == [["web"] * 4] * 10
    assert of_web[10:20] == [["code"] * 8] * 10
    assert {*itertools.chain(*of_web[20:])} == {"books"}


def assert_resumes(folder, data, options, stops, stop=""):
    """Stop at each of these batches and resume there: the same windows, weights and validations."""
    options = {"data": {"batch_schedule": SIZES} | data} | options
    saves = {"dirpath": folder / "saved", "filename": "{step}", "every_n_train_steps": 1}
    whole, weights = train(folder, save=saves, **options)
    n = len(whole.seen)
    paths = {load_state(path)["batches"]: path for path in (folder / "saved").glob("*.ckpt")}
    skipped = {b for begin, end in options["data"].get("skip_steps", []) for b in range(begin, end)}
    numbers = [b for b in range(n + len(skipped)) if b not in skipped][:n]
    at = [windows_of(whole.data.batch_at(i)[0]) for i in numbers]
    assert at == whole.seen
    tried = 0
    for batch in stops:
        ckpt = paths.get(batch)
        if stop and batch < n:
            saves = {"dirpath": folder / str(batch), "save_on_exception": True, "every_n_epochs": 99}
            train(folder, save=saves, stop=stop, stop_at=batch, **options)
            (ckpt,) = (folder / str(batch)).glob("*.ckpt")
        if ckpt is None:
            continue
        tried += 1
        done = load_state(ckpt)["batches"]
        other = {"dirpath": folder / "other", "filename": "{step}", "every_n_train_steps": 99}
        resumed, same = train(folder, save=other, ckpt_path=ckpt, **options)
        assert resumed.seen == whole.seen[done:], batch
        assert all(torch.equal(same[name], weight) for name, weight in weights.items()), batch
        validations = len(whole.val_loss) - len(resumed.val_loss)
        assert resumed.validated_at == whole.validated_at[validations:], batch
        assert resumed.val_loss == whole.val_loss[validations:], batch
        loaded = opened(GPTDataModule.load_from_checkpoint(ckpt, weights_only=True))
        assert [windows_of(loaded.batch_at(i)[0]) for i in numbers] == at, batch
    assert tried >= 3
    return whole


def load_state(path: Path) -> dict[str, Any]:
    return torch.load(path, weights_only=True)["GPTDataModule"]


@pytest.mark.heavy
def test_ranks_share_the_batches_of_a_schedule(tmp_path):
    def halves(sizes):
        return [part | {"batch_size": part["batch_size"] // 2} for part in sizes]

    whole, _ = train(tmp_path, data={"batch_schedule": SIZES}, max_steps=34)
    save = {"dirpath": str(tmp_path / "ckpt"), "filename": "{step}", "every_n_train_steps": 5,
            "save_top_k": -1}  # fmt: skip
    ckpt = str(tmp_path / "ckpt" / "step=15.ckpt")
    two, one = {"batch_schedule": halves(SIZES)}, {"batch_schedule": SIZES}
    save.pop("save_top_k")
    jobs = [
        ranks_job(tmp_path, "whole", 2, 1, data=two, max_steps=34, save=save),
        ranks_job(tmp_path, "again", 2, 1, data=two, max_steps=34, ckpt_path=ckpt),
    ]
    assert run_jobs(jobs, tmp_path) == 0
    assert seen_by_all(results(tmp_path / "whole")) == whole.seen
    assert seen_by_all(results(tmp_path / "again")) == whole.seen[15:]
    alone, _ = train(tmp_path, data=one, max_steps=34, ckpt_path=ckpt)
    assert alone.seen == whole.seen[15:]


def test_another_schedule_continues_at_its_tokens(half, tmp_path):
    for tokens, sizes in ((12 * STEP, {16}), (40 * STEP, {4, 16})):
        data = {"batch_schedule": [{"tokens": tokens, "batch_size": 4}, {"batch_size": 16}]}
        curve = fit(tmp_path, done=30 * STEP, ckpt_path=half[0], data=data)
        curve.points = curve.points[1:]  # its rate is in the checkpoint
        assert_on_the_curve(curve, curve.data.tokens_at())
        assert {len(batch) for batch in curve.seen} == sizes
    fit(tmp_path, data={"batch_schedule": SIZES}, save=20)
    done = 30 * STEP
    curve = fit(tmp_path, done=done, ckpt_path=tmp_path / "step=20.ckpt", data={"batch_size": 6})
    assert {len(batch) for batch in curve.seen} == {6}, "without a schedule, batch_size counts"
    assert curve.data.tokens_at(20) == done


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ([{"tokens": 9}], r"batch_schedule\[0\] must have the keys tokens and batch_size, got"),
        ([{"tokens": 9, "batch_size": 2}], r"batch_schedule\[0\]\.tokens is 9, but only the last one"),
        ([{"batch_size": 2}, {"batch_size": 4}], r"\[0\]\.tokens is None, but only the last one"),
        ([{"batch_size": 0}], r"batch_schedule\[0\]\.batch_size must be an integer ≥ 1, got 0"),
        ({"batch_size": 2}, "batch_schedule must be a list of"),
    ],
)
def test_schedules_of_another_form_are_refused(tmp_path, schedule, message):
    with pytest.raises((TypeError, ValueError), match=message):
        make_data(tmp_path, batch_schedule=schedule)


def test_what_cannot_follow_a_batch_schedule_is_refused(tmp_path):
    data = {"batch_schedule": SIZES}
    with pytest.raises(ValueError, match=r"batch_schedule needs Trainer\.fit"):
        opened(make_data(tmp_path, **data)).train_dataloader()
    with pytest.raises(ValueError, match=r"as a number of batches, got the fraction 0\.5"):
        fit(tmp_path, None, data=data, max_epochs=1, limit_train_batches=0.5)
    with pytest.raises(ValueError, match=r"needs trainer\.overfit_batches as a number of batches"):
        fit(tmp_path, None, data=data, max_epochs=1, overfit_batches=0.5)
    with pytest.raises(ValueError, match="leave out BatchSizeFinder"):
        make_trainer(max_steps=1, callbacks=BatchSizeFinder()).fit(
            make_model(), datamodule=make_data(tmp_path, **data)
        )
    large = {"batch_schedule": [{"tokens": 9, "batch_size": 4}, {"batch_size": 999}]}
    with pytest.raises(ValueError, match=r"batch_size=999 .*leaves no batch"):
        fit(tmp_path, data=large)
    assert "4, then 8, then 16 windows" in repr(make_data(tmp_path, **data))


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


@pytest.mark.parametrize("warmup", [0.13, 0.24, 0.5, 3])
def test_warmup_steps_are_whole_steps_as_in_older_runs(tmp_path, warmup):
    model = {"warmup_tokens": None, "warmup_steps": warmup}
    curve = fit(tmp_path, 5 * STEP, model=model)
    steps = warmup if isinstance(warmup, int) else round(warmup * 5)
    rates = [learning_rate_scale(step, 5, steps, 0.1) for step in range(5)]
    assert [rate for _, rate, _ in curve.points] == rates


@pytest.mark.parametrize("data", [{"batch_size": 999}, {"batch_schedule": [{"batch_size": 999}]}])
def test_stages_whose_batches_are_too_large_name_the_batch_size(tmp_path, data):
    weights = {"web": 1, "code": 1, "books": 1}
    stages = [{"tokens": 99, "weights": weights}, {"weights": weights}]
    data = data | {"corpus": write_sources(tmp_path), "stages": stages}
    with pytest.raises(ValueError, match=r"batch_size=999 .*leaves no batch"):
        fit(tmp_path, data=data)
