"""Open a published store by its URL; shards are fetched into a cache when windows need them, or earlier.

    open_store("s3://bucket/tokens/1f2e…", cache).tokens[10:14]  ->  fetches one shard, [257, 11, …]

The manifest of each URL is in <cache>/.stores/<key>/manifest.json, so a store opens without a request.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from lit_gptdata._fsspec import local_path
from lit_gptdata._io import write_whole
from lit_gptdata.text.remote_file import sha256_of
from lit_gptdata.tokens.manifest import FileEntry, Manifest, ShardEntry
from lit_gptdata.tokens.remote.cache import Cache
from lit_gptdata.tokens.remote.objects import Objects
from lit_gptdata.tokens.shards import Tokens, writing
from lit_gptdata.tokens.store import TokenStore

FETCHES = 8  # shards that a process fetches at the same time
MAPS = 256  # shards that a process keeps mapped, each of which is an open file
AHEAD_BATCHES = 256  # later batches whose shards may be fetched early


def prepare_store_at(url: str, cache: Cache) -> TokenStore:
    """Open a published store after fetching its manifest and vocabulary; open a local folder in place.

    Raises FileNotFoundError if the URL has no store, ValueError for an invalid manifest, RemoteError.
    """
    if (path := local_path(url)) is None:
        source = Objects(url)
        manifest = source.read("manifest.json")
        read_manifest(manifest, source)
        with writing(cache.folder):
            _manifest_folder(url, cache).mkdir(parents=True, exist_ok=True)
            write_whole(_manifest_folder(url, cache) / "manifest.json", manifest)
        remote = RemoteStore(source, cache)
        cache.fetch(remote.manifest.vocab, source)
        return remote
    folder = Path(path)
    if not (folder / "manifest.json").is_file():
        problem = f"{folder.resolve()} is not a published store, it has no manifest.json"
        advice = "Give the URL that lit-gptdata publish printed, or data_dir/tokens/<fingerprint>"
        raise FileNotFoundError(f"store_url={url}: {problem}. {advice}")
    return TokenStore(folder)


def open_store(url: str, cache: Cache) -> TokenStore | None:
    """Open a published store; None if `prepare_store_at` was not called for it on this machine."""
    if local_path(url) is not None:
        return prepare_store_at(url, cache)
    manifest = _manifest_folder(url, cache) / "manifest.json"
    return RemoteStore(Objects(url), cache) if manifest.is_file() else None


def _manifest_folder(url: str, cache: Cache) -> Path:
    key = hashlib.sha256(url.rstrip("/").encode()).hexdigest()[:32]
    return cache.folder / ".stores" / key


def read_manifest(content: bytes, source: Objects) -> Manifest:
    """The manifest of the store at `source`; raises ValueError that names it."""
    try:
        return Manifest.from_json(content)
    except ValueError as error:
        problem = f"{source!r}/manifest.json is not the manifest of a token store ({error})"
        advice = "Give the URL that lit-gptdata publish printed, or delete that file and publish again"
        raise ValueError(f"{problem}. {advice}") from None


class RemoteStore(TokenStore):
    """A TokenStore at a URL whose files are fetched into a cache when needed, not when it opens."""

    def __init__(self, source: Objects, cache: Cache) -> None:
        self.source, self.cache = source, cache
        super().__init__(_manifest_folder(source.url, cache))
        file = max(self.files, key=lambda file: file.size)
        if cache.bound is not None and file.size > cache.bound:
            problem = f"is too small: {file.name} alone has {file.size:,} bytes"
            advice = f"Set cache_gb >= {file.size / 1e9:g}, better the size of the store"
            raise ValueError(f"cache_gb={cache.bound / 1e9:g} {problem}. {advice}")

    @property
    def location(self) -> str:
        return repr(self.source)

    @property
    def _remedy(self) -> str:
        advice = "delete its damaged files and publish again: lit-gptdata publish URL"
        return f"Delete the folder {self.path} and run again to fetch it, or {advice}"

    def _check_files(self) -> None:
        """Check nothing: the cache checks each file when it fetches and opens it."""

    def _read(self, file: FileEntry, dtype: np.dtype[Any]) -> np.ndarray:
        while (opened := self.cache.open(file)) is None:  # it may be evicted at any time
            self.cache.fetch(file, self.source)
        with opened:
            return np.fromfile(opened, dtype)

    @functools.cached_property
    def tokens(self) -> RemoteTokens:
        shards = [shard for shard in self.shards if shard.n_tokens]
        return RemoteTokens(shards, self.dtype, self.cache, self.source)

    def _sha256(self, file: FileEntry) -> str:
        """Of the file in the cache or at the URL; deletes a damaged one from the cache."""
        cached = self.cache.path(file)
        with contextlib.suppress(FileNotFoundError):  # not fetched, or evicted by another process
            if sha256_of(cached) == file.sha256:
                return file.sha256
            cached.unlink()
        digest = hashlib.sha256()
        for block in self.source.blocks(file.name, file.size):
            digest.update(block)
        return digest.hexdigest()


class RemoteTokens(Tokens):
    """The tokens of a published store; reading them fetches the missing shards into a cache.

    No shard is empty. An evicted shard that this process has mapped takes space until the next fetch.
    """

    read_at_once = 1  # the first batch must not wait for the shards of later ones

    def __init__(
        self, shards: list[ShardEntry], dtype: np.dtype[Any], cache: Cache, source: Objects
    ) -> None:
        super().__init__([np.empty(0, dtype)])
        self._shards, self._cache, self._source = shards, cache, source
        self._set_lengths([shard.n_tokens for shard in shards])
        # with the process, because a forked process does not have the threads of its parent
        self._fetching: set[tuple[int, str]] = set()
        self._maps: dict[int, tuple[int, np.ndarray]] = {}  # shard → (inode of its file, its ids)

    def __reduce__(self) -> tuple[Any, ...]:
        return RemoteTokens, (self._shards, self.dtype, self._cache, self._source)

    def _part(self, shard: int, start: int, stop: int) -> np.ndarray:
        length = min(stop, self._shards[shard].n_tokens) - start
        return self._read_ranges(self._begins[[shard]] + start, np.array([length]), np.array([shard]))

    def _reader(
        self, starts: np.ndarray, shards: np.ndarray, length: int
    ) -> Callable[[slice | np.ndarray], np.ndarray]:
        def read(chosen: slice | np.ndarray) -> np.ndarray:
            lengths = np.full(len(starts[chosen]), length)
            return self._read_ranges(starts[chosen], lengths, shards[chosen]).reshape(-1, length)

        return read

    def _read_ranges(self, starts: np.ndarray, lengths: np.ndarray, shards: np.ndarray) -> np.ndarray:
        ends = np.cumsum(lengths)
        ids = np.empty(int(lengths.sum()), self.dtype)
        begins, offsets = (ends - lengths).tolist(), (starts - self._begins[shards]).tolist()
        sizes: list[int] = lengths.tolist()
        missing = _distinct(shards)
        while missing:  # the cache need not hold all these shards at once
            for shard in missing.copy():
                if (mapped := self._map(shard)) is not None:
                    for row in np.flatnonzero(shards == shard).tolist():
                        begin, offset, size = begins[row], offsets[row], sizes[row]
                        ids[begin : begin + size] = mapped[offset : offset + size]
                    missing.remove(shard)
            if files := [self._shards[shard].ids for shard in missing]:
                for file in files[1 : self._n_at_once(files)]:
                    self._start_fetch(file)
                self._unmap_evicted()
                self._cache.fetch(files[0], self._source)
        return ids

    def _map(self, shard: int) -> np.ndarray | None:
        """Map a cached shard, marked as recently used; None if the cache does not have it."""
        file = self._shards[shard].ids
        if shard in self._maps:
            inode, ids = self._maps[shard]
            if inode == self._cache.touch(file):
                return ids
            del self._maps[shard]  # evicted, or fetched again
        if (opened := self._cache.open(file)) is None:
            return None
        if len(self._maps) >= MAPS:
            self._maps.clear()
        with opened:
            ids = np.memmap(opened, self.dtype, "r")
            self._maps[shard] = os.fstat(opened.fileno()).st_ino, ids
        return ids

    def ahead(self, batches: Iterator[Any], plan: Iterator[np.ndarray]) -> Iterator[Any]:
        """Yield `batches`, and fetch later shards early: at most FETCHES, and a quarter of the cache."""
        planned = enumerate(plan)
        queue: deque[tuple[int, int]] = deque()  # (a planned batch, a shard that it needs)
        started: dict[int, int] = {}  # shard that is fetched early → the first batch that needs it
        for number, batch in enumerate(batches):
            started = {shard: first for shard, first in started.items() if first > number}
            n_new = 1 if number else AHEAD_BATCHES + 1
            for first, tokens in itertools.islice(planned, n_new):
                queue += [(first, shard) for shard in self._shards_of(tokens)]
            while queue:
                first, shard = queue[0]
                file = self._shards[shard].ids
                if first > number and shard not in started and not self._cache.has(file):
                    files = [self._shards[other].ids for other in (*started, shard)]
                    if self._n_at_once(files) < len(files):
                        break
                    started[shard] = first
                    self._start_fetch(file)
                queue.popleft()
            yield batch

    def _shards_of(self, tokens: np.ndarray) -> list[int]:
        """The shards that these tokens need, in the order of need."""
        shards = np.searchsorted(self._ends, tokens, side="right")
        return _distinct(shards[shards < len(self._shards)])  # padding has none

    def _n_at_once(self, files: list[FileEntry]) -> int:
        """How many of these files to fetch at once: few, and small enough to evict little."""
        bound = self._cache.bound
        sizes = itertools.accumulate(file.size for file in files[:FETCHES])
        return sum(bound is None or 4 * size <= bound for size in sizes)

    def _unmap_evicted(self) -> None:
        for shard in [s for s in self._maps if not self._cache.has(self._shards[s].ids)]:
            del self._maps[shard]

    def _start_fetch(self, file: FileEntry) -> None:
        """Fetch a file in a thread, unless a thread of this process fetches it now."""
        self._source.open()
        self._unmap_evicted()
        if (key := (os.getpid(), file.sha256)) not in self._fetching:
            self._fetching.add(key)
            # daemon: the program may end without waiting for a shard that it no longer needs
            threading.Thread(target=self._fetch, args=(key, file), daemon=True).start()

    def _fetch(self, key: tuple[int, str], file: FileEntry) -> None:
        with contextlib.suppress(Exception):  # the thread that needs the file raises the error
            self._cache.fetch(file, self._source)
        self._fetching.discard(key)


def _distinct(shards: np.ndarray) -> list[int]:
    """Each shard once, in the order of first use."""
    return list(dict.fromkeys(shards.tolist()))
