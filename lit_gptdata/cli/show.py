"""The command that prints the text that a training step sees, with the borders of its tokens."""

import argparse
import re
from collections.abc import Sequence

from lit_gptdata.cli.overrides import add_overrides, open_data


def show_arguments(parser: argparse.ArgumentParser) -> None:
    add_overrides(parser, "step=N, counted from 0 (default: step=0), or window=N; all others: ")


def show(args: argparse.Namespace) -> None:
    """Print the text of a training step=N or of a train window=N."""
    kind, number, overrides = split_selector(args.overrides)
    print(open_data(overrides).show(**{kind: number}))


def split_selector(words: Sequence[str]) -> tuple[str, int, list[str]]:
    """Separate what to show: ["step=3", "data=files"] → ("step", 3, ["data=files"])."""
    selectors = [word for word in words if re.match("(step|window)=", word)]
    if len(selectors) > 1:
        raise ValueError(f"got {' and '.join(selectors)}: give only one step=N or window=N")
    kind, _, number = (selectors or ["step=0"])[0].partition("=")
    if not re.fullmatch("[0-9]+", number):
        raise ValueError(f"{kind} must be an integer ≥ 0, got {number}. For example: {kind}=3")
    return kind, int(number), [word for word in words if word not in selectors]
