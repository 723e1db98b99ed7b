"""Read Hugging Face's GPT-2 files (config.json, model.safetensors) as arguments and weights of our GPT.

The files are JSON and raw tensors, so nothing is unpickled. An option or a tensor that our GPT does not
compute in the same way is an error that names it.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor

# Options of transformers.GPT2Config that change the logits, with the only value that our GPT supports.
# It is also the default of GPT2Config, for a config.json without the key.
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
_HEAD = "lm_head.weight"

# Hugging Face's name → our name and the shape in the file.
_Expected = dict[str, tuple[str, tuple[int, ...]]]


def read_gpt2(path: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read a GPT-2 folder, or its .safetensors file: arguments of GPT, and weights under GPT's names.

    Raises FileNotFoundError if a file is missing, ValueError for an option, a tensor or a shape that our
    GPT does not support, and ImportError without the package safetensors.
    """
    weights_path, config_path = _find_files(Path(path))
    config = _read_config(config_path)
    stem = {
        "vocab_size": config["vocab_size"],
        "max_length": config["n_positions"],
        "embedding_dim": config["n_embd"],
    }
    arguments = {"stem": stem, "n_layers": config["n_layer"], "n_heads": config["n_head"]}
    return arguments, _read_tensors(weights_path, _expected_tensors(config))


def _find_files(path: Path) -> tuple[Path, Path]:
    weights = path if path.suffix == ".safetensors" else path / "model.safetensors"
    config = weights.with_name("config.json")
    for file in (config, weights):
        if file.is_file():
            continue
        folder = file.parent
        found = f"the folder {folder} does not exist"
        if folder.is_dir():
            found = f"the folder contains {sorted(entry.name for entry in folder.iterdir())}"
        raise FileNotFoundError(
            f"{file} is missing: {found}. GPT.from_gpt2 needs config.json and model.safetensors in one"
            " folder and does not read pickled .bin files. To download OpenAI's GPT-2: hf download"
            " openai-community/gpt2 config.json model.safetensors --local-dir gpt2"
        )
    return weights, config


def _read_config(path: Path) -> dict[str, Any]:
    config = json.loads(path.read_text(encoding="utf-8"))
    if missing := [name for name in _SIZES if not isinstance(config.get(name), int)]:
        raise ValueError(
            f"{path} must have an integer for {', '.join(missing)}: check that it describes a GPT-2"
        )
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


def _expected_tensors(config: dict[str, Any]) -> _Expected:
    D = config["n_embd"]
    tensors: _Expected = {
        "wte.weight": ("stem.token_embedding.weight", (config["vocab_size"], D)),
        "wpe.weight": ("stem.position_embedding.weight", (config["n_positions"], D)),
        "ln_f.weight": ("final_norm.weight", (D,)),
        "ln_f.bias": ("final_norm.bias", (D,)),
    }
    block = {
        "ln_1": ("attention_norm", (D,)),
        "attn.c_attn": ("attention.qkv", (D, 3 * D)),
        "attn.c_proj": ("attention.out", (D, D)),
        "ln_2": ("mlp_norm", (D,)),
        "mlp.c_fc": ("mlp.expand", (D, 4 * D)),
        "mlp.c_proj": ("mlp.contract", (4 * D, D)),
    }
    for i in range(config["n_layer"]):
        for theirs, (ours, shape) in block.items():
            tensors[f"h.{i}.{theirs}.weight"] = (f"blocks.{i}.{ours}.weight", shape)
            tensors[f"h.{i}.{theirs}.bias"] = (f"blocks.{i}.{ours}.bias", shape[-1:])
    return tensors


def _read_tensors(path: Path, expected: _Expected) -> dict[str, Tensor]:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError as error:
        raise ImportError(
            "GPT.from_gpt2 needs the package safetensors: pip install 'lit-gptdata[hf]'"
        ) from error
    try:
        # GPT2LMHeadModel saves the tensors of GPT2Model with "transformer." before their names.
        tensors = {k.removeprefix("transformer."): v for k, v in load_file(path).items()}
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated or not a safetensors file: {error}") from error

    # Old files also contain the causal mask, as h.<i>.attn.bias and h.<i>.attn.masked_bias.
    tensors = {k: v for k, v in tensors.items() if not k.endswith((".attn.bias", ".attn.masked_bias"))}
    head = tensors.pop(_HEAD, None)
    wrong_shapes = [
        f"{name} {tuple(tensors[name].shape)} instead of {shape}"
        for name, (_, shape) in expected.items()
        if name in tensors and tuple(tensors[name].shape) != shape
    ]
    problems = [
        *_list_names("missing", expected.keys() - tensors.keys()),
        *_list_names("unexpected", tensors.keys() - expected.keys()),
        *_list_names("shape does not match config.json", wrong_shapes),
    ]
    if not problems and head is not None and not head.equal(tensors["wte.weight"]):
        problems = [f"{_HEAD} differs from wte.weight, but our GPT uses one table for both"]
    if problems:
        raise ValueError(f"{path} does not match its config.json: {'; '.join(problems)}")
    return {
        # GPT-2's Conv1D stores matrices as (in, out), nn.Linear as (out, in); .t() keeps vectors.
        ours: tensors[theirs].t() if theirs.startswith("h.") else tensors[theirs]
        for theirs, (ours, _) in expected.items()
    }


def _list_names(problem: str, names: Iterable[str]) -> list[str]:
    """Return e.g. ["missing: a, b"] with at most five names, or [] without names."""
    names = sorted(names)
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return [f"{problem}: {', '.join(names[:5])}{more}"] if names else []
