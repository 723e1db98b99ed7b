"""Shards: flat files of token ids. Write one shard, or read many shards as one sequence."""

from __future__ import annotations

import abc
import contextlib
import errno
import functools
import hashlib
import itertools
import types
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from lit_gptdata._io import AtomicFile, write_whole
from lit_gptdata.tokens.manifest import FileEntry, ShardEntry

ROW = np.dtype([("token", "<i8"), ("byte", "<i8"), ("source", "<i4"), ("document", "<i4")])
"""One row of a shard's index, for one chunk of text: its first token and its first UTF-8 byte, counted
from the start of the shard; the index of its source in the manifest; 1 if a document starts here."""


class Tokens:
    """Ids in several arrays or memory-mapped files, as one read-only sequence.

    Tokens([np.arange(3), np.arange(3, 6)])[1:5]  ->  [1, 2, 3, 4]
    """

    def __init__(self, arrays: Sequence[np.ndarray], paths: Sequence[Path] = ()) -> None:
        self.dtype = arrays[0].dtype if arrays else np.dtype("<u2")
        self._arrays = [np.ascontiguousarray(array) for array in arrays if len(array)]
        self._paths = list(paths)
        self._windows_of: dict[int, np.ndarray] = {}
        self._set_lengths([len(array) for array in self._arrays])

    @classmethod
    def from_files(cls, paths: Sequence[Path], dtype: np.dtype[np.unsignedinteger]) -> Tokens:
        """Memory-map files of `dtype`, in order."""
        allow_open_files(len(paths))
        arrays = [  # an empty file cannot be mapped; documents without text make one
            np.memmap(p, dtype=dtype, mode="r") if p.stat().st_size else np.empty(0, dtype)
            for p in paths
        ]
        return cls(arrays, paths)

    def _set_lengths(self, lengths: Sequence[int]) -> None:
        self._ends = np.cumsum(lengths, dtype=np.int64)
        self._begins = self._ends - np.array(lengths, dtype=np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, span: slice) -> np.ndarray:
        """A copy of `[start:stop]`, both within [0, len]."""
        start, stop, _ = span.indices(len(self))
        if start >= stop:
            return np.empty(0, self.dtype)
        first, last = np.searchsorted(self._ends, [start, stop - 1], side="right").tolist()
        begins = enumerate(self._begins[first : last + 1].tolist(), first)
        slices = [self._part(shard, max(0, start - begin), stop - begin) for shard, begin in begins]
        return np.concatenate(slices)

    def _part(self, shard: int, start: int, stop: int) -> np.ndarray:
        return self._arrays[shard][start:stop]

    def gather(self, starts: np.ndarray, length: int) -> np.ndarray:
        """The windows [s, s + length) of all starts s: (B,) int64 → (B, length); raises IndexError."""
        if not len(starts):
            return np.empty((0, length), self.dtype)
        return next(self.batches(starts, length, len(starts)))

    def batches(self, starts: np.ndarray, length: int, size: int) -> Iterator[np.ndarray]:
        """`gather` for `size` starts at a time, with the common work done once for all starts."""
        if not len(starts):
            return
        if not 0 <= starts.min() <= starts.max() <= len(self) - length:
            raise IndexError(f"windows of {length} ids reach outside the {len(self)} ids of all shards")
        shards = np.searchsorted(self._ends, starts, side="right")
        straddling = starts + length > self._ends[shards]
        rows = np.flatnonzero(straddling).tolist()[::-1]
        read = self._reader(starts, shards, length)
        for begin in range(0, len(starts), size):
            batch = slice(begin, begin + size)
            if not rows or rows[-1] >= begin + size:
                yield read(batch)
                continue
            inside = ~straddling[batch]
            ids = np.empty((len(inside), length), self.dtype)
            ids[inside] = read(begin + np.flatnonzero(inside))
            while rows and rows[-1] < begin + size:
                row = rows.pop()
                ids[row - begin] = self[int(starts[row]) : int(starts[row]) + length]
            yield ids

    def _reader(
        self, starts: np.ndarray, shards: np.ndarray, length: int
    ) -> Callable[[slice | np.ndarray], np.ndarray]:
        """A function from indices into `starts` to windows, each of which must be inside its shard."""
        items, windows = starts + self._shifts[shards], self._windows(length)
        return lambda chosen: windows[items[chosen]].view(self.dtype).reshape(-1, length)

    def ahead(self, batches: Iterator[Any], plan: Iterator[np.ndarray], length: int) -> Iterator[Any]:
        """`batches`; a subclass may fetch shards early by `plan`, the starts of each batch's windows."""
        return batches

    @functools.cached_property
    def _addresses(self) -> np.ndarray:
        return np.array([array.__array_interface__["data"][0] for array in self._arrays], np.int64)

    @functools.cached_property
    def _shifts(self) -> np.ndarray:
        """What to add to the index of a token to get its distance in ids from the lowest address."""
        item = self.dtype.itemsize
        shifts: np.ndarray = (self._addresses - self._addresses.min()) // item - self._begins
        return shifts

    def _windows(self, length: int) -> np.ndarray:
        """All windows as one array of opaque items; item i starts i ids after the lowest address.

        With one item per window, selecting is one memcpy per window, half the cost of a 2-D view. With
        one array for all shards, a batch needs one fancy index instead of one per shard. `batches` never
        selects a window that is not inside one shard: the memory between two shards is not ours.
        """
        if length in self._windows_of:
            return self._windows_of[length]
        item, lowest = self.dtype.itemsize, int(self._addresses.min())
        ends = self._addresses + [array.nbytes for array in self._arrays]
        n_items = max(0, int(ends.max() - lowest) // item - length + 1)
        interface: dict[str, Any] = {"version": 3, "data": (lowest, True), "shape": (n_items,)}
        interface |= {"typestr": f"|V{item * length}", "strides": (item,)}
        windows: np.ndarray = np.asarray(types.SimpleNamespace(__array_interface__=interface))
        self._windows_of[length] = windows
        return windows

    def __reduce__(self) -> tuple[Any, ...]:
        # a worker process maps the files again; a pickled map would be a copy of the corpus
        if self._paths:
            return Tokens.from_files, (self._paths, self.dtype)
        return Tokens, (self._arrays,)


class JoinedTokens(Tokens):
    """Several sequences as one, each of which reads in its own way."""

    def __init__(self, parts: Sequence[Tokens]) -> None:
        super().__init__([np.empty(0, parts[0].dtype)])
        self._arrays: list[Any] = list(parts)
        self._set_lengths([len(part) for part in parts])

    def _reader(
        self, starts: np.ndarray, shards: np.ndarray, length: int
    ) -> Callable[[slice | np.ndarray], np.ndarray]:
        def read(chosen: slice | np.ndarray) -> np.ndarray:
            ids = np.empty((len(shards[chosen]), length), self.dtype)
            for number in np.unique(shards[chosen]).tolist():
                rows = shards[chosen] == number
                begins = starts[chosen][rows] - self._begins[number]
                ids[rows] = self._arrays[number].gather(begins, length)
            return ids

        return read

    def ahead(self, batches: Iterator[Any], plan: Iterator[np.ndarray], length: int) -> Iterator[Any]:
        for number, part in enumerate(self._arrays):
            plan, copy = itertools.tee(plan)
            batches = part.ahead(batches, self._only(number, copy), length)
        return batches

    def _only(self, number: int, plan: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
        """The starts that are in one part, counted from its start."""
        begin, end = self._begins[number], self._ends[number]
        return (starts[(begin <= starts) & (starts < end)] - begin for starts in plan)

    def __reduce__(self) -> tuple[Any, ...]:
        return JoinedTokens, (self._arrays,)


def join(parts: Sequence[Tokens]) -> Tokens:
    """Several sequences as one. Files of this machine are joined, so that a batch stays one gather."""
    if len(parts) == 1:
        return parts[0]
    if any(type(part) is not Tokens for part in parts):
        return JoinedTokens(parts)
    paths = [path for part in parts for path in part._paths]
    return Tokens([array for part in parts for array in part._arrays], paths)


OTHER_FILES = 512  # files and connections that a process may have open in addition to its shards


def allow_open_files(n: int) -> int:
    """Let `n` more files stay open, as mapped ones do (Linux allows 1,024); returns how many can."""
    import resource  # only POSIX has it

    limit, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = n + OTHER_FILES
    if limit != resource.RLIM_INFINITY and limit < wanted:
        limit = wanted if most == resource.RLIM_INFINITY else min(wanted, most)
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, most))
    return n if limit == resource.RLIM_INFINITY else max(1, min(n, limit - OTHER_FILES))


_WRITE_ERRORS = (
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO,
    errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST,
)  # fmt: skip
_REMEDY = (
    "the tokens cannot be written. Free some space, or set data_dir to a writable folder with more "
    "space, and run again: finished work is kept"
)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Make an OSError name the file or folder that cannot be written, and the remedy."""
    try:
        yield
    except OSError as error:
        if error.errno not in _WRITE_ERRORS or _REMEDY in str(error.strerror):
            raise
        message = f"{error.strerror}: {_REMEDY}"
        raise OSError(error.errno, message, str(error.filename or path)) from error


BATCH_BYTES = 1 << 22
"""Ids that are hashed and written at once, in a thread. gigatoken holds Python's lock most of the time,
so the thread waits some milliseconds for each of its steps: they must be few."""


class ShardWriter(abc.ABC):
    """Writes one shard: its ids, and an index of its chunks. The files get their names in `finish`."""

    def __init__(self, name: str, dtype: np.dtype[np.unsignedinteger]) -> None:
        self.n_tokens = self.n_bytes = self.n_documents = 0
        self._dtype = dtype
        self._rows: list[tuple[int, int, int, int]] = []
        self._name = name
        self._digest = hashlib.sha256()
        self._batch = bytearray()
        self._thread = ThreadPoolExecutor(1)
        self._in_progress: Future[None] | None = None

    def start_chunk(self, source: int, starts_document: bool) -> None:
        """Record that a chunk starts at the next id."""
        self._rows.append((self.n_tokens, self.n_bytes, source, int(starts_document)))
        self.n_documents += starts_document

    def append(self, ids: np.ndarray | Sequence[int], n_bytes: int) -> None:
        """Write the ids of `n_bytes` UTF-8 bytes of text."""
        self._batch += np.ascontiguousarray(ids, dtype=self._dtype).data.cast("B")
        self.n_tokens += len(ids)
        self.n_bytes += n_bytes
        if len(self._batch) >= BATCH_BYTES:
            self._write_batch()

    def _write_batch(self) -> None:
        """Hash and write the last ids in a thread, after the ids before them are written."""
        self._wait()
        self._in_progress = self._thread.submit(self._hash_and_write, self._batch)
        self._batch = bytearray()

    def _wait(self) -> None:
        if self._in_progress is not None:
            self._in_progress.result()

    def _hash_and_write(self, ids: bytearray) -> None:
        with memoryview(ids) as view:
            self._digest.update(view)
            self._write(view)

    def finish(self) -> ShardEntry:
        """Give the files their names and return the shard's entry for the manifest."""
        self._write_batch()
        index = np.array(self._rows, dtype=ROW).tobytes()
        self._wait()
        self._thread.shutdown()
        self._save(index)
        size = self.n_tokens * self._dtype.itemsize
        ids = FileEntry(name=f"{self._name}.bin", size=size, sha256=self._digest.hexdigest())
        return ShardEntry(
            n_tokens=self.n_tokens,
            n_bytes=self.n_bytes,
            n_documents=self.n_documents,
            files=(ids, FileEntry.describe(f"{self._name}.idx", index)),
        )

    def discard(self) -> None:
        """Remove what was written; does nothing after `finish`."""
        self._thread.shutdown()

    @abc.abstractmethod
    def _write(self, ids: memoryview) -> None:
        """Append the bytes of ids."""

    @abc.abstractmethod
    def _save(self, index: bytes) -> None:
        """Save the written ids as the .bin file and `index` as the .idx file."""


class FileShardWriter(ShardWriter):
    """Writes a shard into a folder; raises OSError that names the file and the remedy."""

    def __init__(self, folder: Path, name: str, dtype: np.dtype[np.unsignedinteger]) -> None:
        super().__init__(name, dtype)
        self._path = folder / f"{name}.bin"
        with writing(folder):
            self._file = AtomicFile(self._path)

    def discard(self) -> None:
        super().discard()
        self._file.discard()

    def _write(self, ids: memoryview) -> None:
        with writing(self._path):
            self._file.write(ids)

    def _save(self, index: bytes) -> None:
        with writing(self._path):
            write_whole(self._path.with_suffix(".idx"), index)
            self._file.commit()
