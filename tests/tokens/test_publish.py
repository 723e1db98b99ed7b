"""Stores built at a URL, by processes and by a Ray cluster: the same files as on a disk."""

from __future__ import annotations

import json
import os
import re
import signal
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
from lit_gptdata.tokens.build import plan
from lit_gptdata.tokens.build.plan import BuildOptions
from lit_gptdata.tokens.remote import publish as module
from lit_gptdata.tokens.remote.publish import publish, publish_text
from lit_gptdata.tokens.store import TokenStore
from tests.conftest import ListCorpus
from tests.ray_nodes import encoding_workers, two_nodes
from tests.tokens.builds import (
    GPT2,
    SHARD_BYTES,
    build,
    change_during_build,
    contents,
    mixed,
    start,
    wait_for,
    words,
    write_txt,
)

pytest.importorskip("moto")
pytest.importorskip("s3fs")
pytest.importorskip("ray")
from tests.s3_server import Fault, S3Server


@pytest.fixture(scope="module")
def cluster(s3_running) -> Iterator[str]:
    """The address of a cluster of two nodes, whose workers use the S3 server."""
    with two_nodes() as address:
        yield address


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> FilesCorpus:
    """Files of several formats."""
    folder = tmp_path_factory.mktemp("text") / "corpus"
    mixed(folder)
    return FilesCorpus(folder)


@pytest.fixture(scope="module")
def built(corpus, tmp_path_factory) -> TokenStore:
    """The store of the corpus that one process builds on a disk."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "SHARD_BYTES", SHARD_BYTES)
        return build(corpus, tmp_path_factory.mktemp("built"))


def files_at(url: str) -> dict[str, bytes]:
    """Every object below a URL, with records, by its relative name."""
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


LOCAL = [{"workers": 1}, {"workers": 2, "engine": "tiktoken"}]
ONE_TASK = pytest.param({"workers": 1, "build": "ray"}, marks=pytest.mark.heavy)
MANY_TASKS = pytest.param({"workers": None, "build": "ray"}, marks=pytest.mark.heavy)


@pytest.mark.parametrize("options", [*LOCAL, ONE_TASK, MANY_TASKS], ids=str)
def test_a_store_built_at_a_url_is_the_same_as_on_a_disk(s3, corpus, built, request, options):
    if "build" in options:
        options = options | {"ray_address": request.getfixturevalue("cluster")}
        corpus = remote(corpus, s3)  # nothing on any disk
    folder = f"{s3.url}/{len(options)}{options['workers']}"
    url = publish_text(corpus, GPT2, folder, BuildOptions(**options))
    assert url == f"{folder}/{built.fingerprint}"
    found, expected = files_at(url), contents(built)
    theirs, ours = (json.loads(files.pop("manifest.json")) for files in (found, expected))
    for source in theirs["sources"] + ours["sources"]:
        source["path"] = Path(source["path"]).name
    assert (found, theirs) == (expected, ours)
    s3.forget()
    assert publish_text(corpus, GPT2, folder, BuildOptions(**options)) == url
    assert publish(built, folder) == url  # the same files as an upload from a disk
    assert not s3.puts
    assert not list(Path.cwd().iterdir())


@pytest.mark.heavy  # test_filters.py builds at memory:// by default
def test_filters_work_at_a_url(s3, tmp_path):
    (folder := tmp_path / "books").mkdir()
    for name in ("a.txt", "b.txt"):
        write_txt(folder / name, words(400_000))
    (folder / "c.jsonl").write_text('{"text": null}\n{"text": "good"}\n')
    options = {"on_bad_document": "skip", "drop_duplicates": True}
    store = build(FilesCorpus(folder), tmp_path / "t", **options)
    assert store.manifest.left_out.counts == {"duplicate": 1, "null": 1}
    url = publish_text(FilesCorpus(folder), GPT2, s3.url, BuildOptions(workers=2, **options))
    assert files_at(url) == contents(store)


def test_a_corpus_that_is_not_files(tmp_path):
    """Published to a folder instead of an object store."""
    corpus = ListCorpus([words(150_000), "", "after an empty one"])
    url = publish_text(corpus, GPT2, str(tmp_path / "share"))
    expected = contents(build(corpus, tmp_path / "t"))
    assert contents(TokenStore(url)) == expected == files_at(url)


def test_the_command_builds_at_the_url_without_a_store_on_disk(s3, capsys):
    (folder := Path("books")).mkdir()
    write_txt(folder / "a.txt", words(300_000))
    overrides = ["data=files", "data.corpus=books/", "data.engine=tiktoken"]
    assert main(["publish", f"{s3.url}/command", *overrides]) == 0
    url = capsys.readouterr().out.strip()
    assert not Path("data/tokens").exists()
    overrides = [f"data.store_url={url}", "data.data_dir=far"]
    for command in ("prepare", "verify"):
        assert main([command, *overrides]) == 0
    far, near = GPTDataModule(store_url=url, data_dir="far"), GPTDataModule("books/", data_dir="near")
    for data in (far, near):
        data.prepare_data()
        data.setup()
    assert far.store.fingerprint == near.store.fingerprint
    assert (far.store.tokens[:] == near.store.tokens[:]).all()


def slow(folder: Path) -> FilesCorpus:
    """24 work units of one shard each."""
    folder.mkdir()
    for i in range(24):
        write_txt(folder / f"{i:02}.txt", words(80_000, i))
    return FilesCorpus(folder)


def recorded(s3: S3Server) -> list[str]:
    """The work units that were recorded since the last `forget` of the server."""
    return sorted(name[:5] for name in list(s3.puts) if re.fullmatch(r"\d+\.json", name))


@pytest.mark.heavy
@pytest.mark.parametrize("by", ["processes", "ray"])
def test_after_a_killed_driver_the_finished_units_are_kept(s3, request, tmp_path, by):
    corpus = slow(tmp_path / "corpus")
    options = {"build": by, "workers": 2}
    if by == "ray":
        options["ray_address"] = request.getfixturevalue("cluster")
    gate = threading.Event()
    # later requests of the workers wait, so the kill comes before they end
    s3.put_fault = lambda seen: Fault(wait=gate, status=503) if len(recorded(s3)) > 3 else None
    folder = f"{s3.url}/killed-{by}"
    process = start(tmp_path / "corpus", folder, **options)
    wait_for(lambda: len(recorded(s3)) > 3, process, 60)
    process.kill()
    process.communicate()
    gate.set()
    wait_for(lambda: not encoding_workers(os.getpid()))
    found = files_at(folder)
    assert not any(name.endswith("manifest.json") for name in found)
    finished = {Path(name).stem for name in found if name.endswith(".json")}
    assert len(finished) >= 3
    s3.heal()
    url = publish_text(corpus, GPT2, folder)
    assert set(recorded(s3)) == {f"{unit:05}" for unit in range(24)} - finished
    assert not [name for name in s3.puts if name[:5] in finished]
    assert files_at(url) == contents(build(corpus, tmp_path / "t"))
    assert {name.partition("/")[0] for name in files_at(folder)} == {url.rpartition("/")[2]}


@pytest.mark.heavy
def test_a_killed_ray_worker_loses_and_duplicates_nothing(s3, cluster, tmp_path):
    corpus = slow(tmp_path / "corpus")
    gate, killed = threading.Event(), []
    # the first request that records a unit waits until its worker is killed
    fault = Fault(wait=gate, status=503)
    s3.put_fault = lambda seen: fault if "json" in seen and not gate.is_set() else None

    def kill() -> None:
        wait_for(lambda: recorded(s3))
        for pid in encoding_workers(os.getpid()):
            os.kill(pid, signal.SIGKILL)
            killed.append(pid)
        gate.set()

    killer = threading.Thread(target=kill)
    killer.start()
    options = BuildOptions(build="ray", ray_address=cluster, workers=None)
    url = publish_text(corpus, GPT2, f"{s3.url}/worker", options)
    killer.join()
    assert killed
    assert files_at(url) == contents(build(corpus, tmp_path / "t"))


def die(*args: Any, **kwargs: Any) -> None:
    raise KeyboardInterrupt  # a build does not catch it


@pytest.mark.parametrize("instant", ["encode_corpus", "vocab_table", "add_record", "remove_all"])
def test_a_kill_at_every_step_leaves_nothing_or_a_store(
    s3, corpus, built, written, monkeypatch, instant
):
    folder = f"{s3.url}/{instant}"
    with monkeypatch.context() as patch:
        owners = {"add_record": module.ShardOutput, "remove_all": module.Objects}
        patch.setattr(owners.get(instant, module), instant, die)
        with pytest.raises(KeyboardInterrupt):
            publish_text(corpus, GPT2, folder)
    assert (f"{built.fingerprint}/manifest.json" in files_at(folder)) == (instant == "remove_all")
    written.clear()
    assert files_at(publish_text(corpus, GPT2, folder)) == contents(built)
    assert bool(written) == (instant in ("encode_corpus", "add_record"))


def test_damaged_units_are_sent_again(s3, corpus, built, written, monkeypatch):
    folder = f"{s3.url}/torn"
    with monkeypatch.context() as patch:
        patch.setattr(module, "vocab_table", die)
        with pytest.raises(KeyboardInterrupt):
            publish_text(corpus, GPT2, folder)
    assert len(set(written)) > 3
    found = files_at(folder)
    record = next(name for name in found if name.endswith("00000.json"))
    s3.put(f"torn/{record}", found[record][:50])
    shards = [name for name in found if re.search(r"/0000[12]-\d+\.bin$", name)]
    s3.put(f"torn/{shards[0]}", b"short")
    s3.delete(f"torn/{shards[-1]}")
    written.clear()
    assert files_at(publish_text(corpus, GPT2, folder)) == contents(built)
    assert written == [0, 1, 2]


def test_a_temporary_failure_is_retried(s3, corpus, built):
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
    ("status", "error", "message"),
    [
        (500, RemoteError, r"idx cannot be written: .*Internal Server Error \(attempt 5 of 5\)"),
        (403, RemotePermissionError, r"idx may not be written \(.*Credentials are looked for in AWS_"),
    ],
)
def test_a_permanent_failure_is_reported_with_the_next_step(
    s3, corpus, request, by, status, error, message
):
    address = request.getfixturevalue("cluster") if by == "ray" else None
    s3.put_fault = lambda seen: Fault(status=status)
    with pytest.raises(error, match=rf"s3://.*{message}") as caught:
        publish_text(corpus, GPT2, f"{s3.url}/stays", BuildOptions(build=by, ray_address=address))
    assert "secret-of-the-test" not in str(caught.value)
    assert not files_at(f"{s3.url}/stays")


@pytest.mark.parametrize(
    ("url", "error", "message"),
    [
        ("nope://x", ValueError, "unknown scheme 'nope'"),
        ("s3://user:secret@bucket/x", ValueError, "holds a password or a query"),
        ("gs://bucket/x", ImportError, r"pip install 'lit-gptdata\[gcs\]'"),
    ],
)
def test_an_unusable_url_is_refused_before_any_work(corpus, monkeypatch, url, error, message):
    if url.startswith("gs"):
        monkeypatch.setitem(sys.modules, "gcsfs", None)
    monkeypatch.setattr(corpus, "file_stats", lambda: pytest.fail("the corpus was read"))
    with pytest.raises(error, match=message) as caught:
        publish_text(corpus, GPT2, url)
    assert "secret@" not in str(caught.value)


def test_a_file_that_changes_during_the_build_is_detected(s3, tmp_path, monkeypatch):
    path = write_txt(tmp_path / "a.txt", words(250_000))
    folder = f"{s3.url}/changed"
    with monkeypatch.context() as patch:
        change_during_build(patch, path, words(250_000, 5))
        with pytest.raises(RuntimeError, match="changed while it was read"):
            publish_text(FilesCorpus(path), GPT2, folder)
    assert not [name for name in files_at(folder) if name.endswith(".json")]
    url = publish_text(FilesCorpus(path), GPT2, folder)
    assert files_at(url) == contents(build(path, tmp_path / "t"))


def test_a_corpus_without_text_is_refused(s3, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n')
    with pytest.raises(ValueError, match="holds no text: give files"):
        publish_text(FilesCorpus(tmp_path), GPT2, f"{s3.url}/empty")
    assert not [name for name in files_at(f"{s3.url}/empty") if name.endswith(".json")]


@pytest.mark.heavy
def test_two_runs_at_the_same_time_make_one_store(s3, tmp_path):
    corpus, folder = slow(tmp_path / "corpus"), f"{s3.url}/both"
    both = [start(tmp_path / "corpus", folder, workers=2) for _ in range(2)]
    for process in both:
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
    (name,) = {name.partition("/")[0] for name in files_at(folder)}
    assert files_at(f"{folder}/{name}") == contents(build(corpus, tmp_path / "t"))


def test_a_folder_that_lacks_what_workers_wrote_is_refused(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(module.Objects, "sizes", lambda self: {})  # as if a node has another disk
    with pytest.raises(ValueError, match=r"/\w+ lacks 00000-000.bin, .*a folder that all nodes s"):
        publish_text(corpus, GPT2, tmp_path / "share")
    assert not list(tmp_path.rglob("manifest.json"))


def test_a_relative_folder_is_relative_to_the_driver(corpus, built, cluster, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    url = publish_text(corpus, GPT2, "share", BuildOptions(build="ray", ray_address=cluster))
    assert contents(TokenStore(url)) == contents(built)
    assert Path(url) == tmp_path / "share" / built.fingerprint
