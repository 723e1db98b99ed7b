"""GPTDataModule: text, tokens and windows wired together; no logic of its own."""

from __future__ import annotations

import functools
import os
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import lightning as L
import numpy as np
from lightning.pytorch.utilities import rank_zero_warn
from torch.utils.data import DataLoader

from lit_gptdata._checks import check_at_least
from lit_gptdata._fsspec import redacted
from lit_gptdata.compact import sends_compact, split_on_device
from lit_gptdata.resume import Resume, check_same, legs_of
from lit_gptdata.text.corpus import CorpusLike, open_corpus
from lit_gptdata.text.document import Corpus
from lit_gptdata.text.formats import EncodingErrors, Reading
from lit_gptdata.tokens.build.local import find_store, prepare_store
from lit_gptdata.tokens.build.plan import BuildName, BuildOptions
from lit_gptdata.tokens.engines import EngineName
from lit_gptdata.tokens.remote.cache import Cache
from lit_gptdata.tokens.remote.objects import check_url
from lit_gptdata.tokens.remote.publish import publish, publish_text
from lit_gptdata.tokens.remote.store import RemoteStore, open_store, prepare_store_at
from lit_gptdata.tokens.store import TokenStore
from lit_gptdata.tokens.tokenizer import SpecialTokens, Tokenizer
from lit_gptdata.windows.dataset import Batch, Windows, check_enough
from lit_gptdata.windows.loader import Form, WindowLoader, WindowSampler, window_loader
from lit_gptdata.windows.order import EpochOrder
from lit_gptdata.windows.spans import check_lengths
from lit_gptdata.windows.split import Split, check_fractions, split_tokens
from lit_gptdata.windows.steps import Leg, Steps, find

NUISANCES = (
    ".*does not have many workers.*",  # windows load inline on purpose: a worker costs 20 times more
    ".*LeafSpec.*",  # Lightning's own use of a torch class that is to go; comes with every fit
    ".*functional.all_gather is deprecated.*",  # Lightning's own use, when ranks save a checkpoint
)
"""Lightning's warnings that no user of this module can act on."""


class GPTDataModule(L.LightningDataModule):
    """Download → tokens → windows → train/val/test → order → batches (inputs, targets), int64 (B, T).

    Args:
        corpus: "sample" | "frankenstein" | "tinyshakespeare" | URL | path | folder | glob | list | a
            `Corpus`
        tokenizer: a tiktoken encoding's name
        max_length: tokens in a window's inputs
        stride: tokens between the starts of two train windows; of val and test windows: max_length
        batch_size: windows in a batch, on each rank
        shuffle: train windows in a seeded order, a new one each epoch
        drop_last: leave out an epoch's last, smaller train batch
        num_workers: processes that load batches; one costs the main process over 20 times what loading
            inline, 0, does
        contiguous: False: inputs and targets are views of one tensor, in a fifth less time
        val_fraction: share of the corpus's UTF-8 bytes, cut from its end
        test_fraction: share of the corpus's UTF-8 bytes, cut behind val
        seed: of the order
        data_dir: downloads/ and tokens/ live there
        special_tokens: what `<|endoftext|>` inside a text is: "allow" (the special token) | "text" |
            "error"
        encoding_errors: invalid UTF-8: "strict" (an error) | "replace" (U+FFFD)
        strip_gutenberg: leave out Project Gutenberg's licence
        text_column: key or column of jsonl and parquet that holds the text
        max_document_bytes: refuse longer documents; None: no limit
        engine: "auto" | "tiktoken" | "gigatoken", the same ids at other speeds
        build: who tokenises: "processes" of this machine | "ray": tasks on a cluster whose nodes all see
            the text and `data_dir` under the same paths; the same tokens
        build_workers: processes or tasks at a time; None: one a core
        ray_address: of the cluster, as `ray.init` takes it; None: the one that RAY_ADDRESS names or
            `ray start` began here, else a local one for as long as it takes; a program that is connected
            already stays so
        stream: read http(s) texts where they are, as those of s3:// and others, and keep no download
        store_url: a published store, a folder or a URL that fsspec reaches, to train from in place of
            `corpus`, which is then not read
        cache_gb: 10^9 bytes of published stores that data_dir/cache holds; None: no limit. Each process
            may keep up to the same amount of evicted shards on disk while it has them open

    Raises:
        ValueError, TypeError: an option out of range, when constructed
    """

    def __init__(
        self,
        corpus: CorpusLike = "sample",
        tokenizer: str = "gpt2",
        max_length: int = 256,
        stride: int = 128,
        batch_size: int = 4,
        shuffle: bool = True,
        drop_last: bool = True,
        num_workers: int = 0,
        contiguous: bool = True,
        val_fraction: float = 0.1,
        test_fraction: float = 0.0,
        seed: int = 0,
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
        super().__init__()
        check_lengths(max_length, stride)
        check_at_least("batch_size", batch_size, 1, "the number of windows in a batch")
        check_at_least("num_workers", num_workers, 0, "the number of processes that load batches")
        check_fractions(val_fraction, test_fraction)
        self._build_options = BuildOptions(
            engine=engine,
            build=build,
            workers=build_workers,
            ray_address=ray_address,
            max_document_bytes=max_document_bytes,
        )
        if store_url is not None:
            store_url = os.fspath(store_url)
            check_url(store_url)
        if cache_gb is not None and (isinstance(cache_gb, bool) or not cache_gb > 0):
            raise ValueError(
                f"cache_gb={cache_gb!r} is no size: give 10^9 bytes, such as 32.0, or None for no bound"
            )
        self._reading = Reading(
            encoding_errors=encoding_errors, text_column=text_column, strip_gutenberg=strip_gutenberg
        )
        self.tokenizer = Tokenizer(tokenizer, special_tokens)
        self.data_dir = Path(data_dir)
        self._corpus = corpus
        self._store: TokenStore | None = None
        self._split: Split | None = None
        self._resume = Resume(key=type(self).__qualname__)
        self._loaded: dict[str, Any] | None = None
        # plain values only: anything else in the hparams breaks loading a checkpoint with weights_only
        corpus, data_dir = _plain(corpus), str(data_dir)
        self.save_hyperparameters()

    def prepare_data(self) -> None:
        """Download and tokenise, once; Lightning calls this in one process a node.

        Of a store at `store_url`, only what opening it needs is fetched.
        """
        if self.hparams["store_url"] is not None:
            self._check_tokenizer(prepare_store_at(self.hparams["store_url"], self._cache))
            return
        prepare_store(
            self._open_corpus(download=True),
            self.tokenizer,
            self.data_dir / "tokens",
            self._build_options,
        )

    def publish(self, url: str | os.PathLike[str]) -> str:
        """Put the tokens at `url`/<fingerprint>, for `store_url` anywhere, and return that.

        Tokens that are not in `data_dir` are made there straight away: whoever `build`s sends them, and
        no disk here holds them. `url`: of any scheme that fsspec knows, or a folder. Raises ValueError
        for a store that is published already or damaged, RemoteError, and what `prepare_data` raises.
        """
        if self.hparams["store_url"] is not None:
            raise ValueError(f"{redacted(self.hparams['store_url'])} is published already")
        corpus = self._open_corpus(download=True)
        store = find_store(corpus, self.tokenizer, self.data_dir / "tokens")
        if store is not None:
            return publish(store, url)
        return publish_text(corpus, self.tokenizer, url, self._build_options)

    def setup(self, stage: str | None = None) -> None:
        """Open the store and cut it into train, val and test.

        Raises RuntimeError before `prepare_data()`, ValueError if a split leaves no window.
        """
        if self._store is None:
            self._open()
        if self.trainer is not None and stage == "fit":
            self._resume.attach(self.trainer, self.train_steps)

    def _open(self) -> None:
        for nuisance in NUISANCES:
            warnings.filterwarnings("ignore", nuisance)
        store, hparams = self._find_store(), self.hparams
        split = split_tokens(store, hparams["val_fraction"], hparams["test_fraction"])
        begin, end = split.train
        check_enough(
            end - begin, hparams["max_length"], f"the train split of {redacted(repr(self._source))}"
        )
        self._store, self._split = store, split
        if isinstance(store, RemoteStore) and not store.fits and hparams["shuffle"]:
            rank_zero_warn(
                f"the store has {store.n_file_bytes / 1e9:.3g} GB and its cache at most "
                f"{hparams['cache_gb']:g}: with shuffle=True nearly every batch needs shards from all "
                "over it, which are fetched again and again. The batches are the same, but slow. Set "
                f"cache_gb >= {store.n_file_bytes / 1e9:.3g}, or shuffle=False"
            )

    def _find_store(self) -> TokenStore:
        if self.hparams["store_url"] is not None:
            store = open_store(self.hparams["store_url"], self._cache)
            if store is None:
                raise RuntimeError(
                    f"the store at {self._source} was not opened on this machine yet, under "
                    f"{self._cache.folder}: call prepare_data() first; a Trainer does so"
                )
            self._check_tokenizer(store)
            return store
        store = find_store(self._open_corpus(download=False), self.tokenizer, self.data_dir / "tokens")
        if store is None:
            raise RuntimeError(
                f"{redacted(repr(self._corpus))} is not tokenised yet under {self.data_dir / 'tokens'} "
                "(or changed since): call prepare_data() first; a Trainer does so"
            )
        return store

    @property
    def _source(self) -> CorpusLike:
        """What the tokens come from, as the user named it."""
        return self.hparams["store_url"] or self._corpus

    @property
    def _cache(self) -> Cache:
        gb = self.hparams["cache_gb"]
        return Cache(self.data_dir / "cache", None if gb is None else int(gb * 1e9))

    def _check_tokenizer(self, store: TokenStore) -> None:
        """Raise ValueError unless the store's ids are those of this module's tokenizer."""
        theirs, ours = store.manifest.tokenizer, self.tokenizer
        if theirs.fingerprint != ours.fingerprint:
            raise ValueError(
                f"the store {store.location} was made with tokenizer={theirs.name!r} and "
                f"special_tokens={theirs.special_tokens!r} ({theirs.fingerprint[:8]}), this run "
                f"has {ours.name!r} and {ours.special_tokens!r} ({ours.fingerprint[:8]}). Take the "
                "store's"
            )

    def _open_corpus(self, download: bool) -> Corpus:
        return open_corpus(
            self._corpus,
            downloads=self.data_dir / "downloads",
            download=download,
            stream=self.hparams["stream"],
            reading=self._reading,
        )

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
        """UTF-8 bytes that each id stands for, int64 (vocab_size,); special tokens 0."""
        return self.store.vocab["n_bytes"].astype(np.int64)

    @functools.cached_property
    def train_windows(self) -> Windows:
        """Windows of `max_length` tokens every `stride` tokens."""
        return self._range("train")

    @functools.cached_property
    def val_windows(self) -> Windows:
        """Windows side by side, that score every token once; the last one is filled with target -100."""
        return self._range("val")

    @functools.cached_property
    def test_windows(self) -> Windows:
        """As `val_windows`, over the end of the corpus."""
        return self._range("test")

    def _range(self, name: str) -> Windows:
        tokens = self.store.tokens
        assert self._split is not None
        begin, end = getattr(self._split, name)
        length = self.hparams["max_length"]
        stride, fill = (self.hparams["stride"], False) if name == "train" else (length, True)
        return Windows(tokens, begin=begin, end=end, max_length=length, stride=stride, fill=fill)

    def train_dataloader(self) -> DataLoader[Batch]:
        """Batches of train windows, in the epoch's order if `shuffle`; each rank has its slice.

        A Trainer on a GPU gets them as the store has them, an eighth of the bytes, and they become
        (inputs, targets) there.
        """
        form: Form = "contiguous" if self.hparams["contiguous"] else "views"
        if self.trainer is not None and sends_compact(self.trainer):
            form = "compact"
            # Of this object and not of its class: Lightning would prefer it to the model's own hook.
            self.on_after_batch_transfer = split_on_device  # type: ignore[method-assign]
        else:
            vars(self).pop("on_after_batch_transfer", None)
        loader = self._loader(self.train_windows, self.train_steps, self._order_seed, form)
        self._resume.follow(cast(WindowSampler, loader.sampler))
        return loader

    def val_dataloader(self) -> DataLoader[Batch] | list[Batch]:
        """Batches of val windows in the text's order; [] without a val split.

        Each rank has as many batches: on several ranks the last ones may hold windows of fillers,
        every target -100, which a sum over targets leaves out and a mean over nothing else is NaN.
        """
        return self._eval_loader(self.val_windows)

    def test_dataloader(self) -> DataLoader[Batch] | list[Batch]:
        """As `val_dataloader`, of test windows."""
        return self._eval_loader(self.test_windows)

    def predict_dataloader(self) -> DataLoader[Batch] | list[Batch]:
        """The same as `val_dataloader`."""
        return self.val_dataloader()

    @property
    def _order_seed(self) -> int | None:
        return self.hparams["seed"] if self.hparams["shuffle"] else None

    @property
    def _ranks(self) -> dict[str, int]:
        """`rank` and `num_replicas` of this process under its Trainer."""
        kwargs = None if self.trainer is None else self.trainer.distributed_sampler_kwargs
        return kwargs or {"rank": 0, "num_replicas": 1}

    @property
    def train_steps(self) -> Steps:
        """How an epoch's train windows are dealt out in steps, and each step to the ranks."""
        return Steps(
            n=len(self.train_windows),
            batch_size=self.hparams["batch_size"],
            world_size=self._ranks["num_replicas"],
            tail="drop" if self.hparams["drop_last"] else "share",
        )

    def _eval_loader(self, windows: Windows) -> DataLoader[Batch] | list[Batch]:
        steps = Steps(
            n=len(windows),
            batch_size=self.hparams["batch_size"],
            world_size=self._ranks["num_replicas"],
            tail="fill",
        )
        return self._loader(windows, steps, seed=None) if len(windows) else []

    def _loader(
        self, windows: Windows, steps: Steps, seed: int | None, form: Form = "contiguous"
    ) -> WindowLoader:
        return window_loader(
            windows,
            steps,
            seed=seed,
            rank=self._ranks["rank"],
            num_workers=self.hparams["num_workers"],
            form=form,
        )

    # Resume -----------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps: which windows, the position, and all ranks' random generators."""
        if self.trainer is None or self._store is None or not self._resume.legs:
            return {}
        return {"data": self._identity, **self._resume.state_dict_of(self.trainer)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken, with any batch size and number of ranks.

        Raises ValueError that names corpus, tokenizer, max_length, stride, split or seed, and both
        values, if they differ.
        """
        if self.trainer is None:
            self._loaded = state_dict
        elif self.trainer.state.fn == "fit":
            check_same(state_dict["data"], self._identity)
            self._resume.load_state_dict_of(self.trainer, state_dict, self.train_steps)

    @property
    def _legs(self) -> list[Leg]:
        """What is known of the run: of this process's, of a checkpoint's, or that it has not begun."""
        if self._resume.legs:
            return self._resume.legs
        steps = self.train_steps
        if self._loaded is not None:
            check_same(self._loaded["data"], self._identity)
            return legs_of(self._loaded, steps.n)
        return [Leg.whole(steps)]

    def batch_at(
        self,
        step: int,
        *,
        epoch: int | None = None,
        rank: int | None = None,
        world_size: int | None = None,
    ) -> Batch:
        """The batch of a training step, without running it: inputs, targets, int64 (B, max_length).

        The arguments and errors are those of `windows_at`.
        """
        windows = self.windows_at(step, epoch=epoch, rank=rank, world_size=world_size)
        return self.train_windows.batch(windows)

    def windows_at(
        self,
        step: int,
        *,
        epoch: int | None = None,
        rank: int | None = None,
        world_size: int | None = None,
    ) -> np.ndarray:
        """Which of `train_windows` are the batch of a training step: int64 (B,).

        `step`: counted from 0 over the whole run, or within `epoch`; it is a batch: optimizer step s
        of accumulate_grad_batches=k has the batches k * s to k * s + k - 1. `rank`, `world_size`: of
        the run, by default this process's. After `GPTDataModule.load_from_checkpoint(path)` and
        `setup()` the run is the checkpoint's, with every change of batch size and ranks up to it.

        Raises ValueError for a step, epoch or rank that does not exist, RuntimeError before `setup()`.
        """
        legs = self._legs
        if world_size is not None and world_size != legs[-1].steps.world_size:
            legs = [Leg.whole(replace(self.train_steps, world_size=world_size))]
        steps, position = find(legs, step, epoch)
        rank = self._ranks["rank"] if rank is None else rank
        if not 0 <= rank < steps.world_size:
            raise ValueError(f"rank={rank} does not exist: give a rank in [0, {steps.world_size})")
        order = EpochOrder(n=steps.n, seed=self._order_seed, epoch=position.epoch)
        return order.at(np.arange(*steps.share(position.index, rank)))

    @property
    def _identity(self) -> dict[str, Any]:
        """What decides which windows there are and their order, in plain values."""
        options = (
            "tokenizer",
            "special_tokens",
            "encoding_errors",
            "strip_gutenberg",
            "text_column",
        )
        windows = ("max_length", "stride", "val_fraction", "test_fraction", "shuffle", "seed")
        return {
            "store": self.store.fingerprint,
            **{name: self.hparams[name] for name in (*options, *windows)},
            "corpus": _plain(self._source),
            "train_tokens": [self.train_windows.begin, self.train_windows.end],
        }

    def __repr__(self) -> str:
        """Corpus → tokens → windows, with counts and fingerprints as far as they are known."""
        lines = ["GPTDataModule", f"  corpus   {redacted(repr(self._source))}"]
        if self._store is None or self._split is None:
            lines.append(f"  tokens   {self.tokenizer!r}, not prepared yet")
            return "\n".join(lines)
        store, hparams = self._store, self.hparams
        lines.append(
            f"  tokens   {store.n_tokens:,} by {self.tokenizer!r} from {store.n_documents:,} documents, "
            f"{store.n_bytes:,} bytes; store {store.fingerprint[:8]}, {store.dtype.name}"
        )
        for name in ("train", "val", "test"):
            begin, end = getattr(self._split, name)
            windows = self._range(name)
            lines.append(
                f"  {name:<8} {len(windows):,} windows of {hparams['max_length']} every "
                f"{windows.spans.stride} tokens, over tokens [{begin:,}, {end:,})"
            )
        lines.append(f"  batches  {hparams['batch_size']} windows, seed {hparams['seed']}")
        return "\n".join(lines)

    __str__ = __repr__


def _plain(corpus: CorpusLike) -> str | list[str]:
    """A corpus as a checkpoint may hold it."""
    if isinstance(corpus, (list, tuple)):
        return [str(entry) for entry in corpus]
    return str(corpus) if isinstance(corpus, (str, os.PathLike)) else repr(corpus)
