"""Token files of other programs as a corpus, from which `prepare_store` makes a store.

Every id is kept. In a format without documents, an end-of-document id ends one. Where a document starts
with such an id, as llm.c writes it, or the last one ends with it, as nanoGPT does, it is a part of it.
"""

import hashlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path

import numpy as np

from lit_gptdata._io import as_json
from lit_gptdata.interop.blocks import Block
from lit_gptdata.text.document import Document, SourceEntry
from lit_gptdata.text.files import printable
from lit_gptdata.tokens.build.encode import progress_of
from lit_gptdata.tokens.build.output import ShardOutput, Shards, ShardWriter
from lit_gptdata.tokens.manifest import Manifest
from lit_gptdata.tokens.store import vocab_table
from lit_gptdata.tokens.tokenizer import Tokenizer

CHUNK_IDS = 1 << 14  # at most, from one row of the index to the next: about 64 KiB of text
SHARD_DOCUMENTS = 1 << 18  # their rows of the index are in memory
SHARD_IDS = 1 << 24  # ids per shard, or a few more: about 64 MiB of text

log = logging.getLogger(__name__)


def separator_of(tokenizer: Tokenizer) -> int:
    """The id that ends a document, or -1."""
    return -1 if tokenizer.separator is None else tokenizer.separator


@dataclass(kw_only=True)
class IdFiles:
    """Files of ids; raises ValueError that names a file and a place in it."""

    name: str
    """The format and the options of `read`."""
    files: list[tuple[str, Path]]
    """(split, file), in the order train, val, test."""
    read: Callable[[Path], Iterator[Block]]
    tokenizer: Tokenizer
    separate: bool
    """Put an end-of-document id between documents that have none."""
    _begins: dict[str, int] = field(default_factory=dict)  # split → its first token
    _sources: list[SourceEntry] = field(default_factory=list)

    def __repr__(self) -> str:
        names = [self.separate, *((split, printable(file.absolute())) for split, file in self.files)]
        return f"{len(self.files)} {self.name} files, {self.files[0][1]}, … ({_hash(names)[:16]})"

    @property
    def fingerprint(self) -> str:
        """Of sizes and times of the files, Megatron's .bin included."""
        paths = [file.with_suffix(suffix) for _, file in self.files for suffix in (file.suffix, ".bin")]
        stats = [path.stat() for path in paths if path.is_file()]
        return _hash([[s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino] for s in stats])

    def __iter__(self) -> Iterator[Document]:
        raise NotImplementedError("its documents are ids")

    def write(self, output: ShardOutput) -> Shards:
        """Write all ids as shards, which depend on ids, documents and files, but not on the format."""
        output.remove_unfinished({})  # of a killed process
        shards, readers = Shards(), [self.read(file) for _, file in self.files]
        writer = ShardWriter(output.store, "00000-000", self.tokenizer.dtype)
        n_bytes_of_files = sum(file.stat().st_size for _, file in self.files)
        try:
            with progress_of("importing", n_bytes_of_files) as progress:
                for row, ids, n_bytes in self._chunks(readers):
                    if row:
                        if writer.n_tokens >= SHARD_IDS or writer.n_documents >= SHARD_DOCUMENTS:
                            shards.append(writer.finish())
                            name = f"00000-{len(shards):03d}"
                            writer = ShardWriter(output.store, name, self.tokenizer.dtype)
                        writer.start_chunk(*row)
                    writer.append(ids, n_bytes)
                    progress.add(ids.nbytes, len(ids))
            return [*shards, writer.finish()]
        except BaseException:
            writer.discard()
            output.remove_unfinished({})
            raise

    def _chunks(
        self, readers: list[Iterator[Block]]
    ) -> Iterator[tuple[tuple[int, bool] | None, np.ndarray, int]]:
        """(source and whether a document starts, or None to continue; ids; bytes of text) of all files.

        A chunk ends after a special token, which has no bytes of text.
        """
        table = vocab_table(self.tokenizer)
        lengths_of = table["n_bytes"].astype(np.int64)
        last, n_ids, n_joined = -1, 0, 0
        separator = self.tokenizer.end_of_document if self.separate else separator_of(self.tokenizer)
        for source, (split, file) in enumerate(self.files):
            self._begins.setdefault(split, n_ids)
            digest, is_first = hashlib.sha256(), True
            for block in readers[source]:
                if not len(ids := self._checked(file, block)):
                    continue  # rows without ids
                before = np.append(last, ids)[:-1]
                follows_end = (before == separator) | (before < 0)
                is_document, in_text = follows_end.copy(), False
                if n_ids == self._begins[split]:  # no document continues in another split
                    in_text, is_document[0] = not (follows_end[0] or n_joined), True
                is_document[1:2] &= not (is_first and is_document[0])
                if block.starts is not None:
                    joined = block.starts[~follows_end[block.starts]]
                    n_joined += len(joined)
                    is_document[:] = False
                    is_document[block.starts] = True
                    if self.separate:
                        ids = np.insert(ids, joined, separator)
                        is_document = np.insert(is_document, joined, False)
                        before = np.append(last, ids)[:-1]
                is_edge = is_document | (lengths_of[before] == 0)
                is_edge[0] |= is_first
                is_edge[-n_ids % CHUNK_IDS :: CHUNK_IDS] = True
                lengths = lengths_of[ids]
                has_space = is_document & table["starts_space"][ids]
                has_space[0] &= not in_text
                lengths[has_space] -= self.tokenizer.adds_space
                bounds = np.unique(np.append([0, len(ids)], np.flatnonzero(is_edge)))
                sizes = np.diff(np.append(0, np.cumsum(lengths))[bounds]).tolist()
                for (begin, end), n_bytes in zip(pairwise(bounds.tolist()), sizes, strict=True):
                    row = (source, bool(is_document[begin])) if is_edge[begin] else None
                    yield row, ids[begin:end], n_bytes
                digest.update(ids.data)
                last, n_ids, is_first = int(np.append(last, ids)[-1]), n_ids + len(ids), False
            name, size = printable(file.absolute()), file.stat().st_size
            self._sources.append(SourceEntry(path=name, size=size, sha256=digest.hexdigest()))
        if n_joined and separator >= 0 and not self.separate:
            what = "start without an end-of-document id before them. To add it, use --separate"
            log.warning("%s documents %s", f"{n_joined:,}", what)

    def _checked(self, file: Path, block: Block) -> np.ndarray:
        """The ids in the store's dtype; raises ValueError for one that the tokenizer does not have."""
        found, size, (unit, first, step) = block.ids, self.tokenizer.vocab_size, block.place
        if len(found) and not 0 <= found.min() <= found.max() < size:
            i = int(np.flatnonzero((found < 0) | (found >= size))[0])
            file = file.with_suffix(".bin") if file.suffix == ".idx" else file
            other = ", or the type, --dtype" * self.name.startswith("nanogpt")
            raise ValueError(
                f"{file}, {unit} {first + i * step:,}: {self.tokenizer.name!r} has no id {found[i]}, "
                f"only [0, {size:,}). Give the tokenizer that made it, tokenizer=…{other}"
            )
        return found.astype(self.tokenizer.dtype)

    def complete(self, manifest: Manifest) -> Manifest:
        """The manifest with the sources and the split, and a fingerprint of the ids and documents.

        Raises ValueError for a split without a window.
        """
        ends = [*self._begins.values(), manifest.n_tokens][1:]
        for (split, begin), end in zip(self._begins.items(), ends, strict=True):
            if len(ends) > 1 and end - begin < 2:
                file = next(file for has, file in self.files if has == split)
                problem = f"{file}: {split} has {end - begin} of the 2 tokens that a window needs"
                raise ValueError(f"{problem}: give more, or leave the files of {split} out")
        test = self._begins.get("test", manifest.n_tokens)
        cuts = (self._begins.get("val", test), test) if len(self._begins) > 1 else None
        files = [file.sha256 for shard in manifest.shards for file in shard.files]
        fingerprint = _hash([manifest.format, manifest.tokenizer.fingerprint, cuts, files])
        entry = replace(manifest.tokenizer, bos=False)  # whether the files have a BOS id is not known
        return replace(
            manifest, fingerprint=fingerprint, tokenizer=entry, sources=self._sources, cuts=cuts
        )


def _hash(value: object) -> str:
    return hashlib.sha256(as_json(value)).hexdigest()[:32]
