"""Run several processes as one run: they share an output folder, and none of them restarts a sweep."""

import os
from datetime import datetime

import lightning as L
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher

# Environment variable with the name of the run's folder (conf/train.yaml). Unset: the current time.
RUN = "LIT_GPTDATA_RUN"
_FORK_HINT = (
    "Without torchrun, every sweep works with trainer.strategy=ddp_fork (CPUs) or ddp_spawn, which are"
    " slower and log only the last validation in metrics.csv"
)


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
        raise ValueError(
            f"a sweep (-m) cannot start {processes} processes per job with {type(strategy).__name__}:"
            " each would run the whole sweep again. Run each job without -m, or start them once:"
            f" torchrun --nproc-per-node {trainer.num_devices} train.py -m …. {_FORK_HINT}"
        )
    hydra, basic = HydraConfig.get(), "hydra._internal.core_plugins.basic_"
    plugins = (hydra.sweeper._target_, hydra.launcher._target_)
    if others := [name for name in plugins if not name.startswith(basic)]:
        needs = f"in {processes} processes needs hydra/sweeper=basic and hydra/launcher=basic"
        problem = f"{', '.join(others)} may choose different jobs in each process"
        raise ValueError(f"a sweep (-m) {needs}: {problem}. {_FORK_HINT}")
