"""Files that are whole or absent: temporary name beside the target, fsync, rename."""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

CHUNK_BYTES = 1 << 16
"""Bytes read at a time: they stay in a core's cache while they are checked, 1 MiB does not."""


def write_whole(path: Path, content: bytes) -> None:
    """Write a file that other processes see whole or not at all; raises OSError."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_json(path: Path, value: Any) -> None:
    """`write_whole` of `as_json`."""
    write_whole(path, as_json(value))


def as_json(value: Any) -> bytes:
    """A plain value as indented JSON."""
    return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode()


def sync_folder(folder: Path) -> None:
    """Make renames inside `folder` survive a power cut (POSIX asks for a sync of the folder too)."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_file(path: str | Path, on_bytes: Callable[[int], object] = lambda _: None) -> str:
    """SHA-256 (hex) of a file's bytes, in constant memory."""
    digest = hashlib.sha256()
    view = memoryview(buffer := bytearray(1 << 22))  # one for all: fresh memory costs page faults
    with open(path, "rb", buffering=0) as file:
        while n_bytes := file.readinto(buffer):
            digest.update(view[:n_bytes])
            on_bytes(n_bytes)
    return digest.hexdigest()
