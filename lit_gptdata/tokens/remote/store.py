"""Open a published store by its URL; shards are fetched into a cache when windows need them, or earlier.

    open_store("s3://bucket/tokens/1f2e…", cache).tokens[10:14]  ->  fetches one shard, [257, 11, …]

The manifest of each URL is in <cache>/.stores/<key>/manifest.json, so a store opens without a request.
"""

from __future__ import annotations

import functools
import hashlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from pathlib import Path
from typing import Any

import numpy as np

from lit_gptdata._fsspec import local_path
from lit_gptdata._io import write_whole
from lit_gptdata.tokens.manifest import FileEntry, Manifest, ShardEntry
from lit_gptdata.tokens.remote.cache import Cache
from lit_gptdata.tokens.remote.objects import Objects
from lit_gptdata.tokens.shards import Tokens, allow_open_files, writing
from lit_gptdata.tokens.store import TokenStore

FETCHES = 8  # shards that a process fetches at the same time
AHEAD_BATCHES = 256  # later batches whose shards may be fetched early
MAPS_AT_ONCE = 64  # before the maps of evicted shards are dropped; each map needs an open file
TOUCH_S = 5.0  # between two touches of a shard in use, which keep it from being evicted


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
        cache.check_room(max(self.files, key=lambda file: file.size))

    @property
    def location(self) -> str:
        return repr(self.source)

    @property
    def _remedy(self) -> str:
        return f"Delete the folder {self.path} and run again to fetch it"

    def _check_files(self) -> None:
        """Check nothing: the cache checks each file when it fetches and maps it."""

    def _read(self, file: FileEntry, dtype: np.dtype[Any]) -> np.ndarray:
        while (mapped := self.cache.map(file, dtype)) is None:  # it may be evicted at any time
            self.cache.fetch(file, self.source)
        self.cache.touch(file)
        return np.array(mapped[0])

    @functools.cached_property
    def tokens(self) -> RemoteTokens:
        shards = [shard for shard in self.shards if shard.n_tokens]
        return RemoteTokens(shards, self.dtype, self.cache, self.source)

    def verify(self) -> None:
        """Compare every SHA-256, in the cache or at the URL. Deletes damaged files from the cache."""
        bad = []
        for file in self.files:
            if self.cache.drop_if_damaged(file):
                self.tokens.drop_maps()
            if not self.cache.has(file):
                digest = hashlib.sha256()
                for block in self.source.blocks(file.name, file.size):
                    digest.update(block)
                if digest.hexdigest() != file.sha256:
                    bad.append(file.name)
        if bad:
            problem = f"is damaged: the contents of {', '.join(bad)} do not match the manifest"
            advice = "Delete these files and publish again: lit-gptdata publish URL"
            raise ValueError(f"the published store {self.location} {problem}. {advice}")


class RemoteTokens(Tokens):
    """The tokens of a published store; reading them fetches the missing shards into a cache.

    No shard is empty. A process keeps memory maps of the shards that it has read. When it maps another
    shard, it drops its maps of evicted shards. Until then, these take up disk space beyond the cache: at
    most the cache's bound per process, and usually none, because shards in use are evicted last.
    """

    def __init__(
        self, shards: list[ShardEntry], dtype: np.dtype[Any], cache: Cache, source: Objects
    ) -> None:
        super().__init__([np.empty(0, dtype)])
        self._shards, self._cache, self._source = shards, cache, source
        self._set_lengths([shard.n_tokens for shard in shards])
        self._touched_at = np.full(len(shards), -np.inf)  # monotonic seconds
        self._max_maps = allow_open_files(len(shards))
        self._reset_threads()
        self.drop_maps()

    def __reduce__(self) -> tuple[Any, ...]:
        return RemoteTokens, (self._shards, self.dtype, self._cache, self._source)

    def _reset_threads(self) -> None:
        """Create a new lock and Fetcher: a forked process must not reuse those of its parent."""
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._fetcher = Fetcher(self._cache, self._source)

    def drop_maps(self) -> None:
        """Unmap all shards; each one is mapped again when a window needs it."""
        with self._lock:
            self._set_maps({})

    def _set_maps(self, maps: dict[int, tuple[np.ndarray, int]]) -> None:
        """Keep maps and inodes, by the number of the shard, and join the maps: a batch is one gather."""
        self._maps = maps
        self._mapped = Tokens([array for array, _ in maps.values()])
        numbers = list(maps)
        self._is_mapped = np.zeros(len(self._shards), dtype=bool)
        self._is_mapped[numbers] = True
        # add this to the number of a token in the store to get its number in `_mapped`
        self._offsets = np.zeros(len(self._shards), dtype=np.int64)
        self._offsets[numbers] = self._mapped._begins - self._begins[numbers]

    def _part(self, shard: int, start: int, stop: int) -> np.ndarray:
        length = min(stop, self._shards[shard].n_tokens) - start
        ids: np.ndarray = self._gather(self._begins[[shard]] + start, np.array([shard]), length)[0]
        return ids

    def _reader(
        self, starts: np.ndarray, shards: np.ndarray, length: int
    ) -> Callable[[slice | np.ndarray], np.ndarray]:
        return lambda chosen: self._gather(starts[chosen], shards[chosen], length)

    def _gather(self, starts: np.ndarray, shards: np.ndarray, length: int) -> np.ndarray:
        """Read windows that each lie within one shard: (B,) → (B, length)."""
        if self._pid != os.getpid():
            self._reset_threads()
        with self._lock:
            self._touch(shards)
            if self._is_mapped[shards].all():
                return self._mapped.gather(starts + self._offsets[shards], length)
        ids = np.empty((len(starts), length), self.dtype)
        # the windows still to read; the cache need not hold all their shards at once
        rows = np.arange(len(starts))
        while True:
            with self._lock:
                is_mapped = self._is_mapped[shards[rows]]
                ready, rows = rows[is_mapped], rows[~is_mapped]
                ids[ready] = self._mapped.gather(starts[ready] + self._offsets[shards[ready]], length)
                missing = _distinct(shards[rows])
                if not missing:
                    return ids
                has_mapped = self._map(missing)
            if not has_mapped:
                self._fetcher.wait_for_one([self._shards[shard].ids for shard in missing])

    def _touch(self, shards: np.ndarray) -> None:
        """Mark shards as recently used, each at most once in TOUCH_S."""
        now = time.monotonic()
        for shard in _distinct(shards[self._touched_at[shards] < now - TOUCH_S]):
            self._cache.touch(self._shards[shard].ids)
            self._touched_at[shard] = now

    def _map(self, shards: list[int]) -> bool:
        """Map the shards that the cache has, and return whether it has any of them."""
        found = {s: self._cache.map(self._shards[s].ids, self.dtype) for s in shards[:MAPS_AT_ONCE]}
        new = {shard: entry for shard, entry in found.items() if entry is not None}
        if new:
            maps, cached = self._maps | new, self._cache.inodes()
            sha256s = {shard: self._shards[shard].ids.sha256 for shard in maps}
            kept = [s for s in maps if s in new or cached.get(sha256s[s]) == maps[s][1]]
            self._set_maps({shard: maps[shard] for shard in kept[-self._max_maps :]})
        return bool(new)

    def ahead(self, batches: Iterator[Any], plan: Iterator[np.ndarray], length: int) -> Iterator[Any]:
        """Yield `batches`, and fetch later shards early: at most FETCHES, and a quarter of the cache."""
        n_planned = 0
        queue: dict[int, int] = {}  # shard → the first batch that needs it
        started: dict[int, int] = {}  # the same for shards whose fetch has started
        for number, batch in enumerate(batches):
            queue = {shard: first for shard, first in queue.items() if first > number}
            started = {shard: first for shard, first in started.items() if first > number}
            while queue or n_planned <= number + AHEAD_BATCHES:
                if not queue:
                    if (starts := next(plan, None)) is None:
                        break
                    if n_planned > number:
                        missing = self._missing(starts, length)
                        queue = {shard: n_planned for shard in missing if shard not in started}
                    n_planned += 1
                    continue
                next_shard = next(iter(queue))
                files = [self._shards[shard].ids for shard in (*started, next_shard)]
                if not self._fetcher.fit_together(files):
                    break
                started[next_shard] = queue.pop(next_shard)
                self._fetcher.start(files[-1])
            yield batch

    def _missing(self, starts: np.ndarray, length: int) -> list[int]:
        """The shards that these windows need and the cache does not have, in the order of need."""
        edges = np.concatenate([starts, starts + length - 1])
        shards = np.searchsorted(self._ends, edges, side="right")
        shards = shards[shards < len(self._shards)]  # padding has none
        unmapped = _distinct(shards[~self._is_mapped[shards]])
        return [shard for shard in unmapped if not self._cache.has(self._shards[shard].ids)]


def _distinct(shards: np.ndarray) -> list[int]:
    """Each shard once, in the order of first use."""
    return list(dict.fromkeys(shards.tolist()))


class Fetcher:
    """Fetches files into a cache in background threads, each file once."""

    def __init__(self, cache: Cache, source: Objects) -> None:
        self._cache, self._source = cache, source
        self._lock = threading.Lock()
        self._slots = threading.Semaphore(FETCHES)
        self._fetches: dict[str, Future[None]] = {}

    def fit_together(self, files: list[FileEntry]) -> bool:
        """Whether to fetch these files at the same time: few, and small enough to evict little."""
        bound, size = self._cache.bound, sum(file.size for file in files)
        return len(files) <= FETCHES and (bound is None or 4 * size <= bound)

    def wait_for_one(self, files: list[FileEntry]) -> None:
        """Fetch the first few files and wait until one is complete; raises what `Cache.fetch` raises."""
        sizes = range(min(len(files), FETCHES), 0, -1)
        n = next(n for n in sizes if n == 1 or self.fit_together(files[:n]))
        for future in wait([self.start(file) for file in files[:n]], None, FIRST_COMPLETED).done:
            future.result()

    def start(self, file: FileEntry) -> Future[None]:
        """Start to fetch a file, unless a fetch of it is running."""
        self._source.open()
        with self._lock:
            future = self._fetches.get(file.sha256)
            if future is None or future.done():
                future = self._fetches[file.sha256] = Future()
                # daemon: the program may end without waiting for a shard that it no longer needs
                threading.Thread(target=self._run, args=(file, future), daemon=True).start()
        return future

    def _run(self, file: FileEntry, future: Future[None]) -> None:
        try:
            with self._slots:
                self._cache.fetch(file, self._source)
            future.set_result(None)
        except BaseException as error:
            future.set_exception(error)
