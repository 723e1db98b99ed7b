"""One file to documents: .txt, .jsonl and .parquet, each plain or as .gz or .zst.

    read_documents(FileSlice(path=Path("a.jsonl.gz")), reading)  ->  a Document a line

Nothing is held whole but one line of JSON or one batch of rows: memory does not grow with the file.
"""

from __future__ import annotations

import codecs
import contextlib
import gzip
import importlib
import json
import re
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal, get_args

from lit_gptdata._io import CHUNK_BYTES
from lit_gptdata.text.document import Document
from lit_gptdata.text.gutenberg import strip_gutenberg

EncodingErrors = Literal["strict", "replace"]

NAME = re.compile(r"\.(?P<format>txt|jsonl|parquet)(?P<compression>\.gz|\.zst)?$", re.IGNORECASE)
"""What a file's name says of its format; any other name is plain text, if it is named outright."""

LINE_LIMIT = 1 << 28
"""Bytes of a line of JSON, which must be held whole: beyond it the file is hardly one."""

ROWS = 256
"""Rows of a parquet file read at a time."""


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How bytes become documents; part of what a store is named by."""

    encoding_errors: EncodingErrors = "strict"
    """Invalid UTF-8: "strict", an error; "replace", U+FFFD."""

    text_column: str = "text"
    """Key (jsonl) or column (parquet) that holds the text."""

    strip_gutenberg: bool = False
    """Leave out Project Gutenberg's licence."""

    def __post_init__(self) -> None:
        if self.encoding_errors not in get_args(EncodingErrors):
            raise ValueError(
                f"unknown encoding_errors {self.encoding_errors!r}: choose 'strict' (invalid UTF-8 is "
                "an error) or 'replace' (it becomes U+FFFD)"
            )


@dataclass(frozen=True, kw_only=True)
class FileSlice:
    """The documents of a file between two byte offsets; offsets other than the ends are cuts."""

    path: Path
    number: int = 0
    start: int = 0
    stop: int | None = None


def format_of(path: Path) -> tuple[str, str]:
    """(txt | jsonl | parquet, "" | .gz | .zst) by the file's name."""
    found = NAME.search(path.name)
    if not found:
        return "txt", ""
    return found["format"].lower(), (found["compression"] or "").lower()


def read_documents(part: FileSlice, reading: Reading) -> Iterator[Document]:
    """The documents of a slice, in order, to be read one after the other.

    Raises UnicodeError (file and byte offset), ValueError for what is no JSON, no parquet or no such
    column, OSError for a broken archive, ImportError for an extra that is missing.
    """
    kind, compression = format_of(part.path)
    if kind == "parquet":
        if compression:
            raise ValueError(
                f"{part.path}: parquet files are compressed inside; unpack it and name it .parquet"
            )
        yield from _parquet(part, reading)
        return
    with _opened(part.path, compression) as file:
        file.seek(part.start)
        raw = _limited(file, part)
        if kind == "jsonl":
            yield from _jsonl(raw, part, reading)
        else:
            chunks: Iterable[bytes] = _text(raw, part, reading.encoding_errors)
            if reading.strip_gutenberg:
                chunks = [strip_gutenberg(b"".join(chunks).decode(), part.path).encode()]
            yield Document(
                source=str(part.path), chunks=chunks, continues=part.start > 0, number=part.number
            )


@contextlib.contextmanager
def _opened(path: Path, compression: str) -> Iterator[IO[bytes]]:
    """The uncompressed bytes; a broken archive raises OSError that names the file."""
    try:
        if compression == ".gz":
            with gzip.open(path, "rb") as unpacked:
                yield unpacked  # type: ignore[misc]
        elif compression == ".zst":
            zstandard = needs("zstandard", "zstd", path)
            with (
                open(path, "rb") as packed,
                zstandard.ZstdDecompressor().stream_reader(packed, read_across_frames=True) as unpacked,
            ):
                yield unpacked
        else:
            with open(path, "rb", buffering=0) as file:
                yield file
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise _broken(path, error) from error
    except Exception as error:
        if type(error).__name__ != "ZstdError":
            raise
        raise _broken(path, error) from error


def _broken(path: Path, error: Exception) -> OSError:
    return OSError(
        f"{path} is broken or cut short ({error}): fetch it again, or test it with gzip -t or zstd -t"
    )


def needs(module: str, extra: str, path: Path) -> Any:
    """An optional package; its absence answers with the pip line."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"{path} needs {module}: pip install 'lit-gptdata[{extra}]'") from error


def _limited(file: IO[bytes], part: FileSlice) -> Iterator[bytes]:
    """Chunks of the file up to the slice's end."""
    at = part.start
    while part.stop is None or at < part.stop:
        want = CHUNK_BYTES if part.stop is None else min(CHUNK_BYTES, part.stop - at)
        chunk = file.read(want)
        if not chunk:
            return
        at += len(chunk)
        yield chunk


def _text(raw: Iterable[bytes], part: FileSlice, errors: EncodingErrors) -> Iterator[bytes]:
    """Valid UTF-8 with universal newlines and a BOM kept, as `open(path, encoding="utf-8")` reads."""
    offset, rest, held = part.start, b"", b""
    for chunk in _and_the_end(raw):
        data = rest + chunk
        valid, used = _valid(data, errors, not chunk, part.path, offset)
        offset, rest = offset + used, data[used:]
        valid = held + valid
        held = b"\r" if chunk and valid.endswith(b"\r") else b""  # its \n may come next
        valid = valid[: len(valid) - len(held)]
        if b"\r" in valid:
            valid = valid.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        if valid:
            yield valid


def _and_the_end(chunks: Iterable[bytes]) -> Iterator[bytes]:
    yield from chunks
    yield b""


def _valid(
    data: bytes, errors: EncodingErrors, final: bool, where: object, offset: int = 0
) -> tuple[bytes, int]:
    """(valid UTF-8, how many bytes of `data` it stands for): all but a character not whole yet."""
    try:
        text, used = codecs.utf_8_decode(data, errors, final)
    except UnicodeDecodeError as error:
        raise UnicodeError(
            f"{where} is not valid UTF-8: byte 0x{data[error.start]:02x} at offset "
            f"{offset + error.start} ({error.reason}). Convert it (iconv -f latin1 -t utf-8 …), or set "
            "encoding_errors=replace"
        ) from None
    return (data[:used] if errors == "strict" else text.encode()), used


def _jsonl(raw: Iterable[bytes], part: FileSlice, reading: Reading) -> Iterator[Document]:
    """A document a line: the string at `text_column`; lines that are blank or null there are skipped."""
    for offset, line in _lines(raw, part):
        if line.isspace():
            continue
        source = f"{part.path}: line at byte {offset}"
        text, _ = _valid(line, reading.encoding_errors, True, source, offset)
        try:
            row = json.loads(text)
        except ValueError as error:
            raise ValueError(f"{source} is no JSON ({error}): it reads {line[:60]!r}") from None
        if not isinstance(row, dict) or reading.text_column not in row:
            has = f"has the keys {sorted(row)}" if isinstance(row, dict) else "is no JSON object"
            raise ValueError(
                f"{source} {has}, and text_column={reading.text_column!r} is wanted: set "
                "data.text_column"
            )
        value = row[reading.text_column]
        if value is not None:
            utf8 = _json_text(value, source, reading)
            yield Document(source=source, chunks=[utf8], number=part.number)


def _lines(raw: Iterable[bytes], part: FileSlice) -> Iterator[tuple[int, bytes]]:
    """(offset, line without its \\n); only \\n ends a line, as in JSON Lines."""
    offset, rest = part.start, bytearray()
    for chunk in raw:
        rest += chunk
        if len(rest) > LINE_LIMIT:
            raise ValueError(
                f"{part.path}: the line at byte {offset} is longer than {LINE_LIMIT:,} bytes; a jsonl "
                "file has a document a line, ended by \\n"
            )
        *lines, last = rest.split(b"\n") if b"\n" in chunk else [rest]
        for line in lines:
            if line:
                yield offset, bytes(line)
            offset += len(line) + 1
        rest = last
    if rest:
        yield offset, bytes(rest)


def _json_text(value: object, source: str, reading: Reading) -> bytes:
    if not isinstance(value, str):
        raise ValueError(
            f"{source}: {reading.text_column!r} holds a {type(value).__name__}, expected text: set "
            "data.text_column"
        )
    try:
        return value.encode()
    except UnicodeEncodeError as error:  # JSON can spell half a surrogate pair: "\ud800"
        if reading.encoding_errors == "strict":
            raise UnicodeError(
                f"{source} holds a lone surrogate {value[error.start]!r}: mend the file, or set "
                "encoding_errors=replace"
            ) from None
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode()


def _parquet(part: FileSlice, reading: Reading) -> Iterator[Document]:
    """A document a row: the text in `text_column`; rows that are null there are skipped."""
    arrow = needs("pyarrow", "parquet", part.path)
    parquet = needs("pyarrow.parquet", "parquet", part.path)
    column = reading.text_column
    try:
        file = parquet.ParquetFile(part.path, buffer_size=CHUNK_BYTES, pre_buffer=False)
    except arrow.ArrowException as error:
        raise ValueError(f"{part.path} is no parquet file: {error}") from None
    with file:
        kinds = {field.name: field.type for field in file.schema_arrow}
        if column not in kinds:
            raise ValueError(
                f"{part.path} has the columns {sorted(kinds)}, and text_column={column!r} is wanted: set "
                "data.text_column"
            )
        if kinds[column] not in (arrow.string(), arrow.large_string(), arrow.string_view()):
            raise ValueError(
                f"{part.path}: the column {column!r} holds {kinds[column]}, expected text: set "
                "data.text_column"
            )
        batches = file.iter_batches(ROWS, columns=[column])
        for number, row in enumerate(row for batch in batches for row in batch.column(0)):
            if row.is_valid:
                source = f"{part.path}: row {number}"
                # arrow does not check that its strings are UTF-8
                data = row.as_buffer().to_pybytes()
                utf8, _ = _valid(data, reading.encoding_errors, True, source)
                yield Document(source=source, chunks=[utf8], number=part.number)
