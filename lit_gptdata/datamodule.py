"""GPTDataModule connects text, tokens and windows, and gives their batches to a Lightning Trainer."""

from __future__ import annotations

import os
import warnings
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, cast

import lightning as L
import numpy as np
from lightning.pytorch.utilities import rank_zero_warn
from torch.utils.data import DataLoader

from lit_gptdata._checks import check_flag, check_integer, check_string, plain
from lit_gptdata._fsspec import redacted
from lit_gptdata._lightning import (
    IGNORED_WARNINGS,
    check_trainer,
    finds_batch_size,
    overfits,
    ranks_of,
    save_hyperparameters,
)
from lit_gptdata.compact import sends_compact, split_on_device
from lit_gptdata.resume import WINDOW_OPTIONS, Resume
from lit_gptdata.text.corpus import CorpusLike
from lit_gptdata.text.formats import EncodingErrors, Reading
from lit_gptdata.tokens.build.plan import BuildName, BuildOptions
from lit_gptdata.tokens.engines import EngineName
from lit_gptdata.tokens.source import LocalBuild, choose_source, local_folder, shuffle_warning
from lit_gptdata.tokens.store import TokenStore
from lit_gptdata.tokens.tokenizer import SpecialTokens, Tokenizer
from lit_gptdata.windows.dataset import Batch, Windows, check_enough
from lit_gptdata.windows.loader import WindowLoader, window_loader
from lit_gptdata.windows.ranks import DrawnSeed, Ranks, current_ranks
from lit_gptdata.windows.sampler import WindowSampler
from lit_gptdata.windows.spans import check_lengths
from lit_gptdata.windows.split import (
    Split,
    changed_val_warning,
    check_fractions,
    scored_bytes,
    split_tokens,
)
from lit_gptdata.windows.steps import Steps, Tail, windows_of_batch

if TYPE_CHECKING:
    import tiktoken


class GPTDataModule(L.LightningDataModule):
    """Turns text into batches for GPT training: (inputs, targets), int64 (batch_size, max_length).

    Targets are the inputs one token later. Windows are views of a store of tokens, so other windows,
    batches or splits need no new tokenizing. Raises ValueError, TypeError for an option out of range.

    Args:
        Which text:
        corpus: "sample" | "frankenstein" | "tinyshakespeare" | URL | path | folder | glob | a list of
            these | a `Corpus`
        strip_gutenberg: leave out Project Gutenberg's license
        text_column: key or column of jsonl and parquet files that holds the text
        encoding_errors: invalid UTF-8: "strict" (an error) | "replace" (U+FFFD)
        max_document_bytes: refuse longer documents; None: no limit
        store_url: published store to train from instead of `corpus`: a folder, or a URL for fsspec
        Which tokens:
        tokenizer: name of a tiktoken encoding, or a `tiktoken.Encoding`
        special_tokens: `<|endoftext|>` in a text: "allow" (the special token) | "text" | "error"
        Which windows:
        max_length: tokens in a window's inputs
        stride: tokens between the starts of two train windows; val and test use max_length
        val_fraction: fraction of the corpus's UTF-8 bytes for val, between train and test
        test_fraction: fraction of the corpus's UTF-8 bytes for test, at the end
        Batches and order:
        batch_size: windows per batch, on each rank
        shuffle: train windows in a seeded order, a new one each epoch
        seed: seed of that order; None: rank 0 draws one, and a resumed run takes its checkpoint's
        drop_last: leave out an epoch's last, smaller train batch
        num_workers: processes that load batches; 0 loads inline, which is over 20 times cheaper
        Where and how it is built:
        data_dir: folder for downloads/, tokens/ and cache/; `~` is the home folder
        stream: read http(s) texts in place, like texts of other schemes, and keep no download
        engine: "auto" | "tiktoken" | "gigatoken", which give the same ids at different speeds
        build: "processes" of this machine | "ray": a cluster that sees text and data_dir at equal paths
        build_workers: processes or tasks at a time; None: one per core
        ray_address: address of the cluster, as in `ray.init`; None: the cluster of RAY_ADDRESS or of
            `ray start`, else a local one for the build. An existing connection of the program is used
        cache_gb: maximum size of data_dir/cache in 10^9 bytes; None: no limit
    """

    _store: TokenStore | None = None  # opened by `setup`
    _split: Split = Split(train=(0, 0), val=(0, 0), test=(0, 0))

    def __init__(
        self,
        corpus: CorpusLike = "sample",
        tokenizer: str | tiktoken.Encoding = "gpt2",
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
        max_document_bytes: int | None = None,
        engine: EngineName = "auto",
        build: BuildName = "processes",
        build_workers: int | None = None,
        ray_address: str | None = None,
        stream: bool = False,
        store_url: str | None = None,
        cache_gb: float | None = 32.0,
    ) -> None:
        arguments = {**locals()}
        del arguments["self"], arguments["__class__"]  # super() makes the second one local
        super().__init__()
        max_length, stride = check_lengths(max_length, stride)
        self.max_length, self.stride = max_length, stride
        self.batch_size = check_integer("batch_size", batch_size, 1, "the number of windows in a batch")
        self.num_workers = check_integer("num_workers", num_workers, 0, "the number of loader processes")
        self.val_fraction, self.test_fraction = check_fractions(val_fraction, test_fraction)
        self.seed = None if seed is None else check_integer("seed", seed)
        self.shuffle, self.drop_last = check_flag("shuffle", shuffle), check_flag("drop_last", drop_last)
        self.tokenizer = Tokenizer(tokenizer, plain(special_tokens))
        self.data_dir = local_folder(data_dir)
        self._reading = Reading(
            encoding_errors=plain(encoding_errors), text_column=check_string("text_column", text_column),
            strip_gutenberg=check_flag("strip_gutenberg", strip_gutenberg),
        )  # fmt: skip
        options = BuildOptions(
            engine=plain(engine), build=plain(build), ray_address=plain(ray_address),
            workers=build_workers, max_document_bytes=max_document_bytes,
        )  # fmt: skip
        stream = check_flag("stream", stream)
        local = LocalBuild(corpus, self.tokenizer, self.data_dir, self._reading, stream, options)
        self._source = choose_source(local, store_url, cache_gb)
        self._resume = Resume(key=type(self).__qualname__)
        self._tuned, self._draws_seed, self._drawn_seed = False, self.seed is None, DrawnSeed()
        arguments |= asdict(self._reading) | {**asdict(options), "build_workers": options.workers}
        del arguments["workers"]
        save_hyperparameters(self, arguments | {
            "corpus": local.name, "tokenizer": self.tokenizer.name, "stream": local.stream,
            "special_tokens": self.tokenizer.special_tokens, "data_dir": plain(data_dir),
            "store_url": plain(store_url), "cache_gb": cache_gb and float(cache_gb),
        })  # fmt: skip

    @property
    def trainer(self) -> L.Trainer | None:
        """The Trainer that uses this data module; set by Lightning."""
        return self._trainer

    @trainer.setter
    def trainer(self, trainer: L.Trainer | None) -> None:
        check_trainer(trainer)
        self._trainer = trainer

    def prepare_data(self) -> None:
        """Download and tokenize, or open `store_url`; Lightning calls this in one process per node."""
        store = self._source.prepare()
        if isinstance(self._source, LocalBuild):
            key = [self._source.name, self.tokenizer.fingerprint]
            fractions = self.val_fraction, self.test_fraction
            if changed := changed_val_warning(store, *fractions, root=self._source.root, key=key):
                rank_zero_warn(changed)

    def publish(self, url: str | os.PathLike[str]) -> str:
        """Put the tokens at `url`/<fingerprint>, a `store_url` for any machine, and return that URL.

        Workers upload tokens that are not in `data_dir` directly, without using local disk. Raises
        ValueError for a published or damaged store, RemoteError, and the errors of `prepare_data`.
        """
        return self._source.publish(url)

    def setup(self, stage: str | None = None) -> None:
        """Open the store and cut it into train, val and test.

        Raises RuntimeError before `prepare_data()`, ValueError for a split that is too short.
        """
        for message in IGNORED_WARNINGS:
            warnings.filterwarnings("ignore", message)
        if self._store is None or (stage == "fit" and isinstance(self._source, LocalBuild)):
            self._open(self._source.find())  # again before each fit: the text may have changed
        if self.trainer is not None and stage == "fit":
            self._tuned = finds_batch_size(self.trainer)
            self._resume.attach(self.trainer, self.train_steps)

    def _open(self, store: TokenStore) -> None:
        if self._store is not None and self._store.fingerprint == store.fingerprint:
            return
        split = split_tokens(store, self.val_fraction, self.test_fraction)
        name = f"the train split of {redacted(repr(self._source.name))}"
        check_enough(split.train[1] - split.train[0], self.max_length, name)
        self._store, self._split = store, split
        if split.val_sources:
            rank_zero_warn(f"val covers only the end of the corpus: {split.val_sources}")
        if self.shuffle and (slow := shuffle_warning(store)):
            rank_zero_warn(slow)

    @property
    def vocab_size(self) -> int:
        """Number of ids, known before anything is downloaded."""
        return self.tokenizer.vocab_size if self._store is None else self._store.vocab_size

    @property
    def store(self) -> TokenStore:
        """The token store; raises RuntimeError before `setup()`."""
        if self._store is None:
            raise RuntimeError("the token store is not open yet: call prepare_data() and setup() first")
        return self._store

    @property
    def token_bytes(self) -> np.ndarray:
        """Number of UTF-8 bytes of each id, int64 (vocab_size,); 0 for special tokens."""
        return self.store.vocab["n_bytes"].astype(np.int64)

    def scored_bytes(self, split: str, n_targets: int, ordinary: int, special: int) -> int:
        """UTF-8 bytes of the first targets of "val" or "test", as `windows.split.scored_bytes`."""
        return scored_bytes(self.store, getattr(self._split, split)[0], n_targets, ordinary, special)

    @property
    def train_windows(self) -> Windows:
        """Windows of `max_length` tokens every `stride` tokens."""
        return self._windows("train", self.stride)

    @property
    def val_windows(self) -> Windows:
        """Non-overlapping windows that score every token once; the last one is padded."""
        return self._windows("val", self.max_length, pad=True)

    @property
    def test_windows(self) -> Windows:
        """Like `val_windows`, over the end of the corpus."""
        return self._windows("test", self.max_length, pad=True)

    def _windows(self, split: str, stride: int, pad: bool = False) -> Windows:
        tokens, length = self.store.tokens, self.max_length
        begin, end = getattr(self._split, split)
        return Windows(tokens, begin=begin, end=end, max_length=length, stride=stride, pad=pad)

    def train_dataloader(self) -> DataLoader[Batch]:
        """Batches of this rank's train windows, in the epoch's order if `shuffle`.

        Under a Trainer on a GPU they travel as stored, an eighth of the bytes, and are split on the GPU.
        """
        vars(self).pop("on_after_batch_transfer", None)
        if compact := self.trainer is not None and sends_compact(self.trainer):
            # Set on the object, because Lightning prefers a hook of the class to the model's own hook.
            self.on_after_batch_transfer = split_on_device  # type: ignore[method-assign]
        loader = self._loader(
            self.train_windows, self.train_steps, seed=self._loader_seed(), may_be_empty=self._tuned,
            keeps_state=self.trainer is None, batch_format="compact" if compact else "tuple",
        )  # fmt: skip
        sampler = cast(WindowSampler, loader.sampler)
        if self.trainer is None:
            self._resume.follow_alone(sampler, self._identity)
        else:
            self._resume.follow(sampler, self.trainer, self.train_steps)
        return loader

    def val_dataloader(self) -> DataLoader[Batch] | list[Batch]:
        """Batches of val windows in text order; [] without a val split.

        Every rank has the same number of batches, so the last ones may contain windows of padding. Their
        targets are all -100: a sum over targets skips them, and a mean over such a window is NaN.
        """
        return self._eval_loader(self.val_windows)

    def test_dataloader(self) -> DataLoader[Batch] | list[Batch]:
        return self._eval_loader(self.test_windows)

    def predict_dataloader(self) -> DataLoader[Batch] | list[Batch]:
        return self.val_dataloader()

    def _loader_seed(self) -> int | DrawnSeed | None:
        """The seed for a train loader; None: text order, also under `Trainer(overfit_batches=…)`."""
        if not self.shuffle or (self.trainer is not None and overfits(self.trainer)):
            return None
        if self.seed is None and self.trainer is not None:  # all ranks load their data now
            self.seed = self._drawn_seed.share()
        return self._drawn_seed if self.seed is None else self.seed

    @property
    def _order_seed(self) -> int | None:
        """The seed of the order, drawn if the user gave none; None: text order."""
        seed = self._drawn_seed.value if self.seed is None else self.seed
        return seed if self.shuffle else None

    @property
    def _ranks(self) -> Ranks:
        return current_ranks() if self.trainer is None else ranks_of(self.trainer)

    @property
    def train_steps(self) -> Steps:
        """How an epoch's train windows are divided into steps, and each step among the ranks."""
        return self._steps(self.train_windows, "drop" if self.drop_last else "share")

    def _steps(self, windows: Windows, tail: Tail) -> Steps:
        world_size = self._ranks.world_size
        return Steps(n=len(windows), batch_size=self.batch_size, world_size=world_size, tail=tail)

    def _eval_loader(self, windows: Windows) -> DataLoader[Batch] | list[Batch]:
        if not len(windows):
            return []
        return self._loader(windows, self._steps(windows, "pad"), seed=None)

    def _loader(self, windows: Windows, steps: Steps, **options: Any) -> WindowLoader:
        rank = None if self.trainer is None else self._ranks.rank
        return window_loader(windows, steps, rank=rank, num_workers=self.num_workers, **options)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps: which windows, the position, and the random states of all ranks.

        Without a Trainer there are no random states, and the train loader's last batch counts as
        unfinished. The loader's own `state_dict()` counts that batch as done.
        """
        if self._store is None:
            return self._resume.loaded_state or {}
        if self.trainer is None:
            return self._resume.save_alone(self.train_steps, self._identity)
        return self._resume.save(self.trainer, self._identity)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue where `state_dict` was saved, with any batch size and number of ranks.

        Raises ValueError that names the difference if the windows or their order are not the same.
        """
        if self._draws_seed and "data" in state_dict:
            self.seed = state_dict["data"]["seed"]
        if self.trainer is None:
            if state_dict:
                identity = None if self._store is None else self._identity
                self._resume.load_alone(state_dict, identity)
        elif self.trainer.state.fn == "fit":
            self._resume.load(self.trainer, state_dict, self._identity, self.train_steps)

    def batch_at(
        self, step: int, *, epoch: int | None = None, rank: int | None = None,
        world_size: int | None = None,
    ) -> Batch:  # fmt: skip
        """The batch of a training step: inputs, targets, int64 (B, max_length); see `windows_at`."""
        windows = self.windows_at(step, epoch=epoch, rank=rank, world_size=world_size)
        return self.train_windows.batch(windows)

    def windows_at(
        self, step: int, *, epoch: int | None = None, rank: int | None = None,
        world_size: int | None = None,
    ) -> np.ndarray:  # fmt: skip
        """The indices in `train_windows` that are the batch of a training step: int64 (B,).

        `step` counts batches from 0 over the whole run, or within `epoch`. With
        accumulate_grad_batches=k, optimizer step s has the batches k * s to k * s + k - 1. `rank` and
        `world_size` default to this process's. After `GPTDataModule.load_from_checkpoint(path)` and
        `setup()` the run is the checkpoint's, with every change of batch size and ranks so far. Raises
        ValueError for a step, epoch or rank that does not exist, and RuntimeError before `setup()`.
        """
        segments = self._resume.segments(self.train_steps, self._identity, world_size)
        if self.shuffle and self.seed is None and not self._drawn_seed.is_shared:
            raise RuntimeError("seed=None: the ranks share a seed when they read their first batch")
        rank = self._ranks.rank if rank is None else rank
        return windows_of_batch(segments, step, epoch, rank=rank, seed=self._order_seed)

    @property
    def _identity(self) -> dict[str, Any]:
        """What determines the windows and their order, in plain values."""
        return {
            "store": self.store.fingerprint,
            "tokenizer": self.tokenizer.name,
            "special_tokens": self.tokenizer.special_tokens,
            **asdict(self._reading),
            **{name: getattr(self, name) for name in WINDOW_OPTIONS},
            "seed": self.seed if self._order_seed is None else self._order_seed,
            "corpus": self._source.name,
            "val": self._split.val_sources,
            "train_tokens": [self.train_windows.begin, self.train_windows.end],
        }

    def __repr__(self) -> str:
        lines = ["GPTDataModule", f"  corpus   {redacted(repr(self._source.name))}"]
        if self._store is None:
            return "\n".join([*lines, f"  tokens   {self.tokenizer!r}, not prepared yet"])
        store = self._store
        lines.append(
            f"  tokens   {store.n_tokens:,} by {self.tokenizer!r} from {store.n_documents:,} documents, "
            f"{store.n_bytes:,} bytes; store {store.fingerprint[:8]}, {store.dtype.name}"
        )
        lines += [f"  {name:<8} {getattr(self, f'{name}_windows')}" for name in ("train", "val", "test")]
        if self._split.val_sources:
            lines.insert(-1, f"           of {self._split.val_sources}")
        lines.append(f"  batches  {self.batch_size} windows, seed {self.seed}")
        return "\n".join(lines)

    __str__ = __repr__
