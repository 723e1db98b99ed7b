"""A published store opened by its URL: shards come into the cache when windows ask for them, or before.

    open_store("s3://bucket/tokens/1f2e…", cache).tokens[10:14]  ->  fetches one shard, [257, 11, …]

What is known of a URL lies in <cache>/.stores/<key>/manifest.json; everything else is fetched on need.
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

from lit_gptdata._fsspec import is_url
from lit_gptdata._io import write_whole
from lit_gptdata.tokens.manifest import FileEntry, Manifest
from lit_gptdata.tokens.remote.cache import Cache
from lit_gptdata.tokens.remote.objects import Objects
from lit_gptdata.tokens.shards import Tokens, allow_open_files, writing
from lit_gptdata.tokens.store import TokenStore

FETCHES = 8
"""Shards that a process fetches at a time."""

AHEAD_BATCHES = 256
"""Batches that are looked at for shards to fetch before their turn."""

TOUCH_S = 5.0
"""Seconds between two notes that a shard is in use."""


def prepare_store_at(url: str, cache: Cache) -> TokenStore:
    """Fetch what opening a published store needs, its manifest and vocabulary, and open it.

    A folder of this machine is opened where it is. Raises FileNotFoundError where nothing is
    published, ValueError for a manifest that is none, RemoteError if it cannot be had.
    """
    folder = _local(url)
    if folder is None:
        source = Objects(url)
        manifest = source.read("manifest.json")
        _checked(manifest, source)
        with writing(cache.folder):
            _known(url, cache).mkdir(parents=True, exist_ok=True)
            write_whole(_known(url, cache) / "manifest.json", manifest)
        remote = RemoteStore(source, cache)
        cache.fetch(remote.manifest.vocab, source)
        return remote
    if not (folder / "manifest.json").is_file():
        raise FileNotFoundError(
            f"store_url={url}: {folder.resolve()} is no published store, it has no manifest.json. Give "
            "what lit-gptdata publish has printed, or the folder data_dir/tokens/<fingerprint>"
        )
    return TokenStore(folder)


def open_store(url: str, cache: Cache) -> TokenStore | None:
    """A published store; None if `prepare_store_at` was not called for it on this machine."""
    if _local(url) is not None:
        return prepare_store_at(url, cache)
    known = _known(url, cache) / "manifest.json"
    return RemoteStore(Objects(url), cache) if known.is_file() else None


def _local(url: str) -> Path | None:
    """The folder that a URL names on this machine."""
    if not is_url(url):
        return Path(url).expanduser()
    return Path(url.removeprefix("file://")) if url.startswith("file://") else None


def _known(url: str, cache: Cache) -> Path:
    key = hashlib.sha256(url.rstrip("/").encode()).hexdigest()[:32]
    return cache.folder / ".stores" / key


def _checked(content: bytes, source: Objects) -> None:
    """Raise ValueError unless `content` is a manifest whose sizes agree with its counts."""
    try:
        manifest = Manifest.from_json(content)
        item = np.dtype(manifest.tokenizer.dtype).itemsize
        for shard in manifest.shards:
            if shard.ids.size != shard.n_tokens * item:
                raise ValueError(f"{shard.ids.name} has {shard.ids.size} bytes, {shard.n_tokens} tokens")
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{source!r}/manifest.json is not the manifest of a token store ({error}). Give the URL "
            "that lit-gptdata publish has printed"
        ) from None


class RemoteStore(TokenStore):
    """A TokenStore whose files are at a URL and come into a cache on need; opening fetches nothing."""

    def __init__(self, source: Objects, cache: Cache) -> None:
        self.source, self.cache = source, cache
        super().__init__(_known(source.url, cache))
        cache.check_room(max(self.files, key=lambda file: file.size))

    @property
    def location(self) -> str:
        """The URL."""
        return repr(self.source)

    @property
    def n_file_bytes(self) -> int:
        """What the cache would hold with all of the store in it."""
        return sum(file.size for file in self.files)

    @property
    def fits(self) -> bool:
        """Whether the cache can hold the whole store."""
        return self.cache.bound is None or self.n_file_bytes <= self.cache.bound

    def _check_files(self) -> None:
        """Sizes are looked at when files are."""

    def _read(self, file: FileEntry, dtype: np.dtype[Any]) -> np.ndarray:
        return np.frombuffer(bytearray(self.cache.read(file, self.source)), dtype=dtype)

    @functools.cached_property
    def tokens(self) -> Tokens:
        """All ids as one sequence, fetched when they are looked at."""
        shards = [(shard.ids, shard.n_tokens) for shard in self.shards if shard.n_tokens]
        return RemoteTokens(shards, self.dtype, self.cache, self.source)

    def verify(self) -> None:
        """Read every file, in the cache or else at the URL, and compare its SHA-256.

        A damaged one in the cache is removed, to be fetched again; raises ValueError that names those
        damaged at the URL.
        """
        bad = []
        for file in self.files:
            if self.cache.damaged(file):
                self.cache.drop(file)
            if not self.cache.holds(file):
                digest = hashlib.sha256()
                for block in self.source.blocks(file.name, file.size):
                    digest.update(block)
                bad += [file.name] * (digest.hexdigest() != file.sha256)
        if bad:
            raise ValueError(
                f"the published store {self.location} is damaged: the contents of {', '.join(bad)} do "
                "not match the manifest's SHA-256. Delete these there and publish the store again: "
                "lit-gptdata publish URL"
            )


class RemoteTokens(Tokens):
    """As Tokens, over shards that are fetched into a cache: those of a batch before it, in any case.

    `shards`: file and number of tokens of each, none empty.
    """

    def __init__(
        self,
        shards: list[tuple[FileEntry, int]],
        dtype: np.dtype[np.unsignedinteger],
        cache: Cache,
        source: Objects,
    ) -> None:
        super().__init__([np.empty(0, dtype)])
        self._shards, self._cache, self._source = shards, cache, source
        self._set_lengths([n for _, n in shards])
        self._used = np.full(len(shards), -np.inf)  # when this process last said so, monotonic seconds
        self._most_maps = allow_open_files(len(shards))
        self._word = b""
        self._begin_anew()
        self._forget()

    def __reduce__(self) -> tuple[Any, ...]:
        return RemoteTokens, (self._shards, self.dtype, self._cache, self._source)

    def _begin_anew(self) -> None:
        """What a forked process must not take over: threads, and locks that these may hold."""
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._fetcher = Fetcher(self._cache, self._source)

    def _forget(self) -> None:
        self._maps: dict[int, np.ndarray] = {}
        self._join()

    def _join(self) -> None:
        """Look at all maps as one sequence, so that a batch stays one gather."""
        numbers = list(self._maps)
        self._mapped = Tokens([self._maps[number] for number in numbers])
        self._here = np.zeros(len(self._shards), dtype=bool)
        self._here[numbers] = True
        self._shift = np.zeros(len(self._shards), dtype=np.int64)
        lengths = [self._shards[number][1] for number in numbers]
        self._shift[numbers] = np.cumsum(lengths) - lengths - self._begins[numbers]

    def _part(self, shard: int, start: int, stop: int) -> np.ndarray:
        stop = min(stop, self._shards[shard][1])
        begin = self._begins[shard] + start
        ids: np.ndarray = self._gathered(np.array([begin]), np.array([shard]), stop - start)[0]
        return ids

    def _reader(
        self, starts: np.ndarray, shards: np.ndarray, length: int
    ) -> Callable[[slice | np.ndarray], np.ndarray]:
        return lambda chosen: self._gathered(starts[chosen], shards[chosen], length)

    def _gathered(self, starts: np.ndarray, shards: np.ndarray, length: int) -> np.ndarray:
        """(B,) → (B, length), each within one shard; taken as their shards come in.

        No two shards have to be in the cache at once, so that any bound will do that holds one.
        """
        if self._pid != os.getpid():
            self._begin_anew()
        ids: np.ndarray | None = None
        todo = np.arange(len(starts))
        while True:
            with self._lock, self._cache.reading() as word:
                here = self._map(shards[todo], word)
                rows = todo[here]
                found = self._mapped.gather(starts[rows] + self._shift[shards[rows]], length)
            if len(rows) == len(starts):
                return found
            if ids is None:
                ids = np.empty((len(starts), length), self.dtype)
            ids[rows] = found
            todo = todo[~here]
            if not len(todo):
                return ids
            self._fetcher.need([self._shards[shard][0] for shard in _distinct(shards[todo])])

    def _map(self, shards: np.ndarray, word: bytes) -> np.ndarray:
        """Map what is in the cache of these; which are there, bool."""
        if word != self._word:
            self._forget()  # some of them may be gone
            self._word = word
        absent = _distinct(shards[~self._here[shards]])[: self._most_maps]
        maps = {number: self._cache.map(self._shards[number][0], self.dtype) for number in absent}
        found = {number: array for number, array in maps.items() if array is not None}
        if found:
            if len(self._maps) + len(found) > self._most_maps:
                self._maps = {}
            self._maps |= found
            self._join()
        now = time.monotonic()
        for number in _distinct(shards[self._used[shards] < now - TOUCH_S]):
            self._cache.touch(self._shards[number][0])
            self._used[number] = now
        here: np.ndarray = self._here[shards]
        return here

    def ahead(self, batches: Iterator[Any], plan: Iterator[np.ndarray], length: int) -> Iterator[Any]:
        """`batches` as they are; meanwhile the shards of the next ones are fetched, in their order.

        Shards on their way that no batch has asked for yet are few, and a quarter of the bound at most.
        """
        waiting: dict[int, int] = {}  # shard → number of the batch that needs it first
        begun: dict[int, int] = {}
        planned = 0
        for number, batch in enumerate(batches):
            for shards in (waiting, begun):
                while shards and next(iter(shards.values())) <= number:
                    del shards[next(iter(shards))]
            while True:
                if not waiting:
                    starts = next(plan, None) if planned <= number + AHEAD_BATCHES else None
                    if starts is None:
                        break
                    if planned > number:
                        waiting |= {s: planned for s in self._absent(starts, length) if s not in begun}
                    planned += 1
                    continue
                files = [self._shards[shard][0] for shard in (*begun, next(iter(waiting)))]
                if len(files) > FETCHES or not self._fetcher.has_room(files):
                    break
                shard = next(iter(waiting))
                begun[shard] = waiting.pop(shard)
                self._fetcher.begin(files[-1])
            yield batch

    def _absent(self, starts: np.ndarray, length: int) -> list[int]:
        """The shards that windows begin or end in and that are not in the cache, in order."""
        edges = np.concatenate([starts, starts + length - 1])
        shards = np.searchsorted(self._ends, edges, side="right")
        shards = shards[shards < len(self._shards)]  # fillers have none
        absent = _distinct(shards[~self._here[shards]])
        return [shard for shard in absent if not self._cache.holds(self._shards[shard][0])]


def _distinct(shards: np.ndarray) -> list[int]:
    """Each once, in the order of first need."""
    return list(dict.fromkeys(shards.tolist()))


class Fetcher:
    """Fetches files in threads, each file in one of them."""

    def __init__(self, cache: Cache, source: Objects) -> None:
        self._cache, self._source = cache, source
        self._lock = threading.Lock()
        self._slots = threading.Semaphore(FETCHES)
        self._flying: dict[str, Future[None]] = {}

    def has_room(self, files: list[FileEntry]) -> bool:
        """Whether these are a quarter of the bound at most, to push out little that is in use."""
        bound = self._cache.bound
        return bound is None or 4 * sum(file.size for file in files) <= bound

    def need(self, files: list[FileEntry]) -> None:
        """Wait until one of these files was fetched; raises what `Cache.fetch` raises."""
        n = 1
        while n < min(len(files), FETCHES) and self.has_room(files[: n + 1]):
            n += 1
        done, _ = wait([self.begin(file) for file in files[:n]], return_when=FIRST_COMPLETED)
        for future in done:
            future.result()

    def begin(self, file: FileEntry) -> Future[None]:
        """Fetch a file, if that was not begun."""
        self._source.open()
        with self._lock:
            future = self._flying.get(file.sha256)
            if future is None:
                future = self._flying[file.sha256] = Future()
                # daemon: an end of the program must not wait for a shard that nobody needs any more
                threading.Thread(target=self._run, args=(file, future), daemon=True).start()
        return future

    def _run(self, file: FileEntry, future: Future[None]) -> None:
        error: BaseException | None = None
        try:
            with self._slots:
                self._cache.fetch(file, self._source)
        except BaseException as caught:
            error = caught
        with self._lock:
            del self._flying[file.sha256]
        if error is None:
            future.set_result(None)
        else:
            future.set_exception(error)
