"""Builds with many work units and processes: killed, interrupted, on full disks, with changing files."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import gzip
import json
import multiprocessing
import os
import pty
import random
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiktoken
from filelock import FileLock
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_gptdata.text import files
from lit_gptdata.text.document import Corpus, Document
from lit_gptdata.text.files import FilesCorpus
from lit_gptdata.tokens.build import encode, plan
from lit_gptdata.tokens.build import local as module
from lit_gptdata.tokens.build.encode import Encoder
from lit_gptdata.tokens.build.local import find_store, prepare_store
from lit_gptdata.tokens.build.output import FolderOutput
from lit_gptdata.tokens.build.plan import BuildOptions
from lit_gptdata.tokens.shards import FileShardWriter
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


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch) -> None:
    monkeypatch.setattr(plan, "SHARD_BYTES", SHARD_BYTES)


def heavy(*values: Any) -> Any:
    """The values of a test that runs only with `-m heavy`."""
    return pytest.param(*values, marks=pytest.mark.heavy)


def written_from_now_on(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list to which this process adds the number of each work unit that it encodes."""
    seen: list[int] = []
    encode_unit = Encoder.encode_unit

    def recorded(encoder, unit, *args, **kwargs):
        seen.append(unit)
        return encode_unit(encoder, unit, *args, **kwargs)

    monkeypatch.setattr(Encoder, "encode_unit", recorded)
    return seen


@pytest.fixture
def written(monkeypatch) -> list[int]:
    """The work units that this process encoded."""
    return written_from_now_on(monkeypatch)


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
    path.write_text(text, encoding="utf-8", newline="")
    return path


def read_txt(path: Path) -> str:
    with open(path, encoding="utf-8") as file:
        return file.read()


def mixed(folder: Path) -> list[tuple[int, str]]:
    """Write files of several formats; returns (index of the file, text) of every document."""
    folder.mkdir()
    long = write_txt(folder / "a.txt", words(450_000))
    rows = [words(n, n) for n in (3, 900, 40_000, 70_001, 5)] + ["", "after an empty one"]
    lines = [json.dumps({"text": row}, ensure_ascii=False) for row in (None, *rows)]
    (folder / "b.jsonl").write_text("\n".join(lines))
    plain = write_txt(folder / "c.txt", words(350_000, 3))
    (folder / "c.txt.gz").write_bytes(gzip.compress(plain.read_bytes()))
    compressed_text = read_txt(plain)
    plain.unlink()
    small = [read_txt(write_txt(folder / f"d{i}.txt", words(9000, 10 + i))) for i in range(9)]
    return [
        (0, read_txt(long)),
        *((1, row) for row in rows),
        (2, compressed_text),
        *((3 + i, text) for i, text in enumerate(small)),
    ]


def reference(texts: list[str]) -> np.ndarray:
    """The ids that tiktoken gives for the texts, with 50256 between them."""
    allowed = {"<|endoftext|>"}
    ids = [GPT2.encoding.encode(text, allowed_special=allowed) for text in texts]
    return np.array([i for one in ids for i in [50256, *one]][1:])


def assert_holds(store: TokenStore, texts: list[str]) -> None:
    store.verify()
    expected = reference(texts)
    assert store.n_tokens == len(expected)
    assert np.array_equal(store.tokens[:], expected)
    assert store.n_documents == len(texts)
    listed = {file.name for file in store.files} | {"manifest.json", "vocab.bin"}
    assert {path.name for path in store.path.iterdir()} == listed


def stores(root: Path) -> list[Path]:
    return [path for path in root.iterdir() if not path.name.startswith(".")] if root.is_dir() else []


def litter(root: Path) -> list[Path]:
    """Files that no later run needs."""
    return [*(root / ".building").iterdir(), *root.rglob("*.tmp")]


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


def wait_for(condition, process: subprocess.Popen[str] | None = None, seconds: float = 30) -> None:
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


def records(root: Path) -> list[Path]:
    """The records of finished work units."""
    return list(root.glob(".building/*/parts/*.json"))


# The same for any number of workers ----------------------------------------------------------------


def contents(store: TokenStore) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in store.path.iterdir()}


def test_workers_and_engines_write_the_same_bytes(tmp_path):
    texts = [text for _, text in mixed(tmp_path / "corpus")]
    corpus = FilesCorpus(tmp_path / "corpus")
    engines = ["tiktoken"]
    with contextlib.suppress(ImportError):
        import gigatoken  # noqa: F401

        engines.append("gigatoken")
    built = [
        build(corpus, tmp_path / f"{engine}{workers}", engine=engine, workers=workers)
        for engine in engines
        for workers in (1, 2, 3)
    ]
    assert_holds(built[0], texts)
    first = contents(built[0])
    assert len({name[:5] for name in first if name.endswith(".idx")}) > 5  # work units
    assert any(name.endswith("-002.bin") for name in first)  # a unit with several shards
    for store in built[1:]:
        assert store.fingerprint == built[0].fingerprint
        assert contents(store) == first


def test_every_row_of_the_index_gives_the_place_of_its_chunk(tmp_path):
    documents = mixed(tmp_path / "corpus")
    store = build(tmp_path / "corpus", tmp_path / "tokens")
    rows = np.concatenate([store.rows(i) for i in range(len(store.shards))])
    assert len(store.shards) > 8
    utf8 = "".join(text for _, text in documents).encode()
    assert rows["source"][rows["document"] == 1].tolist() == [number for number, _ in documents]
    lengths = [len(text.encode()) for _, text in documents]
    assert rows["byte"][rows["document"] == 1].tolist() == [0, *np.cumsum(lengths)[:-1]]
    ends = [*rows[1:], np.array((store.n_tokens, len(utf8), 0, 0), rows.dtype)]
    for row, end in zip(rows, ends, strict=True):
        ids = store.tokens[int(row["token"]) : int(end["token"])]
        if end["document"]:
            assert ids[-1] == 50256
            ids = ids[:-1]
        assert GPT2.encoding.decode_bytes(ids.tolist()) == utf8[row["byte"] : end["byte"]]


@settings(max_examples=25, deadline=None)
@given(
    rows=st.lists(
        st.none() | st.sampled_from(["", "one", "two words", "x" * 60]), min_size=1, max_size=9
    ),
    size=st.integers(1, 120),
)
def test_units_without_documents_and_documents_without_text(tmp_path_factory, rows, size):
    folder = tmp_path_factory.mktemp("j")
    path = folder / "a.jsonl"
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "SHARD_BYTES", size)
        texts = [row for row in rows if row is not None]
        if len(texts) < 2 and not any(texts):
            with pytest.raises(ValueError, match=r"FilesCorpus\(1 file: .*\) holds no text: give files"):
                build(path, folder / "tokens", engine="tiktoken")
            assert not litter(folder / "tokens")
            return
        store = build(path, folder / "tokens", engine="tiktoken")
    assert_holds(store, texts)


def test_a_file_name_may_be_any_bytes(tmp_path):
    path = write_txt(tmp_path / "caf\udce9.txt", "some text")
    assert_holds(build(path, tmp_path / "tokens"), ["some text"])
    assert find_store(FilesCorpus(path), GPT2, tmp_path / "tokens")


@pytest.mark.parametrize("workers", [1, 2])
def test_a_document_that_is_too_long_is_refused_even_if_it_is_cut_into_units(tmp_path, workers):
    path = tmp_path / "a.txt"
    for n_bytes, limit in ((350_000, 300_000), (90_000, 80_000)):
        write_txt(path, words(n_bytes))
        message = rf"{path}: the document is longer than max_document_bytes={limit:,}: leave it out"
        with pytest.raises(ValueError, match=message):
            build(path, tmp_path / "t", workers=workers, max_document_bytes=limit)
    build(path, tmp_path / "t", workers=workers, max_document_bytes=90_000)


def test_a_lower_limit_does_not_reuse_the_units_of_an_earlier_build(tmp_path):
    (tmp_path / "books").mkdir()
    write_txt(tmp_path / "books" / "a.txt", words(90_000))
    write_txt(tmp_path / "books" / "b.txt", words(95_000))
    for limit, name in ((92_000, "b.txt"), (80_000, "a.txt")):
        with pytest.raises(ValueError, match=rf"{name}: the document is longer than max_document_bytes"):
            build(tmp_path / "books", tmp_path / "t", workers=1, max_document_bytes=limit)


def test_an_error_names_the_document(tmp_path):
    class Broken:
        fingerprint = "1"

        def __iter__(self) -> Iterator[Document]:
            yield Document(source="mine", chunks=[b"caf\xe9"])

    with pytest.raises(UnicodeError, match=r"^mine: .*0xe9"):
        build(Broken(), tmp_path, engine="tiktoken")


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("ray", ImportError, r"build='ray' needs the package ray: pip install 'lit-gptdata\[ray\]'"),
        ("dask", ValueError, r"unknown build 'dask': choose 'processes' .* or 'ray' \(tasks on a Ray"),
    ],
)
def test_an_unknown_build_or_a_missing_package_is_reported(tmp_path, monkeypatch, name, error, message):
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "lit_gptdata.tokens.build.ray_tasks", raising=False)
    path = write_txt(tmp_path / "a.txt", "some text")
    with pytest.raises(error, match=message):
        build(path, tmp_path / "t", build=name)
    assert not (tmp_path / "t").exists()


# Errors of a worker --------------------------------------------------------------------------------


def failure(
    corpus: FilesCorpus, root: Path, workers: int, tokenizer: Tokenizer = GPT2, **options
) -> Exception:
    with pytest.raises(Exception) as caught:  # noqa: PT011 that both are the same is what matters
        prepare_store(corpus, tokenizer, root, BuildOptions(workers=workers, **options))
    assert not stores(root)
    return caught.value


def test_an_error_in_a_worker_is_the_same_error(tmp_path):
    for name in "abcd":
        write_txt(tmp_path / f"{name}.txt", words(90_000))
    (tmp_path / "b.txt").write_bytes(b"x" * 80_000 + b" caf\xe9")
    corpus = FilesCorpus(tmp_path)
    alone, worker = (failure(corpus, tmp_path / "t", workers, engine="tiktoken") for workers in (1, 2))
    assert "b.txt is not valid UTF-8: byte 0xe9 at offset 80004" in str(alone)
    assert (type(worker), str(worker)) == (type(alone), str(alone))
    ranks = {bytes([byte]): byte for byte in range(256)}
    own = Tokenizer(
        tiktoken.Encoding("own", pat_str=r"\S+|\s+", mergeable_ranks=ranks, special_tokens={})
    )
    # gigatoken refuses this encoding, or is not installed
    alone, worker = (failure(corpus, tmp_path / "t", n, own, engine="gigatoken") for n in (1, 2))
    assert "engine='gigatoken'" in str(alone)
    assert (type(worker), str(worker)) == (type(alone), str(alone))


def test_a_killed_worker_is_reported_and_the_build_resumes(tmp_path):
    texts = [text for _, text in mixed(tmp_path / "corpus")]
    corpus, root = FilesCorpus(tmp_path / "corpus"), tmp_path / "tokens"

    def kill_one() -> None:
        wait_for(lambda: records(root))
        os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)

    killer = threading.Thread(target=kill_one)
    killer.start()
    with pytest.raises(
        RuntimeError, match=r"a worker process was killed.* build_workers=2; finished work is kept"
    ):
        build(corpus, root, engine="tiktoken", workers=2)
    killer.join()
    assert_holds(build(corpus, root, engine="tiktoken"), texts)
    assert not litter(root)


def test_a_failed_build_does_not_wait_for_the_hashes(tmp_path, monkeypatch):
    def slow(path, on_bytes):
        for _ in range(3000):
            time.sleep(0.01)
            on_bytes(1)

    monkeypatch.setattr(files, "sha256_of", slow)
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    start = time.monotonic()
    with pytest.raises(UnicodeError):
        build(tmp_path / "a.txt", tmp_path / "t")
    assert time.monotonic() - start < 10


# Resume --------------------------------------------------------------------------------------------


def test_a_changed_file_restarts_the_build(tmp_path, written):
    for name in "abcd":
        write_txt(tmp_path / f"{name}.txt", words(90_000, ord(name)))
    (tmp_path / "c.txt").write_bytes(b"caf\xe9" * 20_000)
    root = tmp_path / "tokens"
    for _ in range(2):  # the second run keeps the first two units
        with pytest.raises(UnicodeError, match=r"c.txt is not valid UTF-8: byte 0xe9 at offset 3"):
            build(tmp_path, root)
    assert written == [0, 1, 2, 2]
    write_txt(tmp_path / "c.txt", "caf\u00e9")
    write_txt(tmp_path / "a.txt", words(90_000, 99))
    store = build(tmp_path, root)
    assert_holds(store, [read_txt(tmp_path / f"{name}.txt") for name in "abcd"])
    assert not litter(root)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_killed_build_resumes_where_it_stopped(tmp_path, written, workers):
    path = write_txt(tmp_path / "a.txt", words(2_000_000))
    root = tmp_path / "tokens"
    process = start(path, root, workers=workers)
    wait_for(lambda: len(records(root)) >= 3, process)
    pids = children(process.pid)
    assert len(pids) == (0 if workers == 1 else workers)
    process.kill()
    process.communicate()
    wait_for(lambda: not any(map(alive, pids)), seconds=5)
    assert find_store(FilesCorpus(path), GPT2, root) is None
    assert not stores(root)
    finished = {int(record.stem) for record in records(root)}
    n_units = 20
    assert 3 <= len(finished) < n_units
    shards = [shard for record in records(root) for shard in json.loads(record.read_text())]
    listed = [file["name"] for shard in shards for file in shard["files"]]
    folder = next(root.glob(".building/*/store"))
    inodes = {name: (folder / name).stat().st_ino for name in listed}
    store = build(path, root)
    assert set(written) == set(range(n_units)) - finished
    assert {name: (store.path / name).stat().st_ino for name in listed} == inodes
    assert_holds(store, [read_txt(path)])
    assert not litter(root)


def test_a_late_worker_of_an_older_plan_cannot_write(tmp_path, monkeypatch):
    """Such as a cluster node that was cut off and does not know that its driver is dead."""
    path = write_txt(tmp_path / "a.txt", "caf\u00e9 " * 20_000)
    (tmp_path / "b.txt").write_bytes(b"caf\xe9")
    root = tmp_path / "tokens"
    with pytest.raises(UnicodeError):
        build(tmp_path, root)
    (store,) = root.glob(".building/*/store")
    late = FileShardWriter(store, "00000-000", GPT2.dtype)
    encode_corpus = module.encode_corpus

    def meddled(*args):
        shards = encode_corpus(*args)
        with pytest.raises(FileNotFoundError):
            late.finish()
        late.discard()
        return shards

    monkeypatch.setattr(module, "encode_corpus", meddled)
    write_txt(path, "tea " * 20_000)
    (tmp_path / "b.txt").write_bytes(b"coffee")
    assert_holds(build(tmp_path, root), ["tea " * 20_000, "coffee"])
    assert not litter(root)


def test_a_file_that_vanishes_during_the_listing_is_not_an_error(tmp_path):
    """Such as the temporary file of a worker right after its parent was killed."""
    for name in ("store", "parts"):
        (tmp_path / name).mkdir()
    (tmp_path / "store" / ".00000-000.bin.tmp").symlink_to("gone")  # listed, but missing
    FolderOutput(tmp_path).add_record(0, [])
    assert FolderOutput(tmp_path).finished_units() == {0: []}


def test_damaged_units_are_written_again(tmp_path, written):
    write_txt(tmp_path / "a.txt", words(450_000))
    (tmp_path / "b.txt").write_bytes(b"caf\xe9")
    corpus, root = FilesCorpus(tmp_path), tmp_path / "tokens"
    with pytest.raises(UnicodeError):
        build(corpus, root)
    (folder,) = (root / ".building").iterdir()
    with open(folder / "store" / "00001-000.bin", "r+b") as file:
        file.truncate(10)
    (folder / "store" / "00002-000.idx").unlink()
    (folder / "parts" / "00003.json").write_text("[{")
    (folder / "store" / "00004-000.bin.tmp").write_text("half")
    written.clear()
    with pytest.raises(UnicodeError):
        build(corpus, root)
    assert written[:3] == [1, 2, 3]
    assert not list(folder.rglob("*.tmp"))


class Killed(BaseException):
    """Ends a build like a kill: the build does not catch it."""


@pytest.mark.parametrize(
    "instant",
    [
        "_create_build_folder",
        "encode_corpus",
        "vocab_table",
        "write_json",
        "_rename",
        "sync_folder",
        "rmtree",
    ],
)
def test_a_kill_at_every_step_of_publishing(tmp_path, instant, written):
    path = write_txt(tmp_path / "a.txt", words(250_000))
    root = tmp_path / "tokens"
    target = shutil if instant == "rmtree" else module

    def die(*args, **kwargs) -> None:
        if instant != "rmtree" or args[0].exists():
            raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(target, instant, die)
        with pytest.raises(Killed):
            build(path, root)
    assert [TokenStore(store).verify() for store in stores(root)] == [None] * len(stores(root))
    assert bool(stores(root)) == (instant in ("sync_folder", "rmtree"))
    written.clear()
    assert_holds(build(path, root), [read_txt(path)])
    # a finished unit is never encoded again
    assert written == ([0, 1, 2] if instant in ("_create_build_folder", "encode_corpus") else [])
    assert not litter(root)


@pytest.mark.parametrize("seed", [1, 2, *(heavy(seed) for seed in range(100, 115))])
@pytest.mark.parametrize("workers", [1, 2])
def test_a_kill_at_a_random_instant(tmp_path, workers, seed):
    rng = random.Random(seed)
    path = write_txt(tmp_path / "a.txt", words(1_500_000, seed))
    root = tmp_path / "tokens"
    process = start(path, root, workers=workers)
    wait_for(lambda: list(root.glob(".building/*")), process)
    time.sleep(rng.uniform(0, 1.5 if workers == 1 else 2.5))
    pids = children(process.pid) if process.poll() is None else []
    process.kill()
    process.communicate()
    wait_for(lambda: not any(map(alive, pids)), seconds=5)
    found = find_store(FilesCorpus(path), GPT2, root)
    assert stores(root) == ([found.path] if found else [])
    if found:
        assert_holds(found, [read_txt(path)])
    assert_holds(build(path, root, engine="tiktoken"), [read_txt(path)])
    assert not litter(root)


# Many processes ------------------------------------------------------------------------------------


@pytest.mark.heavy
def test_of_eight_processes_one_builds_and_seven_wait(tmp_path):
    path = write_txt(tmp_path / "a.txt", words(500_000))
    root, go = tmp_path / "tokens", tmp_path / "go"
    extra = f"""
import os, time
def patient(*args, encode_corpus=build.encode_corpus):
    print("builds", flush=True)
    while not os.path.exists({str(go)!r}):
        time.sleep(0.02)
    return encode_corpus(*args)
build.encode_corpus = patient
"""
    logs = [tmp_path / f"log{i}" for i in range(8)]
    running = []
    for log in logs:
        with open(log, "w") as file:
            running.append(start(path, root, extra=extra, stderr=file))
    wait = f"waiting for another process that builds the tokens of FilesCorpus(1 file: {path})"
    wait_for(lambda: sum(wait in log.read_text() for log in logs) == 7, seconds=120)
    go.touch()
    printed = [process.communicate()[0].split() for process in running]
    assert [process.returncode for process in running] == [0] * 8
    assert sorted(map(len, printed)) == [1] * 7 + [2]
    assert len({lines[-1] for lines in printed}) == 1
    assert_holds(TokenStore(*stores(root)), [read_txt(path)])
    assert not litter(root)


def test_concurrent_processes_make_one_store(tmp_path):
    path, root = write_txt(tmp_path / "a.txt", words(500_000)), tmp_path / "tokens"
    running = [start(path, root) for _ in range(3)]
    printed = {process.communicate()[0] for process in running}
    assert [process.returncode for process in running] == [0, 0, 0]
    assert printed == {f"{store}\n" for store in stores(root)}
    assert_holds(TokenStore(*stores(root)), [read_txt(path)])
    assert not litter(root)


def test_two_copies_of_a_text_built_at_the_same_time_become_one_store(tmp_path, monkeypatch):
    paths = [write_txt(tmp_path / name, words(150_000)) for name in ("a.txt", "b.txt")]
    root, rename = tmp_path / "tokens", module._rename

    def overtaken(store: Path, published: Path) -> None:
        monkeypatch.setattr(module, "_rename", rename)
        build(paths[1], root)
        rename(store, published)

    monkeypatch.setattr(module, "_rename", overtaken)
    assert_holds(build(paths[0], root), [read_txt(paths[0])])
    assert len(stores(root)) == 1
    assert not litter(root)


def test_abandoned_builds_are_removed_but_running_builds_are_not(tmp_path):
    path = write_txt(tmp_path / "a.txt", "some text")
    building, locks = tmp_path / "t" / ".building", tmp_path / "t" / ".locks"
    locks.mkdir(parents=True)
    week_ago = time.time() - module.ABANDONED_DAYS * 86_400
    for name, age in (("old", 60), ("live", 60), ("young", -60)):
        (building / name / "store").mkdir(parents=True)
        os.utime(building / name, (week_ago - age, week_ago - age))
    (building / "gone").symlink_to("nowhere")  # as if another process publishes it now
    with FileLock(locks / "live"):
        build(path, tmp_path / "t")
    assert sorted(path.name for path in building.iterdir()) == ["gone", "live", "young"]


# Full disks and changing files ---------------------------------------------------------------------


@contextlib.contextmanager
def file_size_limit(n_bytes: int) -> Iterator[None]:
    """Limit the size of files; Python ignores SIGXFSZ, so a write beyond it fails with EFBIG."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


REMEDY = r"the tokens cannot be written. Free some space, or set data_dir to .*, and run again: finished"


@pytest.mark.parametrize(
    ("n_bytes", "limit", "workers", "where"),
    [
        (99_000, 20_000, 1, "store/00000-000.bin"),
        (250_000, 20_000, 2, "store/0000"),
        (250_000, 150_000, 1, "store"),  # vocab.bin, of 200 kB
        (5_000, 100, 1, ".building"),  # the folder of the build
    ],
)
def test_a_full_disk_is_reported_and_nothing_is_published(tmp_path, n_bytes, limit, workers, where):
    path = write_txt(tmp_path / "a.txt", words(n_bytes))
    root = tmp_path / "tokens"
    with file_size_limit(limit), pytest.raises(OSError, match=f"File too large: {REMEDY}") as caught:
        build(path, root, engine="tiktoken", workers=workers)
    assert caught.value.errno == errno.EFBIG
    assert caught.value.filename.startswith(str(root))
    assert where in caught.value.filename
    assert not stores(root)
    assert_holds(build(path, root), [read_txt(path)])
    assert not litter(root)


@pytest.mark.parametrize("at", range(1, 10))
def test_a_disk_may_be_full_at_any_sync(tmp_path, monkeypatch, at):
    path = write_txt(tmp_path / "a.txt", words(150_000))
    root, fsync, calls = tmp_path / "tokens", os.fsync, []

    def full(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) >= at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=f"No space left on device: {REMEDY}") as caught:
        build(path, root)
    assert caught.value.filename.startswith(str(root))
    assert not stores(root)
    monkeypatch.setattr(os, "fsync", fsync)
    assert_holds(build(path, root), [read_txt(path)])
    assert not litter(root)


def test_a_folder_that_cannot_be_created_is_named(tmp_path):
    path = write_txt(tmp_path / "a.txt", "text")
    for root in (path, path / "tokens"):
        with pytest.raises(OSError, match=rf"Not a directory: {REMEDY}.*{path}"):
            build(path, root)


@pytest.mark.parametrize("change", ["grows", "is replaced"])
def test_a_file_that_changes_during_the_build_is_detected(tmp_path, monkeypatch, change):
    path = write_txt(tmp_path / "a.txt", words(250_000))
    root, encode_unit = tmp_path / "tokens", Encoder.encode_unit

    def meddle(encoder, unit, *args, **kwargs):
        if unit == 1:
            write_txt(path, words(250_000, 5) + "x" * (change == "grows"))
        return encode_unit(encoder, unit, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Encoder, "encode_unit", meddle)
        with pytest.raises(RuntimeError, match=rf"{path}\) changed while it was read: run again"):
            build(path, root)
    assert not stores(root)
    assert_holds(build(path, root), [read_txt(path)])
    assert not litter(root)


def test_an_unchanged_corpus_is_not_read_and_a_moved_corpus_is_not_tokenized(tmp_path, monkeypatch):
    folder = tmp_path / "corpus"
    texts = [text for _, text in mixed(folder)]
    root = tmp_path / "tokens"
    first = build(folder, root)

    def forbidden(*args, **kwargs):
        raise AssertionError("read again")

    monkeypatch.setattr(encode, "read_documents", forbidden)
    with monkeypatch.context() as patch:
        patch.setattr(files, "sha256_of", forbidden)
        patch.setattr("builtins.open", forbidden)
        assert build(folder, root).path == first.path
        assert find_store(FilesCorpus(folder), GPT2, root)
    folder.rename(tmp_path / "moved")
    assert build(tmp_path / "moved", root).path == first.path
    for path in (tmp_path / "moved").iterdir():
        path.touch()
    assert find_store(FilesCorpus(tmp_path / "moved"), GPT2, root) is None
    assert_holds(build(tmp_path / "moved", root), texts)
    assert len(stores(root)) == 1


# Scripts and terminals -----------------------------------------------------------------------------


def test_a_users_script_runs_once_and_workers_load_no_torch(tmp_path):
    folder = tmp_path / "scripts"
    folder.mkdir()
    for name in ("torch", "lightning"):
        (folder / f"{name}.py").write_text(f"with open('seen', 'a') as file: file.write('{name} ')")
    extra = "import torch, lightning\nwith open('seen', 'a') as file: file.write('script ')"
    (folder / "script.py").write_text(SCRIPT.format(extra=extra))
    path, root = write_txt(tmp_path / "a.txt", words(400_000)), tmp_path / "tokens"
    options = json.dumps({"workers": 2})
    done = subprocess.run(
        [sys.executable, "-W", "error", "script.py", path, root, str(SHARD_BYTES), options],
        cwd=folder, env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")  # no progress bar either: stderr is not a terminal
    assert (folder / "seen").read_text() == "torch lightning script "
    assert_holds(TokenStore(done.stdout.strip()), [read_txt(path)])


@pytest.mark.parametrize("when", ["while workers start", "while workers encode"])
def test_ctrl_c_ends_a_build_at_once(tmp_path, when):
    folder = tmp_path / "corpus"
    folder.mkdir()
    text = words(400_000)
    compressed = gzip.compress(text.encode() * 150, 1)
    for name in "ab":  # units that take ten seconds
        (folder / f"{name}.txt.gz").write_bytes(compressed)
    small = [read_txt(write_txt(folder / f"c{i}.txt", words(90_000, i))) for i in range(2)]
    root = tmp_path / "tokens"
    process = start(folder, root, workers=3)
    if when == "while workers encode":
        wait_for(lambda: len(records(root)) == 2, process)
    else:
        wait_for(lambda: children(process.pid), process)
    pids = children(process.pid)
    started = time.monotonic()
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=20)
    assert time.monotonic() - started < 8
    assert process.returncode not in (0, None)
    assert errors.rstrip().endswith("KeyboardInterrupt")
    assert "SpawnProcess" not in errors
    assert errors.count("<module>") <= 2  # of the script, none of a worker
    wait_for(lambda: not any(map(alive, pids)), seconds=5)
    assert len(records(root)) == (2 if when == "while workers encode" else 0)
    for name in "ab":
        (folder / f"{name}.txt.gz").unlink()
    assert_holds(build(folder, root), small)


def test_a_terminal_shows_bytes_and_tokens(tmp_path):
    path = write_txt(tmp_path / "a.txt", words(1_500_000))
    extra = """
tqdm = encode.tqdm
encode.tqdm = lambda **options: tqdm(**options | {"delay": 0, "mininterval": 0})
"""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 120, 0, 0))  # lines, columns
    process = start(path, tmp_path / "tokens", extra=extra, stderr=theirs)
    os.close(theirs)
    output = b""
    with contextlib.suppress(OSError):  # EIO after the other end is closed
        while block := os.read(ours, 1 << 16):
            output += block
    os.close(ours)
    assert process.communicate()[0].strip()
    last = output.decode().rstrip().split("\r")[-1]
    # the total counts \r\n as two bytes, the progress as one
    assert re.search(r"tokenizing: +(99|100)%\|.*\| 1\.\d+M/1\.50M \[.*MB/s, [\d,]+ tokens/s\]", last), (
        last
    )
