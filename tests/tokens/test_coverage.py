"""Which sources a range of tokens covers, and the warning about a val split that changed."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_gptdata.tokens import coverage
from lit_gptdata.tokens.build import plan
from lit_gptdata.tokens.coverage import Covered, changed_val, covered, describe
from lit_gptdata.tokens.store import TokenStore
from lit_gptdata.windows.split import split_tokens
from tests.conftest import ListCorpus
from tests.tokens.builds import build

WORDS = "one two three "
KEY = {"corpus": "books/", "val_fraction": 0.1, "tokenizer": "gpt2"}


def store_of(folder: Path, texts: list[str]) -> TokenStore:
    """A store of files a.txt, b.txt, …"""
    folder.mkdir(exist_ok=True)
    for name, text in zip("abcdefgh", texts, strict=False):
        (folder / f"{name}.txt").write_text(text)
    return build(folder, folder.parent / "tokens")


def part(name: str, begin: float = 0.0, end: float = 1.0, sha256: str = "0" * 64) -> Covered:
    return Covered(path=name, sha256=sha256, begin=begin, end=end)


@settings(deadline=None, max_examples=8)
@given(
    sizes=st.lists(st.integers(1, 30), min_size=1, max_size=6),
    shard_bytes=st.sampled_from([150, 1 << 26]),
    cuts=st.lists(st.floats(0, 1), min_size=6, max_size=6),
)
def test_each_source_is_covered_by_its_fraction_of_bytes(tmp_path_factory, sizes, shard_bytes, cuts):
    folder = tmp_path_factory.mktemp("c")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "SHARD_BYTES", shard_bytes)
        store = store_of(folder / "books", [WORDS * n for n in sizes])
    ends = np.cumsum([len(WORDS) * n for n in sizes])
    for cut in cuts:
        begin, end = sorted((round(cut * store.n_tokens), store.n_tokens * len(cuts) // 7))
        start, stop = store.byte_at(begin), store.byte_at(end)
        expected = []
        for number, (high, size) in enumerate(zip(ends, np.diff(ends, prepend=0), strict=True)):
            low = high - size
            if start < high and stop > low and start < stop:
                fractions = max(0, start - low) / size, min(size, stop - low) / size
                expected.append(("abcdefgh"[number], *fractions))
        found = [(Path(p.path).stem, p.begin, p.end) for p in covered(store, begin, end)]
        assert found == expected
        for p in covered(store, begin, end):
            assert {s.path: s.sha256 for s in store.manifest.sources}[p.path] == p.sha256


def test_val_of_a_list_is_described_in_words(tmp_path):
    store = store_of(tmp_path / "books", [WORDS * 1000, WORDS * 1000])
    whole = tmp_path / "books" / "b.txt"
    split = split_tokens(store, 0.2, 0.0)
    assert (
        describe(covered(store, *split.train))
        == f"all of {whole.with_name('a.txt')}, the first 60 % of {whole}"
    )
    assert describe(covered(store, *split.val)) == f"the last 40 % of {whole}"
    assert describe(covered(store, *split.test)) == "nothing"
    assert describe(covered(store, *split_tokens(store, 0.5, 0.0).val)) == f"all of {whole}"
    (own,) = covered(build(ListCorpus([WORDS * 99, "", ""]), tmp_path), 0, 3 * 99 + 2)
    assert str(own) == "all of ListCorpus(3 texts)"


def test_a_description_is_short_and_without_secrets():
    assert str(part("a.txt", 0.25, 0.5)) == "25 % to 50 % of a.txt"
    assert str(part("a.txt", 0.99999)) == "the last 0.001 % of a.txt"
    assert str(part("a.txt", 0.001)) == "the last 99.90 % of a.txt"
    assert describe([part(f"{i}.txt") for i in range(4)]).endswith(", all of 3.txt")
    many = describe([part("0.txt", 0.63), *(part(f"{i}.txt") for i in range(1, 10_000))])
    assert many == (
        "the last 37 % of 0.txt, all of 1.txt, all of 2.txt, … and 9,997 more files up to 9999.txt"
    )
    assert "secret" not in str(part("https://user:secret@host/a.txt"))


def test_few_indexes_and_no_tokens_are_read_for_whole_sources(tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "SHARD_BYTES", len(WORDS))
    folder = tmp_path / "books"
    folder.mkdir()
    for number in range(40):
        (folder / f"{number:03}.txt").write_text(WORDS)
    store = build(folder, tmp_path / "tokens")
    assert len(store.shards) == 40
    read: list[int] = []
    rows = store.rows
    monkeypatch.setattr(store, "rows", lambda shard: read.append(shard) or rows(shard))
    monkeypatch.setattr(type(store.tokens), "__getitem__", lambda *_: pytest.fail("read tokens"))
    assert len(covered(store, store.rows(10)["token"][0], store.n_tokens)) == 30
    assert len(set(read)) < 20


def test_val_that_moved_is_a_warning_once(tmp_path):
    before = [part("books/y.txt", 0.63), part("books/z.txt")]
    assert changed_val(tmp_path, KEY, before) is None
    assert changed_val(tmp_path, KEY, before) is None
    after = [part("books/zz.txt", 0.2, sha256="1" * 64)]
    warning = changed_val(tmp_path, KEY, after)
    assert warning == (
        "val changed since the last run: it was the last 37 % of books/y.txt, all of books/z.txt, now "
        "it is the last 80 % of books/zz.txt; val losses of the two do not compare"
    )
    assert changed_val(tmp_path, KEY, after) is None


def test_other_contents_of_the_same_files_are_a_warning_but_a_move_is_none(tmp_path):
    changed_val(tmp_path, KEY, [part("books/z.txt")])
    assert changed_val(tmp_path, KEY, [part("elsewhere/z.txt")]) is None
    warning = changed_val(tmp_path, KEY, [part("elsewhere/z.txt", sha256="1" * 64)])
    assert warning is not None
    assert (
        "since the last run: other contents or borders of all of elsewhere/z.txt; val losses" in warning
    )
    part_of = part("z.txt", begin=0.5)
    changed_val(tmp_path, KEY, [part_of])
    warning = changed_val(tmp_path, KEY, [part("z.txt", begin=0.5001)])
    assert "other contents or borders of the last 50 % of z.txt" in warning


def test_another_choice_of_the_user_is_no_warning(tmp_path):
    changed_val(tmp_path, KEY, [part("z.txt", 0.9)])
    assert changed_val(tmp_path, KEY | {"val_fraction": 0.2}, [part("z.txt", 0.8)]) is None
    assert changed_val(tmp_path, KEY, [part("z.txt", 0.9)]) is None


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b"null", b"{}", b'{"covers": 1}', b"\xff"])
def test_a_damaged_record_is_replaced(tmp_path, damage):
    changed_val(tmp_path, KEY, [part("y.txt")])
    (record,) = (tmp_path / ".val").iterdir()
    record.write_bytes(damage)
    assert changed_val(tmp_path, KEY, [part("z.txt", sha256="1" * 64)]) is None
    assert json.loads(record.read_bytes())["covers"] == "all of z.txt"


def test_a_record_that_cannot_be_written_or_read_stops_nothing(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    assert changed_val(tmp_path / "file", KEY, [part("y.txt")]) is None
    changed_val(tmp_path, KEY, [part("y.txt")])

    def refuse(*_):
        raise PermissionError

    monkeypatch.setattr(coverage, "write_json", refuse)
    for _ in range(2):
        assert changed_val(tmp_path, KEY, [part("z.txt", sha256="1" * 64)])
    (record,) = (tmp_path / ".val").iterdir()
    record.unlink()
    record.mkdir()
    assert changed_val(tmp_path, KEY, [part("z.txt")]) is None


def test_many_processes_may_remember_at_the_same_time(tmp_path):
    vals = [[part(f"{i % 2}.txt", sha256=str(i % 2) * 64)] for i in range(40)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda val: changed_val(tmp_path, KEY, val), vals))
    (record,) = (tmp_path / ".val").iterdir()
    assert json.loads(record.read_bytes())["covers"] in ("all of 0.txt", "all of 1.txt")
