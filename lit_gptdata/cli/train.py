"""The command that trains a GPT on raw text: `lit-gptdata train` and `python train.py`."""

from __future__ import annotations

import ctypes
import io
import logging
import math
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from inspect import Parameter
from pathlib import Path
from typing import Any

import lightning as L
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate, to_absolute_path
from lightning.pytorch.callbacks import Checkpoint, ProgressBar
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import SIGTERMException
from omegaconf import DictConfig, OmegaConf

from lit_gptdata._checks import accepted, check_integer, check_number
from lit_gptdata._io import close_bars, write_whole
from lit_gptdata.cli.train_tokenizer import train_on
from lit_gptdata.configs import all_options, register_resolvers, shorten_warnings
from lit_gptdata.datamodule import GPTDataModule
from lit_gptdata.tokens.tokenizer import Tokenizer
from lit_gptdata.training.budget import TokenBudget
from lit_gptdata.training.checkpoints import kept_checkpoint, resume_command
from lit_gptdata.training.errors import short_errors
from lit_gptdata.training.folder import check_launcher, in_sweep, make_folder, record_config
from lit_gptdata.training.loggers import name_run, open_runs, prepare_loggers
from lit_gptdata.training.summary import evaluate, name_losses, sample, save_summary
from lit_gptdata.training.sweep import record_result, scored_text
from lit_gptdata.training.throughput import Throughput
from lit_gptdata.training.val_sets import ValSets
from lit_gptdata.windows.loader import check_not_empty

# Least value → integers with it; None → numbers ≥ 0. Lightning checks neither type nor sign of most.
TRAINER_OPTIONS = {
    -1: ("max_steps", "max_epochs", "num_sanity_val_steps"),  # -1: no limit
    0: ("min_steps", "min_epochs", "log_every_n_steps"),
    1: ("accumulate_grad_batches", "check_val_every_n_epoch", "num_nodes"),
    None: ("gradient_clip_val", "overfit_batches", "limit_train_batches", "limit_val_batches"),
}
NOT_NULL = ("max_steps", "accumulate_grad_batches")  # Lightning would compare null with a number
log = logging.getLogger(__name__)
DEFAULT_THREADS = torch.get_num_threads()
register_resolvers()  # also in the worker processes of a launcher


def main(cfg: DictConfig) -> float:
    """Run one job in its folder; return the final loss, which a sweeper minimizes."""
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel("WARNING")  # no tips
    # The folder of the run already contains files from Hydra, and a resumed run has its own folder.
    shorten_warnings()
    warnings.filterwarnings("ignore", ".*exists and is not empty.*|The dirpath has changed.*")
    # Hydra would print the error of a single job; a sweep needs it as an exception.
    with short_errors() if HydraConfig.initialized() and not in_sweep() else nullcontext():
        check_options(cfg)
        folder = make_folder(cfg)
        name_run(cfg, folder)
        try:
            with record_result(folder) as result:
                record_config(cfg, folder)
                train(cfg, folder, result)
        finally:
            if HydraConfig.initialized():  # its folder is empty if output_dir names another one
                path = Path(HydraConfig.get().runtime.output_dir)
                with suppress(OSError):
                    path.rmdir()
                    path.parent.rmdir()  # the date, and nothing above it: perhaps the working folder
    metrics = result["metrics"]
    return float(metrics.get("val_loss", metrics.get("train_loss", math.nan)))


def train(cfg: DictConfig, folder: Path, result: dict[str, Any]) -> None:
    """Build data, model and Trainer from the config, train, evaluate, and save the results."""
    keep_memory()
    torch.set_num_threads(cfg.threads or DEFAULT_THREADS)
    result["global_seed"] = L.seed_everything(cfg.seed, workers=True, verbose=False)
    budget = TokenBudget(cfg.max_tokens, cfg.val_every_tokens)
    job_folder = os.getcwd()
    os.chdir(to_absolute_path("."))  # where the user typed the command, also with hydra.job.chdir=true
    if cfg.get("vocab_size") is not None:  # missing in the config.yaml of an older run
        train_own_tokenizer(cfg, folder / "tokenizer.json")
    prepare_loggers(cfg)
    data, model, trainer = build(cfg, budget, val_sets := ValSets(monitor := cfg.get("monitor")))
    os.chdir(job_folder)
    check_launcher(trainer)

    rows: dict[str, str] = {}
    with explain_stop(folder, trainer, budget), open_runs(trainer, cfg, folder, budget):
        if trainer.world_size == 1:
            data.prepare_data()
            data.setup()
            check_not_empty(data.train_steps)  # before the validation, which may take long
        if cfg.ckpt_path is None:
            evaluate(trainer, model, data, "val", monitor=monitor)  # the loss of the untrained model
            if trainer.world_size == 1 and all(before := sample(data, model)):
                rows["before training"] = before[1]
        trainer.fit(model, datamodule=data, ckpt_path=cfg.ckpt_path, weights_only=True)

        # With a spawn or fork strategy, other processes did the training, and the data module and the
        # TokenBudget of this process have not seen it.
        data.trainer = trainer
        data.setup()
        losses = name_losses(trainer.callback_metrics, monitor)
        result["metrics"] = metrics = {name: float(value) for name, value in losses.items()}
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, Throughput) and callback.mean:
                metrics["tokens_per_second"] = callback.mean
        if data.train_windows.kind != "sliding":
            metrics["padding"] = data.train_windows.padding
        result["tokens"] = max(budget.tokens, int(metrics.pop("tokens", 0)))
        result["steps"] = trainer.global_step or None
        result["seed"] = getattr(data, "seed", None)
        result["parameters"] = sum(p.numel() for p in model.parameters())
        result["val_text"] = scored_text(data)
        is_scored = val_sets.step == trainer.global_step  # by the last validation of the fit
        splits = ["test"] if is_scored else ["val", "test"]
        metrics |= evaluate(trainer, model, data, *splits, monitor=monitor)
        metrics.pop("tokens", None)
        rows |= last_rows(cfg, folder, trainer, result)
        save_summary(trainer, model, data, metrics, folder, rows, monitor)


def keep_memory() -> None:
    """Let Linux's allocator keep the memory that a step frees, because the next step needs it again.

    Otherwise the system clears 100 MB for each array of logits: a quarter of a small run's CPU time.
    """
    if hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(-4, 0)  # M_MMAP_MAX: large arrays are in the heap, too
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD, bytes: the heap does not shrink


def last_rows(cfg: DictConfig, folder: Path, trainer: L.Trainer, result: Any) -> dict[str, str]:
    """The end of the summary: the folder, the checkpoint, and the command that trains longer."""
    rows = {"trained on": f"{result['tokens']:,} tokens in {trainer.global_step:,} steps"}
    if padding := result["metrics"].get("padding"):
        rows["trained on"] += f", about {result['tokens'] * padding:,.0f} of them padding"
    rows |= {"folder": shown(folder), "checkpoint": shown(kept_checkpoint(trainer))}
    if rows["checkpoint"] and not in_sweep():
        limit = ("max_tokens", cfg.max_tokens or result["tokens"])
        if cfg.trainer.get("max_steps", -1) != -1:
            limit = ("trainer.max_steps", trainer.global_step)
        rows["train longer"] = resume_command(rows["folder"], f"{limit[0]}={2 * limit[1]}")
    return rows


@contextmanager
def explain_stop(folder: Path, trainer: L.Trainer, budget: TokenBudget) -> Iterator[None]:
    """After Ctrl-C (exit status 130) or SIGTERM (143), print what was kept and how to resume."""

    def stop(*_: Any) -> None:
        if signal.getsignal(signal.SIGTERM) is stop:  # otherwise the Trainer stops, between two steps
            raise SIGTERMException

    is_main = threading.current_thread() is threading.main_thread()  # others may set no handler
    if catches := is_main and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:
        signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except (KeyboardInterrupt, SystemExit) as error:
        number = signal.SIGTERM if isinstance(error, SIGTERMException) else signal.SIGINT
        causes = (error, error.__context__)  # after Ctrl-C, Lightning exits with status 1
        if number == signal.SIGINT and not any(isinstance(each, KeyboardInterrupt) for each in causes):
            raise
        text = "stopped before the first step. Finished tokens are kept: run the same command again"
        if in_sweep():  # its checkpoints have only weights
            command = f"lit-gptdata rerun {shown(folder.parent)} --unfinished"
            text = f"stopped. To run the jobs that did not complete:\n  {command}"
        elif path := kept_checkpoint(trainer):
            text = f"stopped after {budget.tokens:,} tokens. Kept: {shown(path)}. To continue:"
            text += f"\n  {resume_command(shown(folder))}"
        close_bars()
        rank_zero_only(print)(text, file=sys.stderr)
        raise SystemExit(128 + number) from error
    finally:
        if catches:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def shown(path: str | Path) -> str:
    """The path, from the folder where the user typed the command if it is inside."""
    start = to_absolute_path(".")
    return os.path.relpath(path, start) if Path(path).is_relative_to(start) else str(path)


def train_own_tokenizer(cfg: DictConfig, path: Path) -> None:
    """Train a tokenizer of `vocab_size` tokens, and use it; each rank writes the same bytes.

    A resumed run keeps the tokenizer of its run, even if the text has changed.
    """
    if (given := cfg.data.get("tokenizer", "gpt2")) != "gpt2":
        raise ValueError(f"vocab_size trains a tokenizer: leave it or data.tokenizer={given} out")
    if cfg.ckpt_path is None:
        lines = train_on(instantiate(cfg.data), path, cfg.vocab_size)
    else:
        kept = Path(cfg.ckpt_path).parents[1] / path.name
        if not kept.is_file():
            raise ValueError(f"{kept} does not exist: set data.tokenizer to the tokenizer of the run")
        write_whole(path, kept.read_bytes())
        lines = [f"{kept}: {Tokenizer(str(path)).vocab_size:,} tokens, from the run that continues"]
    rank_zero_only(print)(*lines, sep="\n")
    cfg.data.tokenizer = str(path)


def build(cfg: DictConfig, *own: L.Callback) -> tuple[GPTDataModule, L.LightningModule, L.Trainer]:
    """Build the objects of a config; the Trainer gets the callbacks `own`, too."""
    data = instantiate(cfg.data)
    model = build_model(cfg, data)
    callbacks = [*own, *build_all(cfg, "callbacks", L.Callback)]
    unwanted = {"enable_progress_bar": ProgressBar, "enable_checkpointing": Checkpoint}
    for option, kind in unwanted.items():
        if cfg.trainer.get(option) is False:
            callbacks = [each for each in callbacks if not isinstance(each, kind)]
    if not model.automatic_optimization and cfg.trainer.get("gradient_clip_val"):
        cfg.trainer.gradient_clip_val = None  # Lightning refuses it
        log.info("trainer.gradient_clip_val has no effect: the model steps its optimizers itself")
    trainer = instantiate(cfg.trainer, callbacks=callbacks, logger=build_all(cfg, "logger", Logger))
    return data, model, trainer


def build_model(cfg: DictConfig, data: GPTDataModule) -> L.LightningModule:
    """Build the model, with a stem, `vocab_size` and `eot` if it takes them.

    Raises TypeError or ValueError for a model that the Trainer cannot train or resume.
    """
    make, takes = constructor(cfg, "model")
    name = make.func.__name__
    given: dict[str, Any] = {"vocab_size": data.vocab_size, "eot": data.eot}
    if make.keywords.get("eot") is None:  # null: the one of the data
        make.keywords.pop("eot", None)
    if "stem" in takes and OmegaConf.select(cfg, "stem._target_"):
        given["stem"] = build_stem(cfg, data)
    elif "stem" in takes and takes["stem"].default is Parameter.empty:
        raise ValueError(f"{name} needs a stem: leave stem=none out, or choose another model")
    model = make(**{key: given[key] for key in given if key in takes and key not in make.keywords})
    if not isinstance(model, L.LightningModule):
        raise TypeError(f"{name} must be a lightning.LightningModule, as in examples/own_model")
    if (parameters := [*model.parameters()]) and not any(each.requires_grad for each in parameters):
        raise ValueError(f"{name} has no parameters to train: add layers, or leave stem.freeze out")
    names = [key for key, value in model.hparams.items() if not is_plain(value)]
    if names and cfg.trainer.get("enable_checkpointing", True):
        raise ValueError(
            f"{name} could not resume: write self.save_hyperparameters(ignore={names}) in it"
        )
    return model


def build_stem(cfg: DictConfig, data: GPTDataModule) -> torch.nn.Module:
    """Build the stem for the vocabulary of the data. Your own stem need not take `freeze`."""
    make, takes = constructor(cfg, "stem")
    stem: torch.nn.Module = make(**({"vocab_size": data.vocab_size} if "vocab_size" in takes else {}))
    if getattr(stem, "max_length", data.max_length) < data.max_length:
        problem = f"stem.max_length must be ≥ data.max_length={data.max_length}, or left out"
        raise ValueError(f"{problem}, got {stem.max_length}")
    return stem.requires_grad_(False) if cfg.stem.get("freeze") else stem


def constructor(cfg: DictConfig, group: str) -> tuple[partial[Any], dict[str, Parameter]]:
    """The class in a group with its options, and the parameters that it takes.

    Options of shipped configs that your own class does not take are left out, such as model.n_heads of
    debug=fast. What you type is kept, and the class refuses it.
    """
    make = instantiate(cfg[group], _partial_=True, _convert_=cfg[group].get("_convert_", "all"))
    takes = accepted(make.func)
    words = HydraConfig.get().overrides.task if HydraConfig.initialized() else []
    typed = {word.lstrip("+").partition("=")[0] for word in words} - {"stem.freeze"}
    for key in all_options()[group].keys() - typed:
        if (name := key.rpartition(".")[2]) not in takes:
            make.keywords.pop(name, None)
    return make, takes


def is_plain(value: Any) -> bool:
    """Whether a checkpoint with this value loads with weights_only=True."""
    try:
        torch.save(value, buffer := io.BytesIO())
        buffer.seek(0)
        torch.load(buffer, weights_only=True)
    except Exception:
        return False
    return True


def build_all(cfg: DictConfig, group: str, kind: type) -> list[Any]:
    """Build the objects of a mapping or a list of nodes, without those that are null."""
    nodes = cfg.get(group)
    objects = instantiate(nodes) if OmegaConf.is_config(nodes) else []
    objects = objects.values() if isinstance(objects, DictConfig) else objects
    for each in objects:
        if not isinstance(each, kind | None):
            raise TypeError(f"{group} must be null, or {kind.__name__}s with a _target_, got {each!r}")
    return [each for each in objects if each is not None]


def check_options(cfg: DictConfig) -> None:
    """Raise ValueError or TypeError for options that Hydra or the Trainer would accept and misuse."""
    for group in ("data", "stem", "model", "trainer"):
        if not isinstance(cfg.get(group), DictConfig) and (group, cfg.get(group)) != ("stem", None):
            raise TypeError(f"no choices for {group}: leave {group}=… out, and set {group}.…=…")
    for name in ("callbacks", "logger"):
        if name in cfg.trainer:
            raise ValueError(f"trainer.{name} has no effect here: set {name}, such as {name}=none")
    for low, names in TRAINER_OPTIONS.items():
        for name in names:
            if cfg.trainer.get(name) is None and (name not in cfg.trainer or name not in NOT_NULL):
                continue
            if low is None:
                check_number(f"trainer.{name}", cfg.trainer[name], math.inf)
            else:
                check_integer(f"trainer.{name}", cfg.trainer[name], low)
    max_threads = 64 * (os.cpu_count() or 1)  # torch crashes with more
    for name, least, most in (("seed", 0, 2**32 - 1), ("threads", 1, max_threads)):
        if cfg[name] is not None and check_integer(name, cfg[name], least) > most:
            raise ValueError(f"{name} must be an integer in [{least}, {most}], got {cfg[name]}")
