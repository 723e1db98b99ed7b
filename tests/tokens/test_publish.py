"""Stores made at a URL: by processes and by a Ray cluster, the same files as those built on a disk."""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from lit_gptdata import GPTDataModule
from lit_gptdata._fsspec import RemoteError, RemotePermissionError
from lit_gptdata.cli.main import main
from lit_gptdata.text.files import FilesCorpus
from lit_gptdata.tokens.build import local as build
from lit_gptdata.tokens.build import parts
from lit_gptdata.tokens.build.local import prepare_store
from lit_gptdata.tokens.build.plan import BuildOptions
from lit_gptdata.tokens.remote import publish as module
from lit_gptdata.tokens.remote.publish import publish, publish_text
from lit_gptdata.tokens.store import TokenStore
from tests.conftest import ListCorpus
from tests.ray_nodes import tokenising, two_nodes
from tests.tokens.test_build import (
    GPT2,
    ROOT,
    SHARD_BYTES,
    contents,
    mixed,
    wait_for,
    words,
    write_txt,
    written_from_now_on,
)

pytest.importorskip("moto")
pytest.importorskip("s3fs")
ray = pytest.importorskip("ray")
from tests.s3_server import Fault, S3Server  # noqa: E402 they need these packages


@pytest.fixture(scope="module")
def cluster(s3_running) -> Iterator[str]:
    """The address of two nodes, whose workers are led to the server."""
    with two_nodes() as address:
        yield address


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch) -> None:
    for place in (build, module):
        monkeypatch.setattr(place, "Job", functools.partial(place.Job, shard_bytes=SHARD_BYTES))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> FilesCorpus:
    """Files of all kinds."""
    folder = tmp_path_factory.mktemp("text") / "corpus"
    mixed(folder)
    return FilesCorpus(folder)


@pytest.fixture(scope="module")
def built(corpus, tmp_path_factory) -> TokenStore:
    """The store of the corpus as one process builds it on a disk."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "Job", functools.partial(build.Job, shard_bytes=SHARD_BYTES))
        return prepare_store(corpus, GPT2, tmp_path_factory.mktemp("built"))


def files_at(url: str) -> dict[str, bytes]:
    """Every object below a URL, notes too, by its name from there on."""
    fs, root = fsspec.core.url_to_fs(url)
    fs.invalidate_cache()
    names = fs.find(root)
    found = fs.cat(names) if names else {}
    return {name.removeprefix(root.rstrip("/") + "/"): content for name, content in found.items()}


def remote(corpus: FilesCorpus, s3: S3Server) -> FilesCorpus:
    """The same files at a URL."""
    for path in corpus.files:
        s3.put(f"text/{path.name}", path.read_bytes())
    return FilesCorpus(f"{s3.url}/text/")


@pytest.mark.parametrize(
    "options",
    [
        {"workers": 1},
        {"workers": 2, "engine": "tiktoken"},
        pytest.param({"workers": 1, "build": "ray"}, marks=pytest.mark.heavy),
        {"workers": None, "build": "ray"},
    ],
    ids=str,
)
def test_it_is_the_store_that_is_built_on_a_disk(s3, corpus, built, request, options):
    if "build" in options:
        options = options | {"ray_address": request.getfixturevalue("cluster")}
        corpus = remote(corpus, s3)  # nothing on any disk
    folder = f"{s3.url}/{len(options)}{options['workers']}"
    url = publish_text(corpus, GPT2, folder, BuildOptions(**options))
    assert url == f"{folder}/{built.fingerprint}"
    found, expected = files_at(url), contents(built)
    manifests = [json.loads(files.pop("manifest.json")) for files in (found, expected)]
    assert found == expected
    sources = [[Path(s.pop("path")).name for s in manifest["sources"]] for manifest in manifests]
    assert sources[0] == sources[1]
    assert manifests[0] == manifests[1]
    s3.forget()
    assert publish_text(corpus, GPT2, folder, BuildOptions(**options)) == url
    assert publish(built, folder) == url  # the same as what is sent from a disk
    assert not s3.puts
    assert not list(Path.cwd().iterdir())


def test_a_corpus_that_is_not_files(tmp_path):
    """To a folder, which is a place to publish to as well."""
    corpus = ListCorpus([words(150_000), "", "after an empty one"])
    url = publish_text(corpus, GPT2, str(tmp_path / "share"))
    expected = contents(prepare_store(corpus, GPT2, tmp_path / "t"))
    assert contents(TokenStore(url)) == expected == files_at(url)


def test_the_command_makes_what_is_not_on_this_disk_at_the_url(s3, capsys):
    (folder := Path("books")).mkdir()
    write_txt(folder / "a.txt", words(300_000))
    overrides = ["data=files", "data.corpus=books/", "data.engine=tiktoken"]
    assert main(["publish", f"{s3.url}/command", *overrides]) == 0
    url = capsys.readouterr().out.strip()
    assert not Path("data/tokens").exists()
    overrides = [f"data.store_url={url}", "data.data_dir=far"]
    for command in ("prepare", "verify"):
        assert main([command, *overrides]) == 0
    far = GPTDataModule(store_url=url, data_dir="far")
    far.prepare_data()
    far.setup()
    near = GPTDataModule("books/", data_dir="near")
    near.prepare_data()
    near.setup()
    assert far.store.fingerprint == near.store.fingerprint
    assert (far.store.tokens[:] == near.store.tokens[:]).all()


# What goes wrong --------------------------------------------------------------------------------------


def slow(folder: Path) -> FilesCorpus:
    """24 parts of a shard each."""
    folder.mkdir()
    for i in range(24):
        write_txt(folder / f"{i:02}.txt", words(80_000, i))
    return FilesCorpus(folder)


PUBLISH = """
import functools, sys
from lit_gptdata.text.files import FilesCorpus
from lit_gptdata.tokens.build.plan import BuildOptions
from lit_gptdata.tokens.remote import publish
from lit_gptdata.tokens.tokenizer import Tokenizer

corpus, url, shard_bytes, build, address = sys.argv[1:]
publish.Job = functools.partial(publish.Job, shard_bytes=int(shard_bytes))
publish.publish_text(
    FilesCorpus(corpus), Tokenizer("gpt2"), url,
    BuildOptions(engine="tiktoken", workers=2, build=build, ray_address=address),
)
"""


def start(corpus: Path, url: str, build: str, address: str) -> subprocess.Popen[str]:
    """A driver that is a process of its own."""
    return subprocess.Popen(
        list(map(str, [sys.executable, "-c", PUBLISH, corpus, url, SHARD_BYTES, build, address])),
        env=os.environ | {"PYTHONPATH": str(ROOT)}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def kept(s3: S3Server) -> list[str]:
    """The parts that were noted since the server's last `forget`."""
    return sorted(
        name.removesuffix(".json") for name in list(s3.puts) if name[:5].isdigit() and "-" not in name
    )


@pytest.mark.parametrize("by", ["processes", "ray"])
def test_a_driver_that_is_killed_leaves_what_is_whole(s3, request, tmp_path, by):
    corpus = slow(tmp_path / "corpus")
    address = request.getfixturevalue("cluster") if by == "ray" else "-"
    gate = threading.Event()
    # the workers' later requests wait, so that the kill comes in their midst
    s3.put_fault = lambda seen: Fault(wait=gate, status=503) if len(kept(s3)) > 3 else None
    folder = f"{s3.url}/killed-{by}"
    process = start(tmp_path / "corpus", folder, by, address)
    wait_for(lambda: len(kept(s3)) > 3, process, 60)
    process.kill()
    process.communicate()
    gate.set()
    wait_for(lambda: not tokenising(os.getpid()), seconds=20)
    found = files_at(folder)
    assert not any(name.endswith("manifest.json") for name in found)
    whole = {Path(name).stem for name in found if name.endswith(".json")}
    assert len(whole) >= 3
    s3.heal()
    url = publish_text(corpus, GPT2, folder)
    assert set(kept(s3)) == {f"{part:05}" for part in range(24)} - whole
    assert not [name for name in s3.puts if name[:5] in whole]
    assert files_at(url) == contents(prepare_store(corpus, GPT2, tmp_path / "t"))
    assert {name.partition("/")[0] for name in files_at(folder)} == {url.rpartition("/")[2]}


def test_a_ray_worker_that_is_killed_loses_and_doubles_nothing(s3, cluster, tmp_path):
    corpus = slow(tmp_path / "corpus")
    gate, killed = threading.Event(), []
    # the first attempt to note a part, of whichever worker, waits for the end of that worker
    s3.put_fault = lambda seen: (
        None if gate.is_set() or "json" not in seen else Fault(wait=gate, status=503)
    )

    def kill() -> None:
        wait_for(lambda: kept(s3), seconds=60)
        for pid in tokenising(os.getpid()):
            os.kill(pid, signal.SIGKILL)
            killed.append(pid)
        gate.set()

    killer = threading.Thread(target=kill)
    killer.start()
    url = publish_text(
        corpus, GPT2, f"{s3.url}/worker", BuildOptions(build="ray", ray_address=cluster, workers=None)
    )
    killer.join()
    assert killed
    assert files_at(url) == contents(prepare_store(corpus, GPT2, tmp_path / "t"))


class Killed(BaseException):
    """As if the process had ended."""


def die(*args: Any, **kwargs: Any) -> None:
    raise Killed


@pytest.mark.parametrize(
    "instant", ["write_parts", "vocab_table", "_check_there", "as_json", "remove_all"]
)
def test_a_kill_at_every_step_leaves_nothing_or_a_store(s3, corpus, built, monkeypatch, instant):
    folder, written = f"{s3.url}/{instant}", written_from_now_on(monkeypatch)
    with monkeypatch.context() as patch:
        patch.setattr(module.Objects if instant == "remove_all" else module, instant, die)
        with pytest.raises(Killed):
            publish_text(corpus, GPT2, folder)
    assert (f"{built.fingerprint}/manifest.json" in files_at(folder)) == (instant == "remove_all")
    written.clear()
    assert files_at(publish_text(corpus, GPT2, folder)) == contents(built)
    assert bool(written) == (instant == "write_parts")


def test_what_is_not_whole_is_sent_again(s3, corpus, built, monkeypatch):
    folder, written = f"{s3.url}/torn", written_from_now_on(monkeypatch)
    with monkeypatch.context() as patch:
        patch.setattr(module, "_check_there", die)
        with pytest.raises(Killed):
            publish_text(corpus, GPT2, folder)
    n_parts = len(set(written))
    found = files_at(folder)
    note = next(name for name in found if name.endswith("00000.json"))
    s3.put(f"torn/{note}", found[note][:50])
    shards = [
        name for name in found if name.endswith(".bin") and name.split("/")[1][:5] in ("00001", "00002")
    ]
    s3.put(f"torn/{shards[0]}", b"short")
    s3.delete(f"torn/{shards[-1]}")
    written.clear()
    assert files_at(publish_text(corpus, GPT2, folder)) == contents(built)
    assert written == [0, 1, 2]
    assert n_parts > 3


def test_a_failure_that_passes_is_tried_again(s3, corpus, built):
    failed = set()

    def first(seen: str) -> Fault | None:
        name = seen.split("?")[0]
        return None if name in failed else failed.add(name) or Fault(status=503)

    s3.put_fault = first
    url = publish_text(corpus, GPT2, f"{s3.url}/again")
    assert len(failed) > 2 * len(built.shards)
    assert files_at(url) == contents(built)


@pytest.mark.parametrize("by", ["processes", pytest.param("ray", marks=pytest.mark.heavy)])
@pytest.mark.parametrize(
    ("status", "error", "says"),
    [
        (500, RemoteError, r"idx cannot be written: .*Internal Server Error \(attempt 5 of 5\)"),
        (403, RemotePermissionError, r"idx may not be written \(.*Credentials are looked for in AWS_"),
    ],
)
def test_a_failure_that_stays_says_what_to_do(s3, corpus, request, by, status, error, says):
    address = request.getfixturevalue("cluster") if by == "ray" else None
    s3.put_fault = lambda seen: Fault(status=status)
    with pytest.raises(error, match=rf"s3://.*{says}") as caught:
        publish_text(corpus, GPT2, f"{s3.url}/stays", BuildOptions(build=by, ray_address=address))
    assert "secret-of-the-test" not in str(caught.value)
    assert not files_at(f"{s3.url}/stays")


@pytest.mark.parametrize(
    ("url", "error", "says"),
    [
        ("nope://x", ValueError, "unknown scheme 'nope'"),
        ("s3://user:secret@bucket/x", ValueError, "holds a password or a query"),
        ("gs://bucket/x", ImportError, r"pip install 'lit-gptdata\[gcs\]'"),
    ],
)
def test_a_url_that_cannot_be_is_refused_before_any_work(corpus, monkeypatch, url, error, says):
    if url.startswith("gs"):
        monkeypatch.setitem(sys.modules, "gcsfs", None)
    monkeypatch.setattr(module.Request, "stamps", lambda _: pytest.fail("the corpus was looked at"))
    with pytest.raises(error, match=says) as caught:
        publish_text(corpus, GPT2, url)
    assert "secret@" not in str(caught.value)


def test_a_text_that_changes_meanwhile_is_found_out(s3, tmp_path, monkeypatch):
    path = write_txt(tmp_path / "a.txt", words(250_000))
    folder, write_part = f"{s3.url}/changed", parts.write_part

    def meddle(job, part, *args, **kwargs):
        if part == 1:
            write_txt(path, words(250_000, 5))
        return write_part(job, part, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(parts, "write_part", meddle)
        with pytest.raises(RuntimeError, match="changed while it was read"):
            publish_text(FilesCorpus(path), GPT2, folder)
    assert not [name for name in files_at(folder) if name.endswith(".json")]
    url = publish_text(FilesCorpus(path), GPT2, folder)
    assert files_at(url) == contents(prepare_store(FilesCorpus(path), GPT2, tmp_path / "t"))


def test_no_text_at_all_is_refused(s3, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n')
    with pytest.raises(ValueError, match="holds no text at all"):
        publish_text(FilesCorpus(tmp_path), GPT2, f"{s3.url}/empty")
    assert not [name for name in files_at(f"{s3.url}/empty") if name.endswith(".json")]


@pytest.mark.heavy
def test_two_at_once_make_one_store(s3, tmp_path):
    corpus, folder = slow(tmp_path / "corpus"), f"{s3.url}/both"
    both = [start(tmp_path / "corpus", folder, "processes", "-") for _ in range(2)]
    for process in both:
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
    (name,) = {name.partition("/")[0] for name in files_at(folder)}
    assert files_at(f"{folder}/{name}") == contents(prepare_store(corpus, GPT2, tmp_path / "t"))


# Who hashes -------------------------------------------------------------------------------------------


def test_a_cluster_hashes_as_this_process_does(corpus, cluster, monkeypatch):
    from lit_gptdata.tokens.build.ray_tasks import RayTasks

    monkeypatch.setattr("lit_gptdata.tokens.build.ray_tasks.HASH_BYTES", 200_000)
    seen: list[int] = []
    assert corpus.sources(seen.append, RayTasks(None, cluster).hash) == corpus.sources()
    assert sum(seen) == sum(path.stat().st_size for path in corpus.files)
    assert 1 < len(seen) < len(corpus.files)  # tasks
    corpus.files.append(corpus.files[0].with_name("gone.txt"))
    try:
        with pytest.raises(FileNotFoundError, match=r"gone\.txt"):
            RayTasks(None, cluster).hash(corpus.files, seen.append)
    finally:
        corpus.files.pop()


def test_a_folder_that_the_nodes_do_not_share_is_named(corpus, cluster, tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "touch", lambda path: None)  # the driver's sign is nowhere else
    with pytest.raises(FileNotFoundError, match=r"does not see .*/share/.*publish to an object store"):
        publish_text(corpus, GPT2, tmp_path / "share", BuildOptions(build="ray", ray_address=cluster))
    assert not list(tmp_path.rglob("manifest.json"))


def test_a_relative_folder_is_the_drivers(corpus, built, cluster, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    url = publish_text(corpus, GPT2, "share", BuildOptions(build="ray", ray_address=cluster))
    assert contents(TokenStore(url)) == contents(built)
    assert Path(url) == tmp_path / "share" / built.fingerprint
