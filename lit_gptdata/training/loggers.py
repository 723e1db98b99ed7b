"""metrics.csv, and the run of a job in TensorBoard, W&B and MLflow, which ends with the job."""

import csv
import io
import json
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import lightning as L
from hydra.core.hydra_config import HydraConfig
from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.fabric.utilities.logger import _flatten_dict
from lightning.pytorch.callbacks import LambdaCallback
from lightning.pytorch.loggers import CSVLogger, MLFlowLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf, open_dict

from lit_gptdata._fsspec import redacted
from lit_gptdata._io import write_whole
from lit_gptdata.configs import conf_dir
from lit_gptdata.report.jobs import shorten
from lit_gptdata.training.budget import TokenBudget
from lit_gptdata.training.ranks import in_sweep

# Environment variable with the words that all jobs of a sweep share, which are not in their names.
SHARED_WORDS = "LIT_GPTDATA_SHARED_WORDS"
# Logger → its package, and what pip installs.
PACKAGES = {
    "TensorBoardLogger": ("tensorboard", "tensorboard"),
    "WandbLogger": ("wandb", "wandb"),
    "MLFlowLogger": ("mlflow", "mlflow"),
}


class _KeepingWriter(ExperimentWriter):
    def _check_log_dir_exists(self) -> None:
        pass  # Lightning deletes metrics.csv here


class RunCSVLogger(CSVLogger):
    """Lightning's CSVLogger, but a run with a `ckpt_path` continues the metrics.csv in its folder.

    Rows of the earlier run from the first new row's step on are removed: the new run repeats them.
    """

    def __init__(self, save_dir: str, ckpt_path: str | None = None, **options: Any) -> None:
        super().__init__(save_dir, **options)
        self._continues = ckpt_path is not None and "://" not in str(save_dir)

    @property
    @rank_zero_experiment
    def experiment(self) -> ExperimentWriter:
        """The writer of the file."""
        if self._experiment is None and self._continues:
            self._experiment = _KeepingWriter(log_dir=self.log_dir)
        return super().experiment  # type: ignore[no-any-return]

    @rank_zero_only
    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        if self._continues and step is not None:
            writer = self.experiment
            writer.metrics_keys = keep_rows_before(step, Path(writer.metrics_file_path))
            self._continues = False
        super().log_metrics(metrics, step)


def keep_rows_before(step: int, metrics_csv: Path) -> list[str]:
    """Remove the rows from `step` on, and an incomplete last line; return the names of the columns."""
    if not metrics_csv.exists():
        return []
    text = metrics_csv.read_text(encoding="utf-8")
    reader = csv.DictReader(text[: text.rfind("\n") + 1].splitlines())
    columns = list(reader.fieldnames or [])
    rows = [row for row in reader if (row.get("step") or "").isdigit() and int(row["step"]) < step]
    file = io.StringIO()
    writer = csv.DictWriter(file, columns, extrasaction="ignore")
    writer.writeheader()
    writer.writerows(rows)
    write_whole(metrics_csv, file.getvalue().encode())
    return columns


def name_run(cfg: DictConfig, folder: Path) -> None:
    """Complete run_name by the job's overrides, and replace names in `logger` by their configs.

    A run that is resumed in its folder keeps its name. Without overrides the name is the folder's.
    """
    names = cfg.get("logger")
    names = [names] if isinstance(names, str) else names
    if names and all(isinstance(name, str) for name in names) and not isinstance(names, DictConfig):
        cfg.logger = OmegaConf.merge(*map(_load, ["csv", *names] if names != ["none"] else names))
    words = []
    if HydraConfig.initialized():
        unnamed = r"\+?(output_dir|ckpt_path|logger\b.*|run_name)="
        shared = json.loads(os.environ.get(SHARED_WORDS, "[]")) if in_sweep() else []
        words = [str(HydraConfig.get().job.num)] if in_sweep() else []
        task = HydraConfig.get().overrides.task
        words += [word for word in task if word not in shared and not re.match(unnamed, word)]
        if any(word.startswith("run_name=") for word in task):
            return
    if resumes_in(folder, cfg) and (config := folder / "config.yaml").is_file():
        words = [OmegaConf.load(config).get("run_name") or folder.name]
    elif cfg.get("run_name"):  # of the config.yaml of another run
        words = [cfg.run_name, *words]
    name = re.sub("[/$]", "_", " ".join(words) or folder.name)  # it is a folder of TensorBoard
    while len(os.fsencode(name)) > 120:  # W&B allows 128
        name = shorten(name, len(name) - 5)
    OmegaConf.update(cfg, "run_name", name, force_add=True)


def _load(name: str) -> Any:
    config: Any = OmegaConf.load(conf_dir() / "logger" / f"{name}.yaml")
    return OmegaConf.merge(*map(_load, config.pop("defaults", [])), config)


def resumes_in(folder: Path, cfg: DictConfig) -> bool:
    """Tell whether the job continues the run in its folder."""
    return Path(cfg.ckpt_path or "/").is_relative_to(folder)


@rank_zero_only
def complete_loggers(cfg: DictConfig, folder: Path) -> None:
    """Complete the options of W&B and MLflow; raises ImportError for a missing package.

    A run that is resumed in its folder continues the run of MLflow, and of W&B if it was online.
    """
    nodes, resumes = cfg.get("logger"), resumes_in(folder, cfg)
    sweep = "/".join(folder.parts[-3:-1]) if in_sweep() else None
    for node in nodes.values() if isinstance(nodes, DictConfig) else nodes or []:
        kind = str((node or {}).get("_target_")).rpartition(".")[2]
        if kind not in PACKAGES:
            continue
        module, package = PACKAGES[kind]
        if find_spec(module) is None:
            extra = "pip install 'lit-gptdata[integrations]'"
            raise ImportError(f"{kind} needs a package: pip install {package}, or for all loggers {extra}")
        with open_dict(node):
            if kind == "WandbLogger":
                node.group = node.get("group") or sweep
                latest = (folder / "wandb" / "latest-run").resolve().name  # offline-run-… cannot continue
                if resumes and latest.startswith("run-") and not node.get("id"):
                    node.id, node.name = latest.rpartition("-")[2], None
            elif kind == "MLFlowLogger" and node.get("tracking_uri"):
                _complete_mlflow(node, folder, sweep, resumes)


def _complete_mlflow(node: DictConfig, folder: Path, sweep: str | None, resumes: bool) -> None:
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    client, place = MlflowClient(node.tracking_uri), node.get("artifact_location")
    if place is None and node.tracking_uri.startswith("sqlite:///"):
        place = str(Path(node.tracking_uri.removeprefix("sqlite:///")).with_suffix("").resolve())
    with suppress(MlflowException):  # it exists; jobs of a sweep may start at the same time
        client.create_experiment(node.experiment_name, place)
    node.tags = {**(node.get("tags") or {}), "sweep": sweep or "", "output_dir": str(folder)}
    if resumes and not node.get("run_id"):
        experiment = client.get_experiment_by_name(node.experiment_name).experiment_id
        query = f'tags.output_dir = "{folder}"'
        for run in client.search_runs([experiment], query, max_results=1):
            client.update_run(run.info.run_id, "RUNNING")
            node.run_id = run.info.run_id


@contextmanager
def open_runs(trainer: L.Trainer, cfg: DictConfig, folder: Path, budget: TokenBudget) -> Iterator[None]:
    """Start a run of each client before the block, and close it after the block.

    Each gets the config, the fingerprint of the data, every metric over tokens, and two pictures.
    """
    config: Any = OmegaConf.to_container(cfg, resolve=True)
    config.pop("logger")
    clients: list[Any] = []
    status = "failed"
    try:
        for logger in [] if rank_zero_only.rank else trainer.loggers:
            if isinstance(logger, TensorBoardLogger | WandbLogger | MLFlowLogger):
                _log_values(logger, _redact(config))
                clients.append(logger)
                is_wandb = isinstance(logger, WandbLogger)
                logger.log_metrics = partial(_log, logger.log_metrics, budget, is_wandb)
                # Lightning would log the model's arguments again, and end the run with each validation.
                logger.log_hyperparams = logger.finalize = _ignore
        if clients:
            describe = partial(_describe_data, clients, folder)
            trainer.callbacks.append(LambdaCallback(on_fit_start=describe))
        yield
        status = "success"
    except (KeyboardInterrupt, SystemExit):
        status = "KILLED"
        raise
    finally:
        for logger in clients:
            try:
                _close(logger, status, folder, budget.tokens)
            except Exception as error:  # it must not hide an error of the training
                text = f"warning: {type(logger).__name__} did not close: {type(error).__name__}: {error}"
                print(text, file=sys.stderr)


def _log(log: Any, budget: TokenBudget, is_wandb: bool, metrics: Any, step: int | None = None) -> None:
    """Log metrics at the number of tokens, which is the x axis of all clients."""
    metrics = {**metrics, "tokens": budget.tokens} | ({} if step is None else {"step": step})
    log(metrics, step if is_wandb else budget.tokens)


def _ignore(*_: Any, **__: Any) -> None:
    pass


def _redact(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _redact(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_redact(inner) for inner in value]
    return redacted(value) if isinstance(value, str) else value


def _log_values(logger: Any, values: dict[str, Any]) -> None:
    """Start the run if necessary, and log hyperparameters."""
    flat = _flatten_dict(values, delimiter=".")
    if isinstance(logger, WandbLogger):
        logger.experiment.define_metric("*", step_metric="tokens")
        type(logger).log_hyperparams(logger, values)
    elif isinstance(logger, MLFlowLogger):  # whose values cannot change when a run continues
        known = logger.experiment.get_run(logger.run_id).data.params
        type(logger).log_hyperparams(logger, {k: v for k, v in flat.items() if k not in known})
    else:
        from torch.utils.tensorboard.summary import hparams

        flat = {key: v if isinstance(v, int | float | str) else str(v) for key, v in flat.items()}
        logger.experiment.file_writer.add_summary(hparams(flat, {})[1])


def _describe_data(clients: list[Any], folder: Path, trainer: Any, pl_module: Any) -> None:
    """Log the fingerprints of the token stores, and draw lengths.png."""
    from lit_gptdata.report.usage import draw_lengths

    stores = {source.name: source.store for source in trainer.datamodule._data.all}
    prints = {f"fingerprint.{name}".strip("."): store.fingerprint for name, store in stores.items()}
    draw_lengths(stores, folder / "lengths.png")
    for logger in clients:
        if isinstance(logger, TensorBoardLogger):
            for name, text in prints.items():
                logger.experiment.add_text(name, text)
        else:
            _log_values(logger, prints)


def _close(logger: Any, status: str, folder: Path, tokens: int) -> None:
    for path in (folder / "loss.png", folder / "lengths.png"):
        if not path.exists() or status != "success":
            continue
        if isinstance(logger, WandbLogger):
            logger.log_image(f"plots/{path.stem}", [str(path)])
        elif isinstance(logger, MLFlowLogger):
            logger.experiment.log_artifact(logger.run_id, str(path), "plots")
        else:
            from matplotlib.image import imread

            logger.experiment.add_image(f"plots/{path.stem}", imread(path), tokens, dataformats="HWC")
    if isinstance(logger, TensorBoardLogger) and status == "success":
        from torch.utils.tensorboard.summary import hparams

        logger.experiment.file_writer.add_summary(hparams({}, {})[2])
    type(logger).finalize(logger, status)
    if isinstance(logger, WandbLogger):
        logger.experiment.finish({"success": 0, "failed": 1, "KILLED": 255}[status])
