"""Read and write Hugging Face's GPT-2 files, JSON and raw tensors, as arguments and weights of our GPT.

config.json + model.safetensors, or model.safetensors.index.json + shards  ◄─►  GPT(**arguments), weights
"""

import json
import re
from pathlib import Path
from typing import Any

from torch import Tensor

from lit_gptdata._io import write_json, write_whole
from lit_gptdata.text.formats import needs

# Options of GPT2Config that change the logits → the only value that our GPT supports: the default.
_SUPPORTED = {
    "model_type": "gpt2",
    "activation_function": "gelu_new",  # GELU with tanh approximation
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "reorder_and_upcast_attn": False,
    "add_cross_attention": False,
    "tie_word_embeddings": True,
}
# Sizes in GPT2Config → ours.
_SIZES = {
    "vocab_size": "vocab_size", "n_positions": "max_length", "n_embd": "embedding_dim",
    "n_layer": "n_layers", "n_head": "n_heads",
}  # fmt: skip

# Hugging Face's module → ours, outside of and inside of the blocks.
_MODULES = {"wte": "stem.token_embedding", "wpe": "stem.position_embedding", "ln_f": "final_norm"}
_BLOCK_MODULES = {
    "ln_1": "attention_norm",
    "attn.c_attn": "attention.qkv",
    "attn.c_proj": "attention.out",
    "ln_2": "mlp_norm",
    "mlp.c_fc": "mlp.expand",
    "mlp.c_proj": "mlp.contract",
}
INDEX = "model.safetensors.index.json"  # which shard has which tensor


def read_gpt2(path: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read a GPT-2: arguments of GPT, and weights under GPT's names.

    `path`: a folder, its model.safetensors, or a name on the hub (see `GPT.from_gpt2`). Raises
    FileNotFoundError, ImportError without the package safetensors, ConnectionError for the hub, and
    ValueError for files that our GPT does not support. Nothing is unpickled.
    """
    folder = _download(name) if (name := _hub_name(path)) else Path(path)
    folder = folder.parent if folder.name == "model.safetensors" else folder
    weights, index = folder / "model.safetensors", folder / INDEX
    files = _shards(index) if index.exists() and not weights.exists() else [weights]
    for file in (folder / "config.json", *files):
        if not file.is_file():
            get = "hf download openai-community/gpt2 config.json model.safetensors --local-dir gpt2"
            problem = f"{file} is missing, and GPT.from_gpt2 does not read pickled .bin files"
            raise FileNotFoundError(f"{problem}. Get GPT-2: {get}")
    config = _read_config(folder / "config.json")
    sizes = {ours: config[theirs] for theirs, ours in _SIZES.items()}
    stem = {name: sizes.pop(name) for name in ("vocab_size", "max_length", "embedding_dim")}
    return {"stem": stem, **sizes}, _read_tensors(files, _names(sizes["n_layers"]))


def _hub_name(path: str | Path) -> str:
    """The hf:// name of a model; "" for a path."""
    name = re.sub("^(gpt2(-medium|-large|-xl)?)$", r"openai-community/\1", str(path))
    if name.startswith("hf://") or not isinstance(path, str) or Path(path).exists():
        return name if name.startswith("hf://") else ""
    return f"hf://{name}" if re.fullmatch(r"\w[\w.-]*/[\w.-]+(@[\w./-]+)?", name) else ""


def _download(name: str) -> Path:
    """The folder of one commit in huggingface_hub's cache; without a network, the one it had last."""
    from lit_gptdata.tokens.libraries.hub import check_hub_name

    repository, revision = check_hub_name(name)
    hub = needs("huggingface_hub", "hf", name)
    files = ["config.json", "model.safetensors", INDEX, "model-*-of-*.safetensors"]
    try:
        return Path(hub.snapshot_download(repository, revision=revision, allow_patterns=files))
    except Exception as error:  # of the package itself, of requests or of httpx, by its version
        problem = f"{name} cannot be downloaded: {' '.join(str(error).split())}"
        hint = "check the name, the network and HF_TOKEN, or give a folder with the files"
        raise ConnectionError(f"{problem}. {hint}") from error


def _shards(index: Path) -> list[Path]:
    """The files of an index, which maps each tensor to the name of a file in the same folder."""
    try:
        names = {*json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()}
        return [index.with_name(name) for name in sorted(names)]  # ValueError for another folder
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        problem = f"{index} is not an index of files in its folder: {error!r}"
        raise ValueError(f"{problem}. Download it again") from None


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is not a JSON object: {error}. Download it again") from None
    if missing := [name for name in _SIZES if not isinstance(config.get(name), int)]:
        names = ", ".join(missing)
        raise ValueError(f"{path} must have an integer for {names}: check that it describes a GPT-2")
    allowed = _SUPPORTED | {"n_inner": 4 * config["n_embd"]}
    config["n_inner"] = config.get("n_inner") or allowed["n_inner"]  # null: the default
    wrong = {name: value for name, value in allowed.items() if config.get(name, value) != value}
    if wrong:
        options = "; ".join(f"{n}={config[n]!r} (allowed: {value!r})" for n, value in wrong.items())
        raise ValueError(f"{path} has options that our GPT does not support: {options}")
    return config


def _read_tensors(files: list[Path], names: dict[str, str]) -> dict[str, Tensor]:
    """Read all tensors of files, and rename them by `names` if they are there."""
    safetensors = needs("safetensors", "hf", "GPT.from_gpt2")
    from safetensors.torch import load_file

    tensors: dict[str, Tensor] = {}
    for file in files:
        try:
            tensors |= load_file(file)
        except safetensors.SafetensorError as error:
            raise ValueError(f"{file} is truncated or not a safetensors file: {error}") from error
    # GPT2LMHeadModel saves the tensors of GPT2Model with "transformer." before their names.
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    # Old files also contain the causal mask, as h.<i>.attn.bias and h.<i>.attn.masked_bias.
    tensors = {k: v for k, v in tensors.items() if not k.endswith((".attn.bias", ".attn.masked_bias"))}
    head, table = tensors.pop("lm_head.weight", None), tensors.get("wte.weight")
    if head is not None and table is not None and not head.equal(table):
        raise ValueError(f"{files[0]}: lm_head.weight differs from wte.weight, but our GPT ties the two")
    return {names.get(name, name): _turned(name, tensor) for name, tensor in tensors.items()}


def _turned(name: str, tensor: Tensor) -> Tensor:
    """GPT-2's Conv1D stores matrices as (in, out), nn.Linear as (out, in)."""
    return tensor.t() if tensor.ndim == 2 and name.startswith("h.") else tensor


def _names(n_layers: int) -> dict[str, str]:
    """Hugging Face's names of tensors → ours: "h.0.attn.c_attn.bias" → "blocks.0.attention.qkv.bias"."""
    modules = dict(_MODULES)
    for i in range(n_layers):
        modules |= {f"h.{i}.{theirs}": f"blocks.{i}.{ours}" for theirs, ours in _BLOCK_MODULES.items()}
    kinds = ("weight", "bias")
    return {f"{theirs}.{k}": f"{ours}.{k}" for theirs, ours in modules.items() for k in kinds}


def write_gpt2(folder: Path, model: Any, weights: dict[str, Tensor], tokenizer: Any) -> None:
    """Write config.json, model.safetensors and the files of the tokenizer; see `GPT.save_pretrained`.

    config.json comes last, so that a folder without it is not complete.
    """
    save = needs("safetensors.torch", "hf", "GPT.save_pretrained").save
    stem, n_layers = model.stem, len(model.blocks)
    names = {ours: theirs for theirs, ours in _names(n_layers).items()}
    problems = [f"own code in {name}" for name in model._own_code]
    problems += [] if n_layers else ["n_layers=0"]
    problems += [f"the tensor {name}" for name in weights if name not in names]
    if (position := getattr(stem, "position", None)) != "learned":
        problems.append(f"position={position!r}")
    if problems:
        raise ValueError(f"GPT-2's architecture cannot hold this model: {'; '.join(problems)}")
    block, dtype = model.blocks[0], stem.token_embedding.weight.dtype
    config = _SUPPORTED | {
        "architectures": ["GPT2LMHeadModel"], "torch_dtype": str(dtype).removeprefix("torch."),
        "vocab_size": stem.vocab_size, "n_positions": stem.max_length, "n_embd": stem.embedding_dim,
        "n_layer": n_layers, "n_head": block.attention.n_heads, "embd_pdrop": stem.dropout.p,
        "attn_pdrop": block.attention.dropout, "resid_pdrop": block.dropout.p,
        "bos_token_id": None, "eos_token_id": None,  # without them, transformers takes GPT-2's 50256
    }  # fmt: skip
    files: dict[str, bytes] = {}
    if tokenizer is not None:
        from lit_gptdata.tokens.libraries.files import transformers_files

        files, ids = transformers_files(tokenizer, stem.vocab_size, stem.max_length)
        config |= ids
    tensors = {
        f"transformer.{names[ours]}": _turned(names[ours], tensor).contiguous().cpu()
        for ours, tensor in weights.items()
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").unlink(missing_ok=True)
    write_whole(folder / "model.safetensors", save(tensors, {"format": "pt"}))
    for name, content in files.items():
        write_whole(folder / name, content)
    write_json(folder / "config.json", config)
