"""Hugging Face's GPT-2 files (config.json, model.safetensors) in the words of our GPT.

The files are JSON and raw tensors: nothing is unpickled. Whatever our GPT does not compute the same
way is refused by name.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor

# The options of transformers.GPT2Config that change the logits, each with the one value that our
# GPT computes, which is also the value that a config.json without the key stands for.
_COMPUTED = {
    "model_type": "gpt2",
    "activation_function": "gelu_new",  # GELU's tanh form
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "reorder_and_upcast_attn": False,
    "add_cross_attention": False,
    "tie_word_embeddings": True,
}
_SIZES = ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head")
_HEAD = "lm_head.weight"


def read_gpt2(path: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A GPT-2 folder (or its .safetensors file) → arguments for GPT, tensors under GPT's names.

    FileNotFoundError: a file is not there. ValueError: an option, a tensor or a shape that does not
    fit. ImportError: without safetensors.
    """
    weights_path, config_path = _find(Path(path))
    config = _read_config(config_path)
    arguments = {
        "stem": {
            "vocab_size": config["vocab_size"],
            "max_length": config["n_positions"],
            "embedding_dim": config["n_embd"],
        },
        "n_layers": config["n_layer"],
        "n_heads": config["n_head"],
    }
    return arguments, _read_tensors(weights_path, _expected(config))


def _find(path: Path) -> tuple[Path, Path]:
    weights = path if path.suffix == ".safetensors" else path / "model.safetensors"
    config = weights.with_name("config.json")
    for file in (config, weights):
        if file.is_file():
            continue
        folder = file.parent
        seen = f"there is no folder {folder}"
        if folder.is_dir():
            seen = f"the folder holds {sorted(entry.name for entry in folder.iterdir())}"
        raise FileNotFoundError(
            f"{file} is missing: {seen}. A GPT-2 is read from config.json and model.safetensors"
            " side by side, never from a pickled .bin; OpenAI's own: hf download"
            " openai-community/gpt2 config.json model.safetensors --local-dir gpt2"
        )
    return weights, config


def _read_config(path: Path) -> dict[str, Any]:
    config = json.loads(path.read_text(encoding="utf-8"))
    if absent := [name for name in _SIZES if not isinstance(config.get(name), int)]:
        raise ValueError(f"{path} gives no number for {', '.join(absent)}: is it a GPT-2's?")
    refused = [
        f"{name}={config[name]!r} (only {value!r})"
        for name, value in _COMPUTED.items()
        if config.get(name, value) != value
    ]
    if config.get("n_inner") not in (None, 4 * config["n_embd"]):
        refused.append(f"n_inner={config['n_inner']!r} (only None or 4 × n_embd)")
    if refused:
        raise ValueError(f"{path} asks for what our GPT does not compute: {'; '.join(refused)}")
    return config  # type: ignore[no-any-return]


def _expected(config: dict[str, Any]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Hugging Face's name → our name and the shape in the file."""
    D = config["n_embd"]
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {
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


def _read_tensors(path: Path, expected: dict[str, tuple[str, tuple[int, ...]]]) -> dict[str, Tensor]:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError as error:
        raise ImportError(
            "GPT.from_gpt2 reads .safetensors files with the package safetensors, which is not"
            " installed: pip install 'lit-gptdata[hf]'"
        ) from error
    try:
        # GPT2LMHeadModel puts "transformer." before the names that GPT2Model writes plainly.
        found = {k.removeprefix("transformer."): v for k, v in load_file(path).items()}
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from error

    # Old files also carry the causal mask, as h.<i>.attn.bias and h.<i>.attn.masked_bias.
    found = {k: v for k, v in found.items() if not k.endswith((".attn.bias", ".attn.masked_bias"))}
    head = found.pop(_HEAD, None)
    problems = [
        *_listing("missing", expected.keys() - found.keys()),
        *_listing("unexpected", found.keys() - expected.keys()),
        *_listing(
            "of another shape than config.json says",
            (
                f"{name} {tuple(found[name].shape)} (not {shape})"
                for name, (_, shape) in expected.items()
                if name in found and tuple(found[name].shape) != shape
            ),
        ),
    ]
    if not problems and head is not None and not head.equal(found["wte.weight"]):
        problems = [f"{_HEAD} differs from wte.weight, but our GPT's head is the token table"]
    if problems:
        raise ValueError(f"{path} does not hold this GPT-2: {'; '.join(problems)}")
    return {
        # Conv1D keeps its matrices (in, out), nn.Linear (out, in); the tables are not turned.
        ours: found[theirs].t() if theirs.startswith("h.") else found[theirs]
        for theirs, (ours, _) in expected.items()
    }


def _listing(what: str, names: Iterable[str]) -> list[str]:
    """["missing: a, b"], or [] for no names; a long list is cut after five."""
    names = sorted(names)
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return [f"{what}: {', '.join(names[:5])}{more}"] if names else []
