"""Score every document of a split with the Trainer's predict: each rank sums the losses of its windows.

    ScoredData ──Trainer.predict──▶ losses (B, T) ──DocumentScores──▶ table, picture, lists

B: windows in a batch, T: tokens in a window.
"""

import glob
import hashlib
import io
import json
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.utilities.model_helpers import is_overridden

from lit_gptdata._io import close_bars, write_whole
from lit_gptdata.datamodule import GPTDataModule
from lit_gptdata.model.gpt import inputs_and_targets
from lit_gptdata.model.scores import IGNORE_INDEX
from lit_gptdata.report.documents import DocumentLosses, describe, draw_scores, write_scores
from lit_gptdata.training.scores import read_losses
from lit_gptdata.windows.mixture import ChainedWindows
from lit_gptdata.windows.order import groups_of
from lit_gptdata.windows.sampler import positions_of
from lit_gptdata.windows.steps import Position

RETURNS = "It must return losses in nats, float (B, T), or logits, float (B, T, V)"
SAVE_BATCHES = 10  # before the first save of the sums
SAVE_S = 60.0  # about the seconds between two later ones


class ScoredData(GPTDataModule):
    """The data to score: a split as one set of val windows, from batch `done` on."""

    scored, done = "val", 0

    def setup(self, stage: str | None = None) -> None:
        for source in self._data.all:
            source.only_val |= self.scored == "all"
        super().setup(stage)
        for source in self._data.all if self.scored in ("train", "test") else ():
            source.split = replace(source.split, val=getattr(source.split, self.scored))
        if not len(self.val_windows):
            if self.scored == "all":
                raise ValueError("the text has only one token, with none before it: give more text")
            advice = f"give a text, split=all, or data.{self.scored}_fraction=0.1"
            raise ValueError(f"there is no {self.scored} split to score: {advice}")

    def predict_dataloader(self) -> Any:
        steps = self._steps(len(self.val_windows))
        loader: Any = self._loader(self.val_windows, steps, seed=None)
        loader.sampler.start_at(Position(0, self.done * steps.width))
        return iter(loader)  # Lightning would wrap a loader, and keep the indices of all batches


def check_model(model: L.LightningModule) -> None:
    """Raise TypeError for a model without its own predict_step."""
    if not is_overridden("predict_step", model):
        problem = f"{type(model).__name__} has no predict_step"
        raise TypeError(f"{problem}: add predict_step(self, batch, batch_idx). {RETURNS}")


class DocumentScores(L.Callback):
    """Adds up the losses that `predict_step` returns, per document of a ScoredData, and writes them.

    Each rank saves its sums next to the output about once a minute, so that a killed run continues. All
    ranks save after the same batch, and keep the files until all of them have saved.
    """

    def __init__(self, output: Path, min_tokens: int, origin: Sequence[Any]) -> None:
        """`origin`: what determines the losses in addition to the data, in plain values."""
        self.output, self.min_tokens, self.origin = output, min_tokens, origin

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        data = trainer.datamodule
        sources = [source for source in data._data.all if len(source.val_windows)]
        self.windows = ChainedWindows([source.val_windows for source in sources])
        self.sets = [DocumentLosses(s.name, s.store, *s.split.val) for s in sources]
        ends = np.cumsum([each.sums.shape[1] for each in self.sets])
        self.sums = np.zeros((2, int(ends[-1])))  # of all sets, whose sums are views of it
        for each, part in zip(self.sets, np.split(self.sums, ends[:-1], axis=1), strict=True):
            each.sums = part
        self.rank, size = data._ranks
        self.steps = data._steps(len(data.val_windows))
        identity = [[s.name, s.store.fingerprint, *s.split.val] for s in sources]
        identity += [[data.batch_size, size], *(part.identity() for part in self.windows.parts)]
        key = hashlib.sha256(json.dumps([*self.origin, identity]).encode()).hexdigest()[:16]
        self.saved = f".{self.output.name}.{key}.{self.rank}-of-{size}."
        for path in self.output.parent.glob(f".{glob.escape(self.output.name)}.*.npy"):
            if key not in path.name:  # of another checkpoint or text
                path.unlink(missing_ok=True)
        data.done = self._resume(trainer)
        self.last, self.time, self.next = data.done, time.monotonic(), data.done + SAVE_BATCHES
        if data.done:
            self._print(trainer, f"continues after batch {data.done:,} of {self.steps.remaining():,}")

    def _print(self, trainer: Any, *lines: str) -> None:
        """Print lines in one process; a terminal shows only what fits."""
        if trainer.is_global_zero:
            close_bars()
            width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
            print(*(line[:width] for line in lines), sep="\n", flush=True)

    def _files(self) -> dict[int, Path]:
        """The batch after which this rank saved its sums → the file."""
        paths = self.output.parent.glob(f"{glob.escape(self.saved)}*.npy")
        return {int(path.name.removeprefix(self.saved).removesuffix(".npy")): path for path in paths}

    def _resume(self, trainer: Any) -> int:
        """Load the sums after the last batch that all ranks have saved; return the batches by then."""
        files = self._files()

        def least(value: int) -> int:
            number = torch.tensor(value, device=trainer.strategy.root_device)
            return int(trainer.strategy.reduce(number, reduce_op="min"))

        done = least(max(files, default=0))
        if not least(int(done in files)):
            return 0
        self.sums[:] = np.load(files[done])
        return done

    def on_predict_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        targets = inputs_and_targets(batch)[1]
        if (found := read_losses(outputs, targets)) is None:
            name = f"predict_step of {type(pl_module).__name__}"
            raise TypeError(f"{name} returned {type(outputs).__name__}. {RETURNS}")
        scored = (targets != IGNORE_INDEX).cpu().numpy()
        losses = found.cpu().double().numpy()
        done = trainer.datamodule.done + batch_idx
        indices = positions_of(self.steps, done, self.rank)
        tokens = self.windows.target_tokens(indices)
        for number, rows in groups_of(self.windows.locate_parts(indices)[0]):
            of = scored[rows]
            self.sets[number].add(losses[rows][of], tokens[rows][of])
        if done + 1 == self.next:
            self._save(trainer, done + 1)

    def _save(self, trainer: Any, done: int) -> None:
        np.save(content := io.BytesIO(), self.sums)
        write_whole(self.output.with_name(f"{self.saved}{done}.npy"), content.getbuffer())
        since = torch.tensor(time.monotonic() - self.time, device=trainer.strategy.root_device)
        seconds = float(trainer.strategy.reduce(since, reduce_op="max"))  # all ranks have saved
        for batch, path in self._files().items():
            if batch != done:
                path.unlink(missing_ok=True)
        if trainer.progress_bar_callback is None:
            self._print(trainer, f"batch {done:,} of {self.steps.remaining():,}")
        batches = int((done - self.last) * SAVE_S / max(seconds, 1e-3))
        self.last, self.time, self.next = done, time.monotonic(), done + max(1, batches)

    def on_predict_end(self, trainer: Any, pl_module: Any) -> None:
        if trainer.world_size > 1:
            sums = torch.from_numpy(self.sums).to(trainer.strategy.root_device)
            self.sums[:] = trainer.strategy.reduce(sums, reduce_op="sum").cpu().numpy()
        if trainer.is_global_zero:
            for each in self.sets:
                each.finish()
            if not any((each.tokens >= self.min_tokens).any() for each in self.sets):
                self.min_tokens = 1  # otherwise the lists would be empty
            write_scores(self.output, self.sets)
            picture = self.output.with_suffix(".png")
            draw_scores(self.sets, self.min_tokens, picture)
            data = trainer.datamodule
            lines = describe(self.sets, self.min_tokens, data.tokenizer)
            windows = f"windows  {data.eval_windows}, {data.max_length} tokens each"
            files = f"scores   {self.output}", f"picture  {picture}"
            self._print(trainer, *lines, "", windows, *files)
        trainer.strategy.barrier()  # the sums are kept until the file is complete
        for path in self._files().values():
            path.unlink(missing_ok=True)
