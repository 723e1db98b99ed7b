"""The command that trains a tokenizer on a corpus."""

from __future__ import annotations

import argparse
import re
import shlex
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

    if not args.out.endswith(".json") or re.match(r"[\w.+~]+=", args.out):
        given = f", got {args.out!r}" if args.out else ""
        raise ValueError(f"the file to write comes first and ends in .json{given}. Example: {EXAMPLE}")
    cfg = compose_config(args.overrides)
    if cfg.vocab_size is None:
        raise ValueError(f"give the number of tokens, such as vocab_size=8192. Example: {EXAMPLE}")
    print(*train_on(instantiate(cfg.data), Path(args.out), cfg.vocab_size), sep="\n")
    use = f"data.tokenizer={args.out}"
    use = use if re.fullmatch(r"[\w./=-]+", use) else quote_value(use)
    others = [word for word in args.overrides if not re.match(r"\W*(vocab_size|data\.tokenizer)=", word)]
    print(f"next: {shlex.join(['python', 'train.py', use, *others])}")


def train_on(data: GPTDataModule, path: Path, vocab_size: int) -> list[str]:
    """Train on the train splits of the data, all sources alike; returns lines about the tokenizer."""
    from lit_gptdata.tokens.engines import encode_text
    from lit_gptdata.tokens.libraries.train import END_OF_TEXT, train_tokenizer
    from lit_gptdata.tokens.source import LocalBuild
    from lit_gptdata.tokens.tokenizer import Tokenizer

    texts = []
    for source in data._data.trained.values():
        if not isinstance(source.text, LocalBuild):
            raise ValueError(f"{source.text.name} is a store without text: give its text, data.corpus=…")
        texts.append((source.text._open(download=True), 1 - sum(source.fractions)))
    made = train_tokenizer(path, vocab_size, texts)
    n_tokens = 257 + made.n_merges
    lines = [
        f"{path}: {n_tokens:,} tokens: 256 bytes, {made.n_merges:,} merges and {END_OF_TEXT}; "
        f"{made.seconds:.1f} s on {made.n_bytes:,} bytes of text with {made.library}"
    ]
    n_bytes = sum(len(text.encode()) for text in made.held_out)
    if n_bytes:
        gpt2 = Tokenizer("gpt2")
        n_gpt2 = sum(len(encode_text(text, gpt2)) for text in made.held_out)
        own, other = n_bytes / made.held_out_tokens, n_bytes / n_gpt2
        lines += [f"{own:.2f} bytes per token on {n_bytes:,} bytes of held-out text; gpt2: {other:.2f}"]
    return lines
