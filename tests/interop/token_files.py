"""What the tests of token files share: ids, files, and checks of a store."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lit_gptdata import Tokenizer
from lit_gptdata.cli.main import main
from lit_gptdata.interop import blocks, exporting, formats, importing
from lit_gptdata.tokens.build.local import prepare_store
from lit_gptdata.tokens.store import TokenStore
from lit_gptdata.windows.split import split_tokens
from tests.interop.other_programs import END

GPT2 = Tokenizer("gpt2")
LENGTHS = np.array([len(token) for token in GPT2.token_bytes])
SHORT = ["data.max_length=8", "data.stride=8", "data.batch_size=2"]


def documents(n: int, seed: int = 0, length: int = 30) -> list[list[int]]:
    """Documents of random ids, without an end-of-document id."""
    rng = np.random.default_rng(seed)
    return [rng.integers(0, END, rng.integers(1, length)).tolist() for _ in range(n)]


def joined(documents: list[list[int]], ends: bool = True) -> list[int]:
    """The ids of documents, with an end-of-document id after each one, or only between them."""
    ids = [id for document in documents for id in [*document, END]]
    return ids if ends else ids[:-1]


TRAIN, VAL = documents(40), documents(9, seed=1)


def write_nanogpt(folder: Path, **splits: list[int]) -> Path:
    folder.mkdir(exist_ok=True, parents=True)
    for name, ids in splits.items():
        np.array(ids, np.uint16).tofile(folder / f"{name}.bin")
    return folder


def two_splits(folder: Path) -> Path:
    return write_nanogpt(folder, train=joined(TRAIN), val=joined(VAL))


def write_table(path: Path, rows: list, kind: str = "list", other: bool = True) -> Path:
    """Write a Parquet file, or an Arrow file ("list") or stream ("large_list"), with other columns."""
    arrow, ipc = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.ipc")
    parquet = pytest.importorskip("pyarrow.parquet")
    item = arrow.int64() if kind == "large_list" else arrow.uint16()
    lists = arrow.large_list(item) if kind == "large_list" else arrow.list_(item)
    table = {"input_ids": arrow.array(rows, lists)}
    if other:
        table |= {"attention_mask": arrow.array([[1]] * len(rows)), "text": ["a"] * len(rows)}
    table = arrow.table(table)
    if path.suffix == ".parquet":
        parquet.write_table(table, path, row_group_size=16)
        return path
    new = ipc.new_stream if kind == "large_list" else ipc.new_file
    with arrow.OSFile(str(path), "wb") as file, new(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=7)
    return path


def import_store(
    format: str, *paths: object, column=None, separate=False, tokenizer=GPT2, root="tokens", checks=True
) -> TokenStore:
    """Import files, and check every row of the index."""
    kind = formats.FORMATS[format]
    corpus = importing.IdFiles(
        name=f"{format} {column}", files=formats.find_files(list(map(str, paths)), kind.suffix),
        read=lambda file: kind.read(file, GPT2.dtype, column), tokenizer=tokenizer, separate=separate,
    )  # fmt: skip
    store = prepare_store(corpus, tokenizer, Path(root))
    store.verify()
    if checks:
        check_index(store)
    return store


def check_index(store: TokenStore) -> None:
    """Tokens have the places that the lengths of gpt2's tokens say, with 0 bytes for the separator."""
    sums = np.append(0, np.cumsum(LENGTHS[store.tokens[:]]))
    assert store.n_bytes == sums[-1]
    rows = np.concatenate([store.rows(shard) for shard in range(len(store.shards))])
    assert rows["token"].tolist() == sorted(set(rows["token"].tolist()))
    assert sums[rows["token"]].tolist() == rows["byte"].tolist()
    starts = rows[rows["document"] == 1]
    for token in {*range(0, store.n_tokens, 13), *range(min(5, store.n_tokens)), store.n_tokens - 1}:
        assert store.byte_at(token) == sums[token]
        number = int(np.searchsorted(starts["token"], token, side="right"))
        place = store.place(token)
        assert (place.document, place.byte) == (number, sums[token] - starts["byte"][number - 1])


def starts_of(store: TokenStore) -> list[int]:
    """The first token of each document."""
    rows = np.concatenate([store.rows(shard) for shard in range(len(store.shards))])
    return rows["token"][rows["document"] == 1].tolist()


def export_store(format: str, store: TokenStore, folder: str = "out", *, whole: bool = False) -> Path:
    """Export a store along its own split, or the whole store."""
    split = split_tokens(store, 0, 0)
    ranges = {name: getattr(split, name) for name in ("train", "val", "test")}
    ranges = {"all": (0, store.n_tokens)} if whole else ranges
    parts = {name: blocks.Part(store, *span, END) for name, span in ranges.items() if span[0] < span[1]}
    exporting.export(formats.FORMATS[format], parts, Path(folder).absolute())
    return Path(folder)


def run(capsys, *words: object, expect: int = 0) -> str:
    """Run lit-gptdata: what it prints, or the one line of its error."""
    capsys.readouterr()
    status = main([str(word) for word in words])
    printed = capsys.readouterr()
    assert status == expect, printed
    if expect:
        assert len(printed.err.splitlines()) == 1
    return printed.err if expect else printed.out
