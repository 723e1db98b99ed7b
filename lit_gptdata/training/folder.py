"""The folder of a job, its seed, and its config.yaml."""

import logging
import os
import random
import re
import zlib
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.utils import to_absolute_path
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf

from lit_gptdata._io import write_whole
from lit_gptdata.configs import conf_dir
from lit_gptdata.training.checkpoints import find_checkpoint
from lit_gptdata.training.ranks import RUN, in_sweep

log = logging.getLogger(__name__)


def make_folder(cfg: DictConfig) -> Path:
    """Make the folder of this job, and complete output_dir, ckpt_path and seed in the config."""
    output_dir = str(cfg.output_dir or HydraConfig.get().runtime.output_dir)
    if re.search(r"\w\w+:/", output_dir):
        raise ValueError(f"output_dir must be a folder on this machine, got {output_dir}")
    cfg.output_dir = to_absolute_path(os.path.expanduser(output_dir))
    if cfg.ckpt_path is not None:
        saves = OmegaConf.select(cfg, "callbacks.last.dirpath") or f"{cfg.output_dir}/checkpoints"
        cfg.ckpt_path = find_checkpoint(str(cfg.ckpt_path), Path(saves) / "last.ckpt")
    if cfg.seed is None:
        cfg.seed = draw_seed()
    if cfg.ckpt_path is None and OmegaConf.select(cfg, "data.seed", default=0) is None:
        cfg.data.seed = draw_seed()  # recorded in config.yaml; a resumed run takes its checkpoint's
    folder = Path(cfg.output_dir)
    if cfg.ckpt_path is None and (folder / "checkpoints" / "last.ckpt").exists():
        log.warning("%s has a run already, which is replaced; ckpt_path=last would continue it", folder)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@rank_zero_only
def record_config(cfg: DictConfig, folder: Path) -> None:
    """Write config.yaml, without the job's folder, for `--config-path=FOLDER --config-name=config`."""
    cfg = cfg.copy()
    own = Path(cfg.ckpt_path or "/").is_relative_to(folder)  # resumed here: the folder has the whole run
    recorded = {"output_dir": None, "ckpt_path": None if own else cfg.ckpt_path}
    for key in recorded:
        cfg[key] = f"<{key} of the job>"
    values: Any = OmegaConf.to_container(cfg, resolve=True)
    text = OmegaConf.to_yaml(OmegaConf.create(values | recorded))
    for key in recorded:
        text = text.replace(f"<{key} of the job>", f"${{{key}}}")
    hydra = OmegaConf.load(conf_dir() / "train.yaml").hydra  # folders of runs and sweeps, the report
    write_whole(folder / "config.yaml", f"{text}\n{OmegaConf.to_yaml({'hydra': hydra})}".encode())


def draw_seed() -> int:
    """Draw a seed in [0, 2³²) that is the same on all ranks of a job."""
    env, seed = os.environ, random.SystemRandom().randrange(1 << 32)
    if RUN in env:  # all ranks that torchrun or srun started share it
        number = HydraConfig.get().job.num if in_sweep() else 0
        return zlib.crc32(f"{env[RUN]}/{number}".encode())
    # Lightning passes the first process's seed to the processes that it starts.
    return seed if env.get("LOCAL_RANK", "0") == "0" else int(env.get("PL_GLOBAL_SEED", seed))
