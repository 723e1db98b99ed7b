"""Read, list and write the files below a URL, with retries and without secrets in error messages.

    Objects("s3://bucket/tokens/1f2e…").read("manifest.json")  ->  b"{…"

Credentials come from the places that fsspec's packages document, such as the environment, ~/.aws or the
role of an instance, and never from the URL.
"""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

from lit_gptdata._fsspec import RemoteError, filesystem, is_url, redact, retry
from lit_gptdata.text.remote_file import BLOCK_BYTES, fetch_range

OBJECT_STORES = ("s3", "s3a", "gs", "gcs", "az", "abfs", "abfss")  # no folders, and a write is atomic


class Objects:
    """The files below a URL of any scheme that fsspec knows, or below a path. Picklable.

    Raises ValueError for a URL with a password or a query, ImportError for a missing package.
    """

    def __init__(self, url: str | os.PathLike[str]) -> None:
        self.url = os.fspath(url).rstrip("/")
        check_url(self.url)

    def __repr__(self) -> str:
        return redact(self.url)

    def open(self) -> tuple[Any, str]:
        """The file system and the path in it. Open before threads read: fsspec's imports may race."""
        fs, root = filesystem(self.url)  # fsspec keeps one for each process
        return fs, root.rstrip("/")

    def read(self, name: str) -> bytes:
        """The content of a small file; raises FileNotFoundError or RemoteError."""
        fs, root = self.open()
        return retry(f"{self.url}/{name}", lambda: bytes(fs.cat_file(f"{root}/{name}")))

    def blocks(self, name: str, size: int) -> Iterator[bytes]:
        """The content of a file of `size` bytes, in blocks with their own retries."""
        for start in range(0, size, BLOCK_BYTES):
            yield fetch_range(f"{self.url}/{name}", size, start, min(start + BLOCK_BYTES, size))

    def sizes(self) -> dict[str, int]:
        """The size in bytes of every file, by name; empty if nothing exists at the URL."""
        fs, root = self.open()
        fs.invalidate_cache()
        try:
            entries = retry(self.url, lambda: fs.ls(root, detail=True))
        except FileNotFoundError:
            return {}
        return {entry["name"].rpartition("/")[2]: entry["size"] for entry in entries}

    def write(self, name: str, content: bytes) -> None:
        """Write a file atomically."""
        fs, root = self.open()
        rename = urlsplit(self.url).scheme not in OBJECT_STORES
        path = f"{root}/.{name}.part" if rename else f"{root}/{name}"

        def put() -> None:
            if rename:
                fs.makedirs(root, exist_ok=True)
            fs.pipe_file(path, content)
            if rename:
                fs.mv(path, f"{root}/{name}")

        try:
            retry(f"{self.url}/{name}", put, done="written")
        except RemoteError:
            if rename:  # after a full disk, give the space back
                with contextlib.suppress(Exception):
                    fs.rm_file(path)
            raise

    def create(self, name: str) -> Upload:
        """A new file: `write` its content, `commit`, then `close`. Without `commit` nothing remains."""
        return Upload(self, name)

    def remove_all(self) -> None:
        """Remove every file below the URL."""
        fs, root = self.open()
        with contextlib.suppress(FileNotFoundError):
            retry(self.url, lambda: fs.rm(root, recursive=True), done="removed")


class Upload(io.BytesIO):
    """A new file in memory, which `commit` sends."""

    def __init__(self, target: Objects, name: str) -> None:
        super().__init__()
        self._target, self._name = target, name

    def commit(self) -> None:
        self._target.write(self._name, self.getvalue())


def check_url(url: str) -> None:
    """Raise ValueError for a URL that would carry a secret into checkpoints and logs."""
    parts = urlsplit(url)
    if parts.password is not None or (is_url(url) and parts.query):
        advice = "give credentials where fsspec's packages look for them, such as AWS_PROFILE or ~/.aws"
        raise ValueError(f"{redact(url)} holds a password or a query: {advice}")
