"""Token files of other programs as a corpus, from which `prepare_store` makes a store.

Every id is kept. In a format without documents, an end-of-document id ends one. Where a document starts
with such an id, as llm.c writes it, or the last one ends with it, as nanoGPT does, it is a part of it.
"""

import hashlib
import itertools
import logging
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from lit_gptdata._io import as_json
from lit_gptdata.interop.blocks import Block
from lit_gptdata.interop.formats import Format
from lit_gptdata.text.document import Document, SourceEntry
from lit_gptdata.text.files import printable
from lit_gptdata.tokens.build.encode import progress_of
from lit_gptdata.tokens.build.output import ShardOutput, Shards
from lit_gptdata.tokens.manifest import Manifest
from lit_gptdata.tokens.shards import ShardWriter
from lit_gptdata.tokens.store import vocab_table
from lit_gptdata.tokens.tokenizer import Tokenizer

CHUNK_IDS = 1 << 14  # at most, from one row of the index to the next: about 64 KiB of text
SHARD_IDS = 1 << 24  # in a shard: about 64 MiB of text

log = logging.getLogger(__name__)


def separator_of(tokenizer: Tokenizer) -> int | None:
    """The id that ends a document, or None."""
    with suppress(ValueError):
        return tokenizer.end_of_document
    return None


@dataclass(kw_only=True)
class IdFiles:
    """Files of ids, and how to read them; raises ValueError that names a file and a place in it."""

    format: Format
    files: list[tuple[str, Path]]
    """(split, file), in the order train, val, test."""
    tokenizer: Tokenizer
    dtype: np.dtype
    """Of ids without a header."""
    column: str | None
    separate: bool
    """Put an end-of-document id between documents that have none."""
    _begins: dict[str, int] = field(default_factory=dict)
    _sources: list[SourceEntry] = field(default_factory=list)

    def __repr__(self) -> str:
        names = [(split, printable(file.absolute())) for split, file in self.files]
        how = [
            self.format.suffix,
            self.format.read.__module__,
            self.dtype.str,
            self.column,
            self.separate,
        ]
        return f"{len(names)} files of ids, {self.files[0][1]}, … ({_hash([names, how])[:16]})"

    @property
    def fingerprint(self) -> str:
        """Of the sizes and times of the files."""
        paths = [file.with_suffix(suffix) for _, file in self.files for suffix in (file.suffix, ".bin")]
        stats = [path.stat() for path in paths if path.is_file()]
        return _hash([[s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino] for s in stats])

    def __iter__(self) -> Iterator[Document]:
        raise NotImplementedError("its documents are ids")

    def write(self, output: ShardOutput) -> Shards:
        """Write all ids as shards."""
        output.remove_unfinished({})  # of a killed process
        readers = [self.format.read(file, self.dtype, self.column) for _, file in self.files]
        n_bytes = sum(file.stat().st_size for _, file in self.files)
        writer = IdWriter(self.tokenizer, output, self.separate)
        try:
            with progress_of("importing", n_bytes) as progress:
                for (split, file), blocks in zip(self.files, readers, strict=True):
                    self._begins.setdefault(split, writer.n_ids)
                    digest, size = hashlib.sha256(), file.stat().st_size
                    for ids in writer.add(file, blocks):
                        digest.update(ids.data)
                        progress.add(ids.nbytes, len(ids))
                    name = printable(file.absolute())
                    self._sources.append(SourceEntry(path=name, size=size, sha256=digest.hexdigest()))
            shards = writer.finish()
        except BaseException:
            writer.discard()
            output.remove_unfinished({})
            raise
        if writer.n_joined:
            log.warning(
                "%s documents have no end-of-document id before them, so windows run on into the next "
                "document without a mark. To put an id there: --separate",
                f"{writer.n_joined:,}",
            )
        return shards

    def complete(self, manifest: Manifest) -> Manifest:
        """The manifest with the sources and the split, and a fingerprint of all that is in the store."""
        test = self._begins.get("test", manifest.n_tokens)
        val = self._begins.get("val", test)
        cuts = (val, test) if len(self._begins) > 1 else None
        files = [file.sha256 for shard in manifest.shards for file in shard.files]
        fingerprint = _hash([manifest.format, manifest.tokenizer.fingerprint, cuts, files])
        entry = replace(manifest.tokenizer, bos=False)  # the files may have a BOS id or not
        return replace(
            manifest, fingerprint=fingerprint, tokenizer=entry, sources=self._sources, cuts=cuts
        )


class IdWriter:
    """Writes ids into shards, which depend on ids, documents and files, but not on the blocks."""

    def __init__(self, tokenizer: Tokenizer, output: ShardOutput, separate: bool) -> None:
        self.n_ids = self.n_joined = self._n_files = 0
        self._tokenizer, self._output, self._separate = tokenizer, output, separate
        end = separator_of(tokenizer)
        self._separator = -1 if end is None else end
        self._lengths = vocab_table(tokenizer)["n_bytes"].astype(np.int64)
        self._last = -1  # the id before the next block
        self._shards: Shards = []
        self._writer = self._new_shard()

    def _new_shard(self) -> ShardWriter:
        return self._output.shard_writer(f"00000-{len(self._shards):03d}", self._tokenizer.dtype)

    def finish(self) -> Shards:
        return [*self._shards, self._writer.finish()]

    def discard(self) -> None:
        self._writer.discard()

    def add(self, path: Path, blocks: Iterator[Block]) -> Iterator[np.ndarray]:
        """Write the ids of a file, and yield them as they are in the store."""
        is_first, size = True, self._tokenizer.vocab_size
        for found, starts, (unit, first, step) in blocks:
            if len(found) and not 0 <= found.min() <= found.max() < size:
                index = int(np.flatnonzero((found < 0) | (found >= size))[0])
                raise ValueError(
                    f"{path}, {unit} {first + index * step:,}: {self._tokenizer.name!r} has no id "
                    f"{found[index]}, only [0, {size:,}). Give the tokenizer that made the ids, "
                    "tokenizer=…, or if they are of another type, --dtype"
                )
            ids = found.astype(self._tokenizer.dtype)
            before = np.append(self._last, ids)[:-1]
            is_start = np.zeros(len(ids), bool)
            if starts is not None:
                is_start[starts] = True
                ids, is_start = self._separated(ids, before, is_start)
            else:
                is_start = (before == self._separator) | (before < 0)
                is_start[1:2] &= not (is_first and is_start[0])
            self._write(ids, is_start, is_first)
            yield ids
            is_first = False
        self._n_files += 1

    def _separated(
        self, ids: np.ndarray, before: np.ndarray, is_start: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Count the documents without a separator before them, or add it."""
        is_joined = is_start & (before != self._separator) & (before >= 0)
        if self._separate:
            places = np.flatnonzero(is_joined)
            return np.insert(ids, places, self._separator), np.insert(is_start, places, False)
        self.n_joined += int(is_joined.sum()) if self._separator >= 0 else 0
        return ids, is_start

    def _write(self, ids: np.ndarray, is_start: np.ndarray, is_first: bool) -> None:
        """Write ids in chunks, which end after a special token: it has no bytes of text."""
        lengths = self._lengths[ids]
        starts_chunk = np.append(self._lengths[self._last], lengths)[:-1] == 0
        if self._tokenizer.adds_space:
            lengths[is_start & (lengths > 0)] -= 1
        starts_chunk |= is_start
        starts_chunk[:1] |= is_first
        starts_chunk[-self.n_ids % CHUNK_IDS :: CHUNK_IDS] = True
        sums = np.append(0, np.cumsum(lengths)).tolist()
        bounds = [0, *(np.flatnonzero(starts_chunk[1:]) + 1).tolist(), len(ids)]
        for begin, end in itertools.pairwise(bounds):
            if begin < end and starts_chunk[begin]:
                if self._writer.n_tokens >= SHARD_IDS:
                    self._shards.append(self._writer.finish())
                    self._writer = self._new_shard()
                self._writer.start_chunk(self._n_files, bool(is_start[begin]))
            self._writer.append(ids[begin:end], sums[end] - sums[begin])
        self.n_ids += len(ids)
        self._last = int(ids[-1]) if len(ids) else self._last


def _hash(value: object) -> str:
    return hashlib.sha256(as_json(value)).hexdigest()[:32]
