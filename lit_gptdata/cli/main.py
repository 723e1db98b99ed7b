"""The command `lit-gptdata`: prepare, inspect and check training data without training."""

import argparse
import io
import os
import sys
from collections.abc import Sequence

from lit_gptdata.cli.data import info, info_arguments, prepare, publish, publish_arguments, verify
from lit_gptdata.cli.interop import export, export_arguments, import_arguments, import_ids
from lit_gptdata.cli.overrides import add_overrides
from lit_gptdata.cli.report import report, report_arguments
from lit_gptdata.cli.seen import seen, seen_arguments
from lit_gptdata.cli.show import show, show_arguments
from lit_gptdata.cli.train_tokenizer import train_tokenizer, train_tokenizer_arguments

COMMANDS = {
    "prepare": (prepare, add_overrides),
    "info": (info, info_arguments),
    "show": (show, show_arguments),
    "seen": (seen, seen_arguments),
    "verify": (verify, add_overrides),
    "publish": (publish, publish_arguments),
    "train-tokenizer": (train_tokenizer, train_tokenizer_arguments),
    "import": (import_ids, import_arguments),
    "export": (export, export_arguments),
    "report": (report, report_arguments),
}
"""Name → the function that runs a command, and the one that declares its arguments."""

DESCRIPTION = "Prepare, inspect and check the data that train.py trains on, or report on a sweep."
EPILOG = """overrides are the same as for train.py:
  lit-gptdata prepare data=files data.corpus=books/
  lit-gptdata info --plot tokens.png data=files data.corpus=books/
  lit-gptdata show step=3 data=files data.corpus=books/ data.max_length=128
  lit-gptdata seen step=1000 data=mixture
  lit-gptdata publish s3://bucket/tokens data=files data.corpus=books/
  lit-gptdata publish s3://bucket/tokens data.build=ray data=files data.corpus=s3://bucket/books/
  lit-gptdata train-tokenizer own.json vocab_size=8192 data=files data.corpus=books/
import reads token files of other programs, export writes them:
  lit-gptdata import nanogpt nanoGPT/data/openwebtext/
  lit-gptdata export nanogpt nanoGPT/data/books/ data=files data.corpus=books/
report takes the folder of a sweep:
  lit-gptdata report multirun/2026-11-22/10-00-00-123456
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return the exit status; a wrong command line raises SystemExit(2)."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["train"]:
        from lit_gptdata.cli.train import run as run_train

        run_train(words[1:])
        return 0
    keeps_lines = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("lit-gptdata", formatter_class=keeps_lines, allow_abbrev=False)
    parser.description, parser.epilog = DESCRIPTION, EPILOG
    subparsers = parser.add_subparsers(metavar="command", required=True)
    for name, (run, add_arguments) in COMMANDS.items():
        summary = run.__doc__
        add_arguments(subparsers.add_parser(name, help=summary, description=summary, allow_abbrev=False))
    if not words or words[0] not in COMMANDS:
        parser.parse_args(words)  # prints the help, or an error
        parser.error("give a command")
    run, _ = COMMANDS[words[0]]
    # Intermixed: an option may be between two overrides.
    args = subparsers.choices[words[0]].parse_intermixed_args(words[1:])
    if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal may lack characters of the text
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        run(args)
        sys.stdout.flush()
    except BrokenPipeError:  # `lit-gptdata show | head` closes the pipe early
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        print("stopped; run the same command again to resume", file=sys.stderr)
        return 130
    except Exception as error:
        from lit_gptdata.configs import message_for_user, one_line

        if (message := message_for_user(error, ["lit-gptdata", *words])) is None:
            raise
        print(f"lit-gptdata {words[0]}: {one_line(message)}", file=sys.stderr)
        return 1
    return 0
