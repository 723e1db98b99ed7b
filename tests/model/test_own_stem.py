"""Stems of your own in GPT: what they need, and how a checkpoint keeps them."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

from lit_gptdata import GPT, EmbeddingStem
from tests.model.small_gpt import MAX_LENGTH, D, SmallData, V
from tests.runs import make_trainer

pytestmark = pytest.mark.usefixtures("one_thread")


class Scaled(EmbeddingStem):
    """A subclass that keeps its own argument for checkpoints."""

    def __init__(self, vocab_size: int, max_length: int, embedding_dim: int, scale: float) -> None:
        super().__init__(vocab_size, max_length, embedding_dim, position="none")
        self.save_hyperparameters({"scale": scale})
        self.scale = scale

    def forward(self, ids, positions=None):
        return self.scale * super().forward(ids, positions)


class Forgets(Scaled):
    """A subclass that keeps no `shift` for checkpoints."""

    def __init__(self, shift: float = 0.0, **options) -> None:
        super().__init__(**options)
        self.shift = shift


class Same(EmbeddingStem):
    """A subclass with the same arguments."""


class Plain(nn.Module):
    """A module without hyperparameters, whose forward takes no positions."""

    max_length, embedding_dim = MAX_LENGTH, D

    def __init__(self) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(V, D)

    def forward(self, ids):
        return self.token_embedding(ids)


SIZES = {"vocab_size": V, "max_length": MAX_LENGTH, "embedding_dim": D}


def saved(stem: nn.Module, path) -> GPT:
    """Fit a model with a stem, and save it."""
    trainer = make_trainer(max_steps=2)
    trainer.fit(model := GPT(stem, n_layers=1, n_heads=2), SmallData())
    trainer.save_checkpoint(path)
    return model


@pytest.mark.parametrize("make", [lambda: Scaled(**SIZES, scale=3.0), lambda: Same(**SIZES), Plain])
def test_a_checkpoint_gives_back_the_class_and_the_arguments_of_a_stem(tmp_path, make):
    model = saved(make(), path := tmp_path / "a.ckpt")
    assert torch.load(path, weights_only=True)["hyper_parameters"]["stem"]["_target_"].startswith(
        "tests."
    )
    loaded = GPT.load_from_checkpoint(path, weights_only=True).eval()
    assert type(loaded.stem) is type(model.stem)
    ids = torch.randint(V, (2, MAX_LENGTH))
    assert torch.equal(loaded(ids), model.eval()(ids))
    assert loaded.hparams == model.hparams


def test_a_stem_that_cannot_be_rebuilt_is_refused_by_name_and_can_be_passed(tmp_path, monkeypatch):
    model = saved(Forgets(**SIZES, scale=2.0, shift=1.0), path := tmp_path / "a.ckpt")
    name = rf"the stem of the checkpoint is {__name__}.Forgets: "
    with pytest.raises(
        ValueError, match=f"{name}the checkpoint does not contain its shift. Pass stem=…"
    ):
        GPT.load_from_checkpoint(path, weights_only=True)
    loaded = GPT.load_from_checkpoint(path, stem=Forgets(**SIZES, scale=2.0), weights_only=True)
    assert torch.equal(loaded.stem.token_embedding.weight, model.stem.token_embedding.weight)
    with pytest.raises(ValueError, match=r"stem._target_ was 'tests.*Forgets', now 'EmbeddingStem'"):
        GPT(EmbeddingStem(**SIZES)).on_load_checkpoint(torch.load(path, weights_only=True))
    monkeypatch.delitem(sys.modules, __name__)  # loading a checkpoint imports nothing
    with pytest.raises(ValueError, match=f"{name}import {__name__} before you load it, or pass stem=…"):
        GPT.load_from_checkpoint(path, weights_only=True)


def test_a_checkpoint_builds_no_class_that_is_not_a_module():
    with pytest.raises(ValueError, match=r"the stem of the checkpoint is subprocess.Popen: import"):
        GPT({"_target_": "subprocess.Popen", "args": "false"})


@pytest.mark.parametrize(
    ("stem", "lacks"),
    [
        (nn.Embedding(V, D), "Embedding without max_length, token_embedding.weight"),
        (nn.Identity(), "Identity without max_length, embedding_dim, token_embedding.weight"),
        (3, "int without max_length, embedding_dim, token_embedding.weight"),
    ],
)
def test_a_module_that_cannot_be_the_stem_is_refused_by_what_it_lacks(stem, lacks):
    with pytest.raises(TypeError, match=f"stem must be an EmbeddingStem .*, got {lacks}"):
        GPT(stem)


def test_a_frozen_stem_does_not_train_and_stays_frozen_in_checkpoints(tmp_path):
    stem = EmbeddingStem(**SIZES, freeze=True)
    before = {name: tensor.clone() for name, tensor in stem.state_dict().items()}
    model = saved(stem, path := tmp_path / "a.ckpt")
    assert all(torch.equal(tensor, before[name]) for name, tensor in stem.state_dict().items())
    optimizer = model.trainer.optimizers[0]
    trained = {p for group in optimizer.param_groups for p in group["params"]}
    assert trained == {p for name, p in model.named_parameters() if not name.startswith("stem.")}
    loaded = GPT.load_from_checkpoint(path, weights_only=True)
    assert loaded.hparams["stem"]["freeze"] is True
    assert not any(p.requires_grad for p in loaded.stem.parameters())
    GPT.load_from_checkpoint(path, stem=EmbeddingStem(**SIZES), weights_only=True)  # to train all of it
    assert "freeze" not in EmbeddingStem(**SIZES).hparams  # older versions load the checkpoint
    with pytest.raises(TypeError, match="freeze must be true or false, got 1"):
        EmbeddingStem(**SIZES, freeze=1)
