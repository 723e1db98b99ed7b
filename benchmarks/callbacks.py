"""Time a training step of model=nano with callbacks, against a run without them.

    python -m benchmarks.callbacks --json benchmarks/results/callbacks.json

A run trains on batches of 8 × 64 tokens with one thread, and validates on 10 batches after 20 steps.
It logs every 5 steps, the default of train.py. The number is CPU time of the process, validations
included, divided by the steps. Candidates take turns; ratios are taken within a turn. Their order
changes with each turn. The last column is the CPU time inside the methods of the callback or logger,
which is far less noisy. The model is GPT, but its validation_step returns losses for Scores to log.
"""

from __future__ import annotations

import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch

from benchmarks.measure import Round, median, options, ratios, report, three
from lit_gptdata import GPT
from lit_gptdata.cli.overrides import compose_config
from lit_gptdata.cli.train import build, keep_memory

CANDIDATES = {
    "none": [],
    "Throughput": ["+callbacks.one._target_=lit_gptdata.Throughput"],
    "Scores": ["+callbacks.one._target_=lit_gptdata.Scores"],
    "csv": ["logger=csv"],
    "csv, TensorBoard": ["logger=tensorboard"],
    "csv, W&B offline": ["logger=wandb", "logger.wandb.mode=offline"],
    "csv, MLflow": ["logger=mlflow", "logger.mlflow.tracking_uri='sqlite:///${output_dir}/mlflow.db'"],
}
"""Name → the overrides that add it to a run without callbacks and loggers."""
STEPS = 40  # optimizer steps of a run


class Returns(GPT):
    """A GPT that scores nothing itself."""

    on_validation_epoch_start = on_validation_epoch_end = lambda self: None

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        return self.losses(batch)


class Clock(L.Callback):
    """CPU seconds from the end of the second step to the end of the fit."""

    seconds = 0.0

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == 2:
            self.seconds = -time.process_time()

    def on_train_end(self, *_: Any) -> None:
        self.seconds += time.process_time()


def timed(watched: Any, seconds: list[float]) -> None:
    """Let a callback or a logger append the CPU time of each of its calls to `seconds`."""

    def wrap(method: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            start = time.process_time()
            result = method(*args, **kwargs)
            seconds.append(time.process_time() - start)
            return result

        return run

    for name in dir(type(watched)):
        if name.startswith(("on_", "log_")) and callable(getattr(watched, name)):
            setattr(watched, name, wrap(getattr(watched, name)))


def measure(name: str, folder: Path) -> dict[str, float]:
    """Train once; return the CPU milliseconds of a step, in all and inside of what is measured."""
    small = ["callbacks=none", "logger=none", f"trainer.max_steps={STEPS}", "threads=1"]
    small += ["trainer.val_check_interval=20", "trainer.limit_val_batches=10", f"output_dir={folder}"]
    small += [f"model._target_={__name__}.Returns", f"data.data_dir={folder}", *CANDIDATES[name]]
    cfg = compose_config(
        [*small, "+trainer.enable_progress_bar=false", "trainer.enable_checkpointing=false"]
    )
    data, model, trainer = build(cfg, clock := Clock())
    inside: list[float] = []
    for watched in (*trainer.callbacks, *trainer.loggers):
        if type(watched).__module__.startswith(("lit_gptdata", "lightning.pytorch.loggers")):
            timed(watched, inside)
    trainer.fit(model, datamodule=data)
    return {"ms": clock.seconds / (STEPS - 2) * 1e3, "inside": sum(inside) / STEPS * 1e3}


def main() -> None:
    args = options(__doc__, rounds=7).parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    keep_memory()
    rounds: list[Round] = []
    with tempfile.TemporaryDirectory() as folder:
        measure("none", Path(folder))  # tokenizes
        for turn in range(args.rounds):
            names = [*CANDIDATES][:: 1 if turn % 2 else -1]
            rounds.append({name: measure(name, Path(folder)) for name in names})
    rows = []
    for name in CANDIDATES:
        speed, both = ratios(rounds, "none", "ms", name)
        inside = median(rounds, name, "inside") / median(rounds, "none", "ms")
        rows.append([name, three(median(rounds, name, "ms")), speed, both, f"{inside:.2%}"])
    report(
        f"{STEPS} steps of model=nano, one thread; medians of {args.rounds} turns",
        ["callback", "CPU ms per step", "÷ none", "lowest – highest", "in its methods"], rows,
        measured=rounds, to=args.json,
    )  # fmt: skip


if __name__ == "__main__":
    main()
