"""The callback Scores gives other models the numbers that GPT logs."""

from __future__ import annotations

import pytest
import torch

from lit_gptdata import GPT, Scores
from tests.model.small_gpt import SmallData, make_gpt
from tests.model.test_val_sets import as_model, mixture, scores
from tests.runs import StoppableGPT, make_data, make_trainer

pytestmark = pytest.mark.usefixtures("one_thread")


class Returns(StoppableGPT):
    """Scores nothing itself, and returns its losses."""

    on_validation_epoch_start = on_validation_epoch_end = lambda self: None
    on_test_epoch_start = on_test_epoch_end = lambda self: None

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        self.log("val_loss", self.losses(batch).mean())  # which counts padding
        return {"losses": self.losses(batch)}

    def test_step(self, batch, batch_idx, dataloader_idx=0):
        return self.losses(batch)


class ReturnsLogits(Returns):
    def validation_step(self, batch, batch_idx):
        return {"loss": torch.tensor(9.0), "logits": self(batch[0])}


class ReturnsMean(Returns):
    def validation_step(self, batch, batch_idx):
        return GPT.losses(self, batch).mean()


def own(metrics: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if "dataloader_idx" not in name}


@pytest.mark.parametrize("split", ["val", "test"])
def test_losses_of_several_sets_are_scored_exactly_as_gpt_does(tmp_path, split):
    data = mixture(tmp_path, "a", "b", val_corpus=["c"], test_fraction=0.2, batch_size=3)
    expected = scores(data, split=split)
    assert len(expected) > 6
    found = scores(data, as_model(Returns), split, callbacks=[Scores()])
    assert own(found) == expected


def test_special_tokens_in_a_text_have_the_bytes_that_gpt_counts(tmp_path):
    (tmp_path / "a.txt").write_text("one<|endoftext|>two three " * 99)
    data = make_data(tmp_path, corpus=str(tmp_path / "a.txt"), val_fraction=0.5)
    assert scores(data, as_model(Returns), callbacks=[Scores()]) == scores(data)


def test_logits_are_scored_as_gpt_does():
    expected = scores(SmallData(), make_gpt())
    model = make_gpt()
    model.__class__ = ReturnsLogits
    model.losses = lambda batch: torch.zeros(())
    assert scores(SmallData(), model, callbacks=[Scores()]) == expected


def test_in_a_fit_each_validation_is_scored_by_itself():
    model = make_gpt()
    model.__class__ = ReturnsLogits
    model.losses = lambda batch: GPT.losses(model, batch)
    trainer = make_trainer(max_steps=4, val_check_interval=2, callbacks=[Scores()])
    trainer.fit(model, SmallData())
    last = trainer.callback_metrics["val_loss"].item()
    assert scores(SmallData(), model, callbacks=[Scores()])["val_loss"] == last


def test_a_step_that_returns_no_losses_is_named():
    model = make_gpt()
    model.__class__ = ReturnsMean
    with pytest.warns(UserWarning, match=r"validation_step that returns losses \(B, T\) or logits"):
        assert scores(SmallData(), model, callbacks=[Scores()]) == {}
