"""train.py with models that are not GPT: what they log, take and return."""

from __future__ import annotations

import json
from pathlib import Path

import lightning as L
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lit_gptdata.report.jobs import read_job
from tests.training.run_train import STORY, run_train_here

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


class ReturnsLoss(Tiny):
    def validation_step(self, batch, batch_idx):
        return {"loss": self.loss(batch)}


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

    validation_step = ReturnsLoss.validation_step


def own_model(kind: type, *overrides: str, output_dir: str = "run") -> dict:
    """Train a model of this file; return its result.json."""
    target = f"model._target_={kind.__module__}.{kind.__qualname__}"
    run_train_here("debug=fast", "data.corpus=story.txt", "threads=1", target, *overrides,
                   f"output_dir={output_dir}")  # fmt: skip
    return json.loads(Path(output_dir, "result.json").read_text())


@pytest.mark.filterwarnings("ignore:You passed in a `val_dataloader`", "ignore:no bits per byte")
@pytest.mark.parametrize("kind", [LogsLoss, LogsSlash, LogsAtTheEnd, ReturnsLoss, Manual, PerSet, Tiny])
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
