"""Where the tokens of a run come from: text that is tokenized here, or a store that was published.

LocalBuild      text  ──download, tokenize──▶  <data_dir>/tokens/<fingerprint>
PublishedStore  URL   ──fetch on demand─────▶  <data_dir>/cache

Both have the same methods. `prepare()` runs once per machine, then `find()` runs in every process.
"""

import functools
import logging
import math
import os
import re
from dataclasses import dataclass, field
from pathlib import Path

from lit_gptdata._checks import check_number, hydra_quotes, plain
from lit_gptdata._fsspec import local_path, redacted
from lit_gptdata._io import working_folder
from lit_gptdata.text.corpus import CorpusLike, corpus_names, open_corpus
from lit_gptdata.text.document import Corpus
from lit_gptdata.text.files import flatten, printable
from lit_gptdata.text.formats import Reading
from lit_gptdata.tokens.build.local import find_store, prepare_store
from lit_gptdata.tokens.build.plan import BuildOptions
from lit_gptdata.tokens.libraries.reference import END_OF_TEXT
from lit_gptdata.tokens.remote.cache import Cache
from lit_gptdata.tokens.remote.objects import check_url
from lit_gptdata.tokens.remote.publish import publish, publish_text
from lit_gptdata.tokens.remote.store import RemoteStore, open_store, prepare_store_at
from lit_gptdata.tokens.store import TokenStore
from lit_gptdata.tokens.tokenizer import Tokenizer

log_once = functools.cache(logging.getLogger(__name__).warning)


@dataclass(frozen=True)
class LocalBuild:
    """A store under `data_dir` that is built from a corpus. `stream`: keep no copy of http(s) texts.

    `folder`: where relative paths of the corpus start, by default the folder at construction.
    """

    corpus: CorpusLike
    tokenizer: Tokenizer
    data_dir: Path
    reading: Reading
    stream: bool
    options: BuildOptions
    folder: Path = field(default_factory=working_folder)

    @property
    def name(self) -> str | list[str]:
        """The corpus as the user named it, in strings, which a checkpoint can hold."""
        if hasattr(type(self.corpus), "fingerprint"):  # a Corpus, which may be a sequence, too
            return repr(self.corpus)
        entries = list(flatten(self.corpus))
        names = [
            printable(os.fspath(entry)) if isinstance(entry, (str, os.PathLike)) else repr(entry)
            for entry in entries
        ]
        is_single = isinstance(self.corpus, str) or (len(entries) == 1 and entries[0] is self.corpus)
        return names[0] if is_single else names

    def prepare(self) -> TokenStore:
        """Download and tokenize the corpus, unless its store exists already."""
        return prepare_store(self._open(download=True), self.tokenizer, self.root, self.options)

    def find(self) -> TokenStore:
        """Open the store. Raises RuntimeError if `prepare()` has not built it."""
        store = find_store(self._open(download=False), self.tokenizer, self.root, self.options)
        if store is None:
            raise RuntimeError(
                f"{redacted(repr(self.name))} is not tokenized yet under {self.root}, or has changed "
                "since then: call prepare_data() first; a Trainer does so"
            )
        return store

    def publish(self, url: str | os.PathLike[str]) -> str:
        """Upload the store to `url`/<fingerprint>, or build it there without local disk."""
        corpus = self._open(download=True)
        store = find_store(corpus, self.tokenizer, self.root, self.options)
        if store is not None:
            return publish(store, url)
        return publish_text(corpus, self.tokenizer, url, self.options)

    @property
    def root(self) -> Path:
        """The folder of the stores."""
        return self.data_dir / "tokens"

    def _open(self, download: bool) -> Corpus:
        own = (os.path.realpath(self.data_dir / name) for name in ("tokens", "downloads", "cache"))
        return open_corpus(
            self.corpus, downloads=self.data_dir / "downloads", download=download, stream=self.stream,
            reading=self.reading, folder=self.folder, not_searched=frozenset(own),
            keep_empty=self.options.on_bad_document == "skip",
        )  # fmt: skip


@dataclass(frozen=True)
class PublishedStore:
    """A store at a URL, or in a folder, whose files are fetched into a cache under `data_dir`.

    `name`: the URL or folder. `cache_bytes`: None: no limit. `folder`: where a relative name starts, by
    default the folder at construction. Raises ValueError for a URL with a secret.
    """

    name: str
    tokenizer: Tokenizer
    data_dir: Path
    cache_bytes: int | None
    folder: Path = field(default_factory=working_folder)

    def __post_init__(self) -> None:
        check_url(self.name)

    def prepare(self) -> TokenStore:
        """Fetch the manifest and the vocabulary, which is all that opening the store needs."""
        store = prepare_store_at(self._url, self._cache)
        self._check_tokenizer(store)
        if store.manifest.cuts:
            problem = "has its own split: val_fraction and test_fraction are ignored"
            log_once(f"the store {store.location} {problem}")
        return store

    def find(self) -> TokenStore:
        """Open the store. Raises RuntimeError if `prepare()` has not run on this machine."""
        store = open_store(self._url, self._cache)
        if store is None:
            problem = f"{self.name} was not opened on this machine yet, under {self._cache.folder}"
            raise RuntimeError(f"the store at {problem}: call prepare_data() first; a Trainer does so")
        self._check_tokenizer(store)
        return store

    def publish(self, url: str | os.PathLike[str]) -> str:
        """Upload the store of a folder of this machine."""
        return publish(self.prepare(), url)

    @property
    def _url(self) -> str:
        path = local_path(self.name)
        return self.name if path is None else str(self.folder / path)

    @property
    def _cache(self) -> Cache:
        return Cache(self.data_dir / "cache", self.cache_bytes)

    def _check_tokenizer(self, store: TokenStore) -> None:
        theirs, ours = store.manifest.tokenizer, self.tokenizer
        if theirs.fingerprint != ours.fingerprint:
            inserted = " and ".join(theirs.separators or [END_OF_TEXT])
            made = f"tokenizer={theirs.name!r}, special_tokens={theirs.special_tokens!r} and {inserted}"
            # two tokenizers may have the same name
            raise ValueError(
                f"the store {store.location} was made with {made} between documents "
                f"({theirs.fingerprint[:8]}). This run has {ours!r} ({ours.fingerprint[:8]}). Set the "
                "store's values"
            )


def choose_source(
    local: LocalBuild, store_url: str | os.PathLike[str] | None, cache_gb: float | None
) -> LocalBuild | PublishedStore:
    """The store at `store_url` if it is given, else the local build; checks `cache_gb`."""
    limit = None
    if cache_gb is not None and cache_gb != math.inf:
        limit = int(1e9 * check_number("cache_gb", cache_gb, 1e12, "10^9 bytes; None: no limit"))
        if not limit:
            raise ValueError(f"cache_gb must be positive, or None for no limit, got {cache_gb!r}")
    if store_url is None:
        if not hasattr(type(local.corpus), "fingerprint"):
            corpus_names(local.corpus)  # checks them
        return local
    if not isinstance(store_url, (str, os.PathLike)) or not plain(store_url):
        raise TypeError(f"store_url must be a URL or a folder of a published store, got {store_url!r}")
    return PublishedStore(plain(store_url), local.tokenizer, local.data_dir, limit)


def local_folder(data_dir: str | os.PathLike[str]) -> Path:
    """The absolute path of `data_dir`; later changes of the current folder do not move it."""
    folder = plain(data_dir)
    if not isinstance(folder, str) or re.match(r"$|\w\w+:/|~[^/]|.*\0", folder):
        raise ValueError(
            f"data_dir must be a folder on this machine, got {data_dir!r}. For a published store at a "
            f"URL set store_url, and for texts at a URL set corpus{hydra_quotes('data_dir', data_dir)}"
        )
    return working_folder() / Path(folder).expanduser()


def shuffle_warning(store: TokenStore) -> str | None:
    """A warning if shuffled windows of this store are slow, because its cache is smaller than it."""
    bound = store.cache.bound if isinstance(store, RemoteStore) else None
    size = sum(file.size for file in store.files)
    if bound is None or size <= bound:
        return None
    gb = f"{size / 1e9:.3g}"
    problem = f"the store has {gb} GB, but its cache holds at most {bound / 1e9:g}"
    advice = f"Set cache_gb >= {gb}, or shuffle=False"
    return f"{problem}. Shuffled batches are slow, because they fetch shards again and again. {advice}"
