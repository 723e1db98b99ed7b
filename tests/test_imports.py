"""Imports are cheap and follow the data flow; files, functions and folders stay small."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

import lit_gptdata

PACKAGE = Path(lit_gptdata.__file__).parent
LARGE_PACKAGES = (
    "torch", "lightning", "matplotlib", "transformers", "gigatoken", "requests", "tiktoken", "fsspec",
    "numpy",
)  # fmt: skip

# The order of the data flow. A file imports only from files before it in this list.
FLOW = [
    "_checks", "_io", "_fsspec", "configs", "hydra_plugin",
    "text.document", "text.sample", "text.gutenberg", "text.remote_file", "text.content",
    "text.formats", "text.download", "text.listing", "text.files",
    "text.corpus",
    "tokens.libraries.reference", "tokens.chunks",
    "tokens.libraries.tiktoken_encoding", "tokens.libraries.vocabularies",
    "tokens.libraries.hugging_face", "tokens.libraries.sentencepiece_model", "tokens.libraries.hub",
    "tokens.libraries.reading",
    "tokens.tokenizer", "tokens.gigatoken", "tokens.engines", "tokens.manifest",
    "tokens.shards", "tokens.libraries.train", "tokens.libraries.files", "tokens.store",
    "tokens.coverage",
    "tokens.remote.objects", "tokens.remote.cache", "tokens.remote.store",
    "tokens.build.output", "tokens.build.plan", "tokens.build.filters", "tokens.build.encode",
    "tokens.build.processes", "tokens.build.ray_tasks", "tokens.build.local", "tokens.remote.publish",
    "tokens.source", "tokens.options",
    "windows.split", "windows.order", "windows.steps",
    "windows.packing", "windows.dataset",
    "windows.ranks", "windows.mixture", "windows.sources", "windows.identity",
    "report.show", "report.overview", "windows.sampler", "windows.loader",
    "_lightning", "random_states", "resume", "datamodule",
    "model.stem", "model.documents", "model.block", "model.gpt2_weights", "model.learning_rate",
    "model.sampling", "model.scores", "model.gpt",
    "report.jobs", "training.errors", "training.folder", "training.throughput", "training.budget",
    "training.checkpoints", "training.scores", "training.val_sets", "training.summary",
    "report.duplicates", "report.documents", "report.scoring",
    "report.usage", "report.rows", "report.plots", "report.page",
    "training.loggers", "training.sweep", "training.lightning_cli",
    "interop.blocks", "interop.flat", "interop.megatron", "interop.columns",
    "interop.formats", "interop.importing", "interop.exporting", "interop.litgpt",
    "cli.overrides", "cli.data", "cli.show",
    "cli.train_tokenizer", "cli.train", "cli.generate", "cli.score", "cli.interop", "cli.rerun",
    "cli.app", "cli.main", "__main__",
]  # fmt: skip
MAY_IMPORT_LIGHTNING = {
    "_lightning", "resume", "datamodule", "model.stem", "model.scores", "model.gpt",
    "training.throughput", "training.budget", "training.checkpoints", "training.loggers",
    "training.scores", "training.val_sets", "training.summary",
    "training.folder", "training.sweep", "training.lightning_cli",
    "report.scoring", "cli.train",
}  # fmt: skip


FILES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path
    for path in PACKAGE.rglob("*.py")
    if path.name != "__init__.py"
}


def python(code: str, cwd: Path) -> None:
    env = {"PYTHONPATH": str(PACKAGE.parent), "PATH": ""}
    subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=cwd, env=env, check=True)


def test_importing_the_package_imports_nothing_large_and_writes_nothing(tmp_path):
    code = f"""
import logging, sys, lit_gptdata
imported = [name for name in {LARGE_PACKAGES!r} if name in sys.modules]
assert not imported, imported
assert not logging.getLogger().handlers and not logging.getLogger("lit_gptdata").handlers
assert "GPTDataModule" in dir(lit_gptdata)
"""
    python(code, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_tokenizing_does_not_import_torch_or_lightning(tmp_path):
    code = """
import sys
from pathlib import Path
from lit_gptdata.text.corpus import open_corpus
from lit_gptdata.tokens.build.local import prepare_store
from lit_gptdata.tokens.tokenizer import Tokenizer
store = prepare_store(open_corpus("sample"), Tokenizer("gpt2"), Path("tokens"))
assert store.n_tokens > 100_000
large = {"torch", "lightning", "matplotlib", "transformers"} & set(sys.modules)
assert not large, large
"""
    python(code, tmp_path)


@pytest.mark.parametrize("name", lit_gptdata.__all__)
def test_every_public_name_can_be_imported(name):
    if name == "GPTCLI":
        pytest.importorskip("jsonargparse")
    assert getattr(lit_gptdata, name).__doc__


def test_an_unknown_name_raises_attribute_error():
    with pytest.raises(AttributeError, match=r"has no attribute 'Nope'; it has \['GPT'"):
        _ = lit_gptdata.Nope


def modules_imported_by(path: Path) -> set[str]:
    """List every module that a file imports, at its top or inside a function."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {node.module} if [name.name for name in node.names] != ["__version__"] else set()
    return found


def test_the_order_of_the_data_flow_names_every_file_once():
    assert sorted(FLOW) == sorted(FILES)


@pytest.mark.parametrize("name", FLOW)
def test_a_file_imports_only_files_before_it_in_the_data_flow(name):
    before = FLOW[: FLOW.index(name)]
    for module in modules_imported_by(FILES[name]):
        package = module.split(".")[0]
        if package == "lit_gptdata":
            assert module.removeprefix("lit_gptdata.") in before, f"{name} imports {module}"
        if package == "lightning":
            assert name in MAY_IMPORT_LIGHTNING, f"{name} imports lightning"
        if package == "torch":
            assert FLOW.index(name) >= FLOW.index("windows.dataset"), f"{name} imports torch"


def test_files_have_at_most_400_lines_and_functions_60():
    too_long = []
    for name, path in FILES.items():
        source = path.read_text(encoding="utf-8")
        if (n_lines := len(source.splitlines())) > 400:
            too_long.append((name, n_lines))
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                n_lines = node.end_lineno - node.lineno + 1
                too_long += [(f"{name}.{node.name}", n_lines)] if n_lines > 60 else []
    assert too_long == []


def test_the_package_has_at_most_10_files_and_a_folder_in_it_11():
    n_files = Counter(path.parent for path in FILES.values())
    assert n_files[PACKAGE] <= 10
    assert max(n_files.values()) <= 11, n_files.most_common(1)
