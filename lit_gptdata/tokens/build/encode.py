"""Encode a corpus into shards, one work unit at a time.

A work unit is several small files or a slice of a large one. Its shards depend on the text alone, so any
number of workers writes the same bytes: unit 3 becomes the shards 00003-000, 00003-001, …
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

import lit_gptdata.tokens.build.filters as filters
from lit_gptdata._io import as_json, progress_bar
from lit_gptdata.text.document import Corpus, Document
from lit_gptdata.text.formats import FileSlice, Reading, format_of, read_documents
from lit_gptdata.text.remote_file import size_of
from lit_gptdata.tokens.build.output import ShardOutput, Shards, ShardWriter
from lit_gptdata.tokens.build.plan import BuildOptions, BuildPlan, check_document
from lit_gptdata.tokens.chunks import safe_chunks
from lit_gptdata.tokens.engines import Engine, load_engine
from lit_gptdata.tokens.manifest import LeftOut, total
from lit_gptdata.tokens.tokenizer import Tokenizer

OnProgress = Callable[[int, int], object]
"""Called with the UTF-8 bytes and the tokens written since its last call."""

Parts = Sequence[FileSlice | Corpus]
"""What a work unit reads: slices of files, or all of your own corpus."""

WorkUnits = Mapping[int, Parts]

Runner = Callable[["Encoder", WorkUnits, OnProgress], dict[int, Shards]]
"""Returns the shards of each unit; raises the errors of `Encoder`, RuntimeError if workers are lost."""


def encode_corpus(plan: BuildPlan, output: ShardOutput, run: Runner) -> tuple[Shards, list[LeftOut]]:
    """Encode the unfinished work units.

    Returns all shards in order, and what the filters left out of each work unit.
    """
    reading = plan.corpus.reading or Reading()
    encoder = Encoder(plan.tokenizer, plan.options, plan.shard_bytes, reading, output)
    units, files = plan.work_units(), plan.corpus.files
    run = run if files else encode_here  # your own corpus may not be picklable
    finished = output.finished_units()
    output.remove_unfinished(finished)
    if plan.options.drop_duplicates:
        records = output.records.sizes()
        unread = {unit: parts for unit, parts in units.items() if f"{unit:05d}.hash" not in records}
        if unread:
            with progress_of("hashing", None) as progress:
                run(replace(encoder, hashes_only=True), unread, progress.add)
        filters.find_copies(output.records, units)
    remaining = {unit: parts for unit, parts in units.items() if unit not in finished}
    is_plain = files and all(format_of(file).cut != "never" for file in files)
    with progress_of("tokenizing", sum(map(size_of, files)) if is_plain else None) as progress:
        for shards in finished.values():
            progress.add(bytes_and_tokens(shards)[0])
        if remaining:
            finished |= run(encoder, remaining, progress.add)
    first = next((unit for unit in units if finished[unit]), 0)
    if first:  # the units before it have no documents, so it must not start with a separator
        finished[first] = replace(encoder, first_unit=first).encode_unit(first, units[first])
    output.remove_unfinished(finished)
    shards = [shard for unit in units for shard in finished[unit]]
    return shards, filters.left_out_of(output.records, units) if plan.options.filters else []


def encode_here(encoder: Encoder, units: WorkUnits, on_progress: OnProgress) -> dict[int, Shards]:
    """A `Runner` without other processes."""
    return {unit: encoder.encode_unit(unit, units[unit], on_progress) for unit in units}


@dataclass(frozen=True)
class Encoder:
    """Encodes work units into shards, one after another; each worker gets a copy."""

    tokenizer: Tokenizer
    options: BuildOptions
    shard_bytes: int
    reading: Reading
    output: ShardOutput
    first_unit: int = 0
    """The corpus starts with this unit, so its first document needs no separator."""
    hashes_only: bool = False
    """Write the hashes of the documents instead of their tokens."""

    @functools.cached_property
    def engine(self) -> Engine:
        """Loaded once per worker, because it takes a second and caches the words of earlier units."""
        return load_engine(self.tokenizer, self.options.engine)

    def encode_unit(self, unit: int, parts: Parts, on_progress: OnProgress = lambda *_: None) -> Shards:
        """Write and record the shards of a work unit; its ValueError or OSError names the source."""
        documents, left_out = self._read(parts), LeftOut()
        if self.options.filters:
            is_known = self.options.drop_duplicates and not self.hashes_only
            copies = self.output.records.read(f"{unit:05d}.copies") if is_known else b""
            documents = filters.kept(documents, self.options, map(bool, copies), left_out)
        if self.hashes_only:
            self._hash(unit, documents, on_progress)
            return []
        engine = self.engine  # an unusable engine is reported before any problem with a document
        bos = [] if self.tokenizer.bos_id is None else [self.tokenizer.bos_id]
        shards: Shards = []
        writer = self._shard_writer(unit, 0)
        try:
            for index, document in enumerate(documents):
                starts = not document.continues
                if starts and (unit, index) != (self.first_unit, 0):
                    writer.append([self.tokenizer.end_of_document], 0)
                for chunk, ids in self._chunks(document, engine):
                    if writer.n_bytes >= self.shard_bytes:
                        shards.append(writer.finish())
                        writer = self._shard_writer(unit, len(shards))
                    writer.start_chunk(document.number, starts)
                    writer.append(bos if starts else [], 0)
                    writer.append(ids, len(chunk))
                    on_progress(len(chunk), len(ids))
                    starts = False
                if starts:  # an empty document
                    writer.start_chunk(document.number, True)
                    writer.append(bos, 0)
            if writer.n_tokens or writer.n_documents:
                shards.append(writer.finish())
        finally:
            writer.discard()
        if self.options.filters:
            self.output.records.write(f"{unit:05d}.left", as_json(asdict(left_out)))
        self.output.add_record(unit, shards)
        return shards

    def _read(self, parts: Parts) -> Iterator[Document]:
        """The documents of a work unit, with the bad ones if they are skipped later."""
        keep_bad = self.options.on_bad_document == "skip"
        for part in parts:
            if isinstance(part, FileSlice):
                yield from read_documents(part, self.reading, keep_bad)
            else:
                yield from part

    def _hash(self, unit: int, documents: Iterable[Document], on_progress: OnProgress) -> None:
        """Record the hashes of the documents of a work unit."""
        hashes = bytearray()
        for document in documents:
            text = filters.digest()
            for block in self._limited(document):
                text.update(block)
                on_progress(len(block), 0)
            hashes += text.digest()
        self.output.records.write(f"{unit:05d}.hash", bytes(hashes))

    def _shard_writer(self, unit: int, shard: int) -> ShardWriter:
        return ShardWriter(self.output.store, f"{unit:05d}-{shard:03d}", self.tokenizer.dtype)

    def _chunks(self, document: Document, engine: Engine) -> Iterator[tuple[bytes, np.ndarray]]:
        try:
            continues = document.continues
            for chunk in safe_chunks(self._limited(document), self.tokenizer.cut_rule):
                yield chunk, engine.encode(chunk, continues)
                continues = True
        except ValueError as error:
            if document.source in str(error):
                raise
            kind = UnicodeError if isinstance(error, UnicodeError) else ValueError
            raise kind(f"{document.source}: {error}") from None

    def _limited(self, document: Document) -> Iterator[bytes]:
        """The text of a document; raises ValueError outside the limits."""
        low, high = self.options.min_document_bytes, self.options.max_document_bytes
        n_bytes = 0
        for block in document.chunks:
            n_bytes += len(block)
            check_document(document.source, n_bytes, None, high)
            yield block
        if not document.continues:
            check_document(document.source, n_bytes, low, None)


def bytes_and_tokens(shards: Shards) -> tuple[int, int]:
    """The arguments of an `OnProgress` for these shards."""
    return total(shards, "n_bytes"), total(shards, "n_tokens")


# Progress ------------------------------------------------------------------------------------------


class _Progress:
    """A progress bar of bytes, with tokens per second."""

    def __init__(self, bar: Any) -> None:
        self._bar, self._tokens, self._start = bar, 0, time.perf_counter()

    def add(self, n_bytes: int, n_tokens: int = 0) -> None:
        self._tokens += n_tokens
        if self._tokens:
            rate = self._tokens / (time.perf_counter() - self._start)
            self._bar.set_postfix_str(f"{rate:,.0f} tokens/s", refresh=False)
        self._bar.update(n_bytes)


@contextlib.contextmanager
def progress_of(activity: str, total: int | None) -> Iterator[_Progress]:
    """A progress bar over `total` bytes (None: unknown)."""
    with progress_bar(desc=activity, total=total, unit="B") as bar:
        yield _Progress(bar)
