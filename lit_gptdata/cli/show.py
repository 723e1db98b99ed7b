"""The command that prints the text that a training step sees, with the borders of its tokens."""

import argparse
import codecs
import itertools
import os
import re
import sys
from collections.abc import Iterator, Sequence

from lit_gptdata.cli.overrides import add_overrides, open_data

SEPARATOR = "·"  # printed between two tokens if the output has no colors
COLORS = ("\x1b[30;46m", "\x1b[30;47m")  # of tokens, in turn: black on cyan, black on white
RESET = "\x1b[0m"

# Control character → its visible picture in Unicode, because text must not control the terminal.
CONTROL_PICTURES = {c: 0x2400 + c for c in range(32) if chr(c) not in "\t\n"} | {0x7F: 0x2421}


def show_arguments(parser: argparse.ArgumentParser) -> None:
    add_overrides(parser, "step=N, counted from 0 (default: step=0), or window=N; all others: ")


def show(args: argparse.Namespace) -> None:
    """Print the text of a training step=N or of a train window=N."""
    from lit_gptdata.windows.mixture import Mixture

    kind, number, overrides = split_selector(args.overrides)
    data = open_data(overrides)
    if kind == "step":
        windows = data.windows_at(number).tolist()
        print(f"step {number:,}: {len(windows):,} windows, seed {data.seed}\n")
    else:
        n = len(data.train_windows)
        if number >= n and not data._data.is_named:
            raise ValueError(f"window must be an integer in [0, {n:,}), got {number}")
        windows = [number]
    inputs, _ = data.train_windows.batch(windows)  # (B, T)
    use_colors = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    names = ["corpus"] * len(windows)
    if isinstance(data.train_windows, Mixture):
        located = data.train_windows.locate(windows)
        names, windows = (array.tolist() for array in located)
    for name, window, ids in zip(names, windows, inputs.tolist(), strict=True):
        source = data.sources[name]
        start = int(source.train_windows.starts([window])[0])
        end = start + len(ids)
        first, last = source.store.place(start), source.store.place(end - 1)
        origin = str(first) if first[:2] == last[:2] else f"{first}, to {last}"  # one document, or more
        owner = f" of {name}" if source.name else ""
        print(f"window {window:,}{owner}, tokens [{start:,}, {end:,}), {origin}")
        texts = list(decode_each(data.tokenizer.decode_each(ids)))
        print(colored(texts) if use_colors else SEPARATOR.join(texts), end="\n\n")


def split_selector(words: Sequence[str]) -> tuple[str, int, list[str]]:
    """Separate what to show: ["step=3", "data=files"] → ("step", 3, ["data=files"])."""
    selectors = [word for word in words if re.match("(step|window)=", word)]
    if len(selectors) > 1:
        raise ValueError(f"got {' and '.join(selectors)}: give only one step=N or window=N")
    kind, _, number = (selectors or ["step=0"])[0].partition("=")
    if not re.fullmatch("[0-9]+", number):
        raise ValueError(f"{kind} must be an integer ≥ 0, got {number}. For example: {kind}=3")
    return kind, int(number), [word for word in words if word not in selectors]


def decode_each(tokens: Sequence[bytes]) -> Iterator[str]:
    """Yield the text of each token. Tokens that share a character come as one text."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    yield from filter(None, map(decoder.decode, tokens))
    yield from filter(None, [decoder.decode(b"", final=True)])


def colored(texts: Sequence[str]) -> str:
    """Put the texts on alternating backgrounds. A line end is shown as ⏎."""
    painted = ""
    for text, color in zip(texts, itertools.cycle(COLORS), strict=False):
        visible = text.translate(CONTROL_PICTURES).replace("\n", f"⏎{RESET}\n{color}")
        painted += f"{color}{visible}{RESET}"
    return painted
