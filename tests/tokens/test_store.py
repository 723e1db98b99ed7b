from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from lit_gptdata.text.files import FilesCorpus
from lit_gptdata.text.formats import Reading
from lit_gptdata.tokens.build import local as module
from lit_gptdata.tokens.build.local import find_store, prepare_store
from lit_gptdata.tokens.store import TokenStore
from lit_gptdata.tokens.tokenizer import Tokenizer
from tests.conftest import ListCorpus
from tests.tokens.test_tokenizer import wide_encoding

GPT2 = Tokenizer("gpt2")
TEXTS = ["It was on a dreary night.", "A second document — with ünïcode 🙂.", "", "Third"]


@pytest.fixture
def builds(monkeypatch) -> list[str]:
    """The fingerprint of every build that was run."""
    seen: list[str] = []
    build = module._build

    def counted(*args, **kwargs):
        seen.append(str(args[0]))
        return build(*args, **kwargs)

    monkeypatch.setattr(module, "_build", counted)
    return seen


def expected_ids(texts: list[str], tokenizer: Tokenizer) -> list[int]:
    """The documents' ids with the separator between them, none after the last."""
    ids: list[int] = []
    for number, text in enumerate(texts):
        ids += ([tokenizer.end_of_text] if number else []) + tokenizer.encode(text)
    return ids


@pytest.mark.parametrize("tokenizer", [GPT2, Tokenizer(wide_encoding())], ids=["uint16", "uint32"])
def test_ids_are_tiktokens_with_separators_between_documents(tmp_path, tokenizer):
    store = prepare_store(ListCorpus(TEXTS), tokenizer, tmp_path)
    ids = expected_ids(TEXTS, tokenizer)
    assert store.tokens[:].tolist() == ids
    assert store.n_tokens == len(ids)
    assert store.n_documents == len(TEXTS)
    assert store.n_bytes == sum(len(text.encode()) for text in TEXTS)
    assert store.dtype == tokenizer.dtype == store.tokens.dtype
    assert "n_tokens" in json.loads((store.path / "manifest.json").read_text())
    store.verify()


def test_the_index_says_where_documents_begin(tmp_path):
    store = prepare_store(ListCorpus(TEXTS), GPT2, tmp_path)
    rows = store.rows(0)
    rows = rows[rows["document"] == 1]
    lengths = [len(text.encode()) for text in TEXTS]
    assert rows["byte"].tolist() == [0, *np.cumsum(lengths)[:-1]]
    for row, text in zip(rows, TEXTS, strict=True):
        begin = int(row["token"])
        ids = GPT2.encode(text)
        assert store.tokens[begin : begin + len(ids)].tolist() == ids


def test_the_same_corpus_is_tokenised_once(tmp_path, builds):
    (tmp_path / "a.txt").write_text("some text")
    corpus = FilesCorpus(tmp_path / "a.txt")
    first = prepare_store(corpus, GPT2, tmp_path / "tokens")
    second = prepare_store(FilesCorpus(tmp_path / "a.txt"), GPT2, tmp_path / "tokens")
    assert first.fingerprint == second.fingerprint
    assert len(builds) == 1
    prepare_store(ListCorpus(TEXTS), GPT2, tmp_path / "tokens")
    prepare_store(ListCorpus(TEXTS), GPT2, tmp_path / "tokens")
    assert len(builds) == 2


def test_a_changed_file_is_a_new_store_and_a_touched_one_is_not(tmp_path, builds):
    path = tmp_path / "a.txt"
    path.write_text("some text")
    first = prepare_store(FilesCorpus(path), GPT2, tmp_path / "tokens")
    os.utime(path, ns=(1, 1))
    assert find_store(FilesCorpus(path), GPT2, tmp_path / "tokens") is None
    assert prepare_store(FilesCorpus(path), GPT2, tmp_path / "tokens").path == first.path
    assert len(builds) == 1
    path.write_text("more text")  # as long as before
    changed = prepare_store(FilesCorpus(path), GPT2, tmp_path / "tokens")
    assert changed.fingerprint != first.fingerprint
    assert changed.tokens[:].tolist() == GPT2.encode("more text")
    assert len(builds) == 2


def test_the_fingerprint_is_of_contents_not_of_paths(tmp_path, builds):
    (tmp_path / "a.txt").write_text("some text")
    (tmp_path / "b.txt").write_text("some text")
    stores = [prepare_store(FilesCorpus(tmp_path / n), GPT2, tmp_path / "t") for n in ("a.txt", "b.txt")]
    assert stores[0].path == stores[1].path
    assert len(builds) == 1


def test_policies_and_order_have_stores_of_their_own(tmp_path):
    for name, text in (("a", "one<|endoftext|>"), ("b", "two")):
        (tmp_path / f"{name}.txt").write_text(text)
    a, b = tmp_path / "a.txt", tmp_path / "b.txt"
    root = tmp_path / "tokens"
    stores = [
        prepare_store(FilesCorpus([a, b]), GPT2, root),
        prepare_store(FilesCorpus([b, a]), GPT2, root),
        prepare_store(FilesCorpus([a, b]), Tokenizer("gpt2", "text"), root),
        prepare_store(FilesCorpus([a, b], Reading(encoding_errors="replace")), GPT2, root),
    ]
    assert len({store.fingerprint for store in stores}) == 4
    assert stores[1].tokens[:].tolist() == expected_ids(["two", "one<|endoftext|>"], GPT2)


def test_a_refused_special_token_names_the_file_and_leaves_nothing(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one<|endoftext|>")
    root = tmp_path / "tokens"
    with pytest.raises(ValueError, match=rf"{path}: .*special_tokens='error' refuses"):
        prepare_store(FilesCorpus(path), Tokenizer("gpt2", "error"), root)
    assert find_store(FilesCorpus(path), Tokenizer("gpt2", "error"), root) is None
    assert not [p for p in root.iterdir() if not p.name.startswith(".")]


def test_invalid_utf8_leaves_nothing_and_a_mended_file_works(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"caf\xe9")
    root = tmp_path / "tokens"
    with pytest.raises(UnicodeError, match=r"a.txt is not valid UTF-8: byte 0xe9 at offset 3"):
        prepare_store(FilesCorpus(path), GPT2, root)
    assert not list(root.rglob("*.bin*"))
    path.write_text("café")
    assert prepare_store(FilesCorpus(path), GPT2, root).tokens[:].tolist() == GPT2.encode("café")


@pytest.mark.parametrize("name", ["00000-000.bin", "00000-000.idx", "vocab.bin"])
def test_a_file_cut_short_is_found_on_opening_and_a_flipped_byte_by_verify(tmp_path, name):
    store = prepare_store(ListCorpus(TEXTS), GPT2, tmp_path)
    path = store.path / name
    content = path.read_bytes()
    path.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    again = TokenStore(store.path)
    with pytest.raises(ValueError, match=rf"damaged: the contents of {name} do not match"):
        again.verify()
    path.write_bytes(content[:-1])
    size = len(content)
    message = rf"{name} has {size - 1:,} bytes, its manifest says {size:,}. Delete the folder"
    with pytest.raises(ValueError, match=message):
        TokenStore(store.path)
    path.unlink()
    with pytest.raises(ValueError, match=rf"{name} is missing"):
        TokenStore(store.path)


def test_a_folder_that_is_no_store_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"is no token store: it has no manifest.json"):
        TokenStore(tmp_path)


def test_the_nearest_document_is_found_without_reading_shards_further_away(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "Job", functools.partial(module.Job, shard_bytes=30))
    texts = ["ab " * n for n in (1, 40, 0, 0, 3, 90, 2, 2, 2, 2, 2, 60, 1, 0)]
    store = prepare_store(ListCorpus(texts), GPT2, tmp_path)
    every = np.concatenate([store.rows(shard) for shard in range(len(store.shards))])
    begins = every[(every["document"] == 1) & (every["token"] > 0)]
    read: list[int] = []
    rows = store.rows
    monkeypatch.setattr(store, "rows", lambda shard: read.append(shard) or rows(shard))
    for byte in range(0, store.n_bytes + 1, 5):
        for within in (0, 4, 50, store.n_bytes):
            away = zip(np.abs(begins["byte"] - byte).tolist(), begins["token"].tolist(), strict=True)
            nearest = min((pair for pair in away if pair[0] <= within), default=None)
            expected = None if nearest is None else nearest[1] - 1
            assert store.document_near(byte, within) == expected
    assert len(store.shards) > 4
    read.clear()
    store.document_near(0, store.n_bytes)
    assert len(read) < len(store.shards)


def test_more_shards_are_mapped_than_files_may_be_open_by_default(tmp_path):
    code = """
import resource, sys
from pathlib import Path
import numpy as np
from lit_gptdata.tokens.shards import Tokens
hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (200, hard))
paths = [Path(sys.argv[1]) / str(number) for number in range(300)]
for number, path in enumerate(paths):
    path.write_bytes(number.to_bytes(2, "little"))
assert Tokens.from_files(paths, np.dtype("<u2"))[:].tolist() == list(range(300))
"""
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, check=True)


BUILD = """
import sys
from pathlib import Path
from lit_gptdata.text.files import FilesCorpus
from lit_gptdata.text.formats import Reading
from lit_gptdata.tokens.build.local import prepare_store
from lit_gptdata.tokens.tokenizer import Tokenizer
print(prepare_store(FilesCorpus(sys.argv[1]), Tokenizer("gpt2"), Path(sys.argv[2])).fingerprint)
"""
ROOT = Path(__file__).parents[2]


def test_processes_at_once_make_one_store(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("a few words. " * 50_000)
    command = [sys.executable, "-c", BUILD, str(path), str(tmp_path / "tokens")]
    running = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    printed = {process.communicate()[0] for process in running}
    assert [process.returncode for process in running] == [0, 0, 0]
    assert len(printed) == 1
    assert not list((tmp_path / "tokens" / ".building").iterdir())
    assert len([p for p in (tmp_path / "tokens").iterdir() if not p.name.startswith(".")]) == 1


def test_a_killed_build_is_never_trusted(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("a few words. " * 200_000)
    root = tmp_path / "tokens"
    process = subprocess.Popen([sys.executable, "-c", BUILD, str(path), str(root)], cwd=ROOT)
    while not list(root.glob(".building/*/store/*")):
        assert process.poll() is None
        time.sleep(0.002)
    process.kill()
    process.wait()
    assert find_store(FilesCorpus(path), GPT2, root) is None
    store = prepare_store(FilesCorpus(path), GPT2, root)
    assert store.tokens[:].tolist() == GPT2.encode(path.read_text())
    assert not list((root / ".building").iterdir())
