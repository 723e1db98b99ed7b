"""A folder of files that were fetched, below a bound, shared by the processes of a machine.

<folder>/<sha256>          a whole file, named by its contents, so that no two stores are mixed up
         .<sha256>.part    one on its way, from the beginning as long as it will be
         .locks/<sha256>   held by the one process that fetches it; the others wait
         .locks/gate       held by many while they read files, by one alone while it removes some
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
from filelock import FileLock, Timeout

from lit_gptdata._io import sha256_file
from lit_gptdata.tokens.manifest import FileEntry
from lit_gptdata.tokens.remote.objects import Objects
from lit_gptdata.tokens.shards import writing

CHECKED_ATTEMPTS = 2
"""Times that a file is fetched whose SHA-256 is wrong."""

POLL_S = 0.05
"""Between two looks for room that other processes' fetches take."""

log = logging.getLogger(__name__)


class Cache:
    """Files of published stores on this machine, fetched on first need, the longest unused removed.

    `bound`: bytes that all of them have at most, at every moment; None: no bound. Picklable.
    """

    def __init__(self, folder: Path, bound: int | None) -> None:
        # absolute: what is fetched ahead comes later, perhaps when the program is in another folder
        self.folder, self.bound = folder.absolute(), bound
        self._locks = self.folder / ".locks"
        self._gate_path = str(self._locks / "gate")  # a batch asks for it

    def path(self, file: FileEntry) -> Path:
        """Where a file is, or would be."""
        return self.folder / file.sha256

    def holds(self, file: FileEntry) -> bool:
        """Whether a file is there, by its size."""
        try:
            return self.path(file).stat().st_size == file.size
        except FileNotFoundError:
            return False

    @contextlib.contextmanager
    def reading(self) -> Iterator[bytes]:
        """Nothing is removed meanwhile; gives a word that is another one after every removal."""
        with self._gate("shared") as gate:
            yield os.pread(gate, 16, 0)

    def map(self, file: FileEntry, dtype: np.dtype[np.unsignedinteger]) -> np.ndarray | None:
        """A file's ids, or None if it is not there; to be looked at only while `reading`.

        Its pages are gone, and looking at them ends the process, once the word is another one.
        """
        return np.memmap(self.path(file), dtype=dtype, mode="r") if self.holds(file) else None

    def check_room(self, file: FileEntry) -> None:
        """Raise ValueError if the bound is below the size of this one file."""
        if self.bound is not None and file.size > self.bound:
            raise ValueError(
                f"cache_gb={self.bound / 1e9:g} is too small: {file.name} alone has {file.size:,} "
                f"bytes. Set cache_gb >= {file.size / 1e9:g}, better the size of the store"
            )

    def touch(self, file: FileEntry) -> None:
        """Note that a file is in use."""
        with contextlib.suppress(FileNotFoundError):
            os.utime(self.path(file))

    def read(self, file: FileEntry, source: Objects) -> bytes:
        """The contents of a file, fetched if need be."""
        while True:
            with self.reading():
                if self.holds(file):
                    self.touch(file)
                    return self.path(file).read_bytes()
            self.fetch(file, source)

    def fetch(self, file: FileEntry, source: Objects) -> None:
        """Make a file be there; of many processes one fetches it and the others wait.

        Raises ValueError if it has another SHA-256 than the manifest says, or is larger than the
        bound, RemoteError or FileNotFoundError if it cannot be had, OSError for a full disk.
        """
        path = self.path(file)
        if self.holds(file):
            return
        with writing(self.folder):
            self._locks.mkdir(parents=True, exist_ok=True)
        with self._fetching(file.sha256):
            if self.holds(file):  # another process fetched it meanwhile
                return
            if path.exists():
                self.drop(file)  # one of another size, left by a kill or damaged
            part = self.folder / f".{file.sha256}.part"
            for _ in range(CHECKED_ATTEMPTS):
                try:
                    seen = self._write(part, file, source)
                    if seen == file.sha256:
                        with self._gate("shared"):  # so that it is always counted, and once
                            os.replace(part, path)
                        return
                finally:
                    with self._gate("shared"):
                        part.unlink(missing_ok=True)
                log.warning("%r/%s has sha256 %s, not %s", source, file.name, seen, file.sha256)
        raise ValueError(
            f"{source!r}/{file.name} has sha256 {seen}, its manifest says {file.sha256}: it is "
            "damaged there. Delete it and publish the store again: lit-gptdata publish URL"
        )

    def _write(self, part: Path, file: FileEntry, source: Objects) -> str:
        """Fetch into `part`; returns the SHA-256 of what came."""
        digest = hashlib.sha256()
        with writing(part):
            self._make_room(part, file)
            with open(part, "r+b", buffering=0) as out:
                for block in source.blocks(file.name, file.size):
                    digest.update(block)
                    left = memoryview(block)
                    while left:  # an unbuffered write may stop early, as at a full disk
                        left = left[out.write(left) :]
                os.fsync(out.fileno())
        return digest.hexdigest()

    def _make_room(self, part: Path, file: FileEntry) -> None:
        """Create `part` at its full length, so that others count it, after removing what must go."""
        self.check_room(file)
        while True:
            with self._gate("alone") as gate:
                part.unlink(missing_ok=True)  # of a fetch that was killed
                if self.bound is None or self._free(gate, file.size):
                    with open(part, "wb") as empty:
                        empty.truncate(file.size)
                    return
            time.sleep(POLL_S)  # the rest is on its way for others, and may go once it is here

    def _free(self, gate: int, wanted: int) -> bool:
        """Make `wanted` bytes of room, if what is on its way leaves as much; the longest unused go."""
        assert self.bound is not None
        found = [entry for entry in os.scandir(self.folder) if entry.is_file()]
        sizes = {entry.path: entry.stat().st_size for entry in found}
        excess = sum(sizes.values()) + wanted - self.bound
        if excess <= 0:
            return True
        for entry in found:
            if entry.name.startswith(".") and self._is_dead(entry.name[1:].removesuffix(".part")):
                os.unlink(entry.path)
                excess -= sizes[entry.path]
        whole = [entry for entry in found if not entry.name.startswith(".")]
        if excess > sum(sizes[entry.path] for entry in whole):
            return False
        for entry in sorted(whole, key=lambda entry: entry.stat().st_mtime_ns):
            if excess > 0:
                _remove(gate, entry.path)
                excess -= sizes[entry.path]
        return True

    def _is_dead(self, sha256: str) -> bool:
        """Whether nobody fetches this file: whoever began was killed."""
        with contextlib.suppress(Timeout), self._fetching(sha256).acquire(timeout=0):
            return True
        return False

    def drop(self, file: FileEntry) -> None:
        """Remove a file, if it is there."""
        with contextlib.suppress(FileNotFoundError), self._gate("alone") as gate:
            _remove(gate, self.path(file))

    def damaged(self, file: FileEntry) -> bool:
        """Whether a file is there and has another SHA-256 than it should; reads it."""
        with self.reading():
            return self.holds(file) and sha256_file(self.path(file)) != file.sha256

    def _fetching(self, sha256: str) -> FileLock:
        return FileLock(self._locks / sha256)

    @contextlib.contextmanager
    def _gate(self, way: Literal["shared", "alone"]) -> Iterator[int]:
        import fcntl  # POSIX only

        # opened each time: a lock belongs to an open file, which threads and forked processes would
        # share, and a folder that was deleted by hand begins anew
        try:
            gate = os.open(self._gate_path, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:
            with writing(self.folder):
                self._locks.mkdir(parents=True, exist_ok=True)
            gate = os.open(self._gate_path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(gate, fcntl.LOCK_SH if way == "shared" else fcntl.LOCK_EX)
            yield gate
        finally:
            fcntl.flock(gate, fcntl.LOCK_UN)  # a process forked meanwhile keeps the file open
            os.close(gate)


def _remove(gate: int, path: str | os.PathLike[str]) -> None:
    """Remove a file, and free its bytes also where a process has it mapped; the gate is held alone."""
    size = os.stat(path).st_size
    os.pwrite(gate, os.urandom(16), 0)  # first: whoever maps the file must know
    if size:
        os.truncate(path, 0)
    os.unlink(path)
