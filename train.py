"""Train a GPT on raw text: `python train.py`. `python train.py --help` lists all options."""

from __future__ import annotations

import logging
import signal
import warnings
from pathlib import Path
from typing import Any

import hydra
import lightning as L
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import SIGTERMException
from omegaconf import DictConfig, OmegaConf

from lit_gptdata import GPT, GPTDataModule, TokenBudget
from lit_gptdata.configs import register_resolvers
from lit_gptdata.training.ranks import check_launcher, in_sweep, share_run_name
from lit_gptdata.training.summary import plot_losses, summarize
from lit_gptdata.training.sweep import record_result, report_at_end

DEFAULT_THREADS = torch.get_num_threads()
register_resolvers()


@hydra.main(version_base="1.3", config_path="conf", config_name="train")
def main(cfg: DictConfig) -> float:
    """Run one job in its folder; return the final loss, which a sweeper minimizes."""
    hide_lightning_tips()
    folder = make_folder(cfg)
    with record_result(folder) as result:
        rank_zero_only(OmegaConf.save)(cfg, folder / "config.yaml", resolve=True)
        train(cfg, folder, result)
    metrics = result["metrics"]
    return metrics["val_loss" if "val_loss" in metrics else "train_loss"]


def train(cfg: DictConfig, folder: Path, result: dict[str, Any]) -> None:
    """Build data, model and Trainer from the config, train, evaluate, and save the results."""
    torch.set_num_threads(cfg.threads or DEFAULT_THREADS)
    L.seed_everything(cfg.seed, workers=True, verbose=False)
    data = instantiate(cfg.data)
    model = instantiate(cfg.model, stem=instantiate(cfg.stem, vocab_size=data.vocab_size))
    budget = TokenBudget(cfg.max_tokens, cfg.val_every_tokens)
    callbacks = [budget, *instantiate(cfg.callbacks).values()]
    loggers = list(instantiate(cfg.logger).values())
    trainer = instantiate(cfg.trainer, callbacks=callbacks, logger=loggers)
    check_launcher(trainer)

    if data.val_fraction and cfg.ckpt_path is None:
        trainer.validate(model, datamodule=data, verbose=False)  # the loss of the untrained model
    try:
        trainer.fit(model, datamodule=data, ckpt_path=cfg.ckpt_path, weights_only=True)
    except SIGTERMException as error:  # Lightning would exit with 0, as if training had finished
        raise SystemExit(128 + signal.SIGTERM) from error

    # With a spawn or fork strategy, other processes did the training, and the data module and the
    # TokenBudget of this process have not seen it.
    data.setup()
    train_metrics = dict(trainer.callback_metrics)
    metrics = train_metrics | evaluate(trainer, model, data)
    result["tokens"] = max(budget.tokens, int(train_metrics.get("tokens", 0)))
    result["steps"] = trainer.global_step or None
    result["parameters"] = sum(p.numel() for p in model.parameters())
    result["metrics"] = {name: float(value) for name, value in metrics.items() if name != "tokens"}
    save_summary(trainer, model, data, result["metrics"], folder)


def evaluate(trainer: L.Trainer, model: GPT, data: GPTDataModule) -> dict[str, float]:
    """Return the val and test metrics, as far as the data has these splits."""
    metrics: dict[str, float] = {}
    if len(data.val_windows):
        metrics |= trainer.validate(model, datamodule=data, verbose=False)[0]
    if len(data.test_windows):
        metrics |= trainer.test(model, datamodule=data, verbose=False)[0]
    return metrics


def save_summary(
    trainer: L.Trainer, model: GPT, data: GPTDataModule, metrics: dict[str, float], folder: Path
) -> None:
    """Write loss.png and summary.txt, and print the summary."""
    summary = summarize(data, model, metrics, folder)  # on all ranks: each may hold a part of the model
    if trainer.is_global_zero:
        if (folder / "metrics.csv").exists():
            plot_losses(folder / "metrics.csv", folder / "loss.png")
        (folder / "summary.txt").write_text(summary + "\n", encoding="utf-8")
        print(f"\n{summary}")


def make_folder(cfg: DictConfig) -> Path:
    """Make the folder of this job, and store its path in the config."""
    if cfg.output_dir is not None and in_sweep():
        raise ValueError(
            f"output_dir must be null in a sweep, got {cfg.output_dir}: all jobs would write to the same"
            " folder. Set hydra.sweep.dir, which gets one folder per job"
        )
    cfg.output_dir = cfg.output_dir or HydraConfig.get().runtime.output_dir
    folder = Path(cfg.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def hide_lightning_tips() -> None:
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel("WARNING")
    # The folder of the run already contains files from Hydra.
    warnings.filterwarnings("ignore", ".*exists and is not empty.*")


if __name__ == "__main__":
    share_run_name()
    with report_at_end():
        main()
