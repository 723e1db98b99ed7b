"""What an import costs, and which way imports point."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import lit_gptdata

PACKAGE = Path(lit_gptdata.__file__).parent
HEAVY = (
    "torch",
    "lightning",
    "matplotlib",
    "transformers",
    "gigatoken",
    "requests",
    "tiktoken",
    "fsspec",
    "numpy",
)

# In the order of the data flow: a file imports only from files above it.
FLOW = [
    "_checks", "_io", "_fsspec", "configs", "hydra_plugin",
    "text.document", "text.download", "text.sample", "text.gutenberg", "text.remote_file",
    "text.formats", "text.listing", "text.files",
    "text.corpus",
    "tokens.tokenizer", "tokens.chunks", "tokens.engines", "tokens.manifest",
    "tokens.shards", "tokens.store",
    "tokens.remote.objects", "tokens.remote.cache", "tokens.remote.store",
    "tokens.build.output", "tokens.build.encode", "tokens.build.parts", "tokens.build.plan",
    "tokens.build.processes", "tokens.build.ray_tasks", "tokens.build.local", "tokens.remote.publish",
    "windows.spans", "windows.split", "windows.order", "windows.steps", "windows.dataset",
    "windows.loader",
    "rng", "resume", "compact", "datamodule",
    "model.stem", "model.block", "model.gpt2_weights", "model.gpt",
    "training.throughput", "training.budget", "training.summary", "training.ranks",
    "report.usage", "report.jobs", "report.axes", "report.plots", "report.page", "report.files",
    "training.sweep", "training.lightning_cli",
    "cli.overrides", "cli.data", "cli.show", "cli.report", "cli.main", "__main__",
]  # fmt: skip
MAY_IMPORT_LIGHTNING = {
    "resume", "compact", "datamodule", "model.stem", "model.gpt", "training.throughput",
    "training.budget", "training.summary", "training.ranks", "training.sweep", "training.lightning_cli",
}  # fmt: skip


def python(code: str, cwd: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=cwd, capture_output=True, text=True, env={"PYTHONPATH": str(PACKAGE.parent), "PATH": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_the_package_does_nothing(tmp_path):
    code = f"""
import logging, sys, lit_gptdata
loaded = [name for name in {HEAVY!r} if name in sys.modules]
assert not loaded, loaded
assert not logging.getLogger().handlers and not logging.getLogger("lit_gptdata").handlers
assert "GPTDataModule" in dir(lit_gptdata)
"""
    python(code, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_tokenising_loads_neither_torch_nor_lightning(tmp_path):
    code = """
import sys
from pathlib import Path
from lit_gptdata.text.corpus import open_corpus
from lit_gptdata.tokens.build.local import prepare_store
from lit_gptdata.tokens.tokenizer import Tokenizer
store = prepare_store(open_corpus("sample"), Tokenizer("gpt2"), Path("tokens"))
assert store.n_tokens > 100_000
heavy = {"torch", "lightning", "matplotlib", "transformers"} & set(sys.modules)
assert not heavy, heavy
"""
    python(code, tmp_path)


@pytest.mark.parametrize("name", lit_gptdata.__all__)
def test_every_public_name_is_there(name):
    assert getattr(lit_gptdata, name).__doc__


def test_an_unknown_name_is_refused():
    with pytest.raises(AttributeError, match=r"has no attribute 'Nope'; it has \['GPT'"):
        _ = lit_gptdata.Nope


def imports_of(path: Path) -> set[str]:
    """Every module that a file imports, wherever in the file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add(node.module)
    return found


def test_imports_point_up_the_flow():
    files = {
        ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in PACKAGE.rglob("*.py")
    }
    modules = {name: path for name, path in files.items() if not name.endswith("__init__")}
    assert set(modules) == set(FLOW)
    for name, path in modules.items():
        above = FLOW[: FLOW.index(name)]
        for imported in imports_of(path):
            if imported.split(".")[0] == "lit_gptdata":
                assert imported.removeprefix("lit_gptdata.") in above, f"{name} imports {imported}"
            if imported.split(".")[0] == "lightning":
                assert name in MAY_IMPORT_LIGHTNING, f"{name} imports lightning"
            if imported.split(".")[0] == "torch":
                assert FLOW.index(name) >= FLOW.index("windows.dataset"), f"{name} imports torch"
