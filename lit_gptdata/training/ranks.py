"""Several processes, one run: one folder whoever starts them, and no sweep that starts itself again."""

from __future__ import annotations

import os
from datetime import datetime

import lightning as L
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher

RUN = "LIT_GPTDATA_RUN"
"""The environment variable that conf/train.yaml names a run's folder by; unset: by the time."""

SPAWN = (
    "For DDP, trainer.strategy=ddp_fork (CPUs) or ddp_spawn, without torchrun, works in every sweep, "
    "but slower, and metrics.csv then has the last validation alone"
)


def share_run_name() -> None:
    """Give the ranks that torchrun or srun started one name for their run, each before it asks Hydra.

    Hydra makes a run's folder, named by the time, in each process by itself. Elsewhere nothing is to be
    done: a process is alone, or Lightning starts the others and tells them the folder.
    """
    env = os.environ
    if env.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        from torch.distributed import TCPStore  # type: ignore[attr-defined]

        # torchrun's own store, there before and after the process group: the first rank names the run.
        store = TCPStore(env["MASTER_ADDR"], int(env["MASTER_PORT"]), is_master=False)
        key = f"{RUN}/{env.get('TORCHELASTIC_RESTART_COUNT', 0)}"
        env[RUN] = store.compare_set(key, "", f"{datetime.now():%Y-%m-%d/%H-%M-%S-%f}").decode()
    elif int(env.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
        restarts = env.get("SLURM_RESTART_COUNT", "0")  # of a job that was requeued
        env[RUN] = f"slurm-{env['SLURM_JOB_ID']}.{env['SLURM_STEP_ID']}.{restarts}"


def sweeping() -> bool:
    """Whether this is a job of a sweep, `python train.py -m`."""
    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN


def check_launcher(trainer: L.Trainer) -> None:
    """Raise ValueError in a sweep (-m) that each process of a job would run by itself, out of step.

    Lightning starts processes with the command line of the first, sweep and all. Those of torchrun run
    the sweep side by side, which only Hydra's own sweeper and launcher do alike in each.
    """
    if not sweeping():
        return
    strategy, processes = trainer.strategy, trainer.num_devices * trainer.num_nodes
    if processes == 1 or isinstance(strategy.launcher, _MultiProcessingLauncher):
        return
    hydra = HydraConfig.get()
    plugins = [plugin._target_ for plugin in (hydra.sweeper, hydra.launcher)]
    others = [name for name in plugins if not name.startswith("hydra._internal.core_plugins.basic_")]
    if isinstance(getattr(strategy, "cluster_environment", None), LightningEnvironment):
        raise ValueError(
            f"a job of this sweep (-m) wants {processes} processes under {type(strategy).__name__}, and "
            "Lightning starts them with this command line: each would run the whole sweep again. Start "
            f"them once for all jobs: torchrun --nproc-per-node {trainer.num_devices} train.py -m …; or "
            f"run the jobs one by one, without -m. {SPAWN}"
        )
    if others:
        raise ValueError(
            f"this sweep (-m) runs in each of {processes} processes, and {', '.join(others)} may choose "
            "or place jobs otherwise in each. Take hydra/sweeper=basic and hydra/launcher=basic. "
            f"{SPAWN}"
        )
