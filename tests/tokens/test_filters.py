"""Bad documents and duplicates are left out, counted, and named, whatever built the store."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from lit_gptdata.text.document import Document
from lit_gptdata.text.files import FilesCorpus
from lit_gptdata.tokens.build.filters import HASH, later_copies
from lit_gptdata.tokens.store import TokenStore
from tests.tokens.builds import assert_holds, build, contents, words

SKIP = {"on_bad_document": "skip", "min_document_bytes": 4, "max_document_bytes": 1000}
LONG = "too long " * 200


def write_rows(path: Path, rows: list[str | None | bytes]) -> Path:
    """Write a file with a row or, as bytes, a raw line each, in the format of its name."""
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


def kinds(store: TokenStore) -> dict[str, int]:
    return {} if store.manifest.left_out is None else store.manifest.left_out.counts


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.parquet"])
def test_each_kind_of_bad_row_is_left_out_and_counted(tmp_path, name):
    rows = [None, "", "abc", "good one", LONG, b"bad \xff byte", "good two", b"\xfe"]
    path = write_rows(tmp_path / name, rows)
    store = build(path, tmp_path / "t", **SKIP)
    assert_holds(store, ["good one", "good two"])
    counts = {"empty": 1, "invalid UTF-8": 2, "null": 1, "too long": 1, "too short": 1}
    assert kinds(store) == counts
    examples = store.manifest.left_out.examples
    assert {e["source"] for e in examples} == {str(path)}
    places = [e["place"] for e in examples]
    if name.endswith("parquet"):
        assert places == ["row 1", "row 5", "row 7", "row 0", "row 4", "row 2"]
    assert [e["reason"] for e in examples if e["kind"] == "too long"] == ["over 1,000 bytes"]


def test_each_kind_of_bad_txt_is_left_out_whatever_the_workers(tmp_path):
    folder = tmp_path / "books"
    folder.mkdir()
    long = words(350_000)
    files = {
        "a.txt": b"abc",
        "b.txt": b"good one",
        "c.txt": b"x" * 500_000 + b"\xff",
        "d.txt": long.encode(),
        "e.txt": b"\xff in a small file",
        "f.txt": words(450_000, 1).encode(),
        "g.txt": b"good two",
    }
    for name, content in files.items():
        (folder / name).write_bytes(content)
    options = SKIP | {"max_document_bytes": 400_000}
    store = build(folder, tmp_path / "t", workers=1, **options)
    assert_holds(store, ["good one", long.replace("\r\n", "\n").replace("\r", "\n"), "good two"])
    assert kinds(store) == {"invalid UTF-8": 1, "too long": 2, "too short": 1}
    two = build(folder, tmp_path / "t2", workers=2, **options)
    assert contents(two) == contents(store)
    assert [Path(e["source"]).name for e in store.manifest.left_out.examples] == [
        "e.txt",
        "c.txt",
        "f.txt",
        "a.txt",
    ]


def test_copies_are_dropped_across_files_and_units(tmp_path):
    folder = tmp_path / "books"
    folder.mkdir()
    long = words(350_000)
    (folder / "a.txt").write_bytes(long.encode())
    rows = [words(9_000, n % 40) for n in range(80)]
    write_rows(folder / "b.jsonl", rows)
    (folder / "c.txt").write_bytes(long.encode())
    (folder / "d.txt.gz").write_bytes(gzip.compress(long.encode()))
    (folder / "e.txt").write_bytes(rows[3].encode())
    store = build(folder, tmp_path / "t", workers=1, drop_duplicates=True)
    unix = [text.replace("\r\n", "\n").replace("\r", "\n") for text in (long, rows[3])]
    assert_holds(store, [unix[0], *rows[:40], unix[1]])
    assert kinds(store) == {"duplicate": 42}
    two = build(folder, tmp_path / "t2", workers=2, drop_duplicates=True)
    assert contents(two) == contents(store)


def test_later_copies_finds_the_rows_whose_hash_came_earlier(monkeypatch):
    monkeypatch.setattr("lit_gptdata.tokens.build.filters.PART_HASHES", 50)
    monkeypatch.setattr("lit_gptdata.tokens.build.filters.BLOCK_HASHES", 7)
    rng = np.random.default_rng(0)
    hashes = np.zeros(500, HASH)
    hashes["low"], hashes["high"] = rng.integers(0, 20, 500), rng.integers(0, 20, 500)
    seen, expected = set(), []
    for row in hashes.tolist():
        expected.append(row[1:] in seen)
        seen.add(row[1:])
    assert later_copies(hashes).tolist() == expected
