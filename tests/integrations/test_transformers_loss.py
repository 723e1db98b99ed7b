"""With batch_format="hf", models of transformers compute our loss."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from lit_gptdata import GPT
from tests.runs import VOCABULARY, make_data, opened

transformers = pytest.importorskip("transformers")
SIZES = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
    "intermediate_size": 32, "vocab_size": VOCABULARY,
}  # fmt: skip


def gpt2_config() -> transformers.GPT2Config:
    return transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=8, vocab_size=VOCABULARY)


CONFIGS = {
    "GPT-2": gpt2_config,
    "Llama": lambda: transformers.LlamaConfig(**SIZES),
    "Qwen2": lambda: transformers.Qwen2Config(**SIZES),
}
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def batches(tmp_path_factory) -> list[dict[str, torch.Tensor]]:
    """A train batch, and the last val batch, whose last window is padded."""
    data = opened(make_data(tmp_path_factory.mktemp("words"), batch_format="hf"))
    last = list(data.val_dataloader())[-1]
    assert (last["shift_labels"] == -100).sum() > 0
    batches = [next(iter(data.train_dataloader())), last]
    # A small vocabulary, because float32 rounds a loss of 10.8 to 1e-6.
    return [{k: torch.where(v < 0, v, v % VOCABULARY) for k, v in batch.items()} for batch in batches]


def make_model(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[name]()).eval()
    with torch.no_grad():  # larger weights, so that the loss is not that of uniform logits
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


@pytest.mark.parametrize("name", CONFIGS)
def test_the_loss_of_transformers_is_ours(name, batches):
    model = make_model(name)
    for batch in batches:
        with torch.no_grad():
            output = model(**batch)
        ours = F.cross_entropy(output.logits.flatten(0, 1), batch["shift_labels"].flatten())
        assert output.loss.item() == pytest.approx(ours.item(), rel=0, abs=1e-6)


@pytest.mark.parametrize("name", CONFIGS)
def test_labels_alone_give_the_usual_loss_over_one_target_less(name, batches):
    model = make_model(name)
    for batch in batches:
        with torch.no_grad():
            output = model(input_ids=batch["input_ids"], labels=batch["labels"])
        logits, targets = output.logits[:, :-1], batch["shift_labels"][:, :-1].clone()
        targets[batch["labels"][:, 1:] == -100] = -100  # the last token before padding is not an input
        usual = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        assert output.loss.item() == pytest.approx(usual.item(), rel=0, abs=1e-6)


def test_our_gpt_has_the_same_loss_with_the_same_weights(batches, tmp_path):
    pytest.importorskip("safetensors")
    model = make_model("GPT-2")
    model.save_pretrained(tmp_path)
    ours = GPT.from_gpt2(tmp_path).eval()
    for batch in batches:
        with torch.no_grad():
            expected, nats = model(**batch).loss, ours.losses(batch)
        n_targets = (batch["shift_labels"] != -100).sum()
        assert (nats.sum() / n_targets).item() == pytest.approx(expected.item(), rel=0, abs=1e-6)


def test_targets_as_labels_are_shifted_twice(batches):
    model = make_model("GPT-2")
    batch = batches[0]
    with torch.no_grad():
        wrong = model(input_ids=batch["input_ids"], labels=batch["shift_labels"])
    twice = F.cross_entropy(wrong.logits[:, :-1].flatten(0, 1), batch["shift_labels"][:, 1:].flatten())
    assert wrong.loss.item() == pytest.approx(twice.item(), rel=0, abs=1e-6)
