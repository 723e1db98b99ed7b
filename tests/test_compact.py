"""Train batches that travel to a GPU in the store's dtype and are split there."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.trainer.states import TrainerStatus

from lit_gptdata import GPT
from lit_gptdata._lightning import sends_compact, split_on_device
from lit_gptdata.windows.loader import window_loader
from lit_gptdata.windows.steps import Steps
from tests.runs import BATCH_SIZE, EPOCH_BATCHES, LENGTH, make_data, opened, train

pytestmark = pytest.mark.usefixtures("one_thread")


def test_compact_batches_train_the_same_weights(tmp_path, monkeypatch):
    seen = []

    def run(compact: bool, num_workers: int = 0, batch_format: str = "tuple"):
        def split(batch, index, **options):
            seen.append(batch)
            return split_on_device(batch, index, **options)

        data = {"num_workers": num_workers, "batch_format": batch_format}
        with monkeypatch.context() as patch:
            patch.setattr("lit_gptdata._lightning.sends_compact", lambda trainer: compact)
            patch.setattr("lit_gptdata._lightning.split_on_device", split)
            return train(tmp_path, data=data, max_epochs=1, val_check_interval=10)

    plain, weights = run(compact=False)
    assert not seen
    for num_workers, batch_format in ((0, "tuple"), (2, "tuple"), (0, "hf")):
        compact, same = run(compact=True, num_workers=num_workers, batch_format=batch_format)
        sent = [batch for batch in seen if isinstance(batch, torch.Tensor)]
        assert {(b.dtype, tuple(b.shape)) for b in sent} == {(torch.uint16, (BATCH_SIZE, LENGTH + 1))}
        assert len(seen) > len(sent) == EPOCH_BATCHES  # validation batches are never compact
        assert compact.seen == plain.seen
        assert compact.val_loss == plain.val_loss
        assert all(torch.equal(same[name], weight) for name, weight in weights.items())
        seen.clear()
        later = next(iter(compact.data.train_dataloader()))
        tensors = list(later.values()) if batch_format == "hf" else later
        assert {tensor.dtype for tensor in tensors} == {torch.int64}


def test_a_compact_batch_has_an_eighth_of_the_bytes(tmp_path):
    data = opened(make_data(tmp_path, max_length=256, stride=1, batch_size=32))
    steps = Steps(n=len(data.train_windows), batch_size=32)
    ids = next(iter(window_loader(data.train_windows, steps, seed=0, is_compact=True)))
    inputs, targets = split_on_device(ids, 0)
    assert inputs.is_contiguous()
    assert targets.is_contiguous()
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    assert (inputs.nbytes + targets.nbytes) / ids.nbytes == pytest.approx(8, rel=0.005)


class OnAGpu:
    """The attributes of a Trainer that `sends_compact` reads."""

    def __init__(self, model, fn="fit", status=TrainerStatus.RUNNING, device="cuda") -> None:
        self.lightning_module = model
        self.state = SimpleNamespace(fn=fn, status=status)
        self.strategy = SimpleNamespace(root_device=torch.device(device))


def test_batches_are_compact_only_if_the_model_has_no_hook_for_them():
    class WithHook(GPT):
        def on_after_batch_transfer(self, batch, dataloader_idx): ...

    class WithIterator(GPT):
        def training_step(self, dataloader_iter): ...

    stem = {"vocab_size": 8, "max_length": 4, "embedding_dim": 4}
    model = GPT(stem, n_layers=0)
    assert sends_compact(OnAGpu(model))
    assert not sends_compact(OnAGpu(model, fn="validate"))
    assert not sends_compact(OnAGpu(model, status=TrainerStatus.FINISHED))
    assert not sends_compact(OnAGpu(model, device="cpu"))
    assert not sends_compact(OnAGpu(WithHook(stem, n_layers=0)))
    assert not sends_compact(OnAGpu(WithIterator(stem, n_layers=0)))
