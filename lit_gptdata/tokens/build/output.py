"""Write shards, and a record of each work unit that is finished, to a folder or a URL."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from lit_gptdata._io import AtomicFile, as_json, write_whole
from lit_gptdata.text.remote_file import map_in_threads
from lit_gptdata.tokens.manifest import FileEntry, ShardEntry
from lit_gptdata.tokens.shards import ROW

Shards = list[ShardEntry]

BATCH_BYTES = 1 << 22
"""Ids that are hashed and written at once, in a thread. gigatoken holds Python's lock most of the time,
so the thread waits some milliseconds for each of its steps: they must be few."""


class Files(Protocol):
    """Named files, each complete or absent: a `Folder`, or `Objects` below a URL. Picklable."""

    def read(self, name: str) -> bytes:
        """The content of a file."""

    def write(self, name: str, content: bytes) -> None:
        """Write a file atomically."""

    def create(self, name: str) -> Any:
        """A new file: `write` its content, `commit`, then `close`. Without `commit` nothing remains."""

    def sizes(self) -> dict[str, int]:
        """The size in bytes of every file, by name."""


@dataclass(frozen=True)
class Folder:
    """The files of a folder on this machine; every method raises OSError."""

    path: Path

    def read(self, name: str) -> bytes:
        return (self.path / name).read_bytes()

    def write(self, name: str, content: bytes) -> None:
        write_whole(self.path / name, content)

    def create(self, name: str) -> AtomicFile:
        return AtomicFile(self.path / name)

    def sizes(self) -> dict[str, int]:  # not of temporary files, which may vanish
        return {path.name: path.stat().st_size for path in self.path.glob("[!.]*")}


@dataclass(frozen=True)
class ShardOutput:
    """A destination for shards, and for records of work units; picklable, because workers use it."""

    store: Files
    records: Files

    def add_record(self, unit: int, shards: Shards) -> None:
        """Record that a work unit is finished and that these are its shards."""
        self.records.write(f"{unit:05d}.json", as_json([asdict(shard) for shard in shards]))

    def finished_units(self) -> dict[int, Shards]:
        """The shards of each work unit with a readable record, if each file has the recorded size."""
        finished, sizes = {}, self.store.sizes()
        names = sorted(name for name in self.records.sizes() if name.endswith(".json"))
        for name, content in zip(names, map_in_threads(self.records.read, names), strict=True):
            with contextlib.suppress(ValueError, KeyError, TypeError):
                shards = [ShardEntry.from_dict(shard) for shard in json.loads(content)]
                if all(sizes.get(file.name) == file.size for shard in shards for file in shard.files):
                    finished[int(name.removesuffix(".json"))] = shards
        return finished

    def remove_unfinished(self, finished: Mapping[int, Shards]) -> None:
        """Remove the files of other work units, which a killed build or its last workers left."""
        if not isinstance(self.store, Folder):
            return  # a run on another machine may write the same files now
        keep = {file.name for shards in finished.values() for shard in shards for file in shard.files}
        for path in self.store.path.iterdir():
            if path.name not in keep:
                path.unlink(missing_ok=True)


class ShardWriter:
    """Writes one shard: its ids, and an index of its chunks. The files get their names in `finish`."""

    def __init__(self, store: Files, name: str, dtype: np.dtype[np.unsignedinteger]) -> None:
        self.n_tokens = self.n_bytes = self.n_documents = 0
        self._store, self._name, self._dtype = store, name, dtype
        self._file = store.create(f"{name}.bin")
        self._rows: list[tuple[int, int, int, int]] = []
        self._batch, self._digest = bytearray(), hashlib.sha256()
        self._thread = ThreadPoolExecutor(1)
        self._in_progress = self._thread.submit(self._hash_and_write, b"")

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
        self._in_progress.result()
        self._in_progress = self._thread.submit(self._hash_and_write, self._batch)
        self._batch = bytearray()

    def _hash_and_write(self, ids: bytes | bytearray) -> None:
        self._digest.update(ids)
        self._file.write(ids)

    def finish(self) -> ShardEntry:
        """Give the files their names and return the shard's entry for the manifest."""
        self._write_batch()
        index = np.array(self._rows, dtype=ROW).tobytes()
        self._in_progress.result()
        self._thread.shutdown()
        self._store.write(f"{self._name}.idx", index)
        self._file.commit()
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
        self._file.close()
