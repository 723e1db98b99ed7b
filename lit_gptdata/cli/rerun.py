"""The commands that repeat a job, run the jobs of a sweep that did not end, and report on a sweep."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from lit_gptdata._io import aligned
from lit_gptdata.configs import quote_text

SPEEDS = ("tokens_per_second", "data_wait")  # metrics that differ between two runs


def rerun_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="DIR", help="the folder of a job, a run or a sweep")
    help_text = "of a sweep: run its jobs that were killed, failed, stopped or never started"
    parser.add_argument("--unfinished", action="store_true", help=help_text)


def rerun(args: argparse.Namespace) -> None:
    """Repeat a job in a new folder, and compare its metrics with the recorded ones."""
    folder = Path(args.folder)
    if args.unfinished:
        finish_sweep(folder)
        return
    recorded, new = read_result(folder), Path("outputs", f"{datetime.now():%Y-%m-%d/%H-%M-%S-%f}")
    if problem := why_not(folder, recorded):
        raise ValueError(f"{folder} {problem}")
    words = [f"--config-path={folder.resolve()}", "--config-name=config", f"hydra.run.dir={new}"]
    if status := train(words):
        raise SystemExit(status)
    old, metrics = recorded["metrics"], read_result(new)["metrics"]
    rows = [["metric", str(folder), str(new), ""]]
    for name in (name for name in old if name not in SPEEDS):  # an old version recorded fewer
        a, b = str(old.get(name)), str(metrics.get(name))
        rows.append([name, a, b, "bitwise equal" if a == b else "different"])
    print("", *aligned(rows), sep="\n")
    if different := sum(row[-1] == "different" for row in rows):
        problem = f"{different} of {len(rows) - 1} metrics differ from the metrics of {folder}"
        raise ValueError(f"{problem}: the text, packages, hardware, threads or options have changed")


def why_not(folder: Path, recorded: dict[str, Any]) -> str:
    """Say why the config.yaml in a folder does not repeat a job, and what to do; "" if it does."""
    from omegaconf import OmegaConf

    if any(folder.glob("*/result.json")):
        return "is a sweep: give the folder of one of its jobs, or --unfinished"
    if not (folder / "config.yaml").is_file():
        return "has no config.yaml: give the folder of a run, such as multirun/…/3"
    if (status := recorded.get("status")) != "completed":
        return f"is not complete, its status is {status}: in a sweep, give its folder, and --unfinished"
    cfg: Any = OmegaConf.load(folder / "config.yaml")
    if cfg.get("output_dir") is not None:
        return "is of an old version, and would be overwritten: run its command again"
    if (nodes := cfg.trainer.get("num_nodes", 1)) != 1:
        again = f"lit-gptdata train --config-path={folder} --config-name=config"
        return f"ran on {nodes} machines: on each of them run {again}"
    return ""


def finish_sweep(folder: Path) -> None:
    """Run the command of a sweep again, which leaves out the jobs that completed."""
    from omegaconf import OmegaConf

    from lit_gptdata.report.rows import check_sweep

    if not (check_sweep(folder) / "multirun.yaml").is_file():
        raise ValueError(
            f"{folder} has no multirun.yaml, as after an Optuna sweep: run its command again"
        )
    hydra: Any = OmegaConf.load(folder / "multirun.yaml").hydra
    flags = {"main": "--config-path", "command-line": "--config-dir"}
    sources = [each for each in hydra.runtime.config_sources if each.provider in flags]
    words = [f"{flags[each.provider]}={each.path}" for each in sources]
    words += [f"--config-name={hydra.job.config_name}", *hydra.overrides.hydra, *hydra.overrides.task]
    words = ["-m", *words, f"hydra.sweep.dir={quote_text(str(folder.resolve()))}"]
    raise SystemExit(train(words, LIT_GPTDATA_UNFINISHED="1"))


def train(words: Sequence[str], **env: str) -> int:
    """Run `lit-gptdata train` in its own process; return the exit status. Ctrl-C stops it."""
    command = [sys.executable, "-m", "lit_gptdata", "train", *words]
    process = subprocess.Popen(command, env=os.environ | env)
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process gets the signal, too
    status = process.wait()
    signal.signal(signal.SIGINT, handler)
    if status == 130:
        raise KeyboardInterrupt
    return status


def read_result(folder: Path) -> dict[str, Any]:
    """Read result.json; {} if the job was killed before it was written."""
    path = folder / "result.json"
    return json.loads(path.read_bytes()) if path.is_file() else {}


def report_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="DIR", help="the folder of a sweep, under multirun/")


def report(args: argparse.Namespace) -> None:
    """Write sweep.html, sweep.csv and pictures for a sweep's jobs."""
    from lit_gptdata.report.page import report_sweep
    from lit_gptdata.report.rows import check_sweep

    report_sweep(check_sweep(Path(args.folder)))
