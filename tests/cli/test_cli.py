"""The command lit-gptdata as a user runs it, on a text of two small files."""

from __future__ import annotations

import functools
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from lit_gptdata import GPTDataModule, Tokenizer
from lit_gptdata.cli.main import COLOURS, RESET, SEPARATOR, main
from lit_gptdata.report import usage
from lit_gptdata.text.files import FilesCorpus
from lit_gptdata.tokens.build import local as build

STORY = "It was on a dreary night of November that I beheld the accomplishment of my toils.\n"
WORLD = "Größe, 日本語 🎉 naïve <|endoftext|> and on\r\n"
OPTIONS = {"max_length": 16, "stride": 8, "batch_size": 4, "build_workers": 1, "engine": "tiktoken"}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> tuple[Path, list[str]]:
    """A folder with a prepared text, and the overrides that say so."""
    folder = tmp_path_factory.mktemp("cli")
    return folder, prepare_in(folder)


def prepare_in(folder: Path) -> list[str]:
    words = write_in(folder)
    assert main(["prepare", *words]) == 0
    return words


def write_in(folder: Path) -> list[str]:
    (folder / "books").mkdir()
    (folder / "books" / "a.txt").write_text(STORY * 30, newline="")
    (folder / "books" / "b.txt").write_text(WORLD * 30, newline="")
    options = [f"data.{name}={value}" for name, value in OPTIONS.items()]
    return ["data=files", f"data.corpus={folder}/books/", f"data.data_dir={folder}/data", *options]


def opened(folder: Path) -> GPTDataModule:
    data = GPTDataModule(corpus=f"{folder}/books/", data_dir=folder / "data", **OPTIONS)
    data.setup()
    return data


def run(capsys, *words: str, expect: int = 0) -> str:
    """What a command prints; on stdout if it ends well, else on stderr."""
    capsys.readouterr()
    status = main(words)
    printed = capsys.readouterr()
    assert status == expect, printed
    assert (printed.err if expect == 0 else printed.out) == ""
    return printed.out if expect == 0 else printed.err


def shown_windows(printed: str) -> list[tuple[int, int, int, str, str]]:
    """Window, first token, end, source, and text with its separators."""
    head = re.compile(r"^window ([\d,]+), tokens \[([\d,]+), ([\d,]+)\), (.*)\n", re.MULTILINE)
    _, *found = head.split(printed)
    rows = zip(*(found[i::5] for i in range(5)), strict=True)
    return [
        (*(int(number.replace(",", "")) for number in numbers), where, text.removesuffix("\n\n"))
        for *numbers, where, text in rows
    ]


def test_as_a_module_it_lists_its_commands_and_loads_little(tmp_path):
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "lit_gptdata", "--help"],
        cwd=tmp_path, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.startswith("usage: lit-gptdata ")
    for name in ("prepare", "info", "show", "verify", "report"):
        assert re.search(rf"^    {name} +[A-Z].*\.$", done.stdout, re.MULTILINE)
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "lit_gptdata.cli.main" in loaded
    assert not {"torch", "numpy", "hydra", "matplotlib", "lightning"} & loaded


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "required: command"),
        (["nope"], "invalid choice: 'nope'"),
        (["info", "--nope"], "unrecognized arguments: --nope"),
        (["info", "--plot"], "expected one argument"),
    ],
)
def test_a_wrong_command_line_prints_usage(words, says, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(words)
    printed = capsys.readouterr().err
    assert stopped.value.code == 2
    assert "usage: lit-gptdata" in printed
    assert says in printed


def test_nothing_is_there_before_prepare(tmp_path, capsys):
    words = write_in(tmp_path)
    for command in ("info", "show", "verify"):
        printed = run(capsys, command, *words, expect=1)
        assert "is not tokenised yet" in printed
        assert f"lit-gptdata prepare data=files data.corpus={tmp_path}/books/ " in printed
        assert "Traceback" not in printed
    assert not (tmp_path / "data").exists()
    url = ["data=url", "data.corpus=https://example.org/book.txt", f"data.data_dir={tmp_path}"]
    printed = run(capsys, "show", "window=1", *url, expect=1)
    assert "is not downloaded yet" in printed
    assert (
        "lit-gptdata prepare data=url data.corpus=https://example.org/book.txt data.data_dir" in printed
    )


def test_prepare_says_what_there_is(prepared, capsys):
    folder, words = prepared
    assert run(capsys, "prepare", *words) == f"{opened(folder)}\n"


def test_info(prepared, capsys):
    folder, words = prepared
    data = opened(folder)
    printed = run(capsys, "info", *words)
    assert printed.startswith(f"{data}\n")
    assert f"{len(data.train_dataloader()):,} train batches, {len(data.val_dataloader())} val" in printed
    assert f"{data.store.n_bytes / data.store.n_tokens:.2f} bytes a token" in printed
    size = sum(path.stat().st_size for path in data.store.path.iterdir())
    assert f"{data.store.path}, {size:,} bytes in 4 files" in printed
    assert "0 val" in run(capsys, "info", *words, "data.val_fraction=0")


def test_the_plot_is_a_picture(prepared, capsys, tmp_path):
    _, words = prepared
    picture = tmp_path / "tokens.png"
    printed = run(capsys, "info", *words[:2], "--plot", str(picture), *words[2:])  # in between
    assert str(picture) in printed
    assert picture.read_bytes().startswith(b"\x89PNG")
    missing = tmp_path / "missing" / "tokens.png"
    assert main(["info", "--plot", str(missing), *words]) == 1
    assert f"No such file or directory: '{missing}'" in capsys.readouterr().err


def test_ids_are_counted_in_chunks(prepared, monkeypatch):
    store = opened(prepared[0]).store
    monkeypatch.setattr(usage, "CHUNK", 7)
    expected = np.bincount(store.tokens[:], minlength=store.vocab_size)
    np.testing.assert_array_equal(usage.count_ids(store), expected)


def test_show_prints_what_a_step_sees(prepared, capsys):
    folder, words = prepared
    data = opened(folder)
    inputs, _ = data.batch_at(3)
    shown = shown_windows(run(capsys, "show", "step=3", *words))
    assert [window for window, *_ in shown] == data.windows_at(3).tolist()
    for (window, begin, end, where, text), ids in zip(shown, inputs.tolist(), strict=True):
        assert (begin, end) == (window * 8, window * 8 + 16)
        assert data.store.tokens[begin:end].tolist() == ids
        assert text.replace(SEPARATOR, "") == data.tokenizer.decode(ids)
        assert where.startswith(str(data.store.place(begin)))
    assert run(capsys, "show", *words) == run(capsys, "show", *words, "step=0")


def test_show_prints_a_window(prepared, capsys):
    folder, words = prepared
    printed = run(capsys, "show", "window=0", *words)
    assert printed == (
        f"window 0, tokens [0, 16), {folder}/books/a.txt, document 1, byte 0\n"
        "It· was· on· a· d·re·ary· night· of· November· that· I· be·held· the· accomplishment\n\n"
    )
    ((window, begin, end, _, text),) = shown_windows(run(capsys, "show", "window=5", *words))
    assert (window, begin, end) == (5, 40, 56)
    data = opened(folder)
    assert text.replace(SEPARATOR, "") == data.tokenizer.decode(data.train_windows[5][0].tolist())
    # one that begins in a.txt and ends in b.txt
    (between,) = np.flatnonzero(data.store.tokens[:] == 50256)[:1] // 8
    printed = run(capsys, "show", f"window={between}", *words)
    assert re.search(r"/a\.txt, document 1, byte [\d,]+, to .*/b\.txt, document 2, byte \d", printed)


def test_a_window_that_does_not_exist(prepared, capsys):
    _, words = prepared
    assert "window=100000 does not exist" in run(capsys, "show", "window=100000", *words, expect=1)
    assert "step=-1 is no number" in run(capsys, "show", "step=-1", *words, expect=1)
    printed = run(capsys, "show", "step=1", "window=2", *words, expect=1)
    assert "step=1 and window=2: give one" in printed


def test_a_terminal_gets_colours(prepared, capsys, monkeypatch):
    _, words = prepared
    plain = run(capsys, "show", "window=1", *words)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.delenv("NO_COLOR", raising=False)
    printed = run(capsys, "show", "window=1", *words)
    assert SEPARATOR not in printed
    assert f"{COLOURS[0]}⏎{RESET}\n" in printed or f"{COLOURS[1]}⏎{RESET}\n" in printed
    bare = re.sub(r"\x1b\[[\d;]*m", "", printed).replace("⏎", "")
    assert bare == plain.replace(SEPARATOR, "")
    monkeypatch.setenv("NO_COLOR", "1")
    assert run(capsys, "show", "window=1", *words) == plain


def test_every_token_has_a_place(tmp_path, monkeypatch):
    """Over several shards, for a document in many, empty ones and special tokens inside a text."""
    rows = ["", WORLD * 9, ""]
    documents = [("a.txt", STORY * 3700), *(("b.jsonl", row) for row in rows), ("c.txt", STORY * 1500)]
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    for name in ("a.txt", "c.txt"):
        (tmp_path / name).write_text(dict(documents)[name])
    monkeypatch.setattr(build, "Job", functools.partial(build.Job, shard_bytes=100_000))
    tokenizer = Tokenizer("gpt2")
    store = build.prepare_store(FilesCorpus(tmp_path), tokenizer, tmp_path / "tokens")
    assert len(store.shards) > 4

    expected = []  # of every token, its separator at a document's end
    for number, (name, text) in enumerate(documents, start=1):
        ids = tokenizer.encode(text)
        lengths = [len(token) for token in tokenizer.encoding.decode_tokens_bytes(ids)]
        offsets = np.cumsum([0, *lengths]).tolist()
        expected += [(f"{tmp_path}/{name}", number, offset) for offset in offsets]
    expected.pop()  # no separator behind the last document
    assert len(expected) == store.n_tokens

    edges = np.cumsum([0, *(shard.n_tokens for shard in store.shards)])
    separators = np.flatnonzero(store.tokens[:] == tokenizer.end_of_text)
    near = (np.concatenate([edges, separators])[:, None] + np.arange(-2, 3)).ravel()
    tokens = {*near.tolist(), *range(0, store.n_tokens, 997)}
    for token in tokens & set(range(store.n_tokens)):
        assert store.place(token) == expected[token], token
    for outside in (-1, store.n_tokens):
        with pytest.raises(IndexError, match=r"give one in \[0, "):
            store.place(outside)


def test_verify(tmp_path, capsys):
    words = prepare_in(tmp_path)
    printed = run(capsys, "verify", *words)
    assert "3 files read, every SHA-256 is right" in printed
    (ids,) = (tmp_path / "data" / "tokens").glob("*/00000-000.bin")
    content = bytearray(ids.read_bytes())
    content[10] ^= 1
    ids.write_bytes(content)
    printed = run(capsys, "verify", *words, expect=1)
    assert f"the contents of {ids.name} do not match" in printed


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["data.nope=1"], "data.nope"),
        (["data=nope"], "Available options in 'data'"),
        (["data.max_length"], "data.max_length"),
        (["data=files"], "Missing mandatory value: data.corpus"),
        (["data=files", "data.corpus=none/*.txt"], "no file matches 'none/*.txt'"),
        (["data.stride=0"], "lit-gptdata prepare: stride=0 is too small"),
        (["data.max_length=a"], "max_length='a' is a str"),
    ],
)
def test_a_wrong_override_ends_in_a_message(overrides, says, capsys):
    printed = run(capsys, "prepare", *overrides, expect=1)
    assert says in printed
    assert printed.startswith("lit-gptdata prepare: ")
    assert "Traceback" not in printed
    assert len(printed.splitlines()) < 15


def test_a_missing_extra_ends_in_its_pip_line(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    printed = run(capsys, "prepare", "data=files", "data.corpus=gs://bucket/books/", expect=1)
    line = "gs://bucket/books/ needs gcsfs: pip install 'lit-gptdata[gcs]'"
    assert printed == f"lit-gptdata prepare: {line}\n"


@pytest.mark.parametrize("mistake", [ZeroDivisionError, ModuleNotFoundError])
def test_a_mistake_of_ours_keeps_its_traceback(monkeypatch, mistake):
    def fail(overrides):
        raise mistake

    monkeypatch.setattr("lit_gptdata.cli.main._data", fail)
    with pytest.raises(mistake):
        main(["prepare"])
