"""GPTCLI as users of LightningCLI use it: help, configurations written and read back, fit, resume."""

from __future__ import annotations

import inspect
import re
import sys
from pathlib import Path

import pytest
import torch
import yaml

from lit_gptdata import GPT, GPTDataModule

pytest.importorskip("jsonargparse")
from lit_gptdata.training.lightning_cli import GPTCLI

ROOT = Path(__file__).parents[2]
TEXT = "It was on a dreary night of November. " * 300
SMALL = {
    "seed_everything": 7,
    "data": {"corpus": "story.txt", "max_length": 16, "stride": 16, "batch_size": 2},
    "stem": {"embedding_dim": 8, "dropout": 0.1},
    "model": {"n_layers": 1, "n_heads": 2},
    "trainer": {
        "accelerator": "cpu",
        "devices": 1,
        "max_steps": 6,
        "limit_val_batches": 2,
        "num_sanity_val_steps": 0,
        "log_every_n_steps": 1,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "logger": {"class_path": "CSVLogger", "init_args": {"save_dir": "."}},
        "callbacks": [
            {
                "class_path": "ModelCheckpoint",
                "init_args": {"every_n_train_steps": 3, "save_top_k": -1, "filename": "{step}"},
            }
        ],
    },
}

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # Lightning's own use of jsonargparse, which no user sees.
    pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning"),
]


@pytest.fixture(autouse=True)
def _story(monkeypatch):
    """The working folder, empty for each test, has a text and a configuration."""
    monkeypatch.setattr(sys, "argv", ["main.py"])  # pytest's own would be warned of
    Path("story.txt").write_text(TEXT)
    Path("small.yaml").write_text(yaml.safe_dump(SMALL))


def cli(*args: str) -> GPTCLI:
    with torch.random.fork_rng():
        return GPTCLI(args=list(args))


def printed(capsys, *args: str) -> str:
    with pytest.raises(SystemExit) as end:
        GPTCLI(args=list(args))
    assert end.value.code == 0
    return capsys.readouterr().out


def checkpoint(version: int, step: int) -> str:
    return f"lightning_logs/version_{version}/checkpoints/step={step}.ckpt"


@pytest.mark.filterwarnings("ignore:The dirpath has changed.*")  # a resumed run has its own folder
def test_it_fits_and_goes_on_as_if_it_had_not_stopped():
    whole = cli("fit", "--config=small.yaml")
    assert whole.trainer.global_step == 6
    assert whole.model.stem.vocab_size == whole.datamodule.vocab_size == 50257
    assert whole.model.stem.max_length == 16
    on = ("--ckpt_path", checkpoint(0, 3), "--weights_only=true")
    resumed = cli("fit", "--config=small.yaml", *on)
    assert resumed.trainer.global_step == 6
    for weight, other in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(weight, other)

    path = checkpoint(1, 6)
    torch.load(path, weights_only=True)
    model = GPT.load_from_checkpoint(path, weights_only=True)
    assert torch.equal(model.stem.token_embedding.weight, whole.model.stem.token_embedding.weight)
    data = GPTDataModule.load_from_checkpoint(path, weights_only=True)
    assert dict(data.hparams).items() >= SMALL["data"].items()

    # the configuration of the run is taken back, and gives the run
    again = cli("fit", "--config=lightning_logs/version_0/config.yaml")
    assert torch.equal(again.model.stem.token_embedding.weight, whole.model.stem.token_embedding.weight)
    first, third = (
        yaml.safe_load(Path(f"lightning_logs/version_{n}/config.yaml").read_text()) for n in (0, 2)
    )
    assert first == third


def test_print_config_says_everything_and_is_read_back(capsys):
    args = ("fit", "--config=small.yaml", "--data.stride=8", "--data.corpus=[story.txt,story.txt]")
    text = printed(capsys, *args, "--print_config")
    config = yaml.safe_load(text)
    assert set(config["data"]) == set(inspect.signature(GPTDataModule).parameters)
    assert config["data"]["stride"] == 8
    assert config["data"]["corpus"] == ["story.txt", "story.txt"]
    assert config["stem"] == {"embedding_dim": 8, "position": "learned", "dropout": 0.1}
    assert set(config["model"]) == set(inspect.signature(GPT).parameters) - {"stem"}
    Path("printed.yaml").write_text(text)
    assert yaml.safe_load(printed(capsys, "fit", "--config=printed.yaml", "--print_config")) == config


def test_help_has_a_text_for_every_option(capsys):
    text = " ".join(printed(capsys, "fit", "--help").split())
    ours = text.split(" Linked arguments")[0]
    options = re.findall(r" --((?:data|model|stem)\.\w+) (?!\[)\S+ (?:--\S+ \S+ )?(.{30})", ours)
    for name in ("data.max_length", "data.corpus", "model.learning_rate", "stem.position"):
        assert name in dict(options)
    for name, words in options:
        assert not words.startswith(("(type", "(required")), f"{name} has no help text"
    assert "tokens in a window's inputs (type: int, default: 256)" in text
    assert "--stem.vocab_size" not in text
    assert "--stem.max_length" not in text


def test_a_subclass_may_bring_its_own_classes():
    class Wide(GPTDataModule):
        pass

    made = GPTCLI(GPT, Wide, args=["--config=small.yaml"], run=False)
    assert type(made.datamodule) is Wide


def test_what_is_missing_or_wrong_is_said(capsys):
    for args, message in (
        (["fit"], "stem.embedding_dim"),
        (["fit", "--config=small.yaml", "--data.max_length=x"], "data.max_length"),
        (["fit", "--config=small.yaml", "--stem.vocab_size=3"], "stem.vocab_size"),
    ):
        with pytest.raises(SystemExit) as end:
            GPTCLI(args=args)
        assert end.value.code == 2
        assert message in capsys.readouterr().err


def test_the_page_shows_the_class_as_it_is():
    page = (ROOT / "docs" / "lightning_cli.md").read_text(encoding="utf-8")
    assert f"```python\n{inspect.getsource(GPTCLI)}```" in page
