"""Read many shards, which are flat files of token ids, as one sequence."""

from __future__ import annotations

import contextlib
import errno
import functools
import math
import os
import types
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

ROW = np.dtype([("token", "<i8"), ("byte", "<i8"), ("source", "<i4"), ("document", "<i4")])
"""One row of a shard's index, for one chunk of text: its first token and its first UTF-8 byte, counted
from the start of the shard; the index of its source in the manifest; 1 if a document starts here."""

Read = Callable[[slice | np.ndarray], np.ndarray]


class Tokens:
    """Ids in several arrays or memory-mapped files, as one read-only sequence.

    Tokens([np.arange(3), np.arange(3, 6)])[1:5]  ->  [1, 2, 3, 4]
    """

    read_at_once = 1 << 18
    """Tokens to read for several batches at once, which is faster; 1: one batch at a time."""

    def __init__(self, arrays: Sequence[np.ndarray], paths: Sequence[Path] = ()) -> None:
        self.dtype = arrays[0].dtype if arrays else np.dtype("<u2")
        self._arrays = [np.ascontiguousarray(array) for array in arrays if len(array)]
        self._paths = list(paths)
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
        special = {*(np.flatnonzero(straddling) // size).tolist()}  # batches with a straddling window
        read = self._reader(starts, shards, length)
        for number, begin in enumerate(range(0, len(starts), size)):
            batch = slice(begin, begin + size)
            if number in special:
                lengths = np.full(len(starts[batch]), length)
                yield self.ranges(starts[batch], lengths).reshape(-1, length)
            else:
                yield read(batch)

    def ranges(self, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """The ids [s, s + n) of all ranges, one range after the other: int64 (P,) each → (sum,)."""
        starts, lengths = starts[lengths > 0], lengths[lengths > 0]
        if not len(starts):
            return np.empty(0, self.dtype)
        ends = starts + lengths
        if starts.min() < 0 or ends.max() > len(self):
            raise IndexError(f"a range reaches outside the {len(self)} ids of all shards")
        shards = np.searchsorted(self._ends, starts, side="right")
        n_shards = np.searchsorted(self._ends, ends - 1, side="right") - shards + 1
        if n_shards.max() > 1:  # cut ranges where shards end
            shards = spread(shards, n_shards)
            starts = np.maximum(np.repeat(starts, n_shards), self._begins[shards])
            lengths = np.minimum(np.repeat(ends, n_shards), self._ends[shards]) - starts
        return self._read_ranges(starts, lengths, shards)

    def _read_ranges(self, starts: np.ndarray, lengths: np.ndarray, shards: np.ndarray) -> np.ndarray:
        """`ranges` that each are within one shard.

        Each range is copied with the length of the longest one, as one opaque item, in order. So the
        next range replaces what is too much, and a range costs one memcpy instead of an index per id.
        Ranges that are much longer than the average are cut, or short ones would copy too much.
        """
        if lengths.max() > (most := 4 * math.ceil(lengths.mean())):
            n_cuts = -(-lengths // most)
            offsets = spread(np.zeros_like(n_cuts), n_cuts) * most
            starts, shards = np.repeat(starts, n_cuts) + offsets, np.repeat(shards, n_cuts)
            lengths = np.minimum(np.repeat(lengths, n_cuts) - offsets, most)
        ends, most, item = np.cumsum(lengths), int(lengths.max()), self.dtype.itemsize
        ids = np.empty(int(ends[-1]) + most, self.dtype)
        items = _memory(ids.ctypes.data, len(ids) - most, f"|V{item * most}", item, is_read_only=False)
        inside = starts + most <= self._ends[shards]
        read = self._reader(starts, shards, most)
        items[(ends - lengths)[inside]] = read(inside).view(items.dtype)[:, 0]
        for i in np.flatnonzero(~inside).tolist():
            start = int(starts[i] - self._begins[shards[i]])
            ids[ends[i] - lengths[i] : ends[i]] = self._arrays[shards[i]][
                start : start + int(lengths[i])
            ]
        return ids[: ends[-1]]

    def _reader(self, starts: np.ndarray, shards: np.ndarray, length: int) -> Read:
        """A function from indices into `starts` to windows, each of which must be inside its shard.

        It selects from all windows as one array of opaque items; item i starts i ids after the lowest
        address. With one item per window, selecting is one memcpy per window, half the cost of a 2-D
        view. With one array for all shards, a batch needs one fancy index instead of one per shard. The
        memory between two shards is not ours, so nobody may select a window that leaves its shard.
        """
        (lowest, n_ids, shifts), item = self._layout, self.dtype.itemsize
        windows = _memory(lowest, max(0, n_ids - length + 1), f"|V{item * length}", item)
        items = starts + shifts[shards]
        return lambda chosen: windows[items[chosen]].view(self.dtype).reshape(-1, length)

    def ahead(self, batches: Iterator[Any], plan: Iterator[np.ndarray]) -> Iterator[Any]:
        """`batches`; a subclass may fetch shards early by `plan`, tokens that each batch reads."""
        return batches

    @functools.cached_property
    def _layout(self) -> tuple[int, int, np.ndarray]:
        """The lowest address, the number of ids from there to the highest one, and a shift per shard.

        A token's number plus the shift of its shard is its distance in ids from the lowest address.
        """
        addresses = np.array([array.__array_interface__["data"][0] for array in self._arrays], np.int64)
        shifts = (addresses - addresses.min()) // self.dtype.itemsize - self._begins
        return int(addresses.min()), int((self._ends + shifts).max()), shifts

    def __reduce__(self) -> tuple[Any, ...]:
        # a worker process maps the files again; a pickled map would be a copy of the corpus
        if self._paths:
            return Tokens.from_files, (self._paths, self.dtype)
        return Tokens, (self._arrays,)


def join(parts: Sequence[Tokens]) -> Tokens:
    """Several sequences in memory or in files of this machine as one."""
    paths = [path for part in parts for path in part._paths]
    return Tokens([array for part in parts for array in part._arrays], paths)


def spread(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """The numbers of ranges, one range after the other: [3, 9], [2, 3] → [3, 4, 9, 10, 11]."""
    ends = np.cumsum(lengths)
    return np.repeat(starts - (ends - lengths), lengths) + np.arange(int(ends[-1]) if len(ends) else 0)


def _memory(address: int, n: int, typestr: str, stride: int, is_read_only: bool = True) -> np.ndarray:
    """`n` overlapping items of a numpy type, one every `stride` bytes from an address on."""
    interface = {
        "version": 3, "data": (address, is_read_only), "shape": (n,), "typestr": typestr,
        "strides": (stride,),
    }  # fmt: skip
    memory: Any = types.SimpleNamespace(__array_interface__=interface)
    return np.asarray(memory)


OTHER_FILES = 512  # files and connections that a process may have open in addition to its shards


def allow_open_files(n: int) -> None:
    """Let `n` more files stay open, as mapped ones do, if the system permits it (Linux allows 1,024)."""
    import resource  # only POSIX has it

    limit, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = n + OTHER_FILES
    if limit != resource.RLIM_INFINITY and limit < wanted:
        limit = wanted if most == resource.RLIM_INFINITY else min(wanted, most)
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, most))


_WRITE_ERRORS = (
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO,
    errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST,
)  # fmt: skip
_REMEDY = (
    "cannot be written. Free some space, or set data_dir to a writable folder with more "
    "space, and run again: finished work is kept"
)


@contextlib.contextmanager
def writing(folder: Path, what: str = "the tokens") -> Iterator[None]:
    """Make an OSError name the file in `folder` that cannot be written, and the remedy."""
    try:
        yield
    except OSError as error:
        path = str(error.filename or folder)
        is_inside = os.path.abspath(path).startswith(os.path.abspath(folder))
        is_explained = error.errno not in _WRITE_ERRORS or error.strerror != os.strerror(error.errno)
        if is_explained or not is_inside:
            raise
        raise OSError(error.errno, f"{error.strerror}: {what} {_REMEDY}", path) from error
