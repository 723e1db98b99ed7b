"""Where the shards of a build go, and a note of every part that is whole: a folder, or a URL."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from lit_gptdata._fsspec import is_url
from lit_gptdata._io import as_json, write_json
from lit_gptdata.text.remote_file import map_in_threads
from lit_gptdata.tokens.manifest import ShardEntry
from lit_gptdata.tokens.remote.objects import Objects
from lit_gptdata.tokens.shards import FileShard, ShardWriter, writing

Shards = list[ShardEntry]


class Destination(Protocol):
    """Where shards go; picklable, for the processes that write them."""

    def shard(self, name: str, dtype: np.dtype[np.unsignedinteger]) -> ShardWriter:
        """What writes a shard."""

    def keep(self, part: int, shards: Shards) -> None:
        """Note that these are the shards of a part, and whole."""

    def kept(self) -> dict[int, Shards]:
        """The parts that were noted and whose shards are there, by their sizes."""

    def remove_all_but(self, parts: Mapping[int, Shards]) -> None:
        """Remove what a kill left half-written."""

    @property
    def notes_folder(self) -> Path | None:
        """Where notes are, if that is a folder that whoever writes shards has to see."""


@dataclass(frozen=True)
class InFolder:
    """A folder: shards in store/, notes in parts/."""

    folder: Path

    def shard(self, name: str, dtype: np.dtype[np.unsignedinteger]) -> ShardWriter:
        """What writes a shard; raises OSError."""
        return FileShard(self.folder / "store", name, dtype)

    def keep(self, part: int, shards: Shards) -> None:
        """Note that these are the shards of a part, and whole; raises OSError."""
        note = self.notes_folder / _note(part)
        with writing(note):
            write_json(note, [shard.to_dict() for shard in shards])

    def kept(self) -> dict[int, Shards]:
        """The parts that were noted and whose shards are there, by their sizes."""
        notes = {path.name: path.read_bytes() for path in self.notes_folder.glob("*.json")}
        return _whole(notes, self._size)

    def _size(self, name: str) -> int | None:
        path = self.folder / "store" / name  # of those alone that are noted: others may vanish meanwhile
        return path.stat().st_size if path.is_file() else None

    def remove_all_but(self, parts: Mapping[int, Shards]) -> None:
        """Remove what a kill left half-written, or a worker in the moment after its parent's death."""
        keep = {file.name for shards in parts.values() for shard in shards for file in shard.files}
        for path in (self.folder / "store").iterdir():
            if path.name not in keep:
                path.unlink(missing_ok=True)

    @property
    def notes_folder(self) -> Path:
        """Where notes are."""
        return self.folder / "parts"


@dataclass(frozen=True)
class AtUrl:
    """Files below a URL, and notes below another; a shard is held in memory until it is sent."""

    store: Objects
    notes: Objects

    def shard(self, name: str, dtype: np.dtype[np.unsignedinteger]) -> ShardWriter:
        """What writes a shard; raises RemoteError."""
        return SentShard(self.store, name, dtype)

    def keep(self, part: int, shards: Shards) -> None:
        """Note that these are the shards of a part, and whole; raises RemoteError."""
        self.notes.write(_note(part), as_json([shard.to_dict() for shard in shards]))

    def kept(self) -> dict[int, Shards]:
        """The parts that were noted and whose shards are there, by their sizes."""
        names = [name for name in self.notes.sizes() if name.endswith(".json")]
        notes = dict(zip(names, map_in_threads(self.notes.read, names), strict=True))
        return _whole(notes, self.store.sizes().get)

    def remove_all_but(self, parts: Mapping[int, Shards]) -> None:
        """Nothing: another machine may be at the same work, and what it writes has the same names."""

    @property
    def notes_folder(self) -> Path | None:
        """Where notes are, if the URL is a path."""
        return None if is_url(self.notes.url) else Path(self.notes.url)


class SentShard(ShardWriter):
    """A shard at a URL; raises RemoteError."""

    def __init__(self, store: Objects, name: str, dtype: np.dtype[np.unsignedinteger]) -> None:
        super().__init__(name, dtype)
        self._store = store
        self._ids = io.BytesIO()

    def abandon(self) -> None:
        """Nothing was sent; what was finished stays."""

    def _write(self, ids: memoryview) -> None:
        self._ids.write(ids)

    def _put(self, index: bytes) -> None:
        self._store.write(f"{self._name}.idx", index)
        self._store.write(f"{self._name}.bin", self._ids.getvalue())


def _note(part: int) -> str:
    return f"{part:05d}.json"


def _whole(notes: Mapping[str, bytes], size: Callable[[str], int | None]) -> dict[int, Shards]:
    """The parts whose notes can be read and whose files have the size that is noted."""
    whole = {}
    for name, note in sorted(notes.items()):
        with contextlib.suppress(ValueError, KeyError, TypeError):
            shards = [ShardEntry.from_dict(shard) for shard in json.loads(note)]
            if all(size(file.name) == file.size for shard in shards for file in shard.files):
                whole[int(name.removesuffix(".json"))] = shards
    return whole
