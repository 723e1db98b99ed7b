"""Where a build writes its shards, and a record of each work unit that is finished.

`FolderOutput` writes to a folder. `UrlOutput` in remote/publish.py uploads to a URL.
"""

import contextlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from lit_gptdata._io import as_json, write_whole
from lit_gptdata.tokens.manifest import ShardEntry
from lit_gptdata.tokens.shards import FileShardWriter, ShardWriter, writing

Shards = list[ShardEntry]


class ShardOutput(Protocol):
    """A destination for shards; picklable, because worker processes write to it."""

    def shard_writer(self, name: str, dtype: np.dtype[np.unsignedinteger]) -> ShardWriter:
        """A writer of the shard with this name."""

    def add_record(self, unit: int, shards: Shards) -> None:
        """Record that a work unit is finished and that these are its shards."""

    def finished_units(self) -> dict[int, Shards]:
        """The shards of each recorded work unit whose files have the recorded sizes."""

    def remove_unfinished(self, finished: Mapping[int, Shards]) -> None:
        """Remove the files of other work units, which a killed build or its last workers left."""

    @property
    def shared_folder(self) -> Path | None:
        """A folder that every worker must see; None if workers write to a URL."""


@dataclass(frozen=True)
class FolderOutput:
    """Shards in `folder`/store and records in `folder`/parts; every method raises OSError."""

    folder: Path

    def shard_writer(self, name: str, dtype: np.dtype[np.unsignedinteger]) -> ShardWriter:
        return FileShardWriter(self.folder / "store", name, dtype)

    def add_record(self, unit: int, shards: Shards) -> None:
        path = self.shared_folder / record_name(unit)
        with writing(path):
            write_whole(path, record(shards))

    def finished_units(self) -> dict[int, Shards]:
        records = {path.name: path.read_bytes() for path in self.shared_folder.glob("*.json")}
        return read_records(records, self._size)

    def _size(self, name: str) -> int | None:
        # called for recorded files only: a worker's temporary file may vanish before stat()
        path = self.folder / "store" / name
        return path.stat().st_size if path.is_file() else None

    def remove_unfinished(self, finished: Mapping[int, Shards]) -> None:
        keep = {file.name for shards in finished.values() for shard in shards for file in shard.files}
        for path in (self.folder / "store").iterdir():
            if path.name not in keep:
                path.unlink(missing_ok=True)

    @property
    def shared_folder(self) -> Path:
        return self.folder / "parts"


def record_name(unit: int) -> str:
    return f"{unit:05d}.json"


def record(shards: Shards) -> bytes:
    return as_json([asdict(shard) for shard in shards])


def read_records(records: dict[str, bytes], size_of: Callable[[str], int | None]) -> dict[int, Shards]:
    """The work units with a readable record, if each file has the recorded size."""
    finished = {}
    for name, content in sorted(records.items()):
        with contextlib.suppress(ValueError, KeyError, TypeError):
            shards = [ShardEntry.from_dict(shard) for shard in json.loads(content)]
            if all(size_of(file.name) == file.size for shard in shards for file in shard.files):
                finished[int(name.removesuffix(".json"))] = shards
    return finished
