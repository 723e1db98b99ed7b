"""Bad documents and duplicates are left out, counted and named, the same whatever builds the store."""

from __future__ import annotations

import gzip
import json
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path

import fsspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_gptdata import GPTDataModule
from lit_gptdata.cli.main import main
from lit_gptdata.report.duplicates import count_duplicates
from lit_gptdata.text.files import FilesCorpus
from lit_gptdata.text.formats import Reading
from lit_gptdata.tokens.build import filters, plan
from lit_gptdata.tokens.build.encode import Encoder
from lit_gptdata.tokens.build.filters import HASH, later_copies
from lit_gptdata.tokens.build.plan import BuildOptions
from lit_gptdata.tokens.remote.publish import publish_text
from lit_gptdata.tokens.store import TokenStore
from tests.conftest import ListCorpus
from tests.tokens.builds import GPT2, assert_holds, build, contents, litter, words

SKIP = {"on_bad_document": "skip", "min_document_bytes": 4, "max_document_bytes": 1000}
LONG = "too long " * 200


def write_rows(path: Path, rows: list[str | bytes | None]) -> Path:
    """Write a file with a row for each text, None or raw bytes, in the format of its name."""
    if path.suffix == ".parquet":
        arrow, parquet = (pytest.importorskip(name) for name in ("pyarrow", "pyarrow.parquet"))
        values = [row.encode() if isinstance(row, str) else row for row in rows]
        parquet.write_table(arrow.table({"text": arrow.array(values, arrow.binary())}), path)
        return path
    lines = [
        b'{"text": "' + row + b'"}' if isinstance(row, bytes) else json.dumps({"text": row}).encode()
        for row in rows
    ]
    content = b"\n".join(lines) + b"\n"
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def counts(store: TokenStore) -> dict[str, int]:
    return {} if store.manifest.left_out is None else store.manifest.left_out.counts


def unix(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n")


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.parquet"])
def test_each_kind_of_bad_row_is_left_out_and_counted(tmp_path, name):
    rows = [None, "", "abc", "good one", LONG, b"bad \xff byte", "good two", b"\xfe"]
    path = write_rows(tmp_path / name, rows)
    store = build(path, tmp_path / "t", **SKIP)
    assert_holds(store, ["good one", "good two"])
    found = {"empty": 1, "invalid UTF-8": 2, "null": 1, "too long": 1, "too short": 1}
    assert counts(store) == found
    assert str(store.manifest.left_out) == (
        "6 documents: 1 empty, 2 invalid UTF-8, 1 null, 1 too long, 1 too short"
    )
    examples = store.manifest.left_out.examples
    assert Counter(example["kind"] for example in examples) == found
    assert {example["source"] for example in examples} == {str(path)}
    reasons = {example["kind"]: example["reason"] for example in examples}
    assert reasons["null"] == "the text is null"
    assert (reasons["empty"], reasons["too short"]) == ("0 bytes", "3 bytes")
    assert reasons["too long"] == "over 1,000 bytes"
    assert reasons["invalid UTF-8"].startswith("is not valid UTF-8: byte 0xfe at offset ")
    places = [example["place"] for example in examples]
    if name == "a.parquet":
        assert places == ["row 1", "row 5", "row 7", "row 0", "row 4", "row 2"]
    else:
        assert places[3] == "line at byte 0"
        assert places[0] == f"line at byte {len(json.dumps({'text': None})) + 1}"


def test_without_the_option_nothing_changes(tmp_path):
    rows = [None, "", "abc", "good", "abc"]
    store = build(write_rows(tmp_path / "a.jsonl", rows), tmp_path / "t")
    assert_holds(store, ["", "abc", "good", "abc"])
    manifest = json.loads((store.path / "manifest.json").read_bytes())
    assert "left_out" not in manifest
    assert manifest["reading"] == vars(Reading())
    for limits in ({"min_document_bytes": 1}, {"max_document_bytes": 9}):
        assert plan.BuildOptions(**limits).filters == {}


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([b"x\xff"], {}, "byte 0 is not valid UTF-8: byte 0xff at offset 11"),
        ([rb"\ud800"], {}, r"byte 0 holds a lone surrogate '\\ud800': set encoding_errors"),
        (
            ["long"],
            {"max_document_bytes": 3},
            "byte 0: the document is longer than max_document_bytes=3",
        ),
        (["ok", "a"], {"min_document_bytes": 2}, "byte 15: the document is shorter than min_document"),
        (["a"], {"drop_duplicates": True, "min_document_bytes": 2}, "byte 0: the document is shorter"),
        ([b"x\xff"], {"drop_duplicates": True}, "byte 0 is not valid UTF-8: byte 0xff"),
    ],
)
def test_by_default_a_bad_document_is_an_error(tmp_path, rows, options, message):
    path = write_rows(tmp_path / "a.jsonl", rows)
    with pytest.raises(ValueError, match=message):
        build(path, tmp_path / "t", **options)


def test_a_limit_applies_to_a_store_that_exists(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", ["first", "b", "third"])
    store = build(path, tmp_path / "t")
    with pytest.raises(ValueError, match="document 2: the document is shorter than"):
        build(path, tmp_path / "t", min_document_bytes=2)
    assert build(path, tmp_path / "t", min_document_bytes=1).path == store.path
    skipped = build(path, tmp_path / "t", on_bad_document="skip", min_document_bytes=2)
    assert_holds(skipped, ["first", "third"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"on_bad_document": "ignore"}, "on_bad_document must be one of .*, got 'ignore'"),
        ({"min_document_bytes": 0}, "min_document_bytes must be an integer ≥ 1"),
        ({"min_document_bytes": 9, "max_document_bytes": 8}, "min_document_bytes=9 is larger than max"),
        ({"drop_duplicates": "yes"}, "drop_duplicates must be"),
    ],
)
def test_an_invalid_option_is_refused(options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        GPTDataModule(**options)


def test_each_kind_of_bad_txt_is_left_out_whatever_the_workers(tmp_path):
    (folder := tmp_path / "books").mkdir()
    long = words(350_000)
    files = {
        "a.txt": b"abc", "b.txt": b"good one", "c.txt": b"x" * 500_000 + b"\xff", "d.txt": long.encode(),
        "e.txt": b"\xff in a small file", "f.txt": words(450_000, 1).encode(), "g.txt": b"good two",
        "h.txt": words(300_000, 2).encode() + b"\xff",
        "i.txt.gz": gzip.compress(words(500_000, 3).encode()),
    }  # fmt: skip
    for name, content in files.items():
        (folder / name).write_bytes(content)
    options = SKIP | {"max_document_bytes": 400_000}
    store = build(folder, tmp_path / "t", workers=1, **options)
    assert_holds(store, ["good one", unix(long), "good two"])
    assert counts(store) == {"invalid UTF-8": 2, "too long": 3, "too short": 1}
    places = [(Path(e["source"]).name, e["kind"]) for e in store.manifest.left_out.examples]
    assert places == [
        ("e.txt", "invalid UTF-8"), ("h.txt", "invalid UTF-8"), ("c.txt", "too long"),
        ("f.txt", "too long"), ("i.txt.gz", "too long"), ("a.txt", "too short"),
    ]  # fmt: skip
    assert contents(build(folder, tmp_path / "t2", workers=2, **options)) == contents(store)


def test_a_file_that_is_not_text_is_refused_with_any_option(tmp_path):
    (tmp_path / "a.txt").write_bytes("text in UTF-16".encode("utf-16"))
    with pytest.raises(ValueError, match=r"a.txt is UTF-16: run iconv"):
        build(tmp_path / "a.txt", tmp_path / "t", on_bad_document="skip")


def test_an_empty_file_is_left_out(tmp_path):
    (folder := tmp_path / "texts").mkdir()
    for name, text in {"a.txt": "", "b.jsonl": "", "c.txt": "good", "d.txt": ""}.items():
        (folder / name).write_text(text)
    options = {"max_length": 1, "data_dir": tmp_path / "data", "build_workers": 1}
    with pytest.raises(ValueError, match=r"a.txt is empty"):
        GPTDataModule(folder, **options).prepare_data()
    GPTDataModule(folder, on_bad_document="skip", **options).prepare_data()
    (manifest,) = (tmp_path / "data/tokens").glob("*/manifest.json")
    store = TokenStore(manifest.parent)
    assert_holds(store, ["good"])
    assert counts(store) == {"empty": 2}


def test_invalid_bytes_that_are_replaced_are_not_bad(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", [b"x\xff", rb"\ud800", None])
    corpus = FilesCorpus(path, Reading(encoding_errors="replace"))
    store = build(corpus, tmp_path / "t", on_bad_document="skip")
    assert_holds(store, ["x\ufffd", "\ufffd"])
    assert counts(store) == {"null": 1}


def test_an_invalid_book_is_left_out_before_its_license_is_removed(tmp_path):
    mark = "*** {} OF THE PROJECT GUTENBERG EBOOK A ***"
    marks = f"{mark.format('START')}\n{{}}\n{mark.format('END')}"
    (folder := tmp_path / "books").mkdir()
    (folder / "a.txt").write_bytes(marks.format("Bad").encode() + b"\xff")
    (folder / "b.txt").write_text(marks.format("Good"))
    (folder / "c.txt").write_text("")
    corpus = FilesCorpus(folder, Reading(strip_gutenberg=True), keep_empty=True)
    store = build(corpus, tmp_path / "t", on_bad_document="skip")
    assert (store.n_documents, counts(store)) == (1, {"empty": 1, "invalid UTF-8": 1})


def test_if_all_are_left_out_the_error_counts_them(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", [None, "", "abc"])
    message = r"no text remains \(left out 3 documents: 1 empty, 1 null, 1 too short\): change"
    with pytest.raises(ValueError, match=message):
        build(path, tmp_path / "t", **SKIP)
    assert not litter(tmp_path / "t")


def test_your_own_corpus_is_filtered(tmp_path):
    texts = ["abc", "twice as good", "", LONG, "twice as good", "last"]
    store = build(ListCorpus(texts), tmp_path / "t", drop_duplicates=True, **SKIP)
    assert_holds(store, ["twice as good", "last"])
    assert counts(store) == {"duplicate": 1, "empty": 1, "too long": 1, "too short": 1}
    examples = {e["kind"]: (e["source"], e["place"]) for e in store.manifest.left_out.examples}
    assert examples["duplicate"] == ("ListCorpus(6 texts)", "list:4")


class PartsCorpus(ListCorpus):
    """Each text is a document and a part that continues it."""

    def __iter__(self):
        for document in super().__iter__():
            for index, chunk in enumerate(document.chunks):
                yield replace(document, chunks=iter([chunk]), continues=index > 0)


def test_a_document_in_parts_is_filtered_as_a_whole(tmp_path):
    texts = ["a b c d", "a b x y", "a b c d", "", "a", "a b" + " c" * 600]
    store = build(PartsCorpus(texts), tmp_path / "t", drop_duplicates=True, **SKIP)
    assert_holds(store, ["a b c d", "a b x y"])
    assert counts(store) == {"duplicate": 1, "empty": 1, "too long": 1, "too short": 1}


def test_copies_are_dropped_across_files_and_units(tmp_path):
    (folder := tmp_path / "books").mkdir()
    long = words(350_000)
    (folder / "a.txt").write_bytes(long.encode())
    rows = [words(9_000, n % 40) for n in range(80)]
    write_rows(folder / "b.jsonl", rows)
    (folder / "c.txt").write_bytes(long.encode())
    (folder / "d.txt.gz").write_bytes(gzip.compress(long.encode()))
    (folder / "e.txt").write_bytes(rows[3].encode())
    store = build(folder, tmp_path / "t", workers=1, drop_duplicates=True)
    assert_holds(store, [unix(long), *rows[:40], unix(rows[3])])  # newlines of JSON stay as they are
    assert counts(store) == {"duplicate": 42}
    assert contents(build(folder, tmp_path / "t2", workers=2, drop_duplicates=True)) == contents(store)
    assert count_duplicates(store) == 0


TEXTS = st.sampled_from(
    [None, "", "ab", "good", "better", "best of all", LONG, b"\xff", "a b c d e " * 30]
)


@settings(max_examples=15, deadline=None)
@given(
    files=st.lists(st.lists(TEXTS, min_size=1, max_size=9), min_size=1, max_size=4),
    size=st.integers(40, 900), drops=st.booleans(),
)  # fmt: skip
def test_the_rest_is_encoded_as_if_it_were_all(tmp_path_factory, files, size, drops):
    folder, seen, expected, found = tmp_path_factory.mktemp("rows"), set(), [], Counter()
    for number, rows in enumerate(files):
        write_rows(folder / f"{number}.jsonl", rows)
        for text in rows:
            length = len(text) if isinstance(text, str) else None
            kind = "null" if text is None else "invalid UTF-8" if length is None else ""
            kind = kind or ("too short" if length < 4 else "too long" if length > 1000 else "")
            kind = "empty" if text == "" else kind
            if not kind and drops and text in seen:
                kind = "duplicate"
            seen.add(text)
            found[kind] += 1
            expected += [] if kind else [text]
    n_good = found.pop("", 0)
    root = tmp_path_factory.mktemp("tokens")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "SHARD_BYTES", size)
        options = SKIP | {"drop_duplicates": drops, "engine": "tiktoken", "workers": 1}
        if not n_good:
            with pytest.raises(ValueError, match="no text remains"):
                build(folder, root, **options)
            return
        store = build(folder, root, **options)
    assert_holds(store, expected)
    assert counts(store) == found


@pytest.mark.parametrize("stop", ["hash", "encode"])
@pytest.mark.parametrize("target", ["folder", "memory"])
def test_a_killed_build_resumes(tmp_path, monkeypatch, stop, target):
    rng = random.Random(0)
    rows = [rng.choice([None, "", words(4000, rng.randrange(60))]) for _ in range(300)]
    path = write_rows(tmp_path / "a.jsonl", rows)
    options = {"on_bad_document": "skip", "drop_duplicates": True, "engine": "tiktoken", "workers": 1}
    expected = contents(build(path, tmp_path / "expected", **options))

    def run() -> dict[str, bytes]:
        if target == "folder":
            return contents(build(path, tmp_path / "t", **options))
        url = publish_text(FilesCorpus(path), GPT2, f"memory://{stop}", BuildOptions(**options))
        fs, root = fsspec.core.url_to_fs(url)
        return {Path(name).name: fs.cat(name) for name in fs.find(root)}

    encode, done = Encoder.encode_unit, []

    def killed(self, unit, *rest):
        if self.hashes_only == (stop == "hash") and unit == 2:
            raise KeyboardInterrupt
        return encode(self, unit, *rest)

    def counted(self, unit, *rest):
        done.append((self.hashes_only, unit))
        return encode(self, unit, *rest)

    monkeypatch.setattr(Encoder, "encode_unit", killed)
    with pytest.raises(KeyboardInterrupt):
        run()
    monkeypatch.setattr(Encoder, "encode_unit", counted)
    assert run() == expected
    n_units = 1 + max(unit for _, unit in done)
    assert n_units > 4
    hashed, encoded = ([unit for only, unit in done if only == which] for which in (True, False))
    assert hashed == (list(range(2, n_units)) if stop == "hash" else [])
    assert encoded == list(range(0 if stop == "hash" else 2, n_units))


def test_later_copies_finds_the_rows_whose_hash_came_earlier(monkeypatch):
    monkeypatch.setattr(filters, "PART_HASHES", 50)
    monkeypatch.setattr(filters, "BLOCK_HASHES", 7)
    rng = np.random.default_rng(0)
    hashes = np.zeros(500, HASH)
    hashes["low"], hashes["high"] = rng.integers(0, 20, 500), rng.integers(0, 20, 500)
    seen, expected = set(), []
    for row in hashes.tolist():
        expected.append(row in seen)
        seen.add(row)
    assert later_copies(hashes).tolist() == expected
    assert later_copies(hashes[:0]).tolist() == []


@pytest.mark.parametrize("block", [3, 1 << 20])
def test_duplicates_of_a_store_are_counted(tmp_path, monkeypatch, block):
    monkeypatch.setattr("lit_gptdata.report.duplicates.BLOCK_TOKENS", block)
    rng = random.Random(1)
    texts = ["", *(words(rng.choice([40, 41, 900]), rng.randrange(30)) for _ in range(200)), ""]
    store = build(ListCorpus(texts), tmp_path / "t")
    n = len(texts) - len(set(texts))
    assert count_duplicates(store) == n > 50
    monkeypatch.setattr("lit_gptdata.report.duplicates.later_copies", None)
    assert count_duplicates(TokenStore(store.path)) == n  # recorded


def test_the_commands_say_what_is_left_out(tmp_path, capsys):
    write_rows(Path("web.jsonl"), [None, "", *["the same text " * 30] * 3, words(2000)])
    Path("code.txt").write_text(words(4000))
    web = "{path: web.jsonl, on_bad_document: skip}"
    corpus = f"data.corpus={{web: {web}, code: {{path: code.txt, drop_duplicates: true}}}}"
    overrides = ["data=sources", corpus, "data.max_length=16"]
    for command in ("prepare", "info"):
        assert main([command, *overrides]) == 0
        printed = capsys.readouterr().out
        assert "\n  left out 2 documents: 1 empty, 1 null of web\n" in printed
    assert "  copies   2 of 4 documents have the text of an earlier one. Set data.drop_dup" in printed
    assert "  copies   0, because drop_duplicates left them out (source code)\n" in printed
    one = ["data=files", "data.corpus=web.jsonl", "data.on_bad_document=skip", "data.max_length=16"]
    assert main(["info", *one]) == 0
    assert "\n  left out 2 documents: 1 empty, 1 null\n" in capsys.readouterr().out


def test_the_output_of_datatrove_and_dolma_is_a_corpus(tmp_path):
    """The layouts of their documentation: datatrove's JsonlWriter, `dolma mix`."""
    rows = [{"text": f"document {n}", "id": f"<{n}>", "metadata": {"url": "a"}} for n in range(4)]
    for number, name in enumerate(["datatrove/00000", "datatrove/00001", "dolma/documents/web-0000"]):
        path = tmp_path / f"{name}.{'jsonl' if number < 2 else 'json'}.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(gzip.compress(b"".join(json.dumps(row).encode() + b"\n" for row in rows)))
    store = build(tmp_path / "datatrove", tmp_path / "t", drop_duplicates=True)
    assert_holds(store, [row["text"] for row in rows])
    assert build(tmp_path / "dolma" / "documents", tmp_path / "t").n_documents == 4
