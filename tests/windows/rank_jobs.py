"""What two processes read without a Trainer: `python -m tests.windows.rank_jobs folder rank port`.

Each rank writes <rank>.json: a name → the windows of each batch, each by its number in the text.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, DistributedSampler

from lit_gptdata import create_dataloader
from lit_gptdata.windows.ranks import DrawnSeed
from tests.runs import make_data, make_model, make_trainer, opened, windows_of, words

ROOT = Path(__file__).parents[2]
READ_BATCHES = 5


def on_two_ranks(module: str, folder: Path) -> list[dict[str, Any]]:
    """Run `python -m module folder rank port` for two ranks; return what each one wrote."""
    opened(make_data(folder))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command, env = [sys.executable, "-m", module, folder], os.environ | {"PYTHONPATH": str(ROOT)}
    started = [
        subprocess.Popen([*command, str(rank), port], env=env, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    for process in started:
        _, errors = process.communicate(timeout=240)
        assert process.returncode == 0, errors
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def batches_of(loader: Any, n: int | None = None) -> list[list[int]]:
    """The windows of the first `n` batches of a pass, or of all batches."""
    batches = iter(loader)
    numbers = (windows_of(inputs) for inputs, _ in batches)
    return list(numbers) if n is None else [next(numbers) for _ in range(n)]


def epochs_and_resume(make: Any, prepare: Any = lambda loader: loader) -> dict[str, Any]:
    """Two epochs, and the rest of an epoch after `state_dict()` inside it, with another batch size."""
    loader = make()
    prepared = prepare(loader)
    epochs = [batches_of(prepared), batches_of(prepared)]
    other = make()
    reads = iter(prepare(other))
    first = [windows_of(next(reads)[0]) for _ in range(READ_BATCHES)]
    state = other.state_dict()
    resumed = make()
    prepared = prepare(resumed)
    resumed.load_state_dict(state)
    rest, following = batches_of(prepared), batches_of(prepared)
    wider = make(batch_size=6)
    wider_prepared = prepare(wider)
    wider.load_state_dict(state)
    return {
        "epochs": epochs, "first": first, "rest": rest, "following": following,
        "rest with another batch size": batches_of(wider_prepared),
    }  # fmt: skip


class Seen(L.Callback):
    def __init__(self) -> None:
        self.batches: list[list[int]] = []

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, *rest: Any) -> None:
        self.batches.append(windows_of(batch[0]))


class Wrapper(L.LightningDataModule):
    """A user's data module around ours."""

    def __init__(self, data: Any) -> None:
        super().__init__()
        self.data = data

    def train_dataloader(self) -> Any:
        return self.data.train_dataloader()


def fitted(folder: Path, **fit: Any) -> list[list[int]]:
    seen = Seen()
    trainer = make_trainer(
        devices=2, strategy="ddp", max_epochs=2, limit_val_batches=0, callbacks=[seen],
        default_root_dir=folder,
    )  # fmt: skip
    trainer.fit(make_model(), **fit)
    return seen.batches


def launch(rank: str, port: str) -> None:
    """Set what a launcher sets for one of two processes."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    env = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": rank, "LOCAL_RANK": rank}
    os.environ.update(env | {"WORLD_SIZE": "2", "NODE_RANK": "0"})


def main(folder: Path, rank: str, port: str) -> None:
    data = opened(make_data(folder))

    def make(**options: Any) -> Any:
        return opened(make_data(folder, **options)).train_dataloader()

    early = data.train_dataloader()  # before the process group exists
    launch(rank, port)
    try:
        batches_of(early)
        refusal = ""
    except RuntimeError as error:
        refusal = str(error)
    dist.init_process_group("gloo")
    torch.manual_seed(int(rank))  # each rank draws another seed
    text, options = "".join(words()), {"max_length": 8, "stride": 8}
    sampled = DistributedSampler(data.train_windows, shuffle=False, drop_last=True)
    fabric = L.Fabric(accelerator="cpu", devices=2, strategy="ddp")
    fabric.launch()
    result = {
        "refusal": refusal,
        "early": {"epochs": [batches_of(early), batches_of(early)]},
        "process group": epochs_and_resume(make),
        "Fabric": epochs_and_resume(make, fabric.setup_dataloaders),
        "workers": epochs_and_resume(lambda **options: make(num_workers=1, **options)),
        "rebuilt": epochs_and_resume(
            make, lambda ours: DataLoader(ours.dataset, batch_sampler=ours.batch_sampler)
        ),
        "DistributedSampler": {
            "epochs": [batches_of(DataLoader(data.train_windows, 4, sampler=sampled))]
        },
        "create_dataloader": epochs_and_resume(
            lambda batch_size=4: create_dataloader(text, batch_size=batch_size, **options)
        ),
        "seed=None": epochs_and_resume(lambda **options: make(seed=None, **options)),
        "Trainer.fit(model, loader)": {"fitted": fitted(folder, train_dataloaders=make())},
        "wrapped data module": {"fitted": fitted(folder, datamodule=Wrapper(opened(make_data(folder))))},
    }
    seed = DrawnSeed()
    seed.set(7)  # from a checkpoint
    result["loaded seed"] = seed.share()
    loaders = [create_dataloader(text, batch_size=4, **options) for _ in range(2)]
    result["two loaders"] = {"epochs": [batches_of(loader) for loader in loaders]}
    (folder / f"{rank}.json").write_text(json.dumps(result))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
