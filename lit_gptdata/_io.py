"""Write files atomically: temporary name, fsync, rename. Lock them. Align tables. Show progress."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

log = logging.getLogger(__name__)

CHUNK_BYTES = 1 << 16  # per read: these stay in a core's cache while they are processed, 1 MiB does not


def working_folder() -> Path:
    """Where a user's relative paths start: the current folder, or the one that a Hydra app left."""
    current = Path.cwd()
    module = sys.modules.get("hydra.core.hydra_config")
    if module is not None and module.HydraConfig.initialized():
        runtime = module.HydraConfig.get().runtime
        if current == Path(runtime.get("output_dir") or "/").resolve():
            return Path(runtime.cwd)
    return current


class AtomicFile:
    """A file that other processes see only when it is complete: `write`, `commit`, and then `close`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        # unique, so a process that outlives its parent cannot disturb the next one
        self.temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
        self._file = open(self.temporary, "xb", buffering=0)  # noqa: SIM115 `close` closes it

    def write(self, data: bytes | memoryview) -> None:
        remaining = memoryview(data).cast("B")
        while remaining:  # an unbuffered write may stop early, for example on a full disk
            try:
                remaining = remaining[self._file.write(remaining) :]
            except OSError as error:
                error.filename = str(self.path)  # for the message
                raise

    def sync(self) -> None:
        """Wait until all bytes are on disk, so that `commit` is fast."""
        os.fsync(self._file.fileno())

    def commit(self) -> None:
        """Sync the file to disk and give it its name."""
        self.sync()
        self._file.close()
        os.replace(self.temporary, self.path)

    def close(self) -> None:
        """Remove the temporary file, which exists unless `commit` was called."""
        self._file.close()
        self.temporary.unlink(missing_ok=True)


def write_whole(path: Path, content: bytes | memoryview) -> None:
    """Write a file atomically; raises OSError."""
    with contextlib.closing(AtomicFile(path)) as file:
        file.write(content)
        file.commit()
    sync_folder(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Write a plain value atomically as JSON; raises OSError."""
    write_whole(path, as_json(value))


def as_json(value: Any) -> bytes:
    """A plain value as indented JSON in UTF-8; raises ValueError for NaN and infinity."""
    return (json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()


def sync_folder(folder: Path) -> None:
    """Make renames inside `folder` survive a power failure: POSIX requires a sync of the folder too."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def locked(path: Path, activity: str) -> contextlib.AbstractContextManager[object]:
    """Take a lock that ends with the process. `activity`: what its holder does, for those who wait."""
    lock = FileLock(path)
    try:
        return lock.acquire(timeout=0)
    except Timeout:
        log.warning("waiting for another process that %s (lock %s)", activity, path)
        return lock.acquire()


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """A table as lines: the first and the last column start at the left, the others end at the right."""
    first, *middle, _ = (max(map(len, column)) for column in zip(*rows, strict=True))
    return ["  ".join([r[0].ljust(first), *map(str.rjust, r[1:-1], middle), r[-1]]) for r in rows]


# Progress ------------------------------------------------------------------------------------------


def is_terminal(file: Any) -> bool:
    """Whether a progress bar can be drawn: in a terminal or a notebook."""
    return file.isatty() or "ipykernel" in sys.modules


def progress_bar(file: Any = None, **options: Any) -> Any:
    """A tqdm bar on `file` (None: stderr). If that is not a terminal, it is a line every half minute."""
    from tqdm import tqdm

    file = file or sys.stderr
    delay = 0 if file.isatty() else 3  # s: a notebook keeps what a short task prints
    if not is_terminal(file):
        file = _Lines(file)
    return tqdm(**{"unit_scale": True, "dynamic_ncols": True, "file": file, "delay": delay} | options)


def close_bars() -> None:
    """Close all progress bars, so that the next message starts on a new line."""
    from tqdm import tqdm

    for bar in list(getattr(tqdm, "_instances", ())):
        bar.close()


class _Lines:
    """Writes a state of a progress bar as a line, at most one every 30 seconds."""

    def __init__(self, file: Any) -> None:
        self._file, self._last = file, time.monotonic() - 25  # the first line comes after 5 seconds

    def write(self, text: str) -> None:
        if (text := text.strip()) and (now := time.monotonic()) - self._last >= 30:
            self._last = now
            print(text, file=self._file, flush=True)
