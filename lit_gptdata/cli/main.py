"""The command `lit-gptdata`: train on a text, and prepare, inspect and check what a run trains on."""

import argparse
import difflib
import io
import os
import re
import shlex
import sys
from collections.abc import Sequence
from typing import NoReturn

from lit_gptdata import __version__
from lit_gptdata.cli.app import describe_options, train
from lit_gptdata.cli.data import info, info_arguments, prepare, publish, publish_arguments, verify
from lit_gptdata.cli.generate import generate, generate_arguments
from lit_gptdata.cli.interop import export, export_arguments, import_arguments, import_ids
from lit_gptdata.cli.overrides import add_overrides
from lit_gptdata.cli.rerun import report, report_arguments, rerun, rerun_arguments
from lit_gptdata.cli.score import score, score_arguments
from lit_gptdata.cli.show import seen, seen_arguments, show, show_arguments
from lit_gptdata.cli.train_tokenizer import train_tokenizer, train_tokenizer_arguments
from lit_gptdata.configs import explain_flag

COMMANDS = {
    "train": (train, describe_options),
    "prepare": (prepare, add_overrides),
    "info": (info, info_arguments),
    "show": (show, show_arguments),
    "seen": (seen, seen_arguments),
    "verify": (verify, add_overrides),
    "publish": (publish, publish_arguments),
    "train-tokenizer": (train_tokenizer, train_tokenizer_arguments),
    "import": (import_ids, import_arguments),
    "export": (export, export_arguments),
    "generate": (generate, generate_arguments),
    "score": (score, score_arguments),
    "report": (report, report_arguments),
    "rerun": (rerun, rerun_arguments),
}
"""Name → the function that runs a command, and the one that declares its arguments."""

HELP = """usage: lit-gptdata COMMAND …

Turn raw text into training batches for GPT models, and train on them.

commands:
{}

A text is a path, folder, glob, URL or name. All commands take the same options, as key=value:
  lit-gptdata train                                        # a small model on the included text
  lit-gptdata train books/ data.max_length=128             # your own text
  lit-gptdata train -m +sweep=context                      # a sweep
  lit-gptdata generate outputs/2026-11-22/10-00-00-123456 "The value of"   # a run's checkpoint
  lit-gptdata score outputs/2026-11-22/10-00-00-123456     # the loss of each document
  lit-gptdata rerun multirun/2026-11-22/10-00-00-123456/3  # repeat a job: are its metrics the same?
  lit-gptdata show step=3 books/ data.max_length=128
  lit-gptdata publish s3://bucket/tokens s3://bucket/books/ data.build=ray
  lit-gptdata train-tokenizer own.json vocab_size=8192 books/
  lit-gptdata export nanogpt nanoGPT/data/books/ books/

`lit-gptdata train --help` describes all options, and `lit-gptdata COMMAND --help` a command.
In bash and zsh, this completes commands and options: eval "$(lit-gptdata -sc install=bash)"
"""


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors have one line."""

    def error(self, message: str) -> NoReturn:
        flags = re.findall(r"--[\w-]+", self.format_usage())
        message = explain_flag(message.replace(", TEXT or key=value", ""), flags)
        self.exit(2, f"error: {message} ({self.prog} --help)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return the exit status; a wrong command line raises SystemExit(2)."""
    name, *words = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal may lack characters of the text
        sys.stdout.reconfigure(errors="backslashreplace")
    if name in ("-sc", "--shell-completion"):  # Hydra completes options, and fails at other words
        name, words, line = "train", [name, *words], os.environ.get("COMP_LINE", "")
        os.environ["COMP_LINE"] = re.sub(r"(?<=\s)[\w./][^\s=]*\s+", "", line)
        if line and os.environ["COMP_LINE"] == line:
            print(*COMMANDS)
            return 0
    if "--version" in (name, *words):
        print(f"lit-gptdata {__version__}")
        return 0
    if name in ("-h", "--help", "help"):
        lines = [f"  {each:15}  {run.__doc__}" for each, (run, _) in COMMANDS.items()]
        print(HELP.format("\n".join(lines)))
        return 0
    if name not in COMMANDS:
        related = [each for each, (run, _) in COMMANDS.items() if name[:6] in str(run.__doc__).lower()]
        near = dict.fromkeys(difflib.get_close_matches(name, COMMANDS) + related)
        hint = f"did you mean {' or '.join(near)}?" if near else f"choose one of {', '.join(COMMANDS)}"
        if "=" in name or os.path.exists(name):
            hint = f"one goes before it, such as {shlex.join(['lit-gptdata', 'train', name, *words])}"
        print(f"error: {name!r} is not a command: {hint}", file=sys.stderr)
        return 2
    run, add_arguments = COMMANDS[name]
    args = argparse.Namespace(words=words)
    if name != "train" or {"-h", "--help"}.intersection(words):  # else Hydra parses the words
        parser = Parser(f"lit-gptdata {name}", description=run.__doc__, allow_abbrev=False)
        add_arguments(parser)
        args = parser.parse_intermixed_args(words)  # an option may be between two overrides
    from lit_gptdata.training.errors import short_errors

    try:
        with short_errors([] if name == "train" else ["lit-gptdata", name, *words]):
            run(args)
            sys.stdout.flush()
    except SystemExit as end:
        return end.code  # type: ignore[return-value]  # None, a number or a message: SystemExit takes all
    return 0
