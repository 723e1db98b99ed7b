"""The commands that read and write the token files of other programs."""

import argparse
import re
import shlex
from pathlib import Path

from lit_gptdata._io import working_folder
from lit_gptdata.cli.generate import load_run
from lit_gptdata.cli.overrides import add_overrides, build_data, open_data, split_options
from lit_gptdata.configs import quote_value, shorten_warnings

WRITTEN = ("nanogpt", "llmc", "megatron", "parquet")  # the formats of an export


def import_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("format", metavar="FORMAT", choices=(*WRITTEN, "arrow", "npy"), help="%(choices)s")
    add("words", metavar="PATH", nargs="+", help="files or folders; also tokenizer=…, data_dir=…")
    add("--dtype", choices=("uint16", "uint32"), help="of nanogpt's ids; default: by the vocabulary")
    add("--column", help="with the ids, in parquet and arrow; default: input_ids")
    add("--separate", action="store_true", help="put an end-of-document id between documents")


def import_ids(args: argparse.Namespace) -> None:
    """Make a store of the token files of nanoGPT, llm.c, Megatron or others."""
    import numpy as np

    from lit_gptdata.interop.formats import FORMATS, find_files
    from lit_gptdata.interop.importing import IdFiles
    from lit_gptdata.tokens.build.local import prepare_store

    format = FORMATS[args.format]
    options = [word for word in args.words if re.match(r"[a-z_.]+=", word) and not Path(word).exists()]
    if not (paths := [word for word in args.words if word not in options]):
        raise ValueError(f"give the files or folders to import: lit-gptdata import {args.format} PATH")
    files = find_files(paths, format.suffix)
    metas = [meta for _, file in files if (meta := file.with_name("meta.pkl")).is_file()]
    if args.format == "nanogpt" and metas and not any("tokenizer=" in word for word in options):
        raise ValueError(f"{metas[0]} is for other ids than gpt2's: give their tokenizer, tokenizer=…")
    overrides = [f"data.{word.removeprefix('data.')}" for word in options]
    data = build_data(overrides)
    dtype = np.dtype(args.dtype or data.tokenizer.dtype)
    corpus = IdFiles(
        name=" ".join(filter(None, [args.format, dtype.name, args.column])), files=files,
        read=lambda file: format.read(file, dtype, args.column),
        tokenizer=data.tokenizer, separate=args.separate,
    )  # fmt: skip
    store = prepare_store(corpus, data.tokenizer, data.data_dir / "tokens")
    print(store)
    if cuts := store.manifest.cuts:
        sizes = cuts[0], cuts[1] - cuts[0], store.n_tokens - cuts[1]
        print("split: {:,} tokens of train, {:,} of val, {:,} of test".format(*sizes))
    here, path = working_folder(), store.path
    url = f"data.store_url={path.relative_to(here) if path.is_relative_to(here) else path}"
    kept = [word for word in overrides if not word.startswith("data.data_dir=")]
    print(shlex.join(["lit-gptdata", "train", quote_value(url), *kept]))


def export_arguments(parser: argparse.ArgumentParser) -> None:
    formats = "%(choices)s; hf: a checkpoint for transformers, ckpt=PATH, perhaps with tokenizer=…"
    parser.add_argument("format", metavar="FORMAT", choices=(*WRITTEN, "hf"), help=formats)
    parser.add_argument("out", metavar="OUT", help="a new folder")
    help_text = "only this one, or all tokens as one; default: train, val and test if they have tokens"
    parser.add_argument("--split", choices=("train", "val", "test", "all"), help=help_text)
    add_overrides(parser)


def export(args: argparse.Namespace) -> None:
    """Write tokens for nanoGPT, llm.c, Megatron, or as Parquet, or a model for transformers."""
    from lit_gptdata.interop.blocks import Part
    from lit_gptdata.interop.exporting import export as write
    from lit_gptdata.interop.formats import FORMATS, SPLITS
    from lit_gptdata.interop.importing import separator_of

    folder = working_folder() / Path(args.out).expanduser()
    if args.format == "hf":
        export_model(folder, args.overrides)
        return
    data, parts = open_data(args.overrides), {}
    for source in data._data.all:
        ranges = {split: getattr(source.split, split) for split in SPLITS}
        if args.split:
            ranges = {args.split: (ranges | {"all": (0, source.store.n_tokens)})[args.split]}
        for split, (begin, end) in ranges.items():
            if begin < end:
                name = f"{source.name}/{split}".lstrip("/")  # a folder for each named source
                parts[name] = Part(source.store, begin, end, separator_of(data.tokenizer))
    if not parts:
        raise ValueError(f"there is no {args.split} split: set data.{args.split}_fraction")
    files = write(FORMATS[args.format], parts, folder)
    for name, part in parts.items():
        print(f"{name}: {part.end - part.begin:,} tokens of {part.store.dtype.name}")
    print(*(f"{file}, {file.stat().st_size:,} bytes" for file in files), sep="\n")


def export_model(folder: Path, words: list[str]) -> None:
    """Write the model of ckpt=… and its tokenizer into a new folder, for transformers."""
    from lit_gptdata.interop.exporting import check_new

    others, options = split_options(words, {"ckpt": None, "tokenizer": None})
    if others or options["ckpt"] is None:
        raise ValueError(f"give a checkpoint, ckpt=PATH, and nothing else, got {' '.join(words)!r}")
    check_new(folder)
    model, tokenizer = load_run(**options)
    shorten_warnings()
    if not hasattr(model, "save_pretrained"):
        raise TypeError(f"{type(model).__name__} has no save_pretrained: only a GPT can be exported")
    model.save_pretrained(folder, tokenizer)
    print(*(f"{file}, {file.stat().st_size:,} bytes" for file in sorted(folder.iterdir())), sep="\n")
