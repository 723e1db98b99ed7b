"""What the README shows, run."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def test_the_python_example_runs(tmp_path):
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert "max_steps=200" in example
    quick = example.replace("max_steps=200", "max_steps=2, limit_val_batches=1")
    checks = """
assert inputs.shape == targets.shape == (4, 256)
assert (inputs[:, 1:] == targets[:, :-1]).all()
assert x.shape == (4, 256, 256)
"""
    done = subprocess.run(
        [sys.executable, "-c", quick + checks], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "windows of 256 every 128 tokens" in done.stdout


def test_every_file_that_is_named_exists():
    root = Path(__file__).parents[1]
    names = re.findall(r"\]\(([^)#:]+)\)", README) + re.findall(
        r"`((?:lit_gptdata|conf)/[\w./]*)`", README
    )
    assert names
    for name in names:
        assert (root / name).exists(), name
