"""Token files that are damaged, an import or export that is killed, and a disk that is full."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from lit_gptdata import GPTDataModule
from lit_gptdata.interop import importing
from lit_gptdata.tokens.build import local
from lit_gptdata.tokens.store import TokenStore
from tests.interop.other_programs import write_llmc, write_megatron
from tests.interop.token_files import (
    TRAIN,
    VAL,
    documents,
    export_store,
    import_store,
    joined,
    run,
    two_splits,
    write_nanogpt,
    write_table,
)
from tests.tokens.builds import ROOT, file_size_limit, litter, stores


def bad_files(folder: Path) -> None:
    ids = joined(TRAIN)
    write_nanogpt(folder, wrong=[*ids[:150], 60000], text=ids)
    (folder / "odd.bin").write_bytes(b"\1\2\3")
    np.array(ids, np.uint32).tofile(folder / "wide.bin")
    np.arange(70_000, 60_000, -7, np.uint32).tofile(folder / "large.bin")
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
    write_megatron(folder / "wrong_id", [[[1, 2, 60000]]])
    for power in (40, 62):
        count = (1 << power).to_bytes(8, "little")
        (folder / f"count{power}.idx").write_bytes(index[:18] + count + index[26:])
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
    ("nanogpt", "wrong.bin", r"wrong\.bin, offset 300: 'gpt2' has no id 60000, .* 50,257\).*--dtype$"),
    ("megatron", "wrong_id.idx", r"wrong_id\.bin, offset 4: 'gpt2' has no id 60000, .* tokenizer=…$"),
    (
        "megatron",
        "count40.idx",
        r"count40\.idx ends at offset 842, inside the table of 1,099,511,627,776",
    ),
    ("megatron", "count62.idx", r"count62\.idx ends at offset 842, inside .* header is damaged"),
    ("nanogpt", "odd.bin", "odd.bin ends inside an id of uint16, at offset 3"),
    ("nanogpt", "wide.bin", "wide.bin: every second id of uint16 is ≤ 0, so .* give --dtype uint32"),
    ("nanogpt", "large.bin", "large.bin: every second id of uint16 is ≤ 1, so .* --dtype uint32"),
    ("nanogpt", "empty.bin", r"empty\.bin is empty \(0 bytes\)"),
    ("nanogpt", "llmc.bin", "llmc.bin has the format llmc: lit-gptdata import llmc"),
    ("nanogpt", "meg.bin", "meg.bin has the format megatron: lit-gptdata import megatron"),
    ("nanogpt", "missing.bin", "no such file or folder: .*missing.bin"),
    ("nanogpt", "float.npy", r"float.npy is not a \*\.bin file"),
    ("nanogpt", "nothing*.bin", r"no file matches '.*nothing\*\.bin'"),
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
    ("megatron", "alone.idx", r"alone\.bin ends at offset 0, not 1,128 as in"),
    ("megatron", "gap.idx", r"gap\.idx: sequence 3 \(offset 218\) does not follow"),
    ("megatron", "less.idx", r"less\.bin ends at offset 1,122, not 1,128 as in .*less\.idx: copy both"),
    ("npy", "float.npy", r"float\.npy holds float64 of shape \(3,\), but must hold integers"),
    ("npy", "cube.npy", r"holds int64 of shape \(2, 2, 2\)"),
    ("npy", "fortran.npy", r"fortran\.npy is in Fortran order: save it again"),
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
def test_a_wrong_file_is_named_and_nothing_is_left(bad, format, name, message):
    with pytest.raises((ValueError, OSError), match=message) as caught:
        import_store(format, bad / name)
    assert "\n" not in str(caught.value)
    assert not stores(Path("tokens"))
    assert not [path for path in Path("tokens").rglob("*") if path.is_file() and path.stat().st_size]


@pytest.mark.parametrize("n", [0, 1])
def test_a_split_without_a_window_is_refused(tmp_path, n):
    np.save(tmp_path / "train.npy", np.arange(9))
    np.save(tmp_path / "val.npy", np.arange(n))
    with pytest.raises(
        ValueError, match=rf"val\.npy: val has {n} of the 2 tokens that a window needs: give"
    ):
        import_store("npy", tmp_path)
    assert not stores(Path("tokens"))


def test_a_file_that_changes_during_the_import_is_reported(tmp_path, monkeypatch):
    folder = two_splits(tmp_path / "a")
    chunks = importing.IdFiles._chunks

    def meddled(corpus, readers):
        yield from chunks(corpus, readers)
        write_nanogpt(folder, train=joined(TRAIN[1:]))

    monkeypatch.setattr(importing.IdFiles, "_chunks", meddled)
    with pytest.raises(RuntimeError, match="changed while it was read: run again"):
        import_store("nanogpt", folder)
    assert not stores(Path("tokens"))


@pytest.mark.parametrize(
    "name", ["text.bin", "llmc.bin", "meg.idx", "float.npy", "a.parquet", "stream.arrow"]
)
def test_a_file_of_ids_that_is_given_as_corpus_names_the_import_command(bad, name, capsys):
    data = GPTDataModule(str(bad / name), build_workers=1)
    with pytest.raises(ValueError, match=re.escape(str(bad / name))) as caught:
        data.prepare_data()
    (command,) = re.findall(
        r"lit-gptdata import (?:npy|nanogpt|llmc|megatron|parquet|arrow) \S+", str(caught.value)
    )
    if name not in ("text.bin", "float.npy"):
        run(capsys, *command.split()[1:])


@pytest.mark.parametrize(
    ("names", "format"),
    [(["train.bin", "val.bin"], "nanogpt"), (["a.npy"], "npy"), (["a.idx", "a.bin"], "megatron")],
)
def test_a_folder_of_ids_that_is_given_as_corpus_names_the_import_command(tmp_path, names, format):
    (tmp_path / "my ids").mkdir()
    for name in names:
        (tmp_path / "my ids" / name).touch()
    command = re.escape(f"lit-gptdata import {format} '{tmp_path}/my ids'")
    with pytest.raises(FileNotFoundError, match=command):
        GPTDataModule(str(tmp_path / "my ids")).prepare_data()


# Kills and full disks -------------------------------------------------------------------------------


def test_a_full_disk_leaves_nothing(tmp_path):
    pytest.importorskip("pyarrow")
    folder = write_nanogpt(tmp_path / "a", train=joined(documents(900)), val=joined(VAL))
    with file_size_limit(500), pytest.raises(OSError, match="the tokens cannot be written"):
        import_store("nanogpt", folder)
    assert not stores(Path("tokens"))
    store = import_store("nanogpt", folder)
    for format in ("nanogpt", "llmc", "megatron", "parquet"):
        with (
            file_size_limit(500),
            pytest.raises(OSError, match=r"nothing is written\. Free some .*out'$"),
        ):
            export_store(format, store)
        assert not [name for name in os.listdir() if "out" in name]


INSTANTS = ["ShardWriter", "complete", "vocab_table", "write_json", "_rename", "rmtree"]


@pytest.mark.parametrize("instant", INSTANTS)
def test_a_kill_at_any_step_of_an_import_leaves_nothing_that_is_trusted(tmp_path, instant):
    folder = two_splits(tmp_path / "a")

    class Killed(BaseException):
        pass

    def die(*args, **kwargs):
        raise Killed

    target = {"ShardWriter": importing, "complete": importing.IdFiles, "rmtree": local.shutil}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(target.get(instant, local), instant, die)
        with contextlib.suppress(Killed):
            import_store("nanogpt", folder)
    root = Path("tokens")
    assert [TokenStore(path).verify() for path in stores(root)] == [None] * (instant == "rmtree")
    assert import_store("nanogpt", folder).tokens[:].tolist() == joined(TRAIN + VAL)
    assert not litter(root)


@pytest.mark.parametrize("command", ["import", pytest.param("export", marks=pytest.mark.heavy)])
def test_a_killed_process_leaves_no_file_with_a_final_name(tmp_path, command):
    folder = two_splits(tmp_path / "a")
    code = f"""
import time
from pathlib import Path
from tests.interop.token_files import export_store, import_store
from lit_gptdata.interop import blocks, flat, importing
blocks.BLOCK_IDS, importing.SHARD_IDS = 100, 320
if {command!r} == "export":
    store = import_store("nanogpt", {str(folder)!r})
def slowly(blocks):
    for block in blocks:
        yield block
        print("block", flush=True)
        time.sleep(0.1)
read, write = flat.read_binary, blocks.Part.blocks
flat.read_binary = lambda *args: slowly(read(*args))
blocks.Part.blocks = lambda part: slowly(write(part))
import_store("nanogpt", {str(folder)!r}) if {command!r} == "import" else export_store("nanogpt", store)
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    for _ in range(2):
        assert process.stdout.readline() == b"block\n"
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not Path("out").exists()
    assert len(stores(Path("tokens"))) == (command == "export")
    assert bool(litter(Path("tokens"))) == (command == "import")
    store = import_store("nanogpt", folder)
    assert store.tokens[:].tolist() == joined(TRAIN + VAL)
    assert not litter(Path("tokens"))
    assert (export_store("nanogpt", store) / "val.bin").read_bytes() == (folder / "val.bin").read_bytes()
