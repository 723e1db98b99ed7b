"""The last state of a run is saved, whatever ends it and however it validates."""

from __future__ import annotations

import errno
from datetime import timedelta
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lit_gptdata import TokenBudget
from lit_gptdata.training.checkpoints import BestCheckpoint, LastCheckpoint
from tests.runs import LENGTH, StoppedError, Watch, make_data, make_model, make_trainer

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:Total length of"),  # an empty val split
    pytest.mark.filterwarnings("ignore:.*is not empty"),
]


class CountSaves(LastCheckpoint):
    """Records the number of batches at each save."""

    def __init__(self, folder: Path) -> None:
        super().__init__(str(folder))
        self.saves: list[int] = []

    def _save_checkpoint(self, trainer, filepath) -> None:
        super()._save_checkpoint(trainer, filepath)
        self.saves.append(trainer.fit_loop.epoch_loop.total_batch_idx + 1)


def fit(folder: Path, *callbacks: L.Callback, data=None, model=None, ckpt_path=None, stop="", **options):
    """Fit a small run with a `last` checkpoint; return the windows of its batches, and its saves."""
    module, model = make_data(folder, **(data or {})), model or make_model()
    watch, last = Watch(module), CountSaves(folder / "checkpoints")
    trainer = make_trainer(
        callbacks=[*callbacks, watch, last], enable_checkpointing=True,
        **({"max_epochs": -1, "num_sanity_val_steps": 0} | options),
    )  # fmt: skip
    try:
        trainer.fit(model, datamodule=module, ckpt_path=ckpt_path, weights_only=True)
    except (StoppedError, SIGTERMException):
        assert stop
    return watch.seen, last.saves


def tokens(batches: int) -> TokenBudget:
    return TokenBudget(batches * 4 * LENGTH)


# 32 batches: an epoch has 25, and the data has 3 val batches
SCHEDULES = {
    "by number": ({"val_check_interval": 10, "check_val_every_n_epoch": None}, [10, 20, 30, 32]),
    "by share": ({"val_check_interval": 0.4}, [10, 20, 32]),
    "by epoch": ({"val_check_interval": 1.0}, [25, 32]),
    "by duration": ({"val_check_interval": timedelta(hours=1)}, [32]),
    "each batch by duration": ({"val_check_interval": "00:00:00:00"}, [*range(1, 33)]),
    "every second epoch": ({"check_val_every_n_epoch": 2}, [32]),
    "rarely": ({"val_check_interval": 1000, "check_val_every_n_epoch": None}, [32]),
}


@pytest.mark.parametrize("has_val", [True, False])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_last_checkpoint_follows_validation_and_ends_with_the_run(tmp_path, schedule, has_val):
    options, expected = SCHEDULES[schedule]
    data = {} if has_val else {"val_fraction": 0.0}
    if not has_val:  # the text for val is now in the train split, so an epoch has 27 batches
        options = options | {"limit_train_batches": 25}
    _, saves = fit(tmp_path, tokens(32), data=data, **options)
    assert saves == expected
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["last.ckpt"]


@pytest.mark.parametrize(
    "end",
    [
        {"max_steps": 7}, {"max_epochs": 1, "limit_train_batches": 7}, {"limit_val_batches": 0},
        {"accumulate_grad_batches": 3}, {"max_epochs": 2, "accumulate_grad_batches": 2},
    ],
)  # fmt: skip
def test_a_longer_run_continues_exactly_from_the_final_checkpoint(tmp_path, end):
    short, _ = fit(tmp_path, tokens(12), **end)
    longer = {key: value for key, value in end.items() if not key.startswith("max_")}
    ckpt = tmp_path / "checkpoints" / "last.ckpt"
    rest, _ = fit(tmp_path, tokens(60), **longer, ckpt_path=ckpt)
    whole, _ = fit(tmp_path, tokens(60), **longer)
    assert len(short) >= 7
    assert short + rest == whole


@pytest.mark.parametrize("stop", ["exception", "SIGTERM"])
def test_tokens_of_batches_that_are_repeated_count_once(tmp_path, stop):
    options = {"accumulate_grad_batches": 3, "val_check_interval": 5, "check_val_every_n_epoch": None}
    model = make_model()
    model.stop, model.stop_at = stop, 7
    fit(tmp_path, tokens(12), model=model, stop=stop, **options)
    budget = tokens(12)
    fit(tmp_path, budget, ckpt_path=tmp_path / "checkpoints" / "last.ckpt", **options)
    assert budget.tokens == 12 * 4 * LENGTH


def test_an_error_while_a_checkpoint_loads_does_not_replace_it(tmp_path):
    fit(tmp_path, tokens(5))
    path = tmp_path / "checkpoints" / "last.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["optimizer_states"][0]["param_groups"] = []  # refused after the counters are loaded
    torch.save(checkpoint, path)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="parameter group"):
        fit(tmp_path, tokens(9), ckpt_path=path)
    assert path.read_bytes() == before


def test_a_full_disk_keeps_the_previous_checkpoint_and_a_kill_leaves_no_copy(tmp_path, monkeypatch):
    fit(tmp_path, tokens(5))
    path = tmp_path / "checkpoints" / "last.ckpt"
    before = path.read_bytes()
    leftover = path.with_name(".last.ckpt.123.tmp")  # of a killed run
    leftover.touch()

    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", fail)
        with pytest.raises(OSError, match="No space left"):
            fit(tmp_path, tokens(9), ckpt_path=path)
    assert path.read_bytes() == before
    fit(tmp_path, tokens(9), ckpt_path=path)
    assert path.read_bytes() != before
    assert [*path.parent.iterdir()] == [path]


def test_a_model_that_logs_other_names_trains_without_a_best_checkpoint(tmp_path):
    class OtherNames(type(make_model())):
        def on_validation_epoch_end(self) -> None:
            self.log("val/nats", 1.0)

    model, best = make_model(), BestCheckpoint(tmp_path / "best", monitor="val_loss")
    model.__class__ = OtherNames
    callback = [best]
    trainer = make_trainer(
        max_steps=4, val_check_interval=2, callbacks=callback, enable_checkpointing=True
    )
    with pytest.warns(UserWarning, match=r"logs .*val/nats.*, and not val_loss. Set monitor"):
        trainer.fit(model, datamodule=make_data(tmp_path))
    assert not (tmp_path / "best").exists()
    assert best.state_key.startswith("ModelCheckpoint{")
