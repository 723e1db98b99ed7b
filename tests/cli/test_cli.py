"""The command lit-gptdata, run as a user runs it on two small files."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from lit_gptdata import GPTDataModule, Tokenizer
from lit_gptdata.cli.main import COMMANDS, main
from lit_gptdata.configs import conf_dir, quote_value
from lit_gptdata.report import usage
from lit_gptdata.report.show import COLORS, RESET, SEPARATOR
from lit_gptdata.text.files import FilesCorpus
from lit_gptdata.tokens.build import local as build

STORY = "It was on a dreary night of November that I beheld the accomplishment of my toils.\n"
WORLD = "Größe, 日本語 🎉 naïve <|endoftext|> and on\r\n"
OPTIONS = {"max_length": 16, "stride": 8, "batch_size": 4, "build_workers": 1, "engine": "tiktoken"}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> tuple[Path, list[str]]:
    """A folder with tokenized files, and the overrides to use it."""
    folder = tmp_path_factory.mktemp("cli")
    overrides = write_books(folder)
    assert main(["prepare", *overrides]) == 0
    return folder, overrides


def write_books(folder: Path) -> list[str]:
    (folder / "books").mkdir()
    (folder / "books" / "a.txt").write_text(STORY * 30, newline="")
    (folder / "books" / "b.txt").write_text(WORLD * 30, newline="")
    options = [f"data.{name}={value}" for name, value in OPTIONS.items()]
    return ["data=files", f"data.corpus={folder}/books/", f"data.data_dir={folder}/data", *options]


def open_module(folder: Path) -> GPTDataModule:
    data = GPTDataModule(corpus=f"{folder}/books/", data_dir=folder / "data", **OPTIONS)
    data.setup()
    return data


def run(capsys, *words: str, expect: int = 0) -> str:
    """Run a command and return its output: stdout if it succeeds, stderr if it fails."""
    capsys.readouterr()
    status = main(words)
    printed = capsys.readouterr()
    assert status == expect, printed
    assert (printed.err if expect == 0 else printed.out) == ""
    return printed.out if expect == 0 else printed.err


def parse_windows(printed: str) -> list[tuple[int, int, int, str, str]]:
    """Read the output of `show`: window, first token, end, origin, and text with separators."""
    head = re.compile(r"^window ([\d,]+), tokens \[([\d,]+), ([\d,]+)\), (.*)\n", re.MULTILINE)
    _, *found = head.split(printed)
    rows = zip(*(found[i::5] for i in range(5)), strict=True)
    return [
        (*(int(number.replace(",", "")) for number in numbers), origin, text.removesuffix("\n\n"))
        for *numbers, origin, text in rows
    ]


def test_help_lists_the_commands_and_imports_nothing_large(tmp_path):
    command = [sys.executable, "-X", "importtime", "-m", "lit_gptdata", "--help"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("usage: lit-gptdata ")
    for name in COMMANDS:
        assert re.search(rf"^  {name}\s+[A-Z]", done.stdout, re.MULTILINE)
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "lit_gptdata.cli.main" in imported
    assert not {"torch", "numpy", "hydra", "matplotlib", "lightning"} & imported


def test_before_prepare_every_command_names_the_prepare_command(tmp_path, capsys):
    overrides = write_books(tmp_path)
    for command in ("info", "show", "verify"):
        printed = run(capsys, command, *overrides, expect=1)
        assert f"lit-gptdata prepare data=files data.corpus={tmp_path}/books/ " in printed
        assert "Traceback" not in printed
    assert not (tmp_path / "data").exists()
    url = ["data=url", "data.corpus=https://example.org/book.txt", f"data.data_dir={tmp_path}"]
    printed = run(capsys, "show", "window=1", *url, expect=1)
    assert "is not downloaded yet" in printed
    assert f"lit-gptdata prepare {' '.join(url)}" in printed


def test_prepare_prints_the_data_module(prepared, capsys):
    folder, overrides = prepared
    assert run(capsys, "prepare", *overrides) == f"{open_module(folder)}\n"


def test_info_counts_batches_bytes_and_files(prepared, capsys):
    folder, overrides = prepared
    data = open_module(folder)
    printed = run(capsys, "info", *overrides)
    assert printed.startswith(f"{data}\n")
    assert f"{len(data.train_dataloader()):,} train batches, {len(data.val_dataloader())} val" in printed
    assert f"{data.store.n_bytes / data.store.n_tokens:.2f} bytes per token" in printed
    size = sum(path.stat().st_size for path in data.store.path.iterdir())
    assert f"{data.store.path}, {size:,} bytes in 4 files" in printed
    assert "0 val" in run(capsys, "info", *overrides, "data.val_fraction=0")


def test_info_plot_draws_a_png(prepared, capsys, tmp_path):
    _, overrides = prepared
    picture = tmp_path / "tokens.png"
    between = [*overrides[:2], "--plot", str(picture), *overrides[2:]]
    assert str(picture) in run(capsys, "info", *between)
    assert picture.read_bytes().startswith(b"\x89PNG")
    missing = tmp_path / "missing" / "tokens.png"
    assert main(["info", "--plot", str(missing), *overrides]) == 1
    assert f"{missing}: No such file or directory" in capsys.readouterr().err


def test_counts_of_ids_do_not_depend_on_the_chunk_size(prepared, monkeypatch):
    store = open_module(prepared[0]).store
    monkeypatch.setattr(usage, "CHUNK", 7)
    expected = np.bincount(store.tokens[:], minlength=store.vocab_size)
    np.testing.assert_array_equal(usage.count_ids(store), expected)


def test_show_prints_the_text_of_a_step(prepared, capsys):
    folder, overrides = prepared
    data = open_module(folder)
    inputs, _ = data.batch_at(3)
    printed = parse_windows(run(capsys, "show", "step=3", *overrides))
    assert [window for window, *_ in printed] == data.windows_at(3).tolist()
    for (window, start, end, origin, text), ids in zip(printed, inputs.tolist(), strict=True):
        assert (start, end) == (window * 8, window * 8 + 16)
        assert data.store.tokens[start:end].tolist() == ids
        assert text.replace(SEPARATOR, "") == data.tokenizer.decode(ids)
        assert origin.startswith(str(data.store.place(start)))
    assert run(capsys, "show", *overrides) == run(capsys, "show", *overrides, "step=0")


def test_show_prints_one_window(prepared, capsys):
    folder, overrides = prepared
    printed = run(capsys, "show", "window=0", *overrides)
    assert printed == (
        f"window 0, tokens [0, 16), {folder}/books/a.txt, document 1, byte 0\n"
        "It· was· on· a· d·re·ary· night· of· November· that· I· be·held· the· accomplishment\n\n"
    )
    ((window, start, end, _, text),) = parse_windows(run(capsys, "show", "window=5", *overrides))
    assert (window, start, end) == (5, 40, 56)
    data = open_module(folder)
    assert text.replace(SEPARATOR, "") == data.tokenizer.decode(data.train_windows[5][0].tolist())
    # a window that starts in a.txt and ends in b.txt
    (crossing,) = np.flatnonzero(data.store.tokens[:] == 50256)[:1] // 8
    printed = run(capsys, "show", f"window={crossing}", *overrides)
    assert re.search(r"/a\.txt, document 1, byte [\d,]+, to .*/b\.txt, document 2, byte \d", printed)


def test_show_refuses_a_wrong_step_or_window(prepared, capsys):
    for words, message in (
        (["window=100000"], "window must be an integer in [0, "),
        (["step=-1"], "step=-1 does not exist"),
        (["step=1", "window=2"], "got step=1 and window=2: give only one"),
        (["step=1", "step=2"], "got step=1 and step=2: give only one"),
        (["step="], "step= has no number: give step=N or window=N"),
        (["window="], "window= has no number"),
    ):
        assert message in run(capsys, "show", *words, *prepared[1], expect=1)


def test_show_colors_tokens_in_a_terminal_unless_no_color_is_set(prepared, capsys, monkeypatch):
    _, overrides = prepared
    plain = run(capsys, "show", "window=1", *overrides)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.delenv("NO_COLOR", raising=False)
    printed = run(capsys, "show", "window=1", *overrides)
    assert SEPARATOR not in printed
    assert any(f"{color}⏎{RESET}\n" in printed for color in COLORS)
    uncolored = re.sub(r"\x1b\[[\d;]*m", "", printed).replace("⏎", "")
    assert uncolored == plain.replace(SEPARATOR, "")
    monkeypatch.setenv("NO_COLOR", "1")
    assert run(capsys, "show", "window=1", *overrides) == plain


def test_every_token_has_a_place(tmp_path, monkeypatch):
    """The text has a document in several shards, empty documents and special tokens."""
    a, rows, c = STORY * 3700, ["", WORLD * 9, ""], STORY * 1500
    documents = [("a.txt", a), *(("b.jsonl", row) for row in rows), ("c.txt", c)]
    (tmp_path / "a.txt").write_text(a)
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    (tmp_path / "c.txt").write_text(c)
    monkeypatch.setattr("lit_gptdata.tokens.build.plan.SHARD_BYTES", 100_000)
    tokenizer = Tokenizer("gpt2")
    store = build.prepare_store(FilesCorpus(tmp_path), tokenizer, tmp_path / "tokens")
    assert len(store.shards) > 4

    expected = []  # the place of every token; a separator is at the end of its document
    for number, (name, text) in enumerate(documents, start=1):
        ids = tokenizer.encode(text)
        lengths = [len(token) for token in tokenizer.reference.encoding.decode_tokens_bytes(ids)]
        offsets = np.cumsum([0, *lengths]).tolist()
        expected += [(f"{tmp_path}/{name}", number, offset) for offset in offsets]
    expected.pop()  # no separator after the last document
    assert len(expected) == store.n_tokens

    edges = np.cumsum([0, *(shard.n_tokens for shard in store.shards)])
    separators = np.flatnonzero(store.tokens[:] == tokenizer.end_of_document)
    near = (np.concatenate([edges, separators])[:, None] + np.arange(-2, 3)).ravel()
    tokens = {*near.tolist(), *range(0, store.n_tokens, 997)}
    for token in tokens & set(range(store.n_tokens)):
        assert store.place(token) == expected[token], token
    for outside in (-1, store.n_tokens):
        with pytest.raises(IndexError, match=r"give one in \[0, "):
            store.place(outside)


def test_verify_finds_a_flipped_bit(tmp_path, capsys):
    overrides = write_books(tmp_path)
    run(capsys, "prepare", *overrides)
    assert "3 files, every SHA-256 matches" in run(capsys, "verify", *overrides)
    (ids,) = (tmp_path / "data" / "tokens").glob("*/00000-000.bin")
    content = bytearray(ids.read_bytes())
    content[10] ^= 1
    ids.write_bytes(content)
    printed = run(capsys, "verify", *overrides, expect=1)
    assert ids.name in printed
    assert "SHA-256" in printed


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.nope=1"], "data.nope"),
        (["data.max_lenght=3"], "did you mean data.max_length?"),
        (["max_length=3"], "did you mean data.max_length or stem.max_length?"),
        (["data.corpus=a,b.txt"], """'data.corpus="a,b.txt"'"""),
        (["data._target_=nope.X"], "cannot import nope.X: "),
        (["data=nope"], "data=nope does not exist: choose one of files, frankenstein, "),
        (["data.max_length"], "data.max_length"),
        (["data=files", "data.corpus=none/*.txt"], "none/*.txt"),
        (["data.stride=0"], "stride"),
        (["data.max_length=a"], "max_length"),
        (["data=null"], "data=none does not exist: choose one of files, frankenstein, "),
        (["+data.drop_last=false"], "Either remove + prefix: 'data.drop_last=false'"),
    ],
)
def test_a_wrong_override_prints_a_short_message(overrides, message, capsys):
    printed = run(capsys, "prepare", *overrides, expect=1)
    assert message in printed
    assert printed.startswith("error: ")
    assert "Traceback" not in printed
    assert len(printed.splitlines()) == 1


@pytest.mark.parametrize("words", [[], ["data=files", "data.corpus=books/"]])
def test_publish_without_a_url_shows_an_example(words, capsys):
    printed = run(capsys, "publish", *words, expect=1)
    assert printed.strip().endswith(" ".join(["lit-gptdata publish s3://bucket/tokens", *words]))


NAMES = ["café.txt", "a=b.txt", "[draft] x.txt", "x~$.txt", "a, b.txt", "x (1).txt", "it's.txt"]
NAMES += ["a&b;c#d!.txt", "{x}.txt", 'a"b.txt']


@pytest.mark.parametrize("name", NAMES)
def test_the_line_to_type_for_a_name_with_special_characters_works(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path(name).write_text(STORY * 30)
    quoted = quote_value(f"data.corpus={name}")
    words = [
        "prepare",
        "data=files",
        f"data.corpus={name}",
        "data.build_workers=1",
        "data.max_length=16",
    ]
    assert main(words) == 1
    printed = capsys.readouterr().err
    assert shlex.quote(quoted) in printed
    words = shlex.split(printed.partition("for the shell: ")[2])[1:]
    assert quoted in words
    assert run(capsys, *words)
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        assert compose("train", overrides=["data=files", quoted]).data.corpus == name


@given(st.text(st.sampled_from(list("aé\\\\\"'${}[](),= ~#&;:!\n*./")), min_size=1, max_size=12))
def test_every_text_can_be_quoted(text):
    value = OverridesParser.create().parse_override(quote_value(f"a={text}")).value()
    if not (text.startswith("[") and text.endswith("]")):  # a list
        assert OmegaConf.create({"a": value}).a == text


def test_a_missing_extra_prints_its_pip_command(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    printed = run(capsys, "prepare", "data=files", "data.corpus=gs://bucket/books/", expect=1)
    assert printed.startswith("error: gs://bucket/books/")
    assert printed.endswith("pip install 'lit-gptdata[gcs]'\n")
    assert len(printed.splitlines()) == 1


def test_a_bug_of_ours_says_how_to_see_its_traceback(monkeypatch, capsys):
    def fail(overrides):
        raise ZeroDivisionError("by zero")

    monkeypatch.setattr("lit_gptdata.cli.data.build_data", fail)
    message = "error: ZeroDivisionError: by zero (HYDRA_FULL_ERROR=1 shows where it was raised)\n"
    assert run(capsys, "prepare", expect=1) == message
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(ZeroDivisionError):
        main(["prepare"])
