"""A run with a token budget: its number of steps, and the tokens it really trains on."""

from __future__ import annotations

import lightning as L
import pytest
import torch

from lit_gptdata import GPTDataModule
from lit_gptdata.training.budget import TokenBudget
from lit_gptdata.training.checkpoints import LastCheckpoint
from lit_gptdata.training.throughput import Throughput
from tests.runs import EPOCH_BATCHES, LENGTH, Watch, make_data, make_model, make_trainer, opened

pytestmark = pytest.mark.usefixtures("one_thread")


class CountTokens(L.Callback):
    tokens = 0

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        self.tokens += batch[0].numel()


@pytest.mark.parametrize("drop_last", [True, False])
@pytest.mark.parametrize(("batch_size", "accumulate"), [(4, 1), (8, 1), (2, 3), (16, 2)])
def test_every_batch_size_trains_on_the_same_tokens(tmp_path, batch_size, accumulate, drop_last):
    max_tokens = 450 * LENGTH  # more than four epochs
    data = make_data(tmp_path, batch_size=batch_size, drop_last=drop_last)
    budget, counter = TokenBudget(max_tokens), CountTokens()
    callbacks: list[L.Callback] = [budget, counter]
    trainer = make_trainer(max_epochs=-1, callbacks=callbacks, accumulate_grad_batches=accumulate)
    trainer.fit(make_model(), datamodule=data)
    assert counter.tokens == budget.tokens
    assert 0 <= max_tokens - budget.tokens < batch_size * accumulate * LENGTH
    last_scheduled = trainer.lr_scheduler_configs[0].scheduler.last_epoch
    assert trainer.global_step == trainer.max_steps == last_scheduled


def test_it_validates_by_tokens_and_logs_them(tmp_path):
    data = make_data(tmp_path)
    watch = Watch(data)
    budget = TokenBudget(80 * 4 * LENGTH, val_every_tokens=20 * 4 * LENGTH)
    options = {"max_epochs": -1, "val_check_interval": 7, "log_every_n_steps": 1}
    trainer = make_trainer(callbacks=[watch, budget], **options)
    trainer.fit(make_model(), datamodule=data)
    assert watch.validated_at == [20, 40, 60, 80]  # across epochs of 25 batches
    assert trainer.callback_metrics["tokens"] == 80 * 4 * LENGTH == budget.tokens


class SaveAtStep10(L.Callback):
    def __init__(self, path) -> None:
        self.path = path

    def on_train_batch_end(self, trainer, *_) -> None:
        if trainer.global_step == 10:
            trainer.save_checkpoint(self.path)


@pytest.mark.parametrize(("batch_size", "steps"), [(4, 60), (8, 10 + 25), (2, 10 + 100)])
def test_a_resumed_run_ends_with_the_same_budget(tmp_path, batch_size, steps):
    max_tokens = 60 * 4 * LENGTH
    path = tmp_path / "10.ckpt"
    first = make_trainer(max_epochs=-1, callbacks=[TokenBudget(max_tokens), SaveAtStep10(path)])
    first.fit(make_model(), datamodule=make_data(tmp_path))
    assert first.global_step == 60
    budget, counter = TokenBudget(max_tokens), CountTokens()
    second = make_trainer(max_epochs=-1, callbacks=[budget, counter])
    data = make_data(tmp_path, batch_size=batch_size)
    second.fit(make_model(), datamodule=data, ckpt_path=path, weights_only=True)
    assert second.global_step == steps
    assert counter.tokens == 50 * 4 * LENGTH
    assert budget.tokens == max_tokens


def test_the_checkpoint_state_does_not_change():
    budget = TokenBudget()
    budget.load_state_dict({"tokens": 96, "per_step": 32})  # as in checkpoints of earlier versions
    assert budget.state_dict() == {"tokens": 96}
    assert budget.state_key == "TokenBudget"


def test_max_steps_of_the_trainer_overrides_the_budget(tmp_path):
    trainer = make_trainer(max_steps=3, callbacks=TokenBudget(1280 * LENGTH))
    trainer.fit(make_model(), datamodule=make_data(tmp_path))
    assert trainer.global_step == 3


def test_without_limits_it_only_counts_tokens(tmp_path):
    budget = TokenBudget()
    trainer = make_trainer(max_steps=7, callbacks=budget)
    trainer.fit(make_model(), datamodule=make_data(tmp_path))
    assert (trainer.global_step, budget.tokens) == (7, 7 * 4 * LENGTH)
    trainer = make_trainer(max_epochs=1, callbacks=TokenBudget())
    loader = opened(make_data(tmp_path)).train_dataloader()
    trainer.fit(make_model(), loader, loader)
    assert trainer.global_step == EPOCH_BATCHES


def test_budgets_that_cannot_work_are_rejected(tmp_path):
    with pytest.raises(ValueError, match=r"max_tokens.* a number of tokens"):
        TokenBudget(0)
    with pytest.raises(TypeError, match=r"val_every_tokens.* a number of tokens"):
        TokenBudget(val_every_tokens=1.5)
    trainer = make_trainer(max_epochs=-1, callbacks=TokenBudget(4 * LENGTH - 1))
    with pytest.raises(ValueError, match=r"at least one optimizer step of 32 tokens .* got 31: raise"):
        trainer.fit(make_model(), datamodule=make_data(tmp_path))
    loader = opened(make_data(tmp_path)).train_dataloader()
    trainer = make_trainer(max_epochs=-1, callbacks=TokenBudget(1000))
    with pytest.raises(TypeError, match=r"the Trainer has None: fit with datamodule=GPTDataModule"):
        trainer.fit(make_model(), loader, loader)


class TwoOptimizers(L.LightningModule):
    """Takes several optimizer steps in each batch."""

    def __init__(self, raw: bool = False) -> None:
        super().__init__()
        self.automatic_optimization, self.raw = False, raw
        self.parts = torch.nn.ModuleList(torch.nn.Linear(1, 1) for _ in range(2))

    def training_step(self, batch, batch_idx):
        self.manual_backward(sum(part(torch.ones(1)).sum() for part in self.parts))
        for optimizer in self.optimizers(use_pl_optimizer=not self.raw):
            optimizer.step()

    def configure_optimizers(self):
        return [torch.optim.SGD(part.parameters(), 0.1) for part in self.parts]


@pytest.mark.filterwarnings("ignore:.*have no `validation_step`", "ignore:.*is not empty")
@pytest.mark.parametrize("raw", [False, True])
@pytest.mark.parametrize("drop_last", [False, True])
def test_manual_optimization_ends_at_the_same_tokens(tmp_path, raw, drop_last):
    budget, counter = TokenBudget(40 * 4 * LENGTH), CountTokens()
    options = {"limit_val_batches": 0, "max_epochs": -1, "enable_checkpointing": True}
    last = LastCheckpoint(str(tmp_path))
    data = make_data(tmp_path, drop_last=drop_last)
    make_trainer(callbacks=[budget, counter, last], **options).fit(TwoOptimizers(raw), datamodule=data)
    assert 40 * 4 * LENGTH - 4 * LENGTH < budget.tokens == counter.tokens <= 40 * 4 * LENGTH

    done = budget.tokens
    # the first and the third have nothing to do
    for batch_size, total in ((4, 40), (8, 60), (8, 60), (10, 90), (3, 140), (4, 210)):
        budget, counter = TokenBudget(total * 4 * LENGTH), CountTokens()
        data = make_data(tmp_path, drop_last=drop_last, batch_size=batch_size)
        trainer = make_trainer(callbacks=[budget, counter, LastCheckpoint(str(tmp_path))], **options)
        trainer.fit(
            TwoOptimizers(raw), datamodule=data, ckpt_path=tmp_path / "last.ckpt", weights_only=True
        )
        assert counter.tokens == budget.tokens - done
        assert total * 4 * LENGTH - batch_size * LENGTH < (done := budget.tokens) <= total * 4 * LENGTH


@pytest.mark.filterwarnings("ignore:.*have no `validation_step`")
def test_batches_in_other_formats_are_counted(tmp_path):
    class Dicts(GPTDataModule):
        def on_after_batch_transfer(self, batch, dataloader_idx):
            return {"x": batch[0], "y": torch.tensor(0)}

    class Model(TwoOptimizers):
        def training_step(self, batch, batch_idx):
            super().training_step((batch["x"],), batch_idx)

    data, budget = make_data(tmp_path), TokenBudget(10 * 4 * LENGTH)
    data.__class__ = Dicts
    callbacks: list[L.Callback] = [budget, Throughput()]
    trainer = make_trainer(max_epochs=-1, limit_val_batches=0, log_every_n_steps=1, callbacks=callbacks)
    trainer.fit(Model(), datamodule=data)
    assert budget.tokens == 10 * 4 * LENGTH
    assert trainer.callback_metrics["tokens_per_second"] > 0


def test_tokens_between_validations_replace_a_duration(tmp_path):
    data = make_data(tmp_path)
    watch, budget = Watch(data), TokenBudget(40 * 4 * LENGTH, val_every_tokens=20 * 4 * LENGTH)
    trainer = make_trainer(callbacks=[watch, budget], max_epochs=-1, val_check_interval="00:01:00:00")
    trainer.fit(make_model(), datamodule=data)
    assert watch.validated_at == [20, 40]


def test_the_error_is_about_the_batch_size_and_not_about_the_schedule(tmp_path):
    trainer = make_trainer(max_epochs=-1, callbacks=TokenBudget(10_000))
    with pytest.raises(ValueError, match=r"batch_size=1000 .*leaves no batch: there are 103 windows"):
        trainer.fit(make_model(), datamodule=make_data(tmp_path, batch_size=1000))
