"""A run bounded in tokens: the number of steps, and what was really trained on."""

from __future__ import annotations

import lightning as L
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lit_gptdata.training.budget import TokenBudget, steps_for
from lit_gptdata.windows.steps import Steps
from tests.runs import EPOCH_BATCHES, LENGTH, Watch, make_data, make_model, make_trainer

pytestmark = pytest.mark.usefixtures("one_thread")


def counted_steps(windows: int, steps: Steps, limit: int, accumulate: int) -> int:
    """Step by step, as Lightning takes them: the last of an epoch with what batches are left."""
    seen = done = 0
    while True:
        begins = range(0, limit * steps.width, steps.width)
        sizes = [
            sum(e - b for b, e in (steps.share(begin, rank) for rank in range(steps.world_size)))
            for begin in begins
        ]
        for at in range(0, limit, accumulate):
            seen += sum(sizes[at : at + accumulate])
            if seen > windows:
                return done
            done += 1


@given(
    windows=st.integers(0, 400),
    n=st.integers(1, 60),
    batch_size=st.integers(1, 7),
    world_size=st.integers(1, 3),
    tail=st.sampled_from(["drop", "share"]),
    limit=st.one_of(st.integers(1, 20), st.floats(0.1, 1.0)),
    accumulate=st.integers(1, 5),
)
def test_steps_are_those_counted_one_by_one(windows, n, batch_size, world_size, tail, limit, accumulate):
    steps = Steps(n=n, batch_size=batch_size, world_size=world_size, tail=tail)
    batches = steps.limited(limit)
    if batches:
        expected = counted_steps(windows, steps, batches, accumulate)
        assert steps_for(windows, steps, batches, accumulate) == expected


class Seen(L.Callback):
    """Counts the tokens of every training batch."""

    tokens = 0

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        self.tokens += batch[0].numel()


@pytest.mark.parametrize("drop_last", [True, False])
@pytest.mark.parametrize(("batch_size", "accumulate"), [(4, 1), (8, 1), (2, 3), (16, 2)])
def test_runs_of_other_batch_sizes_see_as_many_tokens(tmp_path, batch_size, accumulate, drop_last):
    max_tokens = 1280 * LENGTH  # over a dozen epochs
    data = make_data(tmp_path, batch_size=batch_size, drop_last=drop_last)
    budget, seen = TokenBudget(max_tokens), Seen()
    trainer = make_trainer(max_epochs=-1, callbacks=[budget, seen], accumulate_grad_batches=accumulate)
    trainer.fit(make_model(), datamodule=data)
    assert seen.tokens == budget.tokens
    assert 0 <= max_tokens - seen.tokens < batch_size * accumulate * LENGTH
    assert (
        trainer.global_step == trainer.max_steps == trainer.lr_scheduler_configs[0].scheduler.last_epoch
    )


def test_it_validates_by_tokens_and_logs_them(tmp_path):
    data = make_data(tmp_path)
    watch = Watch(data)
    budget = TokenBudget(80 * 4 * LENGTH, val_every_tokens=20 * 4 * LENGTH)
    trainer = make_trainer(
        max_epochs=-1, callbacks=[watch, budget], val_check_interval=7, log_every_n_steps=1
    )
    trainer.fit(make_model(), datamodule=data)
    assert watch.validated_at == [20, 40, 60, 80]  # across epochs of 25 batches
    assert trainer.callback_metrics["tokens"] == 80 * 4 * LENGTH == budget.tokens


class Save(L.Callback):
    """Saves once, after optimizer step 10."""

    def __init__(self, path) -> None:
        self.path = path

    def on_train_batch_end(self, trainer, *_) -> None:
        if trainer.global_step == 10:
            trainer.save_checkpoint(self.path)


@pytest.mark.parametrize(("batch_size", "steps"), [(4, 60), (8, 10 + 25), (2, 10 + 100)])
def test_a_resumed_run_ends_at_the_same_budget(tmp_path, batch_size, steps):
    max_tokens = 60 * 4 * LENGTH
    first = make_trainer(max_epochs=-1, callbacks=[TokenBudget(max_tokens), Save(tmp_path / "10.ckpt")])
    first.fit(make_model(), datamodule=make_data(tmp_path))
    assert first.global_step == 60
    budget, seen = TokenBudget(max_tokens), Seen()
    second = make_trainer(max_epochs=-1, callbacks=[budget, seen])
    data = make_data(tmp_path, batch_size=batch_size)
    second.fit(make_model(), datamodule=data, ckpt_path=tmp_path / "10.ckpt", weights_only=True)
    assert second.global_step == steps
    assert seen.tokens == 50 * 4 * LENGTH
    assert budget.tokens == max_tokens


def test_steps_of_ones_own_win(tmp_path):
    trainer = make_trainer(max_steps=3, callbacks=TokenBudget(1280 * LENGTH))
    trainer.fit(make_model(), datamodule=make_data(tmp_path))
    assert trainer.global_step == 3


def test_without_numbers_it_only_counts(tmp_path):
    budget = TokenBudget()
    trainer = make_trainer(max_steps=7, callbacks=budget)
    trainer.fit(make_model(), datamodule=make_data(tmp_path))
    assert (trainer.global_step, budget.tokens) == (7, 7 * 4 * LENGTH)
    prepared = make_prepared(tmp_path)
    trainer = make_trainer(max_epochs=1, callbacks=TokenBudget())
    trainer.fit(make_model(), prepared.train_dataloader(), prepared.val_dataloader())
    assert trainer.global_step == EPOCH_BATCHES


def make_prepared(folder):
    data = make_data(folder)
    data.prepare_data()
    data.setup()
    return data


def test_what_cannot_be_counted_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"max_tokens=0 is too small; it is a number of tokens"):
        TokenBudget(0)
    with pytest.raises(TypeError, match=r"val_every_tokens=1\.5 is a float"):
        TokenBudget(val_every_tokens=1.5)
    trainer = make_trainer(max_epochs=-1, callbacks=TokenBudget(4 * LENGTH - 1))
    with pytest.raises(
        ValueError, match=r"max_tokens=31 is less than one step of 32 tokens .*: raise it"
    ):
        trainer.fit(make_model(), datamodule=make_data(tmp_path))
    trainer = make_trainer(max_epochs=-1, callbacks=TokenBudget(1000))
    prepared = make_prepared(tmp_path)
    with pytest.raises(TypeError, match=r"the Trainer has None: fit with datamodule=GPTDataModule"):
        trainer.fit(make_model(), prepared.train_dataloader(), prepared.val_dataloader())
