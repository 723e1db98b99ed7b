"""A run that stops and resumes has the same windows and weights as a run that never stops."""

from __future__ import annotations

import functools
import itertools
import json
import os
import signal
import subprocess
import sys
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lit_gptdata.windows.order import EpochPermutation
from tests.runs import EPOCH_BATCHES, N_WINDOWS, train, validate, windows_of, write_val_sources

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # A resumed run saves where the first one did.
    pytest.mark.filterwarnings("ignore:.*exists and is not empty.*"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed.*"),
]

ROOT = Path(__file__).parents[1]

LIMITS = {  # by accumulate_grad_batches, up to the third epoch; an epoch's last step may be smaller
    "max_steps": {1: 60, 3: 22, 4: 17},
    "max_epochs": {1: 3, 3: 3, 4: 3},
}
STOP_AT = {1: 10, 2: EPOCH_BATCHES + 10}  # a batch inside the epoch, and inside an accumulation

SAVED_BY = {
    "by step": {"every_n_train_steps": 2},
    "at a validation": {"every_n_epochs": 1, "save_on_train_epoch_end": False},
    "at an epoch's end": {"every_n_epochs": 1, "save_on_train_epoch_end": True},
    "exception": {"save_on_exception": True, "every_n_epochs": 99},
    "SIGTERM": {"save_on_exception": True, "every_n_epochs": 99},
    "SIGKILL": {"every_n_train_steps": 2},
}

FAST = {
    ("by step", 3, 1), ("at a validation", 1, 2), ("at an epoch's end", 1, 1), ("exception", 4, 2),
    ("SIGTERM", 3, 2),
}  # fmt: skip


def grid(fast: set[tuple[str, int, int]], shift: int = 0) -> list[Any]:
    """All (saved_by, accumulate, epoch), and with each `saved_by` all (workers, limit)."""
    cells = []
    for s, a, e in itertools.product(range(len(SAVED_BY)), range(3), range(2)):
        saved_by, accumulate, epoch = [*SAVED_BY][s], (1, 3, 4)[a], (1, 2)[e]
        workers = (2, 0)[(a + e + s // 2) % 2]
        limit = ("max_steps", "max_epochs")[(a // 2 + e + s + shift) % 2]
        marks = [] if (saved_by, accumulate, epoch) in fast else pytest.mark.heavy
        cells.append(pytest.param(saved_by, accumulate, workers, limit, epoch, marks=marks))
    return cells


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("resume")


@functools.cache
def uninterrupted(folder: Path, accumulate: int, limit: str, data: str = "{}"):
    """The run that resumed runs are compared with. `data`: options of the data module, as JSON."""
    return train(folder, data=json.loads(data), **run_options(accumulate, limit))


def run_options(accumulate: int, limit: str) -> dict:
    validation = {"val_check_interval": 10, "check_val_every_n_epoch": 1}
    return validation | {"accumulate_grad_batches": accumulate, limit: LIMITS[limit][accumulate]}


@pytest.mark.parametrize(("saved_by", "accumulate", "workers", "limit", "epoch"), grid(FAST))
def test_a_resumed_run_equals_a_run_that_never_stops(
    folder, tmp_path, saved_by, accumulate, workers, limit, epoch
):
    assert_resumes(folder, tmp_path, saved_by, accumulate, workers, limit, epoch)


def assert_resumes(folder, tmp_path, saved_by, accumulate, workers, limit, epoch, data="{}"):
    whole, weights = uninterrupted(folder, accumulate, limit, data)
    assert len(whole.seen) > STOP_AT[2]
    options = run_options(accumulate, limit) | {"data": json.loads(data) | {"num_workers": workers}}
    save = {"dirpath": tmp_path, "filename": "{epoch}-{step}", **SAVED_BY[saved_by]}
    stops = saved_by in ("exception", "SIGTERM", "SIGKILL")
    stop = {"stop": saved_by, "stop_at": STOP_AT[epoch]} if stops else {}
    if saved_by == "SIGKILL":
        job = {"folder": str(folder), "out": str(tmp_path / "out"), **options, **stop}
        assert run_jobs([job | {"save": save | {"dirpath": str(tmp_path)}}], tmp_path) == -signal.SIGKILL
    else:
        first, _ = train(folder, save=save, **options, **stop)
        assert first.seen == whole.seen[: len(first.seen)]
        assert len(first.seen) == (STOP_AT[epoch] + 1 if stops else len(whole.seen))
    ckpt = checkpoint(tmp_path, saved_by, epoch)
    resumed, resumed_weights = train(folder, ckpt_path=ckpt, save=save, **options)

    assert resumed.seen
    first_batch = len(whole.seen) - len(resumed.seen)
    assert resumed.seen == whole.seen[first_batch:]
    assert first_batch % EPOCH_BATCHES % accumulate == 0, "it starts with a whole optimizer step"
    if stops:
        assert STOP_AT[epoch] - first_batch <= (accumulate if saved_by != "SIGKILL" else 2 * accumulate)
    assert all(torch.equal(resumed_weights[name], weight) for name, weight in weights.items())
    n = len(whole.val_loss) - len(resumed.val_loss)  # validations before the checkpoint do not repeat
    assert resumed.validated_at == whole.validated_at[n:]
    assert resumed.val_loss == whole.val_loss[n:]


def checkpoint(folder: Path, saved_by: str, epoch: int) -> Path:
    """The last checkpoint of the epoch, or the last one before the stop."""
    steps = {p: int(p.stem.split("step=")[1]) for p in folder.glob("*.ckpt")}
    batches = {p: torch.load(p, weights_only=True)["GPTDataModule"]["batches"] for p in steps}
    if saved_by == "at an epoch's end":
        return next(p for p in batches if batches[p] == epoch * EPOCH_BATCHES)
    within = [p for p in steps if (epoch - 1) * EPOCH_BATCHES < batches[p] <= STOP_AT[epoch] + 1]
    return max(within, key=lambda p: (batches[p], p.stat().st_mtime))


def run_jobs(jobs: list[dict], folder: Path) -> int:
    """Run jobs in a subprocess, or with `devices` in several ones; returns the exit status."""
    path = folder / "jobs.json"
    path.write_text(json.dumps(jobs))
    command, env = [sys.executable, "-m", "tests.runs", path], os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode <= 0, done.stdout + done.stderr
    return done.returncode


SAVE_5 = {"filename": "{step}", "every_n_train_steps": 5}


def results(folder: Path) -> list[dict]:
    """The results that the ranks of a job wrote."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]


def seen_by_all(ranks: list[dict]) -> list[list[int]]:
    """The windows of every step over all ranks, in the ranks' order."""
    return [list(chain(*step)) for step in zip(*(rank["seen"] for rank in ranks), strict=True)]


def order_from(epoch: int, index: int, width: int) -> list[list[int]]:
    """The remaining steps of an epoch in its order, without the tail."""
    order = EpochPermutation(n=N_WINDOWS, seed=0, epoch=epoch).at(np.arange(N_WINDOWS))[index:].tolist()
    return [order[i : i + width] for i in range(0, len(order) - width + 1, width)]


def ranks_job(folder: Path, name: str, devices: int, batch_size: int, **options) -> dict:
    data = {"batch_size": batch_size} | options.pop("data", {})
    out = {"folder": str(folder), "out": str(folder / name), "data": data}
    return out | {"devices": devices, "strategy": "ddp" if devices > 1 else "auto"} | options


@pytest.fixture(scope="module")
def two_ranks(folder) -> Path:
    """Runs on 2 ranks: two epochs of 2 × 4 windows per step that save at step 5, resumes, validation."""
    ckpt = str(folder / "ckpt" / "step=5.ckpt")
    save = SAVE_5 | {"dirpath": str(folder / "ckpt")}
    jobs = [
        ranks_job(folder, "whole", 2, 4, max_epochs=2, save=save),
        ranks_job(folder, "same", 2, 4, max_epochs=2, ckpt_path=ckpt),
        ranks_job(folder, "2x2", 2, 2, max_epochs=2, ckpt_path=ckpt),
        ranks_job(folder, "2x6", 2, 6, max_epochs=2, ckpt_path=ckpt),
        ranks_job(folder, "val", 2, 8, data={"val_fraction": 0.912}, validate=True),
        ranks_job(folder, "val-sets", 2, 3, data={"corpus": write_val_sources(folder)}, validate=True),
    ]
    assert run_jobs(jobs, folder) == 0
    return folder


def test_two_ranks_see_the_same_steps_as_one(two_ranks):
    ranks = results(two_ranks / "whole")
    assert len(ranks) == 2
    assert seen_by_all(ranks) == order_from(0, 0, 8) + order_from(1, 0, 8)


def test_batch_at_equals_what_every_rank_saw_in_two_epochs(two_ranks):
    ranks = results(two_ranks / "whole")
    for number, rank in enumerate(ranks):
        assert [step[number] for step in rank["batch_at"]] == rank["seen"]
        assert rank["batch_at"] == ranks[0]["batch_at"]
    alone, _ = train(two_ranks, max_epochs=2)
    at = [windows_of(alone.data.batch_at(step)[0]) for step in range(len(alone.seen))]
    assert at == alone.seen
    assert len(at) == 2 * EPOCH_BATCHES


def test_two_ranks_resume_with_the_same_weights(two_ranks):
    whole, same = results(two_ranks / "whole"), results(two_ranks / "same")
    assert seen_by_all(same) == seen_by_all(whole)[5:]
    assert [rank["weights"] for rank in same] == [rank["weights"] for rank in whole]


@pytest.mark.parametrize("resumed", ["2x2", "2x6"])
def test_two_ranks_resume_with_another_batch_size(two_ranks, resumed):
    width = 2 * int(resumed[-1])
    ranks = results(two_ranks / resumed)
    assert seen_by_all(ranks) == order_from(0, 5 * 8, width) + order_from(1, 0, width)
    for number, rank in enumerate(ranks):
        assert [step[number] for step in rank["batch_at"]] == rank["seen"]


@pytest.mark.parametrize("batch_size", [8, 4])
def test_one_rank_resumes_where_two_stopped(two_ranks, batch_size):
    ckpt = two_ranks / "ckpt" / "step=5.ckpt"
    data = {"batch_size": batch_size}
    alone, _ = train(two_ranks, data=data, save=SAVE_5, ckpt_path=ckpt, max_epochs=2)
    assert alone.seen == order_from(0, 5 * 8, batch_size) + order_from(1, 0, batch_size)


@pytest.mark.heavy
def test_four_ranks_resume_where_two_stopped(two_ranks):
    ckpt = str(two_ranks / "ckpt" / "step=5.ckpt")
    jobs = [ranks_job(two_ranks, "4x2", 4, 2, max_epochs=2, ckpt_path=ckpt)]
    assert run_jobs(jobs, two_ranks) == 0
    ranks = results(two_ranks / "4x2")
    assert len(ranks) == 4
    assert seen_by_all(ranks) == order_from(0, 5 * 8, 8) + order_from(1, 0, 8)


def test_validation_counts_every_token_once_on_two_ranks(two_ranks):
    alone = validate(two_ranks, data={"val_fraction": 0.912, "batch_size": 8})
    assert alone["n_windows"] == 103
    first, last = alone["val_tokens"]
    assert alone["n_targets"] == last - first - 1
    for rank in results(two_ranks / "val"):
        assert rank["n_windows"] == 103
        assert rank["n_targets"] == alone["n_targets"]
        for name in ("val_loss", "val_bits_per_byte"):
            assert rank[name] == pytest.approx(alone[name], rel=0, abs=1e-6)


def test_losses_of_named_sources_are_the_same_on_two_ranks(two_ranks):
    alone = validate(two_ranks, data={"corpus": write_val_sources(two_ranks), "batch_size": 8})
    assert alone.keys() >= {"val_loss", "val_loss/a", "val_loss/b", "val_loss/c"}
    assert alone["n_targets"] == sum(alone["n_targets_of_sets"])
    for rank in results(two_ranks / "val-sets"):
        for name, value in alone.items():
            assert rank[name] == pytest.approx(value, rel=1e-6), name
