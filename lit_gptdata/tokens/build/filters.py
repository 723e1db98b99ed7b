"""Leave out bad documents and later copies of a text, with counts and examples for the manifest.

documents ──kept()──▶ documents to encode, and a `LeftOut` of each work unit ──▶ the manifest

A duplicate is known only when all texts before it are. So a first pass over the text writes a record of
hashes for each work unit, and `find_copies` makes of them a record of the documents that are copies.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import IO, Any

import numpy as np

from lit_gptdata._io import CHUNK_BYTES
from lit_gptdata.text.document import Corpus, Document
from lit_gptdata.text.files import FilesCorpus
from lit_gptdata.text.formats import INVALID
from lit_gptdata.text.remote_file import map_in_threads
from lit_gptdata.tokens.build.output import Files
from lit_gptdata.tokens.build.plan import BuildOptions
from lit_gptdata.tokens.manifest import EXAMPLES, LeftOut

SPOOL_BYTES = 16 << 20  # of a document in memory; a longer one is in a temporary file
PART_HASHES = 1 << 22  # compared at once, in about 200 MB
BLOCK_HASHES = 1 << 20  # read at once

HASH = np.dtype([("low", "<u8"), ("high", "<u8")])
"""The BLAKE2b hash of one text, 16 bytes."""


def kept(
    parts: Iterable[Document], options: BuildOptions, copies: Iterable[bool], left_out: LeftOut
) -> Iterator[Document]:
    """The documents that are encoded, in one part each; the others are added to `left_out`.

    `copies`: for each good document, whether its text came earlier; empty: not known yet.
    """
    is_copy = iter(copies)
    for document in joined(parts):
        with tempfile.SpooledTemporaryFile(SPOOL_BYTES) as spool:
            problem = None
            if options.on_bad_document == "skip":  # read all of it before any of it is written
                problem = problem_of(document, options, spool)
                spool.seek(0)
                document = replace(document, chunks=iter(lambda: spool.read(CHUNK_BYTES), b""))
            if problem is None and next(is_copy, False):
                problem = "duplicate", "an earlier document has the same text"
            if problem is None:
                yield document
                continue
        kind, reason = problem
        left_out.counts[kind] = left_out.counts.get(kind, 0) + 1
        if left_out.counts[kind] <= EXAMPLES:
            place = document.source if document.place is None else document.place
            example = {"source": document.number, "place": place, "kind": kind, "reason": reason}
            left_out.examples.append(example)


def filtered(corpus: Corpus, options: BuildOptions) -> Iterator[Document]:
    """The documents of a corpus that a build with `options` encodes, for other uses of the text."""

    def documents() -> Iterator[Document]:
        if isinstance(corpus, FilesCorpus):
            return corpus.documents(keep_bad=options.on_bad_document == "skip")
        return iter(corpus)

    if not options.filters:
        return iter(corpus)
    copies: Iterable[bool] = ()
    if options.drop_duplicates:
        hashes = bytearray()
        for document in kept(documents(), options, (), LeftOut()):
            text = digest()
            for block in document.chunks:
                text.update(block)
            hashes += text.digest()
        copies = later_copies(np.frombuffer(hashes, HASH))
    return kept(documents(), options, copies, LeftOut())


def joined(parts: Iterable[Document]) -> Iterator[Document]:
    """Whole documents: each one with the chunks of the parts that continue it."""
    parts, same = itertools.tee(parts)
    numbers = itertools.accumulate(not part.continues for part in same)
    for _, group in itertools.groupby(zip(numbers, parts, strict=True), lambda pair: pair[0]):
        document = (part for _, part in group)
        first = next(document)
        rest = itertools.chain.from_iterable(part.chunks for part in document)
        yield replace(first, chunks=itertools.chain(first.chunks, rest))


def problem_of(document: Document, options: BuildOptions, text: IO[bytes]) -> tuple[str, str] | None:
    """(kind, reason) of a bad document; writes its text, up to the limit, to `text`."""
    low, high = options.min_document_bytes, options.max_document_bytes
    n_bytes, problem = 0, document.problem
    try:
        for block in () if problem else document.chunks:
            n_bytes += len(block)
            if high is not None and n_bytes > high:
                return "too long", f"over {high:,} bytes"
            text.write(block)
    except UnicodeError as error:
        problem = INVALID, str(error)
    if problem:
        kind, message = problem
        return kind, message.removeprefix(document.source).partition(". ")[0].strip(": ")
    if not n_bytes:
        return "empty", "0 bytes"
    return ("too short", f"{n_bytes:,} bytes") if low is not None and n_bytes < low else None


def digest() -> Any:
    """A hash of 16 bytes: that two of 10^12 different texts share one has odds below 1 in 10^14."""
    return hashlib.blake2b(digest_size=16)


def later_copies(hashes: np.ndarray) -> np.ndarray:
    """HASH (N,), perhaps memory-mapped → bool (N,): True if the hash of an earlier row is the same.

    Memory is 2 bytes for each row, and 200 MB: it compares the rows of one remainder at a time.
    """
    copies = np.zeros(len(hashes), bool)
    n_parts = 1 + len(hashes) // PART_HASHES
    for part in range(n_parts):
        is_chosen = np.zeros(len(hashes), bool)
        for start in range(0, len(hashes), BLOCK_HASHES):
            block = slice(start, start + BLOCK_HASHES)
            is_chosen[block] = hashes["low"][block] % n_parts == part
        chosen = np.flatnonzero(is_chosen)
        low, high = hashes["low"][chosen], hashes["high"][chosen]
        order = np.lexsort((low, high))  # stable, so equal hashes stay in the order of the corpus
        is_same = (np.diff(low[order]) == 0) & (np.diff(high[order]) == 0)
        copies[chosen[order[1:]][is_same]] = True
    return copies


def find_copies(records: Files, units: Iterable[int]) -> None:
    """Record which documents of each work unit are copies."""
    with tempfile.TemporaryFile() as file:
        sizes = {unit: file.write(records.read(f"{unit:05d}.hash")) for unit in units}
        file.flush()
        n = file.tell() // HASH.itemsize
        copies = later_copies(np.memmap(file, HASH, "r", shape=n) if n else np.empty(0, HASH))
    begin = 0
    for unit, size in sizes.items():
        end = begin + size // HASH.itemsize
        records.write(f"{unit:05d}.copies", copies[begin:end].tobytes())
        begin = end


def left_out_of(records: Files, units: Iterable[int]) -> list[LeftOut]:
    """What the work units recorded."""
    contents = map_in_threads(records.read, [f"{unit:05d}.left" for unit in units])
    return [LeftOut(**json.loads(content)) for content in contents]
