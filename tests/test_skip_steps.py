"""Batches of `skip_steps` do not train, and all others are what they are without it."""

from __future__ import annotations

import functools
import itertools
import json
import logging
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import BatchSizeFinder
from torch.utils.data import DataLoader

from lit_gptdata import GPTDataModule
from lit_gptdata.cli.show import seen
from lit_gptdata.tokens.options import read_skip_steps
from tests.runs import (
    LENGTH,
    Watch,
    make_data,
    make_model,
    make_trainer,
    opened,
    train,
    windows_of,
    write_sources,
)
from tests.test_resume import ranks_job, results, run_jobs, seen_by_all
from tests.test_schedules import SIZES, STEP, assert_on_the_curve, assert_resumes, fit, load_state

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*exists and is not empty.*"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed.*"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks.*"),
]

SKIP = [[3, 5], [10, 12], [22, 28], [40, 41]]  # [22, 28) has the end of an epoch of 25 batches


def numbers(skip: list[list[int]], n_batches: int) -> list[int]:
    """The numbers of the first `n_batches` batches that train."""
    skipped = set(itertools.chain(*(range(*pair) for pair in skip)))
    return [b for b in range(n_batches + len(skipped)) if b not in skipped][:n_batches]


def text_of(data: GPTDataModule, n: int) -> list[list[int]]:
    """The windows of batches 0 to n - 1 of the run."""
    return [windows_of(data.batch_at(number)[0]) for number in range(n)]


RUNS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "steps": ({}, {"max_steps": 34, "val_check_interval": 5}),
    "epochs": ({"drop_last": False}, {"max_epochs": 3, "val_check_interval": 0.5}),
    "accumulation": ({}, {"max_epochs": 3, "accumulate_grad_batches": 4}),
    "limit": ({"num_workers": 1}, {"max_steps": 30, "limit_train_batches": 11}),
}


@pytest.mark.parametrize(
    "run", ["limit", *(pytest.param(run, marks=pytest.mark.heavy) for run in RUNS if run != "limit")]
)
def test_a_run_trains_on_the_batches_that_are_not_skipped(tmp_path, run):
    data, options = RUNS[run]
    watch, _ = train(tmp_path, data={"skip_steps": SKIP} | data, **options)
    without, _ = train(tmp_path, data=data, **options | {"limit_val_batches": 0})
    trained = numbers(SKIP, len(watch.seen))
    text = text_of(without.data, trained[-1] + 1)
    assert watch.seen == [text[number] for number in trained]
    assert text_of(watch.data, len(text)) == text
    tokens = [len(text[number]) * LENGTH for number in trained]
    for n, number in enumerate(trained):
        assert watch.data.tokens_at(number) == sum(tokens[:n])
    assert watch.data.tokens_at() == sum(tokens)


@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")
@pytest.mark.parametrize("accumulate", [1, 4])
def test_losses_and_rates_are_those_of_a_run_on_the_other_batches(tmp_path, accumulate):
    options = {
        "max_steps": 20 // accumulate,
        "accumulate_grad_batches": accumulate,
        "limit_val_batches": 0,
    }
    skip = SKIP[:2]
    watch, weights = train(tmp_path, data={"skip_steps": skip}, dropout=0.0, **options)
    data = opened(make_data(tmp_path))
    batches = [data.batch_at(number) for number in numbers(skip, 20)]
    model, other = make_model(dropout=0.0), Watch(data)
    trainer = make_trainer(callbacks=[other], num_sanity_val_steps=0, **options)
    trainer.fit(model, DataLoader(batches, batch_size=None))
    assert other.seen == watch.seen
    assert other.train_loss == watch.train_loss
    assert all(torch.equal(weights[name], weight) for name, weight in model.state_dict().items())


@pytest.mark.parametrize("data", [{}, {"batch_schedule": SIZES}])
def test_the_budget_and_the_schedule_are_those_of_a_run_without_skips(tmp_path, data):
    without = fit(tmp_path, data=data)
    curve = fit(tmp_path, data={"skip_steps": SKIP[:2]} | data)
    assert_on_the_curve(curve, curve.data.tokens_at())
    if not data:
        assert curve.points == without.points
    assert [len(batch) for batch in curve.seen[:23]] == [len(batch) for batch in without.seen[:23]]


@pytest.mark.parametrize("run", [pytest.param(run, marks=pytest.mark.heavy) for run in RUNS])
def test_every_checkpoint_of_a_run_with_skips_resumes_exactly(tmp_path, run):
    data, options = RUNS[run]
    assert_resumes(tmp_path, {"batch_schedule": None, "skip_steps": SKIP} | data, options, range(99))


@pytest.mark.heavy
@pytest.mark.parametrize("stop", ["", "exception"])
def test_a_run_resumes_next_to_skipped_batches(tmp_path, stop):
    data, options = RUNS["accumulation"]
    data = {"batch_schedule": SIZES, "skip_steps": SKIP} | data
    assert_resumes(tmp_path, data, options, stops=(4, 8, 12, 18), stop=stop)


N_BATCHES = 40  # of these runs


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Callable[..., Path]:
    """The checkpoint after an optimizer step of a run without skips."""

    @functools.cache
    def save(step: int, accumulate: int = 1, stages: bool = False) -> Path:
        folder = tmp_path_factory.mktemp("saved")
        saves = {"dirpath": folder / "saved", "filename": "{step}", "every_n_train_steps": step}
        options = {"accumulate_grad_batches": accumulate, "max_steps": N_BATCHES // accumulate}
        options["limit_val_batches"] = 0
        train(folder, data=staged(folder) if stages else None, save=saves, **options)
        return folder / "saved" / f"step={step}.ckpt"

    return save


def staged(folder: Path) -> dict[str, Any]:
    weights = [{"web": 1, "code": 0, "books": 0}, {"web": 0, "code": 1, "books": 0}]
    stages = [{"tokens": 15 * STEP, "weights": weights[0]}, {"weights": weights[1]}]
    return {"corpus": write_sources(folder), "stages": stages}


@pytest.mark.parametrize(
    ("step", "skip", "options"),
    [
        pytest.param(9, [[12, 14]], {}, marks=pytest.mark.heavy),
        (9, [[9, 11], [12, 13]], {}),
        (9, [[9, 30]], {}),  # continues in the next epoch
        pytest.param(9, [[22, 28]], {"limit_train_batches": 24}, marks=pytest.mark.heavy),
        (18, [[20, 24], [33, 35]], {}),
        (2, [[9, 11], [22, 28]], {"accumulate_grad_batches": 4}),
    ],
)
def test_a_resumed_run_skips_batches_ahead_like_a_new_run(saved, tmp_path, step, skip, options):
    accumulate = options.get("accumulate_grad_batches", 1)
    options = {"max_steps": N_BATCHES // accumulate, "limit_val_batches": 0, **options}
    data = {"skip_steps": skip}
    whole, weights = train(tmp_path, data=data, **options)
    resumed, same = train(tmp_path, data=data, ckpt_path=saved(step, accumulate), **options)
    assert resumed.seen == whole.seen[step * accumulate :]
    assert all(torch.equal(same[name], weight) for name, weight in weights.items())
    n = numbers(skip, len(whole.seen))[-1] + 1
    assert text_of(resumed.data, n) == text_of(whole.data, n)


def test_the_next_stage_of_a_resumed_run_starts_after_its_tokens(saved, tmp_path):
    ckpt = saved(9, stages=True)
    options = {"data": staged(tmp_path) | {"skip_steps": [[11, 14]]}, "max_steps": 25}
    options["limit_val_batches"] = 0
    whole, _ = train(tmp_path, **options)
    resumed, _ = train(tmp_path, ckpt_path=ckpt, **options)
    assert resumed.seen == whole.seen[9:]
    names = [set(whole.data.train_windows.locate(whole.data.windows_at(b))[0]) for b in range(28)]
    assert names == [{"web"}] * 18 + [{"code"}] * 10  # 15 batches of the first stage train


@pytest.mark.parametrize(
    "skip", [pytest.param([[3, 5]], id="all"), pytest.param([[8, 14]], id="a part"), [[0, 1], [20, 22]]]
)
def test_batches_that_trained_before_the_checkpoint_cannot_be_skipped(saved, tmp_path, skip):
    begin, end = skip[0]
    message = rf"skip_steps \[{begin}, {end}\): the run has trained on it: .* before batch {begin}, or"
    with pytest.raises(ValueError, match=message):
        train(tmp_path, data={"skip_steps": skip}, ckpt_path=saved(9), max_steps=12)


def test_skips_of_the_past_stay_in_the_history_and_later_ones_follow_the_config(tmp_path, capsys):
    saves = {"dirpath": tmp_path / "saved", "filename": "{step}", "every_n_train_steps": 10}
    first = {"skip_steps": [[3, 5], [13, 15], [20, 22]]}
    options = {"max_steps": 30, "limit_val_batches": 0}
    train(tmp_path, data=first, save=saves, **options)
    ckpt = tmp_path / "saved" / "step=10.ckpt"  # its next batch is 12
    assert load_state(ckpt)["batches"] == 10
    text = text_of(opened(make_data(tmp_path)), 60)
    for skip in ([], [[18, 19]], [[3, 5], [12, 15]], [[4, 5], [14, 40]]):
        watch, _ = train(tmp_path, data={"skip_steps": skip}, ckpt_path=ckpt, **options)
        trained = numbers([[3, 5], *(pair for pair in skip if pair[0] > 5)], 30)
        assert watch.seen == [text[number] for number in trained[10:]]
        assert text_of(watch.data, 60) == text
        assert watch.data.tokens_at(12) == 10 * STEP
    with pytest.raises(ValueError, match=r"skip_steps \[3, 6\): the run has trained on it"):
        train(tmp_path, data={"skip_steps": [[3, 6]]}, ckpt_path=ckpt, **options)
    data = opened(GPTDataModule.load_from_checkpoint(ckpt, weights_only=True))
    assert text_of(data, 60) == text
    file = str(ckpt.rename(tmp_path / "last.ckpt"))
    for arguments, step, batches in (([file], 12, 10), ([file, "step=14"], 14, 11)):
        seen(Namespace(overrides=arguments, json=True))
        found = json.loads(capsys.readouterr().out)
        assert (found["step"], found["tokens"]) == (step, batches * STEP)
        assert found["sources"][0]["steps"] == [0, step]


def test_new_data_continues_the_numbers(tmp_path):
    saves = {"dirpath": tmp_path / "saved", "filename": "{step}", "every_n_train_steps": 10}
    skip = {"skip_steps": [[3, 5], [20, 22]]}
    old, _ = train(tmp_path, data=skip, save=saves, max_steps=10)
    other = tmp_path / "other.txt"
    other.write_text((tmp_path / "words.txt").read_text()[: -9 * LENGTH])
    data = {"corpus": str(other), "on_change": "continue"} | skip
    new, _ = train(tmp_path, data=data, max_steps=30, ckpt_path=tmp_path / "saved" / "step=10.ckpt")
    text = text_of(new.data, 34)
    assert text[:12] == text_of(old.data, 12)
    assert new.seen == [text[number] for number in numbers(skip["skip_steps"], 30)[10:]]
    assert new.data.tokens_at(22) == new.data.tokens_at(20) == 18 * STEP


def test_the_log_says_which_batches_do_not_train(tmp_path, monkeypatch):
    lines: list[str] = []
    logger = logging.getLogger("lightning.pytorch.lit_gptdata")  # train.py silences rank_zero_info
    monkeypatch.setattr(logger, "handle", lambda record: lines.append(record.getMessage()))
    train(tmp_path, data={"skip_steps": [[3, 5], [1000, 1010]]}, max_steps=2)
    told = "skip_steps: no training on batches {}; from there the Trainer counts {} batches fewer"
    assert lines == [told.format("[3, 5)", 2), told.format("[1,000, 1,010)", 12)]


def test_ranges_are_sorted_and_merged():
    ranges = [[7, 9], [2, 4], [4, 5], [3, 4], [8, 12], np.array([20, 21]).tolist()]
    assert read_skip_steps({"skip_steps": ranges}) == [[2, 5], [7, 12], [20, 21]]
    assert read_skip_steps({"skip_steps": None}) is None


@pytest.mark.parametrize(
    ("ranges", "message"),
    [
        ([41200, 41260], r"skip_steps\[0\] must be \[begin, end\], two numbers of batches, got 41200"),
        ("[[1, 2]]", r"skip_steps must be a list of \[begin, end\]"),
        ({1: 2}, "skip_steps must be a list"),
        ([[1, 2], [3]], r"skip_steps\[1\] must be \[begin, end\]"),
        ([[1, 2, 3]], r"skip_steps\[0\] must be"),
        ([[-1, 2]], r"skip_steps\[0\]\[0\] must be an integer ≥ 0, got -1"),
        ([[5, 5]], r"skip_steps\[0\]\[1\] must be an integer ≥ 6, got 5"),
        ([[1.5, 3]], r"skip_steps\[0\]\[0\] must be an integer ≥ 0, got 1\.5"),
        ([[True, 3]], r"skip_steps\[0\]\[0\] must be an integer"),
    ],
)
def test_ranges_of_another_form_are_refused(tmp_path, ranges, message):
    with pytest.raises((TypeError, ValueError), match=message):
        make_data(tmp_path, skip_steps=ranges)


def test_what_cannot_skip_batches_is_refused(tmp_path):
    data = {"skip_steps": SKIP}
    with pytest.raises(ValueError, match=r"skip_steps needs Trainer\.fit.* leave out these batches"):
        opened(make_data(tmp_path, **data)).train_dataloader()
    with pytest.raises(ValueError, match=r"skip_steps needs .* batches, got the fraction 0\.5"):
        fit(tmp_path, None, data=data, max_epochs=1, limit_train_batches=0.5)
    with pytest.raises(ValueError, match="skip_steps needs a fixed batch size: leave out BatchSizeF"):
        make_trainer(max_steps=1, callbacks=BatchSizeFinder()).fit(
            make_model(), datamodule=make_data(tmp_path, **data)
        )
    message = r"skip_steps \[20, 50\) leaves no batch to train in epoch 1, which would have \[25, 50\)"
    with pytest.raises(ValueError, match=message):
        fit(tmp_path, data={"skip_steps": [[20, 50]]})


@pytest.mark.heavy
def test_ranks_skip_the_same_batches(tmp_path):
    data = {"skip_steps": SKIP}
    whole, _ = train(tmp_path, data=data, max_steps=34)
    save = {"dirpath": str(tmp_path / "ckpt"), "filename": "{step}", "every_n_train_steps": 5}
    ckpt = str(tmp_path / "ckpt" / "step=10.ckpt")
    jobs = [
        ranks_job(tmp_path, "whole", 2, 2, data=data, max_steps=34, save=save),
        ranks_job(tmp_path, "again", 2, 2, data=data, max_steps=34, ckpt_path=ckpt),
    ]
    assert run_jobs(jobs, tmp_path) == 0
    assert seen_by_all(results(tmp_path / "whole")) == whole.seen
    assert seen_by_all(results(tmp_path / "again")) == whole.seen[10:]
    alone, _ = train(tmp_path, data=data, max_steps=34, ckpt_path=ckpt)
    assert alone.seen == whole.seen[10:]
