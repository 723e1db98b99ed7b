"""One file to documents: .txt, .jsonl and .parquet, each plain or as .gz or .zst.

    read_documents(FileSlice(path=Path("a.jsonl.gz")), reading)  ->  a Document a line

Nothing is held whole but one line of JSON or one batch of rows: memory does not grow with the file.
"""

from __future__ import annotations

import codecs
import contextlib
import gzip
import importlib
import io
import json
import os
import re
import zlib
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass
from typing import IO, Any, Literal, get_args

from lit_gptdata._fsspec import RemoteError
from lit_gptdata._io import CHUNK_BYTES
from lit_gptdata.text.document import Document, utf8
from lit_gptdata.text.gutenberg import strip_gutenberg
from lit_gptdata.text.remote_file import RemoteFile, TextFile, open_raw

EncodingErrors = Literal["strict", "replace"]

NAME = re.compile(r"(\.(?P<format>txt|jsonl|parquet))?(?P<compression>\.gz|\.zst)?$", re.IGNORECASE)
"""What a file's name says of its format; without one it is plain text, if it is named outright."""

SEARCHED = "*.txt, *.jsonl, *.parquet and these as .gz or .zst"
"""What counts as text in a folder."""

LINE_LIMIT = 1 << 28
"""Bytes of a line of JSON, which must be held whole: beyond it the file is hardly one."""

ROWS = 64
"""Rows of a parquet file read at a time, fewer where rows are long: 256 are no faster, and a page of a
few bytes may stand for as many long texts, all the same."""

BATCH_BYTES = 16 << 20
"""Bytes of rows of a parquet file read at a time, by what the file says of itself."""


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

    path: TextFile
    number: int = 0
    start: int = 0
    stop: int | None = None


def format_of(path: TextFile) -> tuple[str, str]:
    """(txt | jsonl | parquet, "" | .gz | .zst) by the file's name."""
    found = NAME.search(path.name)
    assert found  # the pattern also matches nothing, at the end
    return (found["format"] or "txt").lower(), (found["compression"] or "").lower()


def is_text(name: str) -> bool:
    """Whether a file in a folder is read: its name says a format."""
    found = NAME.search(name)
    return found is not None and found["format"] is not None


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
    with _opened(part, compression) as file:
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
def _opened(part: FileSlice, compression: str) -> Iterator[IO[bytes]]:
    """The uncompressed bytes from the slice's start on; packed files are not sliced."""
    with open_raw(part.path, part.start, part.stop) as file:
        if compression == ".gz":
            with gzip.open(file, "rb") as unpacked:
                yield unpacked  # type: ignore[misc]
        elif compression == ".zst":
            zstandard = needs("zstandard", "zstd", part.path)
            frames: Any = file
            if isinstance(part.path, RemoteFile):
                frames = _CheckedFrames(file, part.path.size, zstandard)
            else:
                with _intact(part.path):
                    _check_frames(file.fileno(), zstandard)
            with zstandard.ZstdDecompressor().stream_reader(frames, read_across_frames=True) as unpacked:
                yield unpacked
        else:
            yield file  # type: ignore[misc]


@contextlib.contextmanager
def _intact(path: TextFile) -> Iterator[None]:
    """Make what a broken archive raises an OSError that names the file."""
    try:
        yield
    except Exception as error:
        broken = isinstance(error, (EOFError, zlib.error, gzip.BadGzipFile))
        if not broken and type(error).__name__ != "ZstdError":
            raise
        raise OSError(
            f"{path} is broken or cut short ({error}): fetch it again, or test it with gzip -t or "
            "zstd -t"
        ) from error


def _frames(size: int, zstandard: Any) -> Generator[tuple[int, int], bytes, None]:
    """Raise EOFError if a zstd file ends inside a frame: its reader takes that for the end.

    Asks for (offset, n) and is sent the n bytes there, or those up to the end. Goes from block to
    block (RFC 8878, section 3.1), which hold up to 128 KiB, and unpacks none.
    """
    at = 0
    while at < size:
        head = yield at, 18
        if head[0] >> 4 == 5 and head[1:4] == b"\x2a\x4d\x18":  # a frame to skip
            at += 8 + int.from_bytes(head[4:8], "little")
            continue
        checksum = zstandard.get_frame_parameters(head).has_checksum
        at += zstandard.frame_header_size(head)
        last = False
        while not last:
            if at >= size:
                raise EOFError("it ends inside a frame")
            block = int.from_bytes((yield at, 3), "little")
            last, repeated, length = block & 1 == 1, block >> 1 & 3 == 1, block >> 3
            at += 3 + (1 if repeated else length)
        at += 4 if checksum else 0
    if at > size:
        raise EOFError("it ends inside a frame")


def _check_frames(fd: int, zstandard: Any) -> None:
    """Follow the frames of a file on disk before it is read: a look at few of its bytes."""
    walk = _frames(os.fstat(fd).st_size, zstandard)
    with contextlib.suppress(StopIteration):
        at, n = next(walk)
        while True:
            at, n = walk.send(os.pread(fd, n, at))


class _CheckedFrames:
    """A remote zstd file, its frames followed while they come by: a look at each would be a request."""

    def __init__(self, file: io.RawIOBase, size: int, zstandard: Any) -> None:
        self._file, self._size = file, size
        self._walk = _frames(size, zstandard)
        self._wanted = next(self._walk, None)
        self._held, self._begin = b"", 0  # the last bytes that came, from `_begin` on

    def read(self, n_bytes: int) -> bytes:
        """The next bytes; raises EOFError at the end if that is inside a frame."""
        data: bytes = self._file.read(n_bytes) or b""
        self._held += data
        came = self._begin + len(self._held)
        while self._wanted and (sum(self._wanted) <= came or came == self._size):
            at, n = self._wanted
            found = self._held[at - self._begin :][:n]
            try:
                self._wanted = self._walk.send(found)
            except StopIteration:
                self._wanted = None
        keep = min(self._wanted[0], came) if self._wanted else came
        self._held, self._begin = self._held[keep - self._begin :], keep
        return data


def needs(module: str, extra: str, path: TextFile) -> Any:
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
        with _intact(part.path):  # here: where documents are read, `_opened` sees no error
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
    if data.isascii():
        return data, len(data)
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
        line = line.removeprefix(codecs.BOM_UTF8)  # as Windows tools begin a file
        if not line.strip():
            continue
        source = f"{part.path}: line at byte {offset}"
        text, _ = _valid(line, reading.encoding_errors, True, source, offset)
        try:
            row = json.loads(text.decode())  # from bytes it would guess at UTF-16
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{source} is no JSON ({error}): it reads {line[:60]!r}") from None
        if not isinstance(row, dict) or reading.text_column not in row:
            has = f"has the keys {sorted(row)}" if isinstance(row, dict) else "is no JSON object"
            raise ValueError(
                f"{source} {has}, and text_column={reading.text_column!r} is wanted: set "
                "data.text_column"
            )
        value = row[reading.text_column]
        if value is not None:
            yield Document(
                source=source, chunks=[_json_text(value, source, reading)], number=part.number
            )


def _lines(raw: Iterable[bytes], part: FileSlice) -> Iterator[tuple[int, bytes]]:
    """(offset, line without its \\n); only \\n ends a line, as in JSON Lines."""
    offset, rest = part.start, bytearray()
    for chunk in raw:
        rest += chunk
        *lines, rest = rest.split(b"\n") if b"\n" in chunk else [rest]
        for line in lines:
            if line:
                yield offset, bytes(line)
            offset += len(line) + 1
        if len(rest) > LINE_LIMIT:
            raise ValueError(
                f"{part.path}: the line at byte {offset} is longer than {LINE_LIMIT:,} bytes; a jsonl "
                "file has a document a line, ended by \\n: cut the text into several documents"
            )
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
        return utf8(value)


def _parquet(part: FileSlice, reading: Reading) -> Iterator[Document]:
    """A document a row: the text in `text_column`; rows that are null there are skipped."""
    arrow = needs("pyarrow", "parquet", part.path)
    parquet = needs("pyarrow.parquet", "parquet", part.path)
    column = reading.text_column
    # arrow's own reading of a path holds no Python; a remote file it asks for ranges
    place = part.path.open() if isinstance(part.path, RemoteFile) else part.path
    try:
        file = parquet.ParquetFile(place, buffer_size=CHUNK_BYTES, pre_buffer=False)
    except RemoteError:
        raise
    except (arrow.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno:  # the system's, which names the file
            raise
        raise ValueError(f"{part.path} is no parquet file, or cut short: {error}") from None
    with file:
        kinds = {field.name: field.type for field in file.schema_arrow}
        if column not in kinds:
            raise ValueError(
                f"{part.path} has the columns {sorted(kinds)}, and text_column={column!r} is wanted: "
                "set data.text_column"
            )
        if kinds[column] not in (arrow.string(), arrow.large_string(), arrow.string_view()):
            raise ValueError(
                f"{part.path}: the column {column!r} holds {kinds[column]}, expected text: set "
                "data.text_column"
            )
        for number, row in enumerate(_rows(file, column, part.path, arrow)):
            if row.is_valid:
                source = f"{part.path}: row {number}"
                # arrow does not check that its strings are UTF-8
                data = row.as_buffer().to_pybytes()
                text, _ = _valid(data, reading.encoding_errors, True, source)
                yield Document(source=source, chunks=[text], number=part.number)


def _rows(file: Any, column: str, path: TextFile, arrow: Any) -> Iterator[Any]:
    """The values of a column, a batch of bounded size in memory at a time."""
    groups = [file.metadata.row_group(i) for i in range(file.num_row_groups)]
    mean = sum(group.total_byte_size for group in groups) // max(1, file.metadata.num_rows)
    try:
        for batch in file.iter_batches(max(1, min(ROWS, BATCH_BYTES // max(1, mean))), columns=[column]):
            yield from batch.column(column)
    except RemoteError:
        raise
    except (arrow.ArrowException, OSError) as error:  # which do not say of which file
        raise OSError(f"{path} is broken ({error}): fetch it again") from error
