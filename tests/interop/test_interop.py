"""Token files of other programs: imported, trained on, exported, and read by those programs."""

from __future__ import annotations

import itertools
import os
import re
import shlex
from pathlib import Path

import numpy as np
import pytest

from lit_gptdata import GPTDataModule, Tokenizer
from lit_gptdata.interop import flat, importing
from lit_gptdata.interop.formats import find_files
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
from tests.interop.token_files import (
    SHORT,
    TRAIN,
    VAL,
    export_store,
    import_store,
    joined,
    run,
    starts_of,
    two_splits,
    write_nanogpt,
    write_table,
)
from tests.tokens.builds import litter, stores
from tests.training.run_train import run_train_here


def opened(store: TokenStore | str, **options) -> GPTDataModule:
    path = store if isinstance(store, str) else str(store.path)
    data = GPTDataModule(store_url=path, **{"max_length": 8, "stride": 8, "batch_size": 2} | options)
    data.prepare_data()
    data.setup()
    return data


# In and out ----------------------------------------------------------------------------------------


def test_nanogpt_files_keep_ids_split_and_documents(tmp_path):
    folder = two_splits(tmp_path / "owt")
    store = import_store("nanogpt", folder)
    n = len(joined(TRAIN))
    assert store.tokens[:].tolist() == joined(TRAIN + VAL)
    assert store.manifest.cuts == (n, store.n_tokens)
    assert store.n_documents == len(TRAIN + VAL)
    assert starts_of(store) == np.cumsum([0] + [len(d) + 1 for d in TRAIN + VAL])[:-1].tolist()
    assert len(store.shards) > 1
    assert [Path(source.path).name for source in store.manifest.sources] == ["train.bin", "val.bin"]
    assert store.place(n).source == str(folder / "val.bin")
    out = export_store("nanogpt", store)
    assert sorted(os.listdir(out)) == ["train.bin", "val.bin"]
    for name in os.listdir(out):
        assert (out / name).read_bytes() == (folder / name).read_bytes()


def test_nanogpt_reads_the_export_of_a_text(tmp_path, capsys):
    (tmp_path / "book.txt").write_text("It was on a dreary night of November.\n" * 90)
    options = [f"data.corpus={tmp_path}/book.txt", "data.test_fraction=0.1", "data.build_workers=1"]
    run(capsys, "prepare", *options, *SHORT)
    printed = run(capsys, "export", "nanogpt", "out", *options, *SHORT)
    data = GPTDataModule(str(tmp_path / "book.txt"), max_length=8, stride=8, test_fraction=0.1)
    data.setup()
    for split in ("train", "val", "test"):
        begin, end = getattr(data._data.first.split, split)
        ids = data.store.tokens[begin:end].tolist()
        assert f"{split}: {end - begin:,} tokens of uint16" in printed
        inputs, targets = nanogpt_batch(Path("out"), split, [0, 5, len(ids) - 9], 8)
        assert inputs == [ids[i : i + 8] for i in (0, 5, len(ids) - 9)]
        assert targets == [ids[i + 1 : i + 9] for i in (0, 5, len(ids) - 9)]


def test_llmc_files_keep_ids_and_documents(tmp_path, monkeypatch):
    train, val = ([END, *joined(part, ends=False)] for part in (TRAIN, VAL))
    write_llmc(tmp_path / "fineweb_train_000001.bin", train[:200])  # it ends inside a document
    write_llmc(tmp_path / "fineweb_train_000002.bin", train[200:])
    write_llmc(tmp_path / "fineweb_val_000000.bin", val)
    store = import_store("llmc", *tmp_path.glob("*.bin"))
    assert store.tokens[:].tolist() == train + val
    assert store.n_documents == len(TRAIN + VAL)
    assert store.manifest.cuts == (len(train), len(train + val))

    monkeypatch.setattr(flat, "FILE_IDS", 250)
    files = sorted(export_store("llmc", store).glob("train_*.bin"))
    assert len(files) == -(-len(train) // 250)
    ids = np.concatenate([read_llmc(file) for file in files])
    assert ids.tolist() == train
    assert llmc_documents(ids) == TRAIN
    assert llmc_documents(read_llmc(Path("out/val_000000.bin"))) == VAL
    files = sorted(export_store("llmc", store, "all", whole=True).iterdir())
    assert np.concatenate([read_llmc(file) for file in files]).tolist() == train + val


def test_llmc_gets_one_end_of_text_before_documents_without(tmp_path):
    folder = write_nanogpt(tmp_path, a=joined(TRAIN, ends=False))
    files = export_store("llmc", import_store("nanogpt", folder / "a.bin")).iterdir()
    assert [llmc_documents(read_llmc(file)) for file in files] == [TRAIN]


@pytest.mark.parametrize("code", [4, 5, 8])
def test_megatron_files_keep_ids_and_documents_of_several_sequences(tmp_path, code):
    whole = [[*document, END] for document in TRAIN]
    parts = [[document[:2], document[2:]] if len(document) > 3 else [document] for document in whole]
    write_megatron(tmp_path / "web_text_document", parts, code)
    store = import_store("megatron", tmp_path / "web_text_document")
    assert store.tokens[:].tolist() == joined(TRAIN)
    assert store.n_documents == len(TRAIN)
    dataset = IndexedDataset(export_store("megatron", store) / "train")
    assert dataset.dtype == np.uint16
    assert dataset.documents() == whole


def test_documents_need_no_separator(tmp_path, caplog):
    write_megatron(tmp_path / "train", [[document] for document in [*TRAIN, []]])
    write_megatron(tmp_path / "val", [[document] for document in VAL])
    store = import_store("megatron", tmp_path)
    assert store.tokens[:].tolist() == list(itertools.chain(*TRAIN, *VAL))
    assert f"{len(TRAIN + VAL) - 1} documents start without an end-of-document id" in caplog.text
    out = export_store("megatron", store)
    assert IndexedDataset(out / "train").documents() == TRAIN
    assert IndexedDataset(out / "val").documents() == VAL

    caplog.clear()
    separated = import_store("megatron", tmp_path, separate=True)
    assert separated.tokens[:].tolist() == joined(TRAIN + VAL, ends=False)
    assert separated.n_documents == len(TRAIN + VAL)
    assert not caplog.text


@pytest.mark.parametrize("kind", ["list", "large_list"])
@pytest.mark.parametrize("format", ["parquet", "arrow"])
def test_rows_of_ids_are_documents(tmp_path, format, kind):
    rows = [[*document, END] for document in TRAIN]
    write_table(tmp_path / f"train.{format}", [*rows[:5], None, [], *rows[5:]], kind)
    store = import_store(format, tmp_path)
    assert store.tokens[:].tolist() == joined(TRAIN)
    assert store.n_documents == len(TRAIN)
    assert store.manifest.cuts is None
    path = export_store("parquet", store, whole=True) / "all.parquet"
    table = pytest.importorskip("pyarrow.parquet").read_table(path)
    assert table.column_names == ["input_ids"]
    assert table["input_ids"].to_pylist() == rows


@pytest.mark.parametrize("dtype", ["<u2", ">i4", "<i8"])
def test_npy_files_keep_ids(tmp_path, dtype):
    ids = joined(TRAIN)[:360]
    np.save(tmp_path / "train.npy", np.array(ids, dtype))
    np.save(tmp_path / "val.npy", np.array(ids, dtype).reshape(36, 10))
    store = import_store("npy", tmp_path)
    assert store.tokens[:].tolist() == ids + ids
    assert store.manifest.cuts == (360, 720)


def test_large_vocabularies_have_uint32(tmp_path, capsys):
    pytest.importorskip("bpe_openai")
    ids, big = [100257, 5, 99000, 7] * 9, "tokenizer=cl100k_base"
    write_llmc(tmp_path / "a.bin", ids, magic=20240801, version=7)
    printed = run(capsys, "import", "llmc", tmp_path / "a.bin", big)
    command = shlex.split(printed.splitlines()[-1])
    store = TokenStore(command[2].partition("=")[2])
    assert store.tokens[:].tolist() == ids
    for format in ("nanogpt", "llmc", "megatron"):
        words = [*command[2:], "--split=all", "data.val_fraction=0", *SHORT]
        assert f"{len(ids)} tokens of uint32" in run(capsys, "export", format, format, *words)
    assert np.fromfile("nanogpt/all.bin", np.uint32).tolist() == ids
    assert read_llmc(Path("llmc/all_000000.bin")).tolist() == ids
    assert IndexedDataset(Path("megatron/all")).dtype == np.int32
    assert sum(len(one) for one in IndexedDataset(Path("megatron/all")).documents()) == len(ids)
    assert store.fingerprint in run(capsys, "import", "nanogpt", "nanogpt", big)


def test_dtype_reads_ids_without_a_header_of_another_type(tmp_path, capsys):
    np.array(joined(TRAIN), np.uint32).tofile(tmp_path / "a.bin")
    words = ["import", "nanogpt", tmp_path / "a.bin"]
    assert "give --dtype uint32" in run(capsys, *words, expect=1)
    assert f"{len(joined(TRAIN))} tokens" in run(capsys, *words, "--dtype=uint32")
    with pytest.raises(SystemExit):
        run(capsys, *words, "--dtype=float16")


def test_all_formats_give_the_same_store(tmp_path):
    pytest.importorskip("pyarrow")
    store = import_store("nanogpt", two_splits(tmp_path / "a"))
    for format in ("megatron", "parquet", "nanogpt"):
        again = import_store(format, export_store(format, store, format), root=f"by-{format}")
        assert again.fingerprint == store.fingerprint
        assert (again.path / "00000-001.bin").read_bytes() == (store.path / "00000-001.bin").read_bytes()


def test_no_document_continues_in_another_split(tmp_path):
    pytest.importorskip("pyarrow")
    train, val = joined(TRAIN, ends=False), [END, *joined(VAL, ends=False)]
    store = import_store("nanogpt", write_nanogpt(tmp_path / "a", train=train, val=val))
    assert store.n_documents == len(TRAIN + VAL)
    assert len(train) in starts_of(store)
    for format in ("megatron", "parquet", "nanogpt"):
        again = import_store(format, export_store(format, store, format), root=f"by-{format}")
        assert starts_of(again) == starts_of(store)
        assert again.fingerprint == store.fingerprint


def test_rows_without_ids_are_left_out(tmp_path):
    write_table(tmp_path / "a.parquet", [[], None] * 90 + TRAIN)
    store = import_store("parquet", tmp_path / "a.parquet")
    assert starts_of(store) == np.cumsum([0, *map(len, TRAIN)])[:-1].tolist()


def test_sentencepiece_ids_keep_their_documents(tmp_path):
    pytest.importorskip("sentencepiece")
    folder = Path(os.environ.get("LIT_GPTDATA_VOCABULARIES", "missing"))
    model = folder / "mistral_common" / "data" / "tokenizer.model.v1"
    if not model.is_file():
        pytest.skip("LIT_GPTDATA_VOCABULARIES has no model")
    tokenizer = Tokenizer(str(model))
    end = tokenizer.end_of_document
    texts = ["It was a dreary night. " * 3, "Größe"] * 9
    ids = [id for text in texts for id in [*tokenizer.encode(text), end]]
    np.save(tmp_path / "a.npy", np.array(ids))
    store = import_store("npy", tmp_path / "a.npy", tokenizer=tokenizer, checks=False)
    assert store.tokens[:].tolist() == ids
    assert store.n_documents == len(texts)
    assert store.n_bytes == sum(len(text.encode()) for text in texts)
    assert store.is_exact_at(len(ids) // 2)
    (cut,) = (i for i in range(9, 19) if tokenizer.token_bytes[ids[i]] == b" night")
    np.save(tmp_path / "train.npy", np.array(ids[:cut]))
    np.save(tmp_path / "val.npy", np.array(ids[cut:]))  # from the middle of a text
    paths = (tmp_path / "train.npy", tmp_path / "val.npy")
    assert import_store("npy", *paths, tokenizer=tokenizer, checks=False).n_bytes == store.n_bytes


# The store ------------------------------------------------------------------------------------------


def test_the_fingerprint_depends_on_ids_split_and_tokenizer_but_not_on_paths(tmp_path):
    def fingerprint(folder: str, special="allow", **splits: list[int]) -> str:
        folder = write_nanogpt(tmp_path / folder, **splits)
        return import_store("nanogpt", folder, tokenizer=Tokenizer("gpt2", special)).fingerprint

    train, val = joined(TRAIN), joined(VAL)
    first = fingerprint("a", train=train, val=val)
    assert fingerprint("b", train=train, val=val) == first
    others = [
        fingerprint("c", train=train[:-1], val=[END, *val]),
        fingerprint("d", train=train, test=val),
        fingerprint("e", train=[5, *train[1:]], val=val),
        fingerprint("a", special="text"),
    ]
    assert len({first, *others}) == 5


def test_the_same_import_finds_the_store_and_reads_nothing(tmp_path, monkeypatch):
    folder = two_splits(tmp_path / "a")
    store = import_store("nanogpt", folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(importing.IdFiles, "write", None)
        assert import_store("nanogpt", folder).path == store.path
    write_nanogpt(folder, val=joined(VAL[1:]))
    assert import_store("nanogpt", folder).path != store.path
    assert len(stores(Path("tokens"))) == 2
    assert not litter(Path("tokens"))


def test_a_store_keeps_its_split_whatever_the_fractions_are(tmp_path, caplog):
    folder = write_nanogpt(two_splits(tmp_path / "a"), test=joined(VAL[:3]))
    store = import_store("nanogpt", folder)
    n, n_val = len(joined(TRAIN)), len(joined(VAL))
    data = opened(store, val_fraction=0.5, test_fraction=0.2)
    data.prepare_data()  # a second time, as a Trainer does for validation
    assert caplog.text.count("has its own split: val_fraction and test_fraction are ignored") == 1
    split = data._data.first.split
    assert (split.train, split.val, split.test) == ((0, n), (n, n + n_val), (n + n_val, store.n_tokens))
    targets = np.concatenate([batch.numpy().ravel() for _, batch in data.val_dataloader()])
    assert targets[targets >= 0].tolist() == joined(VAL)[1:]
    assert f"over tokens [{n:,}, {n + n_val:,})" in str(data)


def test_a_run_resumes_on_an_imported_store_with_other_fractions(tmp_path):
    store = import_store("nanogpt", two_splits(tmp_path / "a"))
    data = opened(store, num_workers=0)
    batches = iter(data.train_dataloader())
    for _ in range(5):
        next(batches)
    state = data.state_dict()
    again = opened(store, val_fraction=0.3)
    again.load_state_dict(state)
    rest = [inputs.tolist() for inputs, _ in again.train_dataloader()]
    assert rest[-1] == [inputs.tolist() for inputs, _ in batches][-1]
    assert again.batch_at(5)[0].tolist() in rest


def test_an_imported_store_can_be_published_checked_and_read_from_a_url(tmp_path, capsys):
    store = import_store("nanogpt", two_splits(tmp_path / "a"))
    local = f"data.store_url={store.path}"
    assert "every SHA-256 matches" in run(capsys, "verify", local)
    assert f"{store.n_documents} documents" in run(capsys, "info", local, *SHORT)
    url = run(capsys, "publish", "memory://shelf", local).strip()
    assert url.endswith(store.fingerprint)
    remote = opened(url)
    assert remote._data.first.split == opened(store)._data.first.split
    assert remote.batch_at(3)[0].tolist() == opened(store).batch_at(3)[0].tolist()
    export_store("nanogpt", remote.store)
    assert Path("out/val.bin").read_bytes() == (tmp_path / "a" / "val.bin").read_bytes()


def test_a_mixture_with_an_imported_store_is_published_as_a_whole(tmp_path):
    store = import_store("nanogpt", two_splits(tmp_path / "a"))
    (tmp_path / "b.txt").write_text("some other text. " * 90)
    corpus = {"owt": {"store_url": str(store.path)}, "other": str(tmp_path / "b.txt")}
    data = GPTDataModule(corpus, max_length=8, stride=8, build_workers=1)
    data.prepare_data()
    urls = data.publish(str(tmp_path / "shelf"))
    assert urls["owt"] == f"{tmp_path}/shelf/{store.fingerprint}"
    assert TokenStore(urls["owt"]).manifest.cuts == store.manifest.cuts


def test_two_steps_train_with_the_printed_command(tmp_path, capsys):
    folder = two_splits(tmp_path / "a")
    printed = run(capsys, "import", "nanogpt", folder, "tokenizer=gpt2", "data_dir=data")
    first, second, last = printed.splitlines()
    assert first.startswith("TokenStore(")
    assert second == f"split: {len(joined(TRAIN))} tokens of train, {len(joined(VAL))} of val, 0 of test"
    python, script, *words = shlex.split(last)
    assert (python, script) == ("lit-gptdata", "train")
    assert [word.partition("=")[0] for word in words] == ["data.store_url", "data.tokenizer"]
    loss = run_train_here(
        *words, *SHORT, "trainer.max_steps=2", "logger=none", "callbacks=none",
        f"output_dir={tmp_path}/run", "stem.embedding_dim=8", "+trainer.enable_progress_bar=false",
    )  # fmt: skip
    assert 9 < loss < 12


def test_a_path_with_special_characters_is_quoted_in_the_printed_command(tmp_path, capsys):
    folder = two_splits(tmp_path / "a")
    printed = run(capsys, "import", "nanogpt", folder, 'data_dir="my data, (1)"')
    words = shlex.split(printed.splitlines()[-1])[2:]
    assert f"{len(joined(TRAIN + VAL))} tokens" in printed
    assert "every SHA-256 matches" in run(capsys, "verify", *words)


def test_manifests_without_a_split_keep_their_bytes(tmp_path):
    store = import_store("nanogpt", write_nanogpt(tmp_path / "a", one=joined(TRAIN)))
    content = (store.path / "manifest.json").read_bytes()
    assert b"cuts" not in content
    assert Manifest.from_json(content).to_json() == content


@pytest.mark.parametrize("cuts", ["[0, 5]", "[5]", "[9, 5]", "[5, 10000000]", '"ab"', "[1.5, null]"])
def test_a_manifest_with_an_impossible_split_is_refused(tmp_path, cuts):
    store = import_store("nanogpt", two_splits(tmp_path / "a"))
    content = (store.path / "manifest.json").read_bytes()
    assert Manifest.from_json(content).to_json() == content
    damaged = re.sub(rb'"cuts": \[[^]]*\]', b'"cuts": ' + cuts.encode(), content)
    assert damaged != content
    (store.path / "manifest.json").write_bytes(damaged)
    with pytest.raises(ValueError, match=r"the token store is damaged: .*manifest\.json cannot be read"):
        TokenStore(store.path)


# The command line -----------------------------------------------------------------------------------


def test_named_sources_are_exported_into_a_folder_each(tmp_path, capsys):
    for name in ("web", "code"):
        (tmp_path / f"{name}.txt").write_text(f"{name} is a text. " * 80)
    corpus = f"data.corpus={{web:{tmp_path}/web.txt,code:{tmp_path}/code.txt}}"
    options = ["data=sources", corpus, "data.build_workers=1", *SHORT]
    run(capsys, "prepare", *options)
    run(capsys, "export", "nanogpt", "out", *options)
    files = sorted(str(path) for path in Path("out").rglob("*.bin"))
    assert files == [f"out/{name}/{split}.bin" for name in ("code", "web") for split in ("train", "val")]


def test_a_column_is_asked_for_where_several_have_ids(tmp_path, capsys):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table = arrow.table({"a": [[1, 2]], "b": [[3, 4]], "text": ["x"]})
    parquet.write_table(table, tmp_path / "x.parquet")
    for words in ([], ["--column=text"]):
        printed = run(capsys, "import", "parquet", tmp_path / "x.parquet", *words, expect=1)
        assert "give --column with one of ['a', 'b']" in printed
    store = import_store("parquet", tmp_path / "x.parquet", column="b")
    assert store.tokens[:].tolist() == [3, 4]


@pytest.mark.parametrize("ids", [[[[1, 2]]], [[1.0, 2.0]], None])
@pytest.mark.parametrize("other", ["attention_mask", "token_type_ids", "labels", "special_tokens_mask"])
def test_a_mask_is_not_taken_for_ids(tmp_path, ids, other):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    columns = {other: [[1, 1]], "text": ["x"]} | ({"input_ids": ids} if ids else {})
    parquet.write_table(arrow.table(columns), tmp_path / "x.parquet")
    message = (
        rf"give --column with one of \['{other}'\]; it has \{{'{other}': 'int64', 'text': 'no list'"
    )
    with pytest.raises(ValueError, match=message):
        import_store("parquet", tmp_path / "x.parquet")
    assert import_store("parquet", tmp_path / "x.parquet", column=other).n_tokens == 2


def found(*paths: Path, suffix: str = ".bin") -> list[tuple[str, str]]:
    return [(split, file.name) for split, file in find_files(list(map(str, paths)), suffix)]


@pytest.mark.parametrize("val", ["val", "valid", "validation", "eval", "dev"])
def test_folders_and_files_name_the_split(tmp_path, val):
    one, other = (write_nanogpt(tmp_path / "d" / name, x=[1, 2]) for name in ("train", val))
    expected = [("train", "x.bin"), ("val", "x.bin")]
    for paths in ([one, other], [other / "x.bin", one / "x.bin"], [tmp_path / "d"], [tmp_path / "d/*"]):
        assert found(*paths) == expected
    folder = write_nanogpt(tmp_path / "dev" / "test", **{"train": [1], val: [2]})
    assert found(folder) == [("train", "train.bin"), ("val", f"{val}.bin")]
    assert found(folder / "train.bin", folder / f"{val}.bin") == found(folder)


def test_names_that_leave_the_split_open_are_refused(tmp_path):
    folder = write_nanogpt(tmp_path / "a" / "train", test_prep=[1, 2])
    with pytest.raises(ValueError, match=r"test_prep\.bin names several splits, \['test', 'train'\]"):
        found(tmp_path / "a")
    assert found(folder / "test_prep.bin") == [("train", "test_prep.bin")]
    for names, message in (
        (("train", "holdout"), r"holdout\.bin has no split in its name, but others have"),
        (("one", "x_val"), r"one\.bin has no split in its name, but others have"),
        (("val", "test"), "files of val and test, but none of train"),
    ):
        folder = write_nanogpt(tmp_path / "-".join(names), **{name: [1, 2] for name in names})
        with pytest.raises(ValueError, match=message):
            found(folder)


def test_hidden_folders_and_caches_are_left_out_and_a_file_given_twice_is_refused(tmp_path, monkeypatch):
    folder = write_nanogpt(tmp_path / "a", train=[1, 2])
    write_nanogpt(folder / ".ipynb_checkpoints", x=[1, 2])
    assert found(folder) == [("train", "train.bin")]
    for name in ("data-0.arrow", "cache-12.arrow"):
        (folder / name).touch()
    assert found(folder, suffix=".arrow") == [("train", "data-0.arrow")]
    monkeypatch.chdir(tmp_path)
    for twice in ([folder, Path("a/train.bin")], [Path("a"), folder]):
        with pytest.raises(ValueError, match=r"a/train\.bin is given twice, also as .*a/train\.bin"):
            found(*twice)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert found(Path("~/a")) == [("train", "train.bin")]


def test_wrong_words_are_refused(tmp_path, capsys):
    folder = write_nanogpt(two_splits(tmp_path / "a"), extra=[1, 2])
    for words, message in (
        (["import", "nanogpt", folder], "extra.bin has no split in its name"),
        (["import", "npy", folder], "holds no *.npy files"),
        (["import", "npy", "data_dir=d1"], "give the files or folders to import"),
        (["import", "nanogpt", folder / "train.bin", "nope=1"], "data.nope"),
        (["export", "nanogpt", tmp_path, "data.corpus=sample"], "lit-gptdata prepare"),
    ):
        assert message in run(capsys, *words, expect=1)
    for words in (["import", "nano", folder], ["export", "npy", "x"]):
        with pytest.raises(SystemExit):
            run(capsys, *words)
        assert "nanogpt" in capsys.readouterr().err.partition("choose from")[2]


def test_a_path_like_an_option_is_read_and_ids_of_characters_are_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    two_splits(Path("a=b"))
    assert "TokenStore" in run(capsys, "import", "nanogpt", "a=b/train.bin")
    Path("a=b/meta.pkl").touch()
    printed = run(capsys, "import", "nanogpt", "a=b", expect=1)
    assert "a=b/meta.pkl is for other ids than gpt2's" in printed
    assert "TokenStore" in run(capsys, "import", "nanogpt", "a=b", "tokenizer=gpt2")


def test_an_export_does_not_touch_a_folder_with_files(tmp_path):
    store = import_store("nanogpt", two_splits(tmp_path / "a"))
    Path("out").mkdir()
    Path("out/prepare.py").touch()
    with pytest.raises(FileExistsError, match="is not empty: give a new folder"):
        export_store("nanogpt", store)
    assert os.listdir("out") == ["prepare.py"]
    Path("out/prepare.py").unlink()
    export_store("nanogpt", store)
    assert sorted(os.listdir("out")) == ["train.bin", "val.bin"]
