"""Builds on a Ray cluster of two nodes on this machine, with killed workers and drivers."""

from __future__ import annotations

import contextlib
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
from collections.abc import Iterator
from pathlib import Path

import pytest

from lit_gptdata.cli.main import main
from lit_gptdata.text.files import FilesCorpus
from lit_gptdata.tokens.build import encode, plan
from lit_gptdata.tokens.build.local import find_store, prepare_store
from lit_gptdata.tokens.build.plan import BuildOptions
from lit_gptdata.tokens.store import TokenStore
from lit_gptdata.tokens.tokenizer import Tokenizer
from tests.tokens import builds
from tests.tokens.builds import (
    GPT2,
    alive,
    assert_holds,
    build,
    contents,
    failure,
    litter,
    mixed,
    records,
    stores,
    wait_for,
    without_progress,
    words,
    write_txt,
)

ray = pytest.importorskip("ray")
from lit_gptdata.tokens.build import ray_tasks  # noqa: E402 it needs ray
from tests.ray_nodes import encoding_workers, two_nodes  # noqa: E402


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """The address of a cluster of two nodes with one core each."""
    with two_nodes() as address:
        yield address


@pytest.fixture(scope="module")
def connected(cluster) -> Iterator[str]:
    """Like `cluster`, with this process connected to it."""
    handler = signal.getsignal(signal.SIGTERM)
    ray.init(cluster, log_to_driver=False, logging_level="ERROR")
    yield cluster
    ray.shutdown()
    signal.signal(signal.SIGTERM, handler)


SIGTERM = """
import atexit, signal
def check():
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
atexit.register(check)
"""


def start(corpus: Path, root: Path, address: str) -> subprocess.Popen[str]:
    """A driver in its own process that uses all of a cluster."""
    return builds.start(corpus, root, extra=SIGTERM, workers=None, build="ray", ray_address=address)


def slow(folder: Path, megabytes: int) -> FilesCorpus:
    """Two files of many shards and seconds of work, one unit each, and three small files."""
    folder.mkdir()
    compressed = gzip.compress(words(1_000_000).encode() * megabytes, 1)
    for name in "xy":
        (folder / f"{name}.txt.gz").write_bytes(compressed)
    for i in range(3):
        write_txt(folder / f"a{i}.txt", words(90_000, i))
    return FilesCorpus(folder)


@pytest.mark.parametrize(
    ("address", "message"),
    [("127.0.0.1:1", "Connection refused"), ("nonsense", "address nonsense|format: nonsense")],
)
def test_a_cluster_that_cannot_be_reached_is_reported(tmp_path, address, message):
    write_txt(tmp_path / "a.txt", "some text")
    message = rf"ray_address='{address}' \(.*({message}).*`ray start --head`"
    with pytest.raises(ConnectionError, match=message):
        build(tmp_path, tmp_path / "t", build="ray", ray_address=address)
    assert not stores(tmp_path / "t")


def test_the_command_builds_on_a_cluster_and_leaves_it_running(tmp_path, cluster, capfd):
    write_txt(tmp_path / "a.txt", words(400_000))
    overrides = [f"data.corpus={tmp_path}/a.txt", f"data.data_dir={tmp_path}/data", "data.build=ray"]
    assert main(["prepare", "data=files", *overrides, f"data.ray_address={cluster}"]) == 0
    printed = capfd.readouterr()
    store = find_store(FilesCorpus(tmp_path / "a.txt"), GPT2, tmp_path / "data" / "tokens")
    assert store is not None
    assert store.fingerprint[:8] in printed.out
    assert without_progress(printed.err) == []
    assert_holds(store, [(tmp_path / "a.txt").read_text("utf-8")])
    assert not ray.is_initialized()


def test_the_store_is_the_same_as_without_a_cluster(tmp_path, connected, monkeypatch):
    progress = []
    monkeypatch.setattr(encode._Progress, "add", lambda _, *counts: progress.append(counts))
    texts = [text for _, text in mixed(tmp_path / "corpus")]
    corpus = FilesCorpus(tmp_path / "corpus")
    serial = build(corpus, tmp_path / "serial")
    for workers in (1, None):
        progress.clear()
        store = build(corpus, tmp_path / f"ray-{workers}", workers=workers, build="ray")
        assert_holds(store, texts)
        assert contents(store) == contents(serial)
        assert not litter(tmp_path / f"ray-{workers}")
        # everything except the separators
        assert sum(n_bytes for n_bytes, _ in progress) == store.n_bytes
        assert sum(n_tokens for _, n_tokens in progress) == store.n_tokens
    assert ray.is_initialized()


def test_filters_leave_out_the_same_as_without_a_cluster(tmp_path, connected):
    mixed(tmp_path / "corpus")
    write_txt(tmp_path / "corpus" / "z.txt", (tmp_path / "corpus" / "a.txt").read_text("utf-8"))
    options = {"on_bad_document": "skip", "drop_duplicates": True}
    serial = build(tmp_path / "corpus", tmp_path / "serial", workers=1, **options)
    assert serial.manifest.left_out.counts == {"duplicate": 1, "empty": 2, "null": 1}
    store = build(tmp_path / "corpus", tmp_path / "ray", workers=None, build="ray", **options)
    assert contents(store) == contents(serial)


def test_a_package_that_a_node_lacks_is_named(tmp_path, connected, monkeypatch):
    write_txt(tmp_path / "a.txt", "some text")
    only_here = types.ModuleType("only_here")
    only_here.Mine = type("Mine", (Tokenizer,), {"__module__": "only_here"})
    monkeypatch.setitem(sys.modules, "only_here", only_here)
    message = r"cannot run a task \(.*No module named 'only_here'\): install"
    with pytest.raises(RuntimeError, match=message):
        prepare_store(FilesCorpus(tmp_path), only_here.Mine(), tmp_path / "t", BuildOptions(build="ray"))


def _hold_core(folder: Path, name: str) -> None:
    """Keep a core of the cluster until the file `free` appears."""
    (folder / name).touch()
    end = time.monotonic() + 60
    while not (folder / "free").exists() and time.monotonic() < end:
        time.sleep(0.01)


def test_a_full_cluster_is_reported(tmp_path, connected, monkeypatch, caplog):
    monkeypatch.setattr(ray_tasks, "SILENCE_S", 0.2)
    write_txt(tmp_path / "a.txt", "some text")
    signs = tmp_path / "signs"
    signs.mkdir()
    message = "no task ended within 0 seconds. Each task needs a CPU; the Ray cluster has"

    def free_cores() -> None:
        try:
            wait_for(lambda: message in caplog.text, seconds=30)
        finally:
            (signs / "free").touch()

    hold = ray.remote(num_cpus=1)(_hold_core)
    tasks = [hold.remote(signs, name) for name in ("one", "two")]
    wait_for(lambda: len(list(signs.iterdir())) == 2)
    waiter = threading.Thread(target=free_cores)
    waiter.start()
    assert_holds(build(tmp_path / "a.txt", tmp_path / "t", build="ray"), ["some text"])
    waiter.join()
    ray.get(tasks)
    assert message in caplog.text


def test_relative_paths_are_relative_to_the_driver(tmp_path, connected, monkeypatch):
    write_txt(tmp_path / "a.txt", words(250_000))
    monkeypatch.chdir(tmp_path)
    store = build("a.txt", Path("tokens"), build="ray")
    assert_holds(store, [(tmp_path / "a.txt").read_text("utf-8")])


def test_an_error_in_a_task_is_the_same_error(tmp_path, connected):
    for name in "abcd":
        write_txt(tmp_path / f"{name}.txt", words(90_000))
    (tmp_path / "b.txt").write_bytes(b"x" * 80_000 + b" caf\xe9")
    corpus = FilesCorpus(tmp_path)
    options = {"workers": 1, "engine": "tiktoken"}
    alone, task = (failure(corpus, tmp_path / "t", build=by, **options) for by in ("processes", "ray"))
    assert "b.txt is not valid UTF-8: byte 0xe9 at offset 80004" in str(alone)
    assert (type(task), str(task)) == (type(alone), str(alone))
    assert task.__cause__ is None
    wait_for(lambda: not encoding_workers(os.getpid()))


@pytest.mark.heavy
def test_a_killed_worker_loses_and_duplicates_nothing(tmp_path, connected):
    corpus, root = slow(tmp_path / "corpus", megabytes=4), tmp_path / "tokens"
    inodes: dict[str, int] = {}
    killed: list[int] = []

    def kill() -> None:
        for unit in ("00003", "00004"):
            wait_for(lambda unit=unit: list(root.glob(f".building/*/store/{unit}-002.bin")))
            inodes[unit] = next(root.glob(f".building/*/store/{unit}-000.bin")).stat().st_ino
            pids = encoding_workers(os.getpid())
            killed.append(len(pids))
            for pid in pids:
                os.kill(pid, signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    store = build(corpus, root, engine="tiktoken", workers=1, build="ray")
    killer.join()
    assert len(inodes) == 2
    assert killed == [1, 1]  # build_workers=1, on a cluster of two cores
    for unit, inode in inodes.items():  # the unit was encoded again
        assert (store.path / f"{unit}-000.bin").stat().st_ino != inode
    store.verify()
    assert contents(store) == contents(build(corpus, tmp_path / "serial"))
    assert not litter(root)


def wait_for_large_files(process: subprocess.Popen[str], root: Path) -> None:
    """Wait until the small files of `slow` are finished and workers encode the large files."""
    wait_for(lambda: len(records(root)) == 3 and len(encoding_workers(os.getpid())) == 2, process)


@pytest.mark.heavy  # test_publish.py kills such a driver by default
def test_after_a_killed_driver_the_finished_units_are_kept(tmp_path, cluster):
    corpus, root = slow(tmp_path / "corpus", megabytes=60), tmp_path / "tokens"
    process = start(tmp_path / "corpus", root, cluster)
    wait_for_large_files(process, root)
    process.kill()
    process.communicate()
    wait_for(lambda: not encoding_workers(os.getpid()))
    assert find_store(corpus, GPT2, root) is None
    assert not stores(root)
    assert len(records(root)) == 3
    folder = next(root.glob(".building/*/store"))
    finished = {path.name: path.stat().st_ino for path in folder.glob("0000[0-2]-*")}
    assert len(finished) == 6
    store = build(corpus, root, build="ray", ray_address=cluster)
    assert {name: (store.path / name).stat().st_ino for name in finished} == finished
    store.verify()
    assert contents(store) == contents(build(corpus, tmp_path / "serial"))
    assert not litter(root)


@pytest.mark.heavy
def test_ctrl_c_cancels_the_tasks(tmp_path, cluster):
    slow(tmp_path / "corpus", megabytes=60)
    root = tmp_path / "tokens"
    process = start(tmp_path / "corpus", root, cluster)
    wait_for_large_files(process, root)
    started = time.monotonic()
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert time.monotonic() - started < 8
    # Ray's core may abort while it cancels tasks ("An unexpected system state"); then they end as well
    assert errors.rstrip().endswith("KeyboardInterrupt") or "task_manager.cc" in errors
    wait_for(lambda: not encoding_workers(os.getpid()))
    assert len(records(root)) == 3
    assert not stores(root)


@pytest.mark.heavy
@pytest.mark.parametrize("end", ["success", "kill"])
def test_a_local_cluster_ends_with_its_build(tmp_path, monkeypatch, end):
    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp") as folder:
        monkeypatch.setenv("RAY_TMPDIR", folder)
        slow(tmp_path / "corpus", megabytes=15 if end == "kill" else 1)
        root = tmp_path / "tokens"
        process = start(tmp_path / "corpus", root, "local")
        if end == "kill":
            wait_for(lambda: len(records(root)) == 3 and encoding_workers(process.pid), process, 60)
            process.kill()
        printed, errors = process.communicate(timeout=120)
        wait_for(lambda: not with_environment(folder.encode(), b"ray::_encode_unit"))
        # the agents of Ray wait for their dead raylet for up to a minute
        wait_for(lambda: not with_environment(folder.encode()), seconds=120)
        if end == "kill":
            assert not stores(root)
        else:
            assert (process.returncode, without_progress(errors)) == (0, [])
            TokenStore(printed.strip()).verify()


def with_environment(value: bytes, title: bytes = b"") -> list[int]:
    """The other processes with this value in their environment and this title."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it ended
            matches = value in (folder / "environ").read_bytes() and alive(int(folder.name))
            if matches and (folder / "cmdline").read_bytes().startswith(title):
                found.append(int(folder.name))
    return [pid for pid in found if pid != os.getpid()]


class Deadly(Tokenizer):
    """Kills the worker that uses it, like the system does when memory runs out."""

    driver = os.getpid()

    def __reduce__(self):
        return Deadly, (self.name, self.special_tokens), {"driver": self.driver}

    @property
    def end_of_document(self) -> int:
        if os.getpid() != self.driver:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().end_of_document


@pytest.mark.heavy
def test_a_unit_that_kills_every_worker_ends_the_build(tmp_path, connected):
    for name in "ab":
        write_txt(tmp_path / f"{name}.txt", words(90_000))
    options = BuildOptions(workers=1, build="ray")
    message = r"was lost 4 times \(WorkerCrashedError\), perhaps .* fewer build_workers than 1"
    with pytest.raises(RuntimeError, match=message):
        prepare_store(FilesCorpus(tmp_path), Deadly(), tmp_path / "t", options)
    assert len(records(tmp_path / "t")) == 1
    assert not stores(tmp_path / "t")


@pytest.mark.heavy
def test_64_files_with_kills(tmp_path, connected, monkeypatch):
    """Kill a worker after every eight shards, so that no unit is lost four times."""
    monkeypatch.setattr(plan, "SHARD_BYTES", 2_000_000)
    (tmp_path / "corpus").mkdir()
    for i in range(64):
        write_txt(tmp_path / "corpus" / f"{i:02}.txt", words(300_000, i) * 10)
    corpus = FilesCorpus(tmp_path / "corpus")
    serial = build(corpus, tmp_path / "serial", workers=2)
    done = threading.Event()
    killed = []

    def kill() -> None:
        rng = random.Random(0)
        while not done.wait(0.05):
            n_shards = sum(1 for _ in (tmp_path / "ray").rglob("*.bin"))
            if n_shards >= 8 * len(killed) and (pids := encoding_workers(os.getpid())):
                os.kill(pid := rng.choice(pids), signal.SIGKILL)
                killed.append(pid)

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        store = build(corpus, tmp_path / "ray", engine="tiktoken", build="ray")
    finally:
        done.set()
        killer.join()
    assert len(killed) > 3
    assert contents(store) == contents(serial)
    assert not litter(tmp_path / "ray")
