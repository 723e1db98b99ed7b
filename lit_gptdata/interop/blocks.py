"""Blocks of ids, which every format reads and writes, so that memory stays flat."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lit_gptdata.tokens.store import TokenStore

BLOCK_IDS = 1 << 20


class Block(NamedTuple):
    """Consecutive ids: `Block(ids=[5, 6, 50256, 7], starts=[0, 3])`."""

    ids: np.ndarray
    """Integers of any dtype, (n,)."""
    starts: np.ndarray | None
    """Where documents start, in [0, n); None if the format has no documents."""
    place: tuple[str, int, int] = ("id", 0, 1)
    """For messages: ("offset", the byte of the first id in the file, bytes of an id)."""


def read_binary(
    path: Path, dtype: np.dtype, offset: int, n_ids: int, starts: np.ndarray | None = None
) -> Iterator[Block]:
    """The ids from byte `offset` of a file on. `starts`: of documents, counted in ids."""
    with open(path, "rb") as file:
        file.seek(offset)
        for begin in range(0, n_ids, BLOCK_IDS):
            end = min(begin + BLOCK_IDS, n_ids)
            inside = None if starts is None else _within(starts, begin, end)
            place = ("offset", offset + begin * dtype.itemsize, dtype.itemsize)
            yield Block(np.fromfile(file, dtype, end - begin), inside, place)


def _within(starts: np.ndarray, begin: int, end: int) -> np.ndarray:
    low, high = np.searchsorted(starts, [begin, end])
    return starts[low:high] - begin


@dataclass(frozen=True)
class Part:
    """The tokens [begin, end) of a store. `separator`: the id that ends a document, or -1."""

    store: TokenStore
    begin: int
    end: int
    separator: int

    @property
    def starts_with_separator(self) -> bool:
        return int(self.store.tokens[self.begin : self.begin + 1][0]) == self.separator

    def blocks(self) -> Iterator[Block]:
        """All ids with the documents; a separator at the start is in the first document."""
        shard_end, first = 0, self.begin + self.starts_with_separator
        for number, shard in enumerate(self.store.shards):
            shard_begin, shard_end = shard_end, shard_end + shard.n_tokens
            first_here, stop = max(self.begin, shard_begin), min(self.end, shard_end)
            if first_here >= stop:
                continue
            ids = self.store._read(shard.ids, self.store.dtype)  # a mapped shard would stay in memory
            starts = self.store.document_rows([number])["token"]
            # an empty document is left out
            starts = np.unique(np.append(self.begin, starts[starts > first]))
            for begin in range(first_here, stop, BLOCK_IDS):
                end = min(begin + BLOCK_IDS, stop)
                inside = _within(starts, begin, end)
                yield Block(ids[begin - shard_begin : end - shard_begin], inside)
