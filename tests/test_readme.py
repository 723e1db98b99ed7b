"""The examples of the README run, and the files that it names exist."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
EXAMPLE, RESUME = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def python(code: str, cwd: Path, expect: int = 0) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == expect, done.stderr
    return done.stdout


def test_the_python_example_runs(tmp_path):
    assert "max_steps=200" in EXAMPLE
    quick = EXAMPLE.replace("max_steps=200", "max_steps=2, limit_val_batches=1")
    checks = """
assert inputs.shape == targets.shape == (4, 256)
assert (inputs[:, 1:] == targets[:, :-1]).all()
assert x.shape == (4, 256, 256)
"""
    assert "windows of 256 every 128 tokens" in python(quick + checks, tmp_path)


def test_the_resume_example_continues_after_a_kill(tmp_path):
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
        return re.findall(r"^\d+ \d+$", python(script, folder), re.MULTILINE)

    def weights(folder: Path) -> dict[str, torch.Tensor]:
        path = max((folder / "checkpoints").glob("last*.ckpt"), key=lambda p: p.stat().st_mtime)
        return torch.load(path, weights_only=True)["state_dict"]

    all_batches = batches(uninterrupted)
    assert len(all_batches) == 12
    python(script, killed, expect=-signal.SIGKILL)
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
