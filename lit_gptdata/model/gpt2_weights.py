"""Read Hugging Face's GPT-2 files, JSON and raw tensors, as arguments and weights of our GPT."""

import json
import re
from pathlib import Path
from typing import Any

from torch import Tensor

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


def read_gpt2(path: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read a GPT-2 folder, or its .safetensors file: arguments of GPT, and weights under GPT's names.

    Raises FileNotFoundError, ImportError without the package safetensors, and ValueError for files that
    our GPT does not support. Nothing is unpickled.
    """
    weights = Path(path) if Path(path).suffix == ".safetensors" else Path(path, "model.safetensors")
    folder = weights.parent
    for file in (folder / "config.json", weights):
        if not file.is_file():
            found = f"the folder {folder} does not exist"
            if folder.is_dir():
                found = f"the folder contains {sorted(entry.name for entry in folder.iterdir())}"
            get = "hf download openai-community/gpt2 config.json model.safetensors --local-dir gpt2"
            problem = f"{file} is missing: {found}. GPT.from_gpt2 does not read pickled .bin files"
            raise FileNotFoundError(f"{problem}. Get GPT-2: {get}")
    config = _read_config(folder / "config.json")
    vocab_size, max_length, embedding_dim, n_layers, n_heads = (config[size] for size in _SIZES)
    stem = {"vocab_size": vocab_size, "max_length": max_length, "embedding_dim": embedding_dim}
    return {"stem": stem, "n_layers": n_layers, "n_heads": n_heads}, _read_tensors(weights)


def _read_config(path: Path) -> dict[str, Any]:
    config = json.loads(path.read_text(encoding="utf-8"))
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
    """Read the tensors of `path` under GPT's names; unknown tensors keep their names."""
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError as error:
        message = "GPT.from_gpt2 needs the package safetensors: pip install 'lit-gptdata[hf]'"
        raise ImportError(message) from error
    try:
        # GPT2LMHeadModel saves the tensors of GPT2Model with "transformer." before their names.
        tensors = {k.removeprefix("transformer."): v for k, v in load_file(path).items()}
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated or not a safetensors file: {error}") from error

    # Old files also contain the causal mask, as h.<i>.attn.bias and h.<i>.attn.masked_bias.
    tensors = {k: v for k, v in tensors.items() if not k.endswith((".attn.bias", ".attn.masked_bias"))}
    head, table = tensors.pop("lm_head.weight", None), tensors.get("wte.weight")
    if head is not None and table is not None and not head.equal(table):
        raise ValueError(f"{path}: lm_head.weight differs from wte.weight, but our GPT ties the two")
    # GPT-2's Conv1D stores matrices as (in, out), nn.Linear as (out, in).
    is_linear = {k: k.startswith("h.") and v.ndim == 2 for k, v in tensors.items()}
    return {_our_name(k): v.t() if is_linear[k] else v for k, v in tensors.items()}


def _our_name(name: str) -> str:
    """Translate e.g. "h.0.attn.c_attn.weight" to "blocks.0.attention.qkv.weight"."""
    if block := re.fullmatch(r"h\.(\d+)\.(.+)\.(weight|bias)", name):
        i, module, kind = block.groups()
        return f"blocks.{i}.{_BLOCK_MODULES.get(module, module)}.{kind}"
    module, _, kind = name.rpartition(".")
    return f"{_MODULES.get(module, module)}.{kind}"
