"""Build a command's data module from Hydra overrides, the same ones that train.py takes."""

from __future__ import annotations

import argparse
import difflib
import math
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from lit_gptdata.configs import conf_dir, quote_text, register_resolvers, shorten_warnings, similar_keys

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from lit_gptdata.datamodule import GPTDataModule


def add_overrides(parser: argparse.ArgumentParser, other_words: str = "") -> None:
    """Declare the argument `overrides`. `other_words`: help text on other words."""
    text = "a text (path, folder, glob, URL or name) and options, such as data.max_length=128"
    help_text = f"{other_words}{text}; lit-gptdata train --help describes them"
    parser.add_argument("overrides", nargs="*", metavar="TEXT or key=value", help=help_text)


def as_overrides(words: Sequence[str]) -> list[str]:
    """Options as Hydra takes them, and paths or URLs as data.corpus: ["books/"] → ["data=files", …].

    A word with a = is an option, unless it starts like a path, ./a=b.txt. `callbacks=null` becomes none;
    `data=null` becomes data=none, which Hydra refuses, with the choices.
    """
    texts = [word for word in words if _is_text(word)]
    groups = r"(callbacks|logger|data|stem|model|trainer)=null"
    options = [re.sub(f"^{groups}$", r"\1=none", word) for word in words if word not in texts]
    options = [word for word in options if word not in ("experiment=null", "debug=null")]
    if not texts:
        return options
    for word in options:
        if re.match(r"data=(?!files$|url$)|data\.corpus=", word):
            raise ValueError(f"{texts[0]} and {word} both name a text: leave one of them out")
    values = ",".join(map(quote_text, texts))
    return ["data=files", f"data.corpus={f'[{values}]' if len(texts) > 1 else values}", *options]


def split_options(words: Sequence[str], defaults: Mapping[str, Any]) -> tuple[list[str], dict[str, Any]]:
    """Separate a command's own options from the other words, and read them like Hydra.

    (["n=3", "books/"], {"n": 1}) → (["books/"], {"n": 3}).
    """
    from omegaconf import OmegaConf

    given = [word for word in words if "=" in word and word.partition("=")[0] in defaults]
    others = [word for word in words if word not in given]
    for word in others:
        name, is_option, _ = word.partition("=")
        if is_option and (near := difflib.get_close_matches(name, defaults, cutoff=0.8)):
            raise ValueError(f"{name}=… does not exist: did you mean {near[0]}=…?")
    read: Any = OmegaConf.to_container(OmegaConf.from_dotlist(given))
    return others, {**defaults, **read}


def _is_text(word: str) -> bool:
    """Whether a word is a path, a URL or the name of a text; raises ValueError if it is neither."""
    key, equals, _ = word.partition("=")
    if key.endswith(".ckpt"):
        raise ValueError(f"{word} is a checkpoint: only `lit-gptdata seen` and ckpt_path=… take one")
    if re.match(r"\.{0,2}/|~/|\w\w+://", word) or ("/" in key and Path(word).exists()):
        return True
    if equals or word.startswith(("+", "~")):
        return False
    from lit_gptdata.text.corpus import NAMED_URLS

    known = word in ("sample", "stdlib", *NAMED_URLS) or Path(word).exists()
    if not known and not re.search(r"[/*?[]", word):
        names = difflib.get_close_matches(word, NAMED_URLS)
        near = " or ".join([*names, *(f"{key}=…" for key in similar_keys(word))])
        hint = f"did you mean {near}?" if near else "options have the form key=value (--help)"
        raise ValueError(f"{word!r} is not an option, and no file or folder has this name: {hint}")
    return True


def compose_config(overrides: Sequence[str]) -> DictConfig:
    """conf/train.yaml, changed by the overrides."""
    from hydra import compose, initialize_config_dir

    register_resolvers()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return compose("train", overrides=as_overrides(overrides))


def build_data(overrides: Sequence[str]) -> GPTDataModule:
    """Build the data module of conf/train.yaml, changed by the overrides."""
    from hydra.utils import instantiate

    cfg = compose_config(overrides)
    if cfg.vocab_size is not None:
        command = f"run lit-gptdata train-tokenizer OUT.json vocab_size={cfg.vocab_size}"
        raise ValueError(f"vocab_size trains a tokenizer: {command}, then set data.tokenizer=OUT.json")
    data: GPTDataModule = instantiate(cfg.data)
    shorten_warnings()
    return data


def count_ranks(cfg: DictConfig) -> int:
    """The number of ranks of the Trainer, or 1 if the config has no number."""
    counts = (cfg.trainer.get("devices", 1), cfg.trainer.get("num_nodes", 1))
    return math.prod(n for n in counts if isinstance(n, int) and n > 0)


def budget_of(cfg: DictConfig, data: GPTDataModule) -> int | None:
    """The training tokens of a run, all ranks together; None: no limit."""
    if (steps := cfg.trainer.get("max_steps", -1)) == -1:
        return cast("int | None", cfg.max_tokens)
    batches = int(steps) * int(cfg.trainer.get("accumulate_grad_batches", 1)) * count_ranks(cfg)
    return batches * data.batch_size * data.max_length


def open_data(overrides: Sequence[str]) -> GPTDataModule:
    """Build the data module and open its tokens; an error about missing ones names the command."""
    data = build_data(overrides)
    try:
        data.setup()
    except (RuntimeError, OSError) as error:
        if "prepare_data()" not in str(error):
            raise
        command = shlex.join(["lit-gptdata", "prepare", *overrides])
        problem = str(error).partition(": call prepare_data()")[0]
        raise RuntimeError(f"{problem}. To tokenize it: {command}") from error
    return data
