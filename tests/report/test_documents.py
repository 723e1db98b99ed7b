"""The loss of each document, against a slow oracle that asks for the place of each target."""

from __future__ import annotations

import csv
import errno
import functools
import math
import resource
from collections import defaultdict

import numpy as np
import pytest

from lit_gptdata.report.documents import (
    COLUMNS,
    DocumentLosses,
    check_output,
    describe,
    draw_scores,
    write_scores,
)
from lit_gptdata.tokens.build import encode, plan
from lit_gptdata.tokens.build.local import prepare_store
from lit_gptdata.tokens.store import TokenStore
from lit_gptdata.tokens.tokenizer import Tokenizer
from lit_gptdata.training.errors import describe as describe_error
from tests.conftest import ListCorpus

TEXTS = ["one two", "", "", "three four five six seven", "é🙂 eight", "", "nine " * 400, "ten", ""]


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> TokenStore:
    """Nine documents, four of them without text, and one over several shards."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encode, "safe_chunks", functools.partial(encode.safe_chunks, size=16))
        patch.setattr(plan, "SHARD_BYTES", 500)
        return prepare_store(ListCorpus(TEXTS), Tokenizer("gpt2"), tmp_path_factory.mktemp("tokens"))


def scored(store: TokenStore, begin: int, end: int) -> DocumentLosses:
    """The losses of the targets of sliding windows; the loss of a target is 1 + a hundredth of it."""
    found, targets = DocumentLosses("", store, begin, end), np.arange(begin + 1, end)
    for batch in np.array_split(targets, 7):
        found.add(1 + batch / 100, batch)
    found.finish()
    return found


def rows(found: DocumentLosses) -> list[dict]:
    rows = (row for block in found.blocks() for row in zip(*block, strict=True))
    return [dict(zip(COLUMNS, row, strict=True)) for row in rows]


def oracle(tokens: list[tuple[int, bytes]], begin: int, end: int) -> dict[int, tuple[int, float, bytes]]:
    """Document → its targets, their loss, and their text. `tokens`: document and text of each token."""
    targets, nats, text = defaultdict(int), defaultdict(float), defaultdict(bytes)
    for token in range(begin + 1, end):
        number, utf8 = tokens[token]
        targets[number] += 1
        nats[number] += 1 + token / 100
        text[number] += utf8
    return {number: (targets[number], nats[number], text[number]) for number in targets}


def test_each_target_counts_for_its_document_in_any_range(store):
    assert len(store.shards) > 3
    n, tokenizer = store.n_tokens, Tokenizer("gpt2")
    ids = store.tokens[0:n].tolist()
    texts = [b"" if id == tokenizer.end_of_document else tokenizer.token_bytes[id] for id in ids]
    tokens = [(store.place(t).document, text) for t, text in enumerate(texts)]
    first, *_, last = [t for t, text in enumerate(texts) if not text]
    ranges = {(0, n), (0, last), (first, last), (first + 1, n), (5, 6), (n - 2, n), (300, 310), (9, 20)}
    for begin, end in [*ranges, *((b, b + 9) for b in range(0, 18))]:
        found, expected = rows(scored(store, begin, end)), oracle(tokens, begin, end)
        assert [row["document"] for row in found] == sorted(expected), (begin, end)
        for row in found:
            targets, nats, text = expected[row["document"]]
            assert (row["tokens"], row["nats"]) == (targets, pytest.approx(nats, rel=1e-12))
            utf8 = TEXTS[row["document"] - 1].encode()
            assert utf8[row["byte_begin"] : row["byte_end"]] == text, (begin, end, row)
            bits = nats / math.log(2) / len(text) if text else None
            assert row["bits_per_byte"] == (bits and pytest.approx(bits, rel=1e-12))


def test_the_separator_that_ends_the_range_counts_for_its_last_document(store):
    for end, document in ((store.n_tokens, 9), (store.n_tokens - 1, 8), (6, 4), (2, 1)):
        found = DocumentLosses("", store, 0, end)
        found.add(np.array([2.5]), np.array([-1]))
        found.finish()
        assert [(row["document"], row["nats"]) for row in rows(found)] == [(document, 2.5)]


def test_bytes_of_a_cut_document_are_not_known_if_the_tokenizer_changes_the_text(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    own = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({"[UNK]": 0, "<|endoftext|>": 1, "a": 2}, "[UNK]")
    )
    own.add_special_tokens(["<|endoftext|>"])
    own.normalizer = tokenizers.normalizers.Lowercase()
    own.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    texts = ["A  a a", "A A", "a\n\na a"]
    lossy = prepare_store(ListCorpus(texts), Tokenizer(own), tmp_path)
    assert not lossy.manifest.tokenizer.is_lossless
    found = rows(scored(lossy, 0, lossy.n_tokens - 1))
    assert [row["bits_per_byte"] is None for row in found] == [True, False, True]
    assert (found[1]["byte_begin"], found[1]["byte_end"]) == (0, 3)
    assert [row["tokens"] for row in found] == [3, 3, 2]


def test_csv_and_parquet_have_the_same_rows(store, tmp_path, monkeypatch):
    parquet = pytest.importorskip("pyarrow.parquet")
    sets = [scored(store, 0, 20), scored(store, 15, store.n_tokens)]
    sets[0].name = 'a "b", c'
    for name in ("a.csv", "a.parquet"):
        monkeypatch.setattr("lit_gptdata.report.documents.BLOCK", 2)
        write_scores(tmp_path / name, sets)
    table = parquet.read_table(tmp_path / "a.parquet").to_pylist()
    with open(tmp_path / "a.csv", newline="") as file:
        found = list(csv.DictReader(file))
    assert [*table[0]] == [*COLUMNS]
    assert [{k: "" if v is None else str(v) for k, v in row.items()} for row in table] == found
    assert table == [row for each in sets for row in rows(each)]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.csv", "a.parquet"]


@pytest.mark.parametrize("name", ["a.csv", "a.parquet"])
def test_a_full_disk_is_named_with_the_file_and_what_to_do(name, store, tmp_path):
    pytest.importorskip("pyarrow.parquet")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, limits[1]))  # a file that cannot grow
    try:
        with pytest.raises(OSError, match="File too large") as caught:
            write_scores(tmp_path / name, [scored(store, 0, store.n_tokens)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert describe_error(caught.value) == f"{tmp_path / name}: File too large"
    full = OSError(errno.ENOSPC, "No space left on device", caught.value.filename)
    assert describe_error(full).endswith("make room on the disk, and run the same command again")
    assert not [*tmp_path.iterdir()]


def test_short_documents_are_not_in_the_lists_and_text_is_visible(store):
    found = scored(store, 0, store.n_tokens)
    total, _, *lines = describe([found], 3, Tokenizer("gpt2"))[1:]
    assert total.split()[:4] == ["corpus", "8", "420", "2,044"]
    assert (
        lines[0]
        == "bits per byte, the highest first, of the 3 documents with ≥ 3 tokens (min_tokens=…):"
    )
    assert [line.split()[2] for line in lines[2:]] == ["7", "5", "4"]
    many = describe([found] * 14, 3, Tokenizer("gpt2"))
    numbers = "".join(line.split()[2] for line in many if "ListCorpus" in line)
    assert numbers == "7" * 14 + "5" * 6 + "4" * 14 + "5" * 6


def test_the_picture_has_a_line_for_each_of_several_sets(store, tmp_path):
    sets = [scored(store, 0, 20), scored(store, 15, store.n_tokens)]
    sets[0].name, sets[1].name = "web", "code"
    for number in (1, 2):
        draw_scores(sets[:number], 3, tmp_path / f"{number}.png")
        assert (tmp_path / f"{number}.png").read_bytes()[1:4] == b"PNG"


def test_an_output_of_another_kind_or_in_no_folder_is_refused(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"output must be a \.csv or .parquet file, got .*a.txt"):
        check_output(tmp_path / "a.txt")
    with pytest.raises(FileNotFoundError, match="make this folder"):
        check_output(tmp_path / "b" / "a.csv")
    monkeypatch.setitem(__import__("sys").modules, "pyarrow.parquet", None)
    with pytest.raises(ImportError, match=r"pip install 'lit-gptdata\[parquet\]'"):
        check_output(tmp_path / "a.parquet")
