"""Documents to shards: what one process does of a build.

    write_part(job, 3, documents, …)  ->  shards 00003-000, 00003-001, … and their manifest entries

A part is a number of small files or a piece of a large one. Where parts and shards end depends on the
text alone, so any number of processes writes the same bytes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from lit_gptdata.text.document import Document
from lit_gptdata.tokens.build.output import Destination, Shards
from lit_gptdata.tokens.chunks import CutRule, cut_rule, pieces
from lit_gptdata.tokens.engines import Engine, EngineName
from lit_gptdata.tokens.shards import ShardWriter
from lit_gptdata.tokens.tokenizer import Tokenizer

SHARD_BYTES = 64 << 20
"""UTF-8 bytes of text in a shard and in a part: seconds of work, so that a kill costs little, and still
only 16,000 files for a terabyte."""

OnProgress = Callable[[int, int], object]
"""Called with the UTF-8 bytes and the tokens written since the last call."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is the same for every part of a build."""

    tokenizer: Tokenizer
    destination: Destination
    engine: EngineName = "auto"
    max_document_bytes: int | None = None
    """UTF-8 bytes; a longer document is refused. None: no limit."""

    shard_bytes: int = SHARD_BYTES

    @functools.cached_property
    def rule(self) -> CutRule | None:
        """Where texts may be cut for this tokenizer; None: nowhere."""
        encoding = self.tokenizer.encoding
        return cut_rule(encoding._pat_str, encoding.special_tokens_set)

    @functools.cached_property
    def separator(self) -> np.ndarray:
        """The id between two documents, (1,)."""
        return np.array([self.tokenizer.end_of_text], dtype=self.tokenizer.dtype)

    def writer(self, part: int, shard: int) -> ShardWriter:
        """Writes shard number `shard` of a part."""
        return self.destination.shard(f"{part:05d}-{shard:03d}", self.tokenizer.dtype)


def write_part(
    job: Job,
    part: int,
    documents: Iterable[Document],
    engine: Engine,
    on_progress: OnProgress,
    *,
    leads: bool = False,
) -> Shards:
    """Encode a part into shards and note them there; returns their entries for the manifest.

    `leads`: no document comes before this part's, so that no separator does.
    Raises ValueError that names the document, OSError that names the file or the URL.
    """
    shards: Shards = []
    writer = job.writer(part, 0)
    try:
        for index, document in enumerate(documents):
            begins = not document.continues
            if begins and not (leads and index == 0):
                writer.append(job.separator, 0)
            for piece, ids in _encoded(document, job, engine):
                if writer.n_bytes >= job.shard_bytes:
                    shards.append(writer.finish())
                    writer = job.writer(part, len(shards))
                writer.begin_piece(document.number, begins)
                writer.append(ids, len(piece))
                on_progress(len(piece), len(ids))
                begins = False
            if begins:  # an empty document
                writer.begin_piece(document.number, True)
        if writer.n_tokens or writer.n_documents:
            shards.append(writer.finish())
    finally:
        writer.abandon()
    job.destination.keep(part, shards)
    return shards


def _encoded(document: Document, job: Job, engine: Engine) -> Iterator[tuple[bytes, np.ndarray]]:
    """The pieces of a document with their ids."""
    try:
        for piece in pieces(_bounded(document, job.max_document_bytes), job.rule):
            yield piece, engine.encode(piece)
    except ValueError as error:
        if document.source in str(error):
            raise
        kind = UnicodeError if isinstance(error, UnicodeError) else ValueError
        raise kind(f"{document.source}: {error}") from None


def _bounded(document: Document, limit: int | None) -> Iterator[bytes]:
    n_bytes = 0
    for chunk in document.chunks:
        n_bytes += len(chunk)
        if limit is not None and n_bytes > limit:
            raise ValueError(
                f"the document is longer than max_document_bytes={limit:,}: leave it out, or raise "
                "the limit"
            )
        yield chunk
