"""A store published to an S3 server and trained from: the same windows, whatever happens on the way."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import fsspec
import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lit_gptdata import GPTDataModule
from lit_gptdata._fsspec import RemoteError
from lit_gptdata.cli.main import main
from lit_gptdata.tokens.build import local as build
from lit_gptdata.tokens.remote import objects
from lit_gptdata.tokens.remote import publish as publishing
from lit_gptdata.tokens.remote.cache import Cache
from lit_gptdata.tokens.remote.objects import Objects
from lit_gptdata.tokens.remote.publish import publish
from lit_gptdata.tokens.remote.store import open_store, prepare_store_at
from lit_gptdata.tokens.store import TokenStore
from tests.runs import LENGTH, make_data, make_model, make_trainer, train
from tests.test_resume import ranks_job, results, run_jobs, seen_by_all

pytest.importorskip("moto")
pytest.importorskip("s3fs")
from tests.s3_server import Fault, S3Server, forget_clients, in_turn

ROOT = Path(__file__).parents[2]
N_SHARDS = 64
WINDOWS = {"max_length": 16, "stride": 16, "batch_size": 4, "val_fraction": 0.05}


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    """64 files, each to become a shard of about 4 kB."""
    folder = tmp_path_factory.mktemp("text")
    words = random.Random(0)
    for number in range(N_SHARDS):
        line = " ".join(f"{words.randrange(10**6)}" for _ in range(1000))
        (folder / f"{number:02d}.txt").write_text(line)
    return folder


@pytest.fixture(scope="module")
def local(text, tmp_path_factory) -> GPTDataModule:
    """The data module of the store where it was built."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "Job", functools.partial(build.Job, shard_bytes=7000))
        folder = tmp_path_factory.mktemp("built")
        data = GPTDataModule(str(text), data_dir=str(folder), build_workers=1, **WINDOWS)
        data.prepare_data()
    data.setup()
    assert len(data.store.shards) == N_SHARDS
    return data


@pytest.fixture
def url(s3, local) -> str:
    """Where the store is published; nothing was counted since."""
    published = publish(local.store, f"{s3.url}/tokens")
    s3.forget()
    return published


@contextlib.contextmanager
def replaced(s3: S3Server, url: str, name: str, content: bytes | None) -> Iterator[None]:
    """Meanwhile an object has other contents, or is gone."""
    fs, path = fsspec.filesystem("s3"), f"{url}/{name}"
    whole = fs.cat_file(path)
    if content is None:
        fs.rm(path)
    else:
        fs.pipe_file(path, content)
    s3.gets.clear()
    yield
    fs.pipe_file(path, whole)


def far(url: str, data_dir="far", **options) -> GPTDataModule:
    return GPTDataModule(store_url=url, data_dir=str(data_dir), **(WINDOWS | options))


def opened(url: str, data_dir="far", **options) -> GPTDataModule:
    data = far(url, data_dir, **options)
    data.prepare_data()
    data.setup()
    return data


def shard_gets(s3: S3Server) -> dict[str, int]:
    return {name: n for name, n in s3.gets.items() if name.endswith(".bin") and name != "vocab.bin"}


def cached(folder="far") -> list[Path]:
    return [path for path in (Path(folder) / "cache").iterdir() if path.is_file()]


def names_of(data: GPTDataModule, windows: np.ndarray) -> set[str]:
    """The shards that train windows lie in, by the slow and obvious way."""
    ends = np.cumsum([shard.n_tokens for shard in data.store.shards]).tolist()
    starts = windows * data.hparams["stride"] + data.train_windows.begin
    tokens = (t for start in starts for t in range(start, start + data.hparams["max_length"] + 1))
    numbers = {next(i for i, end in enumerate(ends) if token < end) for token in tokens}
    return {data.store.shards[number].ids.name for number in numbers}


def assert_same(left, right) -> int:
    n = 0
    for a, b in zip(left, right, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
        n += 1
    return n


# Publishing -----------------------------------------------------------------------------------


def test_publishing_sends_each_file_once_and_the_manifest_last(s3, local):
    order: list[str] = []
    write = Objects.write

    def noted(self, name, source):
        order.append(name)
        write(self, name, source)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Objects, "write", noted)
        published = publish(local.store, f"{s3.url}/a/tokens/")
    assert published == f"{s3.url}/a/tokens/{local.store.fingerprint}"
    assert order[-1] == "manifest.json"
    assert sorted(order[:-1]) == sorted(file.name for file in local.store.files)
    fs = fsspec.filesystem("s3")
    assert {name.rpartition("/")[2]: content for name, content in fs.cat(fs.ls(published)).items()} == {
        path.name: path.read_bytes() for path in local.store.path.iterdir()
    }
    s3.puts.clear()
    assert publish(local.store, f"{s3.url}/a/tokens") == published
    assert not s3.puts


def test_a_publication_that_was_killed_is_none_and_goes_on(s3, local, monkeypatch):
    class KilledError(BaseException):
        pass

    sent: list[str] = []
    send = publishing._send

    def killed(folder, file, target):
        if len(sent) == 10:
            raise KilledError
        sent.append(file.name)
        return send(folder, file, target)

    monkeypatch.setattr(publishing, "_send", killed)
    monkeypatch.setattr(publishing, "UPLOADS", 1)
    with pytest.raises(KilledError):
        publish(local.store, f"{s3.url}/b")
    address = f"{s3.url}/b/{local.store.fingerprint}"
    with pytest.raises(
        FileNotFoundError, match=rf"{address}/manifest.json does not exist .*: check the"
    ):
        far(address).prepare_data()
    monkeypatch.setattr(publishing, "_send", send)
    s3.puts.clear()
    assert publish(local.store, f"{s3.url}/b") == address
    assert set(s3.puts) == {f.name for f in local.store.files} - set(sent) | {"manifest.json"}
    assert opened(address).store.tokens[:].tolist() == local.store.tokens[:].tolist()


def test_what_is_damaged_here_or_other_there_is_not_published(s3, local, url, tmp_path):
    name = local.store.shards[3].ids.name
    fsspec.filesystem("s3").pipe_file(f"{url}/{name}", b"short")  # is sent again
    publish(local.store, f"{s3.url}/tokens")
    assert fsspec.filesystem("s3").cat_file(f"{url}/{name}") == (local.store.path / name).read_bytes()

    copy = tmp_path / local.store.fingerprint
    copy.mkdir()
    for path in local.store.path.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    (copy / name).write_bytes(bytes(len((copy / name).read_bytes())))
    with pytest.raises(
        ValueError, match=rf"{name} has sha256 .*: the store is damaged and not published"
    ):
        publish(TokenStore(copy), f"{s3.url}/elsewhere")
    assert not fsspec.filesystem("s3").exists(f"{s3.url}/elsewhere/{copy.name}/manifest.json")

    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["shards"][3]["files"][0]["sha256"] = "0" * 64
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="holds another store of the same name, with other shards"):
        publish(TokenStore(copy), f"{s3.url}/tokens")


def test_a_folder_is_a_place_to_publish_to_and_is_opened_where_it_is(local, tmp_path):
    published = publish(local.store, str(tmp_path / "share"))
    assert sorted(p.name for p in Path(published).iterdir()) == sorted(
        p.name for p in local.store.path.iterdir()
    )
    for address in (published, f"file://{published}"):
        data = opened(address)
        assert type(data.store) is TokenStore
        assert assert_same(data.train_dataloader(), local.train_dataloader())
        assert not Path("far").exists()
    with pytest.raises(FileNotFoundError, match=r"share is not a published store, it has no manifest.json"):
        far(str(tmp_path / "share")).setup()


# Opening and sampling -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"shuffle": False, "stride": 50},
        {"max_length": 4000, "stride": 999},
        pytest.param({"num_workers": 2}, marks=pytest.mark.heavy),
    ],
    ids=str,
)
def test_an_epoch_equals_the_local_stores(url, s3, local, options):
    options = WINDOWS | options
    near = GPTDataModule(store_url=str(local.store.path), **options)
    near.setup()
    data = opened(url, **options)
    assert data.store.tokens[:0].tolist() == []
    assert assert_same(data.train_dataloader(), near.train_dataloader())
    assert assert_same(data.val_dataloader(), near.val_dataloader())
    assert_same([data.batch_at(5), data.batch_at(0)], [near.batch_at(5), near.batch_at(0)])
    assert set(shard_gets(s3).values()) == {1}  # each shard once, by any process
    assert data.store.place(1000) == near.store.place(1000)
    assert data.token_bytes.tolist() == near.token_bytes.tolist()


def test_opening_takes_three_requests_and_a_cut_few(url, s3, local):
    data = far(url)
    data.prepare_data()
    assert s3.gets == {"manifest.json": 1, "vocab.bin": 1}
    assert len(s3.requests) - sum(s3.gets.values()) <= 1  # s3fs asks how long the manifest is
    again = far(url)
    again.setup()  # another process of this machine
    assert s3.gets["manifest.json"] == 1
    assert sum(s3.gets.values()) - 2 <= 4  # the index around the cut, and no shard or one
    assert len(shard_gets(s3)) <= 1
    assert str(local.train_windows.end) in repr(again).replace(",", "")


def test_the_first_batch_waits_for_its_own_shards_only(url, s3, local):
    data = opened(url)
    s3.gets.clear()
    needed = names_of(data, data.windows_at(0))
    assert 1 <= len(needed) <= WINDOWS["batch_size"] + 1
    held = threading.Event()
    others = {shard.ids.name for shard in local.store.shards} - needed
    s3.fault = in_turn({name: [Fault(wait=held)] for name in others})
    batches = iter(data.train_dataloader())
    try:
        first = next(batches)  # every other shard is withheld
        assert_same([first], [local.batch_at(0)])
        assert set(shard_gets(s3)) >= needed
    finally:
        held.set()
    deadline = time.monotonic() + 30
    ahead = names_of(data, data.windows_at(1))
    while not ahead <= set(shard_gets(s3)):  # although nobody asks for another batch
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert_same([next(batches)], [local.batch_at(1)])


def test_only_the_next_shards_are_fetched_ahead(url, s3):
    data = opened(url, shuffle=False)
    batches = iter(data.train_dataloader())
    next(batches)
    time.sleep(0.5)
    first = [shard.ids.name for shard in data.store.shards[:20]]
    assert 2 <= len(set(shard_gets(s3)) & set(first)) <= 10


def test_the_file_system_is_opened_before_threads_ask_for_it(url, local, monkeypatch):
    cache = Cache(Path("far/cache"), None)
    prepare_store_at(url, cache)
    openers: list[threading.Thread] = []
    file_system = objects.filesystem

    def noted(address):
        openers.append(threading.current_thread())
        return file_system(address)

    monkeypatch.setattr(objects, "filesystem", noted)
    store = open_store(url, cache)  # as a worker process does, which is forked before it reads
    starts = np.linspace(0, store.n_tokens - 9, 50).astype(np.int64)
    assert np.array_equal(store.tokens.gather(starts, 9), local.store.tokens.gather(starts, 9))
    assert openers == [threading.main_thread()]


READ = """
import hashlib, sys
from pathlib import Path
import numpy as np
from lit_gptdata.tokens.remote.cache import Cache
from lit_gptdata.tokens.remote.store import open_store, prepare_store_at
url, folder, seed, cache_gb, n = sys.argv[1:]
store = prepare_store_at(url, Cache(Path(folder), int(1e9 * float(cache_gb))))
starts = np.random.default_rng(int(seed)).integers(0, store.n_tokens - 9, (int(n), 4))
batches = (store.tokens.gather(batch, 9) for batch in starts)
print(hashlib.sha256(b"".join(map(bytes, store.tokens.ahead(batches, iter(starts), 9)))).hexdigest())
"""


def read(url: str, folder: Path, seed: int, cache_gb: float, n: int) -> subprocess.Popen[str]:
    """A process that takes `n` batches of 4 windows at random."""
    command = [sys.executable, "-c", READ, url, str(folder), *map(str, (seed, cache_gb, n))]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def printed_by(running: list[subprocess.Popen[str]]) -> list[str]:
    try:
        return [process.communicate(timeout=100)[0].strip() for process in running]
    finally:
        for process in running:
            process.kill()
            process.wait()


def expected_of(store: TokenStore, seed: int, n: int) -> str:
    starts = np.random.default_rng(seed).integers(0, store.n_tokens - 9, (n, 4))
    batches = b"".join(bytes(store.tokens.gather(batch, 9)) for batch in starts)
    return hashlib.sha256(batches).hexdigest()


def test_four_processes_fetch_each_shard_once(url, s3, local, tmp_path):
    running = [read(url, tmp_path / "cache", seed, cache_gb=1, n=300) for seed in range(4)]
    assert printed_by(running) == [expected_of(local.store, seed, n=300) for seed in range(4)]
    del s3.gets["manifest.json"]
    assert set(s3.gets.values()) == {1}
    assert len(shard_gets(s3)) == N_SHARDS
    assert not list((tmp_path / "cache").glob(".*.tmp"))


# The cache -------------------------------------------------------------------------------------


TIGHT_GB = 0.000215  # of 0.6 MB in all; the vocabulary alone has 0.2


@pytest.fixture
def watched(tmp_path):
    """The most bytes that the folder's cache had at any moment, looked at without pause."""
    most, stop, cache = [0], threading.Event(), Cache(tmp_path / "cache", None)

    def watch() -> None:
        while not stop.is_set():
            with cache._lock("room"):  # else a file that goes is counted with the one that comes
                files = [entry for entry in os.scandir(cache.folder) if entry.is_file()]
                most[0] = max(most[0], sum(entry.stat().st_size for entry in files))
            time.sleep(0.001)

    thread = threading.Thread(target=watch)
    thread.start()
    yield most
    stop.set()
    thread.join()


def test_the_cache_stays_below_its_bound_with_two_processes_in_it(url, s3, local, tmp_path, watched):
    running = [read(url, tmp_path / "cache", seed, TIGHT_GB, n=60) for seed in range(2)]
    assert printed_by(running) == [expected_of(local.store, seed, n=60) for seed in range(2)]
    assert 0.5e9 * TIGHT_GB < watched[0] <= 1e9 * TIGHT_GB
    assert max(shard_gets(s3).values()) > 1  # what did not fit was fetched again
    assert not list((tmp_path / "cache").glob(".*.tmp"))


def test_a_store_above_the_bound_warns_and_gives_the_same_batches(url, local, tmp_path, watched):
    data = far(url, tmp_path, cache_gb=TIGHT_GB)
    data.prepare_data()
    with pytest.warns(UserWarning, match=r"its cache at most 0.000215: with shuffle=True nearly every .*"
                      r"Set cache_gb >= 0.000[5-9]\d*, or shuffle=False"):  # fmt: skip
        data.setup()
    batches = (itertools.islice(each.train_dataloader(), 60) for each in (data, local))
    assert assert_same(*batches) == 60
    assert watched[0] <= 1e9 * TIGHT_GB
    opened(url, tmp_path, cache_gb=TIGHT_GB, shuffle=False)  # no warning


def test_what_another_reader_removes_is_never_read(url, local, tmp_path):
    """Two readers of one cache: each removes what the other has mapped."""
    stores = []
    for _ in range(2):
        cache = Cache(tmp_path / "cache", int(1e9 * TIGHT_GB))
        stores.append(prepare_store_at(url, cache))
    rng = np.random.default_rng(0)
    for _ in range(20):
        for store in stores:
            starts = rng.integers(0, store.n_tokens - 9, 12)
            expected = local.store.tokens.gather(starts, 9)
            assert np.array_equal(store.tokens.gather(starts, 9), expected)


def test_a_bound_below_one_file_says_what_to_set(url):
    with pytest.raises(
        ValueError, match=r"cache_gb=1e-07 is too small: vocab.bin alone has 201,028 bytes"
    ):
        far(url, cache_gb=1e-7).prepare_data()


def test_a_cached_file_of_another_size_is_fetched_again(url, s3, local):
    assert_same(opened(url).train_dataloader(), local.train_dataloader())
    for number, path in enumerate(cached()):
        if number % 3 == 0:
            path.unlink()
        else:
            os.truncate(path, 0 if number % 3 == 1 else path.stat().st_size - 1)
    assert_same(opened(url).train_dataloader(), local.train_dataloader())
    assert set(shard_gets(s3).values()) == {2}


def test_verify_drops_what_is_damaged_in_the_cache_and_names_what_is_at_the_url(url, s3, local):
    data = opened(url)
    assert_same(data.train_dataloader(), local.train_dataloader())
    file = local.store.shards[5].ids
    path = Path("far/cache") / file.sha256
    path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])
    data.store.verify()
    assert not path.exists()
    assert_same(opened(url).train_dataloader(), local.train_dataloader())
    assert path.read_bytes() == (local.store.path / file.name).read_bytes()

    path.unlink()
    message = rf"tokens/.* is damaged: the contents of {file.name} do not"
    with (
        replaced(s3, url, file.name, bytes(file.size)),
        pytest.raises(ValueError, match=message),
    ):
        data.store.verify()


def test_a_cache_that_was_deleted_by_hand_is_made_anew(url, local):
    data = opened(url)
    batches = iter(data.train_dataloader())
    assert_same([next(batches)], [local.batch_at(0)])
    while Path("far/cache").exists():  # what is fetched ahead may come in meanwhile
        shutil.rmtree("far/cache", ignore_errors=True)
    rest = [local.batch_at(step) for step in range(1, len(local.train_dataloader()))]
    assert assert_same(batches, rest)


KILLED = """
import sys
from pathlib import Path
from lit_gptdata.tokens.remote.cache import Cache
from lit_gptdata.tokens.remote.store import open_store, prepare_store_at
print(prepare_store_at(sys.argv[1], Cache(Path(sys.argv[2]), None)).tokens[0:2], flush=True)
"""


def test_a_fetch_that_was_killed_is_never_trusted(url, s3, local, tmp_path):
    name, held, begun = local.store.shards[0].ids.name, threading.Event(), threading.Event()
    withheld = in_turn({name: [Fault(wait=held)]})

    def hold(seen: str) -> Fault | None:
        if fault := withheld(seen):
            begun.set()
        return fault

    s3.fault = hold
    command = [sys.executable, "-c", KILLED, url, str(tmp_path / "cache")]
    process = subprocess.Popen(command, cwd=ROOT)
    try:
        assert begun.wait(60)
        (part,) = (tmp_path / "cache").glob(".*.tmp")
        process.send_signal(signal.SIGKILL)
        process.wait()
    finally:
        held.set()
    assert part.stat().st_size == local.store.shards[0].ids.size
    # its room is taken back for another shard, and its shard is fetched anew
    for bound in (TIGHT_GB, 1):
        cache = Cache(tmp_path / "cache", int(1e9 * bound))
        store = prepare_store_at(url, cache)
        assert store.tokens[:].tolist() == local.store.tokens[:].tolist()
        assert not list((tmp_path / "cache").glob(".*.tmp"))


@pytest.mark.heavy
def test_kills_at_any_moment_leave_nothing_that_is_wrong(url, local, tmp_path, watched):
    chance = random.Random(0)
    for seed in range(12):
        running = [read(url, tmp_path / "cache", seed + i, TIGHT_GB, n=5000) for i in range(2)]
        while not list((tmp_path / "cache").glob("*")):
            time.sleep(0.01)
        time.sleep(chance.uniform(2, 4))  # imports come first
        for process in running:
            assert process.poll() is None
            process.kill()
        printed_by(running)
    assert printed_by([read(url, tmp_path / "cache", 99, TIGHT_GB, n=60)]) == [
        expected_of(local.store, 99, n=60)
    ]
    store = prepare_store_at(url, Cache(tmp_path / "cache", int(1e9 * TIGHT_GB)))
    assert store.tokens[:].tolist() == local.store.tokens[:].tolist()
    store.verify()
    assert watched[0] <= 1e9 * TIGHT_GB


# What goes wrong at the other end -----------------------------------------------------------------


FAULTS = {
    "cut": Fault(cut=2000),  # of some 4 kB
    "flip": Fault(flip=True),
    "500": Fault(status=500),
    "503": Fault(status=503),
}


@pytest.mark.parametrize("faults", ["cut", "500-503", "cut-500-cut", "flip", "500-flip-cut"])
def test_what_passes_is_tried_again(url, s3, local, faults):
    data = opened(url)
    in_order = [FAULTS[name] for name in faults.split("-")]
    s3.fault = in_turn({shard.ids.name: in_order for shard in local.store.shards})
    assert assert_same([data.batch_at(0)], [local.batch_at(0)])


def test_500s_without_end_say_what_to_do(url, s3, local):
    data = opened(url)
    name = local.store.shards[9].ids.name
    s3.fault = in_turn({name: itertools.repeat(Fault(status=500))})
    begin = int(np.cumsum([shard.n_tokens for shard in local.store.shards])[8])
    message = rf"{url}/{name} cannot be read: .*Internal Server Error \(attempt 5 of 5\). Check the "
    with pytest.raises(RemoteError, match=message):
        data.store.tokens[begin : begin + 3]
    assert not list(Path("far/cache").glob(".*.tmp"))
    s3.heal()
    expected = local.store.tokens[begin : begin + 3]
    assert data.store.tokens[begin : begin + 3].tolist() == expected.tolist()


def test_wrong_bytes_are_refused_with_both_hashes(url, s3, local):
    data = opened(url)
    file = local.store.shards[0].ids
    path = f"{url}/{file.name}"
    message = rf"{path} has sha256 [0-9a-f]{{64}}, its manifest says {file.sha256}: it is damaged"
    with replaced(s3, url, file.name, bytes(file.size)), pytest.raises(ValueError, match=message):
        data.store.tokens[0:3]
    assert s3.gets[file.name] > 1  # it was tried again
    assert file.sha256 not in {path.name for path in cached()}
    with (
        replaced(s3, url, file.name, b"short"),
        pytest.raises(RemoteError, match=rf"{path} cannot be read: .*cut "),
    ):
        data.store.tokens[0:3]
    assert data.store.tokens[0:3].tolist() == local.store.tokens[0:3].tolist()


def test_a_vanished_object_is_named_also_where_it_was_to_be_fetched_ahead(url, s3, local):
    data = opened(url)
    needed = names_of(data, data.windows_at(0))
    name = min(names_of(data, data.windows_at(1)) - needed)
    with replaced(s3, url, name, None):
        batches = iter(data.train_dataloader())
        assert_same([next(batches)], [local.batch_at(0)])
        with pytest.raises(FileNotFoundError, match=rf"{url}/{name} does not exist .*: check the"):
            next(batches)


@pytest.mark.parametrize(
    "manifest",
    [b"<html>", b"{}", b"[]", b'{"format": 99}', "traversal", "sizes"],
    ids=["html", "empty", "list", "other format", "traversal", "sizes"],
)
def test_what_is_no_manifest_is_refused(url, s3, local, manifest):
    if isinstance(manifest, str):
        content = json.loads(local.store.manifest.to_json())
        if manifest == "traversal":
            content["shards"][0]["files"][0]["sha256"] = "../../evil"
        else:
            content["shards"][0]["n_tokens"] += 1
        manifest = json.dumps(content).encode()
    message = rf"{url}/manifest.json is not the manifest of a token store"
    with replaced(s3, url, "manifest.json", manifest), pytest.raises(ValueError, match=message):
        far(url).prepare_data()


def test_errors_show_no_secret(monkeypatch, s3):
    for address in (
        "s3://key:secret-of-a-user@bucket/tokens",
        "https://host/tokens?sig=secret-of-a-user",
    ):
        with pytest.raises(ValueError, match="holds a password or a query") as refused:
            far(address)
        assert "secret" not in str(refused.value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")  # nothing listens there
    forget_clients()
    with pytest.raises(
        RemoteError, match=r"s3://bucket/tokens/manifest.json cannot be read: .*\(attempt \d of 5\)"
    ) as failed:
        far("s3://bucket/tokens").prepare_data()
    assert "secret" not in str(failed.value)
    assert failed.value.__cause__ is None
    forget_clients()


# The data module and the command --------------------------------------------------------------------


def test_another_tokenizer_is_refused_by_both_names(url):
    with pytest.raises(
        ValueError,
        match=r"tokenizer='gpt2' and special_tokens='allow' .* this run has 'gpt2' and 'text'",
    ):
        far(url, special_tokens="text").prepare_data()


def test_before_prepare_data_the_error_says_so(url):
    with pytest.raises(
        RuntimeError, match=rf"{url} was not opened on this machine yet, .* call prepare_data"
    ):
        far(url).setup()


@pytest.mark.parametrize("cache_gb", [0, -1, True, float("nan")])
def test_a_bound_that_is_none_is_refused(cache_gb):
    with pytest.raises(ValueError, match=r"cache_gb=.* is no size: give 10\^9 bytes, such as 32.0"):
        GPTDataModule(cache_gb=cache_gb)


def test_a_package_that_is_missing_answers_with_its_pip_line(monkeypatch):
    import fsspec

    fsspec.filesystem("memory")  # fsspec itself is there
    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    for scheme in ("s3", "gs"):
        monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, scheme, raising=False)
    for address, extra in (("s3://bucket/x", "s3"), ("gs://bucket/x", "gcs")):
        with pytest.raises(
            ImportError, match=rf"{address} needs .*: pip install 'lit-gptdata\[{extra}\]'"
        ):
            far(address).prepare_data()
    with pytest.raises(ValueError, match=r"nope://x: unknown scheme 'nope'; fsspec knows"):
        far("nope://x").prepare_data()


def fit(folder: Path, **options) -> tuple[list[list[int]], dict[str, torch.Tensor]]:
    """The windows and the weights of 12 steps, or from a checkpoint on."""
    data, ckpt_path = options.pop("data"), options.pop("ckpt_path", None)
    model, seen = make_model(), []

    class Watch(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
            seen.append(batch[0].flatten().tolist())

    save = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=4, save_top_k=-1)
    trainer = make_trainer(max_steps=12, callbacks=[Watch(), save], enable_checkpointing=True)
    trainer.fit(model, datamodule=data, ckpt_path=ckpt_path, weights_only=True)
    return seen, model.state_dict()


@pytest.mark.usefixtures("one_thread")
@pytest.mark.filterwarnings("ignore:.*exists and is not empty.*", "ignore:The dirpath has changed.*")
def test_a_run_may_begin_here_and_go_on_from_the_url_and_back(url, local, text, tmp_path):
    options = {"max_length": LENGTH, "stride": LENGTH, "batch_size": 4}

    def here() -> GPTDataModule:
        return GPTDataModule(str(text), data_dir=local.hparams["data_dir"], **(WINDOWS | options))

    whole, weights = fit(tmp_path / "here", data=here())
    remote, same = fit(tmp_path / "there", data=far(url, **options))
    assert remote == whole
    for source, data in (("here", far(url, **options)), ("there", here())):
        rest, ended = fit(tmp_path / "rest", data=data, ckpt_path=tmp_path / source / "step=8.ckpt")
        assert rest == whole[8:]
        for name, weight in weights.items():
            assert torch.equal(weight, ended[name])
            assert torch.equal(weight, same[name])


@pytest.mark.heavy
@pytest.mark.usefixtures("one_thread")
def test_two_ranks_train_from_a_url_as_one_process_does_from_the_store(s3, tmp_path, monkeypatch):
    monkeypatch.setattr(build, "Job", functools.partial(build.Job, shard_bytes=500))
    near = make_data(tmp_path)
    near.prepare_data()
    near.setup()
    url = publish(near.store, f"{s3.url}/words")
    options = {"max_epochs": 2, "dropout": 0}
    at = {"store_url": str(near.store.path), "batch_size": 8}
    one, _ = train(tmp_path, data=at, **options)
    s3.forget()
    at = {"store_url": url, "data_dir": str(tmp_path / "far")}
    assert run_jobs([ranks_job(tmp_path, "two", 2, 4, data=at, **options)], tmp_path) == 0

    ranks = results(tmp_path / "two")
    assert len(ranks) == 2
    assert seen_by_all(ranks) == one.seen
    assert len(one.seen) == 24
    for rank in ranks:
        assert rank["train_loss"] == pytest.approx(one.train_loss, rel=0, abs=1e-5)
    assert len(shard_gets(s3)) == len(near.store.shards) >= 10
    assert set(s3.gets.values()) == {1}  # by both ranks together, of the manifest too


def test_the_command_publishes_and_reads_what_is_published(s3, capsys):
    assert main(["prepare", "data.engine=tiktoken", "data.build_workers=1"]) == 0
    assert main(["publish", f"{s3.url}/c"]) == 0
    published = capsys.readouterr().out.strip().splitlines()[-1]
    assert published.startswith(f"{s3.url}/c/")
    assert {path.name for path in Path("data/tokens").iterdir()} > {published.rpartition("/")[2]}
    overrides = [f"data.store_url={published}", "data.data_dir=far"]
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
