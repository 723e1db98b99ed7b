"""The commands that print the text of a training step, and list the text that a run has seen."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from lit_gptdata._checks import check_integer
from lit_gptdata._io import aligned
from lit_gptdata.cli.overrides import (
    add_overrides,
    compose_config,
    count_ranks,
    open_data,
    split_options,
)

SHOWN_RANGES = 8  # ranges of documents in a row of the table; JSON has all


def show_arguments(parser: argparse.ArgumentParser) -> None:
    add_overrides(parser, "step=N, counted from 0 (default: step=0), or window=N; all others: ")


def show(args: argparse.Namespace) -> None:
    """Print the text of a training step=N or of a train window=N."""
    overrides, options = split_options(args.overrides, {"step": 0, "window": None})
    if len(given := [word for word in args.overrides if word not in overrides]) > 1:
        raise ValueError(f"got {' and '.join(given)}: give only one step=N or window=N")
    if given and given[0].endswith("="):
        raise ValueError(f"{given[0]} has no number: give step=N or window=N")
    print(open_data(overrides).show(**options))


def seen_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON, with all documents")
    add_overrides(parser, "step=N, or the .ckpt file of a run, or both; all others, without a file: ")


def seen(args: argparse.Namespace) -> None:
    """List the text of each source that a run sees before step=N."""
    from lit_gptdata.datamodule import GPTDataModule
    from lit_gptdata.training.folder import load_checkpoint
    from lit_gptdata.windows.identity import seen as seen_before
    from lit_gptdata.windows.steps import number_after

    files = [word for word in args.overrides if word.endswith(".ckpt") and "=" not in word]
    words = [word for word in args.overrides if word not in files]
    overrides, options = split_options(words, {"step": None})
    if len(words) > len(overrides) + 1:
        raise ValueError("step=N is given twice: give only one step=N")
    if (step := options["step"]) is not None:
        check_integer("step", step, 0)
    elif not files:
        raise ValueError("give step=N or the checkpoint of a run: lit-gptdata seen step=1000")
    if files and (others := files[1:] + overrides):
        raise ValueError(f"{files[0]} has the options of its run: remove {' '.join(others)}")
    ranks = None
    if files:
        if (path := Path(files[0])).is_file():  # else Lightning names it
            load_checkpoint(path, {"datamodule_hyper_parameters"}, "give the last.ckpt of a run")
        data = GPTDataModule.load_from_checkpoint(files[0], map_location="cpu", weights_only=True)
        data.setup()
        if step is None:
            step = number_after(data._resume.all_segments, data.state_dict()["batches"])
    else:
        data = open_data(overrides)
        if data.shuffle and data.seed is None:
            raise ValueError("seed=None: each run draws its own order: give the run's checkpoint")
        ranks = count_ranks(compose_config(overrides))
    if step:
        data.windows_at(step - 1, world_size=ranks)  # raises for a step that does not exist
    history = data._resume.history(ranks)
    sources = seen_before(history, step, data._data)
    total = sum(source["tokens"] for source in sources)
    for source in sources:
        source["share"] = source["tokens"] / max(1, total)
    if args.json:
        print(json.dumps({"step": step, "tokens": total, "sources": sources}))
        return
    rows = [["source", "steps", "tokens", "share", "epochs", "documents"]]
    for source in sources:
        steps, tokens = "[{:,}, {:,})".format(*source["steps"]), f"{source['tokens']:,}"
        share, epochs = f"{100 * source['share']:.2f} %", f"{source['epochs']:.2f}"
        documents = f"{source['n_documents']:,} of {source['of']:,}: {as_ranges(source['documents'])}"
        rows.append([source["source"], steps, tokens, share, epochs, documents])
    print(f"before step {step:,}: {total:,} training tokens", *aligned(rows), sep="\n")


def as_ranges(documents: Sequence[tuple[int, int]]) -> str:
    """The first ranges, for people: [(1, 120), (125, 125)] → "1-120, 125"."""
    shown = [f"{first}-{last}" if first < last else f"{first}" for first, last in documents]
    return ", ".join(shown[:SHOWN_RANGES] + ["…"] * (len(shown) > SHOWN_RANGES)) or "none"
