"""The commands that make, describe, check and publish a corpus's tokens."""

import argparse
import re

from lit_gptdata.cli.overrides import add_overrides, build_data, open_data


def prepare(args: argparse.Namespace) -> None:
    """Download and tokenize the text, then print a summary."""
    data = build_data(args.overrides)
    data.prepare_data()
    data.setup()
    print(data)


def info_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--plot", metavar="FILE.png", help="draw lengths and frequencies of the tokens")
    add_overrides(parser)


def info(args: argparse.Namespace) -> None:
    """Print counts of documents, tokens, windows and batches."""
    data = open_data(args.overrides)
    store = data.store
    size = (store.path / "manifest.json").stat().st_size + sum(file.size for file in store.files)
    n_train, n_val = len(data.train_dataloader()), len(data.val_dataloader())
    print(data)
    print(f"  epoch    {n_train:,} train batches, {n_val:,} val")
    print(f"  text     {store.n_bytes / store.n_tokens:.2f} bytes per token")
    print(f"  store    {store.location}, {size:,} bytes in {len(store.files) + 1:,} files")
    if args.plot is not None:
        from lit_gptdata.report.usage import draw_usage

        draw_usage(store, args.plot)
        print(f"  plot     {args.plot}")


def verify(args: argparse.Namespace) -> None:
    """Compare every byte of the token files with its checksum."""
    store = open_data(args.overrides).store
    store.verify()
    size = sum(file.size for file in store.files)
    print(f"{store.location}: {size:,} bytes in {len(store.files):,} files, every SHA-256 matches")


def publish_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("url", metavar="URL", nargs="?", help="the parent, such as s3://bucket/tokens")
    add_overrides(parser)


def publish(args: argparse.Namespace) -> None:
    """Put the tokens at URL/<fingerprint>, and print that URL."""
    if args.url is None or re.match(r"[\w.@+~]+=", args.url):
        words = ["lit-gptdata publish s3://bucket/tokens", *filter(None, [args.url]), *args.overrides]
        raise ValueError(f"the URL to publish to comes first, for example: {' '.join(words)}")
    print(build_data(args.overrides).publish(args.url))
