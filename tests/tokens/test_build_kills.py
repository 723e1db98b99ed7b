"""Builds that are killed or interrupted, that run at the same time, or whose disk is full."""

from __future__ import annotations

import errno
import gzip
import json
import multiprocessing
import os
import random
import shutil
import signal
import threading
import time
from functools import partial
from pathlib import Path

import pytest
from filelock import FileLock

from lit_gptdata._fsspec import RemoteError
from lit_gptdata.text.files import FilesCorpus
from lit_gptdata.tokens.build import local as module
from lit_gptdata.tokens.build.local import find_store
from lit_gptdata.tokens.build.output import Folder, ShardOutput, ShardWriter
from lit_gptdata.tokens.build.plan import BuildOptions, BuildPlan, _hash
from lit_gptdata.tokens.manifest import FORMAT
from lit_gptdata.tokens.remote.cache import Cache
from lit_gptdata.tokens.remote.publish import publish, publish_text
from lit_gptdata.tokens.remote.store import prepare_store_at
from lit_gptdata.tokens.store import TokenStore
from tests.tokens.builds import (
    GPT2,
    alive,
    assert_builds,
    assert_holds,
    build,
    children,
    file_size_limit,
    kill,
    litter,
    mixed,
    records,
    start,
    stores,
    wait_for,
    words,
    write_txt,
)


def test_a_killed_worker_is_reported_and_the_build_resumes(tmp_path):
    texts = [text for _, text in mixed(tmp_path / "corpus")]
    corpus, root = FilesCorpus(tmp_path / "corpus"), tmp_path / "tokens"

    def kill_one() -> None:
        wait_for(lambda: records(root))
        os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)

    killer = threading.Thread(target=kill_one)
    killer.start()
    message = r"a worker process was killed.* build_workers=2; finished work is kept"
    with pytest.raises(RuntimeError, match=message):
        build(corpus, root, engine="tiktoken", workers=2)
    killer.join()
    assert_holds(build(corpus, root, engine="tiktoken"), texts)
    assert not litter(root)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_killed_build_resumes_where_it_stopped(tmp_path, written, workers):
    path = write_txt(tmp_path / "a.txt", words(2_000_000))
    root = tmp_path / "tokens"
    process = start(path, root, workers=workers)
    wait_for(lambda: len(records(root)) >= 3, process)
    assert len(children(process.pid)) == (0 if workers == 1 else workers)
    kill(process)
    assert find_store(FilesCorpus(path), GPT2, root) is None
    assert not stores(root)
    finished = {int(record.stem) for record in records(root)}
    assert 3 <= len(finished) < 20
    shards = [shard for record in records(root) for shard in json.loads(record.read_text())]
    listed = [file["name"] for shard in shards for file in shard["files"]]
    folder = next(root.glob(".building/*/store"))
    inodes = {name: (folder / name).stat().st_ino for name in listed}
    assert_builds(path, root)
    assert set(written) == set(range(20)) - finished
    assert {name: (stores(root)[0] / name).stat().st_ino for name in listed} == inodes


def test_a_late_worker_of_an_older_plan_cannot_write(tmp_path, monkeypatch):
    """Such as a cluster node that was cut off and does not know that its driver is dead."""
    path = write_txt(tmp_path / "a.txt", "caf\u00e9 " * 20_000)
    (tmp_path / "b.txt").write_bytes(b"caf\xe9")
    root = tmp_path / "tokens"
    with pytest.raises(UnicodeError):
        build(tmp_path, root)
    (store,) = root.glob(".building/*/store")
    late = ShardWriter(Folder(store), "00000-000", GPT2.dtype)
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
    output = ShardOutput(Folder(tmp_path / "store"), Folder(tmp_path / "parts"))
    output.add_record(0, [])
    assert output.finished_units() == {0: []}


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


BEFORE_SHARDS = ["_hash_in_background", "encode_corpus"]
BEFORE_PUBLISHING = ["vocab_table", "write_json", "_rename"]
AFTER_PUBLISHING = ["sync_folder", "rmtree"]


@pytest.mark.parametrize("instant", BEFORE_SHARDS + BEFORE_PUBLISHING + AFTER_PUBLISHING)
def test_a_kill_at_every_step_of_publishing(tmp_path, instant, written):
    path = write_txt(tmp_path / "a.txt", words(250_000))
    root = tmp_path / "tokens"
    target = shutil if instant == "rmtree" else module

    def die(*args, **kwargs) -> None:
        if instant != "rmtree" or args[0].exists():
            raise KeyboardInterrupt  # the build does not catch it

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(target, instant, die)
        with pytest.raises(KeyboardInterrupt):
            build(path, root)
    assert [TokenStore(store).verify() for store in stores(root)] == [None] * len(stores(root))
    assert bool(stores(root)) == (instant in AFTER_PUBLISHING)
    written.clear()
    assert_builds(path, root)
    assert written == ([0, 1, 2] if instant in BEFORE_SHARDS else [])


MANY = [pytest.param(seed, marks=pytest.mark.heavy) for seed in range(100, 115)]


@pytest.mark.parametrize("seed", [1, 2, *MANY])
@pytest.mark.parametrize("workers", [1, 2])
def test_a_kill_at_a_random_instant(tmp_path, workers, seed):
    rng = random.Random(seed)
    path = write_txt(tmp_path / "a.txt", words(1_500_000, seed))
    root = tmp_path / "tokens"
    process = start(path, root, workers=workers)
    wait_for(lambda: list(root.glob(".building/*")), process)
    time.sleep(rng.uniform(0, 1.5 if workers == 1 else 2.5))
    kill(process)
    found = find_store(FilesCorpus(path), GPT2, root)
    assert stores(root) == ([found.path] if found else [])
    if found:
        assert_holds(found, [path.read_text("utf-8")])
    assert_builds(path, root, engine="tiktoken")


@pytest.mark.parametrize("n", [3, pytest.param(8, marks=pytest.mark.heavy)])
def test_of_several_processes_one_builds_and_the_others_wait(tmp_path, n):
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
    logs = [tmp_path / f"log{i}" for i in range(n)]
    running = []
    for log in logs:
        with open(log, "w") as file:
            running.append(start(path, root, extra=extra, stderr=file))
    wait = f"waiting for another process that builds the tokens of FilesCorpus(1 file: {path})"
    wait_for(lambda: sum(wait in log.read_text() for log in logs) == n - 1, seconds=120)
    go.touch()
    printed = [process.communicate()[0].split() for process in running]
    assert [process.returncode for process in running] == [0] * n
    assert sorted(map(len, printed)) == [1] * (n - 1) + [2]
    assert {lines[-1] for lines in printed} == set(map(str, stores(root)))
    assert_holds(TokenStore(*stores(root)), [path.read_text("utf-8")])
    assert not litter(root)


def test_two_copies_of_a_text_built_at_the_same_time_become_one_store(tmp_path, monkeypatch):
    paths = [write_txt(tmp_path / name, words(150_000)) for name in ("a.txt", "b.txt")]
    root, rename = tmp_path / "tokens", module._rename

    def overtaken(store: Path, published: Path) -> None:
        monkeypatch.setattr(module, "_rename", rename)
        build(paths[1], root)
        rename(store, published)

    monkeypatch.setattr(module, "_rename", overtaken)
    assert_holds(build(paths[0], root), [paths[0].read_text("utf-8")])
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
    assert_builds(path, root)


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
    assert_builds(path, root)


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_a_target_without_space_is_reported_and_gets_its_space_back(tmp_path, scheme):
    corpus = FilesCorpus(write_txt(tmp_path / "a.txt", words(99_000)))
    store, url = build(corpus.files[0], tmp_path / "tokens"), f"{scheme}{tmp_path}/shelf"
    options = BuildOptions(engine="tiktoken")
    message = "cannot be written: .*File too large.*Free some space there, and run again"
    for upload in (partial(publish, store), partial(publish_text, corpus, GPT2, options=options)):
        with file_size_limit(20_000), pytest.raises(RemoteError, match=message):
            upload(url=url)
        left = [path.name for path in (tmp_path / "shelf" / store.fingerprint).iterdir()]
        assert not [name for name in left if name.endswith((".part", ".json"))]
    assert publish(store, url).endswith(store.fingerprint)
    assert prepare_store_at(url + "/" + store.fingerprint, Cache(tmp_path, None)).n_tokens


def test_a_folder_that_cannot_be_created_is_named(tmp_path):
    path = write_txt(tmp_path / "a.txt", "text")
    for root in (path, path / "tokens"):
        with pytest.raises(OSError, match=rf"Not a directory: {REMEDY}.*{path}"):
            build(path, root)


@pytest.mark.parametrize("when", ["while workers start", "while workers encode"])
def test_ctrl_c_ends_a_build_at_once(tmp_path, when):
    (folder := tmp_path / "corpus").mkdir()
    compressed = gzip.compress(words(400_000).encode() * 150, 1)
    for name in "ab":  # units that take ten seconds
        (folder / f"{name}.txt.gz").write_bytes(compressed)
    small = [write_txt(folder / f"c{i}.txt", words(90_000, i)).read_text("utf-8") for i in range(2)]
    root = tmp_path / "tokens"
    process = start(folder, root, workers=3)
    n_finished = 2 if when == "while workers encode" else 0
    wait_for(lambda: len(records(root)) == n_finished and children(process.pid), process)
    pids = children(process.pid)
    started = time.monotonic()
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert time.monotonic() - started < 8
    assert process.returncode not in (0, None)
    assert errors.rstrip().endswith("KeyboardInterrupt")
    assert "SpawnProcess" not in errors
    assert errors.count("<module>") <= 2  # of the script, none of a worker
    wait_for(lambda: not any(map(alive, pids)))
    assert len(records(root)) == n_finished
    for name in "ab":
        (folder / f"{name}.txt.gz").unlink()
    assert_holds(build(folder, root), small)


def test_a_killed_build_continues_unless_documents_are_checked_in_another_way(tmp_path):
    text = write_txt(tmp_path / "a.txt", "text")
    options = [{}, {"on_bad_document": "skip"}, {"max_document_bytes": 9}, {"min_document_bytes": 1}]
    plans = [BuildPlan(FilesCorpus(text), GPT2, BuildOptions(**given)) for given in options]
    names = {plan.name.partition("-")[2] for plan in plans}
    assert len(names) == len(plans)
    # builds of earlier versions, which had no filters in their names
    assert _hash([FORMAT, plans[0].file_stats, plans[0].shard_bytes, None]) in names
