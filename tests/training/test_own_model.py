"""train.py with models that are not GPT: what they log, take and return."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import lightning as L
import pytest
import torch
from hydra.core.hydra_config import HydraConfig
from torch import nn
from torch.nn import functional as F

from lit_gptdata import GPT
from lit_gptdata.cli import train
from lit_gptdata.configs import find_loss
from lit_gptdata.report.jobs import read_job
from tests.training.run_train import STORY, compose_config, read_metrics, run_train, run_train_here

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def _story():
    Path("story.txt").write_text(STORY)


class Tiny(L.LightningModule):
    """A bigram table over 50,257 tokens; subclasses differ in what they log."""

    def __init__(self, vocab_size: int, width: int = 2) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, width)

    def losses(self, batch):
        logits = self.embedding(batch[0]) @ self.embedding.weight.T
        return F.cross_entropy(logits.transpose(1, 2), batch[1], reduction="none")

    def loss(self, batch):
        return self.losses(batch).sum() / (batch[1] >= 0).sum()

    def training_step(self, batch, batch_idx):
        return self.loss(batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class LogsLoss(Tiny):
    def training_step(self, batch, batch_idx):
        self.log("loss", loss := self.loss(batch))
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("loss", self.loss(batch))


class LogsSlash(Tiny):
    def training_step(self, batch, batch_idx):
        self.log("train/loss", loss := self.loss(batch), on_step=True, on_epoch=True)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", self.loss(batch), on_step=True, on_epoch=True)


class LogsAtTheEnd(Tiny):
    def validation_step(self, batch, batch_idx):
        self.last = self.loss(batch)

    def on_validation_epoch_end(self):
        self.log("valid_loss", self.last)


class LogsTwo(Tiny):
    def validation_step(self, batch, batch_idx):
        self.log_dict({"val_loss": self.loss(batch), "val/nats": 2.0})


class PerSet(Tiny):
    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        self.log("validation/loss", self.loss(batch), batch_size=int((batch[1] >= 0).sum()))


class Manual(Tiny):
    def __init__(self, **options) -> None:
        super().__init__(**options)
        self.automatic_optimization = False

    def configure_optimizers(self):
        return [torch.optim.SGD(self.parameters(), lr=0.1), torch.optim.SGD(self.parameters(), lr=0.1)]

    def training_step(self, batch, batch_idx):
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(loss := self.loss(batch))
            optimizer.step()
        self.log("loss", loss)

    validation_step = LogsLoss.validation_step


SLOW = [pytest.param(kind, marks=pytest.mark.heavy) for kind in (LogsAtTheEnd, PerSet)]


def own_model(kind: type, *overrides: str, output_dir: str = "run") -> dict:
    """Train a model of this file; return its result.json."""
    target = f"model._target_={kind.__module__}.{kind.__qualname__}"
    run_train_here("debug=fast", "data.corpus=story.txt", "threads=1", target, *overrides,
                   f"output_dir={output_dir}")  # fmt: skip
    return json.loads(Path(output_dir, "result.json").read_text())


@pytest.mark.filterwarnings("ignore:You passed in a `val_dataloader`", "ignore:no bits per byte")
@pytest.mark.parametrize("kind", [LogsLoss, LogsSlash, *SLOW, Manual, Tiny])
def test_a_model_is_scored_by_what_it_logs_or_returns(kind, capsys):
    result = own_model(kind, "trainer.limit_val_batches=1.0")
    has_val = kind is not Tiny
    names = ["val_loss", "train_loss"] if has_val else ["train_loss"]
    assert result["status"] == "completed"
    assert result["tokens"] == 128
    assert "loss" not in result["metrics"]
    job = read_job(Path("run"), "0")
    for name in names:
        assert 10 < result["metrics"][name] < 13
        assert job.curves[name][-1] == (128, pytest.approx(result["metrics"][name], rel=0.03))
    assert [tokens for tokens, _ in job.curves["train_loss"]] == [32, 64, 96, 128]
    assert [tokens for tokens, _ in job.curves["val_loss"]] == ([0, 64, 128] if has_val else [])
    assert bool([*Path("run/checkpoints").glob("best*")]) == has_val
    assert ("val loss" if has_val else "train loss") in Path("run/summary.txt").read_text()


def test_a_loss_has_many_names():
    for name in (
        "val_loss",
        "val/loss",
        "valid_loss",
        "validation_loss",
        "Val Loss",
        "loss/val",
        "eval_loss",
    ):
        assert find_loss(["epoch", "train_loss", "loss", "val_loss/web", name], "val") == name
        assert find_loss(["val_acc", f"{name}_step", f"{name}_epoch"], "val") == f"{name}_epoch"
    assert find_loss(["train/loss_epoch", "train/loss_step"], "train") == "train/loss_step"
    assert find_loss(["val_loss", "val_loss/web"], "val", "val_loss/web") == "val_loss/web"
    assert find_loss(["val_loss", "test_loss"], "val", "val/nats") is None


def test_the_name_of_the_val_loss_is_an_option_that_is_checked_before_training():
    result = own_model(LogsTwo, "monitor=val/nats")
    metrics = result["metrics"]
    assert metrics["val_loss"] == metrics["val/nats"] == 2.0
    best = torch.load(next(Path("run/checkpoints").glob("best*")), weights_only=True)
    (state,) = [each for key, each in best["callbacks"].items() if "val/nats" in key]
    assert state["best_model_score"] == 2.0
    assert {value for _, value in read_job(Path("run"), "0").curves["val_loss"]} == {2.0}
    with pytest.raises(
        ValueError, match="monitor must be a name that the model logs, got val/x: it logs"
    ):
        own_model(LogsTwo, "monitor=val/x", output_dir="other")
    assert not Path("other/checkpoints").exists()


class TakesStem(Tiny):
    """With **kwargs that it does not pass to a class which takes a stem."""

    def __init__(self, vocab_size: int, stem=None, **options) -> None:
        super().__init__(vocab_size, **options)
        self.stem = stem


class Renamed(GPT):
    def __init__(self, *args, **options) -> None:
        super().__init__(*args, **options)


class SavesStem(Tiny):
    def __init__(self, vocab_size: int, stem) -> None:
        super().__init__(vocab_size)
        self.save_hyperparameters()


class PlainStem(nn.Module):
    """A stem without positions, which takes neither `dropout` nor `freeze`."""

    def __init__(self, vocab_size: int, max_length: int, embedding_dim: int) -> None:
        super().__init__()
        self.max_length, self.embedding_dim = max_length, embedding_dim
        self.token_embedding = nn.Embedding(vocab_size, embedding_dim)

    def forward(self, ids):
        return self.token_embedding(ids)


def build(*overrides: str):
    cfg = compose_config("debug=fast", "data.corpus=story.txt", "output_dir=run", *overrides)
    return train.build(cfg)[1]


def target(kind: type, group: str = "model") -> str:
    return f"{group}._target_={kind.__module__}.{kind.__qualname__}"


def test_a_model_gets_the_stem_the_vocabulary_and_the_options_that_it_takes():
    assert build(target(Tiny)).embedding.weight.shape == (50257, 2)
    assert build(target(Tiny), "+model.vocab_size=50304").embedding.weight.shape == (50304, 2)
    assert build(target(TakesStem), "+model.width=3").stem.embedding_dim == 16
    assert build(target(TakesStem), "stem=none").stem is None
    assert build(target(Renamed)).hparams["n_heads"] == 2
    with pytest.raises(TypeError, match="unexpected keyword argument 'widht'"):
        build(target(Tiny), "+model.widht=3")


@pytest.mark.filterwarnings("ignore:Attribute 'stem' is an instance")
@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["stem=none"], "GPT needs a stem: leave stem=none out"),
        ([target(nn.Identity)], "Identity must be a lightning.LightningModule, as in examples"),
        ([target(SavesStem)], r"write self.save_hyperparameters\(ignore=\['stem'\]\) in it"),
        (["model=bigram", "model.n_layers=0", "stem.freeze=true"], "GPT has no parameters to train"),
    ],
)
def test_a_model_that_cannot_train_or_resume_is_refused_before_the_run(overrides, message):
    with pytest.raises((TypeError, ValueError), match=message):
        build(*overrides)


def test_an_own_stem_takes_the_options_that_it_has_and_can_be_frozen():
    model = build(target(PlainStem, "stem"), "stem.freeze=true")
    assert type(model.stem) is PlainStem
    assert not any(p.requires_grad for p in model.stem.parameters())
    assert all(p.requires_grad for p in model.blocks.parameters())


def test_what_the_user_types_reaches_a_model_that_does_not_take_it(monkeypatch):
    cfg = compose_config("debug=fast", target(Tiny), "model.n_heads=4", return_hydra_config=True)
    monkeypatch.setattr(HydraConfig.instance(), "cfg", cfg)
    make, takes = train.constructor(cfg, "model")
    assert [*make.keywords] == ["n_heads"]
    assert [*takes] == ["vocab_size", "width"]


EXAMPLE = Path(__file__).parents[2] / "examples" / "own_model"


def test_the_example_runs_and_is_scored_in_bits_per_byte(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLE))
    path = f"hydra.searchpath=[file://{EXAMPLE}]"
    run_train_here(path, "model=lstm", "debug=fast", "model.width=4", "data.corpus=story.txt",
                   "threads=1", "output_dir=run")  # fmt: skip
    metrics = json.loads(Path("run/result.json").read_text())["metrics"]
    assert metrics.keys() >= {"train_loss", "val_loss", "val_perplexity", "val_bits_per_byte"}
    assert [*Path("run/checkpoints").glob("best*")]


@pytest.mark.heavy
def test_two_ranks_score_what_one_process_scores(tmp_path):
    model = ["--config-dir", str(EXAMPLE), "model=lstm", "debug=fast", "threads=1", "data.batch_size=3",
             "data.corpus=story.txt", "trainer.limit_val_batches=1.0"]  # fmt: skip
    (tmp_path / "story.txt").write_text(STORY)
    run_train(*model, "output_dir=one", cwd=tmp_path)
    run_train(*model, "output_dir=two", "trainer=ddp", "trainer.accelerator=cpu", cwd=tmp_path)
    for name in ("val_loss", "val_perplexity", "val_bits_per_byte"):
        rows = (read_metrics(tmp_path / run) for run in ("one", "two"))
        one, two = (next(float(row[name]) for row in each if row[name]) for each in rows)  # untrained
        assert one == pytest.approx(two, rel=1e-9)


@pytest.mark.heavy
def test_the_example_resumes_repeats_and_is_compared_with_gpt_in_a_sweep(tmp_path):
    model = ["--config-dir", str(EXAMPLE), "debug=fast", "threads=1"]
    run_train(*model, "model=lstm", "output_dir=run", cwd=tmp_path)
    run_train(*model, "model=lstm", "output_dir=run", "ckpt_path=last", "max_tokens=256", cwd=tmp_path)
    assert json.loads((tmp_path / "run/result.json").read_text())["tokens"] == 256
    printed = run_train("-m", *model, "model=lstm,nano", "hydra.sweep.dir=sweep", cwd=tmp_path)
    assert re.search("^(Lowest|Best) by validation bits per byte: job [01], model=", printed, re.M)
    jobs = [read_job(tmp_path / "sweep" / name, name) for name in "01"]
    scores = [job.metrics["val_bits_per_byte"] for job in jobs]
    first = ("lstm", "nano")[scores.index(min(scores))]
    assert re.search(f"^[01] ★ +completed +{first} ", printed, re.M)
    command = [sys.executable, "-m", "lit_gptdata", "rerun", "sweep/0"]
    again = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert re.search("^val_loss .* bitwise equal$", again, re.M)
