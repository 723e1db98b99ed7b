"""train.py in two processes (gloo, CPU) gives the results of one process, with one build and folder."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import open_dict

from lit_gptdata import GPT
from lit_gptdata.training.folder import RUN, check_launcher, share_run_name
from tests.http_server import FileServer
from tests.runs import make_trainer
from tests.training.run_train import STORY, compose_config, read_metrics, run_train, run_train_here

pytestmark = pytest.mark.usefixtures("one_thread")

# 4 steps of 8 windows over all ranks
SMALL = ["debug=fast", "max_tokens=512", "threads=1", "~callbacks.progress"]
TWO = ["trainer.accelerator=cpu", "data.batch_size=4"]
TORCHRUN = ("-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone")


def start(*overrides: str, **options) -> str:
    """Run train.py; without `launcher`, it starts the second process itself."""
    return run_train(*overrides, *SMALL, **options)


def run_here(folder: Path, *overrides: str) -> dict[str, list[float]]:
    """Run train.py in this process; return its losses."""
    run_train_here(*overrides, *SMALL, f"output_dir={folder}")
    return losses(folder)


def losses(run: Path) -> dict[str, list[float]]:
    rows = read_metrics(run)
    return {name: [float(row[name]) for row in rows if row[name]] for name in ("train_loss", "val_loss")}


def assert_close(actual: dict[str, list[float]], expected: dict[str, list[float]]) -> None:
    for name, values in actual.items():
        n = 4 if name == "train_loss" else 3  # 4 steps; validations before, during and at the last step
        assert len(values) == n
        assert values == pytest.approx(expected[name], rel=0, abs=1e-5)


@pytest.mark.heavy
def test_a_sweep_of_ddp_and_fsdp_under_torchrun_equals_runs_in_one_process(tmp_path):
    with FileServer(STORY.encode()) as server:
        data = ["data=url", f"data.corpus={server.url}", "data.test_fraction=0.1"]
        printed = start("-m", "trainer=ddp,fsdp", *TWO, *data, cwd=tmp_path, launcher=TORCHRUN)
        assert len(server.requests) == 1
        expected = run_here(tmp_path / "one", *data, "data.batch_size=8")
    assert len(list((tmp_path / "data" / "tokens").glob("[!.]*"))) == 1
    (sweep,) = tmp_path.glob("multirun/*/*")
    ddp, fsdp = sweep / "0", sweep / "1"
    assert printed.count("\nfolder ") == 2
    results = [json.loads((run / "result.json").read_text()) for run in (ddp, fsdp)]
    assert [result["tokens"] for result in results] == [512, 512]
    assert printed.count("\nreport ") == 1
    assert (sweep / "sweep.html").exists()
    for run in (ddp, fsdp):
        assert_close(losses(run), expected)
        names = {path.name for path in run.iterdir()}
        assert names >= {"config.yaml", "metrics.csv", "checkpoints", "loss.png", "summary.txt"}
    assert "deprecated" not in printed

    # a checkpoint of the sharded model contains the full weights
    models = [GPT.load_from_checkpoint(run / "checkpoints" / "last.ckpt") for run in (ddp, fsdp)]
    for weight, other in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(weight, other, rtol=0, atol=1e-4)  # the last step of Adam is 3e-4
    summaries = [(run / "summary.txt").read_text() for run in (ddp, fsdp)]
    assert len({re.search("^after training .*", text, re.MULTILINE)[0] for text in summaries}) == 1


@pytest.mark.heavy
def test_two_processes_of_lightning_build_once_even_if_it_is_slow(tmp_path):
    slow = "data.corpus={_target_: tests.distributed.SlowCorpus, seconds: 5}"
    impatient = "trainer.strategy={_target_: tests.distributed.ImpatientDDP}"
    start("trainer=ddp", impatient, *TWO, slow, "data.build_workers=1", cwd=tmp_path)
    assert len((tmp_path / "reads.txt").read_text().split()) == 1
    (run,) = tmp_path.glob("outputs/*/*")
    assert (run / "summary.txt").exists()
    assert len(losses(run)["train_loss"]) == 4
    assert {path.name for path in tmp_path.iterdir()} == {"data", "outputs", "reads.txt"}


def set_hydra_mode(mode: str, monkeypatch) -> None:
    cfg = compose_config(f"hydra.mode={mode}", return_hydra_config=True)
    monkeypatch.setattr(HydraConfig.instance(), "cfg", cfg)


def test_a_sweep_that_would_start_itself_again_is_rejected(monkeypatch):
    for name in ("LOCAL_RANK", "RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    two_processes, three_processes = (make_trainer(devices=n, strategy="ddp") for n in (2, 3))
    check_launcher(two_processes)  # outside Hydra
    set_hydra_mode("RUN", monkeypatch)
    check_launcher(two_processes)
    set_hydra_mode("MULTIRUN", monkeypatch)
    message = r"3 processes per job with DDPStrategy.* --nproc-per-node 3 train.py -m"
    with pytest.raises(ValueError, match=message):
        check_launcher(three_processes)
    monkeypatch.setenv("LOCAL_RANK", "0")  # a job with devices=1 leaves it set
    with pytest.raises(ValueError, match="would each run the sweep"):
        check_launcher(two_processes)


@pytest.mark.parametrize(("devices", "strategy"), [(1, "auto"), (1, "ddp"), (2, "ddp_fork")])
def test_a_sweep_may_use_one_process_or_forked_processes(devices, strategy, monkeypatch):
    set_hydra_mode("MULTIRUN", monkeypatch)
    check_launcher(make_trainer(devices=devices, strategy=strategy))


def test_a_sweeper_that_may_differ_between_processes_is_rejected(monkeypatch):
    torchrun = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    for name, value in (torchrun | {"GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "x"}).items():
        monkeypatch.setenv(name, value)
    trainer = make_trainer(devices=2, strategy="ddp")
    set_hydra_mode("MULTIRUN", monkeypatch)
    check_launcher(trainer)
    with open_dict(HydraConfig.get()):
        HydraConfig.get().sweeper._target_ = "hydra_plugins.optuna.Sweeper"
    with pytest.raises(ValueError, match=r"optuna.Sweeper may choose .*: set hydra/sweeper=basic"):
        check_launcher(trainer)


@pytest.mark.heavy
def test_a_rejected_sweep_trains_nothing(tmp_path):
    printed = start("-m", "trainer=ddp", "seed=0,1", *TWO, cwd=tmp_path, expect=1)
    assert "would each run the sweep" in printed
    assert not list(tmp_path.rglob("metrics.csv"))
    assert not (tmp_path / "data").exists()


@pytest.mark.heavy
def test_a_sweep_of_forked_processes(tmp_path):
    forked = ("trainer=ddp", "trainer.strategy=ddp_fork", "seed=0,1", "hydra.sweep.dir=sweep")
    start("-m", *forked, *TWO, cwd=tmp_path)
    for seed in (0, 1):
        text = (tmp_path / "sweep" / str(seed) / "summary.txt").read_text()
        expected = run_here(tmp_path / f"one{seed}", "data.batch_size=8", f"seed={seed}")
        loss = float(re.search(r"val loss +([\d.]+) ", text)[1])
        assert loss == pytest.approx(expected["val_loss"][-1], abs=1e-4)  # the trained weights are back


def folder_of(monkeypatch, **env: str) -> str:
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    share_run_name()
    return compose_config(return_hydra_config=True).hydra.run.dir


def test_srun_names_a_run_by_its_job_and_step(monkeypatch):
    monkeypatch.setenv(RUN, "")  # so that monkeypatch restores it
    monkeypatch.delenv(RUN)
    slurm = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "2", "SLURM_STEP_NUM_TASKS": "1"}
    assert folder_of(monkeypatch, **slurm).startswith("outputs/20")
    assert RUN not in os.environ
    slurm["SLURM_STEP_NUM_TASKS"] = "4"
    assert folder_of(monkeypatch, **slurm) == "outputs/slurm-7.2.0"
    assert folder_of(monkeypatch, **slurm, SLURM_RESTART_COUNT="1") == "outputs/slurm-7.2.1"


@pytest.mark.heavy
# With DDP, one rank saves after the other failed, without the generator of the other: no dropout.
@pytest.mark.parametrize(("trainer", "dropout"), [("ddp", 0), ("fsdp", 0.1)])
def test_two_processes_resume_from_a_checkpoint(trainer, dropout, tmp_path):
    options = (f"trainer={trainer}", *TWO, "trainer.max_steps=8", f"model.dropout={dropout}")
    start(*options, "hydra.run.dir=uninterrupted", cwd=tmp_path)
    expected = losses(tmp_path / "uninterrupted")
    fails = "+callbacks.fails={_target_: tests.distributed.Fails, rank: 1, step: 5}"
    first = (*options, fails, "hydra.run.dir=first")
    assert "this rank has failed" in start(*first, cwd=tmp_path, launcher=TORCHRUN, expect=1)
    ckpt = "ckpt_path=first/checkpoints/last.ckpt"
    start(*options, ckpt, "hydra.run.dir=second", cwd=tmp_path)
    resumed = losses(tmp_path / "second")
    n = len(resumed["train_loss"])
    assert 3 <= n <= 4
    assert resumed["train_loss"] == pytest.approx(expected["train_loss"][-n:], rel=0, abs=1e-6)
    assert resumed["val_loss"][-1] == pytest.approx(expected["val_loss"][-1], rel=0, abs=1e-6)
