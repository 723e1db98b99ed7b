"""Leave out bad documents and later copies of a text, with counts and examples for the manifest.

documents ──kept()──▶ documents to encode, and a `LeftOut` of each work unit ──merged()──▶ the manifest
documents ──hash_of()──▶ a row of HASH each ──later_copies()──▶ True for a text that came earlier
"""

from __future__ import annotations

import functools
import hashlib
import tempfile
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from lit_gptdata._io import CHUNK_BYTES
from lit_gptdata.text.document import Document, SourceEntry
from lit_gptdata.text.formats import INVALID
from lit_gptdata.tokens.build.plan import BuildOptions
from lit_gptdata.tokens.manifest import LeftOut

EXAMPLES = 3  # of each kind, in a manifest
SPOOL_BYTES = 16 << 20  # of a document in memory; a longer one is in a temporary file
PART_HASHES = 1 << 22  # compared at once, in about 200 MB
BLOCK_HASHES = 1 << 20  # read at once

HASH = np.dtype([("source", "<i4"), ("low", "<u8"), ("high", "<u8")])
"""A row of one document: the index of its source, and the BLAKE2b hash of its text, 16 bytes."""


def kept(
    documents: Iterable[Document], options: BuildOptions, judged: Container[int], copies: np.ndarray,
    left_out: LeftOut,
) -> Iterator[Document]:  # fmt: skip
    """The documents that are encoded; the others are added to `left_out`.

    `judged`: numbers of the files that are cut into work units, which were checked as a whole.
    `copies`: bool, True for each other good document whose text came earlier; empty: not known yet.
    """
    number = 0
    for document in documents:
        if document.continues or document.number in judged:
            yield document
            continue
        with tempfile.SpooledTemporaryFile(SPOOL_BYTES) as spool:
            problem = None
            if options.on_bad_document == "skip":  # read all of it before any of it is written
                problem = problem_of(document, options, spool.write)
                document = replace(document, chunks=_read(spool))
            if problem is None:
                if number < len(copies) and copies[number]:
                    problem = COPY
                number += 1
            if problem is None:
                yield document
            else:
                add(left_out, document, problem)


COPY = "duplicate", "an earlier document has the same text"


def _read(spool: Any) -> Iterator[bytes]:
    spool.seek(0)
    yield from iter(functools.partial(spool.read, CHUNK_BYTES), b"")


def problem_of(
    document: Document, options: BuildOptions, on_block: Callable[[bytes], object]
) -> tuple[str, str] | None:
    """(kind, reason) of a bad document; `on_block` gets its text. Reads no more than needed."""
    low, high = options.min_document_bytes, options.max_document_bytes
    n_bytes, problem = 0, document.problem
    try:
        for block in () if problem else document.chunks:
            n_bytes += len(block)
            if high is not None and n_bytes > high:
                return "too long", f"over {high:,} bytes"
            on_block(block)
    except UnicodeError as error:
        problem = INVALID, str(error)
    if problem:
        kind, message = problem
        return kind, message.removeprefix(document.source).partition(". ")[0].strip(": ")
    if not n_bytes:
        return "empty", "0 bytes"
    return ("too short", f"{n_bytes:,} bytes") if low is not None and n_bytes < low else None


def add(left_out: LeftOut, document: Document, problem: tuple[str, str]) -> None:
    """Count a document that is left out."""
    kind, reason = problem
    left_out.counts[kind] = left_out.counts.get(kind, 0) + 1
    if left_out.counts[kind] <= EXAMPLES:
        place = document.source if document.place is None else document.place
        left_out.examples.append(
            {"source": document.number, "place": place, "kind": kind, "reason": reason}
        )


def merged(parts: Iterable[LeftOut], sources: Sequence[SourceEntry]) -> LeftOut | None:
    """All that was left out, with the first examples in corpus order, which name their source."""
    counts: Counter[str] = Counter()
    examples: list[dict[str, Any]] = []
    for part in parts:
        counts.update(part.counts)
        examples += part.examples
    if not counts:
        return None
    examples.sort(key=lambda example: example["source"])
    by_kind = {k: [e for e in examples if e["kind"] == k][:EXAMPLES] for k in sorted(counts)}
    # your own corpus is one source, even if it numbers its documents
    name = lambda example: sources[min(example["source"], len(sources) - 1)].path  # noqa: E731
    first = [example | {"source": name(example)} for k in by_kind for example in by_kind[k]]
    return LeftOut(counts=dict(sorted(counts.items())), examples=first)


def digest() -> Any:
    """A hash of a text, of 16 bytes: two texts of 10^12 have the same one with odds of 1 in 10^14."""
    return hashlib.blake2b(digest_size=16)


def later_copies(hashes: np.ndarray) -> np.ndarray:
    """HASH (N,), perhaps memory-mapped → bool (N,): True if the hash of an earlier row is the same.

    Memory is 1 byte for each row, and 200 MB: it compares the rows of one remainder at a time.
    """
    copies = np.zeros(len(hashes), bool)
    n_parts = 1 + len(hashes) // PART_HASHES
    for part in range(n_parts):
        starts = range(0, len(hashes), BLOCK_HASHES)
        blocks = [hashes["low"][start : start + BLOCK_HASHES] % n_parts == part for start in starts]
        chosen = np.concatenate([s + np.flatnonzero(b) for s, b in zip(starts, blocks, strict=True)])
        low, high = hashes["low"][chosen], hashes["high"][chosen]
        order = np.lexsort((low, high))  # stable, so equal hashes stay in the order of the corpus
        is_same = (np.diff(low[order]) == 0) & (np.diff(high[order]) == 0)
        copies[chosen[order[1:]][is_same]] = True
    return copies
