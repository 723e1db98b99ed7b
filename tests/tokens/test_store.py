from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from lit_gptdata.text import files, formats
from lit_gptdata.text.files import FilesCorpus
from lit_gptdata.text.formats import Reading
from lit_gptdata.tokens.build import local, plan
from lit_gptdata.tokens.build.local import find_store, prepare_store
from lit_gptdata.tokens.shards import ROW
from lit_gptdata.tokens.store import TokenStore, vocab_table
from lit_gptdata.tokens.tokenizer import Tokenizer
from tests.conftest import ListCorpus
from tests.tokens.builds import GPT2, ROOT, build
from tests.tokens.test_tokenizer import wide_encoding

TEXTS = ["It was on a dreary night.", "A second document — with ünïcode 🙂.", "", "Third"]


@pytest.fixture
def builds(monkeypatch) -> list[plan.BuildPlan]:
    """The plans of the builds that run."""
    seen, build = [], local._build
    monkeypatch.setattr(local, "_build", lambda *args: seen.append(args[0]) or build(*args))
    return seen


def expected_ids(texts: list[str], tokenizer: Tokenizer) -> list[int]:
    """The ids of the documents with a separator between them."""
    ids: list[int] = []
    for number, text in enumerate(texts):
        ids += ([tokenizer.end_of_document] if number else []) + tokenizer.encode(text)
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


def test_the_same_corpus_is_tokenized_once(tmp_path, builds):
    (tmp_path / "a.txt").write_text("some text")
    corpus = FilesCorpus(tmp_path / "a.txt")
    first = build(corpus, tmp_path / "tokens")
    second = build(tmp_path / "a.txt", tmp_path / "tokens")
    assert first.fingerprint == second.fingerprint
    assert len(builds) == 1
    build(ListCorpus(TEXTS), tmp_path / "tokens")
    build(ListCorpus(TEXTS), tmp_path / "tokens")
    assert len(builds) == 2


def test_a_changed_file_makes_a_new_store_but_a_touched_file_does_not(tmp_path, builds):
    path = tmp_path / "a.txt"
    path.write_text("some text")
    first = build(path, tmp_path / "tokens")
    os.utime(path, ns=(1, 1))
    assert find_store(FilesCorpus(path), GPT2, tmp_path / "tokens") is None
    assert build(path, tmp_path / "tokens").path == first.path
    assert len(builds) == 1
    path.write_text("more text")  # as long as before
    changed = build(path, tmp_path / "tokens")
    assert changed.fingerprint != first.fingerprint
    assert changed.tokens[:].tolist() == GPT2.encode("more text")
    assert len(builds) == 2


def test_a_changed_lookup_key_links_the_store_again_without_tokenizing(tmp_path, builds, monkeypatch):
    """The version before left the formats out of the key, so its lookup records are not found."""
    path, root = tmp_path / "a.txt", tmp_path / "tokens"
    path.write_text("some text")
    first = build(path, root)
    (record,) = (root / ".requests").iterdir()
    old_key = plan._hash([1, GPT2.fingerprint, first.manifest.reading, [str(path)]])
    record.rename(record.with_name(f"{old_key}.json"))
    hashed, sha256_of = [], files.sha256_of
    monkeypatch.setattr(files, "sha256_of", lambda f, **kw: hashed.append(f) or sha256_of(f, **kw))
    assert find_store(FilesCorpus(path), GPT2, root) is None
    assert build(path, root).path == first.path
    assert find_store(FilesCorpus(path), GPT2, root)
    assert len(builds) == 1
    assert hashed == [path]


def test_a_file_whose_suffix_becomes_a_format_is_tokenized_again(tmp_path, monkeypatch):
    path, root = tmp_path / "a.csv", tmp_path / "tokens"
    path.write_text(json.dumps({"text": "some text"}))
    format_of = formats.format_of
    with monkeypatch.context() as patch:  # as an earlier version, which did not look at the content
        patch.setattr(formats, "format_of", lambda path: replace(format_of(path), kind_of=None))
        assert GPT2.decode(build(path, root).tokens[:]) == path.read_text()
    for module in (formats, files, plan):
        monkeypatch.setattr(module, "format_of", lambda path: format_of(path.with_suffix(".jsonl")))
    assert find_store(FilesCorpus(path), GPT2, root) is None
    assert GPT2.decode(build(path, root).tokens[:]) == "some text"


OLD_MANIFEST = """{"format": 1, "fingerprint": "1cb6eb290e0a63ce914d40b90c88d5df", "tokenizer": {
  "name": "gpt2", "special_tokens": "allow",
  "fingerprint": "2268a45e0643fae4f3374baf541c2ac64e1b9435ea5ab4ad4beecbd94697099f",
  "vocab_size": 50257, "dtype": "<u2"},
"reading": {"encoding_errors": "strict", "text_column": "text", "strip_gutenberg": false},
"n_tokens": 16, "n_bytes": 59, "n_documents": 3,
"sources": [
  {"path": "text/a.txt", "size": 35, "format": "txt",
   "sha256": "3647696bf3dd2d57635347e88fdfe3f9384ab5cf957c3ea027f72d97468ca71b"},
  {"path": "text/b.jsonl", "size": 50, "format": "jsonl",
   "sha256": "b6971306bf2236b0995aabc35b529d7e8c4c522183c7f203042d2534b98de7d1"}],
"vocab": {"name": "vocab.bin", "size": 201028,
  "sha256": "24d904d9fe3d36aa09783a4a59c2478c40f206f259762111a3209198db054adf"},
"shards": [{"n_tokens": 16, "n_bytes": 59, "n_documents": 3, "files": [
  {"name": "00000-000.bin", "size": 32,
   "sha256": "9fa5ca22f4d192774fa1ceda08d6fb89ba817ef9805feec3211f50d7be23dd24"},
  {"name": "00000-000.idx", "size": 72,
   "sha256": "f724f7b78de0d6d2a19c279354b2ee0bf96055ab8d3e425d4db5284d00f9fab3"}]}]}"""


def test_a_store_of_the_version_before_opens_and_is_built_the_same_today(tmp_path):
    """`OLD_MANIFEST` was written by commit ae5adf1, before the manifest was typed."""
    texts = ["A manifest from the version before.", "One row.", "And another row."]
    old = tmp_path / json.loads(OLD_MANIFEST)["fingerprint"]
    old.mkdir()
    (old / "manifest.json").write_text(OLD_MANIFEST)
    (old / "00000-000.bin").write_bytes(np.array(expected_ids(texts, GPT2), "<u2").tobytes())
    index = [(0, 0, 0, 1), (8, 35, 1, 1), (12, 43, 1, 1)]
    (old / "00000-000.idx").write_bytes(np.array(index, ROW).tobytes())
    (old / "vocab.bin").write_bytes(vocab_table(GPT2).tobytes())
    store = TokenStore(old)
    store.verify()
    assert str(store.place(12)) == "text/b.jsonl, document 3, byte 0"

    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text(texts[0])
    rows = [json.dumps({"text": text}) + "\n" for text in texts[1:]]
    (tmp_path / "text" / "b.jsonl").write_text("".join(rows))
    today = build(tmp_path / "text", tmp_path / "tokens")
    manifest = json.loads((today.path / "manifest.json").read_text())
    for source in manifest["sources"]:
        source["path"] = f"text/{Path(source['path']).name}"
    assert json.dumps(manifest) == json.dumps(json.loads(OLD_MANIFEST))


def test_every_order_policy_and_reading_option_has_its_own_store(tmp_path):
    for name, text in (("a", "one<|endoftext|>"), ("b", "two")):
        (tmp_path / f"{name}.txt").write_text(text)
    a, b = tmp_path / "a.txt", tmp_path / "b.txt"
    root = tmp_path / "tokens"
    stores = [
        build([a, b], root),
        build([b, a], root),
        prepare_store(FilesCorpus([a, b]), Tokenizer("gpt2", "text"), root),
        build(FilesCorpus([a, b], Reading(encoding_errors="replace")), root),
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
    assert not list(root.rglob("*.bin*"))


@pytest.mark.parametrize("name", ["00000-000.bin", "00000-000.idx", "vocab.bin"])
def test_opening_finds_a_truncated_file_and_verify_a_flipped_byte(tmp_path, name):
    store = build(ListCorpus(TEXTS), tmp_path)
    path = store.path / name
    content = path.read_bytes()
    path.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    with pytest.raises(ValueError, match=rf"damaged: the contents of {name} do not match"):
        TokenStore(store.path).verify()
    path.write_bytes(content[:-1])
    size = len(content)
    message = rf"{name} has {size - 1:,} bytes, but its manifest says {size:,}. Delete the folder"
    with pytest.raises(ValueError, match=message):
        TokenStore(store.path)
    path.unlink()
    with pytest.raises(ValueError, match=rf"{name} is missing"):
        TokenStore(store.path)


def changed(**changes) -> bytes:
    """The manifest of the version before, with other values."""
    return json.dumps(json.loads(OLD_MANIFEST) | changes).encode()


SHARD = json.loads(OLD_MANIFEST)["shards"][0]
VOCAB_FILE = json.loads(OLD_MANIFEST)["vocab"]
OTHER_TOKENIZERS = [
    json.loads(OLD_MANIFEST)["tokenizer"] | change
    for change in ({"dtype": "<u8"}, {"dtype": 2}, {"vocab_size": "many"}, {"x": 1})
]


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "Expecting value"),
        (OLD_MANIFEST[:400].encode(), ""),
        (b"\xff\xfe", ""),
        (b"[" * 100_000, ""),
        (b"[]", "another structure"),
        (b"null", "another structure"),
        (b"{}", "another structure than a manifest: 'format'"),
        (b'{"format": 1}', "another structure than a manifest: 'tokenizer'"),
        (changed(format=2), "its format is 2, this version reads 1: a newer lit-gptdata may read it"),
        (changed(shards={}), "n_tokens is 16, but the shards have 0"),
        (changed(shards=[SHARD | {"n_tokens": -1}]), "n_tokens must be an integer ≥ 0, got -1"),
        (changed(shards=[SHARD | {"n_documents": "3"}]), "n_documents must be .* got '3'"),
        (changed(shards=[SHARD | {"files": [VOCAB_FILE] * 3}]), ""),
        (changed(shards=[5]), "another structure"),
        (changed(n_bytes=True), "n_bytes is True, but the shards have 59"),
        (changed(n_tokens=17), "n_tokens is 17, but the shards have 16"),
        (changed(vocab=VOCAB_FILE | {"size": -4}), "does not describe a file"),
        (changed(vocab=VOCAB_FILE | {"size": 4}), "vocab.bin has 4 bytes, but its contents take 201028"),
        (changed(sources=[]), "names no sources"),
        (changed(sources=["a.txt"]), "another structure"),
        *((changed(tokenizer=tokenizer), "") for tokenizer in OTHER_TOKENIZERS),
    ],
)
def test_a_damaged_manifest_names_its_file_and_the_next_step(tmp_path, content, problem):
    (tmp_path / "manifest.json").write_bytes(content)
    path = tmp_path / "manifest.json"
    step = rf"Delete the folder {tmp_path} and run again to rebuild it, or publish it again"
    message = rf"token store is damaged: {path} cannot be read \(.*{problem}.*\)\. {step}"
    with pytest.raises(ValueError, match=message) as caught:
        TokenStore(tmp_path)
    assert "Error" not in str(caught.value)


def test_a_damaged_store_is_named_by_the_next_run_and_rebuilt_after_its_removal(tmp_path):
    store = build(ListCorpus(TEXTS), tmp_path)
    (store.path / "manifest.json").write_text("{")
    for use in (find_store, prepare_store):
        with pytest.raises(ValueError, match=rf"{store.path}/manifest.json cannot be read"):
            use(ListCorpus(TEXTS), GPT2, tmp_path)
    shutil.rmtree(store.path)
    build(ListCorpus(TEXTS), tmp_path).verify()


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "5", "{}", '{"fingerprint": 5, "stamps": []}', '{"fingerprint": "", "stamps": []}'],
)
def test_a_damaged_lookup_record_is_ignored_and_written_again(tmp_path, builds, content):
    store = build(ListCorpus(TEXTS), tmp_path)
    (record,) = (tmp_path / ".requests").iterdir()
    written = record.read_text()
    record.write_text(content)
    assert find_store(ListCorpus(TEXTS), GPT2, tmp_path) is None
    assert build(ListCorpus(TEXTS), tmp_path).path == store.path
    assert record.read_text() == written
    assert len(builds) == 1


def test_a_folder_without_a_manifest_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(FileNotFoundError, match=r"file is not a token store: it has no manifest.json"):
        TokenStore(tmp_path / "file")
    with pytest.raises(FileNotFoundError, match=r"is not a token store: it has no manifest.json"):
        TokenStore(tmp_path)


def test_document_near_finds_the_nearest_document_without_reading_far_shards(tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "SHARD_BYTES", 30)
    texts = ["ab " * n for n in (1, 40, 0, 0, 3, 90, 2, 2, 2, 2, 2, 60, 1, 0)]
    store = build(ListCorpus(texts), tmp_path)
    every = np.concatenate([store.rows(shard) for shard in range(len(store.shards))])
    inside = (every["byte"] > 0) & (every["byte"] < store.n_bytes)
    begins = every[(every["document"] == 1) & inside]
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
    store.document_near(0, within=30)
    assert len(read) < len(store.shards)


def test_more_shards_can_be_mapped_than_the_default_limit_of_open_files(tmp_path):
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
