from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.trainer.states import TrainerStatus

import lit_gptdata.compact as compact_module
from lit_gptdata import GPT
from lit_gptdata.training.throughput import Throughput
from lit_gptdata.windows.loader import window_loader
from lit_gptdata.windows.steps import Steps
from tests.runs import BATCH_SIZE, EPOCH_BATCHES, LENGTH, make_data, make_model, make_trainer, train
from tests.training.run_train import read_metrics


def fit(folder, model=None, data=None, **options) -> list[dict[str, str]]:
    defaults = {"max_steps": 6, "log_every_n_steps": 2, "val_check_interval": 3, "limit_val_batches": 2}
    logger = CSVLogger(folder)
    trainer = make_trainer(logger=logger, callbacks=[Throughput()], **(defaults | options))
    trainer.fit(model or make_model(), datamodule=data or make_data(folder))
    return read_metrics(folder / "lightning_logs/version_0")


def test_both_metrics_are_logged_every_n_steps(tmp_path):
    logged = fit(tmp_path)
    assert [row["step"] for row in logged if row["tokens_per_second"]] == ["1", "3", "5"]
    waits = [float(row["data_wait"]) for row in logged if row["data_wait"]]
    assert len(waits) == 3
    assert all(0 < wait < 1 for wait in waits)


@pytest.mark.parametrize("accumulate", [1, 3])
def test_the_time_of_validation_does_not_count(tmp_path, monkeypatch, accumulate):
    """The test clock advances 3 s per training step, 1 s per batch and 1,000 s per validation step."""
    model, data = make_model(), make_data(tmp_path)
    data.prepare_data()
    data.setup()
    now = 0.0
    monkeypatch.setattr("lit_gptdata.training.throughput.time.perf_counter", lambda: now)
    training_step, validation_step = model.training_step, model.validation_step

    def advance(seconds, step):
        def clocked(*arguments):
            nonlocal now
            now += seconds
            return step(*arguments)

        return clocked

    model.training_step = advance(3, training_step)
    model.validation_step = advance(1000, validation_step)
    gather = data.train_windows.ids

    def slow(indices, size):
        for ids in gather(indices, size):
            advance(1, lambda: None)()
            yield ids

    monkeypatch.setattr(data.train_windows, "ids", slow)
    logged = fit(tmp_path, model, data, accumulate_grad_batches=accumulate)
    rates = {float(row["tokens_per_second"]) for row in logged if row["tokens_per_second"]}
    waits = {float(row["data_wait"]) for row in logged if row["data_wait"]}
    assert rates == {BATCH_SIZE * LENGTH / 4}
    assert waits == {0.25}


def test_another_loader_has_no_data_wait(tmp_path):
    data = make_data(tmp_path)
    data.prepare_data()
    data.setup()
    loader = torch.utils.data.DataLoader(data.train_windows, batch_size=4)
    trainer = make_trainer(
        logger=CSVLogger(tmp_path), callbacks=[Throughput()], max_steps=2, log_every_n_steps=1
    )
    trainer.fit(make_model(), loader, loader)
    first = read_metrics(tmp_path / "lightning_logs/version_0")[0]
    assert "data_wait" not in first
    assert float(first["tokens_per_second"]) > 0


# Batches for a GPU --------------------------------------------------------------------------------


def test_compact_batches_train_the_same_weights(tmp_path, monkeypatch):
    seen = []

    def run(compact: bool, num_workers: int = 0):
        monkeypatch.setattr("lit_gptdata.datamodule.sends_compact", lambda trainer: compact)
        split = compact_module.split_on_device
        monkeypatch.setattr(
            "lit_gptdata.datamodule.split_on_device",
            lambda batch, index: seen.append(batch) or split(batch, index),
        )
        data = {"num_workers": num_workers}
        watch, weights = train(tmp_path, data=data, max_epochs=1, val_check_interval=10)
        monkeypatch.undo()
        return watch, weights

    plain, weights = run(compact=False)
    assert not seen
    for num_workers in (0, 2):
        compact, same = run(compact=True, num_workers=num_workers)
        sent = [batch for batch in seen if isinstance(batch, torch.Tensor)]
        assert {(b.dtype, tuple(b.shape)) for b in sent} == {(torch.uint16, (BATCH_SIZE, LENGTH + 1))}
        assert len(seen) > len(sent) == EPOCH_BATCHES  # validation batches are never compact
        assert compact.seen == plain.seen
        assert compact.val_loss == plain.val_loss
        assert all(torch.equal(same[name], weight) for name, weight in weights.items())
        seen.clear()
        inputs, targets = next(iter(compact.data.train_dataloader()))
        assert inputs.dtype == targets.dtype == torch.int64


def test_a_compact_batch_has_an_eighth_of_the_bytes(tmp_path):
    data = make_data(tmp_path, max_length=256, stride=1, batch_size=32)
    data.prepare_data()
    data.setup()
    steps = Steps(n=len(data.train_windows), batch_size=32)
    (ids,) = [next(iter(window_loader(data.train_windows, steps, seed=0, batch_format="compact")))]
    inputs, targets = compact_module.split_on_device(ids, 0)
    assert inputs.is_contiguous()
    assert targets.is_contiguous()
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    assert (inputs.nbytes + targets.nbytes) / ids.nbytes == pytest.approx(8, rel=0.005)


class _OnAGpu:
    """The attributes of a Trainer that `sends_compact` reads."""

    def __init__(self, model, fn="fit", status=TrainerStatus.RUNNING, device="cuda") -> None:
        self.lightning_module = model
        self.state = SimpleNamespace(fn=fn, status=status)
        self.strategy = SimpleNamespace(root_device=torch.device(device))


def test_batches_are_compact_only_if_the_model_has_no_hook_for_them():
    class WithHook(GPT):
        def on_after_batch_transfer(self, batch, dataloader_idx):
            return batch

    class WithIterator(GPT):
        def training_step(self, dataloader_iter):
            return None

    stem = {"vocab_size": 8, "max_length": 4, "embedding_dim": 4}
    model = GPT(stem, n_layers=0)
    assert compact_module.sends_compact(_OnAGpu(model))
    assert not compact_module.sends_compact(_OnAGpu(model, fn="validate"))
    assert not compact_module.sends_compact(_OnAGpu(model, status=TrainerStatus.FINISHED))
    assert not compact_module.sends_compact(_OnAGpu(model, device="cpu"))
    assert not compact_module.sends_compact(_OnAGpu(WithHook(stem, n_layers=0)))
    assert not compact_module.sends_compact(_OnAGpu(WithIterator(stem, n_layers=0)))
