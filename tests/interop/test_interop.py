"""Token files of other programs: imported, trained on, exported, damaged, interrupted."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from lit_gptdata import GPTDataModule, Tokenizer
from lit_gptdata.cli.main import main
from lit_gptdata.interop import blocks, importing, llmc
from lit_gptdata.tokens.build import local
from lit_gptdata.tokens.manifest import Manifest
from lit_gptdata.tokens.store import TokenStore
from tests.interop.other_programs import (
    END,
    IndexedDataset,
    llmc_documents,
    nanogpt_batch,
    read_llmc,
    write_llmc,
    write_megatron,
)
from tests.tokens.builds import ROOT, file_size_limit, litter, stores
from tests.training.run_train import run_train_here

GPT2 = Tokenizer("gpt2")
SHORT = ["data.max_length=8", "data.stride=8", "data.batch_size=2"]


def documents(n: int, seed: int = 0, length: int = 30) -> list[list[int]]:
    """Documents of random ids, without an end-of-document id."""
    rng = np.random.default_rng(seed)
    return [rng.integers(0, END, rng.integers(1, length)).tolist() for _ in range(n)]


TRAIN, VAL = documents(40), documents(9, seed=1)


def joined(documents: list[list[int]], ends: bool = True) -> list[int]:
    """The ids of documents, with an end-of-document id after each one, or only between them."""
    ids = [id for document in documents for id in [*document, END]]
    return ids if ends else ids[:-1]


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch) -> None:
    """Several blocks, chunks and shards, so that every border is tested."""
    monkeypatch.setattr(blocks, "BLOCK_IDS", 100)
    monkeypatch.setattr(importing, "CHUNK_IDS", 16)
    monkeypatch.setattr(importing, "SHARD_IDS", 320)


def run(capsys, *words: object, expect: int = 0) -> str:
    capsys.readouterr()
    status = main([str(word) for word in words])
    printed = capsys.readouterr()
    assert status == expect, printed
    assert "Traceback" not in printed.err
    if expect:
        assert len(printed.err.splitlines()) == 1
    return printed.err if expect else printed.out


def import_store(capsys, *words: object) -> TokenStore:
    """Import files, check every row of the index, and return the store that the printed command names."""
    printed = run(capsys, "import", *words)
    store = TokenStore(re.search(r"data\.store_url=(\S+)", printed)[1])
    assert store.fingerprint[:8] in printed
    store.verify()
    check_index(store)
    return store


def check_index(store: TokenStore) -> None:
    """Every token has the place that the lengths of its tokens say, with 0 bytes for a special token."""
    lengths = np.array([len(token) for token in GPT2.token_bytes])[store.tokens[:]]
    sums = np.append(0, np.cumsum(lengths))
    assert store.n_bytes == sums[-1]
    rows = np.concatenate([store.rows(shard) for shard in range(len(store.shards))])
    assert rows["token"].tolist() == sorted(set(rows["token"].tolist()))
    starts = rows[rows["document"] == 1]
    for token in range(store.n_tokens):
        assert store.byte_at(token) == sums[token]
        number = int(np.searchsorted(starts["token"], token, side="right"))
        place = store.place(token)
        assert (place.document, place.byte) == (number, sums[token] - starts["byte"][number - 1])


def starts_of(store: TokenStore) -> list[int]:
    rows = np.concatenate([store.rows(shard) for shard in range(len(store.shards))])
    return rows["token"][rows["document"] == 1].tolist()


def write_nanogpt(folder: Path, **splits: list[int]) -> Path:
    folder.mkdir(exist_ok=True, parents=True)
    for name, ids in splits.items():
        np.array(ids, np.uint16).tofile(folder / f"{name}.bin")
    return folder


def opened(store: TokenStore, **options) -> GPTDataModule:
    data = GPTDataModule(store_url=str(store.path), max_length=8, stride=8, batch_size=2, **options)
    data.prepare_data()
    data.setup()
    return data


# In and out ----------------------------------------------------------------------------------------


def test_nanogpt_files_keep_ids_split_and_documents(tmp_path, capsys):
    folder = write_nanogpt(tmp_path / "owt", train=joined(TRAIN), val=joined(VAL))
    store = import_store(capsys, "nanogpt", folder)
    n = len(joined(TRAIN))
    assert store.tokens[:].tolist() == joined(TRAIN + VAL)
    assert store.manifest.cuts == (n, store.n_tokens)
    assert store.n_documents == len(TRAIN + VAL)
    assert starts_of(store) == np.cumsum([0] + [len(d) + 1 for d in TRAIN + VAL])[:-1].tolist()
    assert len(store.shards) > 1
    assert [Path(source.path).name for source in store.manifest.sources] == ["train.bin", "val.bin"]
    assert store.place(n).source == str(folder / "val.bin")

    run(capsys, "export", "nanogpt", "out", f"data.store_url={store.path}")
    for name in ("train.bin", "val.bin"):
        assert Path("out", name).read_bytes() == (folder / name).read_bytes()
    assert sorted(os.listdir("out")) == ["train.bin", "val.bin"]


def test_nanogpt_reads_the_export_of_a_text(tmp_path, capsys):
    (tmp_path / "book.txt").write_text("It was on a dreary night of November.\n" * 90)
    options = [f"data.corpus={tmp_path}/book.txt", "data.test_fraction=0.1", "data.build_workers=1"]
    run(capsys, "prepare", *options, *SHORT)
    printed = run(capsys, "export", "nanogpt", "out", *options, *SHORT)
    data = GPTDataModule(str(tmp_path / "book.txt"), max_length=8, stride=8, test_fraction=0.1)
    data.setup()
    assert f"test: {len(data.store.tokens) - data._split.test[0]} tokens of uint16" in printed
    for split in ("train", "val", "test"):
        begin, _ = getattr(data._split, split)
        inputs, targets = nanogpt_batch(Path("out"), split, [0, 5], 8)
        assert inputs == [data.store.tokens[begin + i : begin + i + 8].tolist() for i in (0, 5)]
        assert targets == [data.store.tokens[begin + i + 1 : begin + i + 9].tolist() for i in (0, 5)]


def test_llmc_files_keep_ids_and_documents(tmp_path, capsys, monkeypatch):
    train, val = ([END, *joined(part, ends=False)] for part in (TRAIN, VAL))
    write_llmc(tmp_path / "fineweb_train_000001.bin", train[:200])
    write_llmc(tmp_path / "fineweb_train_000002.bin", train[200:])
    write_llmc(tmp_path / "fineweb_val_000000.bin", val)
    store = import_store(capsys, "llmc", *sorted(tmp_path.glob("*.bin")))
    assert store.tokens[:].tolist() == train + val
    assert store.n_documents == len(TRAIN + VAL)
    assert store.manifest.cuts == (len(train), len(train + val))

    monkeypatch.setattr(llmc, "FILE_IDS", 250)
    run(capsys, "export", "llmc", "out", f"data.store_url={store.path}")
    files = sorted(Path("out").glob("train_*.bin"))
    assert len(files) == -(-len(train) // 250)
    ids = np.concatenate([read_llmc(file) for file in files])
    assert ids.tolist() == train
    assert llmc_documents(ids) == TRAIN
    assert llmc_documents(read_llmc(Path("out/val_000000.bin"))) == VAL
    run(capsys, "export", "llmc", "all", "--split=all", f"data.store_url={store.path}")
    assert np.concatenate([read_llmc(f) for f in sorted(Path("all").iterdir())]).tolist() == train + val


def test_llmc_gets_one_end_of_text_before_documents_without(tmp_path, capsys):
    store = import_store(
        capsys, "nanogpt", write_nanogpt(tmp_path, a=joined(TRAIN, ends=False)) / "a.bin"
    )
    run(capsys, "export", "llmc", "out", f"data.store_url={store.path}", "data.val_fraction=0")
    assert llmc_documents(read_llmc(Path("out/train_000000.bin"))) == TRAIN


@pytest.mark.parametrize("code", [4, 5, 8])
def test_megatron_files_keep_ids_and_documents_of_several_sequences(tmp_path, capsys, code):
    whole = [[*document, END] for document in TRAIN]
    parts = [[document[:2], document[2:]] if len(document) > 3 else [document] for document in whole]
    write_megatron(tmp_path / "web_text_document", parts, code)
    store = import_store(capsys, "megatron", tmp_path / "web_text_document")
    assert store.tokens[:].tolist() == joined(TRAIN)
    assert store.n_documents == len(TRAIN)
    run(capsys, "export", "megatron", "out", "--split=all", f"data.store_url={store.path}")
    dataset = IndexedDataset(Path("out/all"))
    assert dataset.dtype == np.uint16
    assert dataset.documents() == whole


def test_documents_of_megatron_need_no_separator(tmp_path, capsys, caplog):
    write_megatron(tmp_path / "train", [[document] for document in TRAIN])
    write_megatron(tmp_path / "val", [[document] for document in VAL])
    store = import_store(capsys, "megatron", tmp_path)
    assert store.tokens[:].tolist() == sum(TRAIN + VAL, [])
    assert f"{len(TRAIN + VAL) - 1} documents have no end-of-document id before them" in caplog.text
    run(capsys, "export", "megatron", "out", f"data.store_url={store.path}")
    assert IndexedDataset(Path("out/train")).documents() == TRAIN
    assert IndexedDataset(Path("out/val")).documents() == VAL

    separated = import_store(capsys, "megatron", tmp_path, "--separate")
    assert separated.tokens[:].tolist() == joined(TRAIN + VAL, ends=False)
    assert separated.n_documents == len(TRAIN + VAL)


def write_table(path: Path, rows: list, kind: str = "list", other: bool = True) -> Path:
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


@pytest.mark.parametrize("kind", ["list", "large_list"])
@pytest.mark.parametrize("format", ["parquet", "arrow"])
def test_rows_of_ids_are_documents(tmp_path, capsys, format, kind):
    rows = [[*document, END] for document in TRAIN]
    write_table(tmp_path / f"train.{format}", [*rows[:5], None, [], *rows[5:]], kind)
    store = import_store(capsys, format, tmp_path)
    assert store.tokens[:].tolist() == joined(TRAIN)
    assert store.n_documents == len(TRAIN)
    assert store.manifest.cuts is None
    run(capsys, "export", "parquet", "out", "--split=all", f"data.store_url={store.path}")
    table = pytest.importorskip("pyarrow.parquet").read_table("out/all.parquet")
    assert table.column_names == ["input_ids"]
    assert table["input_ids"].to_pylist() == rows


@pytest.mark.parametrize("dtype", ["<u2", ">i4", "<i8"])
def test_npy_files_keep_ids(tmp_path, capsys, dtype):
    ids = joined(TRAIN)[:360]
    np.save(tmp_path / "train.npy", np.array(ids, dtype))
    np.save(tmp_path / "val.npy", np.array(ids, dtype).reshape(36, 10))
    store = import_store(capsys, "npy", tmp_path)
    assert store.tokens[:].tolist() == ids + ids
    assert store.manifest.cuts == (360, 720)


def test_large_vocabularies_have_uint32(tmp_path, capsys):
    ids = [100257, 5, 99000, 7]
    pytest.importorskip("bpe_openai")
    big = "tokenizer=cl100k_base"
    write_llmc(tmp_path / "a.bin", ids * 9, magic=20240801, version=7)
    store = TokenStore(
        re.search(r"url=(\S+)", run(capsys, "import", "llmc", tmp_path / "a.bin", big))[1]
    )
    options = [f"data.store_url={store.path}", f"data.{big}", "--split=all", "data.val_fraction=0"]
    assert store.tokens[:].tolist() == ids * 9
    for format in ("nanogpt", "llmc", "megatron", "parquet"):
        run(capsys, "export", format, format, *options)
    assert np.fromfile("nanogpt/all.bin", np.uint32).tolist() == ids * 9
    assert read_llmc(Path("llmc/all_000000.bin")).tolist() == ids * 9
    assert IndexedDataset(Path("megatron/all")).dtype == np.int32
    assert sum(IndexedDataset(Path("megatron/all")).documents(), []) == ids * 9
    again = run(capsys, "import", "nanogpt", "nanogpt", big)
    assert "data.tokenizer=cl100k_base" in again
    assert store.fingerprint in again


def test_all_formats_give_the_same_store(tmp_path, capsys):
    folder = write_nanogpt(tmp_path / "a", train=joined(TRAIN), val=joined(VAL))
    store = import_store(capsys, "nanogpt", folder)
    for format in ("megatron", "parquet", "nanogpt"):
        run(capsys, "export", format, format, f"data.store_url={store.path}")
        assert (
            import_store(capsys, format, format, f"data_dir=by-{format}").fingerprint
            == store.fingerprint
        )


# The store ------------------------------------------------------------------------------------------


def test_the_fingerprint_depends_on_ids_split_and_tokenizer_but_not_on_paths(tmp_path, capsys):
    def fingerprint(folder: str, *words: str, **splits: list[int]) -> str:
        return import_store(
            capsys, "nanogpt", write_nanogpt(tmp_path / folder, **splits), *words
        ).fingerprint

    first = fingerprint("a", train=joined(TRAIN), val=joined(VAL))
    assert fingerprint("b", train=joined(TRAIN), val=joined(VAL)) == first
    others = [
        fingerprint("c", train=joined(TRAIN)[:-1], val=[END, *joined(VAL)]),
        fingerprint("d", train=joined(TRAIN), test=joined(VAL)),
        fingerprint("e", train=[5, *joined(TRAIN)[1:]], val=joined(VAL)),
        fingerprint("a", "special_tokens=text"),
    ]
    assert len({first, *others}) == 5


def test_the_same_import_finds_the_store_and_reads_nothing(tmp_path, capsys, monkeypatch):
    folder = write_nanogpt(tmp_path / "a", train=joined(TRAIN), val=joined(VAL))
    store = import_store(capsys, "nanogpt", folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(importing.IdFiles, "write", None)
        assert import_store(capsys, "nanogpt", folder).path == store.path
    write_nanogpt(folder, val=joined(VAL[1:]))
    assert import_store(capsys, "nanogpt", folder).path != store.path
    assert len(stores(Path("data/tokens"))) == 2
    assert not litter(Path("data/tokens"))


def test_a_store_keeps_its_split_whatever_the_fractions_are(tmp_path, capsys, caplog):
    folder = write_nanogpt(tmp_path / "a", train=joined(TRAIN), val=joined(VAL), test=joined(VAL[:3]))
    store = import_store(capsys, "nanogpt", folder)
    n, n_val = len(joined(TRAIN)), len(joined(VAL))
    data = opened(store, val_fraction=0.5, test_fraction=0.2)
    assert caplog.text.count("has its own split: val_fraction and test_fraction are ignored") == 1
    split = data._split
    assert (split.train, split.val, split.test) == ((0, n), (n, n + n_val), (n + n_val, store.n_tokens))
    ids = np.concatenate([inputs[inputs != 0] for inputs, _ in data.val_dataloader()])
    assert data.val_windows.begin == n if hasattr(data.val_windows, "begin") else len(ids)
    assert f"over tokens [{n:,}, {n + n_val:,})" in str(data)


def test_a_run_resumes_on_an_imported_store_with_other_fractions(tmp_path, capsys):
    store = import_store(
        capsys, "nanogpt", write_nanogpt(tmp_path / "a", train=joined(TRAIN), val=joined(VAL))
    )
    data = opened(store)
    batches = iter(data.train_dataloader())
    seen = [next(batches)[0].tolist() for _ in range(5)]
    again = opened(store, val_fraction=0.3)
    state = data.state_dict()
    assert seen
    again.load_state_dict(state)
    assert next(iter(again.train_dataloader()))[0].tolist() in [seen[-1], next(batches)[0].tolist()]


def test_an_imported_store_can_be_published_checked_and_read_from_a_url(tmp_path, capsys):
    store = import_store(
        capsys, "nanogpt", write_nanogpt(tmp_path / "a", train=joined(TRAIN), val=joined(VAL))
    )
    local = f"data.store_url={store.path}"
    assert "every SHA-256 matches" in run(capsys, "verify", local)
    assert f"{store.n_documents} documents" in run(capsys, "info", local, *SHORT)
    url = run(capsys, "publish", f"{tmp_path}/shelf", local).strip()
    assert url.endswith(store.fingerprint)
    memory = tmp_path.as_uri().replace("file://", "local://")
    remote = GPTDataModule(store_url=url, max_length=8, stride=8)
    remote.prepare_data()
    remote.setup()
    assert remote._split == opened(store)._split
    assert remote.store.tokens[:].tolist() == store.tokens[:].tolist()
    assert memory


def test_two_steps_train_with_the_printed_command(tmp_path, capsys):
    folder = write_nanogpt(tmp_path / "a", train=joined(TRAIN), val=joined(VAL))
    words = shlex.split(run(capsys, "import", "nanogpt", folder, "tokenizer=gpt2").splitlines()[-1])
    assert words[:2] == ["python", "train.py"]
    assert [word.partition("=")[0] for word in words[2:]] == ["data.store_url", "data.tokenizer"]
    loss = run_train_here(
        *words[2:], *SHORT, "trainer.max_steps=2", "logger=none", "callbacks=none", f"output_dir={tmp_path}/run",
        "stem.embedding_dim=8", "+trainer.enable_progress_bar=false",
    )  # fmt: skip
    assert 9 < loss < 12


def test_old_manifests_keep_their_bytes(tmp_path, capsys):
    folder = write_nanogpt(tmp_path / "a", one=joined(TRAIN))
    store = import_store(capsys, "nanogpt", folder)
    content = (store.path / "manifest.json").read_bytes()
    assert b"cuts" not in content
    assert Manifest.from_json(content).to_json() == content


@pytest.mark.parametrize("cuts", ["[0, 5]", "[5]", "[9, 5]", "[5, 10000000]", '"ab"'])
def test_a_manifest_with_an_impossible_split_is_refused(tmp_path, capsys, cuts):
    folder = write_nanogpt(tmp_path / "a", train=joined(TRAIN), val=joined(VAL))
    store = import_store(capsys, "nanogpt", folder)
    content = (store.path / "manifest.json").read_bytes()
    assert Manifest.from_json(content).to_json() == content
    damaged = re.sub(rb'"cuts": \[[^]]*\]', b'"cuts": ' + cuts.encode(), content)
    assert damaged != content
    with pytest.raises(ValueError):  # noqa: PT011 the store's message names the file
        Manifest.from_json(damaged)


def test_named_sources_are_exported_into_a_folder_each(tmp_path, capsys):
    for name, seed in (("web", 3), ("code", 4)):
        (tmp_path / f"{name}.txt").write_text(f"{name} {seed} text of it. " * 80)
    corpus = f"data.corpus={{web:{tmp_path}/web.txt,code:{tmp_path}/code.txt}}"
    options = ["data=sources", corpus, "data.build_workers=1", *SHORT]
    run(capsys, "prepare", *options)
    run(capsys, "export", "nanogpt", "out", *options)
    files = sorted(str(path) for path in Path("out").rglob("*.bin"))
    assert files == [f"out/{name}/{split}.bin" for name in ("code", "web") for split in ("train", "val")]


# Wrong files ----------------------------------------------------------------------------------------


def bad_files(folder: Path) -> None:
    ids = joined(TRAIN)
    write_nanogpt(folder, wrong=[*ids[:150], 60000], text=ids)
    (folder / "odd.bin").write_bytes(b"\1\2\3")
    (folder / "empty.bin").write_bytes(b"")
    write_llmc(folder / "llmc.bin", ids)
    write_llmc(folder / "magic.bin", ids, magic=20240521)
    write_llmc(folder / "version.bin", ids, version=2)
    write_llmc(folder / "short.bin", ids, n=len(ids) + 3)
    write_llmc(folder / "bad_id.bin", [1, 2, 60000])
    (folder / "header.bin").write_bytes(b"\0" * 1000)
    write_megatron(folder / "meg", [[document] for document in TRAIN])
    write_megatron(folder / "code", [[[1, 2]]])
    index = (folder / "meg.idx").read_bytes()
    (folder / "cut.idx").write_bytes(index[:-5])
    (folder / "tiny.idx").write_bytes(index[:20])
    (folder / "alone.idx").write_bytes(index)
    (folder / "magic.idx").write_bytes(b"X" + index[1:])
    (folder / "float.idx").write_bytes(index[:17] + b"\6" + index[18:])
    at = 34 + 4 * len(TRAIN) + 8 * 3
    (folder / "gap.idx").write_bytes(index[:at] + b"\xff" + index[at + 1 :])
    (folder / "gap.bin").write_bytes((folder / "meg.bin").read_bytes())
    (folder / "less.idx").write_bytes(index)
    (folder / "less.bin").write_bytes((folder / "meg.bin").read_bytes()[:-6])
    np.save(folder / "float.npy", np.zeros(3))
    np.save(folder / "cube.npy", np.zeros((2, 2, 2), int))
    np.save(folder / "fortran.npy", np.asfortranarray(np.ones((3, 4), int)))
    np.save(folder / "whole.npy", np.arange(100))
    (folder / "cut.npy").write_bytes((folder / "whole.npy").read_bytes()[:-9])
    (folder / "none.npy").write_bytes(b"")
    np.save(folder / "negative.npy", np.array([3, -1]))
    write_table(folder / "a.parquet", TRAIN, other=False)
    (folder / "cut.parquet").write_bytes((folder / "a.parquet").read_bytes()[:-20])
    write_table(folder / "nulls.parquet", [[1, None]])
    write_table(folder / "ids.parquet", [[1, 2], [50257, 3]])
    write_table(folder / "stream.arrow", TRAIN, "large_list")
    (folder / "cut.arrow").write_bytes((folder / "stream.arrow").read_bytes()[:3000])


WRONG = [
    ("nanogpt", "wrong.bin", r"wrong\.bin, offset 300: 'gpt2' has no id 60000, only \[0, 50,257\)"),
    ("nanogpt", "odd.bin", "odd.bin ends inside an id of uint16, at offset 3"),
    ("nanogpt", "empty.bin", "holds no text"),
    ("nanogpt", "llmc.bin", "llmc.bin has the format llmc: lit-gptdata import llmc"),
    ("nanogpt", "meg.bin", "meg.bin has the format megatron: lit-gptdata import megatron"),
    ("nanogpt", "missing.bin", "missing.bin is not a file"),
    ("nanogpt", "float.npy", r"float.npy is not a file, or not a \*\.bin file"),
    ("llmc", "text.bin", "text.bin starts with .*, not with the header of llm.c"),
    ("llmc", "magic.bin", "magic.bin starts with 20240521 1, not"),
    ("llmc", "version.bin", "version.bin starts with 20240520 2, not"),
    ("llmc", "short.bin", r"short.bin ends at offset [\d,]+, but its header \(offset 8\) has"),
    ("llmc", "header.bin", "header.bin starts with None None"),
    ("llmc", "empty.bin", "empty.bin starts with None None"),
    ("llmc", "bad_id.bin", r"bad_id\.bin, offset 1,028: 'gpt2' has no id 60000"),
    ("megatron", "cut.idx", r"cut\.idx ends at offset \d+, inside the table of 41 rows at 514"),
    ("megatron", "tiny.idx", r"tiny\.idx starts with b'', version 0"),
    ("megatron", "magic.idx", r"magic\.idx starts with b'XMIDIDX"),
    ("megatron", "float.idx", r"float\.idx starts with .* version 1 and dtype 6, not"),
    ("megatron", "alone.idx", r"alone\.bin ends at offset 0, but"),
    ("megatron", "gap.idx", r"gap\.idx: sequence 3 \(offset 218\) does not follow"),
    (
        "megatron",
        "less.idx",
        r"less\.bin ends at offset [\d,]+, but .*less\.idx tells [\d,]+: copy both",
    ),
    ("npy", "float.npy", r"float\.npy holds float64 of shape \(3,\), but must hold integers"),
    ("npy", "cube.npy", r"holds int64 of shape \(2, 2, 2\)"),
    ("npy", "fortran.npy", "in C order: save it again"),
    ("npy", "cut.npy", r"cut\.npy is not an \.npy file, or was cut short at offset 919"),
    ("npy", "none.npy", r"none\.npy is not an \.npy file, or was cut short at offset 0"),
    ("npy", "negative.npy", r"negative\.npy, offset 136: 'gpt2' has no id -1"),
    ("parquet", "cut.parquet", r"cut\.parquet is broken after row 0, or was cut short"),
    ("parquet", "nulls.parquet", "nulls.parquet: after row 0 there is a null in a list"),
    ("parquet", "ids.parquet", r"ids\.parquet, id 2: 'gpt2' has no id 50257"),
    ("arrow", "cut.arrow", r"cut\.arrow is broken after row \d+, or was cut short"),
]


@pytest.fixture(scope="module")
def bad(tmp_path_factory) -> Path:
    bad_files(folder := tmp_path_factory.mktemp("bad"))
    return folder


@pytest.mark.parametrize(("format", "name", "message"), WRONG)
def test_a_wrong_file_is_named_and_nothing_is_left(bad, capsys, format, name, message):
    printed = run(capsys, "import", format, bad / name, expect=1)
    assert re.search(message, printed), printed
    root = Path("data/tokens")
    assert not stores(root)
    assert not [path for path in root.rglob("*") if path.is_file() and path.stat().st_size]


def test_a_column_is_asked_for_where_several_have_ids(tmp_path, capsys):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table = arrow.table({"a": [[1, 2]], "b": [[3, 4]], "text": ["x"]})
    parquet.write_table(table, tmp_path / "x.parquet")
    printed = run(capsys, "import", "parquet", tmp_path / "x.parquet", expect=1)
    assert "give --column with one of ['a', 'b']" in printed
    printed = run(capsys, "import", "parquet", tmp_path / "x.parquet", "--column=text", expect=1)
    assert "give --column with one of ['a', 'b']" in printed
    store = import_store(capsys, "parquet", tmp_path / "x.parquet", "--column=b")
    assert store.tokens[:].tolist() == [3, 4]


def test_wrong_words_are_refused(tmp_path, capsys):
    folder = write_nanogpt(tmp_path / "a", train=joined(TRAIN), val=joined(VAL), extra=[1, 2])
    formats = "choose one of nanogpt, llmc, megatron, parquet, arrow, npy"
    assert formats in run(capsys, "import", "nano", folder, expect=1)
    assert "choose one of nanogpt, llmc, megatron, parquet" in run(
        capsys, "export", "npy", "x", expect=1
    )
    assert "extra.bin has no split in its name" in run(capsys, "import", "nanogpt", folder, expect=1)
    assert "holds no *.npy files" in run(capsys, "import", "npy", folder, expect=1)
    assert "data.nope" in run(capsys, "import", "nanogpt", folder / "train.bin", "nope=1", expect=1)
    printed = run(capsys, "export", "nanogpt", tmp_path, "data.corpus=sample", expect=1)
    assert "lit-gptdata prepare" in printed


def test_an_export_does_not_touch_a_folder_with_files(tmp_path, capsys):
    store = import_store(capsys, "nanogpt", write_nanogpt(tmp_path / "a", x=joined(TRAIN)))
    Path("out").mkdir()
    Path("out/prepare.py").write_text("")
    printed = run(capsys, "export", "nanogpt", "out", f"data.store_url={store.path}", expect=1)
    assert "is not empty: give a new folder" in printed
    assert os.listdir("out") == ["prepare.py"]
    Path("out/prepare.py").unlink()
    run(capsys, "export", "nanogpt", "out", f"data.store_url={store.path}")
    assert sorted(os.listdir("out")) == ["train.bin", "val.bin"]


# Kills and full disks -------------------------------------------------------------------------------


def test_a_full_disk_leaves_nothing(tmp_path, capsys):
    folder = write_nanogpt(tmp_path / "a", train=joined(documents(900)), val=joined(VAL))
    with file_size_limit(500):
        printed = run(capsys, "import", "nanogpt", folder, expect=1)
    assert "File too large: the tokens cannot be written. Free some space" in printed
    assert not stores(Path("data/tokens"))
    store = import_store(capsys, "nanogpt", folder)
    for format in ("nanogpt", "llmc", "megatron", "parquet"):
        with file_size_limit(500):
            printed = run(capsys, "export", format, "out", f"data.store_url={store.path}", expect=1)
        assert "nothing is written. Free some space" in printed
        assert "out" in printed
        assert not [name for name in os.listdir() if "out" in name]


@pytest.mark.parametrize(
    "instant", ["write", "complete", "vocab_table", "write_json", "_rename", "rmtree"]
)
def test_a_kill_at_any_step_of_an_import_leaves_nothing_that_is_trusted(tmp_path, capsys, instant):
    folder = write_nanogpt(tmp_path / "a", train=joined(TRAIN), val=joined(VAL))

    class Killed(BaseException):
        pass

    def die(*args, **kwargs):
        raise Killed

    target = {"write": importing.IdWriter, "complete": importing.IdFiles, "rmtree": local.shutil}
    name = "_write" if instant == "write" else instant
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(target.get(instant, local), name, die)
        with contextlib.suppress(Killed):
            main(["import", "nanogpt", str(folder)])
    root = Path("data/tokens")
    assert [TokenStore(path).verify() for path in stores(root)] == [None] * (instant == "rmtree")
    store = import_store(capsys, "nanogpt", folder)
    assert store.tokens[:].tolist() == joined(TRAIN + VAL)
    assert not litter(root)


@pytest.mark.parametrize("command", ["import", "export"])
def test_a_killed_process_leaves_no_file_with_a_final_name(tmp_path, capsys, command):
    folder = write_nanogpt(tmp_path / "a", train=joined(TRAIN), val=joined(VAL))
    words = ["import", "nanogpt", str(folder)]
    if command == "export":
        store = import_store(capsys, "nanogpt", folder)
        words = ["export", "nanogpt", "out", f"data.store_url={store.path}"]
    code = f"""
import sys, time
from lit_gptdata.cli.main import main
from lit_gptdata.interop import blocks, importing, nanogpt
blocks.BLOCK_IDS, importing.SHARD_IDS = 100, 320
def slowly(blocks):
    for block in blocks:
        yield block
        print("block", flush=True)
        time.sleep(0.1)
read, write = nanogpt.read_binary, blocks.Part.blocks
nanogpt.read_binary = lambda *args: slowly(read(*args))
blocks.Part.blocks = lambda part: slowly(write(part))
sys.exit(main({words!r}))
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, env=environment, start_new_session=True
    )
    for _ in range(2):
        assert process.stdout.readline() == b"block\n"
    process.send_signal(signal.SIGKILL)
    process.communicate()
    if command == "import":
        root = Path("data/tokens")
        assert not stores(root)
        assert len(litter(root)) > 0
        assert import_store(capsys, "nanogpt", folder).tokens[:].tolist() == joined(TRAIN + VAL)
        assert not litter(root)
    else:
        assert not Path("out").exists()
        run(capsys, *words)
        assert Path("out/train.bin").read_bytes() == (folder / "train.bin").read_bytes()
