"""What resumes, what does not, and what is said then."""

from __future__ import annotations

import os
import random
import shutil
from itertools import chain

import lightning as L
import numpy as np
import pytest
import tiktoken.registry
import torch
from torch import nn

from lit_gptdata import GPTDataModule, Tokenizer
from lit_gptdata.rng import rng_states, set_rng_states
from tests.runs import (
    EPOCH_BATCHES,
    make_data,
    make_model,
    make_trainer,
    train,
    windows_of,
    write_text,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*exists and is not empty.*"),  # where the first run saved
    pytest.mark.filterwarnings("ignore:The dirpath has changed.*"),  # saves are copied here
]

SAVE = {"filename": "{step}", "every_n_train_steps": 10}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of two epochs that saved every 10 steps."""
    folder = tmp_path_factory.mktemp("run")
    watch, weights = train(folder, save=SAVE | {"dirpath": folder}, max_epochs=2)
    return folder, watch, weights


def same(weights, others) -> bool:
    return all(torch.equal(weights[name], others[name]) for name in weights)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_length": 4}, "max_length was 8, now 4"),
        ({"stride": 4}, "stride was 8, now 4"),
        ({"seed": 1}, "seed was 0, now 1"),
        ({"shuffle": False}, "shuffle was True, now False"),
        ({"val_fraction": 0.2}, r"val_fraction was 0\.1, now 0\.2"),
        ({"test_fraction": 0.1}, r"test_fraction was 0\.0, now 0\.1"),
        ({"tokenizer": "r50k_base"}, "tokenizer was 'gpt2', now 'r50k_base'"),
    ],
)
def test_other_windows_are_refused_by_name_with_both_values(whole, options, message, monkeypatch):
    folder, _, _ = whole
    if "tokenizer" in options:  # the same vocabulary under another name: no other is at hand offline
        gpt2 = Tokenizer("gpt2").encoding
        parts = ("_pat_str", "_mergeable_ranks", "_special_tokens")
        other = tiktoken.Encoding("r50k_base", **{name[1:]: getattr(gpt2, name) for name in parts})
        monkeypatch.setitem(tiktoken.registry.ENCODINGS, "r50k_base", other)
    with pytest.raises(ValueError, match=message) as error:
        train(folder, data=options, save=SAVE, ckpt_path=folder / "step=10.ckpt", max_epochs=2)
    assert "batch_size and the number of devices may change" in str(error.value)


def test_another_text_is_refused(whole, tmp_path):
    folder, _, _ = whole
    other = tmp_path / "other.txt"
    other.write_text(write_text(folder).read_text().replace(" ", "  "))
    with pytest.raises(ValueError, match=f"corpus was '.*words.txt', now '{other}'"):
        train(
            folder,
            data={"corpus": str(other)},
            save=SAVE,
            ckpt_path=folder / "step=10.ckpt",
            max_epochs=2,
        )


def test_a_text_that_has_changed_in_its_place_is_refused(whole, tmp_path):
    folder, _, _ = whole
    copy = tmp_path / "run"
    shutil.copytree(folder, copy)
    train(copy, save=SAVE | {"dirpath": copy}, max_steps=10)
    path = write_text(copy)
    path.write_text(path.read_text() + " more")
    with pytest.raises(ValueError, match=r"store was '\w+', now '\w+'"):
        train(copy, save=SAVE, ckpt_path=copy / "step=10.ckpt", max_epochs=2)


def test_a_corpus_may_move(whole, tmp_path):
    folder, watch, weights = whole
    moved = tmp_path / "elsewhere"
    shutil.copytree(folder, moved)
    again, same_weights = train(moved, save=SAVE, ckpt_path=moved / "step=30.ckpt", max_epochs=2)
    assert again.seen == watch.seen[30:]
    assert same(weights, same_weights)


def test_a_checkpoint_without_the_data_modules_state_is_refused(whole, tmp_path):
    folder, _, _ = whole
    checkpoint = torch.load(folder / "step=10.ckpt", weights_only=True)
    del checkpoint["GPTDataModule"]
    torch.save(checkpoint, tmp_path / "bare.ckpt")
    message = r"trained on 10 batches but has no state of GPTDataModule .*load_from_checkpoint\(path\)"
    with pytest.raises(ValueError, match=message):
        train(folder, save=SAVE, ckpt_path=tmp_path / "bare.ckpt", max_epochs=2)


def test_a_checkpoint_holds_plain_values_and_tensors(whole):
    folder, _, _ = whole
    state = torch.load(folder / "step=30.ckpt", weights_only=True)["GPTDataModule"]
    assert (state["batches"], state["epoch"], state["index"]) == (30, 1, 5 * 4)
    assert state["rng"]["torch"].dtype == torch.uint8
    assert state["rng"]["torch"].shape[0] == 1


@pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint.*")
def test_other_data_may_be_validated_with_a_checkpoint(whole):
    folder, _, _ = whole
    data, model = make_data(folder, max_length=4, val_fraction=0.3), make_model()
    trainer = make_trainer(logger=False)
    (scores,) = trainer.validate(
        model, datamodule=data, ckpt_path=folder / "step=10.ckpt", verbose=False, weights_only=True
    )
    assert scores["val_loss"] > 0


def test_a_run_that_max_steps_ended_goes_on_in_its_epoch(whole, tmp_path):
    folder, watch, _ = whole
    first, _ = train(folder, max_steps=32, max_epochs=2)
    path = tmp_path / "ended.ckpt"
    first.data.trainer.save_checkpoint(path)  # Lightning's own counters have left the epoch by now
    again, _ = train(folder, ckpt_path=path, max_epochs=2)
    assert first.seen == watch.seen[:32]
    assert again.seen == watch.seen[32:]
    assert again.data.trainer.current_epoch == 2


def test_a_finished_run_can_be_prolonged(whole):
    folder, _, _ = whole
    ckpt = folder / "step=50.ckpt"
    longer, _ = train(folder, save=SAVE, ckpt_path=ckpt, max_epochs=3)
    assert longer.seen == train(folder, max_epochs=3)[0].seen[50:]


def test_a_resumed_run_can_be_resumed(whole, tmp_path):
    folder, watch, weights = whole
    save = SAVE | {"dirpath": tmp_path}
    train(folder, save=save, ckpt_path=folder / "step=10.ckpt", max_epochs=2)
    again, same_weights = train(folder, save=save, ckpt_path=tmp_path / "step=40.ckpt", max_epochs=2)
    assert again.seen == watch.seen[40:]
    assert same(weights, same_weights)


def test_resume_with_fewer_batches_an_epoch(whole, tmp_path):
    folder, _, _ = whole
    options = {"limit_train_batches": 7, "max_epochs": 3}
    limited, weights = train(folder, save=SAVE | {"dirpath": tmp_path}, **options)
    assert len(limited.seen) == 21
    at = [windows_of(limited.data.batch_at(step)[0]) for step in range(21)]
    assert at == limited.seen
    again, same_weights = train(folder, save=SAVE, ckpt_path=tmp_path / "step=10.ckpt", **options)
    assert again.seen == limited.seen[10:]
    assert same(weights, same_weights)


@pytest.mark.parametrize("saved", [5, 6])
def test_a_smaller_batch_may_leave_nothing_of_a_limited_epoch(whole, tmp_path, saved):
    folder, _, _ = whole
    options = {"limit_train_batches": 10, "max_epochs": 2}
    save = {"filename": "{step}", "every_n_train_steps": saved, "dirpath": tmp_path}
    train(folder, save=save, **options)
    ckpt, data = tmp_path / f"step={saved}.ckpt", {"batch_size": 2}
    again, _ = train(folder, data=data, save=save, ckpt_path=ckpt, **options)
    # 5 batches of 4 are the 10 of 2 that the limit allows
    assert again.seen == train(folder, data=data, **options)[0].seen[10:]
    at = [windows_of(again.data.batch_at(saved + step)[0]) for step in range(len(again.seen))]
    assert at == again.seen


def test_resume_without_drop_last(whole, tmp_path):
    folder, _, _ = whole
    options = {"data": {"drop_last": False}, "max_epochs": 2}
    every, weights = train(folder, save=SAVE | {"dirpath": tmp_path}, **options)
    assert len(every.seen[25]) == 3
    assert sorted(chain(*every.seen[:26])) == list(range(103))
    again, same_weights = train(folder, save=SAVE, ckpt_path=tmp_path / "step=20.ckpt", **options)
    assert again.seen == every.seen[20:]
    assert same(weights, same_weights)


def test_validation_that_a_stop_prevented_is_made_up_for(whole, tmp_path):
    folder, _, _ = whole
    options = {"max_epochs": 1, "val_check_interval": 5}
    complete, _ = train(folder, save=SAVE | {"dirpath": tmp_path}, **options)
    # saved after step 10, before the validation that comes then
    again, _ = train(folder, save=SAVE, ckpt_path=tmp_path / "step=10.ckpt", **options)
    assert complete.validated_at == [5, 10, 15, 20, 25]
    assert again.validated_at == [10, 15, 20, 25]
    assert again.val_loss == complete.val_loss[1:]
    assert again.data.trainer.fit_loop.epoch_loop._batches_that_stepped == EPOCH_BATCHES


def test_two_fits_of_one_trainer_and_a_new_trainer(whole):
    folder, watch, _ = whole
    data, trainer = make_data(folder), make_trainer(max_epochs=1, limit_val_batches=0)
    trainer.fit(make_model(), datamodule=data)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(make_model(), datamodule=data)
    assert trainer.fit_loop.total_batch_idx == 49
    trainer = make_trainer(max_epochs=1, limit_val_batches=0, callbacks=[])
    trainer.fit(make_model(), datamodule=data)
    assert windows_of(data.batch_at(0)[0]) == watch.seen[0]


def test_the_loader_of_a_data_module_without_a_trainer_begins_at_the_beginning(whole):
    folder, watch, _ = whole
    data = GPTDataModule.load_from_checkpoint(folder / "step=30.ckpt", weights_only=True)
    data.prepare_data()
    data.setup()
    loader = data.train_dataloader()
    for _ in range(2):
        seen = [windows_of(inputs) for inputs, _ in loader]
        assert seen in (watch.seen[:25], watch.seen[25:])


# batch_at -----------------------------------------------------------------------------------------


def test_batch_at_from_a_checkpoint_knows_the_changes_of_batch_size(whole, tmp_path):
    folder, watch, _ = whole
    other = {"data": {"batch_size": 10}, "save": SAVE | {"dirpath": tmp_path}}
    wider, _ = train(folder, ckpt_path=folder / "step=10.ckpt", **other, max_epochs=2)
    path = max(tmp_path.glob("*.ckpt"), key=os.path.getmtime)
    data = GPTDataModule.load_from_checkpoint(path, weights_only=True)
    data.prepare_data()
    data.setup()
    at = [windows_of(data.batch_at(step)[0]) for step in range(10 + len(wider.seen))]
    assert at == watch.seen[:10] + wider.seen
    inputs, targets = data.batch_at(10)
    assert inputs.shape == targets.shape == (10, 8)
    assert torch.equal(inputs[:, 1:], targets[:, :-1])


def test_batch_at_counts_within_an_epoch(whole):
    folder, watch, _ = whole
    data = make_data(folder)
    data.prepare_data()
    data.setup()
    assert windows_of(data.batch_at(0, epoch=1)[0]) == watch.seen[25]
    assert windows_of(data.batch_at(24, epoch=1)[0]) == watch.seen[49]
    halves = [windows_of(data.batch_at(3, rank=rank, world_size=2)[0]) for rank in (0, 1)]
    assert halves == watch.seen[6:8]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"step": -1}, "step=-1 does not exist: the run begins with step 0"),
        ({"step": 25, "epoch": 0}, "step=25 of epoch 0 does not exist: .* an epoch has 25 steps"),
        ({"step": 0, "epoch": -1}, "step=0 of epoch -1 does not exist: .* in epoch 0"),
        ({"step": 0, "rank": 1}, r"rank=1 does not exist: give a rank in \[0, 1\)"),
        ({"step": 0, "rank": 2, "world_size": 2}, r"rank=2 does not exist: give a rank in \[0, 2\)"),
    ],
)
def test_batch_at_refuses_what_does_not_exist(whole, arguments, message):
    data = make_data(whole[0])
    data.prepare_data()
    data.setup()
    with pytest.raises(ValueError, match=message):
        data.batch_at(**arguments)


def test_batch_at_before_setup():
    with pytest.raises(RuntimeError, match="call prepare_data"):
        GPTDataModule().batch_at(0)


# Random numbers -----------------------------------------------------------------------------------


def test_every_global_generator_goes_on_as_it_would_have():
    def draw() -> list:
        numbers = np.random.randn(3).tolist() + np.random.rand(2).tolist()
        return [random.gauss(0, 1), random.random(), *numbers, *torch.rand(3).tolist()]

    cpu = torch.device("cpu")
    draw()  # leaves a spare normal deviate in Python's generator and in numpy's
    states = rng_states(cpu)
    several = {name: torch.stack([state, state]) for name, state in states.items()}
    expected = draw()
    torch.manual_seed(0), random.seed(0), np.random.seed(0)
    set_rng_states({name: ranks[1] for name, ranks in several.items()}, cpu)
    assert draw() == expected


def test_loading_batches_draws_from_no_global_generator(whole):
    data = make_data(whole[0])
    data.prepare_data()
    data.setup()
    torch.manual_seed(0)
    before = torch.get_rng_state()
    for loader in (data.train_dataloader(), data.val_dataloader()):
        assert len(list(loader)) == len(loader)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.filterwarnings("ignore:Using ModelCheckpoint with manual optimization.*")
def test_a_model_of_ones_own_resumes_too(whole, tmp_path):
    class Own(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(50257, 1)
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()
            optimizer.zero_grad()
            noise = torch.rand(1) + random.random()
            loss = (self.table(batch[0]) * noise).sum()
            self.manual_backward(loss)
            optimizer.step()

        def validation_step(self, batch, batch_idx):
            random.random()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    def run(ckpt_path=None) -> torch.Tensor:
        L.seed_everything(1 if ckpt_path else 0, verbose=False)
        model = Own()
        torch.nn.init.zeros_(model.table.weight)
        saves = L.pytorch.callbacks.ModelCheckpoint(
            dirpath=tmp_path, filename="{step}", every_n_train_steps=10, save_top_k=-1
        )
        trainer = make_trainer(max_epochs=2, callbacks=[saves], enable_checkpointing=True)
        trainer.fit(model, datamodule=make_data(whole[0]), ckpt_path=ckpt_path, weights_only=True)
        return model.table.weight.detach().clone()

    weights = run()
    assert torch.equal(run(tmp_path / "step=30.ckpt"), weights)
