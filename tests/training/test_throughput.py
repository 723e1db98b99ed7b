"""The callback that measures tokens per second and the time spent waiting for batches."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger

from lit_gptdata.training.throughput import Throughput
from lit_gptdata.windows.dataset import Windows
from tests.runs import BATCH_SIZE, LENGTH, make_data, make_model, make_trainer, opened
from tests.training.run_train import read_metrics

pytestmark = pytest.mark.usefixtures("one_thread")


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
    model, data = make_model(), opened(make_data(tmp_path))
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
    gather = Windows.ids

    def slow(windows, indices, size):
        for ids in gather(windows, indices, size):
            advance(1, lambda: None)()
            yield ids

    monkeypatch.setattr(Windows, "ids", slow)
    logged = fit(tmp_path, model, data, accumulate_grad_batches=accumulate)
    rates = {float(row["tokens_per_second"]) for row in logged if row["tokens_per_second"]}
    waits = {float(row["data_wait"]) for row in logged if row["data_wait"]}
    assert rates == {BATCH_SIZE * LENGTH / 4}
    assert waits == {0.25}


def test_another_loader_has_no_data_wait(tmp_path):
    loader = torch.utils.data.DataLoader(opened(make_data(tmp_path)).train_windows, batch_size=4)
    options = {"logger": CSVLogger(tmp_path), "max_steps": 2, "log_every_n_steps": 1}
    trainer = make_trainer(callbacks=[Throughput()], **options)
    trainer.fit(make_model(), loader, loader)
    first = read_metrics(tmp_path / "lightning_logs/version_0")[0]
    assert "data_wait" not in first
    assert float(first["tokens_per_second"]) > 0
