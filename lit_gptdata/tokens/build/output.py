"""Write shards, and a record of each work unit that is finished, to a folder or a URL.

`FolderOutput` writes to a folder. `UrlOutput` in remote/publish.py uploads to a URL.
"""

import contextlib
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lit_gptdata._io import AtomicFile, as_json, write_whole
from lit_gptdata.text.remote_file import map_in_threads
from lit_gptdata.tokens.manifest import FileEntry, ShardEntry
from lit_gptdata.tokens.shards import ROW

Shards = list[ShardEntry]

BATCH_BYTES = 1 << 22
"""Ids that are hashed and written at once, in a thread. gigatoken holds Python's lock most of the time,
so the thread waits some milliseconds for each of its steps: they must be few."""


class ShardOutput:
    """A destination for shards and records of work units; picklable, because worker processes use it.

    A subclass has `open(name)`, a file to write the ids of a shard to; `save(name, file, index)`, which
    makes it the shard's .bin file and `index` its .idx file; `write_record(name, content)`,
    `read_record(name)`, and `record_names()`; `sizes()` of saved files by name; and
    `remove_unfinished(finished)`.
    """

    open: Callable[[str], Any]
    save: Callable[[str, Any, bytes], None]
    write_record: Callable[[str, bytes], None]
    read_record: Callable[[str], bytes]
    record_names: Callable[[], list[str]]
    sizes: Callable[[], dict[str, int]]
    remove_unfinished: Callable[[Mapping[int, Shards]], None]
    """Remove the files of other work units, which a killed build or its last workers left."""

    def shard_writer(self, name: str, dtype: np.dtype[np.unsignedinteger]) -> "ShardWriter":
        """A writer of the shard with this name."""
        return ShardWriter(self, name, dtype)

    def add_record(self, unit: int, shards: Shards) -> None:
        """Record that a work unit is finished and that these are its shards."""
        self.write_record(f"{unit:05d}.json", as_json([asdict(shard) for shard in shards]))

    def finished_units(self) -> dict[int, Shards]:
        """The shards of each work unit with a readable record, if each file has the recorded size."""
        finished, sizes = {}, self.sizes()
        names = sorted(name for name in self.record_names() if name.endswith(".json"))
        for name, content in zip(names, map_in_threads(self.read_record, names), strict=True):
            with contextlib.suppress(ValueError, KeyError, TypeError):
                shards = [ShardEntry.from_dict(shard) for shard in json.loads(content)]
                if all(sizes.get(file.name) == file.size for shard in shards for file in shard.files):
                    finished[int(name.removesuffix(".json"))] = shards
        return finished


class ShardWriter:
    """Writes one shard: its ids, and an index of its chunks. The files get their names in `finish`."""

    def __init__(self, output: ShardOutput, name: str, dtype: np.dtype[np.unsignedinteger]) -> None:
        self.n_tokens = self.n_bytes = self.n_documents = 0
        self._output, self._name, self._dtype = output, name, dtype
        self._file = output.open(name)
        self._rows: list[tuple[int, int, int, int]] = []
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

    def _write_batch(self) -> Future[None]:
        """Hash and write the last ids in a thread, after the ids before them are written."""
        if self._in_progress is not None:
            self._in_progress.result()
        self._in_progress = self._thread.submit(self._hash_and_write, self._batch)
        self._batch = bytearray()
        return self._in_progress

    def _hash_and_write(self, ids: bytearray) -> None:
        self._digest.update(ids)
        self._file.write(ids)

    def finish(self) -> ShardEntry:
        """Give the files their names and return the shard's entry for the manifest."""
        last = self._write_batch()
        index = np.array(self._rows, dtype=ROW).tobytes()
        last.result()
        self._thread.shutdown()
        self._output.save(self._name, self._file, index)
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
        if isinstance(self._file, AtomicFile):
            self._file.discard()


@dataclass(frozen=True)
class FolderOutput(ShardOutput):
    """Shards in `folder`/store and records in `folder`/parts; every method raises OSError."""

    folder: Path

    def open(self, name: str) -> AtomicFile:
        return AtomicFile(self.folder / "store" / f"{name}.bin")

    def save(self, name: str, file: AtomicFile, index: bytes) -> None:
        write_whole(file.path.with_suffix(".idx"), index)
        file.commit()

    def write_record(self, name: str, content: bytes) -> None:
        write_whole(self.folder / "parts" / name, content)

    def read_record(self, name: str) -> bytes:
        return (self.folder / "parts" / name).read_bytes()

    def record_names(self) -> list[str]:
        return [path.name for path in (self.folder / "parts").glob("[!.]*")]

    def sizes(self) -> dict[str, int]:  # not of temporary files, which may vanish
        return {path.name: path.stat().st_size for path in (self.folder / "store").glob("[!.]*")}

    def remove_unfinished(self, finished: Mapping[int, Shards]) -> None:
        keep = {file.name for shards in finished.values() for shard in shards for file in shard.files}
        for path in (self.folder / "store").iterdir():
            if path.name not in keep:
                path.unlink(missing_ok=True)
