"""Encode a corpus into shards, one work unit at a time.

A work unit is several small files or a slice of a large one. Its shards depend on the text alone, so any
number of workers writes the same bytes: unit 3 becomes the shards 00003-000, 00003-001, …
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from lit_gptdata._io import as_json, progress_bar
from lit_gptdata.text.document import Document
from lit_gptdata.text.formats import FileSlice, Reading, format_of, read_documents
from lit_gptdata.text.remote_file import map_in_threads, size_of
from lit_gptdata.tokens.build.filters import COPY, HASH, add, digest, kept, later_copies, problem_of
from lit_gptdata.tokens.build.output import ShardOutput, Shards, ShardWriter
from lit_gptdata.tokens.build.plan import BuildOptions, BuildPlan, check_document
from lit_gptdata.tokens.chunks import safe_chunks
from lit_gptdata.tokens.engines import Engine, load_engine
from lit_gptdata.tokens.manifest import LeftOut, total
from lit_gptdata.tokens.tokenizer import Tokenizer

OnProgress = Callable[[int, int], object]
"""Called with the UTF-8 bytes and the tokens written since its last call."""

WorkUnits = dict[int, list[FileSlice]]


Runner = Callable[["Encoder", WorkUnits, OnProgress], dict[int, Shards]]
"""Returns the shards of each unit; raises the errors of `Encoder`, RuntimeError if workers are lost."""


def encode_corpus(plan: BuildPlan, output: ShardOutput, run: Runner) -> tuple[Shards, list[LeftOut]]:
    """Encode the unfinished work units, or all in one pass; returns all shards, in order.

    And what was left out, of parts of the corpus.
    """
    reading = plan.corpus.reading or Reading()
    encoder = Encoder(plan.tokenizer, plan.options, plan.shard_bytes, reading, output)
    units = plan.work_units()
    if not units:
        with progress_of("tokenizing", None) as progress:
            if plan.options.drop_duplicates:
                replace(encoder, hashes_only=True).encode(0, plan.corpus, lambda *_: None)
                _find_copies(encoder, [0])
            return encoder.encode(0, plan.corpus, progress.add), _left_out(encoder, [0])
    finished = output.finished_units()
    output.remove_unfinished(finished)
    encoder, units, cut = _judge_cut_files(encoder, units)
    if plan.options.drop_duplicates:
        hashed = {int(name.removesuffix(".hash")) for name in output.records() if name.endswith(".hash")}
        with progress_of("hashing", None) as progress:
            remaining = {unit: slices for unit, slices in units.items() if unit not in hashed}
            if remaining:
                run(replace(encoder, hashes_only=True), remaining, progress.add)
        for copy in _find_copies(encoder, units):
            add(cut, Document(source="", chunks=(), number=copy, place=""), COPY)
            units = {unit: [s for s in slices if s.number != copy] for unit, slices in units.items()}
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
    return shards, [cut, *_left_out(encoder, units)]


def _judge_cut_files(encoder: Encoder, units: WorkUnits) -> tuple[Encoder, WorkUnits, LeftOut]:
    """Check each text file that is cut into slices as a whole, because a worker sees only a slice.

    Returns the encoder that knows them, the work units without bad files, and these.
    """
    options, left_out = encoder.options, LeftOut()
    cut = {
        s.number: FileSlice(path=s.path, number=s.number)
        for slices in units.values() for s in slices
        if s.start and format_of(s.path).cut == "inside_text"
    }  # fmt: skip
    if not options.filters:
        return replace(encoder, judged=dict.fromkeys(cut, b"")), units, left_out

    def judge(file: FileSlice) -> tuple[Document, tuple[str, str] | None, bytes]:
        hash = digest()
        (document,) = encoder.read([file])
        if options.on_bad_document == "skip":
            return document, problem_of(document, options, hash.update), hash.digest()
        for block in encoder.limited(document):
            hash.update(block)
        return document, None, hash.digest()

    judged = {}
    for number, (document, problem, hashed) in zip(
        cut, map_in_threads(judge, cut.values()), strict=True
    ):
        if problem:
            add(left_out, document, problem)
            units = {unit: [s for s in slices if s.number != number] for unit, slices in units.items()}
        judged[number] = hashed
    return replace(encoder, judged=judged), units, left_out


def _find_copies(encoder: Encoder, units: Iterable[int]) -> list[int]:
    """Record for each work unit which of its documents are copies; returns the cut files that are."""
    found, begin = [], 0
    with tempfile.TemporaryFile() as file:
        for unit in units:
            file.write(encoder.output.read_record(f"{unit:05d}.hash"))
        file.flush()
        size = file.tell() // HASH.itemsize
        hashes = np.memmap(file, HASH, "r", shape=size) if size else np.empty(0, HASH)
        copies = later_copies(hashes)
        for unit in units:
            n = len(encoder.output.read_record(f"{unit:05d}.hash")) // HASH.itemsize
            rows, flags = hashes["source"][begin : begin + n], copies[begin : begin + n]
            is_cut = np.isin(rows, list(encoder.judged))
            found += rows[is_cut & flags].tolist()
            encoder.output.write_record(f"{unit:05d}.copies", flags[~is_cut].tobytes())
            begin += n
    return found


def _left_out(encoder: Encoder, units: Iterable[int]) -> list[LeftOut]:
    if not encoder.options.filters:
        return []
    records = map_in_threads(encoder.output.read_record, [f"{unit:05d}.left" for unit in units])
    return [LeftOut(**json.loads(record)) for record in records]


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

    def encode(self, unit: int, documents: Iterable[Document], on_progress: OnProgress) -> Shards:
        """Write and record the shards of a work unit; its ValueError or OSError names the source."""
        left_out = LeftOut()
        if self.options.filters:
            is_known = self.options.drop_duplicates and not self.hashes_only
            content = self.output.read_record(f"{unit:05d}.copies") if is_known else b""
            copies = np.frombuffer(content, bool)
            documents = kept(documents, self.options, self.judged, copies, left_out)
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
        rows = []
        for document in documents:
            if document.continues:
                continue
            if (hashed := self.judged.get(document.number)) is None:
                hash = digest()
                for block in self.limited(document):
                    hash.update(block)
                    on_progress(len(block), 0)
                hashed = hash.digest()
            low, high = (int.from_bytes(part, "little") for part in (hashed[:8], hashed[8:]))
            rows.append((document.number, low, high))
        self.output.write_record(f"{unit:05d}.hash", np.array(rows, HASH).tobytes())
        return []

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
