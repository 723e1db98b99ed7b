"""Scripts of examples/ that need no extra: killed and run again, they train on the same windows."""

from __future__ import annotations

import ast
import re

import pytest

import lit_gptdata
from tests.examples import ROOT, check_epochs, check_resume

SCRIPTS = sorted(path for path in (ROOT / "examples").rglob("*.py"))


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("script", "ranks"), [("fabric_loop.py", 1), ("fabric_loop.py", 2), ("ddp_loop.py", 2)]
)
def test_a_killed_loop_continues_exactly(script, ranks, tmp_path):
    check_epochs(check_resume(script, tmp_path, ranks=ranks))


@pytest.mark.heavy
def test_a_killed_run_of_train_py_with_an_own_model_continues_exactly(tmp_path):
    options = ["max_tokens=1920", "trainer.val_check_interval=5", "trainer.limit_val_batches=1"]
    options += ["data=sample", "model.width=8", "threads=1", "output_dir=run", "model=lstm"]
    command = ["../train.py", tmp_path, "--config-dir", str(ROOT / "examples" / "own_model"), *options]
    check_epochs(check_resume(*command, again=["ckpt_path=last"], ranks=1))


def test_the_table_names_every_script_and_its_command():
    table = (ROOT / "examples" / "README.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| \[[\w./]+\]\(([\w./]+)\) \|.*`(.*)` \|$", table, re.MULTILINE))
    assert sorted(rows) == [str(path.relative_to(ROOT / "examples")) for path in SCRIPTS]
    for script, command in rows.items():
        assert f"examples/{script.partition('/')[0]}" in command


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_an_example_is_short_and_imports_only_public_names(path):
    source = path.read_text(encoding="utf-8")
    assert 20 <= sum(map(bool, source.splitlines())) <= 60
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "lit_gptdata":
            names = {name.name for name in node.names}
            assert node.module == "lit_gptdata.interop.litgpt" or names <= set(lit_gptdata.__all__)
