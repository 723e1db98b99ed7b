"""metrics.csv, and a run in TensorBoard, W&B or MLflow for each job."""

import csv
import io
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any

from filelock import FileLock
from hydra.core.hydra_config import HydraConfig
from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.fabric.utilities.logger import _flatten_dict
from lightning.pytorch.callbacks import LambdaCallback
from lightning.pytorch.loggers import CSVLogger, MLFlowLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf

from lit_gptdata._fsspec import redacted
from lit_gptdata._io import write_whole
from lit_gptdata.configs import conf_dir
from lit_gptdata.report.jobs import shorten
from lit_gptdata.report.usage import draw_lengths
from lit_gptdata.text.formats import needs
from lit_gptdata.training.folder import in_sweep

# Environment variable with the words of a sweep's command line, which all of its jobs share.
SHARED_WORDS = "LIT_GPTDATA_SHARED_WORDS"
MAX_NAME = 80  # characters, which are at most 255 bytes: the name is a folder of TensorBoard
sys.modules[f"{__package__}.metrics_csv"] = sys.modules[__name__]  # its name in old config.yaml files


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
    """Complete run_name and run_group, and replace names in `logger` by their configs: [csv, wandb].

    The name is the job's overrides, or the folder's name. A run resumed in its folder keeps its name.
    """
    names = [cfg.logger] if isinstance(cfg.get("logger"), str) else cfg.get("logger")
    if names and not isinstance(names, DictConfig) and all(isinstance(name, str) for name in names):
        cfg.logger = OmegaConf.merge(*map(_load, names))
    unnamed = {"output_dir", "ckpt_path", "logger", *os.environ.get(SHARED_WORDS, "").split("\n")}
    task = HydraConfig.get().overrides.task if HydraConfig.initialized() else []
    words = [str(HydraConfig.get().job.num)] if in_sweep() else []
    words += [word for word in task if unnamed.isdisjoint((word, word.partition("=")[0]))]
    kept: Any = {}
    if Path(cfg.ckpt_path or "/").is_relative_to(folder) and (folder / "config.yaml").is_file():
        kept = OmegaConf.load(folder / "config.yaml")
    name = redacted(" ".join(words) or folder.name)  # clients send it to a server
    name = shorten(re.sub("[/$]", "_", name), MAX_NAME)
    group = "/".join(folder.parts[-3:-1]) if in_sweep() else ""
    for key, value in {"run_name": name, "run_group": group}.items():
        OmegaConf.update(cfg, key, cfg.get(key) or kept.get(key) or value, force_add=True)


def _load(name: str) -> Any:
    config: Any = OmegaConf.load(conf_dir() / "logger" / f"{name}.yaml")
    return OmegaConf.merge(*map(_load, config.pop("defaults", [])), config)


@rank_zero_only
def prepare_loggers(cfg: DictConfig) -> None:
    """Make the experiment of MLflow; raises ImportError without mlflow."""
    nodes = cfg.get("logger") or []
    for node in nodes.values() if isinstance(nodes, DictConfig) else nodes:
        if not isinstance(node, DictConfig):  # null, or what `build_all` refuses
            continue
        if "MLFlowLogger" not in str(node.get("_target_")) or "tracking_uri" not in node:
            continue
        mlflow = needs("mlflow", "integrations", node._target_)
        uri, place = node.tracking_uri or "sqlite:///outputs/mlflow.db", node.get("artifact_location")
        lock: Any = nullcontext()
        if uri.startswith("sqlite:///"):
            path = Path(uri.removeprefix("sqlite:///")).resolve()
            path.parent.mkdir(parents=True, exist_ok=True)
            lock = FileLock(f"{path}.lock")  # MLflow cannot make a database in two processes
            place = place or str(path.with_suffix(""))  # MLflow would make ./mlruns
            node.tracking_uri = uri = f"sqlite:///{path}"  # the current folder may change
        with lock, suppress(mlflow.exceptions.MlflowException):  # it exists
            mlflow.MlflowClient(uri).create_experiment(node.experiment_name, place)


@contextmanager
def open_runs(trainer: Any, cfg: DictConfig, folder: Path, budget: Any) -> Iterator[None]:
    """Start a run of each client before the block, and close it after the block.

    A client gets the config and fingerprints of the data, metrics over tokens, and two pictures.
    """
    config: Any = OmegaConf.to_container(cfg, resolve=True)
    kinds, loggers = TensorBoardLogger | WandbLogger | MLFlowLogger, trainer.loggers
    clients: list[Any] = [each for each in loggers if trainer.is_global_zero and isinstance(each, kinds)]
    status = "failed"
    try:
        for logger in clients:
            run = logger.experiment  # an error, such as a missing login, comes before the training
            if isinstance(logger, WandbLogger):
                run.define_metric("*", step_metric="tokens")
            logger.log_metrics = partial(_log, logger, budget)
            # Lightning would log the model's arguments, too, and end the run with each validation.
            logger.log_hyperparams = logger.finalize = lambda *_: None
        if clients:
            trainer.callbacks.append(LambdaCallback(on_fit_start=partial(_describe, clients, config)))
        yield
        status = "success"
    except (KeyboardInterrupt, SystemExit):
        status = "KILLED"
        raise
    finally:
        for logger in clients:
            try:
                _close(logger, status, folder)
            except Exception as error:  # it must not hide an error of the training
                print(f"warning: {type(logger).__name__} did not close: {error!r}", file=sys.stderr)


def _log(logger: Any, budget: Any, metrics: Any, step: int | None = None) -> None:
    values, x = {**metrics, "tokens": budget.tokens}, step
    if not isinstance(logger, WandbLogger):  # whose x axis is any metric
        values, x = values | {"step": step}, budget.tokens
    type(logger).log_metrics(logger, values, x)


@rank_zero_only
def _describe(clients: list[Any], config: dict[str, Any], trainer: Any, pl_module: Any) -> None:
    """Log hyperparameters and fingerprints, and draw lengths.png."""
    stores = {source.name: source.store for source in trainer.datamodule._data.all}
    draw_lengths(stores, Path(config["output_dir"], "lengths.png"))
    flat = _flatten_dict({name: value for name, value in config.items() if name != "logger"})
    flat = {name: x if isinstance(x, int | float) else redacted(x) for name, x in flat.items()}
    flat |= {f"fingerprint/{name}".strip("/"): store.fingerprint for name, store in stores.items()}
    for logger in clients:
        if isinstance(logger, TensorBoardLogger):
            from torch.utils.tensorboard.summary import hparams

            summary = hparams(flat, {})[1]  # type: ignore[no-untyped-call]
            logger.experiment.file_writer.add_summary(summary)
            continue
        values = flat
        if isinstance(logger, MLFlowLogger):  # the parameters of a run that continues cannot change
            known = logger.experiment.get_run(logger.run_id).data.params
            values = {name: value for name, value in flat.items() if name not in known}
        type(logger).log_hyperparams(logger, values)


def _close(logger: Any, status: str, folder: Path) -> None:
    for path in (folder / "lengths.png", folder / "loss.png"):
        if status != "success" or not path.exists():
            continue
        if isinstance(logger, WandbLogger):
            logger.log_image(f"plots/{path.stem}", [str(path)])
        elif isinstance(logger, MLFlowLogger):
            logger.experiment.log_artifact(logger.run_id, str(path), "plots")
        else:
            from matplotlib.image import imread

            logger.experiment.add_image(f"plots/{path.stem}", imread(path), dataformats="HWC")
    type(logger).finalize(logger, status)
    if isinstance(logger, WandbLogger) and logger._experiment:
        logger.experiment.finish(exit_code=int(status != "success"))
