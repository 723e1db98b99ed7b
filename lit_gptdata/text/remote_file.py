"""A file at a URL, read by ranges in bounded memory and never copied whole; or one on disk.

with open_raw(file, start=1 << 20) as raw: raw.read(4096)  # a Path or a RemoteFile
"""

from __future__ import annotations

import datetime
import functools
import hashlib
import io
import os
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from lit_gptdata._fsspec import (
    RemoteError,
    RemoteNotFoundError,
    filesystem,
    redact,
    retry,
)
from lit_gptdata._io import sha256_file

FIRST_BYTES = 1 << 18
"""Fetched where reading begins; then twice as much each time, as long as it goes on in order."""

MOST_BYTES = 1 << 23
"""Fetched at a time; an open file holds as much, and as much again is on its way."""

AT_ONCE = 16
"""Requests under way where each is short and waits for the network."""

VERSIONS = (
    "ETag", "etag", "generation", "blob_id", "sha", "mtime", "LastModified", "last_modified",
    "Last-Modified", "modificationTime", "modify", "created",
)  # fmt: skip
"""What file systems call that which changes with a file's contents; the first that is there counts."""

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True, kw_only=True, repr=False)
class RemoteFile:
    """A file at a URL as it was when it was listed."""

    url: str
    """As fsspec opens it: it may hold a secret, which `str(file)` leaves out."""

    size: int
    """Bytes."""

    version: str
    """Changes with the contents: an ETag, a generation, a time."""

    @classmethod
    def of(cls, url: str, info: dict[str, Any]) -> RemoteFile:
        """From what a listing of fsspec says of it; raises RemoteError where that is too little."""
        size = info.get("size")
        if size is None or info.get("partial") is False:
            raise RemoteError(
                f"{redact(url)} cannot be read in pieces: its server tells no size, or gives no ranges. "
                "Download it, and name the file"
            )
        version = next((info[key] for key in VERSIONS if info.get(key)), None)
        if isinstance(version, datetime.datetime):  # else it would change with the time zone
            version = version.timestamp()
        if version is None:  # what else there is, hashed: it may hold a secret
            rest = sorted((key, info[key]) for key in info if key not in ("name", "url"))
            version = hashlib.sha256(repr(rest).encode()).hexdigest()[:16]
        return cls(url=url, size=size, version=str(version))

    def __str__(self) -> str:
        return redact(self.url)

    __repr__ = __str__

    @property
    def name(self) -> str:
        """The last part of the path."""
        return redact(self.url).removesuffix("?…").rpartition("/")[2]

    @property
    def label(self) -> str:
        """The URL without secrets; where one is left out, a hash tells it from others."""
        if str(self) == self.url:
            return self.url
        return f"{self}#{hashlib.sha256(self.url.encode()).hexdigest()[:8]}"

    def open(self, start: int = 0, stop: int | None = None) -> RemoteReader:
        """Its bytes from `start` on; nothing is fetched at or after `stop`."""
        return RemoteReader(self, start, self.size if stop is None else stop)

    def fetch(self, start: int, stop: int) -> bytes:
        """Bytes from `start` on: `stop - start` of them, or fewer where the connection breaks.

        Raises RemoteError.
        """

        def attempt(failures: int) -> bytes:
            fs, path = filesystem(self.url)
            # where a connection always breaks after so many bytes, fewer come through
            end = min(stop, start + max(FIRST_BYTES, (stop - start) >> failures))
            data = self._range(fs, path, start, end)
            if len(data) != end - start:
                raise OSError(f"{len(data):,} bytes came from byte {start:,} on, not {end - start:,}")
            return data

        try:
            return retry(self.url, attempt)
        except RemoteNotFoundError:
            raise gone(self) from None
        except RemoteError:
            if not self._is_same():
                raise RemoteError(f"{self} changed while it was read: run again") from None
            raise

    def _range(self, fs: Any, path: str, start: int, end: int) -> bytes:
        data: bytes
        if self.url.startswith(("http://", "https://")):
            # cat_file would hold all that comes, and a server without ranges sends the whole
            with fs.open(path, size=self.size, cache_type="none") as raw:
                raw.seek(start)
                data = raw.read(end - start)
        else:
            data = fs.cat_file(path, start=start, end=end)
        return data

    def _is_same(self) -> bool:
        fs, path = filesystem(self.url)
        fs.invalidate_cache()
        try:
            return self.of(self.url, fs.info(path)) == self
        except Exception:  # it cannot be told
            return True


class RemoteReader(io.RawIOBase):
    """A remote file's bytes; while they are read in order, the next are on their way."""

    def __init__(self, file: RemoteFile, start: int, stop: int) -> None:
        self._file, self._at, self._stop = file, start, stop
        self._begin, self._held, self._ahead = start, b"", FIRST_BYTES
        self._next: tuple[int, Future[bytes]] | None = None

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._file.size}[whence]
        self._at = base + offset
        return self._at

    def readinto(self, buffer: Any) -> int:
        """Fill all of `buffer`, unless the end comes before."""
        view, done = memoryview(buffer).cast("B"), 0
        while done < len(view) and self._at < self._stop:
            if not self._begin <= self._at < self._begin + len(self._held):
                self._move_on()
            skip = self._at - self._begin
            some = self._held[skip : skip + len(view) - done]
            view[done : done + len(some)] = some
            done += len(some)
            self._at += len(some)
        return done

    def _move_on(self) -> None:
        """Hold the bytes from the place that is read, and ask for those after them."""
        goes_on = bool(self._held) and self._at == self._begin + len(self._held)
        if not goes_on:
            self._ahead = FIRST_BYTES
        self._begin, self._held = self._at, b""  # room for the next
        if self._next is not None and self._next[0] == self._at:
            self._held = self._next[1].result()
        else:
            self._held = self._file.fetch(*self._span(self._at))
        if len(self._held) < self._ahead:  # no more came through, or it is the end
            self._ahead = len(self._held)
        end = self._at + len(self._held)
        self._ahead = min(2 * self._ahead, MOST_BYTES)
        self._next = None
        if goes_on and end < self._stop:
            self._next = end, _others().submit(self._file.fetch, *self._span(end))

    def _span(self, start: int) -> tuple[int, int]:
        return start, min(start + self._ahead, self._stop)


@functools.cache
def _others() -> ThreadPoolExecutor:
    """The threads that fetch what will be read next; they wait for no other."""
    return ThreadPoolExecutor(AT_ONCE)


TextFile = Path | RemoteFile


def gone(file: RemoteFile) -> RemoteNotFoundError:
    """The error about a file that was listed, and is there no more."""
    return RemoteNotFoundError(f"{file} is gone: it was there when the corpus was listed. Run again")


def size_of(file: TextFile) -> int:
    """Bytes; of a remote file, when it was listed."""
    return file.size if isinstance(file, RemoteFile) else file.stat().st_size


def open_raw(file: TextFile, start: int = 0, stop: int | None = None) -> io.RawIOBase:
    """The file's bytes as they are stored, from `start` on."""
    if isinstance(file, RemoteFile):
        return file.open(start, stop)
    raw = open(file, "rb", buffering=0)  # noqa: SIM115 (the caller closes it)
    raw.seek(start)
    return raw


def sha256_of(file: TextFile, on_bytes: Callable[[int], object] = lambda _: None) -> str:
    """SHA-256 (hex) of a file's bytes, in constant memory."""
    if isinstance(file, Path):
        return sha256_file(file, on_bytes)
    digest = hashlib.sha256()
    with file.open() as raw:
        while data := raw.read(1 << 20):
            digest.update(data)
            on_bytes(len(data))
    return digest.hexdigest()


def map_in_threads(function: Callable[[T], R], items: Iterable[T], n: int = AT_ONCE) -> list[R]:
    """`function` of each, `n` at a time: for what waits for the network."""
    with ThreadPoolExecutor(n) as pool:
        return list(pool.map(function, items))
