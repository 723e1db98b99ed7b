"""Build a command's data module from Hydra overrides, the same ones that train.py takes."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lit_gptdata.datamodule import GPTDataModule


def add_overrides(parser: argparse.ArgumentParser, other_words: str = "") -> None:
    """Declare the argument `overrides`. `other_words`: help text on other words."""
    help_text = f"{other_words}Hydra overrides, such as data.max_length=128"
    parser.add_argument("overrides", nargs="*", metavar="override", help=help_text)


def build_data(overrides: Sequence[str]) -> GPTDataModule:
    """Build the data module of conf/train.yaml, changed by the overrides."""
    from hydra import compose, initialize_config_dir
    from hydra.utils import instantiate

    from lit_gptdata.configs import conf_dir, register_resolvers, without_null_groups

    register_resolvers()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        cfg = compose("train", overrides=without_null_groups(overrides))
    return instantiate(cfg.data)  # type: ignore[no-any-return]


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
