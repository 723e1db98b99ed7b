"""The examples of the README run, and the files that it names exist."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
EXAMPLE, RESUME, MIXTURE = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


# The examples have no checkpoint on their first start and use the default logger: Lightning warns.
pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]


def test_the_python_example_runs(capsys):
    assert "max_steps=200" in EXAMPLE
    names: dict[str, Any] = {}
    exec(EXAMPLE.replace("max_steps=200", "max_steps=2, limit_val_batches=1"), names)
    assert "windows of 256 every 128 tokens" in capsys.readouterr().out
    inputs, targets = names["inputs"], names["targets"]
    assert inputs.shape == targets.shape == (4, 256)
    assert (inputs[:, 1:] == targets[:, :-1]).all()
    assert names["x"].shape == (4, 256, 256)


def test_the_mixture_example_runs(capsys):
    Path("notes.txt").write_text("A text that is only scored. " * 200)
    names: dict[str, Any] = {}
    exec(f"from lit_gptdata import GPTDataModule\n{MIXTURE}", names)
    assert set(names["names"]) <= {"prose", "code"}
    assert len(names["windows"]) == 4
    assert re.search("  notes .*'notes.txt' \\(val_corpus\\)", capsys.readouterr().out)


def test_the_resume_example_continues_after_a_kill(tmp_path, monkeypatch, capsys):
    setup = EXAMPLE[: EXAMPLE.index("L.Trainer")].replace("256", "32")
    fit = RESUME.replace("=50", "=4").replace("max_steps=200", "max_steps=12, limit_val_batches=1")
    assert fit.count("callbacks=saves") == 1
    fit = fit.replace("callbacks=saves", "callbacks=[Kill(), saves]")
    kill = """
import os, signal
class Kill(L.Callback):
    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        print(batch_idx, batch[0].sum().item(), flush=True)
        if batch_idx == 6 and not os.path.exists("killed"):
            open("killed", "w").close()
            os.kill(os.getpid(), signal.SIGKILL)
"""
    script = "import lightning as L\nL.seed_everything(0)\n" + setup + kill + fit
    uninterrupted, killed = tmp_path / "uninterrupted", tmp_path / "killed"
    uninterrupted.mkdir(), killed.mkdir()
    (uninterrupted / "killed").touch()

    def batches(folder: Path) -> list[str]:
        monkeypatch.chdir(folder)
        exec(script, {})
        return re.findall(r"^\d+ \d+$", capsys.readouterr().out, re.MULTILINE)

    def weights(folder: Path) -> dict[str, torch.Tensor]:
        path = max((folder / "checkpoints").glob("last*.ckpt"), key=lambda p: p.stat().st_mtime)
        return torch.load(path, weights_only=True)["state_dict"]

    all_batches = batches(uninterrupted)
    assert len(all_batches) == 12
    command, env = [sys.executable, "-c", script], os.environ | {"OMP_NUM_THREADS": "1"}
    assert subprocess.run(command, cwd=killed, env=env).returncode == -signal.SIGKILL
    assert batches(killed) == all_batches[4:]
    expected, resumed = weights(uninterrupted), weights(killed)
    assert all(torch.equal(resumed[name], weight) for name, weight in expected.items())


def test_every_named_file_exists():
    links = re.findall(r"\]\(([^)#:]+)\)", README)
    paths = re.findall(r"`((?:lit_gptdata|conf)/[\w./]*)`", README)
    assert links
    assert paths
    for name in links + paths:
        assert (ROOT / name).exists(), name
