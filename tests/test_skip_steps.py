"""Batches of `skip_steps` do not train, and all others are what they are without it."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import BatchSizeFinder

from lit_gptdata import GPTDataModule
from lit_gptdata.cli.show import seen
from lit_gptdata.tokens.options import read_skip_steps
from tests.runs import (
    BATCH_SIZE,
    EPOCH_BATCHES,
    LENGTH,
    make_data,
    make_model,
    make_trainer,
    opened,
    train,
    windows_of,
    write_sources,
)
from tests.test_resume import ranks_job, results, run_jobs, seen_by_all
from tests.test_schedules import SIZES, STEP, assert_resumes, fit, load_state

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


RUNS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "steps": ({}, {"max_steps": 34, "val_check_interval": 5}),
    "epochs": ({"drop_last": False}, {"max_epochs": 3, "val_check_interval": 0.5}),
    "accumulation": ({}, {"max_epochs": 3, "accumulate_grad_batches": 4}),
    "limit": ({"num_workers": 1}, {"max_steps": 30, "limit_train_batches": 11}),
}


@pytest.mark.parametrize("run", RUNS)
def test_a_run_trains_on_the_batches_that_are_not_skipped(tmp_path, run):
    data, options = RUNS[run]
    watch, _ = train(tmp_path, data={"skip_steps": SKIP} | data, **options)
    without, _ = train(tmp_path, data=data, **options)
    trained = numbers(SKIP, len(watch.seen))
    at = [windows_of(without.data.batch_at(b)[0]) for b in range(trained[-1] + 1)]
    assert watch.seen == [at[b] for b in trained]
    assert [windows_of(watch.data.batch_at(b)[0]) for b in range(len(at))] == at


@pytest.mark.parametrize("run", [pytest.param(run, marks=pytest.mark.heavy) for run in RUNS])
def test_every_checkpoint_of_a_run_with_skips_resumes_exactly(tmp_path, run):
    data, options = RUNS[run]
    assert_resumes(tmp_path, {"batch_schedule": None, "skip_steps": SKIP} | data, options, range(99))


@pytest.mark.parametrize("stop", ["", "exception"])
def test_a_run_resumes_next_to_skipped_batches(tmp_path, stop):
    data, options = RUNS["accumulation"]
    data = {"batch_schedule": SIZES, "skip_steps": SKIP} | data
    assert_resumes(tmp_path, data, options, stops=(4, 8, 12, 18), stop=stop)
