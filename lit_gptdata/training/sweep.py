"""What a job of a sweep leaves behind, and what is made of all of them when the sweep ends.

train.py  ──▶ <job>/result.json, written when a job begins and when it ends, however it ends
          ──▶ sweep.csv, sweep.html, written when the last job has ended: report/
"""

from __future__ import annotations

import gc
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig

from lit_gptdata._io import write_json
from lit_gptdata.configs import root_cause
from lit_gptdata.training.ranks import sweeping

EXTRAS = {
    "hydra/launcher/joblib": "joblib",
    "hydra/launcher/submitit_local": "submitit",
    "hydra/launcher/submitit_slurm": "submitit",
    "hydra/sweeper/optuna": "optuna",
}
"""Which extra brings a config that Hydra then finds."""


@contextmanager
def recorded(folder: Path) -> Iterator[dict[str, Any]]:
    """Keep `result.json` in a job's folder: that it runs, then how it ended; errors pass through.

    The job puts its figures into what it gets. Nothing of it stays in memory for the next one.
    """
    overrides = list(HydraConfig.get().overrides.task) if HydraConfig.initialized() else []
    result: dict[str, Any] = {
        "status": "running",
        "error": None,
        "overrides": overrides,
        "tokens": None,
        "steps": None,
        "seconds": None,
        "parameters": None,
        "metrics": {},
    }
    _write(folder, result)
    began = time.perf_counter()
    try:
        yield result
        result["status"] = "completed"
    except (KeyboardInterrupt, SystemExit):
        result["status"] = "stopped"
        raise
    except BaseException as error:
        told = root_cause(error)
        result |= {"status": "failed", "error": f"{type(told).__name__}: {told}"}
        if sweeping():
            _forget(error)
        raise
    finally:
        result["seconds"] = time.perf_counter() - began
        _write(folder, result)
        if sweeping():
            gc.collect()  # Trainer, model and data hold each other, and a GPU's memory with them


@rank_zero_only
def _write(folder: Path, result: dict[str, Any]) -> None:
    write_json(folder / "result.json", result)


def _forget(error: BaseException | None) -> None:
    """Drop the local variables of an error's frames: Hydra keeps errors until the sweep ends."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


class SweepFolder(Callback):
    """Notes, when Hydra begins a sweep, where its jobs leave their results."""

    folder: ClassVar[Path | None] = None

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        SweepFolder.folder = Path(config.hydra.sweep.dir).resolve()


@contextmanager
def reported() -> Iterator[None]:
    """Write the report of a sweep that runs inside, however that ends; exits with 1 if a job failed.

    A `finally`, since Hydra does not call its callbacks at the end of a sweep with a failed job. Where
    Hydra has missed a launcher or a sweeper, say how to install it.
    """
    failed = None
    try:
        yield
    except SystemExit as end:
        missing = getattr(end.__context__, "missing_cfg_file", None)  # which Hydra has printed
        if missing in EXTRAS:
            line = f"{missing} is an extra: pip install 'lit-gptdata[{EXTRAS[missing]}]'"
            print(line, file=sys.stderr)
        raise
    finally:
        if SweepFolder.folder is not None and SweepFolder.folder.is_dir():
            failed = _tell(SweepFolder.folder)
    if failed:  # a sweeper may go on after a failed job, and end as if nothing had been
        raise SystemExit(1)


@rank_zero_only
def _tell(folder: Path) -> int:
    """Write and print the report; returns how many jobs failed."""
    try:
        from lit_gptdata.report.page import report_sweep  # not at the top: it loads matplotlib

        return report_sweep(folder).count("failed")
    except Exception as error:  # of whatever kind: it must not hide what the sweep ended with
        print(f"no report of {folder}: {type(error).__name__}: {error}", file=sys.stderr)
        return 0
