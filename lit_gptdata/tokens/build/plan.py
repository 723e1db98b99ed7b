"""The plan of a build: a corpus, a tokenizer, and the options that say how to build their store."""

import functools
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

from lit_gptdata._checks import check_choice, check_flag, check_integer, plain
from lit_gptdata.text.document import Corpus, SourceEntry
from lit_gptdata.text.files import FilesCorpus
from lit_gptdata.text.formats import FileSlice, format_of
from lit_gptdata.text.remote_file import OnBytes, TextFile
from lit_gptdata.tokens.build.output import Shards
from lit_gptdata.tokens.engines import EngineName
from lit_gptdata.tokens.libraries.reference import END_OF_TEXT, digest_of
from lit_gptdata.tokens.manifest import FORMAT, FileEntry, LeftOut, Manifest, TokenizerEntry, totals
from lit_gptdata.tokens.tokenizer import Tokenizer

BuildName = Literal["processes", "ray"]
OnBadDocument = Literal["error", "skip"]
FileStats = list[list[str | int]]

SHARD_BYTES = 64 << 20
"""UTF-8 bytes of text in a shard and in a work unit. A unit takes seconds, so a kill loses little."""


@dataclass(frozen=True, kw_only=True)
class BuildOptions:
    """How to build a store; the tokens depend only on `filters`. Raises ValueError or TypeError."""

    engine: EngineName = "auto"
    """"auto" | "reference" (the tokenizer's own library) | "gigatoken"."""
    build: BuildName = "processes"
    """"processes" on this machine, or "ray": tasks on a Ray cluster."""
    workers: int | None = 1
    """Processes or tasks at the same time; None: one per core."""
    ray_address: str | None = None
    """Address of the Ray cluster, as `ray.init` takes it."""
    max_document_bytes: int | None = None
    """UTF-8 bytes; a longer document is bad. None: no limit."""
    min_document_bytes: int | None = None
    """UTF-8 bytes; a shorter document is bad. None: no limit."""
    on_bad_document: OnBadDocument = "error"
    """"skip" leaves out and counts bad documents, and also empty and null ones."""
    drop_duplicates: bool = False
    """Leave out a document if an earlier one has the same text."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "ray_address", plain(self.ray_address))
        check_choice("engine", self.engine, get_args(EngineName))
        check_choice("build", self.build, get_args(BuildName))
        check_choice("on_bad_document", self.on_bad_document, get_args(OnBadDocument))
        drops = check_flag("drop_duplicates", self.drop_duplicates)
        object.__setattr__(self, "drop_duplicates", drops)
        for name in ("workers", "max_document_bytes", "min_document_bytes"):
            if (value := getattr(self, name)) is not None:
                option = name.replace("workers", "build_workers")
                object.__setattr__(self, name, check_integer(option, value, 1))  # a plain int
        low, high = self.min_document_bytes, self.max_document_bytes
        if low is not None and high is not None and low > high:
            raise ValueError(f"min_document_bytes={low:,} is larger than max_document_bytes={high:,}")

    @property
    def filters(self) -> dict[str, Any]:
        """The options that change the tokens, without defaults; a limit alone changes none."""
        skips = self.on_bad_document == "skip"
        names = ["on_bad_document", "min_document_bytes", "max_document_bytes"] if skips else []
        found = {name: getattr(self, name) for name in [*names, "drop_duplicates"]}
        return {name: value for name, value in found.items() if value}


DEFAULT_OPTIONS = BuildOptions()


@dataclass(frozen=True)
class DocumentCorpus:
    """Any other corpus, as a single source, with the members of a `FilesCorpus` that a build needs."""

    corpus: Corpus
    files: tuple[TextFile, ...] = ()
    reading: None = None

    @property
    def names(self) -> list[str]:
        return [repr(self.corpus)]

    def file_stats(self) -> FileStats:
        return [[repr(self.corpus), self.corpus.fingerprint]]

    def contents(self) -> list[list[int]]:
        return []  # its fingerprint is in `file_stats`

    def sources(self, *_: OnBytes) -> list[SourceEntry]:
        return [SourceEntry(path=repr(self.corpus), size=None, sha256=self.corpus.fingerprint)]

    def work_units(self, *_: object) -> list[list[Corpus]]:
        return [[self.corpus]]  # the documents can only be read in one pass

    def __repr__(self) -> str:
        return repr(self.corpus)


PlanCorpus = FilesCorpus | DocumentCorpus


def as_plan_corpus(corpus: Corpus) -> PlanCorpus:
    return corpus if isinstance(corpus, FilesCorpus) else DocumentCorpus(corpus)


def lookup_key(corpus: PlanCorpus, tokenizer: Tokenizer, options: BuildOptions) -> str:
    """Identifies a corpus and a tokenizer without reading text: by names, formats and options."""
    formats = [format_of(file).name for file in corpus.files]
    return _hash([FORMAT, tokenizer.fingerprint, _reading(corpus, options), corpus.names, formats])


class BuildPlan:
    """All inputs of a build. Two builds of equal plans write the same shards."""

    def __init__(self, corpus: PlanCorpus, tokenizer: Tokenizer, options: BuildOptions) -> None:
        self.corpus, self.tokenizer, self.options = corpus, tokenizer, options
        self.shard_bytes = SHARD_BYTES
        self.contents = corpus.contents()  # before the build reads the files
        self.file_stats = corpus.file_stats()

    @functools.cached_property
    def key(self) -> str:
        return lookup_key(self.corpus, self.tokenizer, self.options)

    @property
    def name(self) -> str:
        """Names the folder of the build; the next build of the same plan continues in it."""
        # with the limits, because finished units are not checked again
        limits = [self.options.min_document_bytes, self.options.max_document_bytes]
        checks = limits if self._checks_documents else None
        return f"{self.key}-{_hash([FORMAT, self.file_stats, self.shard_bytes, checks])}"

    @property
    def _checks_documents(self) -> bool:
        options = self.options
        return bool(options.filters or options.min_document_bytes or options.max_document_bytes)

    def work_units(self) -> dict[int, Sequence[FileSlice | Corpus]]:
        """The work units by number."""
        rule = self.tokenizer.cut_rule
        if self._checks_documents:
            rule = None  # a text is not cut, because a worker must see all of it to check it
        units = self.corpus.work_units(self.shard_bytes, rule.first_cut if rule else None)
        return dict(enumerate(units))

    def fingerprint(self, sources: list[SourceEntry]) -> str:
        """The name of the store, which depends on contents and tokenizer, not on paths and times."""
        contents = [[source.format, source.sha256] for source in sources]
        reading = _reading(self.corpus, self.options)
        return _hash([FORMAT, self.tokenizer.fingerprint, reading, contents])

    def manifest(
        self, sources: list[SourceEntry], shards: Shards, vocab: bytes, parts: Sequence[LeftOut] = ()
    ) -> Manifest:
        """The manifest of the store; raises ValueError if empty, RuntimeError if a file has changed."""
        left_out, counts = LeftOut.merge(parts, sources), totals(shards)
        if not counts["n_bytes"]:
            if left_out:
                advice = "change the limits, or run with on_bad_document=error to see the first problem"
                raise ValueError(f"{self.corpus!r}: no text remains (left out {left_out}): {advice}")
            raise ValueError(f"{self.corpus!r} holds no text: give files with text in them")
        self.check_unchanged(sources)
        entry = {field.name: getattr(self.tokenizer, field.name) for field in fields(TokenizerEntry)}
        entry["dtype"] = self.tokenizer.dtype.str
        if {*entry["separators"]} <= {END_OF_TEXT}:
            entry["separators"] = None
        return Manifest(
            fingerprint=self.fingerprint(sources),
            tokenizer=TokenizerEntry(**entry),
            reading=_reading(self.corpus, self.options),
            left_out=left_out,
            **counts,
            sources=sources,
            vocab=FileEntry.describe("vocab.bin", vocab),
            shards=shards,
        )

    def check_unchanged(self, sources: Sequence[SourceEntry]) -> None:
        """Raise RuntimeError if a file has changed since the plan was made, or since it was hashed."""
        is_same = self.corpus.file_stats() == self.file_stats
        if is_same and self.corpus.contents() != self.contents:
            is_same = self.corpus.sources() == sources
        if not is_same:
            raise RuntimeError(f"{self.corpus!r} changed while it was read: run again")


def check_document(source: object, n_bytes: int, low: int | None, high: int | None) -> None:
    """Raise ValueError if the length of a document is outside the limits."""
    skip = "set on_bad_document=skip, or"
    if high is not None and n_bytes > high:
        problem = f"longer than max_document_bytes={high:,}: {skip} raise the limit"
        raise ValueError(f"{source}: the document is {problem}")
    if low is not None and n_bytes < low:
        problem = f"shorter than min_document_bytes={low:,}: {skip} lower the limit"
        raise ValueError(f"{source}: the document is {problem}")


def _reading(corpus: PlanCorpus, options: BuildOptions) -> dict[str, Any]:
    return (asdict(corpus.reading) if corpus.reading else {}) | options.filters


def _hash(value: Any) -> str:
    return digest_of(value)[:32]
