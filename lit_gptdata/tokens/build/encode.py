"""Encode a corpus into shards, one work unit at a time.

A work unit is several small files or a slice of a large one. Its shards depend on the text alone, so any
number of workers writes the same bytes: unit 3 becomes the shards 00003-000, 00003-001, …
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import time
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

import lit_gptdata.tokens.build.filters as filters
from lit_gptdata._io import as_json, progress_bar
from lit_gptdata.text.document import Document
from lit_gptdata.text.formats import FileSlice, Reading, format_of, read_documents
from lit_gptdata.text.remote_file import map_in_threads, size_of
from lit_gptdata.tokens.build.output import ShardOutput, Shards, ShardWriter
from lit_gptdata.tokens.build.plan import BuildOptions, BuildPlan, check_document
from lit_gptdata.tokens.chunks import safe_chunks
from lit_gptdata.tokens.engines import Engine, load_engine
from lit_gptdata.tokens.manifest import FileEntry, LeftOut, ShardEntry, total
from lit_gptdata.tokens.tokenizer import Tokenizer

OnProgress = Callable[[int, int], object]
"""Called with the UTF-8 bytes and the tokens written since its last call."""

WorkUnits = dict[int, list[FileSlice]]

Runner = Callable[["Encoder", WorkUnits, OnProgress], dict[int, Shards]]
"""Returns the shards of each unit; raises the errors of `Encoder`, RuntimeError if workers are lost."""


def encode_corpus(plan: BuildPlan, output: ShardOutput, run: Runner) -> tuple[Shards, list[LeftOut]]:
    """Encode the unfinished work units, or all in one pass.

    Returns all shards in order, and what the filters left out of each part of the corpus.
    """
    reading = plan.corpus.reading or Reading()
    encoder = Encoder(plan.tokenizer, plan.options, plan.shard_bytes, reading, output)
    units = plan.work_units()
    if not units:
        return _encode_in_one_pass(plan.corpus, encoder)
    finished = output.finished_units()
    output.remove_unfinished(finished)
    encoder, units, left_out = _filtered(encoder, units, run)
    remaining = {unit: slices for unit, slices in units.items() if unit not in finished}
    files = plan.corpus.files
    n_bytes = sum(map(size_of, files)) if all(format_of(f).cut != "never" for f in files) else None
    with progress_of("tokenizing", n_bytes) as progress:
        for shards in finished.values():
            progress.add(bytes_and_tokens(shards)[0])
        if remaining:
            finished |= run(encoder, remaining, progress.add)
    first = next((unit for unit in units if finished[unit]), 0)
    if first:  # the units before it have no documents, so it must not start with a separator
        finished[first] = replace(encoder, first_unit=first).encode_unit(first, units[first])
    output.remove_unfinished(finished)
    shards = [shard for unit in units for shard in finished[unit]]
    return shards, [left_out, *(filters.left_out_of(output, units) if plan.options.filters else [])]


def _encode_in_one_pass(corpus: Iterable[Document], encoder: Encoder) -> tuple[Shards, list[LeftOut]]:
    with progress_of("tokenizing", None) as progress:
        if not encoder.options.filters:
            return encoder.encode(0, corpus, progress.add), []
        if encoder.options.drop_duplicates:
            replace(encoder, hashes_only=True).encode(0, filters.joined(corpus), lambda *_: None)
            filters.find_copies(encoder.output, [0], {})
        shards = encoder.encode(0, filters.joined(corpus), progress.add)
        return shards, filters.left_out_of(encoder.output, [0])


def _filtered(encoder: Encoder, units: WorkUnits, run: Runner) -> tuple[Encoder, WorkUnits, LeftOut]:
    """Decide about each text file that is cut into slices, because a worker sees only a slice of it.

    Returns the work units without the files that are left out. If duplicates are dropped, it reads all
    documents, to record which of them a worker leaves out.
    """
    cut = [s for slices in units.values() for s in slices if s.start]
    files = {s.number: s.path for s in cut if format_of(s.path).cut == "inside_text"}
    judged, bad, left_out = dict.fromkeys(files, b""), {}, LeftOut()
    if encoder.options.filters:
        whole = [FileSlice(path=path, number=number) for number, path in files.items()]
        for file, (problem, hashed) in zip(whole, map_in_threads(encoder.judge, whole), strict=True):
            judged[file.number] = hashed
            if problem:
                bad[file.number] = problem
    encoder, units = replace(encoder, judged=judged), _without(units, bad)
    if encoder.options.drop_duplicates:
        records = set(encoder.output.record_names())
        remaining = {unit: units[unit] for unit in units if f"{unit:05d}.hash" not in records}
        with progress_of("hashing", None) as progress:
            if remaining:
                run(replace(encoder, hashes_only=True), remaining, progress.add)
        bad |= dict.fromkeys(filters.find_copies(encoder.output, units, judged), filters.COPY)
        units = _without(units, bad)
    for number in sorted(bad):
        filters.add(left_out, Document(source="", chunks=(), number=number), bad[number])
    return encoder, units, left_out


def _without(units: WorkUnits, files: Container[int]) -> WorkUnits:
    return {unit: [s for s in slices if s.number not in files] for unit, slices in units.items()}


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
    judged: Mapping[int, bytes] = field(default_factory=dict)
    """The files that are cut into slices: number → hash of the text. Each is one document."""
    hashes_only: bool = False
    """`encode` writes the hashes of the documents instead of their tokens."""

    @functools.cached_property
    def engine(self) -> Engine:
        """Loaded once per worker, because it takes a second and caches the words of earlier units."""
        return load_engine(self.tokenizer, self.options.engine)

    def encode_unit(
        self, unit: int, slices: Iterable[FileSlice], on_progress: OnProgress = lambda *_: None
    ) -> Shards:
        """`encode` the documents of some slices."""
        return self.encode(unit, self.read(slices), on_progress)

    def read(self, slices: Iterable[FileSlice]) -> Iterator[Document]:
        """The documents of some slices, with the bad ones if they are skipped later."""
        keep_bad = self.options.on_bad_document == "skip"
        return itertools.chain.from_iterable(read_documents(s, self.reading, keep_bad) for s in slices)

    def judge(self, file: FileSlice) -> tuple[filters.Problem | None, bytes]:
        """What `problem_of` says about the only document of a file, and the hash of its text."""
        (document,), hashed = self.read([file]), filters.digest()
        if self.options.on_bad_document == "skip":
            return filters.problem_of(document, self.options, hashed.update), hashed.digest()
        for block in self.limited(document):
            hashed.update(block)
        return None, hashed.digest()

    def encode(self, unit: int, documents: Iterable[Document], on_progress: OnProgress) -> Shards:
        """Write and record the shards of a work unit; its ValueError or OSError names the source."""
        left_out = LeftOut()
        if self.options.filters:
            is_known = self.options.drop_duplicates and not self.hashes_only
            content = self.output.read_record(f"{unit:05d}.copies") if is_known else b""
            documents = filters.kept(documents, self.options, self.judged, map(bool, content), left_out)
        if self.hashes_only:
            return self._hash(unit, documents, on_progress)
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
            self.output.write_record(f"{unit:05d}.left", as_json(asdict(left_out)))
        self.output.add_record(unit, shards)
        return shards

    def _hash(self, unit: int, documents: Iterable[Document], on_progress: OnProgress) -> Shards:
        """Record the hashes of the documents of a work unit, and return one shard for the progress."""
        rows, n_bytes = bytearray(), 0
        for document in documents:
            if document.continues:
                continue
            if (hashed := self.judged.get(document.number)) is None:
                text = filters.digest()
                for block in self.limited(document):
                    text.update(block)
                    n_bytes += len(block)
                    on_progress(len(block), 0)
                hashed = text.digest()
            rows += document.number.to_bytes(4, "little") + hashed
        self.output.write_record(f"{unit:05d}.hash", bytes(rows))
        file = FileEntry.describe(f"{unit:05d}.hash", bytes(rows))
        return [ShardEntry(n_tokens=0, n_bytes=n_bytes, n_documents=0, files=(file, file))]

    def _shard_writer(self, unit: int, shard: int) -> ShardWriter:
        return self.output.shard_writer(f"{unit:05d}-{shard:03d}", self.tokenizer.dtype)

    def _chunks(self, document: Document, engine: Engine) -> Iterator[tuple[bytes, np.ndarray]]:
        try:
            continues = document.continues
            for chunk in safe_chunks(self.limited(document), self.tokenizer.cut_rule):
                yield chunk, engine.encode(chunk, continues)
                continues = True
        except ValueError as error:
            if document.source in str(error):
                raise
            kind = UnicodeError if isinstance(error, UnicodeError) else ValueError
            raise kind(f"{document.source}: {error}") from None

    def limited(self, document: Document) -> Iterator[bytes]:
        """The text of a document; raises ValueError outside the limits."""
        low, high = self.options.min_document_bytes, self.options.max_document_bytes
        n_bytes = 0
        for block in document.chunks:
            n_bytes += len(block)
            check_document(document.source, n_bytes, None, high)
            yield block
        if not document.continues and document.number not in self.judged:
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
