"""Sweeps: `python train.py -m` as a user runs it, in sequence and with each launcher."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import lightning as L
import pytest
import torch
from hydra import compose, initialize_config_dir

from lit_gptdata.configs import conf_dir, register_resolvers
from lit_gptdata.training.sweep import scored_text
from tests.runs import make_data, opened, write_sources
from tests.training.run_train import ROOT, STORY, read_metrics, run_train, run_train_here

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = (
    "debug=fast", "max_tokens=256", "val_every_tokens=128", "trainer.limit_val_batches=1.0",
    "data.val_fraction=0.02", "threads=1",
)  # fmt: skip
SPEED = ("tokens_per_second", "data_wait")

COUNT_BUILDS = """
import os, time
from lit_gptdata.tokens.build import local as build

original_build = build._build

def counted_build(*arguments):
    with open(os.environ["BUILDS"], "a") as file:
        file.write(f"{os.getpid()}\\n")
    time.sleep(float(os.environ.get("BUILD_S", 0)))
    return original_build(*arguments)

build._build = counted_build
"""


@pytest.fixture
def sweep(tmp_path):
    """Runs train.py; each build of a store, in any process, writes a line to `builds`."""
    (tmp_path / "story.txt").write_text(STORY)
    (tmp_path / "hooks").mkdir()
    (tmp_path / "hooks" / "sitecustomize.py").write_text(COUNT_BUILDS)
    env = {"PYTHONPATH": f"{tmp_path / 'hooks'}{os.pathsep}{ROOT}", "BUILDS": f"{tmp_path / 'builds'}"}

    def run(*overrides: str, expect: int = 0) -> str:
        flags = [o for o in overrides if o == "-m"]  # Hydra takes flags only before overrides
        overrides = [*SMALL, "data.corpus=story.txt", *(o for o in overrides if o != "-m")]
        return run_train(*flags, *overrides, cwd=tmp_path, expect=expect, env=env)

    return run


def results(folder: Path) -> list[dict]:
    return [json.loads((job / "result.json").read_text()) for job in sorted(folder.glob("[0-9]*"))]


def metrics(run: Path) -> list[dict[str, str]]:
    """The rows of metrics.csv without the columns that measure speed."""
    return [{k: v for k, v in row.items() if k not in SPEED} for row in read_metrics(run)]


def builds(folder: Path) -> int:
    return len((folder / "builds").read_text().splitlines())


def test_a_failed_job_does_not_stop_a_sweep(tmp_path, sweep, monkeypatch):
    lengths = "data.max_length=8,16,0,32"
    printed = sweep("-m", lengths, "data.stride=8", "hydra.sweep.dir=sweep", expect=1)
    jobs = results(tmp_path / "sweep")
    assert [job["status"] for job in jobs] == ["completed", "completed", "failed", "completed"]
    assert jobs[2]["error"].startswith("ValueError: max_length")
    completed = [jobs[i] for i in (0, 1, 3)]
    assert [(job["tokens"], job["steps"]) for job in completed] == [(256, 16), (256, 8), (256, 4)]
    assert len({job["metrics"]["val_bits_per_byte"] for job in completed}) == 3
    assert builds(tmp_path) == 1
    with open(tmp_path / "sweep" / "sweep.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["status"] for row in rows] == ["completed"] * 3 + ["failed"]
    assert rows[3]["error"] == jobs[2]["error"]
    texts = [job["val_text"] for job in completed]
    assert texts[0]["bytes"][1] == len(STORY.encode())
    assert texts == [texts[0]] * 3  # whatever the length of the windows
    scores = [float(row["val_bits_per_byte"]) for row in rows[:3]]
    assert scores == sorted(scores)
    assert "ValueError: max_length" in (tmp_path / "sweep" / "sweep.html").read_text()
    assert str(tmp_path / "sweep" / "sweep.html") in printed

    # the overrides in result.json repeat a job outside the sweep
    monkeypatch.chdir(tmp_path)
    run_train_here(*jobs[1]["overrides"], "output_dir=alone")
    assert metrics(tmp_path / "alone") == metrics(tmp_path / "sweep" / "1")
    alone = json.loads((tmp_path / "alone" / "result.json").read_text())
    assert alone["metrics"]["val_loss"] == jobs[1]["metrics"]["val_loss"]
    saved = [tmp_path / run / "checkpoints" / "last.ckpt" for run in ("sweep/1", "alone")]
    of_sweep, of_run = [torch.load(path, weights_only=True).keys() for path in saved]
    assert "optimizer_states" in of_run
    assert "optimizer_states" not in of_sweep  # in a sweep only weights
    curve = [float(row["tokens"]) for row in metrics(tmp_path / "alone") if row["val_loss"]]
    assert curve == [0, 128, 256]


@pytest.mark.heavy
def test_the_jobs_of_a_sweep_free_their_memory(tmp_path):
    code = f"""
import gc, runpy, sys
import lightning as L
tokens = "max_tokens=512,1,256,128"
sys.argv = [{str(ROOT / "train.py")!r}, "-m", *{SMALL!r}, tokens, "hydra.sweep.dir=sweep"]

class CountModules(L.Trainer):
    alive = []
    def __init__(self, *args, **options):
        CountModules.alive.append(sum(isinstance(o, L.LightningModule) for o in gc.get_objects()))
        super().__init__(*args, **options)

L.Trainer = CountModules
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as end:
    assert end.code == 1, end.code
# the GPT of a job and its stem, and nothing from earlier jobs, one of which failed
assert CountModules.alive == [2, 2, 2, 2], CountModules.alive
"""
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, timeout=300, check=True)


@pytest.mark.heavy
def test_jobs_that_would_overwrite_each_other_are_rejected(tmp_path, sweep):
    printed = sweep("-m", "seed=0,1", "output_dir=one", "hydra.sweep.dir=sweep", expect=1)
    assert "error: output_dir=one is for a single run: set hydra.sweep.dir" in printed
    assert not (tmp_path / "one").exists()


@pytest.mark.heavy
def test_parallel_jobs_build_once_and_equal_sequential_jobs(tmp_path, sweep, monkeypatch):
    monkeypatch.setenv("BUILD_S", "15")  # long enough for the other jobs to start
    overrides = ("-m", "data.max_length=8,16,32,64", "data.stride=8")
    joblib = ("hydra/launcher=joblib", "hydra.launcher.n_jobs=4")
    printed = sweep(*overrides, "hydra.sweep.dir=parallel", *joblib)
    assert builds(tmp_path) == 1
    assert "waiting for another process" in printed
    assert [result["status"] for result in results(tmp_path / "parallel")] == ["completed"] * 4
    sweep(*overrides, "hydra.sweep.dir=sequential")
    for job in "0123":
        assert metrics(tmp_path / "parallel" / job) == metrics(tmp_path / "sequential" / job)
    assert builds(tmp_path) == 1
    assert (tmp_path / "parallel" / "sweep.html").exists()


@pytest.mark.heavy
def test_submitit_runs_the_jobs(tmp_path, sweep):
    launcher = "hydra/launcher=submitit_local"
    sweep("-m", "data.max_length=8,16,0", "hydra.sweep.dir=sweep", launcher, expect=1)
    assert [r["status"] for r in results(tmp_path / "sweep")] == ["completed", "completed", "failed"]
    assert builds(tmp_path) == 1
    assert (tmp_path / "sweep" / "sweep.html").exists()


@pytest.mark.heavy
@pytest.mark.parametrize("storage", [None, "sqlite:///study.db"])
def test_optuna_runs_trials_and_continues_a_stored_study(tmp_path, sweep, storage):
    study = [] if storage is None else [f"hydra.sweeper.storage={storage}", "hydra.sweeper.study_name=a"]
    command = ("-m", "+sweep=optuna", "max_tokens=512", *study)
    sweep(*command, "hydra.sweep.dir=first")
    trials = results(tmp_path / "first")
    assert [trial["status"] for trial in trials] == ["completed"] * 8
    losses = [trial["metrics"]["val_loss"] for trial in trials]
    best = trials[losses.index(min(losses))]
    (rate,) = [o.split("=")[1] for o in best["overrides"] if o.startswith("model.learning_rate=")]
    with open(tmp_path / "first" / "sweep.csv") as file:
        assert next(csv.DictReader(file))["model.learning_rate"] == rate
    if storage is None:
        return
    sweep(*command, "hydra.sweep.dir=second", "hydra.sweeper.n_trials=2", "hydra.sweeper.sampler.seed=1")
    more_losses = [trial["metrics"]["val_loss"] for trial in results(tmp_path / "second")]
    assert len(more_losses) == 2
    page = (tmp_path / "second" / "sweep.html").read_text()
    assert f"{min(losses + more_losses):.4f}" in page  # even if it is a trial of the first sweep


@pytest.mark.heavy
def test_a_failed_trial_does_not_stop_optuna(tmp_path, sweep):
    trials = ("hydra.sweeper.n_trials=4", "data.batch_size=choice(4,30)")
    sweep("-m", "+sweep=optuna", "max_tokens=300", *trials, "hydra.sweep.dir=sweep", expect=1)
    assert {result["status"] for result in results(tmp_path / "sweep")} == {"completed", "failed"}


@pytest.mark.parametrize("length", [64, 7])
def test_the_strides_of_a_sweep_follow_the_length_of_the_windows(length):
    register_resolvers()
    strides = []
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        params = compose("train", ["+sweep=stride"], return_hydra_config=True).hydra.sweeper.params
        (key,) = params
        for value in params[key].split(","):
            cfg = compose("train", ["+sweep=stride", f"{key}={value}", f"data.max_length={length}"])
            strides.append(cfg.data.stride)
    assert strides == [length // 2, length]


def test_the_text_that_val_loss_covers_is_recorded(tmp_path):
    def scored(limit: int | float = 1.0, **options) -> dict:
        data = opened(make_data(tmp_path, **options))
        silent = {"logger": False, "accelerator": "cpu", "enable_checkpointing": False}
        data.trainer = L.Trainer(limit_val_batches=limit, enable_progress_bar=False, **silent)
        return scored_text(data)

    whole = scored()
    begin, end = whole["bytes"]
    assert end == (tmp_path / "words.txt").stat().st_size
    assert (end - begin) / end == pytest.approx(0.1, abs=0.01)
    same = ({"max_length": 16}, {"batch_size": 2}, {"stride": 3, "seed": 5}, {"limit": 999})
    assert [scored(**options) for options in same] == [whole] * len(same)
    part = scored(limit=2)
    assert part["sha256"] == whole["sha256"]
    assert part["bytes"][0] == begin
    assert part["bytes"][1] < end
    assert scored(limit=2, batch_size=2)["bytes"][1] < part["bytes"][1]
    assert scored(limit=2, batch_size=2, max_length=16)["bytes"] == part["bytes"]
    assert scored(val_fraction=0.2)["bytes"] != whole["bytes"]

    sources = write_sources(tmp_path)
    mixed = scored(corpus=sources)
    assert len(mixed["bytes"]) == 6
    assert mixed["sha256"] != whole["sha256"]
    only_scored = scored(corpus={"web": sources["web"]}, val_corpus={"code": sources["code"]})
    assert only_scored["bytes"] == mixed["bytes"][:2]
