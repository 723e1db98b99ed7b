"""The words of a command line: texts, help with the comments of conf/, and shell completion."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from lit_gptdata import __version__
from lit_gptdata.cli.main import COMMANDS, main
from lit_gptdata.cli.overrides import as_overrides, compose_config
from tests.training.run_train import CONF, STORY


@pytest.mark.parametrize(
    ("words", "corpus"),
    [
        (["books/"], "books/"),
        (["./data=files"], "./data=files"),
        (["books/a=b.txt", "data.stride=8"], "books/a=b.txt"),
        (["a.txt", "b, 'c'.txt"], ["a.txt", "b, 'c'.txt"]),
        (["s3://bucket/a?b=c&d"], "s3://bucket/a?b=c&d"),
        (["[ab].txt"], "[ab].txt"),
        (["books/*.txt", "data=files"], "books/*.txt"),
        (["frankenstein"], "frankenstein"),
        (["seed"], "seed"),
    ],
)
def test_a_path_url_or_name_is_the_text(words, corpus):
    for name in ("a.txt", "b, 'c'.txt", "books/a=b.txt", "seed"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text(STORY)
    assert compose_config(words).data.corpus == corpus


def test_a_folder_that_is_named_like_an_option_stays_an_option():
    Path("data=mixture").mkdir()
    words = [
        "data=mixture",
        "~data.corpus.code",
        "+trainer.limit_train_batches=2",
        "hydra/launcher=basic",
    ]
    assert as_overrides(words) == words
    assert "code" not in compose_config(words[:2]).data.corpus


@pytest.mark.parametrize("argv", [["train.py"], ["/bin/lit-gptdata", "train"]])
@pytest.mark.parametrize("columns", [60, 120])
def test_help_describes_every_option_and_fits_the_terminal(argv, columns, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [*argv, "--help"])
    monkeypatch.setenv("COLUMNS", str(columns))
    with pytest.raises(SystemExit, match=r"^0$"):
        main(["train", "--help"])
    printed = capsys.readouterr().out
    program = "python train.py" if argv == ["train.py"] else "lit-gptdata train"
    assert printed.startswith(f"usage: {program} ")
    assert f"  {program} -m +sweep=context" in printed
    options = printed[printed.index("\nconfigs to choose") : printed.index("\nmore:")]
    assert max(map(len, options.splitlines())) <= max(columns, 70)  # a name of an option is not broken

    def keys(node, prefix):
        for name, value in node.items():
            if OmegaConf.is_dict(value) and not name.startswith("_"):
                yield from keys(value, f"{prefix}{name}.")
            elif not name.startswith("_"):
                yield f"{prefix}{name}"

    shown = set(re.findall(r"^  ([\w.]+)(?==)", options, re.MULTILINE))
    assert {*keys(compose_config([]), "")} <= shown
    for group in ("data", "model", "trainer", "experiment", "debug", "sweep"):
        for path in (CONF / group).glob("*.yaml"):
            assert f"{group}={path.stem} " in options
    text = " ".join(options.split())
    stride = "tokens between the starts of two sliding train windows; val and test use max_length"
    assert f"data.stride=32 {stride}" in text


def test_the_config_says_what_else_hydra_takes(capsys):
    assert main(["train", "data.stride=8", "--cfg", "job", "data.batch_size=4"]) in (0, None)
    printed = capsys.readouterr().out
    data = OmegaConf.create(printed).data
    assert (data.stride, data.batch_size) == (8, 4)
    assert "# Also: experiment=…, debug=…, +sweep=… with -m, and new options, +key=…" in printed


def test_bare_words_print_the_help_or_the_version(capsys):
    for words in ([], ["--help"], ["help"]):
        assert main(words) == 0
        printed = capsys.readouterr().out
        assert all(f"\n  {name} " in printed for name in COMMANDS)
    assert main(["--version"]) == main(["train", "--version"]) == 0
    assert capsys.readouterr().out == f"lit-gptdata {__version__}\n" * 2


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("lit-gptdata ", "train prepare info "),
        ("lit-gptdata tr", "train prepare info "),
        ("lit-gptdata train data=f", "data=files data=frankenstein"),
        ("lit-gptdata prepare books/ data.max_l", "data.max_length="),
        ("lit-gptdata train -m +sweep=w", "+sweep=width"),
    ],
)
def test_hydra_completes_commands_and_options(line, found, monkeypatch, capsys):
    monkeypatch.setenv("COMP_LINE", line)
    main(["-sc", "query=bash"])
    assert capsys.readouterr().out.startswith(found)


def test_the_completion_of_bash_is_hydras(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["/bin/lit-gptdata", "-sc", "install=bash"])
    main(["-sc", "install=bash"])
    assert capsys.readouterr().out.endswith("-F hydra_bash_completion lit-gptdata\n")
    assert "@hydra.main" in (CONF.parent / "train.py").read_text()  # the script looks for it
