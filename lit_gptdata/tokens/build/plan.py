"""A corpus and a tokenizer: what their store is named by, and what its manifest says of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from lit_gptdata.text.document import Corpus
from lit_gptdata.text.files import FilesCorpus, HashFiles, hash_files
from lit_gptdata.text.remote_file import size_of
from lit_gptdata.tokens.build.encode import Job
from lit_gptdata.tokens.build.output import Shards
from lit_gptdata.tokens.shards import described
from lit_gptdata.tokens.store import FORMAT
from lit_gptdata.tokens.tokenizer import Tokenizer


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
    ) -> list[dict[str, Any]]:
        """What the tokens come from, for the manifest: path, size in bytes, sha256; reads it all."""
        if isinstance(self.corpus, FilesCorpus):
            return self.corpus.sources(on_bytes, hash_files)
        return [{"path": repr(self.corpus), "size": None, "sha256": self.corpus.fingerprint}]

    @property
    def n_file_bytes(self) -> int | None:
        """Bytes that `sources` reads; None where they are not in files."""
        if isinstance(self.corpus, FilesCorpus):
            return sum(map(size_of, self.corpus.files))
        return None

    def fingerprint(self, sources: list[dict[str, Any]]) -> str:
        """What the store is named by: contents and tokenizer, not paths and times."""
        contents = [[source.get("format"), source["sha256"]] for source in sources]
        return _hash([FORMAT, self.tokenizer.fingerprint, self.reading, contents])

    @property
    def key(self) -> str:
        """What the request is named by, before any content is read: paths and tokenizer."""
        return _hash([FORMAT, self.tokenizer.fingerprint, self.reading, self.names])

    def plan(self, stamps: list[list[str | int]], job: Job) -> str:
        """What a build is named by: what another of the same plan left whole can be kept."""
        limit = job.max_document_bytes  # what is whole was within another limit
        return f"{self.key}-{_hash([FORMAT, stamps, job.shard_bytes, limit])}"

    def manifest(self, sources: list[dict[str, Any]], shards: Shards, vocab: bytes) -> dict[str, Any]:
        """The store's manifest; raises ValueError if there is no text in it."""
        if not any(shard["n_tokens"] for shard in shards):
            raise ValueError(f"{self.corpus!r} holds no text at all: give files with text in them")
        return {
            "format": FORMAT,
            "fingerprint": self.fingerprint(sources),
            "tokenizer": {
                "name": self.tokenizer.name,
                "special_tokens": self.tokenizer.special_tokens,
                "fingerprint": self.tokenizer.fingerprint,
                "vocab_size": self.tokenizer.vocab_size,
                "dtype": self.tokenizer.dtype.str,
            },
            "reading": self.reading,
            **{count: sum(s[count] for s in shards) for count in ("n_tokens", "n_bytes", "n_documents")},
            "sources": sources,
            "vocab": described("vocab.bin", vocab),
            "shards": shards,
        }

    def changed(self) -> RuntimeError:
        """The error about text that was another one at the end of a build."""
        return RuntimeError(f"{self.corpus!r} changed while it was read: run again")


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]
