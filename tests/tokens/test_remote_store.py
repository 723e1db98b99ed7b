"""Publish a store to an S3 server and train from it: its batches equal the local store's."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch

from lit_gptdata import GPTDataModule
from lit_gptdata._fsspec import RemoteError
from lit_gptdata.cli.main import main
from lit_gptdata.tokens.coverage import covered
from lit_gptdata.tokens.remote import objects, store
from lit_gptdata.tokens.remote import publish as publishing
from lit_gptdata.tokens.remote.cache import Cache
from lit_gptdata.tokens.remote.objects import Objects
from lit_gptdata.tokens.remote.publish import publish
from lit_gptdata.tokens.remote.store import open_store, prepare_store_at
from lit_gptdata.tokens.store import TokenStore
from tests.runs import make_data, train
from tests.test_resume import ranks_job, results, run_jobs, seen_by_all
from tests.tokens.builds import wait_for

pytest.importorskip("moto")
pytest.importorskip("s3fs")
from tests.s3_server import Fault, S3Server, forget_clients, in_turn

ROOT = Path(__file__).parents[2]
N_SHARDS = 64
WINDOWS = {"max_length": 16, "stride": 16, "batch_size": 4, "val_fraction": 0.05}
SMALL_GB = 0.000215  # of 0.6 MB in total; the vocabulary alone has 0.2 MB
SMALL = int(1e9 * SMALL_GB)


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    """64 files; each becomes a shard of about 4 kB."""
    folder = tmp_path_factory.mktemp("text")
    words = random.Random(0)
    for number in range(N_SHARDS):
        line = " ".join(f"{words.randrange(10**6)}" for _ in range(1000))
        (folder / f"{number:02d}.txt").write_text(line)
    return folder


@pytest.fixture(scope="module")
def local(text, tmp_path_factory) -> GPTDataModule:
    """The data module of the local store."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lit_gptdata.tokens.build.plan.SHARD_BYTES", 7000)
        folder = tmp_path_factory.mktemp("built")
        data = GPTDataModule(str(text), data_dir=str(folder), build_workers=1, **WINDOWS)
        data.prepare_data()
    data.setup()
    assert len(data.store.shards) == N_SHARDS
    return data


@pytest.fixture
def url(s3, local) -> str:
    """The URL of the published store; the server's counters are zero."""
    published = publish(local.store, f"{s3.url}/tokens")
    s3.forget()
    return published


@contextlib.contextmanager
def replaced(s3: S3Server, url: str, name: str, content: bytes | None) -> Iterator[None]:
    """Give an object another content, or delete it, and restore it at the end."""
    fs, path = fsspec.filesystem("s3"), f"{url}/{name}"
    original = fs.cat_file(path)
    fs.rm(path)
    if content is not None:
        fs.pipe_file(path, content)
    s3.gets.clear()
    yield
    fs.pipe_file(path, original)


def remote(url: str, data_dir="remote", **options) -> GPTDataModule:
    return GPTDataModule(store_url=url, data_dir=str(data_dir), **(WINDOWS | options))


def opened(url: str, data_dir="remote", **options) -> GPTDataModule:
    data = remote(url, data_dir, **options)
    data.prepare_data()
    data.setup()
    return data


def shard_gets(s3: S3Server) -> dict[str, int]:
    return {name: n for name, n in s3.gets.items() if name.endswith(".bin") and name != "vocab.bin"}


def size_of(folder: Path) -> int:
    with Cache(folder, None)._lock("room"):  # background fetches may still complete
        return sum(path.stat().st_size for path in folder.glob("[!.]*"))


def unfinished(cache: Path) -> list[Path]:
    return [*cache.glob(".*.tmp"), *cache.glob(".*.part")]


def shards_of(data: GPTDataModule, windows: np.ndarray) -> set[str]:
    """The shards of train windows, computed in the slow and obvious way."""
    ends = np.cumsum([shard.n_tokens for shard in data.store.shards]).tolist()
    starts = windows * data.hparams["stride"] + data.train_windows.begin
    tokens = (t for start in starts for t in range(start, start + data.hparams["max_length"] + 1))
    numbers = {next(i for i, end in enumerate(ends) if token < end) for token in tokens}
    return {data.store.shards[number].ids.name for number in numbers}


def assert_same(left, right) -> int:
    """Assert that the batches are equal and return their number."""
    n = 0
    for a, b in zip(left, right, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
        n += 1
    return n


def test_a_killed_publication_is_resumed_and_sends_the_manifest_last(s3, local, monkeypatch):
    sent, write = [], Objects.write

    def write_ten(self, name, source):
        if len(sent) == 10:
            raise KeyboardInterrupt
        sent.append(name)
        write(self, name, source)

    with monkeypatch.context() as patch:
        patch.setattr(publishing, "UPLOADS", 1)
        patch.setattr(Objects, "write", write_ten)
        with pytest.raises(KeyboardInterrupt):
            publish(local.store, f"{s3.url}/b/")
    published = f"{s3.url}/b/{local.store.fingerprint}"
    with pytest.raises(FileNotFoundError, match=rf"{published}/manifest.json does not exist .*: check"):
        remote(published).prepare_data()

    s3.puts.clear()
    assert publish(local.store, f"{s3.url}/b") == published
    assert s3.puts == Counter({file.name for file in local.store.files} - set(sent) | {"manifest.json"})
    assert list(s3.puts)[-1] == "manifest.json"
    fs = fsspec.filesystem("s3")
    contents = {name.rpartition("/")[2]: content for name, content in fs.cat(fs.ls(published)).items()}
    assert contents == {path.name: path.read_bytes() for path in local.store.path.iterdir()}
    s3.puts.clear()
    assert publish(local.store, f"{s3.url}/b") == published
    assert not s3.puts  # a complete publication is left alone


def test_publishing_repairs_the_url_and_refuses_a_damaged_or_different_store(s3, local, url, tmp_path):
    name = local.store.shards[3].ids.name
    fsspec.filesystem("s3").pipe_file(f"{url}/{name}", b"short")  # is sent again
    publish(local.store, f"{s3.url}/tokens")
    assert fsspec.filesystem("s3").cat_file(f"{url}/{name}") == (local.store.path / name).read_bytes()

    copy = tmp_path / local.store.fingerprint
    shutil.copytree(local.store.path, copy)
    (copy / name).write_bytes(bytes((copy / name).stat().st_size))
    with pytest.raises(ValueError, match=rf"{name} has sha256 .*: the store is damaged and .*not publ"):
        publish(TokenStore(copy), f"{s3.url}/elsewhere")
    assert not fsspec.filesystem("s3").exists(f"{s3.url}/elsewhere/{copy.name}/manifest.json")

    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["shards"][3]["files"][0]["sha256"] = "0" * 64
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="holds another store of the same name, with other shards"):
        publish(TokenStore(copy), f"{s3.url}/tokens")


def test_a_store_can_be_published_to_a_folder_and_opens_in_place(local, tmp_path):
    published = publish(local.store, str(tmp_path / "share"))
    assert sorted(os.listdir(published)) == sorted(os.listdir(local.store.path))
    for address in (published, f"file://{published}"):
        data = opened(address)
        assert type(data.store) is TokenStore
        assert assert_same(data.train_dataloader(), local.train_dataloader())
        assert not Path("remote").exists()
    with pytest.raises(FileNotFoundError, match=r"share is not a published store, it has no manifest"):
        remote(str(tmp_path / "share")).setup()


ORDERED, LONG = {"shuffle": False, "stride": 50}, {"max_length": 4000, "stride": 999}
PACKED = {"windows": "packed", "eval_windows": "documents", "max_length": 700}
WORKERS = pytest.param({"num_workers": 2}, marks=pytest.mark.heavy)


@pytest.mark.parametrize("options", [{}, ORDERED, LONG, PACKED, WORKERS], ids=str)
def test_an_epoch_equals_the_local_stores_and_fetches_each_shard_once(url, s3, local, options):
    expected = GPTDataModule(store_url=str(local.store.path), **(WINDOWS | options))
    expected.setup()
    data = opened(url, **options)
    assert data.store.tokens[:0].tolist() == []
    assert assert_same(data.train_dataloader(), expected.train_dataloader())
    assert assert_same(data.val_dataloader(), expected.val_dataloader())
    assert_same([data.batch_at(5), data.batch_at(0)], [expected.batch_at(5), expected.batch_at(0)])
    assert set(shard_gets(s3).values()) == {1}  # over all processes
    assert data.store.place(1000) == expected.store.place(1000)
    assert data.token_bytes.tolist() == expected.token_bytes.tolist()
    assert covered(data.store, *data.sources["corpus"].split.val) == covered(
        expected.store, *expected.sources["corpus"].split.val
    )


def test_opening_takes_three_requests_and_a_split_a_few_more(url, s3, local):
    remote(url).prepare_data()
    assert s3.gets == {"manifest.json": 1, "vocab.bin": 1}
    assert len(s3.requests) - sum(s3.gets.values()) <= 1  # s3fs asks for the size of the manifest
    data = remote(url)
    data.setup()  # as another process of this machine does
    assert s3.gets["manifest.json"] == 1
    # the index around the cut, the index of the files that val covers, and at most one shard
    assert sum(s3.gets.values()) - 2 <= 4 + 7
    assert len(shard_gets(s3)) <= 1
    assert str(local.train_windows.end) in repr(data).replace(",", "")


def test_the_first_batch_waits_for_its_own_shards_only(url, s3, local):
    data = opened(url)
    s3.gets.clear()
    needed = shards_of(data, data.windows_at(0))
    assert 1 <= len(needed) <= WINDOWS["batch_size"] + 1
    released = threading.Event()
    others = {shard.ids.name for shard in local.store.shards} - needed
    s3.fault = in_turn({name: [Fault(wait=released)] for name in others})
    batches = iter(data.train_dataloader())
    try:
        first = next(batches)  # while the server holds back every other shard
        assert_same([first], [local.batch_at(0)])
        assert set(shard_gets(s3)) >= needed
    finally:
        released.set()
    # nobody asks for a batch now
    wait_for(lambda: shards_of(data, data.windows_at(1)) <= set(shard_gets(s3)))
    assert_same([next(batches)], [local.batch_at(1)])


def test_few_shards_are_fetched_ahead(url, s3):
    data = opened(url, shuffle=False)
    batches = iter(data.train_dataloader())
    next(batches)
    time.sleep(0.5)
    first = [shard.ids.name for shard in data.store.shards[:20]]
    assert 2 <= len(set(shard_gets(s3)) & set(first)) <= 10


def test_the_main_thread_opens_the_file_system_and_few_files_stay_mapped(url, local, monkeypatch):
    cache = Cache(Path("cache"), None)
    prepare_store_at(url, cache)
    openers: list[threading.Thread] = []
    filesystem = objects.filesystem

    def record(address):
        openers.append(threading.current_thread())
        return filesystem(address)

    monkeypatch.setattr(objects, "filesystem", record)
    monkeypatch.setattr(store, "MAPS", 5)
    tokens = open_store(url, cache).tokens  # as a forked worker process does
    starts = np.linspace(0, len(tokens) - 9, 50).astype(np.int64)
    for _ in range(2):
        assert np.array_equal(tokens.gather(starts, 9), local.store.tokens.gather(starts, 9))
        assert 0 < len(open_files(cache.folder)) <= 5
    assert set(openers) == {threading.main_thread()}


def open_files(folder: Path) -> list[str]:
    """The files of a folder that this process has open, with " (deleted)" after the evicted ones."""
    links = [f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd")]
    paths = [os.readlink(link) for link in links if os.path.lexists(link)]
    return [path for path in paths if path.startswith(f"{folder.resolve()}/")]


READ = """
import hashlib, sys
from pathlib import Path
import numpy as np
from lit_gptdata.tokens.remote.cache import Cache
from lit_gptdata.tokens.remote.store import prepare_store_at
url, folder, seed, bound, n = sys.argv[1:]
cache = Cache(Path(folder), int(bound))
store = prepare_store_at(url, cache)
starts = np.random.default_rng(int(seed)).integers(0, store.n_tokens - 9, (int(n), 4))
digest = hashlib.sha256()
edges = (np.concatenate([batch, batch + 8]) for batch in starts)
for batch in store.tokens.ahead((store.tokens.gather(batch, 9) for batch in starts), edges):
    digest.update(batch)
    with cache._lock("room"):
        sizes = [path.stat().st_size for path in cache.folder.glob("[!.]*")]
    assert sum(sizes) <= cache.bound
print(digest.hexdigest())
"""


def read(url: str, folder: Path, seed: int, bound: int, n: int) -> subprocess.Popen[str]:
    """A process that reads `n` random batches of 4 windows and prints their SHA-256."""
    command = [sys.executable, "-c", READ, url, str(folder), *map(str, (seed, bound, n))]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def printed_by(running: list[subprocess.Popen[str]]) -> list[str]:
    try:
        return [process.communicate(timeout=100)[0].strip() for process in running]
    finally:
        for process in running:
            process.kill()
            process.wait()


def expected_of(store: TokenStore, seed: int, n: int) -> str:
    """What a process that was started by `read` prints."""
    starts = np.random.default_rng(seed).integers(0, store.n_tokens - 9, (n, 4))
    batches = b"".join(bytes(store.tokens.gather(batch, 9)) for batch in starts)
    return hashlib.sha256(batches).hexdigest()


@pytest.mark.heavy
def test_four_processes_fetch_each_shard_once(url, s3, local, tmp_path):
    running = [read(url, tmp_path / "cache", seed, bound=10**9, n=300) for seed in range(4)]
    assert printed_by(running) == [expected_of(local.store, seed, n=300) for seed in range(4)]
    del s3.gets["manifest.json"]
    assert set(s3.gets.values()) == {1}
    assert len(shard_gets(s3)) == N_SHARDS
    assert not unfinished(tmp_path / "cache")


@pytest.mark.heavy
def test_two_processes_shuffle_through_one_small_cache(url, s3, local, tmp_path):
    running = [read(url, tmp_path / "cache", seed, SMALL, n=60) for seed in range(2)]
    assert printed_by(running) == [expected_of(local.store, seed, n=60) for seed in range(2)]
    assert 0.5 * SMALL < size_of(tmp_path / "cache") <= SMALL
    assert max(shard_gets(s3).values()) > 1  # evicted shards were fetched again
    assert not unfinished(tmp_path / "cache")


def test_a_store_above_the_bound_warns_and_gives_the_same_batches(url, local, tmp_path):
    data = remote(url, tmp_path, cache_gb=SMALL_GB)
    data.prepare_data()
    message = r"cache.* at most 0.000215.*Set cache_gb >= 0.000[5-9]\d*, or shuffle=False"
    with pytest.warns(UserWarning, match=message):
        data.setup()
    batches = (itertools.islice(each.train_dataloader(), 60) for each in (data, local))
    assert assert_same(*batches) == 60
    assert size_of(tmp_path / "cache") <= SMALL
    opened(url, tmp_path, cache_gb=SMALL_GB, shuffle=False)  # no warning


def test_two_readers_evict_each_others_shards_and_keep_none_of_them(url, local, tmp_path):
    folder = tmp_path / "cache"
    readers = [prepare_store_at(url, Cache(folder, SMALL)).tokens for _ in range(2)]
    rng = np.random.default_rng(0)
    for _ in range(20):
        for tokens in readers:
            starts = rng.integers(0, len(tokens) - 9, 12)
            assert np.array_equal(tokens.gather(starts, 9), local.store.tokens.gather(starts, 9))
            assert size_of(folder) <= SMALL
    deleted = [path for path in open_files(folder) if path.endswith(" (deleted)")]
    assert len(deleted) <= 12  # of the reader that did not fetch last


def test_a_bound_below_one_file_says_what_to_set(url):
    with pytest.raises(ValueError, match=r"cache_gb=1e-07 is too small: vocab.bin alone has 201,028 b"):
        remote(url, cache_gb=1e-7).prepare_data()


def test_a_missing_or_truncated_cached_file_is_fetched_again(url, s3, local):
    assert_same(opened(url).train_dataloader(), local.train_dataloader())
    cached = [path for path in Path("remote/cache").iterdir() if path.is_file()]
    for number, path in enumerate(cached):
        if number % 3 == 0:
            path.unlink()
        else:
            os.truncate(path, 0 if number % 3 == 1 else path.stat().st_size - 1)
    assert_same(opened(url).train_dataloader(), local.train_dataloader())
    assert set(shard_gets(s3).values()) == {2}


def test_verify_drops_damaged_cached_files_and_names_those_damaged_at_the_url(url, s3, local):
    data = opened(url)
    assert_same(data.train_dataloader(), local.train_dataloader())
    file = local.store.shards[5].ids
    path = Path("remote/cache") / file.sha256
    path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])
    data.store.verify()
    assert not path.exists()
    assert_same(data.train_dataloader(), local.train_dataloader())
    assert path.read_bytes() == (local.store.path / file.name).read_bytes()

    path.unlink()
    message = rf"tokens/.* is damaged: the contents of {file.name} do not"
    with replaced(s3, url, file.name, bytes(file.size)), pytest.raises(ValueError, match=message):
        data.store.verify()


@pytest.mark.heavy
def test_a_cache_deleted_by_hand_is_created_again(url, local):
    data = opened(url)
    batches = iter(data.train_dataloader())
    assert_same([next(batches)], [local.batch_at(0)])
    while Path("remote/cache").exists():  # background fetches may still add files
        shutil.rmtree("remote/cache", ignore_errors=True)
    rest = [local.batch_at(step) for step in range(1, len(local.train_dataloader()))]
    assert assert_same(batches, rest)


def test_leftovers_of_killed_fetches_are_never_trusted(url, s3, local, tmp_path):
    folder, started, released = tmp_path / "cache", threading.Event(), threading.Event()

    def hold(seen: str) -> Fault | None:
        if ".bin" not in seen or "vocab" in seen or released.is_set():
            return None
        started.set()
        return Fault(wait=released)

    s3.fault = hold
    process = read(url, folder, seed=0, bound=10**9, n=1)
    try:
        assert started.wait(60)
        assert unfinished(folder)
    finally:
        process.kill()
        printed_by([process])
        released.set()
    # files of the version before, which wrote every fetch to such a path and had one more lock
    (folder / f".{local.store.shards[7].ids.sha256}.part").write_bytes(b"damaged")
    (folder / ".locks" / "gate").write_bytes(bytes(16))
    for bound in (SMALL, None):
        store = prepare_store_at(url, Cache(folder, bound))
        assert store.tokens[:].tolist() == local.store.tokens[:].tolist()
        assert not unfinished(folder)


def test_a_file_that_another_process_fetched_again_is_mapped_again(url, local, tmp_path):
    cache = Cache(tmp_path / "cache", None)
    reader, other = prepare_store_at(url, cache), prepare_store_at(url, cache)
    first, second = (shard.n_tokens for shard in local.store.shards[:2])
    assert reader.tokens[:first].tolist() == local.store.tokens[:first].tolist()
    damaged = cache.path(local.store.shards[0].ids)
    damaged.write_bytes(bytes(damaged.stat().st_size))
    assert not reader.tokens[:first].any()
    other.verify()
    assert other.tokens[:first].tolist() == local.store.tokens[:first].tolist()
    assert reader.tokens[first : first + second].any()  # maps another shard
    assert reader.tokens[:first].tolist() == local.store.tokens[:first].tolist()


@pytest.mark.heavy
def test_kills_at_any_moment_leave_only_correct_files(url, local, tmp_path):
    folder, random_s = tmp_path / "cache", random.Random(0)
    for seed in range(12):
        running = [read(url, folder, seed + i, SMALL, n=5000) for i in range(2)]
        while not list(folder.glob("*")):
            time.sleep(0.01)
        time.sleep(random_s.uniform(2, 4))  # imports come first
        for process in running:
            assert process.poll() is None
            process.kill()
        printed_by(running)
    assert printed_by([read(url, folder, 99, SMALL, n=60)]) == [expected_of(local.store, 99, n=60)]
    store = prepare_store_at(url, Cache(folder, SMALL))
    assert store.tokens[:].tolist() == local.store.tokens[:].tolist()
    store.verify()
    assert size_of(folder) <= SMALL


CUT, FLIP = Fault(cut=2000), Fault(flip=True)  # 2,000 bytes of about 4,000
E500, E503 = Fault(status=500), Fault(status=503)
FAULTS = [[CUT], [E500, E503], [CUT, E500, CUT], [FLIP], [E500, FLIP, CUT]]


@pytest.mark.parametrize("faults", FAULTS, ids=str)
def test_temporary_failures_are_retried(url, s3, local, faults):
    data = opened(url)
    s3.fault = in_turn({shard.ids.name: faults for shard in local.store.shards})
    assert assert_same([data.batch_at(0)], [local.batch_at(0)])


def test_endless_500s_say_what_to_do(url, s3, local):
    data = opened(url)
    name = local.store.shards[9].ids.name
    s3.fault = in_turn({name: itertools.repeat(Fault(status=500))})
    start = int(np.cumsum([shard.n_tokens for shard in local.store.shards])[8])
    message = rf"{url}/{name} cannot be read: .*Internal Server Error \(attempt 5 of 5\). Check the "
    with pytest.raises(RemoteError, match=message):
        data.store.tokens[start : start + 3]
    assert not unfinished(Path("remote/cache"))
    s3.heal()
    expected = local.store.tokens[start : start + 3]
    assert data.store.tokens[start : start + 3].tolist() == expected.tolist()


def test_wrong_content_is_refused_with_both_hashes(url, s3, local):
    data = opened(url)
    file = local.store.shards[0].ids
    path = f"{url}/{file.name}"
    message = rf"{path} has sha256 [0-9a-f]{{64}}, its manifest says {file.sha256}: it is damaged"
    with replaced(s3, url, file.name, bytes(file.size)), pytest.raises(ValueError, match=message):
        data.store.tokens[0:3]
    assert not (Path("remote/cache") / file.sha256).exists()
    message = rf"{path} cannot be read: .*cut short"
    with replaced(s3, url, file.name, b"short"), pytest.raises(RemoteError, match=message):
        data.store.tokens[0:3]
    assert data.store.tokens[0:3].tolist() == local.store.tokens[0:3].tolist()


def test_a_deleted_object_is_named_when_a_batch_needs_it(url, s3, local):
    data = opened(url)
    name = min(shards_of(data, data.windows_at(1)) - shards_of(data, data.windows_at(0)))
    with replaced(s3, url, name, None):
        batches = iter(data.train_dataloader())
        assert_same([next(batches)], [local.batch_at(0)])  # although the object is fetched ahead
        with pytest.raises(FileNotFoundError, match=rf"{url}/{name} does not exist .*: check the"):
            next(batches)


def test_an_invalid_manifest_is_refused(url, s3, local):
    traversal, sizes = (json.loads(local.store.manifest.to_json()) for _ in range(2))
    traversal["shards"][0]["files"][0]["sha256"] = "../../evil"
    sizes["shards"][0]["n_tokens"] += 1
    damaged = [json.dumps(content).encode() for content in (traversal, sizes)]
    message = rf"{url}/manifest.json is not the manifest of a token store"
    for manifest in (b"<html>", b"{}", b"[]", b'{"format": 99}', *damaged):
        with replaced(s3, url, "manifest.json", manifest):
            with pytest.raises(ValueError, match=message):
                remote(url).prepare_data()
            with pytest.raises(ValueError, match=message):
                publish(local.store, f"{s3.url}/tokens")


def test_a_damaged_manifest_in_the_cache_is_named_and_fetched_again(url, s3, local):
    path = opened(url).store.path / "manifest.json"
    path.write_text("{")
    with pytest.raises(ValueError, match=rf"{path} .*Delete the folder {path.parent} and run again"):
        remote(url).setup()
    assert opened(url).store.n_tokens == local.store.n_tokens


def test_errors_contain_no_secret(monkeypatch, s3):
    for address in ("s3://key:secret-of-a-user@bucket/x", "https://host/x?sig=secret-of-a-user"):
        with pytest.raises(ValueError, match="holds a password or a query") as refused:
            remote(address)
        assert "secret" not in str(refused.value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")  # nothing listens there
    forget_clients()
    message = r"s3://bucket/tokens/manifest.json cannot be read: .*\(attempt \d of 5\)"
    with pytest.raises(RemoteError, match=message) as failed:
        remote("s3://bucket/tokens").prepare_data()
    assert "secret" not in str(failed.value)
    assert failed.value.__cause__ is None
    forget_clients()


def test_another_tokenizer_is_refused_by_both_names(url):
    message = r"tokenizer='gpt2', special_tokens='allow' and .* This run has .*special_tokens='text'"
    with pytest.raises(ValueError, match=message):
        remote(url, special_tokens="text").prepare_data()


def test_setup_before_prepare_data_is_refused(url):
    with pytest.raises(RuntimeError, match=rf"{url} was not opened on this machine yet,.* call prepare"):
        remote(url).setup()


@pytest.mark.parametrize("cache_gb", [0, -1, 1e300, float("nan")])
def test_an_invalid_bound_is_refused(cache_gb):
    with pytest.raises(ValueError, match="cache_gb must be "):
        GPTDataModule(cache_gb=cache_gb)


@pytest.fixture
def stores(s3, tmp_path, monkeypatch) -> dict[str, dict[str, str]]:
    """A store of several shards on this machine and published, as options of the data module."""
    monkeypatch.setattr("lit_gptdata.tokens.build.plan.SHARD_BYTES", 500)
    data = make_data(tmp_path)
    data.prepare_data()
    data.setup()
    url = publish(data.store, f"{s3.url}/words")
    s3.forget()
    return {"local": {}, "remote": {"store_url": url, "data_dir": str(tmp_path / "remote")}}


@pytest.mark.usefixtures("one_thread")
@pytest.mark.filterwarnings("ignore:The dirpath has changed.*")
def test_a_run_can_resume_from_the_url_and_back(stores, tmp_path):
    def fit(name: str, folder: str, **options):
        save = {"dirpath": tmp_path / folder, "filename": "{step}", "every_n_train_steps": 4}
        return train(tmp_path, data=stores[name], save=save, max_steps=12, **options)

    runs = {name: fit(name, f"{name}-run") for name in stores}
    assert runs["remote"][0].seen == runs["local"][0].seen
    for first, second in (("local", "remote"), ("remote", "local")):
        checkpoint = tmp_path / f"{first}-run" / "step=8.ckpt"
        resumed, weights = fit(second, f"{second}-resumed", ckpt_path=checkpoint)
        assert resumed.seen == runs["local"][0].seen[8:]
        for name, weight in weights.items():
            assert torch.equal(weight, runs["local"][1][name])
            assert torch.equal(weight, runs["remote"][1][name])


@pytest.mark.heavy
@pytest.mark.usefixtures("one_thread")
def test_two_ranks_train_from_a_url_as_one_process_does_from_the_store(s3, stores, tmp_path):
    options = {"max_epochs": 2, "dropout": 0}
    one, _ = train(tmp_path, data=stores["local"] | {"batch_size": 8}, **options)
    job = ranks_job(tmp_path, "two", 2, 4, data=stores["remote"], **options)
    assert run_jobs([job], tmp_path) == 0

    ranks = results(tmp_path / "two")
    assert len(ranks) == 2
    assert seen_by_all(ranks) == one.seen
    assert len(one.seen) == 24
    for rank in ranks:
        assert rank["train_loss"] == pytest.approx(one.train_loss, rel=0, abs=1e-5)
    assert len(shard_gets(s3)) >= 10
    assert set(s3.gets.values()) == {1}  # over both ranks, the manifest too


def test_the_commands_publish_a_store_and_read_it(s3, capsys):
    assert main(["prepare", "data.engine=tiktoken", "data.build_workers=1"]) == 0
    assert main(["publish", f"{s3.url}/c"]) == 0
    published = capsys.readouterr().out.strip().splitlines()[-1]
    assert published.startswith(f"{s3.url}/c/")
    assert {path.name for path in Path("data/tokens").iterdir()} > {published.rpartition("/")[2]}
    overrides = [f"data.store_url={published}", "data.data_dir=remote"]
    assert main(["info", *overrides]) == 1
    assert f"lit-gptdata prepare data.store_url={published}" in capsys.readouterr().err
    for command in ("prepare", "info", "show", "verify"):
        assert main([command, *overrides]) == 0
        printed = capsys.readouterr().out
        assert published in printed if command != "show" else ", document" in printed
    assert main(["publish", f"{s3.url}/d", *overrides]) == 1
    assert "is published already" in capsys.readouterr().err


def test_no_store_url_loads_no_fsspec():
    code = "import sys, lit_gptdata.tokens.remote.publish; assert 'fsspec' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
