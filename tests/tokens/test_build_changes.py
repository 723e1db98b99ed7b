"""A store is reused only for the same contents, and a worker of a pool can build one."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import sys
import threading
import time
from pathlib import Path

import pytest

from lit_gptdata.text import files
from lit_gptdata.text.files import FilesCorpus
from lit_gptdata.tokens.build import plan, processes
from lit_gptdata.tokens.build.local import find_store
from tests.tokens.builds import GPT2, SHARD_BYTES, assert_builds, build, words, write_txt


def rewrite(path: Path, content: bytes) -> None:
    """Give a file another content, and its modification time back."""
    before = path.stat()
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize("where", ["head", "tail", "middle of a small file"])
def test_a_store_is_not_reused_for_other_contents_of_the_same_size_and_time(tmp_path, where):
    n_bytes = 9_000 if "small" in where else 1_200_000
    path, root = write_txt(tmp_path / "a.txt", "one two " * (n_bytes // 8)), tmp_path / "tokens"
    first = build(path, root, engine="tiktoken")
    content = path.read_bytes()
    changed = {"head": b"ONE" + content[3:], "tail": content[:-4] + b"TWO "}
    rewrite(path, changed.get(where, content[:4000] + b"ONE" + content[4003:]))
    assert build(path, root, engine="tiktoken").path != first.path
    assert find_store(FilesCorpus(path), GPT2, root).path != first.path
    rewrite(path, content)
    assert build(path, root).path == first.path


def test_another_ctime_or_inode_alone_keeps_the_store(tmp_path, monkeypatch, written):
    (folder := tmp_path / "c").mkdir()
    write_txt(folder / "small.txt", "some text")
    write_txt(folder / "large.txt", words(1_200_000))
    root = tmp_path / "tokens"
    first = build(folder, root, workers=1)
    written.clear()
    shutil.copytree(folder, tmp_path / "copy")  # with its times
    shutil.rmtree(folder)
    (tmp_path / "copy").rename(folder)
    assert build(folder, root).path == first.path
    assert not written
    monkeypatch.setattr(files, "open_raw", None)  # nothing is read the second time
    monkeypatch.setattr(files, "sha256_of", None)
    assert build(folder, root).path == first.path


def test_a_lookup_record_of_an_earlier_version_is_accepted_and_completed(tmp_path):
    path, root = write_txt(tmp_path / "a.txt", "one two three"), tmp_path / "tokens"
    first = build(path, root)
    (record,) = (root / ".requests").glob("*.json")
    values = json.loads(record.read_bytes())
    record.write_text(json.dumps({name: values[name] for name in ("stamps", "fingerprint")}))
    assert build(path, root).path == first.path
    assert json.loads(record.read_bytes()) == values
    rewrite(path, b"One two three")
    assert build(path, root).path != first.path


def test_a_process_that_may_not_start_others_tokenizes_alone(tmp_path, monkeypatch, caplog):
    path = write_txt(tmp_path / "a.txt", words(250_000))
    daemon = property(lambda _: True), type(multiprocessing.current_process())
    loky = (lambda **_: "loky"), multiprocessing
    for name, (value, owner) in {"daemon": daemon, "get_start_method": loky}.items():
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, value)
            patch.setattr(processes, "ProcessPoolExecutor", None)
            assert_builds(path, tmp_path / name, workers=4)
    assert caplog.text.count("this process may not start others") == 2


def test_a_worker_of_a_pool_builds(tmp_path):
    path = write_txt(tmp_path / "a.txt", words(250_000))
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        n_tokens = pool.apply(n_tokens_of, (path, tmp_path / "tokens"))
    assert n_tokens == build(path, tmp_path / "tokens").n_tokens


def n_tokens_of(path: Path, root: Path) -> int:
    plan.SHARD_BYTES = SHARD_BYTES
    return build(path, root, workers=4, engine="tiktoken").n_tokens


def test_builds_in_threads_keep_the_main_module():
    main, steps = sys.modules["__main__"], threading.Barrier(2)

    def submit():
        steps.wait()
        with processes._empty_main_module():
            time.sleep(0.01)

    threads = [threading.Thread(target=submit) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sys.modules["__main__"] is main
