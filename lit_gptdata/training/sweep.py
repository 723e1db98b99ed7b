"""The result of each job of a sweep, and the report on all jobs at the end of the sweep.

train.py  ──▶ <job>/result.json, written when a job starts and when it ends, also after an error
          ──▶ sweep.csv, sweep.html, written after the last job: report/
"""

import gc
import hashlib
import json
import math
import os
import shlex
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

from lit_gptdata._io import as_json, write_whole
from lit_gptdata.configs import typed_command
from lit_gptdata.datamodule import GPTDataModule
from lit_gptdata.training.errors import root_cause
from lit_gptdata.training.folder import in_sweep
from lit_gptdata.training.loggers import SHARED_WORDS


@contextmanager
def record_result(folder: Path) -> Iterator[dict[str, Any]]:
    """Write `result.json` into a job's folder when the block starts and when it ends; errors propagate.

    The job adds its numbers to the yielded dict. Afterwards the memory of the job is freed for the next.
    The file is strict JSON: metrics that are NaN or infinite are the strings "nan", "inf" and "-inf".
    """
    overrides = list(HydraConfig.get().overrides.task) if HydraConfig.initialized() else []
    result: dict[str, Any] = {"status": "running", "error": None, "overrides": overrides}
    counts = ("tokens", "steps", "seconds", "parameters", "global_seed", "seed")
    result |= dict.fromkeys(counts) | {"val_text": {}, "metrics": {}}

    @rank_zero_only
    def write() -> None:
        metrics = {name: x if math.isfinite(x) else str(x) for name, x in result["metrics"].items()}
        text = json.dumps(result | {"metrics": metrics}, indent=1, allow_nan=False) + "\n"
        write_whole(folder / "result.json", text.encode())

    write()
    start = time.perf_counter()
    try:
        yield result
        result["status"] = "completed"
    except (KeyboardInterrupt, SystemExit):
        result["status"] = "stopped"
        raise
    except BaseException as error:
        cause = root_cause(error)
        result |= {"status": "failed", "error": f"{type(cause).__name__}: {cause}"}
        chained: BaseException | None = error
        while in_sweep() and chained is not None:  # Hydra keeps errors, and they keep local variables
            traceback.clear_frames(chained.__traceback__)
            chained = chained.__cause__ or chained.__context__
        raise
    finally:
        result["seconds"] = time.perf_counter() - start
        write()
        if in_sweep():
            gc.collect()  # Trainer, model and data refer to each other and hold GPU memory


def scored_text(data: GPTDataModule) -> dict[str, Any]:
    """What val_loss covers: a hash of the texts, and the ranges of their UTF-8 bytes."""
    trainer: Any = data.trainer
    contents: list[Any] = []
    edges = []
    sets = data.eval_sets("val")
    for name, windows, _ in [each for each in sets if each.trains] or sets:
        source, steps = data._data.named(name), data._steps(len(windows), "pad")
        store, (begin, end) = source.store, source.split.val
        n_windows = steps.limited(trainer.limit_val_batches) * steps.width
        end = min(end, begin + n_windows * data.max_length + 1)  # the first token is not scored
        edges += [store.byte_at(begin), store.byte_at(end)]
        contents += [name, store.n_bytes, *(each.sha256 for each in store.manifest.sources)]
    return {"sha256": hashlib.sha256(as_json(contents)).hexdigest(), "bytes": edges}


class SweepFolder(Callback):
    """Hydra callback that remembers the path of the sweep's folder, for the report."""

    folder: ClassVar[Path | None] = None

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        if config.hydra.sweeper.get("params"):
            command = typed_command()
            command.insert(2, "-m")
            raise SystemExit(f"error: several jobs need -m, a sweep: {shlex.join(command)}")

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        given = [word for word in config.hydra.overrides.task if word.startswith("output_dir=")]
        if given or config.get("output_dir") is not None:  # Hydra would only log an Exception
            advice = "set hydra.sweep.dir, the folder of the sweep"
            raise SystemExit(f"error: output_dir={config.output_dir} is for a single run: {advice}")
        SweepFolder.folder = Path(config.hydra.sweep.dir).resolve()
        os.environ[SHARED_WORDS] = "\n".join(config.hydra.overrides.task)


@contextmanager
def report_at_end() -> Iterator[None]:
    """Write the report of a sweep that runs in this block, and exit with status 1 if a job failed.

    This is not a Hydra callback, because Hydra skips its callbacks after a sweep with a failed job.
    """
    n_failed = 0
    try:
        yield
    finally:
        folder, rank = SweepFolder.folder, rank_zero_only.rank  # type: ignore[attr-defined]
        if rank == 0 and folder is not None and folder.is_dir():
            try:
                from lit_gptdata.report.page import report_sweep  # not at the top: it loads matplotlib

                n_failed = report_sweep(folder).count("failed")
            except Exception as error:  # an error of the report must not hide an error of the sweep
                print(f"no report on {folder}: {type(error).__name__}: {error}", file=sys.stderr)
    if n_failed:  # some sweepers continue after a failed job and exit with 0
        raise SystemExit(1)
