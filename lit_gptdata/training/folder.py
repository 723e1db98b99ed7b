"""The folder of a job, which all its processes share: its name, its seed, its config.yaml.

None of the processes restarts a sweep.
"""

import logging
import os
import random
import re
import zipfile
import zlib
from datetime import datetime
from pathlib import Path
from typing import Any

import lightning as L
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from hydra.utils import to_absolute_path
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf

from lit_gptdata._io import write_whole
from lit_gptdata.configs import conf_dir, own_folders

log = logging.getLogger(__name__)
# Environment variable with the name of the run's folder (conf/train.yaml). Unset: the current time.
RUN = "LIT_GPTDATA_RUN"
_FORK_HINT = "Without torchrun, set trainer.strategy=ddp_fork (CPUs) or ddp_spawn, which are slower"


def share_run_name() -> None:
    """Set RUN to the same name on all ranks that torchrun or srun started. Call it before Hydra starts.

    Otherwise Hydra creates one folder per process. Lightning gives its processes their folder.
    """
    env = os.environ
    if env.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        from torch.distributed import TCPStore  # type: ignore[attr-defined]

        # torchrun's store exists without a process group. The first rank that writes sets the name.
        store = TCPStore(env["MASTER_ADDR"], int(env["MASTER_PORT"]), is_master=False)
        key = f"{RUN}/{env.get('TORCHELASTIC_RESTART_COUNT', 0)}"
        env[RUN] = store.compare_set(key, "", f"{datetime.now():%Y-%m-%d/%H-%M-%S-%f}").decode()
    elif int(env.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
        restarts = env.get("SLURM_RESTART_COUNT", "0")  # how often the job was requeued
        env[RUN] = f"slurm-{env['SLURM_JOB_ID']}.{env['SLURM_STEP_ID']}.{restarts}"


def in_sweep() -> bool:
    """Whether this process runs a job of a sweep, `python train.py -m`."""
    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN


def check_launcher(trainer: L.Trainer) -> None:
    """Raise ValueError in a sweep whose processes would not run the same jobs at the same time.

    Lightning starts processes with the command line of the first one, which contains the sweep. Under
    torchrun each process runs the sweep, and stays in step only with Hydra's basic plugins.
    """
    if not in_sweep():
        return
    strategy, processes = trainer.strategy, trainer.num_devices * trainer.num_nodes
    if processes == 1 or isinstance(strategy.launcher, _MultiProcessingLauncher):
        return
    if isinstance(getattr(strategy, "cluster_environment", None), LightningEnvironment):
        problem = (
            f"{processes} processes per job with {type(strategy).__name__} would each run the sweep"
        )
        command = f"torchrun --nproc-per-node {trainer.num_devices} train.py -m …"
        raise ValueError(f"{problem} (-m): start them with {command}. {_FORK_HINT}")
    hydra, basic = HydraConfig.get(), "hydra._internal.core_plugins.basic_"
    for name in (hydra.sweeper._target_, hydra.launcher._target_):
        if not name.startswith(basic):
            plugins = "hydra/sweeper=basic hydra/launcher=basic"
            raise ValueError(f"{name} may choose other jobs per process: set {plugins}. {_FORK_HINT}")


def find_checkpoint(given: str, last: Path) -> str:
    """The path that ckpt_path=`given` names (`last`: of "last"); raises OSError or ValueError."""
    if given in ("best", "hpc") or "://" in given:
        return given
    path = last if given == "last" else Path(to_absolute_path(os.path.expanduser(given)))
    resume = "output_dir to the folder" if given == "last" else "ckpt_path to the last.ckpt"
    advice = f"leave ckpt_path out to start a new run, or set {resume} of a run"
    if not path.exists():
        raise FileNotFoundError(f"ckpt_path={given}, but {path} does not exist: {advice}")
    for inside in (path / "checkpoints" / "last.ckpt", path / "last.ckpt"):
        if inside.exists():
            raise IsADirectoryError(f"ckpt_path={given} is a folder: set ckpt_path={inside}")
    if not (path / "meta.pt").exists():  # which is in a distributed checkpoint, a folder
        load_checkpoint(path, {"state_dict", "optimizer_states", "loops"}, advice)
    return str(path)


def load_checkpoint(path: Path, keys: set[str], advice: str) -> dict[str, Any]:
    """Read a checkpoint on the CPU, its tensors when they are used; raises ValueError with `advice`."""
    try:
        if path.is_file() and not zipfile.is_zipfile(path):
            raise ValueError("torch.save did not write it, or it was cut short")
        content: dict[str, Any] = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        if missing := keys - content.keys():
            raise KeyError(f"without {', '.join(sorted(missing))}; a sweep keeps only weights")
    except Exception as error:
        reason = str(error.args[-1] if error.args else "").partition("\n")[0]
        problem = f"{path} is not a Lightning checkpoint ({type(error).__name__}: {reason})"
        raise ValueError(f"{problem}: {advice}") from error
    return content


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
        cfg[key] = f"\\${{{key}}}"  # an escaped reference, so that options that refer to it still do
    values: Any = OmegaConf.to_container(cfg, resolve=True)
    text = OmegaConf.to_yaml(OmegaConf.create(values | recorded))
    hydra = OmegaConf.load(conf_dir() / "train.yaml").hydra  # folders of runs and sweeps, the report
    if HydraConfig.initialized() and (folders := own_folders(HydraConfig.get())):
        hydra.searchpath = [f"file://{path}" for path in folders]  # for the modules in them
    write_whole(folder / "config.yaml", f"{text}\n{OmegaConf.to_yaml({'hydra': hydra})}".encode())


def draw_seed() -> int:
    """Draw a seed in [0, 2³²) that is the same on all ranks of a job."""
    env, seed = os.environ, random.SystemRandom().randrange(1 << 32)
    if RUN in env:  # all ranks that torchrun or srun started share it
        number = HydraConfig.get().job.num if in_sweep() else 0
        return zlib.crc32(f"{env[RUN]}/{number}".encode())
    # Lightning passes the first process's seed to the processes that it starts.
    return seed if env.get("LOCAL_RANK", "0") == "0" else int(env.get("PL_GLOBAL_SEED", seed))
