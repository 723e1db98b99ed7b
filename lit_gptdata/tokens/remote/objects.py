"""Read, list and write the files below a URL, with retries and without secrets in error messages.

    Objects("s3://bucket/tokens/1f2e…").read("manifest.json")  ->  b"{…"

Credentials come from the places that fsspec's packages document, such as the environment, ~/.aws or the
role of an instance, and never from the URL.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

from lit_gptdata._fsspec import RemoteError, filesystem, is_url, redact, retry

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

BLOCK_BYTES = 8 << 20  # per request: a broken connection loses, and a fetch holds, at most this many
OBJECT_STORES = ("s3", "s3a", "gs", "gcs", "az", "abfs", "abfss")  # no folders, and a write is atomic

Result = TypeVar("Result")


class Objects:
    """The files below a URL of any scheme that fsspec knows, or below a path. Picklable.

    Raises ValueError for a URL with a password or a query, ImportError for a missing package.
    """

    def __init__(self, url: str | os.PathLike[str]) -> None:
        self.url = os.fspath(url).rstrip("/")
        check_url(self.url)
        self._opened: tuple[int, AbstractFileSystem, str] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return Objects, (self.url,)

    def __repr__(self) -> str:
        return redact(self.url)

    def open(self) -> tuple[AbstractFileSystem, str]:
        """The file system and the path in it. Open before threads read: fsspec's imports may race."""
        if self._opened is None or self._opened[0] != os.getpid():  # its threads do not survive a fork
            fs, root = filesystem(self.url)
            self._opened = (os.getpid(), fs, root.rstrip("/"))
        return self._opened[1:]

    def read(self, name: str) -> bytes:
        """The content of a small file; raises FileNotFoundError or RemoteError."""
        fs, root = self.open()
        return self._retry(name, lambda: bytes(fs.cat_file(f"{root}/{name}")))

    def blocks(self, name: str, size: int) -> Iterator[bytes]:
        """The content of a file of `size` bytes in blocks of BLOCK_BYTES, each with its own retries."""
        fs, root = self.open()
        for start in range(0, size, BLOCK_BYTES):
            stop = min(start + BLOCK_BYTES, size)
            yield self._retry(name, lambda: _read_range(fs, f"{root}/{name}", start, stop))  # noqa: B023

    def sizes(self) -> dict[str, int]:
        """The size in bytes of every file, by name; empty if nothing exists at the URL."""
        fs, root = self.open()
        fs.invalidate_cache()
        try:
            entries = self._retry("", lambda: fs.ls(root, detail=True))
        except FileNotFoundError:
            return {}
        return {entry["name"].rpartition("/")[2]: entry["size"] for entry in entries}

    def write(self, name: str, source: Path | bytes) -> None:
        """Write a file atomically, from a local path or from bytes."""
        fs, root = self.open()
        rename = urlsplit(self.url).scheme not in OBJECT_STORES
        path = f"{root}/.{name}.part" if rename else f"{root}/{name}"

        def put() -> None:
            if rename:
                fs.makedirs(root, exist_ok=True)
            if isinstance(source, bytes):
                fs.pipe_file(path, source)
            else:
                fs.put_file(os.fspath(source), path)
            if rename:
                fs.mv(path, f"{root}/{name}")

        try:
            self._retry(name, put, "written")
        except RemoteError:
            if rename:  # after a full disk, give the space back
                with contextlib.suppress(Exception):
                    fs.rm_file(path)
            raise

    def remove_all(self) -> None:
        """Remove every file below the URL."""
        fs, root = self.open()
        with contextlib.suppress(FileNotFoundError):
            self._retry("", lambda: fs.rm(root, recursive=True), "removed")

    def _retry(self, name: str, call: Callable[[], Result], done: str = "read") -> Result:
        return retry(f"{self.url}/{name}", lambda failures: call(), done=done)


def check_url(url: str) -> None:
    """Raise ValueError for a URL that would carry a secret into checkpoints and logs."""
    parts = urlsplit(url)
    if parts.password is not None or (is_url(url) and parts.query):
        raise ValueError(
            f"{redact(url)} holds a password or a query: give the URL without it, and credentials where "
            "fsspec's packages look for them, such as AWS_PROFILE or ~/.aws for s3://"
        )


def _read_range(fs: AbstractFileSystem, path: str, start: int, stop: int) -> bytes:
    block = bytes(fs.cat_file(path, start=start, end=stop))
    if len(block) != stop - start:
        problem = f"bytes {start:,} to {stop:,} came as {len(block):,} bytes"
        raise OSError(f"{problem}: the response was cut short, or the server ignores ranges")
    return block
