"""A corpus and a tokenizer: what their store is named by, and what its manifest says of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from lit_gptdata._checks import check_at_least
from lit_gptdata.text.document import Corpus, SourceEntry
from lit_gptdata.text.files import FilesCorpus, HashFiles, hash_files
from lit_gptdata.text.remote_file import size_of
from lit_gptdata.tokens.build.encode import Job
from lit_gptdata.tokens.build.output import Shards
from lit_gptdata.tokens.engines import EngineName, check_engine
from lit_gptdata.tokens.manifest import FORMAT, FileEntry, Manifest, TokenizerEntry, total
from lit_gptdata.tokens.tokenizer import Tokenizer

BuildName = Literal["processes", "ray"]


@dataclass(frozen=True, kw_only=True)
class BuildOptions:
    """How a store is built; none of these options changes a token.

    Raises ValueError or TypeError for a value out of range.
    """

    engine: EngineName = "auto"
    """"auto" | "tiktoken" | "gigatoken"."""

    build: BuildName = "processes"
    """"processes" of this machine, or "ray": tasks on a Ray cluster."""

    workers: int | None = 1
    """Processes or tasks at a time; None: one per core."""

    ray_address: str | None = None
    """Address of the Ray cluster, as `ray.init` takes it."""

    max_document_bytes: int | None = None
    """UTF-8 bytes; a longer document is refused. None: no limit."""

    def __post_init__(self) -> None:
        check_engine(self.engine)
        if self.build not in get_args(BuildName):
            raise ValueError(
                f"unknown build {self.build!r}: choose 'processes' (of this machine) or 'ray' (tasks on "
                "a Ray cluster, or on a local one)"
            )
        if self.workers is not None:
            check_at_least("build_workers", self.workers, 1, "the number of processes that tokenize")
        if self.max_document_bytes is not None:
            limit = self.max_document_bytes
            check_at_least("max_document_bytes", limit, 1, "the longest document in bytes")


DEFAULT_OPTIONS = BuildOptions()


@dataclass(frozen=True, kw_only=True)
class Request:
    """The tokens of a corpus that somebody wants."""

    corpus: Corpus
    tokenizer: Tokenizer

    @property
    def names(self) -> list[str]:
        """What the text is called, known without looking at it."""
        return self.corpus.names if isinstance(self.corpus, FilesCorpus) else [repr(self.corpus)]

    def file_stats(self) -> list[list[str | int]]:
        """What tells without reading whether the text is still the same: path, size, version."""
        if isinstance(self.corpus, FilesCorpus):
            return self.corpus.file_stats()
        return [[repr(self.corpus), self.corpus.fingerprint]]

    @property
    def reading(self) -> dict[str, Any]:
        """How the same bytes become text."""
        return asdict(self.corpus.reading) if isinstance(self.corpus, FilesCorpus) else {}

    def sources(
        self,
        on_bytes: Callable[[int], object] = lambda _: None,
        hash_files: HashFiles = hash_files,
    ) -> list[SourceEntry]:
        """What the tokens come from, for the manifest; reads all of it to hash it."""
        if isinstance(self.corpus, FilesCorpus):
            return self.corpus.sources(on_bytes, hash_files)
        return [SourceEntry(path=repr(self.corpus), size=None, sha256=self.corpus.fingerprint)]

    @property
    def n_file_bytes(self) -> int | None:
        """Bytes that `sources` reads; None where they are not in files."""
        if isinstance(self.corpus, FilesCorpus):
            return sum(map(size_of, self.corpus.files))
        return None

    def fingerprint(self, sources: list[SourceEntry]) -> str:
        """What the store is named by: contents and tokenizer, not paths and times."""
        contents = [[source.format, source.sha256] for source in sources]
        return _hash([FORMAT, self.tokenizer.fingerprint, self.reading, contents])

    @property
    def key(self) -> str:
        """What the request is named by, before any content is read: paths and tokenizer."""
        return _hash([FORMAT, self.tokenizer.fingerprint, self.reading, self.names])

    def plan(self, stamps: list[list[str | int]], job: Job) -> str:
        """What a build is named by: what another of the same plan left whole can be kept."""
        limit = job.max_document_bytes  # what is whole was within another limit
        return f"{self.key}-{_hash([FORMAT, stamps, job.shard_bytes, limit])}"

    def manifest(self, sources: list[SourceEntry], shards: Shards, vocab: bytes) -> Manifest:
        """The store's manifest; raises ValueError if there is no text in it."""
        if not any(shard.n_tokens for shard in shards):
            raise ValueError(f"{self.corpus!r} holds no text at all: give files with text in them")
        return Manifest(
            fingerprint=self.fingerprint(sources),
            tokenizer=TokenizerEntry(
                name=self.tokenizer.name,
                special_tokens=self.tokenizer.special_tokens,
                fingerprint=self.tokenizer.fingerprint,
                vocab_size=self.tokenizer.vocab_size,
                dtype=self.tokenizer.dtype.str,
            ),
            reading=self.reading,
            n_tokens=total(shards, "n_tokens"),
            n_bytes=total(shards, "n_bytes"),
            n_documents=total(shards, "n_documents"),
            sources=sources,
            vocab=FileEntry.describe("vocab.bin", vocab),
            shards=shards,
        )

    def changed(self) -> RuntimeError:
        """The error about text that was another one at the end of a build."""
        return RuntimeError(f"{self.corpus!r} changed while it was read: run again")


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]
