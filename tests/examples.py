"""Run a script of examples/ on one or two processes, kill -9 it, and run it again.

As a program, this file runs a script and notes what its model trains on: `python -m tests.examples …`.
A model trains on a window when an embedding gets its ids, so the script needs no code for tests.
"""

from __future__ import annotations

import atexit
import hashlib
import json
import os
import runpy
import signal
import subprocess
import sys
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import lit_gptdata

ROOT = Path(lit_gptdata.__file__).parents[1]
SMALL = {"max_length": 16, "stride": 2000, "batch_size": 2}  # epochs of about 60 windows


@dataclass
class Run:
    """What the ranks of a run trained on. `windows[rank][step]` are window numbers, int (B,)."""

    windows: list[list[list[int]]]
    n_windows: int
    """Train windows of the data."""
    weights: set[str]
    """Hashes of the final weights, one per rank if they differ; empty after a kill."""
    output: str


def run(
    script: str, folder: Path, *args: str, ranks: int, kill_at: int = 0, options: Any = SMALL
) -> Run:
    """Run examples/<script> in `folder`, with `options` of GPTDataModule in place of the script's own.

    With `kill_at`, each rank kills itself with SIGKILL when its model gets that batch, counted from 1.
    """
    folder.mkdir(exist_ok=True)
    for old in folder.glob("rank*.*"):
        old.unlink()
    options = {"data_dir": str(folder.parent / "data"), **options}
    command = [sys.executable, "-m"]
    if ranks > 1:
        command += ["torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m"]
    env = os.environ | {
        "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "", "TORCHDYNAMO_DISABLE": "1",
        "EXAMPLE_KILL_AT": str(kill_at), "EXAMPLE_OPTIONS": json.dumps(options),
    }  # fmt: skip
    command += ["tests.examples", str(ROOT / "examples" / script), *args]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=300)
    output = done.stdout + done.stderr
    expected = (-signal.SIGKILL if ranks == 1 else 1) if kill_at else 0
    assert done.returncode == expected, output[-5000:]
    windows, ends = [], []
    for rank in range(ranks):
        lines = (folder / f"rank{rank}.jsonl").read_text().splitlines()
        windows.append([json.loads(line) for line in lines[1:]])
        if not kill_at:
            ends.append((folder / f"rank{rank}.txt").read_text())
    return Run(windows, json.loads(lines[0]), set(ends), output)


def check_resume(
    script: str, folder: Path, *args: str, ranks: int, kill_at: int = 17, again: Any = (),
    options: Any = SMALL,
) -> Run:  # fmt: skip
    """Assert that a run that is killed and run again equals an uninterrupted one, and return that.

    `again`: further arguments of the run after the kill.
    """
    whole = run(script, folder / "whole", *args, ranks=ranks, options=options)
    killed = run(script, folder / "killed", *args, ranks=ranks, kill_at=kill_at, options=options)
    resumed = run(script, folder / "killed", *args, *again, ranks=ranks, options=options)
    for expected, before, after in zip(whole.windows, killed.windows, resumed.windows, strict=True):
        assert len(before) == kill_at
        assert before == expected[:kill_at]
        assert len(expected) - kill_at <= len(after) < len(expected), "it started over, or left a gap"
        assert after == expected[-len(after) :]
    assert resumed.weights == whole.weights
    assert len(whole.weights) == 1, "the ranks have different weights"
    return whole


def check_epochs(whole: Run) -> None:
    """Assert that each epoch has each window once, except for a last step that would not be full.

    The run must have finished its first epoch.
    """
    steps = [list(chain(*step)) for step in zip(*whole.windows, strict=True)]  # over all ranks
    per_epoch, left_out = divmod(whole.n_windows, len(steps[0]))
    epochs = [list(chain(*steps[i : i + per_epoch])) for i in range(0, len(steps), per_epoch)]
    assert len(set(epochs[0])) == whole.n_windows - left_out
    for windows in epochs:
        assert len(set(windows)) == len(windows)
    assert epochs[0][: len(epochs[1])] != epochs[1]


class Recorder:
    """Notes the windows that a model embeds while it trains, and at the end a hash of its weights."""

    def __init__(self, kill_at: int, options: dict[str, Any]) -> None:
        self.kill_at, self.n_batches = kill_at, 0
        self.data: Any = None
        self.root: nn.Module | None = None  # the first module that a training step calls
        self.numbers: dict[bytes, int] = {}  # a window's inputs → its number
        init, setup = lit_gptdata.GPTDataModule.__init__, lit_gptdata.GPTDataModule.setup

        def changed_init(module: Any, *args: Any, **own: Any) -> None:
            init(module, *args, **(own | options))

        def noted_setup(module: Any, stage: Any = None) -> None:
            setup(module, stage)
            self.data = module

        lit_gptdata.GPTDataModule.__init__ = changed_init  # type: ignore[method-assign]
        lit_gptdata.GPTDataModule.setup = noted_setup  # type: ignore[method-assign]
        nn.modules.module.register_module_forward_pre_hook(self.note)
        atexit.register(self.write_weights)

    def write(self, line: Any) -> None:
        with Path(f"rank{os.environ.get('RANK', 0)}.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")

    def note(self, module: nn.Module, args: Any) -> None:
        if not (module.training and torch.is_grad_enabled()):
            return
        if any(parameter.is_meta for parameter in module.parameters()):  # LitGPT counts operations
            return
        self.root = self.root or module
        if not isinstance(module, nn.Embedding) or args[0].ndim != 2:
            return
        if not self.numbers:
            windows = self.data.train_windows
            inputs = windows.batch(np.arange(len(windows)))[0]
            self.numbers = {row.numpy().tobytes(): i for i, row in enumerate(inputs)}
            assert len(self.numbers) == len(windows), "two windows have the same ids"
            self.write(len(windows))
        found = [self.numbers.get(row.numpy().tobytes()) for row in args[0]]
        if None in found:  # position ids
            return
        self.n_batches += 1
        self.write(found)
        if self.n_batches == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def write_weights(self) -> None:
        digest = hashlib.sha256()
        if self.root is not None:
            for parameter in self.root.parameters():
                digest.update(parameter.detach().numpy().tobytes())
            Path(f"rank{os.environ.get('RANK', 0)}.txt").write_text(digest.hexdigest())


if __name__ == "__main__":
    Recorder(int(os.environ["EXAMPLE_KILL_AT"]), json.loads(os.environ["EXAMPLE_OPTIONS"]))
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
