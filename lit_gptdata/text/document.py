"""The interface between text and the rest of the package: a corpus of documents, read in chunks."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable


@dataclass(frozen=True, kw_only=True)
class Document:
    """One text, or a slice of a large one: `Document(source="a.txt", chunks=[b"It was ", b"late"])`."""

    source: str
    """Where the text comes from, for messages: a path, a topic."""
    chunks: Iterable[bytes]
    """The text as valid UTF-8 with `\\n` newlines, cut anywhere; iterated only once."""
    continues: bool = False
    """True if this continues the document before it, as a slice of a large file does."""
    number: int = 0
    """The index of the source in the corpus, counted from 0."""
    place: str | None = None
    """Where the text is in its file, such as "row 17"; None: `source` says all."""
    problem: tuple[str, str] | None = None
    """(kind, message) if there is no text to read: "null" or "invalid UTF-8"."""


@dataclass(frozen=True, kw_only=True)
class SourceEntry:
    """One source of a corpus as a store's manifest records it: a file, or a whole corpus."""

    path: str
    """Path, URL or name, for people."""
    size: int | None
    """Bytes; None for a corpus that is not files."""
    sha256: str
    """SHA-256 (hex) of a file's contents, or the corpus's fingerprint."""
    format: str | None = None
    """Suffixes that decide how the file is read, such as "jsonl.gz"; None if it is not a file."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values; `format` is left out where it is None."""
        values = {"path": self.path, "size": self.size, "format": self.format, "sha256": self.sha256}
        return {name: value for name, value in values.items() if name != "format" or value is not None}


@runtime_checkable
class Corpus(Protocol):
    """Documents in a fixed order; your own class needs these two members and a `__repr__`."""

    def __iter__(self) -> Iterator[Document]:
        """The documents, in the same order each time."""

    @property
    def fingerprint(self) -> str:
        """A string that changes when the documents change, such as a hash of their text."""


def utf8(text: str) -> bytes:
    """The text's UTF-8, with lone surrogates replaced by U+FFFD as tiktoken replaces them."""
    try:
        return text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode()
