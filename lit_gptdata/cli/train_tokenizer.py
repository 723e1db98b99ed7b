"""The command that trains a tokenizer on a corpus."""

from __future__ import annotations

import argparse
import re
import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING

from lit_gptdata.cli.overrides import add_overrides, compose_config
from lit_gptdata.configs import quote_value

if TYPE_CHECKING:
    from lit_gptdata.datamodule import GPTDataModule

EXAMPLE = "lit-gptdata train-tokenizer OUT.json vocab_size=8192 books/"


def train_tokenizer_arguments(parser: argparse.ArgumentParser) -> None:
    add_overrides(parser, "OUT.json, vocab_size=N (with 256 bytes and <|endoftext|>); others: ")


def train_tokenizer(args: argparse.Namespace) -> None:
    """Train a byte-level BPE tokenizer on the train split."""
    from hydra.utils import instantiate

    files = [word for word in args.overrides if word.endswith(".json") and "=" not in word]
    words = [word for word in args.overrides if word not in files]
    if len(files) != 1 or (cfg := compose_config(words)).vocab_size is None:
        raise ValueError(f"give one .json file to write, and vocab_size=N: {EXAMPLE}")
    path = Path(files[0]).expanduser()
    if path.exists():
        raise FileExistsError(f"{path} exists: give another name, or remove it")
    print(*train_on(instantiate(cfg.data), path, cfg.vocab_size), sep="\n")
    use = quote_value(f"data.tokenizer={path}")
    others = [word for word in words if not re.match(r"\W*(vocab_size|data\.tokenizer)=", word)]
    print(f"next: {shlex.join(['lit-gptdata', 'train', use, *others])}")


def train_on(data: GPTDataModule, path: Path, vocab_size: int) -> list[str]:
    """Train on the train splits of all sources, whatever their weights; returns lines with figures."""
    from lit_gptdata.tokens.build.filters import filtered
    from lit_gptdata.tokens.engines import encode_text
    from lit_gptdata.tokens.libraries.train import train_tokenizer
    from lit_gptdata.tokens.source import LocalBuild
    from lit_gptdata.tokens.tokenizer import Tokenizer

    start, texts = time.perf_counter(), []
    for source in data._data.trained.values():
        if not isinstance(source.text, LocalBuild):
            raise ValueError(f"{source.text.name} is a store without text: give its text, data.corpus=…")
        documents = filtered(source.text._open(download=True), source.text.options)
        texts.append((documents, 1 - sum(source.fractions)))
    n_bytes, library, held_out = train_tokenizer(path, vocab_size, texts)
    seconds, own = time.perf_counter() - start, Tokenizer(str(path))
    made = f"{path}: {own.vocab_size:,} tokens, of which {own.vocab_size - 257:,} are merges"
    lines = [f"{made}; {seconds:.1f} s on {n_bytes:,} bytes of text with {library}"]
    if held_bytes := sum(len(text.encode()) for text in held_out):
        counts = (sum(len(encode_text(text, each)) for text in held_out) for each in (own, Tokenizer()))
        rate, gpt2 = (f"{held_bytes / count:.2f}" for count in counts)
        lines += [f"{rate} bytes per token on {held_bytes:,} bytes of held-out text; gpt2: {gpt2}"]
    return lines
