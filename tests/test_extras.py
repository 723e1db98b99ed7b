"""Without extras, the base package works, and each missing extra names its pip command."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import subprocess
import sys
import venv
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest installs it for Python 3.10

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
BY_OTHERS = {"joblib", "submitit"}  # packages that an extra installs indirectly
# Threads slow down such small tensors.
ENVIRONMENT = {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
OFFLINE = {"https_proxy": "http://127.0.0.1:9", "TIKTOKEN_CACHE_DIR": "/nowhere"}


def package(requirement: str) -> str:
    return Requirement(requirement).name.lower().replace("_", "-")


def extras() -> dict[str, set[str]]:
    """Return each extra except dev and docs, with the packages that only extras install here."""
    base, found = set(map(package, PROJECT["dependencies"])), {}
    for name, lines in PROJECT["optional-dependencies"].items():
        if name not in ("dev", "docs"):
            markers = {line: Requirement(line).marker for line in lines}
            found[name] = {package(line) for line, m in markers.items() if not m or m.evaluate()} - base
            found[name] -= {"protobuf"}  # other packages need it, too, such as tensorboard
    return found


HIDDEN = BY_OTHERS.union(*extras().values())
MODULES = sorted(name.replace("-", "_") for name in HIDDEN)


@pytest.fixture(scope="module")
def base_python(tmp_path_factory) -> Path:
    """Make a Python that has every installed package except the extras, also in its child processes."""
    excluded: set[str] = set()
    for found in importlib.metadata.distributions():
        if package(found.metadata["Name"]) in HIDDEN:
            excluded |= {file.parts[0] for file in found.files or ()}
    folder = tmp_path_factory.mktemp("base")
    venv.create(folder, symlinks=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    for path in map(Path, sys.path):
        if path.name in ("site-packages", "dist-packages"):
            for entry in path.iterdir():
                if entry.name not in excluded and not (packages / entry.name).exists():
                    (packages / entry.name).symlink_to(entry)
    return folder / "bin" / "python"


def run(*command: object, cwd: Path, timeout: float = 300) -> str:
    options = {
        "capture_output": True,
        "text": True,
        "timeout": timeout,
        "env": os.environ | ENVIRONMENT | OFFLINE,
    }
    done = subprocess.run([*map(str, command)], cwd=cwd, **options)
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr[-20_000:]
    return done.stdout


USES = {
    "fast": ["prepare('a.txt', engine='gigatoken')"],
    "gcs": ["prepare('gs://bucket/a.txt')", "prepare(store_url='gs://bucket/store')"],
    "http": ["prepare('http://127.0.0.1:9/a.txt', stream=True)"],
    "parquet": ["prepare('a.parquet')"],
    "s3": ["prepare('s3://bucket/a.txt')", "prepare(store_url='s3://bucket/store')"],
    "zstd": ["prepare('a.txt.zst')"],
    "openai": ["prepare('a.txt', tokenizer='cl100k_base')"],
    "ray": ["prepare('a.txt', build='ray')"],
    "tokenizers": [
        "prepare('a.txt', tokenizer='tok.json')",
        "prepare('a.txt', tokenizer='tokenizer.model')",
        "prepare('a.txt', tokenizer='hf://me/books')",
    ],
    "cli": ["lit_gptdata.GPTCLI"],
    "hf": ["GPT.from_gpt2('gpt2')"],
    "joblib": ["sweep('hydra/launcher=joblib')"],
    "submitit": ["sweep('hydra/launcher=submitit_local')", "sweep('hydra/launcher=submitit_slurm')"],
    "optuna": ["sweep('+sweep=optuna')"],
    "integrations": ["importlib.import_module('lit_gptdata.interop.litgpt')"],
}

WITHOUT_EXTRAS = """
import contextlib, importlib.util, io, json, runpy, sys, warnings
root, modules, uses = map(json.loads, sys.argv[1:])
with warnings.catch_warnings():
    warnings.simplefilter("error")
    import lit_gptdata
    for name in set(lit_gptdata.__all__) - {"GPTCLI"}:  # GPTCLI needs the extra `cli`
        assert getattr(lit_gptdata, name).__doc__
from lit_gptdata import GPT, GPTDataModule

def is_installed(name):
    parent = name.rpartition(".")[0]
    return (not parent or is_installed(parent)) and importlib.util.find_spec(name) is not None

def prepare(*corpus, **options):
    GPTDataModule(*corpus, **options).prepare_data()

def train(*overrides):
    sys.argv = ["train.py", *overrides]
    with contextlib.redirect_stderr(io.StringIO()) as stderr:
        try:
            runpy.run_path(root + "/train.py", run_name="__main__")
        except SystemExit as end:
            if end.code:
                raise RuntimeError(stderr.getvalue())

def sweep(override):
    train("-m", override)

outcomes = {}
for use in uses:
    try:
        outcomes[use] = repr(eval(use))
    except Exception as error:
        outcomes[use] = f"{type(error).__name__}: {error}"
installed = {name: is_installed(name) for name in modules}
train("debug=fast")
print(json.dumps({"installed": installed, "outcomes": outcomes}))
"""


@pytest.fixture(scope="module")
def results(base_python, tmp_path_factory) -> tuple[Path, dict[str, dict[str, Any]]]:
    """Import each public name, try each use, and train, all in one process; return its folder, too."""
    folder = tmp_path_factory.mktemp("uses")
    for name in ("a.txt", "a.parquet", "a.txt.zst"):
        (folder / name).write_bytes(b"some text")
    (folder / "tok.json").write_text("{}")
    (folder / "tokenizer.model").write_bytes(b"\n")
    (folder / "gpt2").mkdir()
    sizes = dict.fromkeys(("vocab_size", "n_positions", "n_embd", "n_layer", "n_head"), 4)
    (folder / "gpt2" / "config.json").write_text(json.dumps(sizes))
    (folder / "gpt2" / "model.safetensors").touch()
    uses = [use for group in USES.values() for use in group]
    values = map(json.dumps, (str(ROOT), [*MODULES, "torch"], uses))
    printed = run(base_python, "-c", WITHOUT_EXTRAS, *values, cwd=folder)
    return folder, json.loads(printed.splitlines()[-1])


def test_every_public_name_can_be_imported(results):
    _, found = results
    assert found["installed"] == dict.fromkeys(MODULES, False) | {"torch": True}


def test_train_py_runs_to_its_end(results):
    (summary,) = results[0].glob("outputs/*/*/summary.txt")
    assert re.search(r"val loss +\d", summary.read_text())


@pytest.mark.parametrize("extra", sorted(name for name, packages in extras().items() if packages))
def test_a_missing_extra_names_its_pip_command(results, extra):
    outcomes = results[1]["outcomes"]
    for use in USES[extra]:
        errors = {"sweep": "RuntimeError", "openai": "FileNotFoundError"}
        kind = errors.get(extra, errors.get(use.partition("(")[0], "ImportError"))
        assert outcomes[use].startswith(kind)
        assert outcomes[use].count("pip install") == 1
        assert f"pip install 'lit-gptdata[{extra}]'" in outcomes[use]


# It would run itself. test_ranks takes minutes and imports nothing that one process does not import.
NOT_RUN = {"test_extras", "test_ranks"}
NEED_AN_EXTRA = {
    "test_agreement", "test_build_ray", "test_gpt2_weights", "test_hub", "test_libraries",
    "test_lightning_cli", "test_publish", "test_remote_file", "test_remote_store",
    "test_train_tokenizer",
}  # fmt: skip


@pytest.mark.heavy
def test_all_other_tests_pass_without_extras(base_python, tmp_path):
    paths = set((ROOT / "tests").rglob("test_*.py")) - set((ROOT / "tests/integrations").iterdir())
    files, report = {path.stem: path for path in paths}, tmp_path / "report.xml"
    ignored = [f"--ignore={path}" for path in (ROOT / "tests/integrations", *map(files.get, NOT_RUN))]
    options = [*ignored, f"--junitxml={report}", "-n", "2", "-p", "no:cacheprovider"]
    command = (base_python, "-m", "pytest", "-q", "-c", ROOT / "pyproject.toml", *options)
    run(*command, ROOT / "tests", cwd=tmp_path, timeout=1200)
    reasons, passed = set(), set()
    for case in ET.parse(report).getroot().iter("testcase"):
        skipped = case.find("skipped")
        if skipped is None:
            names = case.attrib["classname"].split(".")  # tests.cli.test_cli
            passed |= {name for name in names if name.startswith("test_")}
        else:
            reasons.add(skipped.text)
    absent = rf"could not import '(hydra_plugins\.)?({'|'.join(MODULES)})\b"
    known = rf"{absent}|the book is missing: |LIT_GPTDATA_VOCAB|needs a GPU"
    assert [reason for reason in reasons if not re.search(known, reason)] == []
    assert passed == set(files) - NOT_RUN - NEED_AN_EXTRA
