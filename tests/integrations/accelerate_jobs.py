"""What two ranks read with accelerate: `python -m tests.integrations.accelerate_jobs dir rank port`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch.distributed as dist
from accelerate import Accelerator, DataLoaderConfiguration
from torch.utils.data import DataLoader

from tests.runs import make_data, opened
from tests.windows.rank_jobs import batches_of, epochs_and_resume, launch

SETTINGS: dict[str, dict[str, bool]] = {
    "accelerate": {}, "split_batches": {"split_batches": True},
    "dispatch_batches": {"dispatch_batches": True},
}  # fmt: skip


def main(folder: Path, rank: str, port: str) -> None:
    launch(rank, port)

    def make(**options: Any) -> Any:
        return opened(make_data(folder, **options)).train_dataloader()

    result: dict[str, Any] = {}
    for name, settings in SETTINGS.items():
        accelerator = Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(**settings))
        result[name] = epochs_and_resume(make, accelerator.prepare)
    ours = make()
    unprepared = DataLoader(ours.dataset, batch_sampler=ours.batch_sampler)
    result["not prepared"] = {"epochs": [batches_of(unprepared)]}
    (folder / f"{rank}.json").write_text(json.dumps(result))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
