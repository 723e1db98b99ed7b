"""Read files at URLs by byte ranges in bounded memory, and files on disk through the same functions.

with open_raw(file, start=1 << 20) as raw: raw.read(4096)  # file: a Path or a RemoteFile
"""

from __future__ import annotations

import datetime
import hashlib
import io
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from lit_gptdata._fsspec import RemoteError, RemoteNotFoundError, filesystem, redact, retry

BLOCK_BYTES = 4 << 20  # of a request: an open file holds one such block
THREADS = 16  # requests at the same time, where each one is short and waits for the network
# Metadata keys that identify a file's version; the first one present is used.
VERSION_KEYS = (
    "ETag", "etag", "generation", "blob_id", "sha", "mtime", "LastModified", "last_modified",
    "Last-Modified", "modificationTime", "modify", "created",
)  # fmt: skip

OnBytes = Callable[[int], object]  # called with the length of each read
T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True, kw_only=True, repr=False)
class RemoteFile:
    """A file at a URL, in the version that was listed."""

    url: str
    """For fsspec. It may contain secrets, so messages use `str(file)`."""
    size: int
    """Bytes."""
    version: str
    """Changes with the contents: an ETag, a generation, a time; "" if the server tells none."""

    @classmethod
    def from_info(cls, url: str, info: dict[str, Any]) -> RemoteFile:
        """The file that a listing of fsspec describes; raises RemoteError if ranges cannot be read."""
        size = info.get("size")
        if size is None or info.get("partial") is False:
            advice = "Name each file, without stream=true, so that it is downloaded"
            raise RemoteError(f"{redact(url)}: its server reports no size or no ranges. {advice}")
        version = next((info[key] for key in VERSION_KEYS if info.get(key)), "")
        if isinstance(version, datetime.datetime):  # its text would depend on the time zone
            version = version.timestamp()
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
        """The URL without secrets, plus a hash if secrets were removed, so that labels stay unique."""
        key = hashlib.sha256(self.url.encode()).hexdigest()[:8]
        return self.url if str(self) == self.url else f"{self}#{key}"

    def removed_error(self) -> RemoteNotFoundError:
        """The error if the file disappeared after it was listed."""
        return RemoteNotFoundError(f"{self} is gone: it was there when the corpus was listed. Run again")


def fetch_range(url: str, size: int, start: int, stop: int) -> bytes:
    """The bytes [start, stop) of a file of `size` bytes; raises RemoteError."""

    def attempt() -> bytes:
        fs, path = filesystem(url)
        if url.startswith(("http://", "https://")):
            # cat_file would read the whole file into memory if a server ignores the range
            with fs.open(path, size=size, cache_type="none") as raw:
                raw.seek(start)
                data = raw.read(stop - start)
        else:
            data = fs.cat_file(path, start=start, end=stop)
        if len(data) != stop - start:
            problem = f"got {len(data):,} bytes from byte {start:,}, expected {stop - start:,}"
            raise OSError(f"{problem}: the response was cut short, or the file changed")
        return bytes(data)

    return retry(url, attempt)


class RemoteReader(io.RawIOBase):
    """The bytes of a remote file up to `stop`; each read is one request."""

    def __init__(self, file: RemoteFile, start: int, stop: int) -> None:
        self._file, self._position, self._stop = file, start, stop

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._file.size}[whence]
        self._position = base + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        file, end = self._file, min(self._position + len(buffer), self._stop)
        if self._position >= end:
            return 0
        try:
            data = fetch_range(file.url, file.size, self._position, end)
        except RemoteNotFoundError:
            raise file.removed_error() from None
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)


TextFile = Path | RemoteFile


def size_of(file: TextFile) -> int:
    """The file's size in bytes; a remote file's size is from its listing."""
    return file.size if isinstance(file, RemoteFile) else file.stat().st_size


def open_raw(file: TextFile, start: int = 0, stop: int | None = None) -> io.BufferedReader:
    """A reader of the stored bytes from `start`; a remote file is fetched up to `stop` only."""
    if isinstance(file, RemoteFile):
        reader = RemoteReader(file, start, file.size if stop is None else stop)
        return io.BufferedReader(reader, BLOCK_BYTES)
    raw = open(file, "rb")  # noqa: SIM115 the caller closes it
    raw.seek(start)
    return raw


def sha256_of(file: TextFile, on_bytes: OnBytes = lambda _: None) -> str:
    """SHA-256 (hex) of a file's bytes, in constant memory; `on_bytes` gets the length of each read."""
    digest = hashlib.sha256()
    view = memoryview(buffer := bytearray(1 << 22))  # one buffer, because new memory costs page faults
    with open_raw(file) as raw:
        while n_bytes := raw.readinto(buffer):
            digest.update(view[:n_bytes])
            on_bytes(n_bytes)
    return digest.hexdigest()


def map_in_threads(function: Callable[[T], R], items: Iterable[T], n_threads: int = THREADS) -> list[R]:
    """`function` of each item, in threads: for calls that wait for the network."""
    with ThreadPoolExecutor(n_threads) as pool:
        return list(pool.map(function, items))
