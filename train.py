"""Raw text to a trained model: `python train.py`; `python train.py --help` lists what can be set."""

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

from lit_gptdata.configs import register_resolvers
from lit_gptdata.training.budget import TokenBudget
from lit_gptdata.training.ranks import check_launcher, share_run_name, sweeping
from lit_gptdata.training.summary import draw_losses, summarise
from lit_gptdata.training.sweep import recorded, reported

THREADS = torch.get_num_threads()
register_resolvers()


@hydra.main(version_base="1.3", config_path="conf", config_name="train")
def main(cfg: DictConfig) -> float:
    """Run one job in a folder of its own; returns the loss, for a sweeper to minimise."""
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel("WARNING")  # tips, devices
    # Hydra has put files into the run's folder already, which Lightning's logger finds worth a word.
    warnings.filterwarnings("ignore", ".*exists and is not empty.*")
    if cfg.output_dir is not None and sweeping():
        raise ValueError(
            f"output_dir={cfg.output_dir}: the jobs of a sweep would write over each other; set "
            "hydra.sweep.dir, in which each gets a folder of its own"
        )
    cfg.output_dir = cfg.output_dir or HydraConfig.get().runtime.output_dir
    folder = Path(cfg.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    with recorded(folder) as result:
        rank_zero_only(OmegaConf.save)(cfg, folder / "config.yaml", resolve=True)
        train(cfg, folder, result)
    metrics = result["metrics"]
    return metrics["val_loss" if "val_loss" in metrics else "train_loss"]


def train(cfg: DictConfig, folder: Path, result: dict[str, Any]) -> None:
    """Fit, validate, test; leave metrics, checkpoints, a picture and a summary, and note the figures."""
    torch.set_num_threads(cfg.threads or THREADS)
    L.seed_everything(cfg.seed, workers=True, verbose=False)
    data = instantiate(cfg.data)
    model = instantiate(cfg.model, stem=instantiate(cfg.stem, vocab_size=data.vocab_size))
    budget = TokenBudget(cfg.max_tokens, cfg.val_every_tokens)
    trainer = instantiate(
        cfg.trainer,
        callbacks=[budget, *instantiate(cfg.callbacks).values()],
        logger=list(instantiate(cfg.logger).values()),
    )
    check_launcher(trainer)
    if data.hparams.val_fraction and cfg.ckpt_path is None:
        trainer.validate(model, datamodule=data, verbose=False)  # the curve begins before training
    try:
        trainer.fit(model, datamodule=data, ckpt_path=cfg.ckpt_path, weights_only=True)
    except SIGTERMException as stopped:  # exits with 0 by itself, as if the training were done
        raise SystemExit(128 + signal.SIGTERM) from stopped

    data.setup()  # where a spawn or fork strategy trained, only its own processes have done so
    trained = trainer.callback_metrics
    metrics = dict(trained)
    if len(data.val_windows):
        metrics |= trainer.validate(model, datamodule=data, verbose=False)[0]
    if len(data.test_windows):
        metrics |= trainer.test(model, datamodule=data, verbose=False)[0]
    result |= {
        # where the strategy trained in processes of its own, this one's callback has counted nothing
        "tokens": max(budget.tokens, int(trained.get("tokens", 0))),
        "steps": trainer.global_step or None,
        "parameters": sum(p.numel() for p in model.parameters()),
        "metrics": {name: float(value) for name, value in metrics.items() if name != "tokens"},
    }
    summary = summarise(data, model, result["metrics"], folder)  # on every rank: shards need them all
    if trainer.is_global_zero:
        if (folder / "metrics.csv").exists():
            draw_losses(folder / "metrics.csv", folder / "loss.png")
        (folder / "summary.txt").write_text(summary + "\n", encoding="utf-8")
        print(f"\n{summary}")


if __name__ == "__main__":
    share_run_name()
    with reported():
        main()
