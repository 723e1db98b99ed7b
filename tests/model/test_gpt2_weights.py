import json
import sys

import pytest
import torch

from lit_gptdata.model.gpt import GPT

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def reference():
    """A small GPT-2 of transformers whose tensors are all random, also the norms and biases."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(3)
    config = transformers.GPT2Config(
        vocab_size=61, n_positions=12, n_embd=24, n_layer=3, n_head=4, bos_token_id=0, eos_token_id=0
    )
    model = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


@pytest.fixture
def folder(reference, tmp_path):
    reference.save_pretrained(tmp_path)
    return tmp_path


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_tensors(folder, change):
    from safetensors.torch import load_file, save_file

    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


@pytest.mark.parametrize("prefix", ["transformer.", ""])
def test_from_gpt2_computes_the_logits_of_transformers(reference, tmp_path, prefix):
    names: list[str] = []
    (reference if prefix else reference.transformer).save_pretrained(tmp_path)
    edit_tensors(tmp_path, lambda tensors: names.extend(tensors))
    assert all(name.startswith("transformer.") == bool(prefix) for name in names)
    ids = torch.randint(61, (3, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = reference(ids).logits
    assert expected.std() > 1
    for path in (tmp_path, str(tmp_path / "model.safetensors")):
        model = GPT.from_gpt2(path, learning_rate=3e-4).eval()
        torch.testing.assert_close(model(ids), expected, rtol=0, atol=1e-4)
    assert model.hparams["n_layers"] == 3
    assert model.hparams["learning_rate"] == 3e-4
    assert GPT.from_gpt2(tmp_path, dropout=0.5).stem.dropout.p == 0.5


def test_from_gpt2_accepts_half_precision_masks_and_a_tied_head(folder, reference):
    def change_to_an_old_file(tensors):
        for name in list(tensors):
            tensors[name] = tensors[name].half()
        tensors["lm_head.weight"] = tensors["transformer.wte.weight"].clone()
        tensors["transformer.h.0.attn.bias"] = torch.ones(1, 1, 12, 12)
        tensors["transformer.h.0.attn.masked_bias"] = torch.tensor(-1e4)

    edit_tensors(folder, change_to_an_old_file)
    model = GPT.from_gpt2(folder).eval()
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    ids = torch.arange(12)[None]
    torch.testing.assert_close(model(ids), reference(ids).logits, rtol=0, atol=0.1)


@pytest.mark.parametrize(
    "change",
    [
        {"activation_function": "relu"},
        {"layer_norm_epsilon": 1e-6},
        {"scale_attn_by_inverse_layer_idx": True},
        {"scale_attn_weights": False},
        {"reorder_and_upcast_attn": True},
        {"add_cross_attention": True},
        {"tie_word_embeddings": False},
        {"n_inner": 7},
        {"model_type": "gpt_neo"},
    ],
)
def test_from_gpt2_names_an_unsupported_option(folder, change):
    edit_config(folder, **change)
    ((name, value),) = change.items()
    message = f"config.json has options .* not support: {name}={value!r} \\(allowed: "
    with pytest.raises(ValueError, match=message):
        GPT.from_gpt2(folder)


def test_from_gpt2_names_wrong_tensors(folder):
    def change(tensors):
        del tensors["transformer.h.1.ln_1.bias"]
        tensors["transformer.h.1.extra"] = torch.zeros(1)
        tensors["transformer.h.0.attn.c_attn.weight"] = torch.zeros(72, 24)

    edit_tensors(folder, change)
    with pytest.raises(ValueError, match=r"do not match its config\.json") as error:
        GPT.from_gpt2(folder)
    message = str(error.value)
    assert 'Missing key(s) in state_dict: "blocks.1.attention_norm.bias".' in message
    assert 'Unexpected key(s) in state_dict: "h.1.extra".' in message
    assert "size mismatch for blocks.0.attention.qkv.weight" in message


def test_from_gpt2_rejects_a_head_that_is_not_the_token_table(folder):
    edit_tensors(folder, lambda tensors: tensors.update({"lm_head.weight": torch.zeros(61, 24)}))
    with pytest.raises(ValueError, match=r"lm_head\.weight differs from wte\.weight"):
        GPT.from_gpt2(folder)


def test_from_gpt2_names_missing_parts(folder, tmp_path):
    edit_config(folder, n_head=None)
    with pytest.raises(ValueError, match="must have an integer for n_head"):
        GPT.from_gpt2(folder)
    (folder / "model.safetensors").write_bytes(b"short")
    edit_config(folder, n_head=4)
    with pytest.raises(ValueError, match="is truncated or not a safetensors file"):
        GPT.from_gpt2(folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match=r"is missing: .*'pytorch_model\.bin'.*hf download"):
        GPT.from_gpt2(folder)
    with pytest.raises(FileNotFoundError, match=r"the folder .* does not exist"):
        GPT.from_gpt2(tmp_path / "gpt2")


def test_from_gpt2_without_safetensors_names_the_extra(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ImportError, match=r"pip install 'lit-gptdata\[hf\]'"):
        GPT.from_gpt2(folder)
