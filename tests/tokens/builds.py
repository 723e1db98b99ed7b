"""What the tests of builds share: texts, build processes, and checks of the result."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import random
import re
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lit_gptdata.text.document import Corpus
from lit_gptdata.text.files import FilesCorpus
from lit_gptdata.tokens.build.encode import Encoder
from lit_gptdata.tokens.build.local import prepare_store
from lit_gptdata.tokens.build.plan import BuildOptions
from lit_gptdata.tokens.store import TokenStore
from lit_gptdata.tokens.tokenizer import Tokenizer

ROOT = Path(__file__).parents[2]
GPT2 = Tokenizer("gpt2")
SHARD_BYTES = 100_000

# A user's script, without `if __name__ == "__main__":`. Prints the folder of the store, or its URL.
SCRIPT = """
import json, sys
from pathlib import Path
from lit_gptdata.text.files import FilesCorpus
from lit_gptdata.tokens.build import encode, plan
from lit_gptdata.tokens.build import local as build
from lit_gptdata.tokens.remote.publish import publish_text
from lit_gptdata.tokens.tokenizer import Tokenizer

corpus, target, shard_bytes, options = sys.argv[1:]
plan.SHARD_BYTES = int(shard_bytes)
{extra}
inputs = FilesCorpus(corpus), Tokenizer("gpt2")
options = plan.BuildOptions(engine="tiktoken", **json.loads(options))
if "://" in target:
    print(publish_text(*inputs, target, options))
else:
    print(build.prepare_store(*inputs, Path(target), options).path)
"""


def build(corpus: Corpus | Path | str | list[Path], root: Path, **options) -> TokenStore:
    """`prepare_store` for gpt2 and a corpus, or the arguments of a `FilesCorpus`."""
    corpus = corpus if isinstance(corpus, Corpus) else FilesCorpus(corpus)
    return prepare_store(corpus, GPT2, root, BuildOptions(**options))


def words(n_bytes: int, seed: int = 0) -> str:
    """Ordinary text, mixed with characters that are difficult for tokenizers."""
    rng = random.Random(seed)
    stock = [
        "the ", "dreary ", "night,\n", "of November.\r\n", "\u00fcn\u00efc\u00f6de ", "\u8a9e\u3002",
        "1818 ", "\U0001f642", "\r", "  \n\n", "<|endoftext|>",
    ]  # fmt: skip
    weights = [30, 20, 10, 5, 5, 5, 5, 2, 1, 1, 0.01]
    text = "".join(rng.choices(stock, weights, k=n_bytes // 5))
    return text.encode()[:n_bytes].decode(errors="ignore")


def write_txt(path: Path, text: str) -> Path:
    path.write_text(text, "utf-8", newline="")
    return path


def mixed(folder: Path) -> list[tuple[int, str]]:
    """Write files of several formats; returns (index of the file, text) of every document."""
    folder.mkdir()
    long = write_txt(folder / "a.txt", words(450_000))
    rows = [words(n, n) for n in (3, 900, 40_000, 70_001, 5)] + ["", "after an empty one"]
    lines = [json.dumps({"text": row}, ensure_ascii=False) for row in (None, *rows)]
    (folder / "b.jsonl").write_text("\n".join(lines))
    plain = write_txt(folder / "c.txt", words(350_000, 3))
    (folder / "c.txt.gz").write_bytes(gzip.compress(plain.read_bytes()))
    compressed_text = plain.read_text("utf-8")
    plain.unlink()
    small = [write_txt(folder / f"d{i}.txt", words(9000, 10 + i)).read_text("utf-8") for i in range(9)]
    return [
        (0, long.read_text("utf-8")),
        *((1, row) for row in rows),
        (2, compressed_text),
        *((3 + i, text) for i, text in enumerate(small)),
    ]


def assert_holds(store: TokenStore, texts: list[str]) -> None:
    """Assert that the store has tiktoken's ids of the texts, with 50256 between them."""
    store.verify()
    allowed = {"<|endoftext|>"}
    ids = [GPT2.reference.encoding.encode(text, allowed_special=allowed) for text in texts]
    expected = [i for one in ids for i in [50256, *one]][1:]
    assert store.n_tokens == len(expected)
    assert np.array_equal(store.tokens[:], expected)
    assert store.n_documents == len(texts)
    assert contents(store).keys() == {file.name for file in store.files} | {"manifest.json"}


def assert_builds(path: Path, root: Path, **options) -> None:
    """Assert that a build of one text file gives its tokens and leaves no other file."""
    assert_holds(build(path, root, **options), [path.read_text("utf-8")])
    assert not litter(root)


def contents(store: TokenStore) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in store.path.iterdir()}


def stores(root: Path) -> list[Path]:
    return [path for path in root.iterdir() if not path.name.startswith(".")] if root.is_dir() else []


def litter(root: Path) -> list[Path]:
    """Files that no later run needs."""
    return [*(root / ".building").iterdir(), *root.rglob("*.tmp")]


def records(root: Path) -> list[Path]:
    """The records of finished work units."""
    return list(root.glob(".building/*/parts/*.json"))


def failure(
    corpus: FilesCorpus, root: Path, workers: int, tokenizer: Tokenizer = GPT2, **options
) -> Exception:
    with pytest.raises(Exception) as caught:  # noqa: PT011 that both are the same is what matters
        prepare_store(corpus, tokenizer, root, BuildOptions(workers=workers, **options))
    assert not stores(root)
    return caught.value


def start(
    corpus: Path, target: Path | str, *, extra: str = "", stderr: Any = subprocess.PIPE, **options
) -> subprocess.Popen[str]:
    """A build in its own process, like a command in a terminal; `options` of `BuildOptions`."""
    code = SCRIPT.format(extra=extra)
    command = ["-W", "error", "-c", code, corpus, target, SHARD_BYTES, json.dumps(options)]
    return subprocess.Popen(
        [sys.executable, *map(str, command)], env=os.environ | {"PYTHONPATH": str(ROOT)}, text=True,
        stdout=subprocess.PIPE, stderr=stderr, start_new_session=True,
    )  # fmt: skip


def kill(process: subprocess.Popen[str]) -> None:
    """Kill a build and wait until its workers have ended."""
    pids = children(process.pid) if process.poll() is None else []
    process.kill()
    process.communicate()
    wait_for(lambda: not any(map(alive, pids)), seconds=5)


def change_during_build(patch: pytest.MonkeyPatch, path: Path, text: str) -> None:
    """Give a file another text just before its work unit 1 is encoded."""
    encode_unit = Encoder.encode_unit

    def meddle(encoder, unit, *rest):
        if unit == 1:
            write_txt(path, text)
        return encode_unit(encoder, unit, *rest)

    patch.setattr(Encoder, "encode_unit", meddle)


def wait_for(condition, process: subprocess.Popen[str] | None = None, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process is None or process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.002)


def children(pid: int) -> list[int]:
    """The worker processes of a build, without the resource tracker of Python."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it ended
        found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return [int(c) for c in found if b"spawn_main" in Path(f"/proc/{c}/cmdline").read_bytes()]
    return []


def alive(pid: int) -> bool:
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


@contextlib.contextmanager
def file_size_limit(n_bytes: int) -> Iterator[None]:
    """Limit the size of files; Python ignores SIGXFSZ, so a write beyond it fails with EFBIG."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def without_progress(errors: str) -> list[str]:
    """The lines that a build wrote to stderr, except those about its progress."""
    return [line for line in errors.splitlines() if not re.match("(hashing|tokenizing): ", line)]
