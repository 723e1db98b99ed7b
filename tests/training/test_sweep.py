"""Sweeps: `python train.py -m` as a user runs it, in series and by every launcher."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.training.test_train import ROOT

SMALL = (
    "debug=fast", "max_tokens=1024", "val_every_tokens=512", "trainer.limit_val_batches=1.0",
    "data.val_fraction=0.02", "threads=1",
)  # fmt: skip
SPEED = ("tokens_per_second", "data_wait")

COUNTING = """
import os, time
from lit_gptdata.tokens.build import local as build

made = build._build

def counted(*arguments):
    with open(os.environ["BUILDS"], "a") as file:
        file.write(f"{os.getpid()}\\n")
    time.sleep(float(os.environ.get("BUILD_S", 0)))
    return made(*arguments)

build._build = counted
"""


@pytest.fixture
def sweep(tmp_path):
    """Runs train.py where every build of a store, in whatever process, leaves a line in `builds`."""
    (tmp_path / "hooks").mkdir()
    (tmp_path / "hooks" / "sitecustomize.py").write_text(COUNTING)
    env = {
        "PYTHONPATH": os.pathsep.join([str(tmp_path / "hooks"), str(ROOT)]),
        "BUILDS": str(tmp_path / "builds"),
    }

    def run(*overrides: str, expect: int = 0) -> str:
        flags = [word for word in overrides if word == "-m"]
        overrides = [word for word in overrides if word != "-m"]
        done = subprocess.run(
            [sys.executable, ROOT / "train.py", *flags, *SMALL, *overrides],
            cwd=tmp_path, env=os.environ | env, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert done.returncode == expect, done.stdout + done.stderr
        return done.stdout + done.stderr

    return run


def results(folder: Path) -> list[dict]:
    return [json.loads((job / "result.json").read_text()) for job in sorted(folder.glob("[0-9]*"))]


def metrics(run: Path) -> list[dict[str, str]]:
    """Every row of metrics.csv but for the speed."""
    with open(run / "metrics.csv") as file:
        return [{k: v for k, v in row.items() if k not in SPEED} for row in csv.DictReader(file)]


def builds(folder: Path) -> int:
    return len((folder / "builds").read_text().splitlines())


def test_a_sweep_with_a_job_that_fails(tmp_path, sweep):
    printed = sweep(
        "-m", "data.max_length=8,16,0,32", "data.stride=8", "hydra.sweep.dir=sweep", expect=1
    )
    ended = results(tmp_path / "sweep")
    assert [result["status"] for result in ended] == ["completed", "completed", "failed", "completed"]
    assert ended[2]["error"].startswith("ValueError: max_length=0 is too small")
    good = [ended[i] for i in (0, 1, 3)]
    assert [result["tokens"] for result in good] == [1024, 1024, 1024]
    assert [result["steps"] for result in good] == [64, 32, 16]
    assert len({result["metrics"]["val_bits_per_byte"] for result in good}) == 3
    assert builds(tmp_path) == 1
    with open(tmp_path / "sweep" / "sweep.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["status"] for row in rows] == ["completed"] * 3 + ["failed"]
    assert "max_length=0 is too small" in rows[3]["error"]
    scores = [float(row["val_bits_per_byte"]) for row in rows[:3]]
    assert scores == sorted(scores)
    page = (tmp_path / "sweep" / "sweep.html").read_text()
    assert "max_length=0 is too small" in page
    assert str(tmp_path / "sweep" / "sweep.html") in printed

    # a job alone: with its overrides, as result.json has them
    sweep(*ended[1]["overrides"], "hydra.run.dir=alone")
    assert metrics(tmp_path / "alone") == metrics(tmp_path / "sweep" / "1")
    alone = json.loads((tmp_path / "alone" / "result.json").read_text())
    assert alone["metrics"]["val_loss"] == ended[1]["metrics"]["val_loss"]
    curve = [float(row["tokens"]) for row in metrics(tmp_path / "alone") if row["val_loss"]]
    assert curve == [0, 512, 1024, 1024]


@pytest.mark.heavy
def test_the_jobs_of_a_sweep_leave_nothing_behind(tmp_path):
    code = f"""
import gc, runpy, sys
import lightning as L
tokens = "max_tokens=512,1,256,128"
sys.argv = [{str(ROOT / "train.py")!r}, "-m", *{SMALL!r}, tokens, "hydra.sweep.dir=sweep"]

class Counting(L.Trainer):
    alive = []
    def __init__(self, *args, **options):
        Counting.alive.append(sum(isinstance(o, L.LightningModule) for o in gc.get_objects()))
        super().__init__(*args, **options)

L.Trainer = Counting
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as end:
    assert end.code == 1, end.code
# a job's own GPT and its stem, and nothing of the jobs before, also not of the one that failed
assert Counting.alive == [2, 2, 2, 2], Counting.alive
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.heavy
def test_jobs_that_would_write_over_each_other_are_refused(tmp_path, sweep):
    printed = sweep("-m", "seed=0,1", "output_dir=one", "hydra.sweep.dir=sweep", expect=1)
    assert "output_dir=one: the jobs of a sweep would write over each other" in printed
    assert not (tmp_path / "one").exists()


@pytest.mark.heavy
def test_jobs_in_parallel_on_a_cold_cache(tmp_path, sweep, monkeypatch):
    monkeypatch.setenv("BUILD_S", "15")  # the others come meanwhile
    overrides = ("-m", "data.max_length=8,16,32,64", "data.stride=8")
    printed = sweep(
        *overrides, "hydra.sweep.dir=parallel", "hydra/launcher=joblib", "hydra.launcher.n_jobs=4"
    )
    assert builds(tmp_path) == 1
    assert "waiting for another process that makes the tokens" in printed
    assert [result["status"] for result in results(tmp_path / "parallel")] == ["completed"] * 4
    sweep(*overrides, "hydra.sweep.dir=series")
    for job in "0123":
        assert metrics(tmp_path / "parallel" / job) == metrics(tmp_path / "series" / job)
    assert builds(tmp_path) == 1
    assert (tmp_path / "parallel" / "sweep.html").exists()


@pytest.mark.heavy
def test_jobs_by_submitit(tmp_path, sweep):
    sweep(
        "-m", "data.max_length=8,16,0", "hydra.sweep.dir=sweep", "hydra/launcher=submitit_local",
        expect=1,
    )  # fmt: skip
    assert [r["status"] for r in results(tmp_path / "sweep")] == ["completed", "completed", "failed"]
    assert builds(tmp_path) == 1
    assert (tmp_path / "sweep" / "sweep.html").exists()


@pytest.mark.heavy
@pytest.mark.parametrize("storage", [None, "sqlite:///study.db"])
def test_optuna(tmp_path, sweep, storage):
    study = [] if storage is None else [f"hydra.sweeper.storage={storage}", "hydra.sweeper.study_name=a"]
    command = ("-m", "+sweep=optuna", "max_tokens=512", *study)
    sweep(*command, "hydra.sweep.dir=first")
    ended = results(tmp_path / "first")
    assert [result["status"] for result in ended] == ["completed"] * 8
    losses = [result["metrics"]["val_loss"] for result in ended]
    page = (tmp_path / "first" / "sweep.html").read_text()
    best = ended[losses.index(min(losses))]
    (rate,) = [o.split("=")[1] for o in best["overrides"] if o.startswith("model.learning_rate=")]
    with open(tmp_path / "first" / "sweep.csv") as file:
        assert next(csv.DictReader(file))["model.learning_rate"] == rate
    if storage is None:
        return
    sweep(*command, "hydra.sweep.dir=second", "hydra.sweeper.n_trials=2", "hydra.sweeper.sampler.seed=1")
    again = [result["metrics"]["val_loss"] for result in results(tmp_path / "second")]
    assert len(again) == 2
    best_value = min(losses + again)
    page = (tmp_path / "second" / "sweep.html").read_text()
    assert f"{best_value:.4f}" in page  # also if it is a trial of before


@pytest.mark.heavy
def test_a_failed_trial_is_no_end(tmp_path, sweep):
    sweep(
        "-m", "+sweep=optuna", "max_tokens=300", "hydra.sweeper.n_trials=4", "hydra.sweep.dir=sweep",
        "data.batch_size=choice(4,30)", expect=1,
    )  # fmt: skip
    assert {result["status"] for result in results(tmp_path / "sweep")} == {"completed", "failed"}
