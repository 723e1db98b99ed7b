"""Without the extras: what needs none works, and what needs one says how to install it."""

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

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # which pytest needs there

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
NAMED = ("ray", "s3fs", "pyarrow", "zstandard", "gigatoken")
BEHIND = {"joblib", "submitit", "transformers"}  # of an extra's package, and a reference in tests

ENVIRONMENT = {
    "PYTHONPATH": str(ROOT),
    "PYTHONDONTWRITEBYTECODE": "1",
    "OMP_NUM_THREADS": "1",  # tensors this small lose time to threads
}


def package(requirement: str) -> str:
    return re.match(r"[\w.-]+", requirement)[0].lower().replace("_", "-")


def extras() -> dict[str, set[str]]:
    """Each extra but dev, and the packages that it alone brings."""
    base = {package(requirement) for requirement in PROJECT["dependencies"]}
    return {
        name: {package(requirement) for requirement in requirements} - base
        for name, requirements in PROJECT["optional-dependencies"].items()
        if name != "dev"
    }


@pytest.fixture(scope="module")
def bare(tmp_path_factory) -> Path:
    """A Python with links to all that is installed but the extras; its child processes are it too."""
    hidden, left_out = BEHIND.union(*extras().values()), set()
    for found in importlib.metadata.distributions():
        if package(found.metadata["Name"]) in hidden:
            left_out |= {file.parts[0] for file in found.files or ()}
    folder = tmp_path_factory.mktemp("bare")
    venv.create(folder, symlinks=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    for path in map(Path, sys.path):
        if path.name in ("site-packages", "dist-packages"):
            for entry in path.iterdir():
                if entry.name not in left_out and not (packages / entry.name).exists():
                    (packages / entry.name).symlink_to(entry)
    return folder / "bin" / "python"


def run(*command: object, cwd: Path, timeout: float = 120) -> str:
    done = subprocess.run(
        [*map(str, command)],
        cwd=cwd, capture_output=True, text=True, timeout=timeout,
        env=os.environ | ENVIRONMENT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr[-20_000:]
    return done.stdout


IMPORTED = """
import importlib.util, json, sys
import lit_gptdata
for name in lit_gptdata.__all__:
    assert getattr(lit_gptdata, name).__doc__
print(json.dumps({name: importlib.util.find_spec(name) is not None for name in sys.argv[1:]}))
"""


def test_every_public_name_is_there(bare, tmp_path):
    modules = {name.replace("-", "_") for name in BEHIND.union(*extras().values())}
    assert modules > set(NAMED)
    found = json.loads(run(bare, "-W", "error", "-c", IMPORTED, *modules, "torch", cwd=tmp_path))
    assert found == dict.fromkeys(modules, False) | {"torch": True}


def test_the_main_job_runs_to_its_end(bare, tmp_path):
    run(bare, ROOT / "train.py", "debug=fast", cwd=tmp_path)
    (summary,) = tmp_path.glob("outputs/*/*/summary.txt")
    assert re.search(r"val loss +\d", summary.read_text())


# What is missed --------------------------------------------------------------------------------

USES = {
    "fast": ["prepare('a.txt', engine='gigatoken')"],
    "gcs": ["prepare('gs://bucket/a.txt')", "prepare(store_url='gs://bucket/store')"],
    "http": ["prepare('http://127.0.0.1:9/a.txt', stream=True)"],
    "parquet": ["prepare('a.parquet')"],
    "s3": ["prepare('s3://bucket/a.txt')", "prepare(store_url='s3://bucket/store')"],
    "zstd": ["prepare('a.txt.zst')"],
    "ray": ["prepare('a.txt', build='ray')"],
    "cli": ["importlib.import_module('lit_gptdata.training.lightning_cli')"],
    "hf": ["GPT.from_gpt2('gpt2')"],
    "joblib": ["train('hydra/launcher=joblib')"],
    "submitit": ["train('hydra/launcher=submitit_local')", "train('hydra/launcher=submitit_slurm')"],
    "optuna": ["train('+sweep=optuna')"],
}

ASKED = """
import contextlib, importlib, io, json, runpy, sys
from lit_gptdata import GPT, GPTDataModule

def prepare(*corpus, **options):
    GPTDataModule(*corpus, **options).prepare_data()

def train(override):
    sys.argv = ["train.py", "-m", override]
    with contextlib.redirect_stderr(io.StringIO()) as told:
        try:
            runpy.run_path(root + "/train.py", run_name="__main__")
        except SystemExit as end:
            raise RuntimeError(told.getvalue()) if end.code else None

root, uses = sys.argv[1], json.loads(sys.argv[2])
answers = {}
for use in uses:
    try:
        answers[use] = repr(eval(use))
    except Exception as error:
        answers[use] = f"{type(error).__name__}: {error}"
print(json.dumps(answers))
"""


@pytest.fixture(scope="module")
def answers(bare, tmp_path_factory) -> dict[str, str]:
    """What each use in USES ends with."""
    folder = tmp_path_factory.mktemp("uses")
    for name in ("a.txt", "a.parquet", "a.txt.zst"):
        (folder / name).write_bytes(b"some text")
    (folder / "gpt2").mkdir()
    sizes = dict.fromkeys(("vocab_size", "n_positions", "n_embd", "n_layer", "n_head"), 4)
    (folder / "gpt2" / "config.json").write_text(json.dumps(sizes))
    (folder / "gpt2" / "model.safetensors").touch()
    uses = json.dumps([use for several in USES.values() for use in several])
    return json.loads(run(bare, "-c", ASKED, ROOT, uses, cwd=folder).splitlines()[-1])


@pytest.mark.parametrize("extra", sorted(extras()))
def test_what_needs_an_extra_answers_with_its_pip_line(answers, extra):
    for use in USES[extra]:
        assert answers[use].startswith("RuntimeError" if "train" in use else "ImportError")
        assert answers[use].count("pip install") == 1
        assert f"pip install 'lit-gptdata[{extra}]'" in answers[use]


# The tests that need none -------------------------------------------------------------------------

LEFT_OUT = {
    "test_extras": "runs all others here",
    "test_ranks": "a minute or two of train.py in several processes; one process imports as much",
}
NEED_ONE = {
    "test_build_ray", "test_hub", "test_lightning_cli", "test_publish", "test_remote_store",
    "test_remote_text",
}  # fmt: skip


@pytest.mark.heavy
def test_the_base_tests_pass(bare, tmp_path):
    report, ignored = tmp_path / "report.xml", [f"--ignore={ROOT}/tests/{name}.py" for name in LEFT_OUT]
    run(
        bare, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", ROOT / "pyproject.toml",
        f"--junitxml={report}", *ignored, ROOT / "tests", cwd=tmp_path, timeout=1200,
    )  # fmt: skip
    reasons, passed = set(), set()
    for case in ET.parse(report).getroot().iter("testcase"):
        skipped = case.find("skipped")
        if skipped is None:
            passed.add(case.attrib["classname"].split(".")[1])
        else:
            reasons.add(skipped.text)
    modules = "|".join(package.replace("-", "_") for package in BEHIND.union(*extras().values()))
    known = rf"could not import '(hydra_plugins\.)?({modules})\b|the book is not here: "
    assert [reason for reason in reasons if not re.search(known, reason)] == []
    files = {path.stem for path in (ROOT / "tests").glob("test_*.py")}
    assert passed == files - set(LEFT_OUT) - NEED_ONE
