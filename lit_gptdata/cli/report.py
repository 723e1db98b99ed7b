"""The command that reports on a sweep."""

import argparse
from pathlib import Path


def report_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="DIR", help="the folder of a sweep, under multirun/")


def report(args: argparse.Namespace) -> None:
    """Write sweep.html, sweep.csv and pictures for a sweep's jobs."""
    from lit_gptdata.report.page import report_sweep
    from lit_gptdata.report.rows import check_sweep

    report_sweep(check_sweep(Path(args.folder)))
