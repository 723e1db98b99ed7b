"""A small training run that tests stop and resume, and that records the windows of each batch.

`python -m tests.runs jobs.json` runs a list of jobs, in one process per device.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import re
import signal
import sys
import warnings
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lit_gptdata import GPT, EmbeddingStem, GPTDataModule, Tokenizer
from lit_gptdata.model.gpt import inputs_and_targets

LENGTH = 8
N_WINDOWS = 103  # for training
VOCABULARY = 64
N_TOKENS = N_WINDOWS * LENGTH + 1 + 90
BATCH_SIZE = 4
EPOCH_BATCHES = 25  # batches of 4 windows per epoch, and a tail of 3 windows


@functools.cache
def words() -> list[str]:
    """Return N_TOKENS different words that are one gpt2 token each."""
    encoding = Tokenizer("gpt2").reference.encoding
    vocabulary = (encoding.decode([i]) for i in range(1000, 40_000))
    return list(itertools.islice((w for w in vocabulary if re.fullmatch(" [a-z]+", w)), N_TOKENS))


def write_text(folder: Path) -> Path:
    """Write a text in which window i starts with word 8 * i."""
    path = folder / "words.txt"
    if not path.exists():
        path.write_text("".join(words()), encoding="utf-8")
    return path


SOURCES = {"web": (0, 480), "code": (480, 760), "books": (760, 912)}  # words of each source


def write_sources(folder: Path) -> dict[str, str]:
    """Write a text for each source, in which window i starts with word 8 * i of all words."""
    for name, (begin, end) in SOURCES.items():
        (folder / f"{name}.txt").write_text("".join(words()[begin:end]), encoding="utf-8")
    return {name: str(folder / f"{name}.txt") for name in SOURCES}


def write_documents(folder: Path) -> dict[str, str]:
    """Write each source as documents of 3 to 22 words, in JSON Lines; "all" has the documents of all."""
    paths, lengths = {}, itertools.cycle([22, 3, 9, 14, 5, 18, 7])
    for name, (begin, end) in SOURCES.items():
        paths[name], lines = str(folder / f"{name}.jsonl"), []
        while begin < end:
            stop = min(begin + next(lengths), end)
            lines.append(json.dumps({"text": "".join(words()[begin:stop])}))
            begin = stop
        Path(paths[name]).write_text("\n".join(lines), encoding="utf-8")
    every = "\n".join(Path(path).read_text(encoding="utf-8") for path in paths.values())
    (folder / "all.jsonl").write_text(every, encoding="utf-8")
    return {"all": str(folder / "all.jsonl"), **paths}


def write_val_sources(folder: Path) -> dict[str, dict[str, Any]]:
    """Write the texts of three sources without common words, which differ in length, and return them."""
    parts = {"a": (0, 230), "b": (230, 400), "c": (400, 900)}
    for name, (begin, end) in parts.items():
        (folder / f"{name}.txt").write_text("".join(words()[begin:end]), encoding="utf-8")
    return {name: {"path": str(folder / f"{name}.txt"), "val_fraction": 0.3} for name in parts}


def make_data(folder: Path, **options: Any) -> GPTDataModule:
    windows = {"max_length": LENGTH, "stride": LENGTH, "batch_size": BATCH_SIZE, "val_fraction": 0.1}
    build = {"data_dir": str(folder / "data"), "build_workers": 1, "engine": "tiktoken"}
    return GPTDataModule(**({"corpus": str(write_text(folder))} | windows | build | options))


def opened(data: GPTDataModule) -> GPTDataModule:
    data.prepare_data()
    data.setup()
    return data


def windows_of(inputs: torch.Tensor) -> list[int]:
    """Return the number of each window of a batch; of documents, where its first word is."""
    encoding = Tokenizer("gpt2").reference.encoding
    firsts = [[next(id for id in row if id != encoding.eot_token)] for row in inputs.tolist()]
    first_words = encoding.decode_batch(firsts)
    return [words().index(word) // LENGTH for word in first_words]


class StoppedError(Exception):
    """Raised by a training step to stop a run."""


class Watch(L.Callback):
    """Records the windows of each batch, and the steps and losses of validations."""

    def __init__(self, data: GPTDataModule) -> None:
        self.data = data
        self.seen: list[list[int]] = []
        self.train_loss: list[float] = []  # over all ranks
        self.validated_at: list[int] = []
        self.val_loss: list[float] = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        self.seen.append(windows_of(inputs_and_targets(batch)[0]))

    def on_train_batch_end(self, trainer, *rest) -> None:
        self.train_loss.append(float(trainer.callback_metrics["train_loss"]))

    def on_validation_end(self, trainer, pl_module) -> None:
        if not trainer.sanity_checking:
            self.validated_at.append(trainer.global_step)
            self.val_loss.append(float(trainer.callback_metrics["val_loss"]))


class StoppableGPT(GPT):
    """Stops in the middle of training step `stop_at`, after dropout; its vocabulary is small."""

    stop, stop_at, n_steps = "", -1, 0

    def losses(self, batch):
        inputs, targets = inputs_and_targets(batch)
        small = torch.where(targets < 0, targets, targets % VOCABULARY)
        return super().losses((inputs % VOCABULARY, small))

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.n_steps += 1
        if self.n_steps - 1 == self.stop_at:
            if self.stop == "exception":
                raise StoppedError
            os.kill(os.getpid(), {"SIGTERM": signal.SIGTERM, "SIGKILL": signal.SIGKILL}[self.stop])
        return loss


def make_model(dropout: float = 0.1) -> StoppableGPT:
    torch.manual_seed(1)
    stem = EmbeddingStem(vocab_size=VOCABULARY, max_length=LENGTH, embedding_dim=8, dropout=dropout)
    return StoppableGPT(stem, n_layers=1, n_heads=2, dropout=dropout, warmup_steps=3)


def make_trainer(**options: Any) -> L.Trainer:
    defaults = {"accelerator": "cpu", "devices": 1, "logger": False, "num_sanity_val_steps": 1}
    silent = ("enable_progress_bar", "enable_model_summary", "enable_checkpointing")
    return L.Trainer(**(defaults | dict.fromkeys(silent, False) | options))


def train(
    folder: Path,
    *,
    data: dict[str, Any] | None = None,
    save: dict[str, Any] | None = None,
    stop: str = "",
    stop_at: int = -1,
    ckpt_path: Path | str | None = None,
    dropout: float = 0.1,
    **trainer_options: Any,
) -> tuple[Watch, dict[str, torch.Tensor]]:
    """Fit; return the records and the weights at the end or stop. `save` is for ModelCheckpoint."""
    module, model = make_data(folder, **(data or {})), make_model(dropout)
    model.stop, model.stop_at = stop, stop_at
    watch = Watch(module)
    callbacks: list[L.Callback] = [watch]
    if save is not None:
        callbacks.append(ModelCheckpoint(save_top_k=-1, **save))
    trainer = make_trainer(callbacks=callbacks, enable_checkpointing=save is not None, **trainer_options)
    torch.manual_seed(2 if ckpt_path is None else 3)  # the seed of a resumed run must not matter
    try:
        trainer.fit(model, datamodule=module, ckpt_path=ckpt_path, weights_only=True)
    except (StoppedError, SIGTERMException):
        assert stop
    return watch, {name: weight.clone() for name, weight in model.state_dict().items()}


def validate(folder: Path, *, data: dict[str, Any], **trainer_options: Any) -> dict[str, Any]:
    """Return the metrics of an untrained model, and the number of targets and windows."""
    module, model = make_data(folder, **data), make_model()
    trainer = make_trainer(**trainer_options)
    scores, *_ = trainer.validate(model, datamodule=module, verbose=False)
    windows = module.val_windows
    of_sets = model._scores.sums[:, 1].int().tolist()
    counts = {"n_targets": sum(of_sets), "n_targets_of_sets": of_sets, "n_windows": len(windows)}
    return scores | counts | {"val_tokens": [windows.begin, windows.end]}


def run_jobs(jobs: Sequence[dict[str, Any]]) -> None:
    """Run jobs: `train` or `validate` options, and a folder `out` in which rank r writes r.json."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    for job in jobs:
        out, folder = Path(job.pop("out")), Path(job.pop("folder"))
        if job.pop("validate", False):
            result = validate(folder, **job)
        else:
            watch, weights = train(folder, **job)
            data, ranks = watch.data, range(watch.data.trainer.world_size)
            end = data.trainer.fit_loop.total_batch_idx + 1
            steps = range(end - len(watch.seen), end)
            result = {
                "seen": watch.seen,
                "train_loss": watch.train_loss,
                "batch_at": [[windows_of(data.batch_at(s, rank=r)[0]) for r in ranks] for s in steps],
                "weights": sha256(b"".join(w.numpy().tobytes() for w in weights.values())).hexdigest(),
            }
        rank = int(os.environ.get("LOCAL_RANK", 0))
        out.mkdir(parents=True, exist_ok=True)
        (out / f"{rank}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    run_jobs(json.loads(Path(sys.argv[1]).read_text()))
