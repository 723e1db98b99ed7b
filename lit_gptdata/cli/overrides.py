"""Build a command's data module from Hydra overrides, the same ones that train.py takes."""

from __future__ import annotations

import argparse
import math
import shlex
from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from lit_gptdata.datamodule import GPTDataModule


def add_overrides(parser: argparse.ArgumentParser, other_words: str = "") -> None:
    """Declare the argument `overrides`. `other_words`: help text on other words."""
    help_text = f"{other_words}Hydra overrides, such as data.max_length=128"
    parser.add_argument("overrides", nargs="*", metavar="override", help=help_text)


def compose_config(overrides: Sequence[str]) -> DictConfig:
    """conf/train.yaml, changed by the overrides."""
    from hydra import compose, initialize_config_dir

    from lit_gptdata.configs import conf_dir, register_resolvers, without_null_groups

    register_resolvers()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return compose("train", overrides=without_null_groups(overrides))


def build_data(overrides: Sequence[str]) -> GPTDataModule:
    """Build the data module of conf/train.yaml, changed by the overrides."""
    from hydra.utils import instantiate

    cfg = compose_config(overrides)
    if cfg.vocab_size is not None:
        command = f"run lit-gptdata train-tokenizer OUT.json vocab_size={cfg.vocab_size}"
        raise ValueError(f"vocab_size trains a tokenizer: {command}, then set data.tokenizer=OUT.json")
    return instantiate(cfg.data)  # type: ignore[no-any-return]


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
        raise RuntimeError(f"{error}. On the command line: {command}") from error
    return data
