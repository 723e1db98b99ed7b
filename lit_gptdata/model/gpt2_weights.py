"""Read and write Hugging Face's GPT-2 files, JSON and raw tensors, as arguments and weights of our GPT.

config.json + model.safetensors, or model.safetensors.index.json + shards  ◄─►  GPT(**arguments), weights
"""

import json
import re
from functools import partial
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
_SIZES = ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head")

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

    `path`: a folder, its .safetensors file, or a name on the hub (see `GPT.from_gpt2`). Raises
    FileNotFoundError, ImportError without the package safetensors, ConnectionError for the hub, and
    ValueError for files that our GPT does not support. Nothing is unpickled.
    """
    folder = _download(name) if (name := _hub_name(path)) else Path(path)
    weights = folder / "model.safetensors"
    if folder.suffix == ".safetensors":
        weights, folder = folder, folder.parent
    elif not weights.exists() and (folder / INDEX).exists():
        weights = folder / INDEX
    for file in (folder / "config.json", weights):
        if not file.is_file():
            found = f"the folder {folder} does not exist"
            if folder.is_dir():
                found = f"{folder} has {sorted(each.name for each in folder.iterdir())}"
            get = "hf download openai-community/gpt2 config.json model.safetensors --local-dir gpt2"
            problem = f"{file} is missing: {found}. GPT.from_gpt2 does not read pickled .bin files"
            raise FileNotFoundError(f"{problem}. Get GPT-2: {get}")
    config = _read_config(folder / "config.json")
    vocab_size, max_length, embedding_dim, n_layers, n_heads = (config[size] for size in _SIZES)
    stem = {"vocab_size": vocab_size, "max_length": max_length, "embedding_dim": embedding_dim}
    tensors = _read_tensors(weights, _names(n_layers))
    return {"stem": stem, "n_layers": n_layers, "n_heads": n_heads}, tensors


def _hub_name(path: str | Path) -> str:
    """The hf:// name of a model; "" for a path."""
    name = re.sub("^(gpt2(-medium|-large|-xl)?)$", r"openai-community/\1", str(path))
    if name.startswith("hf://") or not isinstance(path, str) or Path(path).exists():
        return name if name.startswith("hf://") else ""
    return f"hf://{name}" if re.fullmatch(r"\w[\w.-]*/[\w.-]+(@[\w./-]+)?", name) else ""


def _download(name: str) -> Path:
    """The folder of a model on the hub in huggingface_hub's cache, with the files that it needs.

    All files are of one commit. Without a network, it is the commit that was downloaded last.
    """
    from lit_gptdata.tokens.libraries.hub import check_hub_name

    repository, revision = check_hub_name(name)
    hub = needs("huggingface_hub", "hf", name)
    try:
        config = Path(hub.hf_hub_download(repository, "config.json", revision=revision))
        get = partial(hub.hf_hub_download, repository, revision=config.parent.name)
        try:
            get("model.safetensors")
        except hub.errors.EntryNotFoundError:  # also without a network
            get(INDEX)
            shards = {*_read_index(config.with_name(INDEX)).values()}
            for shard in sorted(shards):
                get(shard)
    except Exception as error:  # of the package itself, of requests or of httpx, by its version
        if isinstance(error, ValueError) and INDEX in str(error):
            raise
        problem = f"{name} cannot be downloaded: {' '.join(str(error).split())}"
        hint = "check the name, the network and HF_TOKEN, or give a folder with the files"
        raise ConnectionError(f"{problem}. {hint}") from error
    return config.parent


def _read_index(path: Path) -> dict[str, str]:
    """Tensor → shard, a file in the folder of the index."""
    try:
        index = dict(json.loads(path.read_text(encoding="utf-8"))["weight_map"])
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(f"{path} is not an index of shards: {error!r}. Download it again") from None
    for tensor, shard in index.items():
        if not re.fullmatch(r"[^/\\]+\.safetensors", str(shard)):
            problem = f"{path} has {shard!r} as the shard of {tensor}"
            raise ValueError(f"{problem}: it must be a .safetensors file in the same folder")
    return index


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not a JSON file: {error}. Download it again") from None
    if missing := [name for name in _SIZES if not isinstance(config.get(name), int)]:
        names = ", ".join(missing)
        raise ValueError(f"{path} must have an integer for {names}: check that it describes a GPT-2")
    unsupported = [
        f"{name}={config[name]!r} (allowed: {value!r})"
        for name, value in _SUPPORTED.items()
        if config.get(name, value) != value
    ]
    if config.get("n_inner") not in (None, 4 * config["n_embd"]):
        unsupported.append(f"n_inner={config['n_inner']!r} (allowed: None or 4 × n_embd)")
    if unsupported:
        raise ValueError(f"{path} has options that our GPT does not support: {'; '.join(unsupported)}")
    return config  # type: ignore[no-any-return]


def _read_tensors(path: Path, names: dict[str, str]) -> dict[str, Tensor]:
    """Read a file, or the shards of an index, and rename the tensors by `names` if they are there."""
    safetensors = needs("safetensors", "hf", "GPT.from_gpt2")
    tensors: dict[str, Tensor] = {}
    shards: dict[Path, list[str]] = {} if path.name == INDEX else {path: []}  # []: all its tensors
    for name, in_file in (_read_index(path) if path.name == INDEX else {}).items():
        shards.setdefault(path.with_name(in_file), []).append(name)
    for shard, wanted in shards.items():
        if not shard.is_file():
            problem = f"{shard} is missing: by {INDEX} it has {wanted[0]} and others"
            raise FileNotFoundError(f"{problem}. Download it into this folder")
        try:
            with safetensors.safe_open(shard, framework="pt") as file:
                if missing := sorted({*wanted} - {*file.keys()}):
                    problem = f"{shard} lacks {', '.join(missing)}, which {INDEX} expects in it"
                    raise ValueError(f"{problem}: download both files again")
                tensors |= {name: file.get_tensor(name) for name in wanted or file.keys()}
        except safetensors.SafetensorError as error:
            raise ValueError(f"{shard} is truncated or not a safetensors file: {error}") from error

    # GPT2LMHeadModel saves the tensors of GPT2Model with "transformer." before their names.
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    # Old files also contain the causal mask, as h.<i>.attn.bias and h.<i>.attn.masked_bias.
    tensors = {k: v for k, v in tensors.items() if not k.endswith((".attn.bias", ".attn.masked_bias"))}
    head, table = tensors.pop("lm_head.weight", None), tensors.get("wte.weight")
    if head is not None and table is not None and not head.equal(table):
        raise ValueError(f"{path}: lm_head.weight differs from wte.weight, but our GPT ties the two")
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
    files: dict[str, bytes] = {}
    names = {ours: theirs for theirs, ours in _names(n_layers).items()}
    unknown = [name for name in weights if name not in names]
    position = getattr(stem, "position", None)
    problems = {
        f"own code in {', '.join(model._own_code)}": model._own_code,
        "n_layers=0, a model without a final norm (allowed: 1 or more)": not n_layers,
        f"the tensors {', '.join(unknown)}": unknown,
        f"position={position!r} (allowed: 'learned')": position != "learned",
    }
    if wrong := [problem for problem, found in problems.items() if found]:
        problem = f"GPT-2's architecture cannot hold this model: {wrong[0]}"
        raise ValueError(f"{problem}. Keep its checkpoint instead")
    block, dtype = model.blocks[0], stem.token_embedding.weight.dtype
    config = _SUPPORTED | {
        "architectures": ["GPT2LMHeadModel"], "torch_dtype": str(dtype).removeprefix("torch."),
        "vocab_size": stem.vocab_size, "n_positions": stem.max_length, "n_embd": stem.embedding_dim,
        "n_layer": n_layers, "n_head": block.attention.n_heads, "embd_pdrop": stem.dropout.p,
        "attn_pdrop": block.attention.dropout, "resid_pdrop": block.dropout.p,
        "bos_token_id": None, "eos_token_id": None,  # without them, transformers takes GPT-2's 50256
    }  # fmt: skip
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
