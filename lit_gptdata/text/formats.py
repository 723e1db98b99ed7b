"""Read one text file as documents; a reader holds at most one JSON line or one batch of rows in memory.

    read_documents(FileSlice(path=Path("a.jsonl.gz")), Reading())  ->  one Document per line

To add a format, write a reader function and add an entry to `FORMATS` at the end of this file.
"""

import codecs
import contextlib
import functools
import gzip
import importlib
import io
import itertools
import json
import re
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from lit_gptdata._checks import check_choice
from lit_gptdata._fsspec import RemoteError
from lit_gptdata._io import CHUNK_BYTES
from lit_gptdata.text.content import (
    ADVICE,
    TABLES,
    check_compressed,
    check_text,
    encoding_advice,
    kind_of_plain,
    kind_of_rows,
    kind_of_table,
    refusal,
)
from lit_gptdata.text.document import Document, utf8
from lit_gptdata.text.gutenberg import strip_gutenberg
from lit_gptdata.text.remote_file import RemoteFile, TextFile, open_raw, size_of

EncodingErrors = Literal["strict", "replace"]
NULL, INVALID = "null", "invalid UTF-8"  # kinds of a `Document.problem`
LINE_LIMIT = 1 << 28  # bytes of a JSON line, which is held in memory; a longer one is hardly JSON Lines
ROWS = 64  # of a parquet file per read: 256 are not faster, and each row may repeat one long text
INDEX_BYTES = 1 << 20  # of a parquet file, between its data and its footer
BATCH_BYTES = 16 << 20  # of parquet rows per read, estimated from the file's metadata


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How the bytes of a file become documents. A store's fingerprint depends on these options."""

    encoding_errors: EncodingErrors = "strict"
    """Invalid UTF-8: "strict" finds the document bad, "replace" inserts U+FFFD."""
    text_column: str = "text"
    """The JSON key or parquet column that holds the text."""
    strip_gutenberg: bool = False
    """Remove Project Gutenberg's license."""

    def __post_init__(self) -> None:
        check_choice("encoding_errors", self.encoding_errors, get_args(EncodingErrors))


@dataclass(frozen=True, kw_only=True)
class FileSlice:
    """The bytes [start, stop) of a text file, cut where its format allows; by default the whole file."""

    path: TextFile
    number: int = 0
    """The file's position in the corpus, counted from 0."""
    start: int = 0
    stop: int | None = None


@dataclass(frozen=True, kw_only=True)
class Format:
    """What the rest of the package has to know about a file format."""

    suffixes: tuple[str, ...]
    """The ends of file names, such as ".txt"; .gz or .zst may follow. The first one is in manifests."""
    cut: Literal["inside_text", "after_newline", "never"]
    """Where a large file may be cut: "inside_text" continues a document, "never" means compressed."""
    read: Callable[[FileSlice, Reading], Iterator[Document]]
    """The documents of a slice in order, each read before the next one."""
    kind_of: Callable[[bytes, str, str], tuple[str, str] | None] | None = None
    """(first bytes, name in lowercase, `text_column`) → (its real format, command), or None."""
    compression: Literal["", ".gz", ".zst"] = ""

    @property
    def name(self) -> str:
        """The name in manifests: "txt", "jsonl.gz"."""
        return self.suffixes[0][1:] + self.compression


def format_of(file: TextFile) -> Format:
    """The format that the file's name tells; an unknown suffix means plain text."""
    return _format(*suffixes(file.name))


@functools.cache
def _format(suffix: str, compression: Any) -> Format:
    format = next(format for format in FORMATS if (suffix or ".txt") in format.suffixes)
    return replace(format, cut="never", compression=compression) if compression else format


def is_text(name: str) -> bool:
    """Whether a search through a folder includes the file: its name has the suffix of a format."""
    return suffixes(name)[0] not in ("", *TABLES)


def suffixes(name: str) -> tuple[str, Any]:
    """(suffix of a format or "", .gz | .zst or ""): "a.json.gz" -> (".json", ".gz")."""
    found: Any = _SUFFIXES.search(name.lower())  # never None: the pattern matches an empty end, too
    return found[1] or "", found[2] or ""


def read_documents(file: FileSlice, reading: Reading, keep_bad: bool = False) -> Iterator[Document]:
    """The documents, each to be read before the next one; raises ValueError, OSError, ImportError.

    Null texts are left out, and invalid ones are an error, or with `keep_bad` they have a `problem`.
    """
    format = format_of(file.path)
    try:
        for document in format.read(file, reading):
            if reading.strip_gutenberg and not document.problem:
                document = _stripped(document, required=".txt" in format.suffixes)
            if keep_bad or not document.problem:
                yield document
            elif document.problem[0] != NULL:
                raise UnicodeError(document.problem[1])
    except (ValueError, OSError) as error:
        raise _naming_download(error, file.path) from error.__cause__


def _stripped(document: Document, required: bool) -> Document:
    """The document without Project Gutenberg's license: each row of a .parquet can be a book."""
    try:
        text = b"".join(document.chunks).decode()
    except UnicodeError as error:
        return replace(document, problem=(INVALID, str(error)))
    required = required and text != ""  # an empty file may be left out later
    return replace(document, chunks=[strip_gutenberg(text, document.source, required=required).encode()])


def _naming_download(error: Exception, path: TextFile) -> Exception:
    """The error, with advice how to download the file again if `fetch` downloaded it."""
    if isinstance(path, RemoteFile) or getattr(error, "errno", None):
        return error
    root = path.with_suffix("")  # fetch leaves a lock file without the suffixes that it adds
    locks = [name.with_name(f"{name.name}.lock") for name in (path, root, root.with_suffix(""))]
    advice = f". It was downloaded: delete {path} to download it again"
    is_download = any(lock.is_file() for lock in locks) and advice not in str(error)
    return type(error)(f"{error}{advice}") if is_download else error


def _chunks(file: FileSlice, reading: Reading) -> Iterator[bytes]:
    """The uncompressed bytes of a slice, up to CHUNK_BYTES at a time. Checks the first of a file."""
    path, format = file.path, format_of(file.path)
    remaining = sys.maxsize if file.stop is None else file.stop - file.start
    to_check = file.start == 0
    try:
        with open_raw(path, file.start, file.stop) as raw, _decompressed(raw, path) as stream:
            while chunk := stream.read(min(CHUNK_BYTES, remaining)):
                if to_check:
                    check_text(chunk, path, format.compression, reading.encoding_errors)
                    name = path.name.lower().removesuffix(format.compression)
                    if format.kind_of and (kind := format.kind_of(chunk, name, reading.text_column)):
                        raise refusal(path, *kind, format.compression)
                    to_check = False
                remaining -= len(chunk)
                yield chunk
    except Exception as error:
        is_broken = isinstance(error, (EOFError, zlib.error, gzip.BadGzipFile))
        if not is_broken and type(error).__name__ != "ZstdError":
            raise
        check_compressed(_head(path), path, format.compression)
        advice = "fetch it again, or run gzip -t or zstd -t"
        raise OSError(f"{path} is broken or cut short ({error}): {advice}") from error


def _head(path: TextFile) -> bytes:
    with open_raw(path) as raw:
        return raw.read(CHUNK_BYTES)


def _decompressed(raw: io.BufferedReader, path: TextFile) -> contextlib.AbstractContextManager[Any]:
    compression = format_of(path).compression
    if compression == ".gz":
        return gzip.open(raw, "rb")
    if compression == "":
        return contextlib.nullcontext(raw)
    if sys.version_info >= (3, 14):
        from compression import zstd
    else:
        zstd = needs("backports.zstd", "zstd", path)
    window = zstd.DecompressionParameter.window_log_max  # `zstd --long=31` needs the largest, 2 GiB
    return zstd.ZstdFile(raw, options={window: window.bounds()[1]})  # type: ignore[no-any-return]


def needs(module: str, extra: str, path: TextFile | str) -> Any:
    """Import an optional package; raises ImportError with the pip command if it is missing."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"{path} needs {module}: pip install 'lit-gptdata[{extra}]'") from error


def _invalid(error: UnicodeDecodeError, source: object, offset: int, advice: str = "") -> UnicodeError:
    """The error for invalid UTF-8 in the bytes that start at `offset` of `source`."""
    data, start = error.object, error.start
    problem = f"byte 0x{data[start]:02x} at offset {offset + start} ({error.reason})"
    advice = advice or encoding_advice(data, start, offset)
    return UnicodeError(f"{source} is not valid UTF-8: {problem}. {advice}")


def _read_txt(file: FileSlice, reading: Reading) -> Iterator[Document]:
    """The file is one document; a slice after the first continues it."""
    chunks = _text(_chunks(file, reading), file, reading.encoding_errors)
    source, continues = str(file.path), file.start > 0
    yield Document(source=source, chunks=chunks, continues=continues, number=file.number, place="")


def _row(file: FileSlice, place: str, read: Callable[[str], bytes | None]) -> Document:
    """The document of a line or row; `read` takes its name for messages, and returns its text."""
    source = f"{file.path}: {place}"
    try:
        text = read(source)
        problem = (NULL, "the text is null") if text is None else None
    except UnicodeError as error:
        text, problem = None, (INVALID, str(error))
    chunks = [text or b""]
    return Document(source=source, chunks=chunks, number=file.number, place=place, problem=problem)


def _text(raw: Iterable[bytes], file: FileSlice, errors: EncodingErrors) -> Iterator[bytes]:
    """Check UTF-8 and translate newlines to \\n, like `open(path, encoding="utf-8")`; a BOM stays."""
    offset, rest = file.start, b""
    try:
        for chunk in itertools.chain(raw, [b""]):
            data = rest + chunk
            try:
                # checks only: io.IncrementalNewlineDecoder would take a fifth of the time of a build
                text, used = codecs.utf_8_decode(data, errors, not chunk)
            except UnicodeDecodeError as error:
                if file.start:  # another slice has not checked what the file is yet
                    check_text(_head(file.path), file.path)
                raise _invalid(error, file.path, offset) from None
            valid = data[:used] if errors == "strict" else text.encode()
            if chunk and valid.endswith(b"\r"):  # maybe followed by \n
                valid, used = valid[:-1], used - 1
            offset, rest = offset + used, data[used:]
            if b"\r" in valid:
                valid = valid.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
            if valid:
                yield valid
    except (ValueError, OSError) as error:
        raise _naming_download(error, file.path) from error.__cause__


def _read_jsonl(file: FileSlice, reading: Reading) -> Iterator[Document]:
    """One document per line: the text at `text_column`. Blank lines are skipped."""
    for offset, line in _lines(file, reading):
        line = line.removeprefix(codecs.BOM_UTF8)  # Windows tools write it at the start of a file
        if line.strip():
            read = functools.partial(_json_text, line, offset, reading)
            yield _row(file, f"line at byte {offset}", read)


def _lines(file: FileSlice, reading: Reading) -> Iterator[tuple[int, bytes]]:
    """(offset, line without its \\n); only \\n ends a line, as JSON Lines defines."""
    offset, rest = file.start, bytearray()
    for chunk in _chunks(file, reading):
        rest += chunk
        *lines, rest = rest.split(b"\n") if b"\n" in chunk else [rest]
        for line in lines:
            if line:
                yield offset, bytes(line)
            offset += len(line) + 1
        if len(rest) > LINE_LIMIT:
            problem = f"the line at byte {offset} is longer than {LINE_LIMIT:,} bytes"
            raise ValueError(f"{file.path}: {problem}: split it")
    if rest:
        yield offset, bytes(rest)


def _json_text(line: bytes, offset: int, reading: Reading, source: str) -> bytes | None:
    """The text of a JSON line, which starts at byte `offset` of its file."""
    column = reading.text_column
    try:
        row = json.loads(line.decode(errors=reading.encoding_errors))  # bytes: it would guess UTF-16
    except UnicodeDecodeError as error:
        raise _invalid(error, source, offset) from None
    except (ValueError, RecursionError) as error:
        problem = f"is not JSON ({error}): it reads {line[:60]!r}. A line must be one object"
        raise ValueError(f"{source} {problem}") from None
    if not isinstance(row, dict):
        problem = f"holds {type(row).__name__}, expected an object with the key {column!r}"
        raise ValueError(f"{source} {problem}")
    if column not in row:
        problem = f"has the keys {sorted(row)}, not {column!r}"
        raise ValueError(f"{source} {problem}: set data.text_column (not to a key inside of an object)")
    if (value := row[column]) is None:
        return None
    if not isinstance(value, str):
        problem = f"{column!r} holds {type(value).__name__}, not text"
        raise ValueError(f"{source}: {problem}: set data.text_column")
    try:
        return value.encode()
    except UnicodeEncodeError as error:  # JSON can spell half of a surrogate pair: "\ud800"
        if reading.encoding_errors == "strict":
            problem = f"{source} holds a lone surrogate {value[error.start]!r}"
            raise UnicodeError(f"{problem}: {ADVICE}") from None
        return utf8(value)


def _read_parquet(file: FileSlice, reading: Reading) -> Iterator[Document]:
    """One document per row: the text in `text_column`."""
    path, column = file.path, reading.text_column
    if format_of(path).compression:
        raise ValueError(f"{path}: parquet files are compressed inside; unpack it and name it .parquet")
    arrow, parquet = (needs(name, "parquet", path) for name in ("pyarrow", "pyarrow.parquet"))
    # given a path, arrow reads without Python; it reads a remote file through our range reader
    source = open_raw(path) if isinstance(path, RemoteFile) else path
    try:
        table = parquet.ParquetFile(source, buffer_size=CHUNK_BYTES, pre_buffer=False)
    except (arrow.ArrowException, OSError) as error:
        if isinstance(error, RemoteError) or getattr(error, "errno", None):  # it names the file
            raise
        if not (head := _head(path)).startswith(b"PAR1"):
            check_text(head, path)
        problem = f"is not a parquet file, or cut short: {error}"
        raise ValueError(f"{path} {problem}. Fetch it again, or remove it") from None
    with table:
        names, kinds = table.schema_arrow.names, map(str, table.schema_arrow.types)
        if names.count(column) != 1:
            has_ids = any(re.search("list<.*int", kind) for kind in kinds)
            ids = f", or for token ids: lit-gptdata import parquet {path}" if has_ids else ""
            problem = f"has columns {sorted(names)}, not one named {column!r}"
            raise ValueError(f"{path} {problem}: set data.text_column{ids}")
        _check_single(table.metadata, path)
        kind = table.schema_arrow.field(column).type
        if not re.match(r"(dictionary<values=)?(large_)?(string|binary)(_view)?(,|$)", str(kind)):
            raise ValueError(f"{path}: {column!r} holds {kind}, not text: set data.text_column")
        for number, value in enumerate(_values(table, column, path, arrow)):
            yield _row(file, f"row {number}", functools.partial(_parquet_text, value, reading))


def _parquet_text(value: bytes | None, reading: Reading, source: str) -> bytes | None:
    """The text of a row; arrow does not check that strings are valid UTF-8."""
    try:
        return None if value is None else value.decode(errors=reading.encoding_errors).encode()
    except UnicodeDecodeError as error:
        raise _invalid(error, source, 0, f"Repair it, or {ADVICE}") from None


def _check_single(metadata: Any, path: TextFile) -> None:
    """Raise ValueError for several Parquet files in one, of which only the last footer is read."""
    groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
    data_bytes = sum(g.column(i).total_compressed_size for g in groups for i in range(g.num_columns))
    # in a single file these are indexes, otherwise also the files before the last one
    other_bytes = size_of(path) - len(b"PAR1") - data_bytes - metadata.serialized_size - 8
    if other_bytes > 0:
        with open_raw(path, max(0, other_bytes - INDEX_BYTES), other_bytes + 4) as raw:
            if b"PAR1PAR1" in raw.read(INDEX_BYTES + 4):
                advice = "give the original files, or join them with pyarrow"
                raise ValueError(f"{path} holds several Parquet files one after another: {advice}")


def _values(table: Any, column: str, path: TextFile, arrow: Any) -> Iterator[bytes | None]:
    """The values of a column of text, read in batches of bounded size."""
    groups = [table.metadata.row_group(i) for i in range(table.num_row_groups)]
    row_bytes = sum(group.total_byte_size for group in groups) // max(1, table.metadata.num_rows)
    batch_size = max(1, min(ROWS, BATCH_BYTES // max(1, row_bytes)))
    try:
        for batch in table.iter_batches(batch_size, columns=[column]):
            for value in batch.column(column).cast("large_binary"):  # to_pylist() copies all of them
                yield value.as_py()
    except RemoteError:
        raise
    except (arrow.ArrowException, OSError) as error:  # arrow does not name the file
        raise OSError(f"{path} is broken ({error}): fetch it again") from error


JSON_LINES = (".jsonl", ".json", ".ndjson", ".jsonlines")
FORMATS = (
    Format(suffixes=(".txt",), cut="inside_text", read=_read_txt, kind_of=kind_of_plain),
    Format(suffixes=JSON_LINES, cut="after_newline", read=_read_jsonl, kind_of=kind_of_rows),
    Format(suffixes=(".parquet",), cut="never", read=_read_parquet),
    Format(suffixes=TABLES, cut="never", read=_read_txt, kind_of=kind_of_table),
)

_NAMES = [suffix for format in FORMATS for suffix in format.suffixes]
ALL_SUFFIXES = [name + packed for name in ("", *_NAMES) for packed in ("", ".gz", ".zst")]
_SUFFIXES = re.compile(rf"({'|'.join(map(re.escape, _NAMES))})?(\.gz|\.zst)?$")
# The names that a search through a folder includes, for messages.
SEARCHED = f"{', '.join('*' + name for name in _NAMES if is_text(name))} and these as .gz or .zst"
