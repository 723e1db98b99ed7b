"""Objects for runs with several processes, which name them in their configuration."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import DDPStrategy

from lit_gptdata.text.document import Document

PATIENCE_S = 3  # timeout of a collective while the data is prepared


class SlowCorpus:
    """A text that takes `seconds` to read; each process that reads it leaves a line in reads.txt."""

    fingerprint = "slow"

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def __iter__(self) -> Iterator[Document]:
        with Path("reads.txt").open("a") as file:
            file.write(f"{os.getpid()}\n")
        time.sleep(self.seconds)
        yield Document(source="slow", chunks=[b"It was on a dreary night of November. " * 300])

    def __repr__(self) -> str:
        return "SlowCorpus()"


class ImpatientDDP(DDPStrategy):
    """DDP whose collectives fail after PATIENCE_S seconds until there is a model to train."""

    def setup_environment(self) -> None:
        super().setup_environment()
        self._wait_for(timedelta(seconds=PATIENCE_S))

    def setup(self, trainer: L.Trainer) -> None:
        self._wait_for(timedelta(minutes=5))
        super().setup(trainer)

    def _wait_for(self, timeout: timedelta) -> None:
        torch.distributed.distributed_c10d._set_pg_timeout(timeout, torch.distributed.group.WORLD)


class Fails(L.Callback):
    """Raises on one rank, before its `step`-th batch."""

    def __init__(self, rank: int, step: int) -> None:
        self.rank, self.step = rank, step

    def on_train_batch_start(self, trainer: L.Trainer, *rest: Any) -> None:
        if (trainer.global_rank, trainer.global_step) == (self.rank, self.step):
            raise RuntimeError("this rank has failed")
