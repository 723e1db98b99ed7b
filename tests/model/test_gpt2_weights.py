"""GPT-2 files: what is written is read back, and what is damaged or does not fit is refused by name."""

import functools
import json
import sys
from pathlib import Path

import pytest
import torch

from lit_gptdata.model.gpt import GPT
from lit_gptdata.model.gpt2_weights import INDEX, _hub_name
from lit_gptdata.model.stem import EmbeddingStem
from tests.hub_server import hub_server

pytest.importorskip("safetensors")
pytestmark = pytest.mark.usefixtures("one_thread")

IDS = torch.arange(12)[None]


def random_gpt() -> GPT:
    """A small GPT whose tensors are all random, also the norms and biases."""
    torch.manual_seed(3)
    stem = EmbeddingStem(vocab_size=61, max_length=12, embedding_dim=24, dropout=0.1)
    model = GPT(stem, n_layers=3, n_heads=4, dropout=0.2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model.eval()


@pytest.fixture(scope="module")
def model():
    return random_gpt()


@pytest.fixture
def folder(model, tmp_path):
    model.save_pretrained(tmp_path)
    return tmp_path


def assert_same_weights(loaded: GPT, model: GPT) -> None:
    expected = model.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_tensors(folder, change, file="model.safetensors"):
    from safetensors.torch import load_file, save_file

    path = folder / file
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def split_into_shards(folder: Path) -> list[str]:
    """Replace model.safetensors by three shards and their index; returns the names of the shards."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    shards = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    index = {name: shards[i % 3] for i, name in enumerate(tensors)}
    for shard in shards:
        save_file({name: tensors[name] for name in tensors if index[name] == shard}, folder / shard)
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": index}))
    return shards


def test_what_save_pretrained_writes_is_read_back_bit_for_bit(model, folder):
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    loaded = GPT.from_gpt2(folder, dropout=0.2)
    assert_same_weights(loaded, model)
    assert loaded.hparams["n_heads"] == 4
    model.save_pretrained(folder)  # over an earlier one
    assert_same_weights(GPT.from_gpt2(folder), model)


def test_save_pretrained_leaves_no_complete_folder_behind_when_it_fails(model, folder, monkeypatch):
    def full(path, content):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr("lit_gptdata.model.gpt2_weights.write_whole", full)
    with pytest.raises(OSError, match="No space left"):
        model.save_pretrained(folder)
    assert not (folder / "config.json").exists()


class OwnStem(EmbeddingStem):
    pass


class OwnHead(GPT):
    def _head(self, x):
        return super()._head(x) / 2


class TwoHeads(GPT):
    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.value = torch.nn.Linear(24, 1)


def small(kind=GPT, stem=EmbeddingStem, position="learned", n_layers=1):
    return kind(stem(61, 12, 24, position), n_layers=n_layers)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"position": "sinusoidal"}, "position='sinusoidal'$"),
        ({"position": "none"}, "position='none'$"),
        ({"n_layers": 0}, "n_layers=0"),
        ({"stem": OwnStem}, r"own code in stem \(OwnStem\)"),
        ({"kind": OwnHead}, r"own code in OwnHead\._head"),
        ({"kind": TwoHeads}, "the tensor value.weight; the tensor value.bias"),
    ],
)
def test_save_pretrained_names_what_gpt2_cannot_hold(options, problem, tmp_path):
    with pytest.raises(ValueError, match=f"GPT-2's architecture cannot hold this model: {problem}"):
        small(**options).save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_save_pretrained_warns_that_transformers_does_not_mask_documents(tmp_path):
    model = GPT(EmbeddingStem(61, 12, 24), 1, 2, document_mask=True, eot=60).eval()
    with pytest.warns(UserWarning, match=r"not mask documents: .*document_mask=True, eot=60\)"):
        model.save_pretrained(tmp_path)
    loaded = GPT.from_gpt2(tmp_path, document_mask=True, eot=60).eval()
    assert_same_weights(loaded, model)
    ids = IDS.clone()
    ids[0, 5] = 60
    assert torch.equal(loaded(ids), model(ids))
    plain = GPT.from_gpt2(tmp_path).eval()
    torch.testing.assert_close(plain(ids[:, 5:]), model(ids)[:, 5:])  # one document at a time


def test_save_pretrained_refuses_a_tokenizer_that_does_not_fit(model, tmp_path):
    with pytest.raises(ValueError, match="'gpt2' has 50,257 ids, but the model has vocab_size=61"):
        model.save_pretrained(tmp_path / "new", "gpt2")
    assert not (tmp_path / "new").exists()


def test_from_gpt2_reads_the_file_of_a_folder(model, folder):
    assert_same_weights(GPT.from_gpt2(folder / "model.safetensors"), model)


def test_from_gpt2_reads_shards(model, folder):
    split_into_shards(folder)
    loaded = GPT.from_gpt2(folder).eval()
    assert_same_weights(loaded, model)
    torch.testing.assert_close(loaded(IDS), model(IDS), rtol=0, atol=0)


def test_from_gpt2_names_a_shard_that_is_missing_or_damaged(folder):
    _, second, _ = split_into_shards(folder)
    name = next(k for k, v in read_index(folder).items() if v == second)

    def drop(tensors):
        del tensors[name]

    edit_tensors(folder, drop, second)
    with pytest.raises(ValueError, match=r"Missing key\(s\) in state_dict: "):
        GPT.from_gpt2(folder)
    (folder / second).write_bytes(b"short")
    with pytest.raises(ValueError, match=f"{second} is truncated or not a safetensors file"):
        GPT.from_gpt2(folder)
    (folder / second).unlink()
    with pytest.raises(FileNotFoundError, match=f"{second} is missing"):
        GPT.from_gpt2(folder)


def read_index(folder: Path) -> dict[str, str]:
    return json.loads((folder / INDEX).read_text())["weight_map"]


@pytest.mark.parametrize("shard", ["../secret.safetensors", "/etc/secret.safetensors", "a/b", "", 3])
def test_an_index_that_leaves_its_folder_is_refused(shard, folder):
    split_into_shards(folder)
    index = read_index(folder) | {"wte.weight": shard}
    (folder / INDEX).write_text(json.dumps({"weight_map": index}))
    with pytest.raises(ValueError, match=f"{INDEX} is not an index of files in its folder"):
        GPT.from_gpt2(folder)


@pytest.mark.parametrize("content", ["{", "[]", "{}"])
def test_a_damaged_index_or_config_is_named(content, folder):
    (folder / "config.json").write_text(content)
    with pytest.raises(ValueError, match=r"config\.json (is not a JSON object|must have an integer)"):
        GPT.from_gpt2(folder)
    split_into_shards(folder)
    (folder / INDEX).write_text(content)
    with pytest.raises(ValueError, match=INDEX):
        GPT.from_gpt2(folder)


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("gpt2", "hf://openai-community/gpt2"),
        ("gpt2-xl", "hf://openai-community/gpt2-xl"),
        ("openai-community/gpt2", "hf://openai-community/gpt2"),
        ("me/books@v1", "hf://me/books@v1"),
        ("hf://me/books@v1", "hf://me/books@v1"),
        ("here/books", ""),
        ("./gpt2", ""),
        ("../gpt2", ""),
        ("/gpt2", ""),
        ("a/b/c", ""),
        ("books", ""),
        (Path("me/books"), ""),
    ],
)
def test_a_name_on_the_hub_is_told_from_a_folder(path, name):
    Path("here/books").mkdir(parents=True)
    assert _hub_name(path) == name


def test_from_gpt2_downloads_only_the_files_that_it_needs(model, folder, tmp_path, monkeypatch):
    hub_package = pytest.importorskip("huggingface_hub")
    download = hub_package.snapshot_download
    shards = split_into_shards(folder)
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    files |= {"pytorch_model.bin": b"large", "onnx/model.safetensors": b"large"}
    with hub_server(files, kind="models") as hub:
        options = {"endpoint": hub.environ["HF_ENDPOINT"], "cache_dir": tmp_path / "cache"}
        monkeypatch.setattr(hub_package, "snapshot_download", functools.partial(download, **options))
        assert_same_weights(GPT.from_gpt2("me/books"), model)
        asked = {path.rpartition("/")[2] for path in hub.asked if "/resolve/" in path}
        assert asked == {"config.json", INDEX, *shards}
        with pytest.raises(ConnectionError, match=r"hf://me/nothing cannot be downloaded: .* HF_TOKEN"):
            GPT.from_gpt2("me/nothing")
    monkeypatch.setattr(hub_package.constants, "HF_HUB_OFFLINE", True)
    assert_same_weights(GPT.from_gpt2(f"me/books@{'a' * 40}"), model)


def test_from_gpt2_accepts_half_precision_masks_and_a_tied_head(folder, model):
    def change_to_an_old_file(tensors):
        for name in list(tensors):
            tensors[name] = tensors[name].half()
        tensors["lm_head.weight"] = tensors["transformer.wte.weight"].clone()
        tensors["transformer.h.0.attn.bias"] = torch.ones(1, 1, 12, 12)
        tensors["transformer.h.0.attn.masked_bias"] = torch.tensor(-1e4)

    edit_tensors(folder, change_to_an_old_file)
    loaded = GPT.from_gpt2(folder).eval()
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    torch.testing.assert_close(loaded(IDS), model(IDS), rtol=0, atol=0.1)


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
    with pytest.raises(FileNotFoundError, match=r"is missing, .* pickled \.bin files.*hf download"):
        GPT.from_gpt2(folder)
    with pytest.raises(FileNotFoundError, match=r"gpt2/config\.json is missing"):
        GPT.from_gpt2(tmp_path / "gpt2")


def test_from_gpt2_without_safetensors_names_the_extra(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ImportError, match=r"pip install 'lit-gptdata\[hf\]'"):
        GPT.from_gpt2(folder)
