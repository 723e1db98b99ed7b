"""What the README shows, run."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from pathlib import Path

import torch

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


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


def test_the_three_lines_of_resume_go_on_after_a_kill(tmp_path):
    small = EXAMPLE[: EXAMPLE.index("L.Trainer")].replace("256", "32")
    quick = RESUME.replace("=50", "=4").replace("max_steps=200", "max_steps=12, limit_val_batches=1")
    assert quick.count("callbacks=saves") == 1
    kill = """
import os, signal
class Kill(L.Callback):
    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        print(batch_idx, batch[0].sum().item(), flush=True)
        if batch_idx == 6 and not os.path.exists("killed"):
            open("killed", "w").close()
            os.kill(os.getpid(), signal.SIGKILL)
"""
    seed = "L.seed_everything(0)\n"
    run = "import lightning as L\n" + seed + small + kill + quick
    run = run.replace("callbacks=saves", "callbacks=[Kill(), saves]")
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    whole.mkdir(), stopped.mkdir()
    (whole / "killed").touch()
    seen = [line for line in python(run, whole).splitlines() if re.fullmatch(r"\d+ \d+", line)]
    python(run, stopped, expect=-signal.SIGKILL)
    again = [line for line in python(run, stopped).splitlines() if re.fullmatch(r"\d+ \d+", line)]
    assert len(seen) == 12
    assert again == seen[4:]

    def weights(folder: Path) -> dict[str, torch.Tensor]:
        path = max((folder / "checkpoints").glob("last*.ckpt"), key=lambda p: p.stat().st_mtime)
        return torch.load(path, weights_only=True)["state_dict"]

    expected, resumed = weights(whole), weights(stopped)
    assert all(torch.equal(resumed[name], weight) for name, weight in expected.items())


def test_every_file_that_is_named_exists():
    root = Path(__file__).parents[1]
    names = re.findall(r"\]\(([^)#:]+)\)", README) + re.findall(
        r"`((?:lit_gptdata|conf)/[\w./]*)`", README
    )
    assert names
    for name in names:
        assert (root / name).exists(), name
