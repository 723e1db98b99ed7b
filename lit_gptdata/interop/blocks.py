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
    """Where the ids are in the file, for messages: "offset", offset of the first one, bytes of each."""


def read_binary(
    path: Path, dtype: np.dtype, offset: int, n_ids: int, starts: np.ndarray | None = None
) -> Iterator[Block]:
    """The ids from byte `offset` of a file on. `starts`: of documents, counted in ids."""
    with open(path, "rb") as file:
        file.seek(offset)
        for begin in range(0, n_ids, BLOCK_IDS):
            ids, inside = np.fromfile(file, dtype, min(BLOCK_IDS, n_ids - begin)), None
            if starts is not None:
                low, high = np.searchsorted(starts, [begin, begin + len(ids)])
                inside = starts[low:high] - begin
            yield Block(ids, inside, ("offset", offset + begin * dtype.itemsize, dtype.itemsize))


@dataclass(frozen=True)
class Part:
    """The tokens [begin, end) of a store. `separator`: the id that ends a document, or None."""

    store: TokenStore
    begin: int
    end: int
    separator: int | None

    @property
    def starts_with_separator(self) -> bool:
        return bool((self.store.tokens[self.begin : self.begin + 1] == self.separator).all())

    def blocks(self) -> Iterator[Block]:
        """The ids and documents, a shard at a time; a leading separator is in the first document."""
        shard_end, first = 0, self.begin + self.starts_with_separator
        for number, shard in enumerate(self.store.shards):
            shard_begin, shard_end = shard_end, shard_end + shard.n_tokens
            begin, end = max(self.begin, shard_begin), min(self.end, shard_end)
            if begin < end:
                ids = self.store._read(shard.ids, self.store.dtype)  # a map would count as memory
                rows = self.store.rows(number)
                starts = rows["token"][(rows["document"] == 1) & (rows["token"] > first)]
                starts = np.unique(starts[(begin <= starts) & (starts < end)])
                starts = np.append(begin, starts) if begin == self.begin else starts
                yield Block(ids[begin - shard_begin : end - shard_begin], starts - begin)
