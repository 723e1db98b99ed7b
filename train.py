"""Raw text to a trained model: `python train.py`; `python train.py --help` lists what can be set."""

from __future__ import annotations

import logging
import signal
import warnings
from pathlib import Path

import hydra
import lightning as L
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from lightning.pytorch.utilities.exceptions import SIGTERMException
from omegaconf import DictConfig, OmegaConf

from lit_gptdata.summary import draw_losses, summarise


@hydra.main(version_base="1.3", config_path="conf", config_name="train")
def main(cfg: DictConfig) -> float:
    """Fit, validate, test; leave config, metrics, checkpoints and a picture; return the loss."""
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel("WARNING")  # tips, devices
    # Hydra has put files into the run's folder already, which Lightning's logger finds worth a word.
    warnings.filterwarnings("ignore", ".*exists and is not empty.*")
    cfg.output_dir = cfg.output_dir or HydraConfig.get().runtime.output_dir
    folder = Path(cfg.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    OmegaConf.save(cfg, folder / "config.yaml", resolve=True)

    L.seed_everything(cfg.seed, workers=True, verbose=False)
    data = instantiate(cfg.data)
    model = instantiate(cfg.model, stem=instantiate(cfg.stem, vocab_size=data.vocab_size))
    trainer = instantiate(
        cfg.trainer,
        callbacks=list(instantiate(cfg.callbacks).values()),
        logger=list(instantiate(cfg.logger).values()),
    )
    if data.hparams.val_fraction and cfg.ckpt_path is None:
        trainer.validate(model, datamodule=data, verbose=False)  # the curve begins before training
    try:
        trainer.fit(model, datamodule=data, ckpt_path=cfg.ckpt_path, weights_only=True)
    except SIGTERMException as stopped:  # exits with 0 by itself, as if the training were done
        raise SystemExit(128 + signal.SIGTERM) from stopped

    metrics = dict(trainer.callback_metrics)
    if len(data.val_windows):
        metrics |= trainer.validate(model, datamodule=data, verbose=False)[0]
    if len(data.test_windows):
        metrics |= trainer.test(model, datamodule=data, verbose=False)[0]
    if (folder / "metrics.csv").exists():
        draw_losses(folder / "metrics.csv", folder / "loss.png")
    summary = summarise(data, model, metrics, folder)
    (folder / "summary.txt").write_text(summary + "\n", encoding="utf-8")
    print(f"\n{summary}")
    return float(metrics["val_loss" if "val_loss" in metrics else "train_loss"])


if __name__ == "__main__":
    main()
