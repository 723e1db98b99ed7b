"""A folder of fetched files that all processes of a machine share, with a bound on its size.

<folder>/<sha256>               a complete file, named by its content, so that stores never mix
         .<sha256>.<uuid>.tmp   a file that a process is fetching
         .locks/<sha256>        held by the process that fetches this file; other processes wait
         .locks/room            held while a process deletes files and completes one
"""

import contextlib
import hashlib
import os
from io import BufferedReader
from pathlib import Path

from filelock import FileLock, Timeout

from lit_gptdata._io import AtomicFile
from lit_gptdata.tokens.manifest import FileEntry
from lit_gptdata.tokens.remote.objects import Objects
from lit_gptdata.tokens.shards import writing


class Cache:
    """Files of published stores on this machine; the least recently used ones are evicted. Picklable.

    `bound`: the maximum bytes of the complete files in the folder; None: no bound. At most
    store.FETCHES files per process are being fetched in addition.
    """

    def __init__(self, folder: Path, bound: int | None) -> None:
        # absolute: background fetches continue after the program has changed its working directory
        self.folder, self.bound = folder.absolute(), bound

    def path(self, file: FileEntry) -> Path:
        """Where a file is once it has been fetched."""
        return self.folder / file.sha256

    def has(self, file: FileEntry) -> bool:
        """Whether the cache has a file, judged by its size."""
        with contextlib.suppress(FileNotFoundError):
            return self.path(file).stat().st_size == file.size
        return False

    def open(self, file: FileEntry) -> BufferedReader | None:
        """Open a cached file and mark it as recently used, else None. It stays readable if evicted."""
        with contextlib.suppress(FileNotFoundError):
            opened = open(self.path(file), "rb")  # noqa: SIM115 the caller closes it
            if os.fstat(opened.fileno()).st_size == file.size:
                os.utime(opened.fileno())
                return opened
            opened.close()
        return None

    def touch(self, file: FileEntry) -> int:
        """Mark a file as recently used; return its inode, or 0 if the cache does not have it."""
        with contextlib.suppress(FileNotFoundError):
            os.utime(path := self.path(file))
            return path.stat().st_ino
        return 0

    def fetch(self, file: FileEntry, source: Objects) -> None:
        """Fetch a file unless the cache has it; one process fetches it while the others wait.

        Raises ValueError for a wrong SHA-256, OSError for the URL or a full disk.
        """
        if self.has(file):
            return
        with writing(self.folder), self._lock(file.sha256):
            if self.has(file):  # another process fetched it while this one waited for the lock
                return
            for leftover in self.folder.glob(f".{file.sha256}.*"):  # of a process that was killed
                leftover.unlink()
            digest = hashlib.sha256()
            with contextlib.closing(AtomicFile(self.path(file))) as partial:
                for block in source.blocks(file.name, file.size):
                    digest.update(block)
                    partial.write(block)
                if digest.hexdigest() != file.sha256:
                    problem = f"has sha256 {digest.hexdigest()}, its manifest says {file.sha256}"
                    advice = "Delete it and publish the store again: lit-gptdata publish URL"
                    name = f"{source!r}/{file.name}"
                    raise ValueError(f"{name} {problem}: it is damaged there. {advice}")
                partial.sync()  # not while other processes wait for the lock
                with self._lock("room"):
                    self._make_room(file.size)
                    partial.commit()

    def _make_room(self, n_bytes: int) -> None:
        """Delete what killed fetches left, and the least recently used files, for `n_bytes` more."""
        if self.bound is None:
            return
        for path in self.folder.glob(".*.*"):
            sha256 = path.name.split(".")[1]  # its lock is free if nobody fetches the file now
            with contextlib.suppress(Timeout), self._lock(sha256, timeout=0):
                path.unlink(missing_ok=True)
        files = []
        for path in self.folder.glob("[!.]*"):
            with contextlib.suppress(FileNotFoundError):  # `verify` of another process may delete it
                files.append((path.stat().st_mtime_ns, path.stat().st_size, path))
        excess = sum(size for _, size, _ in files) + n_bytes - self.bound
        for _, size, path in sorted(files):
            if excess > 0:
                path.unlink(missing_ok=True)
                excess -= size

    def _lock(self, name: str, timeout: float = -1) -> contextlib.AbstractContextManager[object]:
        """Take a lock that ends with the process; -1 waits for it, 0 raises Timeout at once."""
        (self.folder / ".locks").mkdir(parents=True, exist_ok=True)
        return FileLock(self.folder / ".locks" / name).acquire(timeout)
