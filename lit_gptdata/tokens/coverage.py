"""Which sources a range of tokens covers, and whether val is the same as in the last run.

describe(covered(store, begin, end))  ->  "the last 37 % of books/y.txt, all of books/z.txt"
"""

import bisect
import contextlib
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lit_gptdata._fsspec import redacted
from lit_gptdata._io import as_json, write_json
from lit_gptdata.tokens.store import TokenStore

NAMED_SOURCES = 3  # in the description of a long list


@dataclass(frozen=True, kw_only=True)
class Covered:
    """The part of a source that a range covers, from `begin` to `end`: fractions of its UTF-8 bytes."""

    path: str
    """Path or name of the source when the store was built."""
    sha256: str
    """SHA-256 (hex) of the file's contents, or the fingerprint of your own corpus."""
    begin: float = 0.0
    end: float = 1.0

    def __str__(self) -> str:
        begin, end, path = _percent(self.begin), _percent(self.end), redacted(self.path)
        if self.begin and self.end < 1:
            return f"{begin} to {end} of {path}"
        if self.begin:
            return f"the last {_percent(1 - self.begin)} of {path}"
        return f"the first {end} of {path}" if self.end < 1 else f"all of {path}"


def covered(store: TokenStore, begin: int, end: int) -> list[Covered]:
    """The sources of tokens [begin, end), in order; [] for a range without text.

    Reads the indexes of O(log shards) shards, and the tokens of at most two chunks.
    """
    start, stop = store.byte_at(begin), store.byte_at(end)
    if start >= stop:
        return []
    first, last = _source_at(store, start), _source_at(store, stop - 1)
    edges = {s: (_first_byte(store, s), _first_byte(store, s + 1)) for s in (first, last)}
    parts = []
    for number, source in enumerate(store.manifest.sources[first : last + 1], first):
        low, high = edges.get(number, (start, stop))  # a source between the two is covered completely
        size = high - low
        fractions = {"begin": max(0, start - low) / size, "end": min(size, stop - low) / size}
        parts.append(Covered(path=source.path, sha256=source.sha256, **fractions))
    return parts


def describe(parts: list[Covered]) -> str:
    """What is covered, for people; a long list is shortened."""
    if not parts:
        return "nothing"
    if (rest := len(parts) - NAMED_SOURCES) <= 1:
        return ", ".join(map(str, parts))
    last = redacted(parts[-1].path)
    return f"{describe(parts[:NAMED_SOURCES])}, … and {rest:,} more files up to {last}"


def changed_val(root: Path, key: Any, val: list[Covered]) -> str | None:
    """A warning if val covers other text than in the last run with the same `key`, else None.

    `key`: what users choose, in plain values. A file below `root` remembers what val covers.
    """
    record = root / ".val" / f"{hashlib.sha256(as_json(key)).hexdigest()[:32]}.json"
    parts = as_json([[part.sha256, part.begin, part.end] for part in val])
    now = {"covers": describe(val), "sha256": hashlib.sha256(parts).hexdigest()}
    last: Any = None
    with contextlib.suppress(OSError, ValueError, RecursionError):
        last = json.loads(record.read_bytes())
    if last == now:
        return None
    with contextlib.suppress(OSError):
        record.parent.mkdir(parents=True, exist_ok=True)
        write_json(record, now)
    if not isinstance(last, dict) or last.keys() != now.keys() or last["sha256"] == now["sha256"]:
        return None
    was = "other contents or borders of"
    if last["covers"] != now["covers"]:
        was = f"it was {last['covers']}, now it is"
    return f"val changed since the last run: {was} {now['covers']}; val losses of the two do not compare"


def _source_at(store: TokenStore, byte: int) -> int:
    """The source of a byte of the store's text."""
    _, rows, row = store.row_at("byte", byte)
    return store.source_number(rows[row])


def _first_byte(store: TokenStore, source: int) -> int:
    """The first byte of a source, or the end of the store's text after the last source."""
    if source == len(store.manifest.sources):
        return store.n_bytes
    last_of = lambda shard: store.rows(shard)["source"][-1]  # noqa: E731
    shard = bisect.bisect_left(range(len(store.shards)), source, key=last_of)
    if shard == len(store.shards):  # the remaining sources have no documents
        return store.n_bytes
    rows = store.rows(shard)
    return int(rows["byte"][np.searchsorted(rows["source"], source)])


def _percent(fraction: float) -> str:
    """0.372 → "37 %"; more digits for parts near nothing and near the whole."""
    percent = 100 * fraction
    digits = ".2g" if percent < 1 else ".0f" if percent < 99 else ".2f"
    return f"{percent:{digits}} %"
