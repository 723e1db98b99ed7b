"""The command that repeats a job, or runs the jobs of a sweep that did not end."""

from __future__ import annotations

import argparse
import json
import shlex
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
    parser.add_argument("folder", metavar="DIR", help="the folder of a job or of a single run")
    help_text = "DIR is a sweep: run its jobs that were killed, failed, stopped or never started"
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
    if status := train(new, [f"--config-path={folder.resolve()}", "--config-name=config"]):
        raise SystemExit(status)
    old, metrics = recorded["metrics"], read_result(new)["metrics"]
    rows, different = [["metric", str(folder), str(new), ""]], 0
    for name in (name for name in old | metrics if name not in SPEEDS):
        equal = old.get(name) == metrics.get(name)
        different += not equal
        values = (str(each.get(name)) for each in (old, metrics))
        rows.append([name, *values, "bitwise equal" if equal else "different"])
    print("", *aligned(rows), sep="\n")
    if different:
        problem = f"{different} of {len(rows) - 1} metrics differ from those of {folder}"
        raise ValueError(f"{problem}: the text, packages, hardware or number of threads have changed")


def why_not(folder: Path, recorded: dict[str, Any]) -> str:
    """Say why the config.yaml in a folder does not repeat a job, and what to do; "" if it does."""
    from omegaconf import OmegaConf

    if any(folder.glob("*/result.json")):
        return "is a sweep: give the folder of one of its jobs, or --unfinished"
    if not (folder / "config.yaml").is_file():
        return "has no config.yaml: give the folder of a run, such as multirun/…/3"
    if (status := recorded.get("status")) != "completed":
        advice = f"in a sweep, lit-gptdata rerun {folder.resolve().parent} --unfinished runs it"
        return f"is not complete, its status is {status}: {advice}"
    cfg: Any = OmegaConf.load(folder / "config.yaml")
    if cfg.get("output_dir") is not None:  # it would overwrite the old run
        again = shlex.join(["lit-gptdata", "train", *recorded["overrides"]])
        return f"is of an old version, whose config.yaml names its own folder: {again}"
    if (nodes := cfg.trainer.get("num_nodes", 1)) != 1:
        again = f"lit-gptdata train --config-path={folder} --config-name=config"
        return f"ran on {nodes} machines: on each of them run {again}"
    return ""


def finish_sweep(folder: Path) -> None:
    """Run the jobs without a result, one after the other, each in its folder; then write the report."""
    from lit_gptdata.report.page import report_sweep
    from lit_gptdata.report.rows import check_sweep

    jobs = planned_jobs(check_sweep(folder))
    for path in folder.glob("**/result.json"):
        jobs[path.parent.relative_to(folder).as_posix()] = read_result(path.parent)["overrides"]
    for name, overrides in jobs.items():
        if read_result(folder / name).get("status") != "completed":
            print(f"job {name}: {shlex.join(overrides)}", flush=True)
            train(folder / name, [*overrides, "hydra.sweeper.params=null"])
    if n := len(jobs) - report_sweep(folder).count("completed"):
        raise ValueError(f"{n} of {len(jobs)} jobs did not complete: the table says why")


def planned_jobs(folder: Path) -> dict[str, list[str]]:
    """Name of a job's folder → its overrides, from the multirun.yaml of Hydra's own sweeper; else {}."""
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from omegaconf import OmegaConf

    if not (folder / "multirun.yaml").is_file():
        return {}
    hydra: Any = OmegaConf.load(folder / "multirun.yaml").hydra
    if OmegaConf.to_container(hydra.sweep)["subdir"] != "${hydra.job.num}":
        return {}
    words = [f"{key}={value}" for key, value in (hydra.sweeper.params or {}).items()]
    overrides = OverridesParser.create().parse_overrides([*words, *hydra.overrides.task])
    (jobs,) = BasicSweeper.split_arguments(overrides, None)
    return {str(number): job for number, job in enumerate(jobs)}


def train(folder: Path, words: Sequence[str]) -> int:
    """Run a job in its own process, in a folder; return the exit status. Ctrl-C stops the job."""
    place = f"hydra.run.dir={quote_text(str(folder.resolve()))}"
    process = subprocess.Popen([sys.executable, "-m", "lit_gptdata", "train", *words, place])
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)  # the job gets the signal, too
    status = process.wait()
    signal.signal(signal.SIGINT, handler)
    if status == 130:
        raise KeyboardInterrupt
    return status


def read_result(folder: Path) -> dict[str, Any]:
    """Read result.json; {} if the job was killed before it was written."""
    path = folder / "result.json"
    return json.loads(path.read_bytes()) if path.is_file() else {}  # type: ignore[no-any-return]
