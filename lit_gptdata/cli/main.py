"""The command `lit-gptdata`: prepare, look at and check the data of the Hydra configs, without training.

lit-gptdata show step=3 data=files data.corpus=books/
lit-gptdata report multirun/2026-11-22/10-00-00
"""

from __future__ import annotations

import argparse
import codecs
import io
import os
import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lit_gptdata.datamodule import GPTDataModule

DESCRIPTION = (
    "Prepare, look at and check the data that train.py trains on, with the same overrides; "
    "report on a sweep."
)
EPILOG = """overrides are Hydra's, as for train.py:
  lit-gptdata prepare data=files data.corpus=books/
  lit-gptdata info --plot tokens.png data=files data.corpus=books/
  lit-gptdata show step=3 data=files data.corpus=books/ data.max_length=128
  lit-gptdata publish s3://bucket/tokens data=files data.corpus=books/
  lit-gptdata publish s3://bucket/tokens data.build=ray data=files data.corpus=s3://bucket/books/
report takes a sweep's folder:
  lit-gptdata report multirun/2026-11-22/10-00-00-123456
"""

SEPARATOR = "·"
"""Stands between two tokens where there is no colour."""

COLOURS = ("\x1b[30;46m", "\x1b[30;47m")
"""Black on cyan, black on white: of the 16 colours that every terminal has."""

RESET = "\x1b[0m"

CONTROLS = {c: 0x2400 + c for c in range(32) if chr(c) not in "\t\n"} | {0x7F: 0x2421}
"""Control characters to their pictures: a text must not command the terminal."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status: 0, or 1 after an error, said in a message on stderr.

    A command line that is no such command prints its usage and raises SystemExit(2).
    """
    words = list(sys.argv[1:] if argv is None else argv)
    parser, commands = _parsers()
    if not words or words[0] not in commands:
        parser.parse_args(words)  # --help, or what is wrong
        parser.error("give a command")
    # intermixed, so that an option may stand between two overrides
    args = commands[words[0]].parse_intermixed_args(words[1:])
    if isinstance(sys.stdout, io.TextIOWrapper):  # not every terminal can show every text
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        args.run(args)
        sys.stdout.flush()
    except BrokenPipeError:  # `lit-gptdata show | head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        print("stopped: what is whole is kept", file=sys.stderr)
        return 130
    except Exception as error:
        message = _message(error)
        if message is None:
            raise
        if "prepare_data()" in message:
            command = shlex.join(["lit-gptdata", "prepare", *args.overrides])
            message += f"\nThe command for it: {command}"
        print(f"lit-gptdata {words[0]}: {message}", file=sys.stderr)
        return 1
    return 0


def _parsers() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    parser = argparse.ArgumentParser(
        prog="lit-gptdata",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    subparsers = parser.add_subparsers(metavar="command", required=True)
    commands = {}
    for run in (prepare, info, show, verify, publish, report):
        says = (run.__doc__ or "").splitlines()[0]
        command = subparsers.add_parser(run.__name__, help=says, description=says, allow_abbrev=False)
        commands[run.__name__] = command
        command.set_defaults(run=run)
        if run is report:
            command.add_argument("folder", metavar="DIR", help="a sweep's folder, under multirun/")
            continue
        if run is info:
            command.add_argument(
                "--plot", metavar="FILE.png", help="draw token lengths and frequencies, reading it all"
            )
        if run is publish:
            command.add_argument("url", metavar="URL", help="a folder, s3://bucket/tokens, gs://…")
        what = "Hydra's, such as data.max_length=128"
        if run is show:
            what = f"step=N, from 0 on (without: step=0), or window=N; others are {what}"
        command.add_argument("overrides", nargs="*", metavar="override", help=what)
    return parser, commands


def prepare(args: argparse.Namespace) -> None:
    """Download and tokenise, and say what there is."""
    data = _data(args.overrides)
    data.prepare_data()
    data.setup()
    print(data)


def info(args: argparse.Namespace) -> None:
    """Count corpus, tokens, windows and batches; --plot draws tokens."""
    data = _opened(args.overrides)
    store = data.store
    manifest = (store.path / "manifest.json").stat().st_size
    size = manifest + sum(file.size for file in store.files)
    print(data)
    print(
        f"  epoch    {len(data.train_dataloader()):,} train batches, {len(data.val_dataloader()):,} val"
    )
    print(f"  text     {store.n_bytes / store.n_tokens:.2f} bytes a token")
    print(f"  store    {store.location}, {size:,} bytes in {len(store.files) + 1:,} files")
    if args.plot is not None:
        from lit_gptdata.report.usage import draw_usage

        draw_usage(store, args.plot)
        print(f"  plot     {args.plot}")


def show(args: argparse.Namespace) -> None:
    """Print the text of a training step=N or of a train window=N."""
    import numpy as np

    (name, number), args.overrides = _which(args.overrides)
    data = _opened(args.overrides)
    if name == "step":
        windows = data.windows_at(number)
        print(f"step {number:,}: {len(windows):,} windows, seed {data.hparams['seed']}\n")
    else:
        n = len(data.train_windows)
        if not 0 <= number < n:
            raise ValueError(f"window={number} does not exist: give one in [0, {n:,})")
        windows = np.array([number])
    inputs, _ = data.train_windows.batch(windows)  # (B, T)
    colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    for window, ids in zip(windows.tolist(), inputs.tolist(), strict=True):
        begin = data.train_windows.begin + data.train_windows.spans.start(window)
        end = begin + len(ids)
        first, last = data.store.place(begin), data.store.place(end - 1)
        where = str(first) if first[:2] == last[:2] else f"{first}, to {last}"
        print(f"window {window:,}, tokens [{begin:,}, {end:,}), {where}")
        parts = list(_parts(data.tokenizer.encoding.decode_tokens_bytes(ids)))
        print(_coloured(parts) if colour else SEPARATOR.join(parts), end="\n\n")


def verify(args: argparse.Namespace) -> None:
    """Compare every byte of the tokens on disk with its checksum."""
    store = _opened(args.overrides).store
    store.verify()
    size = sum(file.size for file in store.files)
    print(f"{store.location}: {size:,} bytes in {len(store.files):,} files read, every SHA-256 is right")


def publish(args: argparse.Namespace) -> None:
    """Send or make the tokens at URL/<fingerprint>, to train from anywhere, and print that."""
    print(_data(args.overrides).publish(args.url))


def report(args: argparse.Namespace) -> None:
    """Report on a sweep: sweep.html, sweep.csv and PNGs in its folder."""
    from lit_gptdata.report.files import tell

    tell(Path(args.folder))


def _data(overrides: Sequence[str]) -> GPTDataModule:
    from hydra import compose, initialize_config_dir
    from hydra.utils import instantiate

    from lit_gptdata.configs import conf_dir, register_resolvers

    register_resolvers()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        cfg = compose("train", overrides=list(overrides))
    data: GPTDataModule = instantiate(cfg.data)
    return data


def _opened(overrides: Sequence[str]) -> GPTDataModule:
    data = _data(overrides)
    data.setup()
    return data


def _which(words: Sequence[str]) -> tuple[tuple[str, int], list[str]]:
    """What to show, and the overrides: ["step=3", "data=files"]  ->  ("step", 3), ["data=files"]."""
    chosen = [word for word in words if re.match("(step|window)=", word)]
    if len(chosen) > 1:
        raise ValueError(f"{' and '.join(chosen)}: give one step=N, or one window=N")
    name, _, number = (chosen or ["step=0"])[0].partition("=")
    if not re.fullmatch("[0-9]+", number):
        raise ValueError(f"{name}={number} is no number: give an integer >= 0, such as {name}=3")
    return (name, int(number)), [word for word in words if word not in chosen]


def _parts(tokens: Sequence[bytes]) -> Iterator[str]:
    """A token's text each; tokens that share a character are one part."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for token in tokens:
        if text := decoder.decode(token):
            yield text
    if text := decoder.decode(b"", final=True):
        yield text


def _coloured(parts: Sequence[str]) -> str:
    """Parts on alternating backgrounds; a line end is a ⏎, so that it has one too."""
    painted = []
    for i, part in enumerate(parts):
        colour = COLOURS[i % 2]
        text = part.translate(CONTROLS).replace("\n", f"⏎{RESET}\n{colour}")
        painted.append(f"{colour}{text}{RESET}")
    return "".join(painted)


def _message(error: BaseException) -> str | None:
    """What to tell about an error that a user can do something about; None for any other."""
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    from lit_gptdata.configs import root_cause

    error = root_cause(error)
    known = (HydraException, OmegaConfBaseException, ValueError, TypeError, OSError, RuntimeError)
    an_extra = isinstance(error, ImportError) and "pip install" in str(error)
    return str(error) if an_extra or isinstance(error, known) else None
