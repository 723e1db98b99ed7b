"""The names of runs in loggers, and the loggers of a config, without any client."""

from __future__ import annotations

import sys
import types
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from lit_gptdata.training import loggers
from lit_gptdata.training.loggers import name_run, prepare_loggers
from tests.training.run_train import compose_config


def named(monkeypatch, task: list[str], job: int | None = None, **options: str) -> tuple[str, str]:
    """The run_name and run_group of a job with the overrides `task`."""
    hydra = types.SimpleNamespace(
        initialized=lambda: True,
        get=lambda: types.SimpleNamespace(
            overrides=types.SimpleNamespace(task=task), job=types.SimpleNamespace(num=job)
        ),
    )
    monkeypatch.setattr(loggers, "HydraConfig", hydra)
    monkeypatch.setattr(loggers, "in_sweep", lambda: job is not None)
    cfg = OmegaConf.create({"ckpt_path": None, "logger": None, **options})
    name_run(cfg, Path("multirun/day/time/0" if job is not None else "outputs/day/time"))
    return cfg.run_name, cfg.run_group


def test_a_run_is_named_by_its_overrides_or_its_folder(monkeypatch):
    task = ["data.max_length=8", "logger=wandb", "output_dir=/x"]
    assert named(monkeypatch, task) == ("data.max_length=8", "")
    assert named(monkeypatch, []) == ("time", "")
    assert named(monkeypatch, ["run_name=mine", "seed=1"], run_name="mine") == ("mine", "")


def test_a_job_of_a_sweep_is_named_by_its_number_and_what_differs(monkeypatch):
    monkeypatch.setenv(loggers.SHARED_WORDS, "debug=fast\ndata.max_length=8,16")
    task = ["debug=fast", "data.max_length=16", "data.corpus=books/$a"]
    assert named(monkeypatch, task, 3) == ("3 data.max_length=16 data.corpus=books__a", "day/time")


def test_a_name_has_no_secrets_of_urls(monkeypatch):
    name, _ = named(monkeypatch, ["data.corpus=https://me:secret@host/a.txt?key=secret", "seed=1"])
    assert name == "data.corpus=https:__***@host_a.txt?… seed=1"


def test_a_long_name_is_cut_in_the_middle(monkeypatch):
    name, _ = named(monkeypatch, [f"data.corpus={'書' * 300}", "seed=1"])
    assert len(name.encode()) <= 255  # a folder of TensorBoard
    assert name.startswith("data.corpus=")
    assert name.endswith(" seed=1")


def test_a_run_resumed_in_its_folder_keeps_its_name(monkeypatch):
    folder = Path("outputs/day/time").absolute()
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("run_name: data.max_length=8\nrun_group: mine")
    cfg = OmegaConf.create({"ckpt_path": f"{folder}/checkpoints/last.ckpt", "logger": None})
    name_run(cfg, folder)
    assert (cfg.run_name, cfg.run_group) == ("data.max_length=8", "mine")


@pytest.mark.parametrize("names", ["wandb", ["tensorboard", "wandb"], ["csv", "wandb"]])
def test_names_in_a_config_are_loggers_next_to_csv(names):
    cfg = OmegaConf.create({"ckpt_path": None, "logger": names, "output_dir": "run"})
    name_run(cfg, Path("run"))
    assert [*cfg.logger] == ["csv", *(name for name in ("tensorboard", "wandb") if name in names)]
    assert cfg.logger.csv.save_dir == "run"
    assert cfg.logger.wandb.name == "run"


@pytest.mark.parametrize("choice", ["[csv,tensorboard]", "[tensorboard,csv]", "tensorboard"])
def test_tensorboard_is_next_to_csv(choice):
    cfg = compose_config(f"logger={choice}")
    assert {*cfg.logger} == {"csv", "tensorboard"}


def test_csv_is_the_first_of_many():
    assert [*compose_config("logger=many").logger] == ["csv", "tensorboard", "wandb", "mlflow"]


def test_without_mlflow_the_pip_command_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(ImportError, match=r"pip install 'lit-gptdata\[integrations\]'"):
        prepare_loggers(compose_config("logger=mlflow"))


def test_the_logger_of_an_older_config_is_found():
    from hydra.utils import get_class

    assert get_class("lit_gptdata.training.metrics_csv.RunCSVLogger") is loggers.RunCSVLogger
