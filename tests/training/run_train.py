"""Run train.py like a user, and read the files that it writes."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from lit_gptdata.cli import train
from lit_gptdata.configs import register_resolvers

ROOT = Path(__file__).parents[2]
CONF = ROOT / "conf"
STORY = "It was on a dreary night of November. " * 300


def run_train(*arguments: str, cwd: Path, expect: int = 0, launcher=(), env=None) -> str:
    """Run train.py in a separate process that exits with status `expect`; return what it prints."""
    command = [sys.executable, *launcher, ROOT / "train.py", *arguments]
    env = os.environ | {"PYTHONPATH": str(ROOT)} | (env or {})
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == expect, done.stdout + done.stderr
    return done.stdout + done.stderr


def compose_config(*overrides: str, **options: bool) -> DictConfig:
    register_resolvers()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("train", overrides=list(overrides), **options)


def run_train_here(*overrides: str) -> float:
    """Run the main function of train.py in this process; return the loss."""
    return train.main(compose_config(*overrides))


def read_metrics(run: Path) -> list[dict[str, str]]:
    with open(run / "metrics.csv") as file:
        return list(csv.DictReader(file))


def column(run: Path, name: str) -> dict[int, float]:
    """Optimizer step → value of a metric."""
    return {int(row["step"]): float(row[name]) for row in read_metrics(run) if row.get(name)}
