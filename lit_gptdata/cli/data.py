"""The commands that make, describe, check and publish a corpus's tokens."""

import argparse
import re
import shlex
from pathlib import Path

from lit_gptdata._io import aligned
from lit_gptdata.cli.overrides import add_overrides, budget_of, build_data, compose_config, open_data
from lit_gptdata.configs import as_override

KEPT = ("weight", "val_fraction", "test_fraction")  # options of a source that a published store needs


def prepare(args: argparse.Namespace) -> None:
    """Download and tokenize the text, then print a summary."""
    data = build_data(args.overrides)
    data.prepare_data()
    data.setup()
    print(data)


def info_arguments(parser: argparse.ArgumentParser) -> None:
    picture = "draw the tokens, or the shares of a mixture, and the lengths of the documents"
    parser.add_argument("--plot", metavar="FILE.png", help=picture)
    add_overrides(parser)


def info(args: argparse.Namespace) -> None:
    """Print counts of documents, tokens, windows and batches."""
    from lit_gptdata.report.duplicates import describe_duplicates
    from lit_gptdata.report.overview import overview

    data = open_data(args.overrides)
    named, budget = data._data.is_named, budget_of(compose_config(args.overrides), data)
    first, *lines, last = str(data).splitlines()
    print(first, *(overview(data._data, budget) if named else lines), last, sep="\n")
    n_train, n_val = len(data.train_dataloader()), len(data.val_dataloader())
    print(f"  epoch    {n_train:,} train batches, {n_val:,} val")
    rows = [["source", "documents", "bytes per token", "files", "size in bytes", "store"]]
    for source in data._data.all:
        store = source.store
        size = (store.path / "manifest.json").stat().st_size + sum(file.size for file in store.files)
        rate, n_files = f"{store.n_bytes / store.n_tokens:.2f}", len(store.files) + 1
        counts = [f"{store.n_documents:,}", rate, f"{n_files:,}", f"{size:,}"]
        rows.append([source.name, *counts, store.location])
    if named:
        print(*(f"  {line}" for line in aligned(rows)), sep="\n")
    else:
        print(f"  text     {rate} bytes per token")
        print(f"  store    {store.location}, {size:,} bytes in {n_files:,} files")
    for source in data._data.all:
        owner = f" (source {source.name})" if source.name else ""
        print(f"  {describe_duplicates(source.store)}{owner}")
    if args.plot is not None:
        from lit_gptdata.report.usage import draw_shares, draw_usage
        from lit_gptdata.windows.mixture import Mixture

        if isinstance(windows := data.train_windows, Mixture):
            stores = {name: source.store for name, source in data.sources.items()}
            draw_shares(windows, budget or len(windows) * data.max_length, stores, args.plot)
        else:
            draw_usage(store, data.max_length, args.plot)
        print(f"  plot     {args.plot}")


def verify(args: argparse.Namespace) -> None:
    """Compare every byte of the token files with its checksum."""
    for source in open_data(args.overrides)._data.all:
        (store := source.store).verify()
        size = sum(file.size for file in store.files)
        print(f"{store.location}: {size:,} bytes in {len(store.files):,} files, every SHA-256 matches")


def publish_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("url", metavar="URL", nargs="?", help="the parent, such as s3://bucket/tokens")
    add_overrides(parser)


def publish(args: argparse.Namespace) -> None:
    """Put the tokens at URL/<fingerprint>, and print how to use them."""
    if args.url is None or re.match(r"[\w.@+~]+=", args.url):
        words = ["lit-gptdata publish s3://bucket/tokens", *filter(None, [args.url]), *args.overrides]
        raise ValueError(f"the URL to publish to comes first, for example: {' '.join(words)}")
    if (folder := Path(args.url)).is_file():
        raise ValueError(f"{folder} is a file: lit-gptdata publish s3://bucket/tokens {args.url}")
    if folder.is_dir() and any(folder.iterdir()) and not any(folder.glob("*/manifest.json")):
        raise ValueError(f"{folder} has other files: lit-gptdata publish s3://bucket/tokens {args.url}")
    data = build_data(args.overrides)
    urls = data.publish(args.url)
    if isinstance(urls, str):
        print(urls)
        return
    options: dict[str, object] = {"stages": data._data.stages}
    for option, sources in (("corpus", data._data.sources), ("val_corpus", data._data.val_corpus)):
        options[option] = {
            name: {"store_url": urls[name]} | {k: v for k, v in source.hparams.items() if k in KEPT}
            for name, source in sources.items()
        }
    words = [f"data.{option}={as_override(value)}" for option, value in options.items() if value]
    print(shlex.join(["data=sources", *words]))
