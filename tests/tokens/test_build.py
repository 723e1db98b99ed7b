"""Builds with several work units and processes, of files that change, with errors, and in a terminal."""

from __future__ import annotations

import contextlib
import fcntl
import importlib.util
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator

import numpy as np
import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_gptdata.text import files
from lit_gptdata.text.document import Document
from lit_gptdata.text.files import FilesCorpus
from lit_gptdata.tokens.build import encode, plan
from lit_gptdata.tokens.build.local import find_store
from lit_gptdata.tokens.store import TokenStore
from lit_gptdata.tokens.tokenizer import Tokenizer
from tests.tokens.builds import (
    GPT2,
    ROOT,
    SCRIPT,
    SHARD_BYTES,
    assert_builds,
    assert_holds,
    build,
    change_during_build,
    contents,
    failure,
    litter,
    mixed,
    start,
    stores,
    without_progress,
    words,
    write_txt,
)


def test_workers_and_engines_write_the_same_bytes(tmp_path):
    texts = [text for _, text in mixed(tmp_path / "corpus")]
    corpus = FilesCorpus(tmp_path / "corpus")
    engines = ["tiktoken", *(["gigatoken"] if importlib.util.find_spec("gigatoken") else [])]
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
        assert GPT2.reference.encoding.decode_bytes(ids.tolist()) == utf8[row["byte"] : end["byte"]]


@settings(max_examples=25, deadline=None)
@given(
    rows=st.lists(st.sampled_from([None, "", "one", "two words", "x" * 60]), min_size=1, max_size=9),
    size=st.integers(1, 120),
)
def test_units_without_documents_and_documents_without_text(tmp_path_factory, rows, size):
    folder = tmp_path_factory.mktemp("j")
    path = folder / "a.jsonl"
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "SHARD_BYTES", size)
        texts = [row for row in rows if row is not None]
        if not any(texts):
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
        message = rf"{path}: the document is longer than max_document_bytes={limit:,}: set on_bad"
        with pytest.raises(ValueError, match=message):
            build(path, tmp_path / "t", workers=workers, max_document_bytes=limit)
    build(path, tmp_path / "t", workers=workers, max_document_bytes=90_000)
    message = rf"{path}: document 1: the document is longer than max_document_bytes=80,000: set on_bad"
    with pytest.raises(ValueError, match=message):  # also if the store exists
        build(path, tmp_path / "t", workers=workers, max_document_bytes=80_000)


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
        ("dask", ValueError, r"build must be one of \('processes', 'ray'\), got 'dask'"),
    ],
)
def test_an_unknown_build_or_a_missing_package_is_reported(tmp_path, monkeypatch, name, error, message):
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "lit_gptdata.tokens.build.ray_tasks", raising=False)
    path = write_txt(tmp_path / "a.txt", "some text")
    with pytest.raises(error, match=message):
        build(path, tmp_path / "t", build=name)
    assert not (tmp_path / "t").exists()


def test_an_error_in_a_worker_is_the_same_error(tmp_path):
    for name in "abcd":
        write_txt(tmp_path / f"{name}.txt", words(90_000))
    (tmp_path / "b.txt").write_bytes(b"x" * 80_000 + b" caf\xe9")
    corpus = FilesCorpus(tmp_path)
    alone, worker = (failure(corpus, tmp_path / "t", workers, engine="tiktoken") for workers in (1, 2))
    assert "b.txt is not valid UTF-8: byte 0xe9 at offset 80004" in str(alone)
    assert (type(worker), str(worker)) == (type(alone), str(alone))
    ranks = {bytes([byte]): byte for byte in range(256)}
    encoding = tiktoken.Encoding("own", pat_str=r"\S+|\s+", mergeable_ranks=ranks, special_tokens={})
    # gigatoken refuses this encoding, or is not installed
    own = {"tokenizer": Tokenizer(encoding), "engine": "gigatoken"}
    alone, worker = (failure(corpus, tmp_path / "t", workers, **own) for workers in (1, 2))
    assert "engine='gigatoken'" in str(alone)
    assert (type(worker), str(worker)) == (type(alone), str(alone))


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
    assert_holds(store, [(tmp_path / f"{name}.txt").read_text("utf-8") for name in "abcd"])
    assert not litter(root)


@pytest.mark.parametrize("change", ["grows", "is replaced"])
def test_a_file_that_changes_during_the_build_is_detected(tmp_path, monkeypatch, change):
    path = write_txt(tmp_path / "a.txt", words(250_000))
    root = tmp_path / "tokens"
    with monkeypatch.context() as patch:
        change_during_build(patch, path, words(250_000, 5) + "x" * (change == "grows"))
        with pytest.raises(RuntimeError, match=rf"{path}\) changed while it was read: run again"):
            build(path, root)
    assert not stores(root)
    assert_builds(path, root)


def test_an_unchanged_corpus_is_not_read_and_a_moved_corpus_is_not_tokenized(tmp_path, monkeypatch):
    folder, root = tmp_path / "corpus", tmp_path / "tokens"
    texts = [text for _, text in mixed(folder)]
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


def test_a_users_script_runs_once_and_workers_load_no_torch(tmp_path):
    (folder := tmp_path / "scripts").mkdir()
    for name in ("torch", "lightning"):
        (folder / f"{name}.py").write_text(f"with open('seen', 'a') as file: file.write('{name} ')")
    extra = "import torch, lightning\nwith open('seen', 'a') as file: file.write('script ')"
    (folder / "script.py").write_text(SCRIPT.format(extra=extra))
    path, root = write_txt(tmp_path / "a.txt", words(400_000)), tmp_path / "tokens"
    done = subprocess.run(
        [sys.executable, "-W", "error", "script.py", path, root, str(SHARD_BYTES), '{"workers": 2}'],
        cwd=folder, env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert (done.returncode, without_progress(done.stderr)) == (0, [])
    assert "\r" not in done.stderr  # no progress bar: stderr is not a terminal
    assert (folder / "seen").read_text() == "torch lightning script "
    assert_holds(TokenStore(done.stdout.strip()), [path.read_text("utf-8")])


def test_a_terminal_shows_bytes_and_tokens(tmp_path):
    path = write_txt(tmp_path / "a.txt", words(1_500_000))
    extra = """
bar = encode.progress_bar
encode.progress_bar = lambda **options: bar(**options | {"delay": 0, "mininterval": 0})
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
    assert re.search(r"tokenizing: +(99|100)%.* 1\.\d+M/1\.50M \[.*MB/s, [\d,]+ tokens/s\]", last), last
