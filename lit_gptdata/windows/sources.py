"""The sources of a data module: the store of each one, and its train, val and test windows.

Sources(corpus, …)  ──open()──▶  {name: NamedSource}  ──▶  train windows, and sets to evaluate
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict
from typing import Any, NamedTuple

from lit_gptdata._fsspec import local_path, redacted
from lit_gptdata.text.document import Corpus
from lit_gptdata.tokens.coverage import changed_val, covered
from lit_gptdata.tokens.options import (
    Source,
    local_build,
    naming,
    read_batch_schedule,
    read_skip_steps,
    read_sources,
    read_stages,
)
from lit_gptdata.tokens.shards import allow_open_files
from lit_gptdata.tokens.source import LocalBuild, PublishedStore, choose_source, shuffle_warning
from lit_gptdata.tokens.store import TokenStore
from lit_gptdata.windows.dataset import PackedWindows, WindowKind, Windows, check_enough
from lit_gptdata.windows.mixture import ChainedWindows, Mixture, Stage
from lit_gptdata.windows.packing import WindowIndex, open_index
from lit_gptdata.windows.ranks import DrawnSeed
from lit_gptdata.windows.split import Split, check_fractions, scored_bytes, split_tokens


class NamedSource:
    """A source of the corpus, its store and its windows, which exist after `GPTDataModule.setup()`."""

    split = Split(train=(0, 0), val=(0, 0), test=(0, 0))
    is_open = False
    _store: TokenStore
    _cut: tuple[str, tuple[float, float]] | None = None  # fingerprint and fractions of `split`

    def __init__(self, owner: Sources, name: str, given: Source, *, only_val: bool = False) -> None:
        """`name`: "" for a corpus without a name. `only_val`: the whole source is its val set."""
        self._owner, self._sources = owner.owner, owner
        self.name, self.weight, self.only_val = name, given.weight, only_val
        self.hparams = given.given()
        options = {**owner.options, "corpus": given.path, **self.hparams}
        with naming(name):
            local = local_build(options, self._owner.tokenizer, self._owner.data_dir)
            self.text = choose_source(local, given.store_url, options["cache_gb"])
            _ = self.fractions  # checks them
        self.reading = local.reading
        if given.path is not None:
            self.hparams["path"] = local.name

    @property
    def store(self) -> TokenStore:
        """The token store; raises RuntimeError before `setup()`."""
        if not self.is_open:
            raise RuntimeError("the token store is not open yet: call prepare_data() and setup() first")
        return self._store

    @property
    def fractions(self) -> tuple[float, float]:
        """Of val and test."""
        names = ("val_fraction", "test_fraction")
        val, test = (self.hparams.get(name, getattr(self._owner, name)) for name in names)
        return check_fractions(val, test)

    def open(self, store: TokenStore, *, trains: bool) -> bool:
        """Cut a store into train, val and test; returns whether it or the fractions are new."""
        cut = store.fingerprint, self.fractions
        if cut == self._cut:
            return False
        if self.only_val:
            n = store.n_tokens
            split = Split(train=(0, 0), val=(0, n), test=(n, n))
        else:
            split = split_tokens(store, *self.fractions)
            if trains:
                text, owner = f"the train split of {redacted(repr(self.text.name))}", self._owner
                check_enough(split.train[1] - split.train[0], owner.max_length, text, owner.windows)
        self._store, self.split, self._cut, self.is_open = store, split, cut, True
        return True

    @property
    def train_windows(self) -> Windows:
        """Windows of `max_length` tokens: every `stride` tokens, or of documents."""
        return self._windows("train")

    @property
    def val_windows(self) -> Windows:
        """Windows that score every token once; of sliding ones, the last is padded or left out."""
        return self._windows("val")

    @property
    def test_windows(self) -> Windows:
        return self._windows("test")

    def _windows(self, split: str) -> Windows:
        owner, length = self._owner, self._owner.max_length
        options = {"kind": owner.eval_windows, "stride": length, "pad": not owner.drop_padded}
        if split == "train":
            options = {"kind": owner.windows, "stride": owner.stride}
        with naming(self.name):
            span = getattr(self.split, split)
            return self._sources.open_windows(self.store, span, max_length=length, **options)

    def scored_bytes(self, split: str, n: int, ordinary: int, special: int) -> int:
        """`windows.split.scored_bytes` of a split; says once why they are not known."""
        windows = self._windows(split)
        n_all = None if windows.kind == "sliding" else windows.n_targets
        n_bytes = scored_bytes(self.store, getattr(self.split, split), n, ordinary, special, n_all)
        if not n_bytes:
            reason = "the tokenizer changes the text, so the bytes of only a part of it are not known"
            warnings.warn(f"{split} bits per byte are not logged: {reason}", stacklevel=2)
        return n_bytes

    @property
    def identity(self) -> dict[str, Any]:
        """What determines the windows, in plain values."""
        val, test = (None, None) if self.store.manifest.cuts else self.fractions
        packs = self._owner.windows != "sliding" and self in self._sources.trained.values()
        return {
            "store": self.store.fingerprint, **asdict(self.reading), "val_fraction": val,
            "test_fraction": test, "corpus": self.text.name, "train_tokens": list(self.split.train),
        } | ({"n_windows": len(self.train_windows)} if packs else {})  # fmt: skip

    def __repr__(self) -> str:
        return f"NamedSource({self.name!r}, {redacted(repr(self.text.name))})"


class EvalSet(NamedTuple):
    """A set of val or test windows. `trains`: its source also trains, so it is part of the total."""

    name: str
    windows: Windows
    trains: bool


class Sources:
    """All sources of a data module: those of `corpus`, and those of `val_corpus`, which only score."""

    def __init__(self, options: dict[str, Any], owner: Any) -> None:
        """`options`: those of the data module `owner`, in plain values. Its lengths may change later."""
        self.options, self.owner = options, owner
        corpus, val_corpus = options["corpus"], options["val_corpus"]
        stages, store_url = options["stages"], options["store_url"]
        self.is_named = isinstance(corpus, Mapping) and not isinstance(corpus, Corpus)
        if self.is_named:  # the train windows are a `Mixture`
            given = read_sources("corpus", corpus)
            if store_url is not None:
                raise ValueError("store_url replaces a single corpus: in a mixture, give it to a source")
        else:
            given = {"": Source(path=corpus, store_url=store_url)}
            if stages is not None:
                raise ValueError("stages need named sources: corpus={name: path, …}")
        val_given = {} if val_corpus is None else read_sources("val_corpus", val_corpus)
        for name, source in val_given.items():
            no_use = ("weight", "val_fraction", "test_fraction")
            unused = [f"{key}={value}" for key, value in source.given().items() if key in no_use]
            if name in given or unused:
                problem = f"has {unused[0]}" if unused else "is in corpus, too"
                raise ValueError(f"val_corpus.{name} {problem}, but all of it is val: change this")
        self.stages = None if stages is None else read_stages(stages, given)
        self.batch_schedule, self.skip_steps = read_batch_schedule(options), read_skip_steps(options)
        self.sources = {n or "corpus": NamedSource(self, n, source) for n, source in given.items()}
        self.val_corpus = {
            n: NamedSource(self, n, source, only_val=True) for n, source in val_given.items()
        }
        self.all = [*self.sources.values(), *self.val_corpus.values()]
        self.first = self.all[0]
        if not any(self._weights[-1].values()):
            raise ValueError("the weights of all sources are 0: at least one source must train")
        self._mixture: tuple[Any, Mixture] | None = None
        self._indexes: dict[Any, WindowIndex] = {}
        self._check_windows()

    def _check_windows(self) -> None:
        """Raise ValueError for options that do not go together."""
        owner = self.owner
        if owner.drop_padded and owner.eval_windows != "sliding":
            problem = "drop_padded=True would leave out most val and test windows of documents"
            raise ValueError(f"{problem}: set eval_windows=sliding, or drop_padded=False")

    def open_windows(
        self, store: TokenStore, span: tuple[int, int], *, kind: WindowKind, max_length: int,
        stride: int, pad: bool = False,
    ) -> Windows:  # fmt: skip
        """The windows of the tokens [begin, end) of a store; `stride` and `pad` are for sliding ones."""
        begin, end = span
        if kind == "sliding" or begin == end:
            spans = {"begin": begin, "end": end, "max_length": max_length, "stride": stride}
            return Windows(store.tokens, **spans, pad=pad)
        eot = self.owner.tokenizer.end_of_document
        key = (store.fingerprint, begin, end, max_length, kind)
        if key not in self._indexes:
            folder = self.owner.data_dir / "windows"
            self._indexes[key] = open_index(store, begin, end, max_length, kind, folder)
        return PackedWindows(store.tokens, self._indexes[key], kind, eot, begin=begin, end=end)

    @property
    def hparams(self) -> dict[str, Any]:
        """The options in plain values, which a checkpoint can hold."""
        corpus = {name: source.hparams for name, source in self.sources.items()}
        val_corpus = {name: source.hparams for name, source in self.val_corpus.items()} or None
        tokenizer = self.owner.tokenizer
        return self.options | {
            "corpus": corpus if self.is_named else self.first.hparams.get("path"), "stages": self.stages,
            "val_corpus": val_corpus, "tokenizer": tokenizer.location, "bos": tokenizer.bos,
            "special_tokens": tokenizer.special_tokens, "end_of_document": tokenizer.own_end,
            "batch_schedule": self.batch_schedule, "skip_steps": self.skip_steps,
        }  # fmt: skip

    @property
    def only_store(self) -> TokenStore:
        """The store of the only source; raises RuntimeError before `open` or for several sources."""
        if len(self.sources) > 1:
            names = ", ".join(self.sources)
            raise RuntimeError(f"each source has its own store: use data.sources[name].store ({names})")
        return self.first.store

    @property
    def is_open(self) -> bool:
        return all(source.is_open for source in self.all)

    def prepare(self) -> Iterator[str]:
        """Build or find each store; yields warnings about special tokens and val."""
        tokenizer = self.owner.tokenizer
        if {self.owner.windows, self.owner.eval_windows} != {"sliding"}:
            with naming(self.first.name):
                _ = tokenizer.end_of_document  # raises ValueError if it has none
        if left_out := tokenizer.left_out:
            also = ", or set bos=True to have it" if tokenizer.begin in left_out else ""
            yield (
                f"{tokenizer!r} by itself adds {', '.join(left_out)} to each text, but these tokens do "
                f"not have it. Use no pretrained model that needs it{also}"
            )
        for source in self.all:
            with naming(source.name):
                store = source.text.prepare()
            if isinstance(source.text, LocalBuild) and not source.only_val:
                key = [source.text.name, tokenizer.fingerprint, *filter(None, [source.name])]
                key += source.fractions
                with suppress(ValueError):  # a split is too short; `setup` raises this on every rank
                    val = covered(store, *split_tokens(store, *source.fractions).val)
                    if changed := changed_val(source.text.root, key, val):
                        yield f"source {source.name}: {changed}" if source.name else changed

    def publish(self, url: Any) -> dict[str, str]:
        """Publish each store under `url`: name → URL. A published source of a mixture keeps its URL."""
        urls = {}
        for source in self.all:
            name, text = source.name, source.text
            is_kept = name and isinstance(text, PublishedStore) and local_path(text.name) is None
            with naming(name):
                urls[name or "corpus"] = str(text.name) if is_kept else text.publish(url)
        return urls

    def open(self, *, again: bool, shuffle: bool) -> Iterator[str]:
        """Open each store; yields warnings. `again`: texts may have changed since the last time."""
        self._check_windows()
        trained = self.trained.values()
        for source in self.all:
            reopen = again and isinstance(source.text, LocalBuild)
            with naming(source.name):
                store = source.store if source.is_open and not reopen else source.text.find()
                is_new = source.open(store, trains=source in trained)
            if is_new:
                self._mixture = None
                if source.split.val_sources and not source.name:
                    yield f"val covers only the end of the corpus: {source.split.val_sources}"
                if shuffle and (slow := shuffle_warning(source.store)):
                    yield f"source {source.name}: {slow}" if source.name else slow
        allow_open_files(sum(len(source.store.shards) for source in self.all))
        self._check_val_corpus()

    def _check_val_corpus(self) -> None:
        """Raise ValueError if a text of `val_corpus` is in a source that trains, by its contents."""
        trained: dict[str, tuple[str, str]] = {}
        for name, source in self.trained.items() if self.val_corpus else ():
            trained |= {entry.sha256: (name, entry.path) for entry in source.store.manifest.sources}
        for name, source in self.val_corpus.items():
            for entry in source.store.manifest.sources:
                if entry.sha256 in trained:
                    owner, path = trained[entry.sha256]
                    raise ValueError(
                        f"val_corpus.{name} ({redacted(repr(source.text.name))}) has a text on which "
                        f"the source {owner} trains, {redacted(path)}: leave it out of one of them"
                    )

    @property
    def fills(self) -> dict[str, float]:
        """The share of each source's train positions that is not padding."""
        return {name: 1.0 - source.train_windows.padding for name, source in self.trained.items()}

    @property
    def shares(self) -> list[dict[str, float]]:
        """The weights of each stage for windows; those that the user gives are for targets."""
        if self.stages is None and None in (source.weight for source in self.sources.values()):
            return self._weights
        fills = self.fills
        return [{n: w / fills.get(n, 1.0) for n, w in stage.items()} for stage in self._weights]

    @property
    def _weights(self) -> list[dict[str, float]]:
        """The weights of each stage. Without any, sources count by their size."""
        if self.stages is not None:
            return [stage["weights"] for stage in self.stages]
        weights = {name: source.weight for name, source in self.sources.items()}
        if None not in weights.values():
            return [weights]  # type: ignore[list-item]
        if not self.is_open:
            return [dict.fromkeys(weights, 1.0)]
        return [{name: float(len(source.train_windows)) for name, source in self.sources.items()}]

    @property
    def trained(self) -> dict[str, NamedSource]:
        """The sources that train, in at least one stage."""
        stages = self._weights
        return {n: source for n, source in self.sources.items() if any(weights[n] for weights in stages)}

    @property
    def n_train(self) -> int:
        """Train windows in an epoch."""
        return sum(len(source.train_windows) for source in self.trained.values())

    @property
    def stage_tokens(self) -> list[int]:
        """The lengths of all stages but the last one, which has no end."""
        return [stage["tokens"] for stage in (self.stages or [])[:-1]]

    def train_windows(self, seed: int | DrawnSeed | None) -> Windows:
        """The train windows, those of named sources as a `Mixture`, whose stages start at 0 for now."""
        if not self.is_named:
            return self.first.train_windows
        key = (seed, self.owner.max_length, self.owner.stride, self.owner.windows)
        if self._mixture is None or self._mixture[0] != key:
            trained = self.trained
            stages = [Stage(0, tuple(shares[name] for name in trained)) for shares in self.shares]
            windows = {name: source.train_windows for name, source in trained.items()}
            self._mixture = key, Mixture(windows, stages, seed=seed)
        return self._mixture[1]

    def eval_sets(self, split: str) -> list[EvalSet]:
        """The sets of "val" or "test" that have windows, those of the corpus first."""
        trained = self.trained.values()
        sets = [EvalSet(s.name, getattr(s, f"{split}_windows"), s in trained) for s in self.all]
        return [found for found in sets if len(found.windows)]

    def eval_windows(self, split: str) -> Windows:
        """All of these sets as one."""
        windows = [found.windows for found in self.eval_sets(split)]
        windows = windows or [getattr(self.first, f"{split}_windows")]
        return windows[0] if len(windows) == 1 else ChainedWindows(windows)

    def open_store(self, fingerprint: str, corpus: Any) -> TokenStore:
        """A store of this data, or of earlier data: in the same folder, or published at `corpus`."""
        for source in self.all:
            if source.store.fingerprint == fingerprint:
                return source.store
        if str(corpus).rstrip("/").endswith(fingerprint):
            local = local_build(self.options, self.owner.tokenizer, self.owner.data_dir)
            return choose_source(local, corpus, self.options["cache_gb"]).prepare()
        folder = self.owner.data_dir / "tokens" / fingerprint
        if not folder.is_dir():
            problem = f"the store of earlier data, {redacted(repr(corpus))}, is not in {folder} any more"
            raise FileNotFoundError(f"{problem}: set the data_dir of that run, or ask for later batches")
        return TokenStore(folder)

    def named(self, name: str) -> NamedSource:
        """The source of a set."""
        return next(source for source in self.all if source.name == name)

    def identity(self, windows: Windows) -> dict[str, Any]:
        """What determines the train windows except for their order, in plain values; see identity.py."""
        owner, tokenizer = self.owner, self.owner.tokenizer
        stride = owner.stride if owner.windows == "sliding" else None
        options = {"max_length": owner.max_length, "stride": stride, "windows": owner.windows}
        options |= {"tokenizer": tokenizer.name, "special_tokens": tokenizer.special_tokens}
        if not isinstance(windows, Mixture):
            return options | self.first.identity | {"val": self.first.split.val_sources}
        sources = {name: s.identity | {"weight": s.weight} for name, s in self.sources.items()}
        stages = [[s.begin, dict(zip(windows.sizes, s.weights, strict=True))] for s in windows.stages]
        mixed = {"stages": stages, "first_epoch": windows.first_epoch}
        return options | {"sources": sources, "stages": self.stages, "mixture": mixed}

    @property
    def batch_sizes(self) -> list[int]:
        """Windows per train batch of each rank, over the run."""
        return [part["batch_size"] for part in self.batch_schedule or []] or [self.owner.batch_size]
