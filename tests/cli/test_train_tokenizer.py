"""The command lit-gptdata train-tokenizer, and train.py with vocab_size."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from lit_gptdata import GPTDataModule, Tokenizer
from lit_gptdata.cli.overrides import compose_config
from lit_gptdata.cli.train_tokenizer import train_on
from lit_gptdata.tokens.libraries import train
from tests.cli.test_cli import run
from tests.training.run_train import run_train, run_train_here

pytest.importorskip("tokenizers")
SMALL = ["max_tokens=2_048", "stem.embedding_dim=16", "model.n_layers=1", "callbacks=none", "threads=1"]


def test_it_prints_figures_and_the_command_that_uses_the_file(capsys):
    printed = run(capsys, "train-tokenizer", "made/own.json", "data.max_length=32", "vocab_size=1000")
    own = Tokenizer("made/own.json")
    assert own.vocab_size == 1000
    first, rates, last = printed.splitlines()
    assert first.startswith("made/own.json: 1,000 tokens, of which 743 are merges; ")
    assert re.search(r"; \d+\.\d s on [\d,]+ bytes of text with (gigatoken|tokenizers)$", first)
    found = re.match(r"(\S+) bytes per token on (\S+) bytes .*; gpt2: (\S+)$", rates)
    rate, n_bytes, gpt2 = found.groups()
    assert 2 < float(rate) < 4
    assert 1.5 < float(gpt2) < 4
    assert 40_000 < int(n_bytes.replace(",", "")) < 60_000
    assert last == "next: lit-gptdata train data.tokenizer=made/own.json data.max_length=32"
    assert compose_config(shlex.split(last)[3:]).data.tokenizer == "made/own.json"


def test_a_file_name_with_special_characters_is_quoted_in_the_next_command(capsys):
    printed = run(capsys, "train-tokenizer", "vocab_size=300", "my own, é.json", "data.val_fraction=0")
    assert len(printed.splitlines()) == 2  # without held-out text
    override = shlex.split(printed.splitlines()[-1])[3]
    assert compose_config([override]).data.tokenizer == "my own, é.json"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give one .json file to write, and vocab_size=N: lit-gptdata train-tokenizer OUT.json vo"),
        (["vocab_size=300"], "give one .json file to write, and vocab_size=N"),
        (["own.model", "vocab_size=300"], "give one .json file to write, and vocab_size=N"),
        (["own.json", "b.json", "vocab_size=300"], "give one .json file to write, and vocab_size=N"),
        (["own.json"], "give one .json file to write, and vocab_size=N"),
        (["own.json", "vocab_size=300,400"], "vocab_size=300,400 has a comma"),
        (["own.json", "vocab_size=256"], "vocab_size must be an integer ≥ 257, got 256"),
        (["own.json", "vocab_size=8k"], "vocab_size must be an integer ≥ 257, got '8k'"),
        (["own.json", "vocab_sise=300"], "vocab_sise does not exist: did you mean vocab_size?"),
        (
            ["own.json", "vocab_size=300", "data=files", "data.corpus=no/"],
            "no such file or folder: 'no/'",
        ),
        (["own.json", "vocab_size=300", "data.store_url=s3://a/b"], "s3://a/b is a store without text"),
        (["own.json", "vocab_size=300", "data.val_fraction=0.995"], "lower val_fraction"),
    ],
)
def test_a_wrong_command_line_gets_one_line_that_helps(words, message, capsys):
    printed = run(capsys, "train-tokenizer", *words, expect=1)
    assert printed.startswith("error: ")
    assert message in printed
    assert printed.count("\n") == 1
    assert not Path("own.json").exists()


def test_no_file_is_replaced(capsys, monkeypatch, tmp_path):
    Path("folder.json").mkdir()
    Path("data.json").write_text("{}")
    words = ["train-tokenizer", "vocab_size=257", "data.val_fraction=0"]
    for name in ("folder.json", "data.json"):
        assert f"{name} exists: give another name, or" in run(capsys, *words, name, expect=1)
    assert Path("data.json").read_text() == "{}"
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert f"data.tokenizer={tmp_path}/home/own.json" in run(capsys, *words, "~/own.json")


def test_other_commands_name_the_command_that_trains(capsys):
    printed = run(capsys, "info", "vocab_size=300", expect=1)
    command = "lit-gptdata train-tokenizer OUT.json vocab_size=300"
    assert f"run {command}, then set data.tokenizer=OUT.json" in printed


def trained_share(data: GPTDataModule, vocab_size: int, monkeypatch) -> float:
    """Train own.json; return its bytes of text ÷ those of the train split of the build."""
    made = []
    copy = train._copy
    monkeypatch.setattr(train, "_copy", lambda *args: made.append(copy(*args)) or made[-1])
    train_on(data, Path("own.json"), vocab_size)
    data.prepare_data()
    data.setup()
    source = data._data.first
    return made[0][0] / source.store.byte_at(source.split.train[1])


@pytest.mark.parametrize("fractions", [(0.1, 0.0), (0.3, 0.2), (0.02, 0.02), (0.0, 0.5)])
def test_no_text_of_val_or_test_trains_the_tokenizer(fractions, monkeypatch):
    data = GPTDataModule("sample", val_fraction=fractions[0], test_fraction=fractions[1])
    assert 0.96 < trained_share(data, 300, monkeypatch) <= 1


@pytest.mark.parametrize(
    "options", [{"on_bad_document": "skip", "max_document_bytes": 100}, {"drop_duplicates": True}]
)
def test_documents_that_the_build_leaves_out_do_not_train_it(options, monkeypatch):
    texts = [f"apple {i:03d} " * 5 for i in range(60)] + ["secret " * 40] * 30  # 50, 280 bytes
    Path("a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    data = GPTDataModule("a.jsonl", val_fraction=0.3, **options)
    with pytest.warns(UserWarning, match="yields"):
        share = trained_share(data, 500, monkeypatch)
    assert 0.9 < share <= 1
    assert "secret" not in json.loads(Path("own.json").read_bytes())["model"]["vocab"]


def test_an_invalid_text_is_skipped_as_the_message_says():
    Path("texts").mkdir()
    Path("texts/a.txt").write_text("apple " * 5000)
    Path("texts/b.txt").write_bytes(b"pear \xff")
    with pytest.raises(UnicodeError, match="on_bad_document=skip"):
        train_on(GPTDataModule("texts"), Path("own.json"), 300)
    with pytest.warns(UserWarning, match="yields"):
        train_on(GPTDataModule("texts", on_bad_document="skip"), Path("own.json"), 300)


def test_a_mixture_trains_on_the_train_split_of_each_source():
    Path("a.txt").write_text("apple " * 1000)
    rows = [json.dumps({"body": text}) for text in ("banana " * 1000, *["secret"] * 500)]
    Path("b.jsonl").write_text("\n".join(rows))
    Path("c.txt").write_text("cherry " * 1000)
    b = {"path": "b.jsonl", "text_column": "body", "val_fraction": 0.4, "weight": 0.1}
    a, c = {"path": "a.txt", "weight": 1.0}, {"path": "c.txt", "weight": 0.0}
    sources = {"a": a, "b": b, "c": c}
    with pytest.warns(UserWarning, match="yields"):
        train_on(GPTDataModule(sources), Path("own.json"), 500)
    vocab = json.loads(Path("own.json").read_bytes())["model"]["vocab"]
    assert {"Ġapple", "Ġbanana"} <= vocab.keys()
    assert not {"Ġcherry", "secret"} & vocab.keys()


def test_train_py_trains_a_tokenizer_first():
    loss = run_train_here(*SMALL, "vocab_size=300", "output_dir=run", "max_tokens=512")
    assert 5 < loss < 6  # the logarithm of 300 is 5.7
    assert Tokenizer("run/tokenizer.json").vocab_size == 300


@pytest.mark.heavy
def test_a_run_with_its_own_tokenizer_resumes_with_it_also_on_other_text(tmp_path):
    (tmp_path / "a.txt").write_text("to be or not to be, that is the question\n" * 2000)
    files = ["data=files", "vocab_size=300", "callbacks=default"]
    run_train(*SMALL, *files, "data.corpus=a.txt", "output_dir=run", cwd=tmp_path)
    path = tmp_path / "run" / "tokenizer.json"
    before = path.read_bytes()
    (tmp_path / "b.txt").write_text("whether it is nobler in the mind to suffer\n" * 2000)
    more = ["data.corpus=[a.txt,b.txt]", "data.on_change=continue", "max_tokens=4_096"]
    for folder in ("other", "run"):
        resumed = [f"output_dir={folder}", "ckpt_path=run/checkpoints/last.ckpt"]
        printed = run_train(*SMALL, *files, *more, *resumed, cwd=tmp_path)
        assert f"{path}: 281 tokens, from the run that continues" in printed
        assert path.read_bytes() == (tmp_path / folder / "tokenizer.json").read_bytes() == before
    checkpoint = tmp_path / "other" / "checkpoints" / "last.ckpt"
    data = GPTDataModule.load_from_checkpoint(checkpoint, weights_only=True)
    assert data.tokenizer.fingerprint == Tokenizer(str(path)).fingerprint
    path.unlink()
    printed = run_train(*SMALL, *files, *more, *resumed, cwd=tmp_path, expect=1)
    assert "set data.tokenizer to the tokenizer of the run" in printed


def test_train_py_refuses_vocab_size_with_another_tokenizer():
    message = r"vocab_size trains a tokenizer: leave it or data\.tokenizer=o200k_base out"
    with pytest.raises(ValueError, match=message):
        run_train_here(*SMALL, "vocab_size=300", "data.tokenizer=o200k_base", "output_dir=run")


@pytest.mark.heavy
def test_parallel_jobs_of_the_sweep_train_their_own_tokenizers(tmp_path):
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    words = ["-m", "+sweep=vocab", *SMALL, "vocab_size=300,350", "hydra.sweep.dir=sweep"]
    printed = run_train(*words, "hydra/launcher=joblib", "hydra.launcher.n_jobs=2", cwd=tmp_path)
    assert "2 jobs: 2 completed" in printed
    for job, size in ("0", 300), ("1", 350):
        assert Tokenizer(str(tmp_path / "sweep" / job / "tokenizer.json")).vocab_size == size
    table = (tmp_path / "sweep" / "sweep.csv").read_text()
    assert re.search(r"completed,(300|350),.*\n.*completed,(300|350),", table)
    assert "val_bits_per_byte" in table
    assert "vocab_size" in (tmp_path / "sweep" / "sweep.html").read_text()
