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

EXAMPLE = "lit-gptdata train-tokenizer OUT.json vocab_size=8192 data=files data.corpus=books/"


def train_tokenizer_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("out", metavar="OUT.json", nargs="?", default="", help="the file to write")
    add_overrides(parser, "vocab_size=N, which counts <|endoftext|> and the 256 bytes; all others: ")


def train_tokenizer(args: argparse.Namespace) -> None:
    """Train a byte-level BPE tokenizer on the train split."""
    from hydra.utils import instantiate

    if "=" in args.out or not args.out.endswith(".json"):
        raise ValueError(f"the file to write comes first, got {args.out!r}. Example: {EXAMPLE}")
    cfg = compose_config(args.overrides)
    if cfg.vocab_size is None:
        raise ValueError(f"vocab_size=N is missing. Example: {EXAMPLE}")
    print(*train_on(instantiate(cfg.data), Path(args.out), cfg.vocab_size), sep="\n")
    use = f"data.tokenizer={args.out}"
    use = use if re.fullmatch(r"[\w./=-]+", use) else quote_value(use)
    others = [word for word in args.overrides if not re.match(r"\W*(vocab_size|data\.tokenizer)=", word)]
    print(f"next: {shlex.join(['python', 'train.py', use, *others])}")


def train_on(data: GPTDataModule, path: Path, vocab_size: int) -> list[str]:
    """Train on the train splits of all sources, whatever their weights; returns lines with figures."""
    from lit_gptdata.tokens.engines import encode_text
    from lit_gptdata.tokens.libraries.train import train_tokenizer
    from lit_gptdata.tokens.source import LocalBuild
    from lit_gptdata.tokens.tokenizer import Tokenizer

    start, texts = time.perf_counter(), []
    for source in data._data.trained.values():
        if not isinstance(source.text, LocalBuild):
            raise ValueError(f"{source.text.name} is a store without text: give its text, data.corpus=…")
        texts.append((source.text._open(download=True), 1 - sum(source.fractions)))
    n_bytes, library, held_out = train_tokenizer(path, vocab_size, texts)
    seconds, own = time.perf_counter() - start, Tokenizer(str(path))
    counts = f"{own.vocab_size:,} tokens, of which {own.vocab_size - 257:,} are merges"
    lines = [f"{path}: {counts}; {seconds:.1f} s on {n_bytes:,} bytes of text with {library}"]
    if held_bytes := sum(len(text.encode()) for text in held_out):
        n_tokens = (
            sum(len(encode_text(text, each)) for text in held_out) for each in (own, Tokenizer())
        )
        rate, gpt2 = (held_bytes / n for n in n_tokens)
        lines += [
            f"{rate:.2f} bytes per token on {held_bytes:,} bytes of held-out text; gpt2: {gpt2:.2f}"
        ]
    return lines
