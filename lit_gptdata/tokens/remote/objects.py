"""The files below a URL: read, listed and written with retries; errors name them, never a secret.

    Objects("s3://bucket/tokens/1f2e…").read("manifest.json")  ->  b"{…"

fsspec reaches them; credentials come from where its packages look for them (the environment, ~/.aws, an
instance's role), never from the URL.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

from lit_gptdata._fsspec import filesystem, is_url, redact, retry

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

BLOCK_BYTES = 8 << 20
"""Bytes asked for at a time: what a broken connection loses, and what is held in memory."""

FOLDERLESS = ("s3", "s3a", "gs", "gcs", "az", "abfs", "abfss")
"""Object stores: no folder has to be made, and a file is there whole or not at all."""

Result = TypeVar("Result")


class Objects:
    """The files below a URL of any scheme that fsspec knows; a path is one, too.

    Picklable, and made anew in a forked process. Raises ValueError for a URL that holds a password or
    a query, ImportError with its pip line for a scheme whose package is not installed.
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
        """The file system and the path in it; to be called once before threads read.

        fsspec imports the package on first use, and a second thread may then see half of it.
        """
        if self._opened is None or self._opened[0] != os.getpid():  # its threads do not survive a fork
            fs, root = filesystem(self.url)
            self._opened = (os.getpid(), fs, root.rstrip("/"))
        return self._opened[1:]

    def read(self, name: str) -> bytes:
        """The whole of a small file; raises FileNotFoundError if there is none."""
        fs, root = self.open()
        return self._tried(name, lambda: bytes(fs.cat_file(f"{root}/{name}")))

    def blocks(self, name: str, size: int) -> Iterator[bytes]:
        """A file of `size` bytes, BLOCK_BYTES at a time, each with attempts of its own."""
        fs, root = self.open()
        for start in range(0, size, BLOCK_BYTES):
            stop = min(start + BLOCK_BYTES, size)
            yield self._tried(name, lambda: _range(fs, f"{root}/{name}", start, stop))  # noqa: B023

    def sizes(self) -> dict[str, int]:
        """Name → bytes of every file that is there now."""
        fs, root = self.open()
        fs.invalidate_cache()
        try:
            found = self._tried("", lambda: fs.ls(root, detail=True))
        except FileNotFoundError:
            return {}
        return {entry["name"].rpartition("/")[2]: entry["size"] for entry in found}

    def write(self, name: str, source: Path | bytes) -> None:
        """Put a file there, from a path or as it is."""
        fs, root = self.open()
        folders = urlsplit(self.url).scheme not in FOLDERLESS
        path = f"{root}/.{name}.part" if folders else f"{root}/{name}"

        def put() -> None:
            if folders:
                fs.makedirs(root, exist_ok=True)
            if isinstance(source, bytes):
                fs.pipe_file(path, source)
            else:
                fs.put_file(os.fspath(source), path)
            if folders:
                fs.mv(path, f"{root}/{name}")

        self._tried(name, put, "written")

    def remove_all(self) -> None:
        """Remove every file that is there."""
        fs, root = self.open()
        with contextlib.suppress(FileNotFoundError):
            self._tried("", lambda: fs.rm(root, recursive=True), "removed")

    def _tried(self, name: str, call: Callable[[], Result], done: str = "read") -> Result:
        """The call's result; what may pass is tried again."""
        return retry(f"{self.url}/{name}", lambda failures: call(), done=done)


def check_url(url: str) -> None:
    """Raise ValueError for a URL that would carry a secret into checkpoints and logs."""
    parts = urlsplit(url)
    if parts.password is not None or (is_url(url) and parts.query):
        raise ValueError(
            f"{redact(url)} holds a password or a query: give the URL without, and credentials where "
            "the packages look for them, such as AWS_PROFILE or ~/.aws for s3://"
        )


def _range(fs: AbstractFileSystem, path: str, start: int, stop: int) -> bytes:
    block = bytes(fs.cat_file(path, start=start, end=stop))
    if len(block) != stop - start:
        raise OSError(
            f"bytes {start:,} to {stop:,} came as {len(block):,} bytes: cut short, or no range"
        )
    return block
