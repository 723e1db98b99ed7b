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
from lit_gptdata.model.block import NORM_EPS

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
    return {"stem": stem, "n_layers": n_layers, "n_heads": n_heads}, _read_tensors(weights)


def _hub_name(path: str | Path) -> str:
    """The hf:// name of a model; "" for a path."""
    if not isinstance(path, str) or path.startswith("hf://") or Path(path).exists():
        return path if str(path).startswith("hf://") else ""
    if re.fullmatch("gpt2(-medium|-large|-xl)?", path):
        return f"hf://openai-community/{path}"
    return f"hf://{path}" if re.fullmatch(r"\w[\w.-]*/[\w.-]+(@[\w./-]+)?", path) else ""


def _download(name: str) -> Path:
    """The folder of a model on the hub in huggingface_hub's cache, with the files that it needs.

    A branch is resolved once, so that all files are of one commit. Without a network, the commit that
    was downloaded last is used.
    """
    from lit_gptdata.text.formats import needs
    from lit_gptdata.tokens.libraries.hub import check_hub_name

    repository, revision = check_hub_name(name)
    hub = needs("huggingface_hub", "hf", name)
    try:
        config = Path(hub.hf_hub_download(repository, "config.json", revision=revision))
        get = partial(hub.hf_hub_download, repository, revision=config.parent.name)
        try:
            get("model.safetensors")
        except hub.errors.EntryNotFoundError:  # also without a network
            index = Path(get(INDEX))
            shards = sorted({*_read_index(index).values()})
            for shard in shards:
                get(shard)
    except Exception as error:  # of the package itself, of requests or of httpx, by its version
        if isinstance(error, ValueError) and INDEX in str(error):
            raise
        problem = f"{name} cannot be downloaded: {' '.join(str(error).split())}"
        hint = "check the name, the network and HF_TOKEN, or give a folder with the files"
        raise ConnectionError(f"{problem}. {hint}") from error
    return config.parent


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not a JSON file: {error}. Download it again") from None


def _read_index(path: Path) -> dict[str, str]:
    """Tensor → shard, a file in the folder of the index."""
    values = _read_json(path)
    index = values.get("weight_map") if isinstance(values, dict) else None
    if not isinstance(index, dict) or not index:
        raise ValueError(
            f"{path} must have a weight_map with the shard of each tensor: download it again"
        )
    for tensor, shard in index.items():
        if not re.fullmatch(r"[^/\\]+\.safetensors", str(shard)):
            problem = f"{path} has {shard!r} as the shard of {tensor}"
            raise ValueError(f"{problem}: it must be a .safetensors file in the same folder")
    return index


def _read_config(path: Path) -> dict[str, Any]:
    config = _read_json(path)
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


def _read_tensors(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a file, or of the shards of an index, under GPT's names.

    Unknown tensors keep their names.
    """
    shards: dict[Path, list[str]] = {path: []}  # shard → its tensors; []: all of them
    if path.name == INDEX:
        shards = {}
        for tensor, shard in _read_index(path).items():
            shards.setdefault(path.with_name(shard), []).append(tensor)
    found: dict[str, Tensor] = {}
    for file, names in shards.items():
        if not file.is_file():
            problem = f"{file} is missing: by {path.name} it has {names[0]} and others"
            raise FileNotFoundError(f"{problem}. Download it into this folder")
        found |= _load(file, names)
    # GPT2LMHeadModel saves the tensors of GPT2Model with "transformer." before their names.
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in found.items()}

    # Old files also contain the causal mask, as h.<i>.attn.bias and h.<i>.attn.masked_bias.
    tensors = {k: v for k, v in tensors.items() if not k.endswith((".attn.bias", ".attn.masked_bias"))}
    head, table = tensors.pop("lm_head.weight", None), tensors.get("wte.weight")
    if head is not None and table is not None and not head.equal(table):
        raise ValueError(f"{path}: lm_head.weight differs from wte.weight, but our GPT ties the two")
    # GPT-2's Conv1D stores matrices as (in, out), nn.Linear as (out, in).
    is_linear = {k: k.startswith("h.") and v.ndim == 2 for k, v in tensors.items()}
    return {_our_name(k): v.t() if is_linear[k] else v for k, v in tensors.items()}


def _load(path: Path, names: list[str]) -> dict[str, Tensor]:
    """The tensors `names` of a safetensors file; [] are all of them."""
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        message = "GPT.from_gpt2 needs the package safetensors: pip install 'lit-gptdata[hf]'"
        raise ImportError(message) from error
    try:
        with safe_open(path, framework="pt") as file:
            if missing := [name for name in names if name not in file.keys()]:  # noqa: SIM118
                problem = f"{path} lacks {', '.join(missing)}, which {INDEX} expects in it"
                raise ValueError(f"{problem}: download both files again")
            return {name: file.get_tensor(name) for name in names or file.keys()}
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated or not a safetensors file: {error}") from error


def _our_name(name: str) -> str:
    """Translate e.g. "h.0.attn.c_attn.weight" to "blocks.0.attention.qkv.weight"."""
    if block := re.fullmatch(r"h\.(\d+)\.(.+)\.(weight|bias)", name):
        i, module, kind = block.groups()
        return f"blocks.{i}.{_BLOCK_MODULES.get(module, module)}.{kind}"
    module, _, kind = name.rpartition(".")
    return f"{_MODULES.get(module, module)}.{kind}"


def write_gpt2(folder: Path, model: Any, weights: dict[str, Tensor], tokenizer: Any) -> None:
    """Write config.json, model.safetensors and the files of the tokenizer; see `GPT.save_pretrained`.

    config.json comes last, so that a folder without it is not complete.
    """
    try:
        from safetensors.torch import save
    except ImportError as error:
        message = "GPT.save_pretrained needs the package safetensors: pip install 'lit-gptdata[hf]'"
        raise ImportError(message) from error
    stem, tensors, unknown = model.stem, {}, []
    wrong = [f"own code in {each}" for each in model._own_code]
    if not wrong and stem.position != "learned":
        wrong.append(f"position={stem.position!r} (allowed: 'learned')")
    if not len(model.blocks):
        wrong.append("n_layers=0, a model without a final norm (allowed: 1 or more)")
    for name, tensor in weights.items():
        their, is_linear = _their_name(name), name.startswith("blocks.") and tensor.ndim == 2
        unknown += [] if their else [name]
        tensors[f"transformer.{their}"] = (tensor.t() if is_linear else tensor).contiguous().cpu()
    if unknown and not wrong:
        wrong.append(f"the tensors {', '.join(unknown)}")
    if wrong:
        problem = f"GPT-2's architecture cannot hold this model: {'; '.join(wrong)}"
        raise ValueError(f"{problem}. Keep its checkpoint instead")
    block = model.blocks[0]
    config = _SUPPORTED | {
        "architectures": ["GPT2LMHeadModel"],
        "vocab_size": stem.vocab_size, "n_positions": stem.max_length, "n_embd": stem.embedding_dim,
        "n_layer": len(model.blocks), "n_head": block.attention.n_heads, "n_inner": None,
        "embd_pdrop": stem.dropout.p, "resid_pdrop": block.dropout.p,
        "attn_pdrop": block.attention.dropout, "layer_norm_epsilon": NORM_EPS,
        "bos_token_id": None, "eos_token_id": None,  # without them, transformers takes GPT-2's 50256
        "torch_dtype": str(stem.token_embedding.weight.dtype).removeprefix("torch."),
    }  # fmt: skip
    files: dict[str, bytes] = {}
    if tokenizer is not None:
        from lit_gptdata.tokens.libraries.files import transformers_files

        files, ids = transformers_files(tokenizer, stem.vocab_size, stem.max_length)
        config |= ids
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").unlink(missing_ok=True)
    write_whole(folder / "model.safetensors", save(tensors, {"format": "pt"}))
    for name, content in files.items():
        write_whole(folder / name, content)
    write_json(folder / "config.json", config)


def _their_name(name: str) -> str:
    """The inverse of `_our_name`; "" for a tensor that GPT-2 does not have."""
    module, _, kind = name.rpartition(".")
    block = re.fullmatch(r"blocks\.(\d+)\.(.+)", module)
    names = {ours: theirs for theirs, ours in (_BLOCK_MODULES if block else _MODULES).items()}
    if (found := names.get(block[2] if block else module)) is None:
        return ""
    return f"h.{block[1]}.{found}.{kind}" if block else f"{found}.{kind}"
