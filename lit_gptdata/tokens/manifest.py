"""The manifest of a token store: the contents of manifest.json as frozen dataclasses.

    Manifest.from_json(path.read_bytes()).shards[0].ids.name  ->  "00000-000.bin"

The names and the order of the fields are the JSON format, so existing stores depend on them.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from operator import itemgetter
from typing import Any

from lit_gptdata._io import as_json
from lit_gptdata.text.document import SourceEntry

FORMAT = 1
"""Version of the store's layout. It is part of the fingerprint, so another version is another store."""


EXAMPLES = 3  # of each kind of document that is left out

COUNTS = ("n_tokens", "n_bytes", "n_documents")


@dataclass(frozen=True, kw_only=True)
class FileEntry:
    """One file of a store; raises ValueError for an unsafe name, a malformed hash or an invalid size."""

    name: str
    """File name inside the store's folder."""
    size: int
    """Bytes."""
    sha256: str
    """SHA-256 of the contents, 64 hex digits."""

    def __post_init__(self) -> None:
        safe = re.fullmatch("[0-9a-f]{64}", self.sha256) and re.fullmatch("[^/]+", self.name)
        if not safe or not isinstance(self.size, int) or self.size < 0:
            raise ValueError(f"{self} does not describe a file of a store")

    @classmethod
    def describe(cls, name: str, content: bytes) -> FileEntry:
        """The entry of a file with this name and content."""
        return cls(name=name, size=len(content), sha256=hashlib.sha256(content).hexdigest())


@dataclass(frozen=True, kw_only=True)
class ShardEntry:
    """One shard: its counts and its two files."""

    n_tokens: int
    n_bytes: int
    """UTF-8 bytes of the text."""
    n_documents: int
    """Documents that start in this shard."""
    files: tuple[FileEntry, FileEntry]
    """The token ids (.bin), and the index of documents and chunks (.idx)."""

    def __post_init__(self) -> None:
        for name in COUNTS:
            if type(count := getattr(self, name)) is not int or count < 0:
                raise ValueError(f"{name} must be an integer ≥ 0, got {count!r}")

    @property
    def ids(self) -> FileEntry:
        return self.files[0]

    @property
    def index(self) -> FileEntry:
        return self.files[1]

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ShardEntry:
        """The inverse of `asdict`; raises ValueError, KeyError or TypeError for other values."""
        ids, index = (FileEntry(**file) for file in values["files"])
        return cls(**{**values, "files": (ids, index)})


@dataclass(frozen=True, kw_only=True)
class TokenizerEntry:
    """The tokenizer that made the ids."""

    name: str
    special_tokens: str
    fingerprint: str
    vocab_size: int
    dtype: str
    """numpy's name of the ids' dtype, "<u2" or "<u4"."""
    separators: dict[str, int] | None = None
    """The special tokens that the build inserted, with their ids; None: only `<|endoftext|>`."""
    bos: bool = False
    """Whether each document starts with one of them."""
    is_lossless: bool = True
    """Whether the bytes of the ids of a text sum to the bytes of the text."""
    adds_space: bool = False
    """Whether the first id of a document has a space that is not in the text."""


@dataclass(frozen=True, kw_only=True)
class LeftOut:
    """The documents that are not in a store: `str(left_out)  ->  "3 documents: 2 empty, 1 null"`."""

    counts: dict[str, int] = field(default_factory=dict)
    """By kind: "null", "invalid UTF-8", "empty", "too short", "too long", "duplicate"."""
    examples: list[dict[str, Any]] = field(default_factory=list)
    """The first ones of each kind: source, place, kind and reason."""

    @classmethod
    def merge(cls, parts: Sequence[LeftOut], sources: Sequence[SourceEntry]) -> LeftOut | None:
        """What parts of a corpus have left out, with the first examples, or None."""
        counts = sum((Counter(part.counts) for part in parts), Counter())
        found = sorted((e for part in parts for e in part.examples), key=itemgetter("kind", "source"))
        # your own corpus is one source, even if it numbers its documents
        examples = [
            example | {"source": sources[min(example["source"], len(sources) - 1)].path}
            for _, group in itertools.groupby(found, itemgetter("kind"))
            for example in itertools.islice(group, EXAMPLES)
        ]
        return cls(counts=dict(sorted(counts.items())), examples=examples) if counts else None

    def __str__(self) -> str:
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in self.counts.items())
        n = sum(self.counts.values())
        return f"{n:,} document{'s' * (n != 1)}: {kinds}"


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """A complete store: its sources, its tokenizer, its counts, and a checksum of every file."""

    format: int = FORMAT
    fingerprint: str
    tokenizer: TokenizerEntry
    reading: dict[str, Any]
    """How bytes became text: the fields of `Reading` if the corpus is files, and the filters."""
    n_tokens: int
    n_bytes: int
    n_documents: int
    sources: list[SourceEntry]
    vocab: FileEntry
    shards: list[ShardEntry]
    left_out: LeftOut | None = None
    """What the filters left out; None: nothing."""
    cuts: tuple[int, int] | None = None
    """The tokens where val and test start, in a store that has its own split."""

    def __post_init__(self) -> None:
        val, test = self.cuts or (1, self.n_tokens)
        if not 0 < val <= test <= self.n_tokens:
            raise ValueError(f"val starts at {val} and test at {test} of {self.n_tokens} tokens")
        for name, counted in totals(self.shards).items():
            if counted != getattr(self, name):
                raise ValueError(f"{name} is {getattr(self, name)}, but the shards have {counted}")
        itemsize = {"<u2": 2, "<u4": 4}[self.tokenizer.dtype]
        sizes = [(shard.ids, shard.n_tokens * itemsize) for shard in self.shards]
        for file, size in [*sizes, (self.vocab, 4 * self.tokenizer.vocab_size)]:  # 4: a row of VOCAB
            if file.size != size:
                raise ValueError(f"{file.name} has {file.size} bytes, but its contents take {size}")
        if not self.sources:
            raise ValueError("it names no sources")

    @property
    def files(self) -> list[FileEntry]:
        """Every file of the store except the manifest."""
        return [file for shard in self.shards for file in shard.files] + [self.vocab]

    def to_json(self) -> bytes:
        values = {**asdict(self), "sources": [source.to_dict() for source in self.sources]}
        for option in fields(TokenizerEntry):  # defaults are not written, as in earlier versions
            if values["tokenizer"][option.name] == option.default:
                del values["tokenizer"][option.name]
        values = {k: v for k, v in values.items() if v is not None}  # as in earlier versions
        return as_json(values)

    @classmethod
    def from_json(cls, content: bytes) -> Manifest:
        """Read manifest.json; raises ValueError that names the problem."""
        try:
            values = json.loads(content)
            if values["format"] != FORMAT:
                problem = f"its format is {values['format']!r}, this version reads {FORMAT}"
                raise ValueError(f"{problem}: a newer lit-gptdata may read it")
            values["tokenizer"] = TokenizerEntry(**values["tokenizer"])
            values["sources"] = [SourceEntry(**source) for source in values["sources"]]
            values["vocab"] = FileEntry(**values["vocab"])
            values["shards"] = [ShardEntry.from_dict(shard) for shard in values["shards"]]
            values["left_out"] = LeftOut(**left_out) if (left_out := values.get("left_out")) else None
            values["cuts"] = tuple(map(int, values.get("cuts") or ())) or None
            return cls(**values)
        except (KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"it has another structure than a manifest: {error}") from None


def total(shards: Iterable[ShardEntry], count: str) -> int:
    """The sum of one of the COUNTS over shards."""
    return sum(getattr(shard, count) for shard in shards)


def totals(shards: Sequence[ShardEntry]) -> dict[str, Any]:
    """All COUNTS, summed over shards."""
    return {name: total(shards, name) for name in COUNTS}
