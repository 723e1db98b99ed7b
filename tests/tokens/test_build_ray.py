"""Builds on a Ray cluster of two nodes of this machine, whose workers and drivers are killed."""

from __future__ import annotations

import contextlib
import functools
import gzip
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
import types
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from lit_gptdata.cli.main import main
from lit_gptdata.text.files import FilesCorpus
from lit_gptdata.tokens.build import local as module
from lit_gptdata.tokens.build import parts
from lit_gptdata.tokens.build.local import find_store, prepare_store
from lit_gptdata.tokens.build.plan import BuildOptions
from lit_gptdata.tokens.store import TokenStore
from lit_gptdata.tokens.tokenizer import Tokenizer
from tests.tokens.test_build import (
    GPT2,
    ROOT,
    SHARD_BYTES,
    alive,
    assert_holds,
    contents,
    failure,
    litter,
    mixed,
    notes,
    read_txt,
    stores,
    wait_for,
    words,
    write_txt,
)

ray = pytest.importorskip("ray")
from lit_gptdata.tokens.build import ray_tasks as build_ray  # noqa: E402 it needs ray
from tests.ray_nodes import tokenising, two_nodes  # noqa: E402


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch) -> None:
    monkeypatch.setattr(module, "Job", functools.partial(module.Job, shard_bytes=SHARD_BYTES))


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """The address of two nodes with a core each."""
    with two_nodes() as address:
        yield address


@pytest.fixture(scope="module")
def connected(cluster) -> Iterator[str]:
    """As `cluster`, and this process is connected to it, as a user's own program may be."""
    handler = signal.getsignal(signal.SIGTERM)
    ray.init(cluster, log_to_driver=False, logging_level="ERROR")
    yield cluster
    ray.shutdown()
    signal.signal(signal.SIGTERM, handler)


# A user's script, without `if __name__ == "__main__":`. Prints the store's fingerprint.
BUILD = """
import functools, signal, sys
from pathlib import Path
from lit_gptdata.text.files import FilesCorpus
from lit_gptdata.tokens.build import local as build
from lit_gptdata.tokens.build.plan import BuildOptions
from lit_gptdata.tokens.tokenizer import Tokenizer

corpus, root, address, shard_bytes = sys.argv[1:]
build.Job = functools.partial(build.Job, shard_bytes=int(shard_bytes))
store = build.prepare_store(
    FilesCorpus(corpus), Tokenizer("gpt2"), Path(root),
    BuildOptions(engine="tiktoken", workers=None, build="ray", ray_address=address),
)
assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
print(store.fingerprint)
"""


def start(corpus: Path, root: Path, address: str) -> subprocess.Popen[str]:
    """A build by a driver that is a process of its own, as from a terminal."""
    command = [sys.executable, "-W", "error", "-c", BUILD, corpus, root, address, SHARD_BYTES]
    return subprocess.Popen(
        list(map(str, command)), env=os.environ | {"PYTHONPATH": str(ROOT)}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip


def slow(folder: Path, megabytes: int) -> FilesCorpus:
    """Two files that are a part each, of many shards and seconds of work, and three small ones."""
    folder.mkdir()
    packed = gzip.compress(words(1_000_000).encode() * megabytes, 1)
    for name in "xy":
        (folder / f"{name}.txt.gz").write_bytes(packed)
    for i in range(3):
        write_txt(folder / f"a{i}.txt", words(90_000, i))
    return FilesCorpus(folder)


@pytest.mark.parametrize(
    ("address", "says"),
    [("127.0.0.1:1", "Connection refused"), ("nonsense", "address nonsense|format: nonsense")],
)
def test_a_cluster_that_is_not_there_is_reported(tmp_path, address, says):
    write_txt(tmp_path / "a.txt", "some text")
    with pytest.raises(
        ConnectionError, match=rf"ray_address='{address}' \(.*({says}).*`ray start --head`"
    ):
        prepare_store(
            FilesCorpus(tmp_path), GPT2, tmp_path / "t", BuildOptions(build="ray", ray_address=address)
        )
    assert not stores(tmp_path / "t")


def test_the_command_builds_on_a_cluster_that_goes_on(tmp_path, cluster, capfd):
    write_txt(tmp_path / "a.txt", words(400_000))
    overrides = [f"data.corpus={tmp_path}/a.txt", f"data.data_dir={tmp_path}/data", "data.build=ray"]
    assert main(["prepare", "data=files", *overrides, f"data.ray_address={cluster}"]) == 0
    printed = capfd.readouterr()
    store = find_store(FilesCorpus(tmp_path / "a.txt"), GPT2, tmp_path / "data" / "tokens")
    assert store is not None
    assert store.fingerprint[:8] in printed.out
    assert printed.err == ""
    assert_holds(store, [read_txt(tmp_path / "a.txt")])
    assert not ray.is_initialized()


def test_the_store_is_the_serial_one(tmp_path, connected, monkeypatch):
    progress = []
    monkeypatch.setattr(parts._Progress, "add", lambda _, *counts: progress.append(counts))
    texts = [text for _, text in mixed(tmp_path / "corpus")]
    corpus = FilesCorpus(tmp_path / "corpus")
    serial = prepare_store(corpus, GPT2, tmp_path / "serial")
    for workers in (1, None):
        progress.clear()
        store = prepare_store(
            corpus, GPT2, tmp_path / f"ray-{workers}", BuildOptions(workers=workers, build="ray")
        )
        assert_holds(store, texts)
        assert contents(store) == contents(serial)
        assert not litter(tmp_path / f"ray-{workers}")
        # all but the separators
        assert sum(n_bytes for n_bytes, _ in progress) == store.n_bytes
        assert sum(n_tokens for _, n_tokens in progress) == store.n_tokens
    assert ray.is_initialized()


class Wary(Tokenizer):
    """Warns where it is used."""

    @property
    def end_of_text(self) -> int:
        warnings.warn("mind the gap", UserWarning, stacklevel=2)
        return super().end_of_text


def test_what_a_task_warns_of_is_said_here(tmp_path, connected):
    for name in "ab":
        write_txt(tmp_path / f"{name}.txt", words(90_000))
    with pytest.warns(UserWarning, match="mind the gap"):
        prepare_store(
            FilesCorpus(tmp_path), Wary(), tmp_path / "t", BuildOptions(build="ray", engine="tiktoken")
        )


def test_what_a_node_lacks_is_named(tmp_path, connected, monkeypatch):
    write_txt(tmp_path / "a.txt", "some text")
    only_here = types.ModuleType("only_here")
    only_here.Mine = type("Mine", (Tokenizer,), {"__module__": "only_here"})
    monkeypatch.setitem(sys.modules, "only_here", only_here)
    with pytest.raises(
        RuntimeError, match=r"cannot take part \(.*No module named 'only_here'\): install"
    ):
        prepare_store(FilesCorpus(tmp_path), only_here.Mine(), tmp_path / "t", BuildOptions(build="ray"))


def test_a_full_cluster_is_reported(tmp_path, connected, monkeypatch, caplog):
    monkeypatch.setattr(build_ray, "SILENCE", 0.2)
    busy = ray.remote(num_cpus=1)(lambda seconds: time.sleep(seconds))
    tasks = [busy.remote(2) for _ in range(2)]
    write_txt(tmp_path / "a.txt", "some text")
    assert_holds(
        prepare_store(FilesCorpus(tmp_path), GPT2, tmp_path / "t", BuildOptions(build="ray")),
        ["some text"],
    )
    assert "no task was done for 0 seconds; a task takes a CPU, and of the Ray cluster's" in caplog.text
    ray.get(tasks)


def test_a_folder_that_the_nodes_do_not_share_is_named(tmp_path, connected, monkeypatch):
    write_txt(tmp_path / "a.txt", "some text")
    monkeypatch.setattr(Path, "touch", lambda path: None)  # the driver's sign is nowhere else
    with pytest.raises(
        FileNotFoundError, match=r"does not see .*, which is .*set data_dir to a folder that"
    ):
        prepare_store(FilesCorpus(tmp_path), GPT2, tmp_path / "t", BuildOptions(build="ray"))


def test_relative_paths_are_the_drivers(tmp_path, connected, monkeypatch):
    write_txt(tmp_path / "a.txt", words(250_000))
    monkeypatch.chdir(tmp_path)
    store = prepare_store(FilesCorpus("a.txt"), GPT2, Path("tokens"), BuildOptions(build="ray"))
    assert_holds(store, [read_txt(tmp_path / "a.txt")])


def test_what_fails_in_a_task_fails_with_the_same_words(tmp_path, connected):
    for name in "abcd":
        write_txt(tmp_path / f"{name}.txt", words(90_000))
    (tmp_path / "b.txt").write_bytes(b"x" * 80_000 + b" caf\xe9")
    corpus = FilesCorpus(tmp_path)
    alone, task = (
        failure(corpus, tmp_path / "t", 1, engine="tiktoken", build=build)
        for build in ("processes", "ray")
    )
    assert "b.txt is not valid UTF-8: byte 0xe9 at offset 80004" in str(alone)
    assert (type(task), str(task)) == (type(alone), str(alone))
    assert task.__cause__ is None
    wait_for(lambda: not tokenising(os.getpid()), seconds=5)


def test_a_worker_that_is_killed_loses_and_doubles_nothing(tmp_path, connected):
    corpus, root = slow(tmp_path / "corpus", megabytes=4), tmp_path / "tokens"
    begun: dict[str, int] = {}
    killed: list[int] = []

    def kill() -> None:
        for part in ("00003", "00004"):
            wait_for(lambda part=part: list(root.glob(f".building/*/store/{part}-002.bin")))
            begun[part] = next(root.glob(f".building/*/store/{part}-000.bin")).stat().st_ino
            pids = tokenising(os.getpid())
            killed.append(len(pids))
            for pid in pids:
                os.kill(pid, signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    store = prepare_store(corpus, GPT2, root, BuildOptions(engine="tiktoken", workers=1, build="ray"))
    killer.join()
    assert len(begun) == 2
    assert killed == [1, 1]  # build_workers=1, on a cluster of two cores
    for part, inode in begun.items():  # and begun again
        assert (store.path / f"{part}-000.bin").stat().st_ino != inode
    store.verify()
    assert contents(store) == contents(prepare_store(corpus, GPT2, tmp_path / "serial"))
    assert not litter(root)


def in_the_midst(process: subprocess.Popen[str], root: Path) -> None:
    """Wait until the small files of `slow` are done and the others under way."""
    wait_for(lambda: len(notes(root)) == 3 and len(tokenising(os.getpid())) == 2, process)


def test_a_driver_that_is_killed_leaves_what_is_whole(tmp_path, cluster):
    corpus, root = slow(tmp_path / "corpus", megabytes=60), tmp_path / "tokens"
    process = start(tmp_path / "corpus", root, cluster)
    in_the_midst(process, root)
    process.kill()
    process.communicate()
    wait_for(lambda: not tokenising(os.getpid()), seconds=10)
    assert find_store(corpus, GPT2, root) is None
    assert not stores(root)
    assert len(notes(root)) == 3
    folder = next(root.glob(".building/*/store"))
    whole = {path.name: path.stat().st_ino for path in folder.glob("0000[0-2]-*")}
    assert len(whole) == 6
    store = prepare_store(corpus, GPT2, root, BuildOptions(build="ray", ray_address=cluster))
    assert {name: (store.path / name).stat().st_ino for name in whole} == whole
    store.verify()
    assert contents(store) == contents(prepare_store(corpus, GPT2, tmp_path / "serial"))
    assert not litter(root)


def test_ctrl_c_cancels_the_tasks(tmp_path, cluster):
    slow(tmp_path / "corpus", megabytes=60)
    root = tmp_path / "tokens"
    process = start(tmp_path / "corpus", root, cluster)
    in_the_midst(process, root)
    started = time.monotonic()
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=20)
    assert time.monotonic() - started < 8
    assert errors.rstrip().endswith("KeyboardInterrupt")
    wait_for(lambda: not tokenising(os.getpid()), seconds=5)
    assert len(notes(root)) == 3
    assert not stores(root)


# Local clusters, bigger texts -----------------------------------------------------------------------


@pytest.mark.heavy
@pytest.mark.parametrize("end", ["its work is done", "kill"])
def test_a_local_ray_ends_with_its_build(tmp_path, monkeypatch, end):
    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp") as folder:
        monkeypatch.setenv("RAY_TMPDIR", folder)
        slow(tmp_path / "corpus", megabytes=15 if end == "kill" else 1)
        root = tmp_path / "tokens"
        process = start(tmp_path / "corpus", root, "local")
        if end == "kill":
            wait_for(lambda: len(notes(root)) == 3 and tokenising(process.pid), process, 60)
            process.kill()
        printed, errors = process.communicate(timeout=120)
        wait_for(lambda: not with_environment(folder.encode(), b"ray::_write_part"), seconds=10)
        # its agents look for their dead raylet for up to a minute
        wait_for(lambda: not with_environment(folder.encode()), seconds=120)
        if end == "kill":
            assert not stores(root)
        else:
            assert (process.returncode, errors) == (0, "")
            TokenStore(root / printed.strip()).verify()


def with_environment(value: bytes, title: bytes = b"") -> list[int]:
    """The other processes that have a value in their environment, and a title."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            ours = value in (folder / "environ").read_bytes()
            if ours and (folder / "cmdline").read_bytes().startswith(title) and alive(int(folder.name)):
                found.append(int(folder.name))
    return [pid for pid in found if pid != os.getpid()]


class Deadly(Tokenizer):
    """Kills a worker in which it is used, as memory that runs out does."""

    driver = os.getpid()

    def __reduce__(self):
        return Deadly, (self.name, self.special_tokens), {"driver": self.driver}

    @property
    def end_of_text(self) -> int:
        if os.getpid() != self.driver:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().end_of_text


@pytest.mark.heavy
def test_a_text_that_kills_every_worker_ends_the_build(tmp_path, connected):
    for name in "ab":
        write_txt(tmp_path / f"{name}.txt", words(90_000))
    with pytest.raises(
        RuntimeError, match=r"was lost 4 times \(WorkerCrashedError\), perhaps .* build_workers than 1"
    ):
        prepare_store(
            FilesCorpus(tmp_path), Deadly(), tmp_path / "t", BuildOptions(workers=1, build="ray")
        )
    assert len(notes(tmp_path / "t")) == 1
    assert not stores(tmp_path / "t")


@pytest.mark.heavy
def test_64_files_with_kills(tmp_path, connected, monkeypatch):
    """A worker is lost every three seconds."""
    monkeypatch.setattr(module, "Job", functools.partial(module.Job, shard_bytes=2_000_000))
    (tmp_path / "corpus").mkdir()
    for i in range(64):
        write_txt(tmp_path / "corpus" / f"{i:02}.txt", words(300_000, i) * 10)
    corpus = FilesCorpus(tmp_path / "corpus")
    serial = prepare_store(corpus, GPT2, tmp_path / "serial", BuildOptions(workers=2))
    done = threading.Event()
    killed = []

    def kill() -> None:
        rng = random.Random(0)
        while not done.wait(3):
            if pids := tokenising(os.getpid()):
                os.kill(pid := rng.choice(pids), signal.SIGKILL)
                killed.append(pid)

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        store = prepare_store(
            corpus, GPT2, tmp_path / "ray", BuildOptions(engine="tiktoken", build="ray")
        )
    finally:
        done.set()
        killer.join()
    assert len(killed) > 3
    assert contents(store) == contents(serial)
    assert not litter(tmp_path / "ray")
