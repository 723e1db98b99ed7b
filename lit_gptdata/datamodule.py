"""GPTDataModule connects text, tokens and windows, and gives their batches to a Lightning Trainer."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import lightning as L
import numpy as np
from lightning.pytorch.utilities import rank_zero_warn
from torch.utils.data import DataLoader

from lit_gptdata._checks import plain
from lit_gptdata._lightning import (
    OPTIONS,
    check_plan,
    check_trainer,
    finds_batch_size,
    has_trained,
    ignore_warnings,
    overfits,
    ranks_of,
    save_hyperparameters,
    sets_to_load,
    splits_on_device,
)
from lit_gptdata.report.overview import overview
from lit_gptdata.report.show import ShownText, show
from lit_gptdata.resume import OnChange, Resume
from lit_gptdata.text.corpus import CorpusLike
from lit_gptdata.text.formats import EncodingErrors
from lit_gptdata.tokens.build.plan import BuildName, OnBadDocument
from lit_gptdata.tokens.engines import EngineName
from lit_gptdata.tokens.options import Source
from lit_gptdata.tokens.source import local_folder
from lit_gptdata.tokens.store import TokenStore
from lit_gptdata.tokens.tokenizer import SpecialTokens, Tokenizer
from lit_gptdata.windows.dataset import Batch, BatchFormat, WindowKind, Windows
from lit_gptdata.windows.loader import WindowLoader, window_loader
from lit_gptdata.windows.mixture import Mixture, stage_begins
from lit_gptdata.windows.order import EpochPermutation
from lit_gptdata.windows.ranks import DrawnSeed, Ranks, current_ranks
from lit_gptdata.windows.sampler import WindowSampler
from lit_gptdata.windows.sources import EvalSet, NamedSource, Sources
from lit_gptdata.windows.steps import Steps, Tail

EvalLoaders = DataLoader[Batch] | list[DataLoader[Batch]]


class GPTDataModule(L.LightningDataModule):
    """Turns text into batches for GPT training: (inputs, targets), int64 (batch_size, max_length).

    Targets are the inputs one token later. Windows are views of a store of tokens, so other windows,
    batches or splits need no new tokenizing. Raises ValueError, TypeError for an option out of range.

    Args:
        Which text:
        corpus: "sample" | "stdlib" | "frankenstein" | "tinyshakespeare" | URL | path | folder | glob | a
            list of these | a `Corpus` | a mixture, {name: one of these, or a `Source`}
        val_corpus: {name: source} of further val sets, whose texts must not be in `corpus`
        strip_gutenberg: leave out Project Gutenberg's license
        text_column: key or column of jsonl and parquet files that holds the text
        encoding_errors: invalid UTF-8: "strict" (an error) | "replace" (U+FFFD)
        on_bad_document: invalid UTF-8, or outside the limits: "error" | "skip" (also empty, null ones)
        min_document_bytes: UTF-8 bytes; a shorter document is bad; None: no limit
        max_document_bytes: UTF-8 bytes; a longer document is bad; None: no limit
        drop_duplicates: leave out each document that has the same text as an earlier one
        store_url: published store to train from instead of `corpus`: a folder, or a URL for fsspec
        Which tokens:
        tokenizer: tiktoken name | tokenizer.json | folder | .tiktoken or tokenizer.model file |
            hf://org/name | an object of tiktoken, tokenizers or transformers
        special_tokens: `<|endoftext|>` in a text: "allow" (the special token) | "text" | "error"
        end_of_document: the special token between documents; None: the tokenizer's own
        bos: start each document with the tokenizer's BOS token
        Which windows:
        windows: for train: "sliding", every `stride` tokens | "packed", whole documents | "documents",
            one in each. Longer documents are split; the target of padding is -100
        eval_windows: the same for val and test; only losses of equal windows are comparable
        max_length: tokens in a window's inputs
        stride: tokens between the starts of two sliding train windows; val and test use max_length
        val_fraction: fraction of the corpus's UTF-8 bytes for val, between train and test
        test_fraction: fraction of the corpus's UTF-8 bytes for test, at the end
        Batches and order:
        batch_size: windows per batch, on each rank
        batch_schedule: train batch sizes that change: [{"tokens": n, "batch_size": b}, …]. `tokens` is
            as in `stages`; a size starts with an optimizer step. Val and test use `batch_size`
        skip_steps: batches that do not train: [[begin, end], …], numbers as in `windows_at`
        shuffle: train windows in a seeded order, a new one each epoch
        seed: seed of that order; None: rank 0 draws one, and a resumed run takes its checkpoint's
        drop_last: leave out an epoch's last, smaller train batch
        drop_padded: leave out the last val and test windows if they need padding
        stages: weights of a mixture that change: [{"tokens": n, "weights": {name: weight}}, …]. `tokens`
            is the length in input tokens of all ranks, rounded up to whole steps; the last one has none
        batch_format: "tuple" | "hf": {"input_ids", "labels", "shift_labels"}, for models of transformers
        on_change: a resumed run with other data: "refuse" | "continue", which starts the new data at its
            beginning, and keeps the optimizer, the schedule and the step
        num_workers: processes that load batches; 0 loads inline, which is over 20 times cheaper
        Where and how it is built:
        data_dir: folder for downloads/, tokens/, windows/ and cache/; `~` is the home folder
        stream: read http(s) texts in place, like texts of other schemes, and keep no download
        engine: "auto" | "reference" | "gigatoken", which give the same ids at different speeds
        build: "processes" of this machine | "ray": a cluster that sees text and data_dir at equal paths
        build_workers: processes or tasks at a time; None: one per core
        ray_address: address of the cluster, as in `ray.init`; None: a running cluster, else a local one
        cache_gb: maximum size of data_dir/cache in 10^9 bytes; None: no limit
    """

    _stage_begins: list[int] | None = None  # where stages start, fixed when a run starts
    _first_epoch = 0  # in which this data starts in the run

    def __init__(
        self,
        corpus: dict[str, Source | str | list[str]] | CorpusLike = "sample",
        tokenizer: str | Path | Any = "gpt2",
        max_length: int = 256,
        stride: int = 128,
        batch_size: int = 4,
        shuffle: bool = True,
        drop_last: bool = True,
        num_workers: int = 0,
        val_fraction: float = 0.1,
        test_fraction: float = 0.0,
        seed: int | None = 0,
        data_dir: str | os.PathLike[str] = "data",
        special_tokens: SpecialTokens = "allow",
        encoding_errors: EncodingErrors = "strict",
        strip_gutenberg: bool = False,
        text_column: str = "text",
        on_bad_document: OnBadDocument = "error",
        min_document_bytes: int | None = None,
        max_document_bytes: int | None = None,
        drop_duplicates: bool = False,
        engine: EngineName = "auto",
        build: BuildName = "processes",
        build_workers: int | None = None,
        ray_address: str | None = None,
        stream: bool = False,
        store_url: str | None = None,
        cache_gb: float | None = 32.0,
        val_corpus: dict[str, Source | str | list[str]] | None = None,
        stages: list[dict[str, Any]] | None = None,
        on_change: OnChange = "refuse",
        end_of_document: str | None = None,
        bos: bool = False,
        batch_format: BatchFormat = "tuple",
        drop_padded: bool = False,
        batch_schedule: list[dict[str, Any]] | None = None,
        windows: WindowKind = "sliding",
        eval_windows: WindowKind = "sliding",
        skip_steps: list[list[int]] | None = None,
    ) -> None:
        arguments = {name: plain(value) for name, value in locals().items()}
        del arguments["self"], arguments["__class__"]  # super() makes the second one local
        super().__init__()
        self.max_length, self.stride, self.batch_size = max_length, stride, batch_size
        self.shuffle, self.drop_last, self.batch_format = shuffle, drop_last, batch_format
        self.num_workers, self.drop_padded = num_workers, drop_padded
        self.windows, self.eval_windows = windows, eval_windows
        self.val_fraction, self.test_fraction, self.seed = val_fraction, test_fraction, seed
        self.data_dir = local_folder(data_dir)
        self.tokenizer = Tokenizer(tokenizer, special_tokens, end_of_document, bos, self.data_dir)
        self._data = Sources(arguments, self)
        self._resume = Resume(self, arguments["on_change"])
        self._tuned, self._draws_seed, self._drawn_seed = False, self.seed is None, DrawnSeed()
        save_hyperparameters(self, self._data.hparams)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "trainer":  # set by Lightning
            check_trainer(value)
        super().__setattr__(name, OPTIONS[name](value) if name in OPTIONS else value)

    def prepare_data(self) -> None:
        """Download and tokenize, or open `store_url`; Lightning calls this in one process per node."""
        self.tokenizer.keep()
        for message in self._data.prepare():
            rank_zero_warn(message)

    def publish(self, url: str | os.PathLike[str]) -> str | dict[str, str]:
        """Put the tokens at `url`/<fingerprint>, a `store_url` for any machine, and return that URL.

        For named sources it returns {name: URL}. Tokens that are not in `data_dir` need no local disk.
        Raises ValueError for a published or damaged store, RemoteError, the errors of `prepare_data`.
        """
        urls = self._data.publish(url)
        return urls if self._data.is_named else urls["corpus"]

    def setup(self, stage: str | None = None) -> None:
        """Open each store and cut it into train, val and test.

        Raises RuntimeError before `prepare_data()`, ValueError for a split that is too short.
        """
        ignore_warnings()
        for message in self._data.open(again=stage == "fit", shuffle=self.shuffle):
            rank_zero_warn(message)
        self.hparams["tokenizer"] = self.tokenizer.location  # with the commit of a tokenizer on the hub
        if self.trainer is not None and stage == "fit":
            self._tuned = finds_batch_size(self.trainer)
            if not has_trained(self.trainer):
                self._stage_begins, self._first_epoch = None, 0
            self._resume.attach(self.trainer)

    @property
    def vocab_size(self) -> int:
        """Number of ids, known before anything is downloaded."""
        return self._data.first.store.vocab_size if self._data.is_open else self.tokenizer.vocab_size

    @property
    def eot(self) -> int | None:
        """The id that separates documents; None if the tokenizer has none, or several."""
        return self.tokenizer.separator

    @property
    def sources(self) -> dict[str, NamedSource]:
        """The sources of `corpus` by name, each with `.store` and `.train_windows`, `.val_windows`."""
        return self._data.sources

    @property
    def store(self) -> TokenStore:
        """The token store of the only source; raises RuntimeError before `setup()` or for several."""
        return self._data.only_store

    _split = property(lambda self: self._data.first.split)  # of the only source

    @property
    def token_bytes(self) -> np.ndarray:
        """Number of UTF-8 bytes of each id, int64 (vocab_size,); 0 for special tokens."""
        return self._data.first.store.vocab["n_bytes"].astype(np.int64)

    def eval_sets(self, split: str) -> list[EvalSet]:
        """The sets of "val" or "test" with windows: those of `corpus`, then those of `val_corpus`."""
        return self._data.eval_sets(split)

    def scored_bytes(self, split: str, n: int, ordinary: int, special: int, source: str = "") -> int:
        """UTF-8 bytes of the first `n` targets of a source's set; 0 if they are not known."""
        return self._data.named(source).scored_bytes(split, n, ordinary, special)

    @property
    def train_windows(self) -> Windows:
        """Windows of `max_length` tokens; of named sources, a `Mixture`."""
        windows = self._data.train_windows(self._order_seed)
        if isinstance(windows, Mixture):
            windows.move(self._stage_begins or self._new_stage_begins, self._first_epoch)
        return windows

    @property
    def val_windows(self) -> Windows:
        """Windows that score every token once; some may have padding."""
        return self._data.eval_windows("val")

    @property
    def test_windows(self) -> Windows:
        return self._data.eval_windows("test")

    @property
    def _new_stage_begins(self) -> list[int]:
        return stage_begins(self._data.stage_tokens, self._resume.plan_of_data(), self.max_length)

    def train_dataloader(self) -> DataLoader[Batch]:
        """Batches of this rank's train windows, in the epoch's order if `shuffle`."""
        if self._resume.planned_by:
            check_plan(self._resume.planned_by, self.trainer, self._tuned)
        if self.trainer is not None and not (has_trained(self.trainer) or self._resume.resumed):
            self._stage_begins = self._new_stage_begins
        repeats = self.trainer is not None and overfits(self.trainer)  # the first windows, in text order
        if self._draws and self.trainer is not None and not repeats:  # all ranks load their data now
            self.seed = self._drawn_seed.share()
        loader = self._loader(
            self.train_windows, self.train_steps, seed=None if repeats else self._order_seed,
            may_be_empty=self._tuned, keeps_state=self.trainer is None,
            is_compact=splits_on_device(self), order=EpochPermutation if repeats else None,
        )  # fmt: skip
        self._resume.follow(cast(WindowSampler, loader.sampler), self.trainer)
        return loader

    def val_dataloader(self) -> EvalLoaders:
        """Batches of val windows in text order; [] without a val split.

        Several sets have a loader each if the model's step takes `dataloader_idx`, else one for all. All
        ranks have equally many batches, the last ones perhaps with padding: targets that are all -100.
        """
        return self._eval_loader("val")

    def test_dataloader(self) -> EvalLoaders:
        return self._eval_loader("test")

    def predict_dataloader(self) -> EvalLoaders:
        return self.val_dataloader()

    @property
    def _draws(self) -> bool:
        """Whether the order of the train windows needs a seed, and nobody has chosen one."""
        return self.shuffle and self.seed is None

    @property
    def _order_seed(self) -> int | DrawnSeed | None:
        """The seed of the train windows' order; None: text order."""
        return self._drawn_seed if self._draws else self.seed if self.shuffle else None

    @property
    def _ranks(self) -> Ranks:
        return current_ranks() if self.trainer is None else ranks_of(self.trainer)

    @property
    def train_steps(self) -> Steps:
        """How an epoch's train windows are divided into steps, of the first batch size, and ranks."""
        steps = self._steps(self._data.n_train, "drop" if self.drop_last else "share")
        return replace(steps, batch_size=self._data.batch_sizes[0])

    def _steps(self, n: int, tail: Tail | None = None) -> Steps:
        tail = tail or ("share" if self.drop_padded else "pad")  # of val and test
        return Steps(n=n, batch_size=self.batch_size, world_size=self._ranks.world_size, tail=tail)

    def _eval_loader(self, split: str) -> EvalLoaders:
        sets = sets_to_load(self, split)
        loaders = [self._loader(w, self._steps(len(w)), seed=None) for w in sets]
        return loaders[0] if len(loaders) == 1 else list(loaders)

    def _loader(self, windows: Windows, steps: Steps, **options: Any) -> WindowLoader:
        rank = None if self.trainer is None else self._ranks.rank
        options |= {"num_workers": self.num_workers, "batch_format": self.batch_format}
        return window_loader(windows, steps, rank=rank, **options)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps: which windows, the position, and the random states of all ranks.

        Without a Trainer there are no random states, and the train loader's last batch is unfinished.
        """
        if not self._data.is_open:
            return self._resume.loaded_state or {}
        return self._resume.save_alone() if self.trainer is None else self._resume.save(self.trainer)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue where `state_dict` was saved, with any batch size and number of ranks.

        Raises ValueError that names the difference if the windows or their order are not the same.
        """
        if self._draws_seed and "data" in state_dict:
            self.seed = state_dict["data"]["seed"]
        mixture = state_dict.get("data", {}).get("mixture")
        if mixture and len(mixture["stages"]) == len(self._data.stages or [{}]):  # else other data
            self._stage_begins = [begin for begin, _ in mixture["stages"]]
            self._first_epoch = mixture["first_epoch"]
        if self.trainer is None and state_dict:
            self._resume.load_alone(state_dict)
        elif self.trainer is not None and self.trainer.state.fn == "fit":
            new = self._resume.load(self.trainer, state_dict)
            if new is not None:
                self._first_epoch, self._stage_begins = new, self._new_stage_begins

    def batch_at(
        self, step: int, *, epoch: int | None = None, rank: int | None = None,
        world_size: int | None = None, split: str = "train",
    ) -> Batch:  # fmt: skip
        """The batch of a step: inputs, targets, int64 (B, max_length); see `windows_at`."""
        windows, indices = self._resume.find_batch(step, epoch, rank, world_size, split)
        return windows.batch(indices)

    def windows_at(
        self, step: int, *, epoch: int | None = None, rank: int | None = None,
        world_size: int | None = None, split: str = "train",
    ) -> np.ndarray:  # fmt: skip
        """The indices in `train_windows` that are the batch of a training step: int64 (B,).

        `step` counts batches from 0 over the whole run, also skipped ones, or within `epoch`. With
        accumulate_grad_batches=k, optimizer step s has the batches k * s to k * s + k - 1. After
        `GPTDataModule.load_from_checkpoint(path)` and `setup()` the run is the checkpoint's, with every
        change of batch size and ranks so far. `rank` and `world_size` default to this process's. With
        split="val" or "test", a batch of `val_windows` or `test_windows`; padding has higher indices.
        Raises ValueError for a step, epoch or rank that does not exist, RuntimeError before `setup()`.
        """
        return self._resume.find_batch(step, epoch, rank, world_size, split)[1]

    def tokens_at(self, batch: int | None = None, *, step: int | None = None) -> int | float:
        """Trained input tokens of all ranks before batch `batch`, or before optimizer step `step`.

        Without either, the tokens of the whole run, math.inf if the Trainer does not limit it.
        """
        return self._resume.tokens_at(batch, step)

    def show(self, step: int = 0, *, window: int | None = None) -> ShownText:
        """The text of a training step, counted as in `windows_at`, or of one train window.

        `print` has the inputs. A notebook shows each input above its target, as colored tokens. Raises
        the errors of `windows_at`, and ValueError for a window that does not exist.
        """
        return show(self, step, window)

    @property
    def _identity(self) -> dict[str, Any]:
        """What determines the windows and their order, in plain values."""
        seed = self._drawn_seed.value if self._draws else self.seed
        return {"shuffle": self.shuffle, "seed": seed} | self._data.identity(self.train_windows)

    def __repr__(self) -> str:
        batches = f"{', then '.join(map(str, self._data.batch_sizes))} windows, seed {self.seed}"
        return "\n".join(["GPTDataModule", *overview(self._data), f"  batches  {batches}"])

    __str__ = __repr__
