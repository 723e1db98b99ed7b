"""Commands as a new user might type them: each wrong one prints one line that says what to type."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import pytest
import torch

from lit_gptdata.cli.main import main
from tests.training.run_train import STORY

WRONG = {
    # commands
    "lit-gptdata tokenise books/": "did you mean train-tokenizer or prepare?",
    "lit-gptdata tain": "did you mean train?",
    "lit-gptdata books/ data.stride=8": "such as lit-gptdata train books/ data.stride=8",
    "lit-gptdata nope": "choose one of train, prepare, ",
    "lit-gptdata show --step 3": "options have the form key=value",
    "lit-gptdata info --plots a.png": "did you mean --plot?",
    "lit-gptdata info --plot": "argument --plot: expected one argument (lit-gptdata info --help)",
    "lit-gptdata export": "required: FORMAT, OUT (lit-gptdata export --help)",
    "lit-gptdata publish books/": "other files: lit-gptdata publish s3://bucket/tokens books/",
    "lit-gptdata publish books/a.txt": "is a file: lit-gptdata publish s3://bucket/tokens books/a.txt",
    # flags, keys and values
    "lit-gptdata train --batch-size 8": "did you mean data.batch_size=…?",
    "lit-gptdata train --lr=1e-3": "did you mean model.learning_rate=…?",
    "lit-gptdata train --epochs 3": "did you mean trainer.max_epochs=…?",
    "python train.py --resume": "did you mean ckpt_path=…",
    "python train.py --frobnicate": "options have the form key=value (--help describes all options)",
    "python train.py --cfg jobs": "choose from 'job', 'hydra', 'all'",
    "python train.py data.max_lenght=64": "did you mean data.max_length?",
    "python train.py lr=3": "did you mean model.learning_rate?",
    "python train.py data.max_length": "did you mean data.max_length=…?",
    "python train.py max_tokens 500": "did you mean max_tokens=…?",
    "python train.py help": "options have the form key=value (--help)",
    "python train.py data.max_length=": "max_length must be an integer ≥ 1, got ''",
    "python train.py max_tokens=10k": "got '10k': it is a number of tokens. Write it as 10_000",
    "python train.py model.learning_rate=0,001": "has a comma",
    "python train.py seed=1,2": "a sweep needs -m",
    "python train.py data.corpus=it's.txt": "python train.py 'data.corpus=\"it'\"'\"'s.txt\"'",
    "python train.py trainer=gpu": "train on its CPU with trainer=cpu",
    # texts, groups and sweeps
    "python train.py data.corpus=missing.txt": "no such file or folder: 'missing.txt'",
    "python train.py empty": "holds no text",
    "python train.py data=files": "data.corpus has no value: give data.corpus=…",
    "python train.py data=books/": "for your own text, data=files data.corpus=PATH",
    "python train.py model=large": "model=large does not exist: choose one of bigram, gpt2, micro, nano",
    "lit-gptdata prepare missing.txt": "no file or folder has this name",
    "lit-gptdata prepare missing/": "no such file or folder: 'missing/'",
    "lit-gptdata prepare books/ data=mixture": "books/ and data=mixture both name a text",
    "python train.py data=mixture data.corpus={web:{path:a}}": "++data.corpus=… adds them; for your own"
    " mixture: data=sources 'data.corpus={…}'",
    "python train.py sweep=context": "sweep=… needs a plus sign: +sweep=…",
    "python train.py +sweep=context threads=1": "python train.py -m +sweep=context threads=1",
    "lit-gptdata train +sweep=width": "lit-gptdata train -m +sweep=width",
    "python train.py -m +sweep=contxt": "choose one of batch, context, ",
    # folders and files
    "python train.py output_dir=/proc/x": "/proc/x: No such file or directory",
    "python train.py ckpt_path=nope.ckpt": "set ckpt_path to the last.ckpt of a run",
    "python train.py --config-path=bad --config-name=config": "config.yaml, line 2, is not YAML: ",
    "python train.py --config-name=nope": "Cannot find primary config 'nope'",
    "python train.py --experimental-rerun a.pickle": "use lit-gptdata rerun DIR",
    "lit-gptdata seen nope.ckpt": "nope.ckpt: No such file or directory",
    "lit-gptdata generate nope.ckpt": "nope.ckpt: No such file or directory",
    "lit-gptdata generate books": "books has no .ckpt file: give the folder of a run",
    "lit-gptdata seen text.ckpt": "text.ckpt is not a Lightning checkpoint (ValueError: torch.save did",
    "lit-gptdata seen own.ckpt": "own.ckpt is not a Lightning checkpoint (KeyError: without datamodul",
    "lit-gptdata seen step=1 step=2": "give only one step=N",
    "lit-gptdata generate books/a.txt": "a.txt is not a Lightning checkpoint (ValueError: torch.sav",
    "lit-gptdata generate books It was": "got 2 prompts, ['It', 'was']: put the prompt in quotes",
    "lit-gptdata generate books temprature=0": "did you mean temperature=…?",
    "lit-gptdata export hf out": "give a checkpoint, ckpt=PATH, and nothing else, got ''",
    "lit-gptdata export hf books ckpt=a.ckpt": "books exists and is not empty: give a new folder",
    "lit-gptdata report books": "books is not the folder of a sweep",
    "lit-gptdata rerun nope": "nope has no config.yaml: give the folder of a run, such as",
    "lit-gptdata rerun books": "books has no config.yaml",
    "lit-gptdata rerun books --unfinished": "books is not the folder of a sweep",
    "lit-gptdata rerun sweep": "sweep is a sweep: give the folder of one of its jobs, or --unfinished",
    "lit-gptdata rerun sweep/0": "its status is failed: in a sweep, give its folder, and --unfinished",
    "lit-gptdata rerun sweep/1": "is of an old version, and would be overwritten",
    "lit-gptdata rerun sweep/2": "ran on 2 machines: on each of them run lit-gptdata train ",
}


@pytest.fixture(autouse=True)
def _files():
    """Make books, and a sweep whose jobs cannot be repeated."""
    for name in ("books", "empty", "bad", "sweep/0", "sweep/1", "sweep/2"):
        Path(name).mkdir(parents=True)
    Path("books/a.txt").write_text(STORY)
    Path("text.ckpt").write_text(STORY)
    torch.save({"state_dict": {}}, "own.ckpt")
    Path("bad/config.yaml").write_text("a: [1\nb: {")
    jobs = [("failed", ""), ("completed", "output_dir: /a"), ("completed", "trainer: {num_nodes: 2}")]
    for number, (status, config) in enumerate(jobs):
        result = f'{{"status": "{status}", "overrides": ["seed=3"], "metrics": {{}}}}'
        Path(f"sweep/{number}/result.json").write_text(result)
        Path(f"sweep/{number}/config.yaml").write_text(config)


@pytest.mark.parametrize("command", WRONG)
def test_a_wrong_command_prints_one_line_that_helps(command, monkeypatch, capsys):
    program, *words = shlex.split(command.replace("it's", r"it\'s"))
    monkeypatch.setattr(sys, "argv", words if program == "python" else [program, *words])
    try:
        status = main(["train", *words[1:]] if program == "python" else words)
    except SystemExit as end:
        status = end.code
    printed = capsys.readouterr()
    line = status if isinstance(status, str) else printed.err.removesuffix("\n")  # as Python prints it
    assert WRONG[command] in line
    assert status not in (0, None)
    assert "\n" not in line
    assert "Traceback" not in line
    assert printed.out == ""
