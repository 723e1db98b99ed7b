"""Weights go to transformers and back, and both compute the same logits."""

import json

import pytest
import torch

from lit_gptdata import GPT, EmbeddingStem, Tokenizer
from tests.model.test_gpt2_weights import edit_tensors, random_gpt

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("one_thread")

IDS = torch.randint(61, (3, 12), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def reference():
    """A small GPT-2 of transformers whose tensors are all random, also the norms and biases."""
    torch.manual_seed(3)
    config = transformers.GPT2Config(
        vocab_size=61, n_positions=12, n_embd=24, n_layer=3, n_head=4, bos_token_id=0, eos_token_id=0
    )
    model = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


@torch.no_grad()
def assert_equal_logits(ours: GPT, theirs, ids: torch.Tensor = IDS, atol: float = 1e-5) -> None:
    expected = theirs.eval()(ids).logits
    assert expected.std() > 1
    torch.testing.assert_close(ours.eval()(ids), expected, rtol=0, atol=atol * float(expected.std()))


@pytest.mark.parametrize("prefix", ["transformer.", ""])
def test_from_gpt2_computes_the_logits_of_transformers(reference, tmp_path, prefix):
    names: list[str] = []
    (reference if prefix else reference.transformer).save_pretrained(tmp_path)
    edit_tensors(tmp_path, lambda tensors: names.extend(tensors))
    assert all(name.startswith("transformer.") == bool(prefix) for name in names)
    for path in (tmp_path, str(tmp_path / "model.safetensors")):
        model = GPT.from_gpt2(path, learning_rate=3e-4)
        assert_equal_logits(model, reference)
    assert model.hparams["n_layers"] == 3
    assert model.hparams["learning_rate"] == 3e-4
    assert GPT.from_gpt2(tmp_path, dropout=0.5).stem.dropout.p == 0.5


def test_from_gpt2_reads_the_three_shards_that_transformers_writes(reference, tmp_path):
    reference.save_pretrained(tmp_path, max_shard_size="40KB")
    shards = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert shards == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert_equal_logits(GPT.from_gpt2(tmp_path), reference)


def test_save_pretrained_writes_what_transformers_loads(tmp_path):
    model = random_gpt()
    model.save_pretrained(tmp_path)
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert type(loaded) is transformers.GPT2LMHeadModel
    assert_equal_logits(model, loaded)
    config = loaded.config
    assert (config.embd_pdrop, config.resid_pdrop, config.attn_pdrop) == (0.1, 0.2, 0.2)
    assert config.bos_token_id is None
    assert config.eos_token_id is None
    prompt, options = IDS[:, :4], {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    greedy = loaded.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
    assert torch.equal(greedy, model.generate(prompt, 6, temperature=0))


def test_weights_in_bfloat16_keep_their_dtype(tmp_path):
    model = random_gpt().bfloat16()
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert loaded.dtype == torch.bfloat16
    assert torch.equal(loaded.transformer.wte.weight, model.stem.token_embedding.weight)
    assert_equal_logits(model.float(), loaded.float())


def own_tokenizer(folder) -> str:
    """A tokenizer.json whose post-processor adds a token to each text."""
    from tokenizers import Tokenizer as Own
    from tokenizers import decoders, models, pre_tokenizers, processors, trainers

    own = Own(models.BPE())
    own.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=alphabet, special_tokens=["<s>", "</s>"], show_progress=False
    )
    own.train_from_iterator(["It was on a dreary night of November. "] * 20, trainer)
    own.decoder = decoders.ByteLevel()
    added = [("<s>", own.token_to_id("<s>"))]
    own.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=added)
    own.save(str(folder / "own.json"))
    return str(folder / "own.json")


@pytest.mark.parametrize("name", ["gpt2", "own"])
def test_auto_tokenizer_gives_the_ids_that_the_model_was_trained_on(name, tmp_path):
    tokenizer = Tokenizer("gpt2" if name == "gpt2" else own_tokenizer(tmp_path))
    stem = EmbeddingStem(tokenizer.vocab_size, max_length=64, embedding_dim=8)
    GPT(stem, n_layers=1, n_heads=1).save_pretrained(tmp_path / "new", tokenizer)
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path / "new")
    text = "It's 1818:\n\n\tno — é 語 🙂 \r\n   -----aaaa====    "
    ids = loaded(text)["input_ids"]
    assert ids == tokenizer.encode(text)
    assert loaded.decode(ids) == text
    assert loaded.eos_token_id == tokenizer.end_of_document
    assert loaded.model_max_length == 64
    config = json.loads((tmp_path / "new" / "config.json").read_text())
    assert config["eos_token_id"] == config["bos_token_id"] == tokenizer.end_of_document
