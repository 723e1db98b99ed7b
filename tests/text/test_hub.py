"""hf:// URLs, read from a Hub on loopback, give the same tokens as on disk, or a clear error."""

from __future__ import annotations

import gzip
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from lit_gptdata.text.files import FilesCorpus
from lit_gptdata.tokens.build.local import prepare_store
from lit_gptdata.tokens.store import TokenStore
from lit_gptdata.tokens.tokenizer import Tokenizer
from tests.hub_server import DATASET, Hub, hub_server
from tests.text.test_formats import write_parquet

pytest.importorskip("huggingface_hub")
pytest.importorskip("pyarrow")

ROOT = Path(__file__).parents[2]
GPT2 = Tokenizer("gpt2")
URL = f"hf://datasets/{DATASET}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The dataset's files."""
    folder = tmp_path_factory.mktemp("dataset")
    for name in ("train", "test/more"):
        (folder / name).mkdir(parents=True)
    for i in range(3):
        rows = [f"row {j} of file {i}" for j in range(300)]
        write_parquet(folder / f"train/{i}.parquet", {"text": rows})
    (folder / "test/more/a.txt").write_text("a text\n" * 1000)
    (folder / "test/b.jsonl.gz").write_bytes(gzip.compress(b'{"text": "one"}\n{"text": "two"}\n'))
    (folder / "README.md").write_text("not a text of ours")
    return folder


@pytest.fixture
def hub(folder) -> Iterator[Hub]:
    """A server of the dataset."""
    names = [path for path in folder.rglob("*") if path.is_file()]
    with hub_server({str(path.relative_to(folder)): path.read_bytes() for path in names}) as running:
        yield running


# Builds a store of each corpus and prints its path or the error.
PREPARE = """
import sys
from pathlib import Path
from lit_gptdata.text.files import FilesCorpus
from lit_gptdata.tokens.build.local import prepare_store
from lit_gptdata.tokens.tokenizer import Tokenizer

for corpus in sys.argv[1:]:
    try:
        print(prepare_store(FilesCorpus(corpus), Tokenizer("gpt2"), Path("tokens")).path)
    except OSError as error:
        print(type(error).__name__, *str(error).split())
"""


def prepare(hub: Hub, *corpora: str, **environ: str) -> list[str]:
    """Run PREPARE; returns one line per corpus."""
    done = subprocess.run(
        [sys.executable, "-c", PREPARE, *corpora],
        env=os.environ | hub.environ | {"PYTHONPATH": str(ROOT)} | environ,
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "hf_a_secret" not in done.stdout + done.stderr
    return done.stdout.splitlines()


def test_a_dataset_gives_the_same_store_as_on_disk(hub, folder, tmp_path):
    names = ["", "/train/*.parquet", "/**/*.parquet", "/test/", "/test/more/a.txt"]
    for name, printed in zip(names, prepare(hub, *(URL + name for name in names)), strict=True):
        corpus = FilesCorpus(f"{folder}{name}")
        store, local = TokenStore(printed), prepare_store(corpus, GPT2, tmp_path)
        store.verify()
        assert store.fingerprint == local.fingerprint
        assert (store.tokens[:] == local.tokens[:]).all()
    assert [source.path for source in TokenStore("tokens/" + local.fingerprint).manifest.sources] == [
        f"{URL}{names[-1]}"
    ]


def test_a_private_dataset_needs_a_token_that_is_not_stored(hub):
    hub.token = "hf_a_secret"
    (refused,) = prepare(hub, f"{URL}/train/0.parquet")
    assert f"{URL}/train/0.parquet does not exist" in refused
    assert "make sure you are authenticated" in refused
    (printed,) = prepare(hub, f"{URL}/train/0.parquet", HF_TOKEN=hub.token)
    TokenStore(printed).verify()
    assert hub.tokens_seen == {None, hub.token}
    kept = [path.read_bytes() for path in Path("tokens").rglob("*") if path.is_file()]
    assert not any(hub.token.encode() in content for content in kept)


def test_transient_failures_are_retried(hub):
    hub.failures = 2
    (printed,) = prepare(hub, f"{URL}/train/")
    assert hub.failures == 0
    TokenStore(printed).verify()


def test_a_missing_file_or_dataset_is_named(hub):
    names = ["/nothing.txt", "/train/*.txt", "-of-others/a.txt"]
    for name, printed in zip(names, prepare(hub, *(URL + name for name in names)), strict=True):
        assert printed.startswith(("RemoteNotFoundError ", "FileNotFoundError "))
        assert URL + name in printed
