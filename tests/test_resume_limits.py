"""Which runs resume, which are refused with which message, and what `batch_at` tells about them."""

from __future__ import annotations

import os
import random
import shutil
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import numpy as np
import pytest
import tiktoken.registry
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from lit_gptdata import GPTDataModule, Tokenizer
from lit_gptdata.resume import rng_states, set_rng_states
from tests.runs import (
    EPOCH_BATCHES,
    Watch,
    make_data,
    make_model,
    make_trainer,
    opened,
    train,
    windows_of,
    write_text,
)

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*exists and is not empty.*"),  # the first run saved there
    pytest.mark.filterwarnings("ignore:The dirpath has changed.*"),  # some tests copy the run's folder
]

SAVE = {"filename": "{step}", "every_n_train_steps": 10}


class Run(NamedTuple):
    folder: Path
    watch: Watch
    weights: dict[str, torch.Tensor]


def saving_run(folder: Path, saves: Path, **options) -> Run:
    """A run that saves every 10 steps in `saves`."""
    return Run(folder, *train(folder, save=SAVE | {"dirpath": saves}, **options))


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    """A run of two epochs, with its checkpoints in the same folder."""
    folder = tmp_path_factory.mktemp("run")
    return saving_run(folder, folder, max_epochs=2)


def assert_resumes(run: Run, ckpt: Path, **options) -> None:
    """Resume from the checkpoint step=N.ckpt: windows and weights equal the rest of the run."""
    step = int(ckpt.stem.removeprefix("step="))
    watch, weights = train(run.folder, save=SAVE, ckpt_path=ckpt, **options)
    assert watch.seen == run.watch.seen[step:]
    assert all(torch.equal(weights[name], weight) for name, weight in run.weights.items())


def load(path) -> GPTDataModule:
    return opened(GPTDataModule.load_from_checkpoint(path, weights_only=True))


def batches_at(data: GPTDataModule, steps) -> list[list[int]]:
    return [windows_of(data.batch_at(step)[0]) for step in steps]


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
def test_a_change_of_windows_is_refused_by_name_with_both_values(run, options, message, monkeypatch):
    if "tokenizer" in options:  # offline, the same vocabulary under another name
        gpt2 = Tokenizer("gpt2").reference.encoding
        parts = ("pat_str", "mergeable_ranks", "special_tokens")
        other = tiktoken.Encoding("r50k_base", **{name: getattr(gpt2, f"_{name}") for name in parts})
        monkeypatch.setitem(tiktoken.registry.ENCODINGS, "r50k_base", other)
    with pytest.raises(ValueError, match=message) as error:
        train(run.folder, data=options, save=SAVE, ckpt_path=run.folder / "step=10.ckpt", max_epochs=2)
    assert "batch_size and the number of devices may change" in str(error.value)


def test_another_text_is_refused(run, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text(write_text(run.folder).read_text().replace(" ", "  "))
    data, ckpt = {"corpus": str(other)}, run.folder / "step=10.ckpt"
    with pytest.raises(ValueError, match=f"corpus was '.*words.txt', now '{other}'"):
        train(run.folder, data=data, ckpt_path=ckpt, max_steps=99)


def test_a_text_that_changed_in_place_is_refused(run, tmp_path):
    copy = shutil.copytree(run.folder, tmp_path / "run")
    train(copy, save=SAVE | {"dirpath": copy}, max_steps=10)
    path = write_text(copy)
    path.write_text(path.read_text() + " more")
    with (
        pytest.warns(UserWarning, match="val changed since the last run"),
        pytest.raises(ValueError, match=r"store was '\w+', now '\w+'"),
    ):
        train(copy, save=SAVE, ckpt_path=copy / "step=10.ckpt", max_epochs=2)


def test_a_corpus_may_move(run, tmp_path):
    moved = shutil.copytree(run.folder, tmp_path / "elsewhere")
    assert_resumes(run._replace(folder=moved), moved / "step=30.ckpt", max_epochs=2)


def test_a_checkpoint_without_the_data_modules_state_is_refused(run, tmp_path):
    checkpoint = torch.load(run.folder / "step=10.ckpt", weights_only=True)
    del checkpoint["GPTDataModule"]
    torch.save(checkpoint, tmp_path / "bare.ckpt")
    message = r"trained on 10 batches but has no state of GPTDataModule .*load_from_checkpoint\(path\)"
    with pytest.raises(ValueError, match=message):
        train(run.folder, save=SAVE, ckpt_path=tmp_path / "bare.ckpt", max_epochs=2)


def test_a_checkpoint_holds_plain_values_and_tensors(run):
    state = torch.load(run.folder / "step=30.ckpt", weights_only=True)["GPTDataModule"]
    assert (state["batches"], state["epoch"], state["index"]) == (30, 1, 5 * 4)
    assert state["rng"]["torch"].dtype == torch.uint8
    assert state["rng"]["torch"].shape[0] == 1


@pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint.*")
def test_a_checkpoint_can_be_validated_on_other_data(run):
    data = make_data(run.folder, max_length=4, val_fraction=0.3)
    options = {"ckpt_path": run.folder / "step=10.ckpt", "weights_only": True, "verbose": False}
    (scores,) = make_trainer().validate(make_model(), datamodule=data, **options)
    assert scores["val_loss"] > 0


def test_a_run_that_max_steps_ended_continues_in_its_epoch(run, tmp_path):
    first, _ = train(run.folder, max_steps=32, max_epochs=2)
    path = tmp_path / "ended.ckpt"
    first.data.trainer.save_checkpoint(path)  # Lightning's counters are past the epoch here
    again, _ = train(run.folder, ckpt_path=path, max_epochs=2)
    assert first.seen == run.watch.seen[:32]
    assert again.seen == run.watch.seen[32:]
    assert again.data.trainer.current_epoch == 2


def test_a_finished_run_can_be_extended(run):
    ckpt = run.folder / "step=50.ckpt"
    longer, _ = train(run.folder, save=SAVE, ckpt_path=ckpt, max_epochs=3)
    assert longer.seen == train(run.folder, max_epochs=3)[0].seen[50:]


def test_a_resumed_run_can_be_resumed(run, tmp_path):
    saving_run(run.folder, tmp_path, ckpt_path=run.folder / "step=10.ckpt", max_epochs=2)
    assert_resumes(run, tmp_path / "step=40.ckpt", max_epochs=2)


def test_resume_with_a_limit_on_batches_per_epoch(run, tmp_path):
    options = {"limit_train_batches": 7, "max_epochs": 3}
    limited = saving_run(run.folder, tmp_path, **options)
    assert len(limited.watch.seen) == 21
    assert batches_at(limited.watch.data, range(21)) == limited.watch.seen
    assert_resumes(limited, tmp_path / "step=10.ckpt", **options)


@pytest.mark.parametrize("saved", [5, 6])
def test_a_smaller_batch_may_end_a_limited_epoch(run, tmp_path, saved):
    options = {"limit_train_batches": 10, "max_epochs": 2}
    save = {"filename": "{step}", "every_n_train_steps": saved, "dirpath": tmp_path}
    train(run.folder, save=save, **options)
    ckpt, data = tmp_path / f"step={saved}.ckpt", {"batch_size": 2}
    again, _ = train(run.folder, data=data, save=save, ckpt_path=ckpt, **options)
    # 5 batches of 4 windows equal the 10 batches of 2 that the limit allows
    assert again.seen == train(run.folder, data=data, **options)[0].seen[10:]
    assert batches_at(again.data, range(saved, saved + len(again.seen))) == again.seen


def test_resume_without_drop_last(run, tmp_path):
    options = {"data": {"drop_last": False}, "max_epochs": 2}
    with_tails = saving_run(run.folder, tmp_path, **options)
    assert len(with_tails.watch.seen[25]) == 3
    assert sorted(chain(*with_tails.watch.seen[:26])) == list(range(103))
    assert_resumes(with_tails, tmp_path / "step=20.ckpt", **options)


def test_a_validation_that_a_stop_prevented_runs_after_the_resume(run, tmp_path):
    options = {"max_epochs": 1, "val_check_interval": 5}
    complete = saving_run(run.folder, tmp_path, **options).watch
    # The checkpoint was saved after step 10 and before the validation that follows.
    again, _ = train(run.folder, save=SAVE, ckpt_path=tmp_path / "step=10.ckpt", **options)
    assert complete.validated_at == [5, 10, 15, 20, 25]
    assert again.validated_at == [10, 15, 20, 25]
    assert again.val_loss == complete.val_loss[1:]
    assert again.data.trainer.fit_loop.epoch_loop._batches_that_stepped == EPOCH_BATCHES


def test_two_fits_of_one_trainer_and_a_new_trainer(run):
    data, trainer = make_data(run.folder), make_trainer(max_epochs=1, limit_val_batches=0)
    trainer.fit(make_model(), datamodule=data)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(make_model(), datamodule=data)
    assert trainer.fit_loop.total_batch_idx == 49
    trainer = make_trainer(max_epochs=1, limit_val_batches=0, callbacks=[])
    trainer.fit(make_model(), datamodule=data)
    assert windows_of(data.batch_at(0)[0]) == run.watch.seen[0]


def test_a_loader_without_a_trainer_continues_where_the_checkpoint_was_saved(run):
    loader = load(run.folder / "step=30.ckpt").train_dataloader()
    assert [windows_of(inputs) for inputs, _ in loader] == run.watch.seen[30:50]


# Checkpoints of earlier versions ------------------------------------------------------------------


STATE_OF_0_1 = {  # as version 0.1 saved it: 10 batches of 4 windows, then 5 of 10 without drop_last
    "data": {
        "store": "e434c065ebbfa19fbd44be2fecb6c829", "tokenizer": "gpt2", "special_tokens": "allow",
        "encoding_errors": "strict", "strip_gutenberg": False, "text_column": "text",
        "max_length": 8, "stride": 8, "val_fraction": 0.1, "test_fraction": 0.0,
        "shuffle": True, "seed": 0, "corpus": "/old/words.txt", "train_tokens": [0, 831],
    },
    "batches": 15, "epoch": 0, "index": 90,
    "legs": [
        {"batch": 0, "epoch": 0, "index": 0,
         "batch_size": 4, "world_size": 1, "tail": "drop", "limit": 25},
        {"batch": 10, "epoch": 0, "index": 40,
         "batch_size": 10, "world_size": 1, "tail": "share", "limit": 11},
    ],
}  # fmt: skip
WINDOWS_OF_0_1 = {  # by batch of the run
    0: [57, 101, 79, 66],
    9: [17, 100, 60, 59],
    10: [39, 94, 12, 56, 27, 65, 35, 102, 87, 74],
    14: [20, 53, 90, 55, 24, 64, 51, 7, 61, 15],
    15: [69, 1, 10, 71, 89, 72, 22, 81, 8, 9],
    16: [48, 68, 70],
    17: [88, 80, 101, 79, 23, 38, 98, 93, 54, 25],
}


def test_a_checkpoint_of_the_earlier_version_resumes_at_its_window(run, tmp_path):
    data = {"batch_size": 10, "drop_last": False}
    save = {"filename": "old", "every_n_train_steps": 13, "dirpath": tmp_path}
    train(run.folder, data=data, save=save, max_steps=13)
    checkpoint = torch.load(tmp_path / "old.ckpt", weights_only=True)
    state = checkpoint["GPTDataModule"]
    assert state.keys() == {*STATE_OF_0_1, "rng", "steps"}
    assert state["data"].keys() == {*STATE_OF_0_1["data"], "val", "windows"}
    checkpoint["GPTDataModule"] = STATE_OF_0_1 | {"rng": state["rng"]}
    checkpoint["datamodule_hyper_parameters"]["contiguous"] = True
    torch.save(checkpoint, tmp_path / "old.ckpt")

    history = batches_at(load(tmp_path / "old.ckpt"), WINDOWS_OF_0_1)
    assert history == list(WINDOWS_OF_0_1.values())
    resumed, _ = train(run.folder, data=data, save=save, ckpt_path=tmp_path / "old.ckpt", max_steps=16)
    assert resumed.seen == [WINDOWS_OF_0_1[step] for step in (15, 16, 17)]


# batch_at -----------------------------------------------------------------------------------------


def test_batch_at_of_a_checkpoint_knows_each_change_of_batch_size(run, tmp_path):
    ckpt = run.folder / "step=10.ckpt"
    wider = saving_run(run.folder, tmp_path, data={"batch_size": 10}, ckpt_path=ckpt, max_epochs=2).watch
    data = load(max(tmp_path.glob("*.ckpt"), key=os.path.getmtime))
    assert batches_at(data, range(10 + len(wider.seen))) == run.watch.seen[:10] + wider.seen
    inputs, targets = data.batch_at(10)
    assert inputs.shape == targets.shape == (10, 8)
    assert torch.equal(inputs[:, 1:], targets[:, :-1])


def test_batch_at_counts_within_an_epoch(run):
    data = opened(make_data(run.folder))
    assert windows_of(data.batch_at(0, epoch=1)[0]) == run.watch.seen[25]
    assert windows_of(data.batch_at(24, epoch=1)[0]) == run.watch.seen[49]
    halves = [windows_of(data.batch_at(3, rank=rank, world_size=2)[0]) for rank in (0, 1)]
    assert halves == run.watch.seen[6:8]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"step": -1}, "step=-1 does not exist: the run starts with step 0"),
        ({"step": 25, "epoch": 0}, "step=25 of epoch 0 does not exist: .* an epoch has 25 steps"),
        ({"step": 0, "epoch": -1}, "step=0 of epoch -1 does not exist: .* in epoch 0"),
        ({"step": 0, "rank": 1}, r"rank=1 does not exist: give a rank in \[0, 1\)"),
        ({"step": 0, "rank": 2, "world_size": 2}, r"rank=2 does not exist: give a rank in \[0, 2\)"),
    ],
)
def test_batch_at_refuses_steps_and_ranks_that_do_not_exist(run, arguments, message):
    data = opened(make_data(run.folder))
    with pytest.raises(ValueError, match=message):
        data.batch_at(**arguments)


# Random numbers -----------------------------------------------------------------------------------


def test_random_states_are_restored_for_every_global_generator():
    def draw() -> list:
        numbers = np.random.randn(3).tolist() + np.random.rand(2).tolist()
        return [random.gauss(0, 1), random.random(), *numbers, *torch.rand(3).tolist()]

    cpu = torch.device("cpu")
    draw()  # leaves a spare normal deviate in the generators of Python and numpy
    states = rng_states(cpu)
    several = {name: torch.stack([state, state]) for name, state in states.items()}
    expected = draw()
    torch.manual_seed(0), random.seed(0), np.random.seed(0)
    set_rng_states({name: ranks[1] for name, ranks in several.items()}, cpu)
    assert draw() == expected


def test_loading_batches_draws_from_no_global_generator(run):
    data = opened(make_data(run.folder))
    torch.manual_seed(0)
    before = torch.get_rng_state()
    for loader in (data.train_dataloader(), data.val_dataloader()):
        assert len(list(loader)) == len(loader)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.filterwarnings("ignore:Using ModelCheckpoint with manual optimization.*")
def test_a_custom_model_with_manual_optimization_resumes(run, tmp_path):
    class Custom(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(50257, 1, _weight=torch.zeros(50257, 1))
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

    def fit(ckpt_path=None) -> torch.Tensor:
        L.seed_everything(1 if ckpt_path else 0, verbose=False)
        model = Custom()
        saves = ModelCheckpoint(tmp_path, save_top_k=-1, **SAVE)
        trainer = make_trainer(max_epochs=2, callbacks=[saves], enable_checkpointing=True)
        trainer.fit(model, datamodule=make_data(run.folder), ckpt_path=ckpt_path, weights_only=True)
        return model.table.weight.detach()

    weights = fit()
    assert torch.equal(fit(tmp_path / "step=30.ckpt"), weights)


class Steps(L.pytorch.loggers.CSVLogger):
    """Records the steps at which train_loss is logged."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.steps: list[int] = []

    def log_metrics(self, metrics, step=None) -> None:
        self.steps += [step] if "train_loss" in metrics else []


@pytest.mark.parametrize(
    ("options", "max_steps"),
    [({"limit_val_batches": 0, "val_check_interval": 5}, 10), ({"val_check_interval": 25}, 25)],
)
def test_loggers_get_the_steps_of_a_run_that_never_stops(tmp_path, options, max_steps):
    def steps(ckpt_path: Path | None = None, **limits) -> list[int]:
        logger = Steps(tmp_path)
        save = {"dirpath": tmp_path, "filename": "last", "every_n_train_steps": max_steps}
        logs = {"logger": logger, "log_every_n_steps": 1, "check_val_every_n_epoch": None}
        train(tmp_path, save=save, ckpt_path=ckpt_path, **logs, **options, **limits)
        return logger.steps

    assert steps(max_steps=max_steps) == list(range(max_steps))
    resumed = steps(tmp_path / "last.ckpt", max_steps=max_steps + 3)
    assert resumed == list(range(max_steps, max_steps + 3))


# Loaders without our data module ------------------------------------------------------------------


class Wrapper(L.LightningDataModule):
    """A user's data module around ours."""

    def __init__(self, data: GPTDataModule) -> None:
        super().__init__()
        self.data = data

    def train_dataloader(self) -> Any:
        return self.data.train_dataloader()


@pytest.mark.filterwarnings("ignore:.*have no `val_dataloader`.*")  # the run needs none
@pytest.mark.parametrize("wrapped", [False, True])
def test_a_trainer_that_has_only_the_loader_resumes_at_its_state(tmp_path, wrapped):
    def fit(ckpt_path: Path | None = None) -> list[list[int]]:
        data = opened(make_data(tmp_path))
        watch = Watch(data)
        save = ModelCheckpoint(tmp_path / "ckpt", "{step}", every_n_train_steps=5, save_top_k=-1)
        trainer = make_trainer(
            callbacks=[watch, save], enable_checkpointing=True, max_epochs=2, limit_val_batches=0
        )
        source = (
            {"datamodule": Wrapper(data)} if wrapped else {"train_dataloaders": data.train_dataloader()}
        )
        trainer.fit(make_model(), ckpt_path=ckpt_path, weights_only=True, **source)
        return watch.seen

    whole = fit()
    for step in (5, 25, 30):
        assert fit(tmp_path / "ckpt" / f"step={step}.ckpt") == whole[step:]


def resume_as(subclass: type[GPTDataModule], run: Run) -> None:
    """Resume the run with a data module of a subclass, which has the key of the checkpoint's state."""
    subclass.__qualname__ = "GPTDataModule"
    data = make_data(run.folder)
    data.__class__ = subclass
    save = ModelCheckpoint(run.folder, **SAVE)
    trainer = make_trainer(max_epochs=2, callbacks=[save], enable_checkpointing=True)
    trainer.fit(make_model(), data, ckpt_path=run.folder / "step=10.ckpt", weights_only=True)


def test_a_subclass_with_a_loader_of_its_own_cannot_resume_and_says_so(run):
    class Own(GPTDataModule):
        def train_dataloader(self):
            return torch.utils.data.DataLoader(super().train_dataloader().dataset, batch_size=4)

    with pytest.raises(ValueError, match=r"train_dataloader\(\) does not return the loader of GPTData"):
        resume_as(Own, run)


def test_a_batch_size_that_changes_after_the_checkpoint_was_loaded_is_refused(run):
    class Own(GPTDataModule):
        def train_dataloader(self):
            self.batch_size = 2
            return super().train_dataloader()

    with pytest.raises(ValueError, match=r"batch_size changed after the checkpoint was loaded"):
        resume_as(Own, run)


def test_a_second_fit_of_a_trainer_keeps_the_history(tmp_path):
    data, model = make_data(tmp_path), make_model()
    watch = Watch(data)
    trainer = make_trainer(max_steps=10, callbacks=[watch])
    trainer.fit(model, data)
    trainer.fit_loop.epoch_loop.max_steps = 30
    trainer.fit(model, data)
    assert batches_at(data, range(30)) == watch.seen


def test_loaders_without_a_trainer_go_on_where_the_loaded_one_stopped(run):
    data = load(run.folder / "step=10.ckpt")
    passes = [[windows_of(inputs) for inputs, _ in data.train_dataloader()] for _ in range(2)]
    assert passes[0] == run.watch.seen[10:EPOCH_BATCHES]
    assert passes[1] == run.watch.seen[EPOCH_BATCHES:]
