"""GPTCLI as a user runs it: help, config files, fit and resume."""

from __future__ import annotations

import inspect
import re
import sys
from pathlib import Path

import pytest
import torch
import yaml

from lit_gptdata import GPT, GPTDataModule
from tests.training.run_train import ROOT, STORY

pytest.importorskip("jsonargparse")
from lit_gptdata.training.lightning_cli import GPTCLI

CONFIG = """
seed_everything: 7
data: {corpus: story.txt, max_length: 16, stride: 16, batch_size: 2}
stem: {embedding_dim: 8, dropout: 0.1}
model: {n_layers: 1, n_heads: 2}
trainer:
  accelerator: cpu
  devices: 1
  max_steps: 6
  limit_val_batches: 2
  num_sanity_val_steps: 0
  log_every_n_steps: 1
  enable_progress_bar: false
  enable_model_summary: false
  logger: {class_path: CSVLogger, init_args: {save_dir: .}}
  callbacks:
    - class_path: ModelCheckpoint
      init_args: {every_n_train_steps: 3, save_top_k: -1, filename: "{step}"}
"""

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # Lightning uses a deprecated API of jsonargparse.
    pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning"),
]


@pytest.fixture(autouse=True)
def _text_and_config(monkeypatch):
    """Write a text and a config to the working folder, which is empty at the start of each test."""
    monkeypatch.setattr(sys, "argv", ["main.py"])  # GPTCLI would warn about pytest's arguments
    Path("story.txt").write_text(STORY)
    Path("small.yaml").write_text(CONFIG)


def cli(*args: str) -> GPTCLI:
    with torch.random.fork_rng():
        return GPTCLI(args=list(args))


def printed(capsys, *args: str) -> str:
    with pytest.raises(SystemExit, match=r"^0$"):
        GPTCLI(args=list(args))
    return capsys.readouterr().out


def checkpoint(version: int, step: int) -> str:
    return f"lightning_logs/version_{version}/checkpoints/step={step}.ckpt"


@pytest.mark.filterwarnings("ignore:The dirpath has changed.*")  # a resumed run has its own folder
def test_a_fit_resumes_exactly_and_its_config_and_checkpoint_load():
    run = cli("fit", "--config=small.yaml")
    token_table = run.model.stem.token_embedding.weight
    assert run.trainer.global_step == 6
    assert run.model.stem.vocab_size == run.datamodule.vocab_size == 50257
    assert run.model.stem.max_length == 16
    resumed = cli("fit", "--config=small.yaml", "--ckpt_path", checkpoint(0, 3), "--weights_only=true")
    assert resumed.trainer.global_step == 6
    for weight, other in zip(run.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(weight, other)

    path = checkpoint(1, 6)
    torch.load(path, weights_only=True)
    model = GPT.load_from_checkpoint(path, weights_only=True)
    assert torch.equal(model.stem.token_embedding.weight, token_table)
    data = GPTDataModule.load_from_checkpoint(path, weights_only=True)
    assert dict(data.hparams).items() >= yaml.safe_load(CONFIG)["data"].items()

    # the config that a run saves repeats the run
    repeated = cli("fit", "--config=lightning_logs/version_0/config.yaml")
    assert torch.equal(repeated.model.stem.token_embedding.weight, token_table)
    first, third = (Path(f"lightning_logs/version_{n}/config.yaml").read_text() for n in (0, 2))
    assert yaml.safe_load(first) == yaml.safe_load(third)


def test_print_config_contains_all_options_and_can_be_loaded(capsys):
    args = ("fit", "--config=small.yaml", "--data.stride=8", "--data.corpus=[story.txt,story.txt]")
    text = printed(capsys, *args, "--print_config")
    config = yaml.safe_load(text)
    assert set(config["data"]) == set(inspect.signature(GPTDataModule).parameters)
    assert config["data"]["stride"] == 8
    assert config["data"]["corpus"] == ["story.txt", "story.txt"]
    stem = {"embedding_dim": 8, "position": "learned", "dropout": 0.1, "freeze": False}
    assert config["stem"] == stem
    assert set(config["model"]) == set(inspect.signature(GPT).parameters) - {"stem", "eot"}
    Path("printed.yaml").write_text(text)
    assert yaml.safe_load(printed(capsys, "fit", "--config=printed.yaml", "--print_config")) == config


@pytest.fixture
def mixture() -> dict:
    """Write a config of a mixture, which small.yaml completes, and return its sources."""
    sources = {"web": {"path": "story.txt", "weight": 0.6}, "code": {"path": ["b.txt"], "weight": 0.4}}
    data = {"corpus": sources, "val_corpus": {"wiki": "wiki.txt"}}
    Path("mixture.yaml").write_text(yaml.safe_dump({"data": data}))
    for name in ("b", "wiki"):
        Path(f"{name}.txt").write_text(f"{name} says: {STORY}")
    return sources


MIXTURE = ("--config=small.yaml", "--config=mixture.yaml")


def test_an_option_changes_one_weight_of_a_mixture_and_checkpoints_hold_plain_dicts(mixture):
    run = cli("fit", *MIXTURE, "--data.corpus.web.weight=0.5")
    mixture["web"]["weight"] = 0.5
    (scores, *_) = run.trainer.validate(run.model, run.datamodule, verbose=False)
    assert scores.keys() >= {"val_loss/web", "val_loss/code", "val_loss/wiki"}
    saved = torch.load(checkpoint(0, 6), weights_only=True)["datamodule_hyper_parameters"]
    assert saved["corpus"] == run.datamodule.hparams["corpus"] == mixture
    assert saved["val_corpus"] == {"wiki": {"path": "wiki.txt"}}
    data = GPTDataModule.load_from_checkpoint(checkpoint(0, 6), weights_only=True)
    assert dict(data.hparams) == dict(run.datamodule.hparams)
    repeated = cli("fit", "--config=lightning_logs/version_0/config.yaml")
    assert dict(repeated.datamodule.hparams) == dict(run.datamodule.hparams)


def test_print_config_of_a_mixture_can_be_loaded(mixture, capsys):
    text = printed(capsys, "fit", *MIXTURE, "--data.val_corpus.more=b.txt", "--print_config")
    data = yaml.safe_load(text)["data"]
    assert data["val_corpus"] == {"wiki": "wiki.txt", "more": "b.txt"}
    for name, source in mixture.items():
        given = {key: value for key, value in data["corpus"][name].items() if value is not None}
        assert given == source
    Path("printed.yaml").write_text(text)
    assert printed(capsys, "fit", "--config=printed.yaml", "--print_config") == text


@pytest.mark.parametrize(
    "args",
    [
        ["--config=mixture.yaml", "--data.corpus.web.wight=0.5"],
        ["--config=mixture.yaml", "--config=misspelled.yaml"],
        ["--data.corpus={web: {path: story.txt, wight: 0.5}}"],
        ["--data.corpus={'web': {'path': 'story.txt', 'wight': 0.5}, 'code': 'b.txt'}"],
        ["--data.val_corpus={wiki: {path: story.txt, wight: 0.5}}"],
    ],
)
def test_an_unknown_option_of_a_source_is_refused_and_never_read_as_a_path(mixture, args, capsys):
    mixture["web"]["wight"] = 0.5
    Path("misspelled.yaml").write_text(yaml.safe_dump({"data": {"corpus": mixture}}))
    with pytest.raises((SystemExit, ValueError)) as error:
        GPTCLI(args=["--config=small.yaml", *args], run=False)
    assert "wight" in f"{error.value} {capsys.readouterr().err}"


def test_help_explains_every_option(capsys):
    text = " ".join(printed(capsys, "fit", "--help").split())
    our_options = text.split(" Linked arguments")[0]
    pattern = r" --((?:data|model|stem)\.\w+) (?!\[)\S+ (?:--\S+ \S+ )?(.{30})"
    options = dict(re.findall(pattern, our_options))
    assert options.keys() > {"data.max_length", "data.corpus", "model.learning_rate", "stem.position"}
    for name, help_text in options.items():
        assert not help_text.startswith(("(type", "(required")), f"{name} has no help text"
    assert "tokens in a window's inputs (type: int, default: 256)" in text
    assert "--stem.vocab_size" not in text
    assert "--stem.max_length" not in text


def test_it_accepts_a_subclass_of_the_data_module():
    my_data = type("MyData", (GPTDataModule,), {})
    my_cli = GPTCLI(GPT, my_data, args=["--config=small.yaml"], run=False)
    assert type(my_cli.datamodule) is my_data


def test_the_model_gets_the_separator_of_the_data():
    my_data = type("MyData", (GPTDataModule,), {"eot": 7})
    args = ["--config=small.yaml", "--model.document_mask=true"]
    assert GPTCLI(GPT, my_data, args=args, run=False).model.eot == 7
    assert not GPTCLI(args=args[:1], run=False).model.document_mask


def test_errors_name_a_missing_or_wrong_option(capsys):
    for args, message in (
        (["fit"], "stem.embedding_dim"),
        (["fit", "--config=small.yaml", "--data.max_length=x"], "data.max_length"),
        (["fit", "--config=small.yaml", "--stem.vocab_size=3"], "stem.vocab_size"),
    ):
        with pytest.raises(SystemExit, match=r"^2$"):
            GPTCLI(args=args)
        assert message in capsys.readouterr().err


def test_the_docs_show_the_current_source_of_the_class():
    page = (ROOT / "docs" / "integrations.md").read_text(encoding="utf-8")
    assert f"```python\n{inspect.getsource(GPTCLI)}```" in page
