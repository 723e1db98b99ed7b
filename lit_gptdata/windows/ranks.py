"""Which process of a run this is. Ranks are looked up when an epoch starts, not when a loader is made.

current_ranks()  ->  Ranks(rank=1, world_size=4)  # of torch.distributed; Ranks(0, 1) without it
"""

import os
import secrets
import sys
from typing import NamedTuple

import torch.distributed as dist

# The variables in which a launcher tells a process its rank and the world size: torchrun, srun, Open
# MPI, MPICH, Horovod. Every interactive SLURM shell has SLURM_NTASKS; only srun sets the size of a step.
LAUNCHERS = (
    ("RANK", "WORLD_SIZE"),
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    ("PMI_RANK", "PMI_SIZE"),
    ("HOROVOD_RANK", "HOROVOD_SIZE"),
)


class Ranks(NamedTuple):
    """The rank of a process, counted from 0, and the number of processes that share the batches."""

    rank: int
    world_size: int


def current_ranks() -> Ranks:
    """Rank and world size of the process group of torch.distributed, else (0, 1)."""
    if dist.is_available() and dist.is_initialized():
        return Ranks(dist.get_rank(), dist.get_world_size())
    return Ranks(0, 1)


def check_launched() -> None:
    """Raise RuntimeError in one of several launched processes, if all of them would be rank 0."""
    if dist.is_available() and dist.is_initialized():
        return
    for rank_name, *size_names in LAUNCHERS:
        size_name = next((name for name in size_names if name in os.environ), "")
        size = os.environ.get(size_name, "")
        if rank_name in os.environ and size.isdigit() and int(size) > 1:
            names = f"{rank_name}={os.environ[rank_name]} and {size_name}={size}"
            raise RuntimeError(
                f"this process is one of several ({names}), but without torch.distributed each of them "
                "would read the same batches. First call torch.distributed.init_process_group(), "
                "Fabric.launch() or Accelerator(). For a single process, unset these variables"
            )


def accelerate_reads(world_size: int) -> int:
    """How many batches accelerate reads for a step of all ranks, to divide them; 0: it does not read.

    It reads `world_size` batches, or one with split_batches=True.
    """
    frame = sys._getframe(1)
    while frame is not None and frame.f_globals.get("__name__") != "accelerate.data_loader":
        frame = frame.f_back  # type: ignore[assignment]
    if frame is None:
        return 0
    return 1 if getattr(frame.f_locals.get("self"), "split_batches", False) else world_size


class DrawnSeed:
    """A seed that nobody chose: drawn at random on rank 0, and shared when the first epoch starts."""

    def __init__(self, value: int | None = None) -> None:
        self.value = secrets.randbits(32) if value is None else value
        self._world_size = 1  # of the ranks that share `value`

    def set(self, value: int) -> None:
        """Use `value`, which every rank loaded from a checkpoint."""
        self.value, self._world_size = value, sys.maxsize

    @property
    def is_shared(self) -> bool:
        """Whether all ranks of this process group have the same value."""
        return current_ranks().world_size <= self._world_size

    def share(self) -> int:
        """The seed of rank 0. With several ranks, all of them must call this."""
        if not self.is_shared:
            values = [self.value]
            dist.broadcast_object_list(values)
            self.value, self._world_size = values[0], current_ranks().world_size
        return self.value
