"""Recognize what a file is by its first bytes, and refuse one that is not the text its name promises.

check_text(b"%PDF-1.7 …", Path("a.txt"))  ->  ValueError: a.txt is a PDF document: run pdftotext …
"""

import codecs
import json
import os
import re
import shlex
from typing import Literal

from lit_gptdata.text.remote_file import RemoteFile, TextFile

FEW_NULS = 16  # a text may have this number of NUL bytes, or one in 100 bytes
SAMPLE_BYTES = 4096  # decoded to recognize UTF-16, searched for a JSON key; a multiple of 4
_BEFORE_HTML = rb"(?is)(?:[\s\xef\xbb\xbf]|<!--.{,65536}?-->|<\?xml[^>]{,99}\?>)*"
HTML_HEAD = re.compile(_BEFORE_HTML + rb"<(!doctype\s+html|html|head|body|meta|script)\b")
ADVICE = "set encoding_errors=replace or on_bad_document=skip"  # for invalid UTF-8
TABLES = (".csv", ".tsv", ".tab", ".psv")

_GZIP, _ZSTD = rb"\x1f\x8b", rb"\(\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18"
_ZIP = rb"PK\x03\x04.{26}"  # and the name of the first member
_PANDOC = "pandoc -t plain -o {new}.txt {path}"
_OFFICE = "soffice --headless --convert-to txt:Text {path}"
_ICONV = "iconv -f %s -t utf-8 {path} > {new}{suffix}"
_HTML = "pandoc -f html -t plain -o {new}.txt {path}"
_JQ = "jq -c '%s' {path} > {new}.jsonl"
_IMPORT = "lit-gptdata import %s {path}"
_BINARY = "binary data, perhaps token ids", _IMPORT % "nanogpt"
_CSV = (  # with csv, because pandas turns texts such as NA into nulls
    'python -c "import csv, json, sys; csv.field_size_limit(1 << 30); '
    "rows = csv.DictReader(open(sys.argv[1], encoding='utf-8-sig', newline=''), delimiter=%s); "
    "open(sys.argv[2], 'w').writelines(json.dumps(row) + '\\n' for row in rows)\" {path} {stem}.jsonl"
)
_UNPACK = {".gz": "gunzip -k", ".zst": "zstd -d"}
# (pattern of the first bytes, what the file is, the command that makes text of it). Names in a command:
# {path}: the file, uncompressed, {bare}: without .gz or .zst, {stem}: no suffix, {new}: new. "": none.
_KINDS = (
    (_GZIP, "gzip data", "mv {path} {bare}.gz"),
    (_ZSTD, "zstd data", "mv {path} {bare}.zst"),
    (rb"PAR1\x15", "a Parquet file", "mv {path} {stem}.parquet"),
    (_ZIP + rb"mimetypeapplication/epub", "an EPUB book", _PANDOC),
    (_ZIP + rb"(?:\[Content_Types|_rels/|docProps/|word/|xl/|ppt/)", "an Office file", _OFFICE),
    (rb"PK(?:\x03\x04|\x05\x06|\x07\x08)", "a zip archive", "unzip {path} -d {new}"),
    (rb"\xfd7zXZ\0", "xz data", "xz -dc {path} > {new}.txt"),
    (rb"BZh[1-9](?:1AY&SY|\x17rE8P)", "bzip2 data", "bunzip2 -c {path} > {new}.txt"),
    (rb"\s*%PDF-\d", "a PDF document", "pdftotext {path} {new}.txt"),
    (rb"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an old Office file (.doc, .xls, .ppt)", _OFFICE),
    (rb"\{\\rtf\d", "an RTF document", _OFFICE),
    (rb"\xff\xfe\0\0|\0\0\xfe\xff", "UTF-32", _ICONV % "utf-32"),
    (rb"\xff\xfe|\xfe\xff", "UTF-16", _ICONV % "utf-16"),
    (rb"[^\x1b\0]*\x1b\$[@B]", "ISO-2022-JP", _ICONV % "iso-2022-jp"),
    (rb".{257}ustar", "a tar archive", "mkdir {new} && tar -xf {path} -C {new}"),
    (rb"(?:<\?xml[^>]*>\s*)?<Error>\s*<Code>", "an error message of a server", ""),
    (rb"version https://git-lfs", "a Git LFS pointer", "git lfs pull"),
    (rb"/annex/objects/", "a git-annex pointer", "git annex get {path}"),
    (rb"\x93NUMPY", "a NumPy array", _IMPORT % "npy"),
    (rb"ARROW1\0\0|\xff\xff\xff\xff.{3}\0\x10\0\0\0", "an Arrow file, not Parquet", _IMPORT % "arrow"),
    (rb"\x88\xd84\x01|\xa1\xd94\x01", "token ids of llm.c", _IMPORT % "llmc"),
    (rb"MMIDIDX\0\0|TNTIDX\0\0", "an index of token ids of Megatron", _IMPORT % "megatron"),
)  # fmt: skip
_KIND = re.compile(b"|".join(b"(" + pattern + b")" for pattern, *_ in _KINDS), re.DOTALL)
_COMPRESSED = re.compile(b"(" + _GZIP + b")|" + _ZSTD)
_CONTROLS = bytes({*range(0x20), 0x7F} - {*b"\b\t\n\v\f\r\x1a\x1b\x1c\x1d\x1e\x1f"})  # rare in any text


def compression_of(head: bytes) -> Literal["", ".gz", ".zst"]:
    """How a file with these first bytes is compressed."""
    match = _COMPRESSED.match(head)
    return "" if match is None else ".gz" if match[1] else ".zst"


def rows_format(head: bytes) -> Literal["", ".jsonl", ".parquet"]:
    """The format of a file of many texts with these first bytes, or ""."""
    if head.startswith(b"PAR1\x15"):
        return ".parquet"
    start = _start(head)
    return ".jsonl" if start[:1] == b"{" and _is_json_lines(start, "text", "") else ""


def check_compressed(head: bytes, path: TextFile, compression: str) -> None:
    """Raise ValueError if the first bytes of a file are not compressed as its name says."""
    if compression_of(head) != compression:
        check_text(head, path)
        raise refusal(path, f"not compressed, in spite of its suffix {compression}", "mv {path} {bare}")


def check_text(head: bytes, path: TextFile, compression: str = "", errors: str = "strict") -> None:
    """Raise ValueError if these first bytes of a file, after decompression, are not text in UTF-8."""
    found: tuple[str, str] | None = None
    if match := _KIND.match(head):
        found = _KINDS[(match.lastindex or 1) - 1][1:]
    elif b"\0" in head:
        found = _kind_with_nuls(head)
    # reading with "strict" finds that other binary data is not UTF-8
    if not found and errors != "strict" and has_controls(head) and not _is_utf8(head):
        found = _BINARY
    if found:
        raise refusal(path, *found, compression)


def _kind_with_nuls(head: bytes) -> tuple[str, str] | None:
    """(what data with NUL bytes is, the command), or None for a text with few of them."""
    n_nuls = head.count(0)
    if n_nuls > len(head) / 256 and (encoding := _utf16_or_32(head)):
        return f"{encoding[:6].upper()} without a byte order mark", _ICONV % encoding
    if n_nuls <= max(FEW_NULS, len(head) / 100):
        return None
    if _is_utf8(head) and not has_controls(head.replace(b"\0", b"")):
        return "text with many NUL bytes", r"tr -d '\0' < {path} > {new}{suffix}"
    return _BINARY


def _utf16_or_32(data: bytes) -> str:
    """The encoding of a text in UTF-16 or UTF-32 without a byte order mark, or ""."""
    if not has_controls(data):  # an alphabet has small upper bytes, and other scripts any lower byte
        return ""
    for encoding in ("utf-32le", "utf-32be", "utf-16le", "utf-16be"):
        text = data[:SAMPLE_BYTES].decode(encoding, "replace").replace("\ufffd", "\0")
        # numbers such as token ids give unassigned characters, too, and hardly any spaces
        n_spaces = sum(map(text.count, " \n。、，"))
        n_printable = sum(char.isprintable() or char.isspace() for char in text)
        if n_spaces > 0.01 * len(text) and n_printable > 0.98 * len(text):
            return encoding
    return ""


def has_controls(data: bytes) -> bool:
    """Whether many bytes are control characters, as in binary data."""
    return len(data) - len(data.translate(None, _CONTROLS)) > 2 + len(data) / 32


def _is_utf8(data: bytes) -> bool:
    try:
        codecs.utf_8_decode(data, "strict", False)
    except UnicodeDecodeError:
        return False
    return True


def encoding_advice(data: bytes, position: int, offset: int) -> str:
    """A sentence of advice for invalid UTF-8 at `data[position]`. `offset`: of `data` in the file."""
    if has_controls(data[position : position + SAMPLE_BYTES]):
        if encoding := _utf16_or_32(data):
            return f"It looks like {encoding[:6].upper()}: convert it (iconv -f {encoding} -t utf-8 …)"
        ids = _IMPORT.replace("{path}", "FILE") % "nanogpt"
        start = f"Binary data starts near offset {offset + position}"
        return f"{start}: take it out of the text. If the file has token ids, run {ids}"
    convert = "convert it if all of it has another encoding (iconv -f latin1 -t utf-8 …, or cp1252, …)"
    return f"Repair this place, {convert}, or {ADVICE}"


def kind_of_plain(head: bytes, name: str, text_column: str) -> tuple[str, str] | None:
    """(what a file is, the command) if it is a page, a notebook or a table of texts, else None."""
    suffix, start = os.path.splitext(name)[1], _start(head)
    if HTML_HEAD.match(head) and suffix in ("", ".txt"):
        return "an HTML page (name it .html to read its markup)", _HTML
    if start[:1] == b"{" and (suffix == ".ipynb" or b'"cell_type"' in start):
        return "a notebook", "jupyter nbconvert --to script {path}"
    if start[:1] == b"{" and _is_json_lines(start, text_column, suffix):
        return "JSON Lines, not one text", "mv {path} {stem}.jsonl"
    has_key = json.dumps(text_column).encode() in start
    if re.match(rb'\[\s*\{\s*"[^"]*"\s*:', start) and (has_key or suffix in ("", ".txt")):
        return "a JSON array", _JQ % ".[]"
    return None


def kind_of_table(head: bytes, name: str, text_column: str) -> tuple[str, str]:
    """The command that makes JSON Lines of a table, whatever its columns are."""
    header = head.removeprefix(codecs.BOM_UTF8).partition(b"\n")[0]
    usual = b"\t" if name.endswith((".tsv", ".tab")) else b","
    delimiter = max(b",;\t|", key=lambda byte: (header.count(byte), byte == usual[0]))
    return "a table, not one text (name it .txt to read it as one)", _CSV % repr(chr(delimiter))


def kind_of_rows(head: bytes, name: str, text_column: str) -> tuple[str, str] | None:
    """(what it is, the command) if it is a page, an array, or one object on several lines, else None."""
    start = _start(head)
    first, newline, _ = start.partition(b"\n")
    if HTML_HEAD.match(head):
        return "an HTML page", _HTML
    if start[:1] == b"[":
        is_of_strings = re.match(rb'\[\s*"', start)
        what = "a JSON array, not one object per line"
        return what, _JQ % (".[] | {{text: .}}" if is_of_strings else ".[]")
    if newline and re.search(rb"[{\[]\s*$|[^}\s]\s*,\s*$", first):
        what = "JSON on several lines, not one object per line (name it .txt to read it as text)"
        return what, _JQ % "."
    return None


def _start(head: bytes) -> bytes:
    return head.removeprefix(codecs.BOM_UTF8).lstrip()


def _is_json_lines(start: bytes, text_column: str, suffix: str) -> bool:
    """Whether the first line is a JSON object with the key of the text, or another object follows it."""
    first, newline, rest = start.partition(b"\n")
    try:
        row = json.loads(first.rstrip().removesuffix(b","))
    except (ValueError, RecursionError):
        key = re.escape(json.dumps(text_column).encode())  # the line may be longer than the head
        return not newline and re.search(key + rb'\s*:\s*"', first[:SAMPLE_BYTES]) is not None
    return text_column in row or (suffix != ".log" and rest.lstrip()[:1] == b"{")


def refusal(path: TextFile, what: str, command: str, compression: str = "") -> ValueError:
    """The error for a file that is not what its name promises; `command`: makes text of it, or ""."""
    problem = f"{path} {'holds' if compression else 'is'} {what}"
    if not command:
        return ValueError(f"{problem}: remove it and fetch the text again")
    is_remote = isinstance(path, RemoteFile)
    packed = path.name if is_remote else str(path)
    inner = packed[: len(packed) - len(compression)]
    bare = re.sub(r"\.(gz|zst)$", "", inner, flags=re.IGNORECASE)
    stem, suffix = os.path.splitext(bare)
    names = {"path": inner, "bare": bare, "stem": stem, "new": f"{stem}-text", "suffix": suffix}
    run = command.format(**{name: value and shlex.quote(value) for name, value in names.items()})
    if compression:
        run = f"{_UNPACK[compression]} {shlex.quote(packed)} && {run}"
    advice = f"run {run} and give the result as the corpus"
    if run.startswith("lit-gptdata"):
        advice = f"to train on token ids, run {run}"
    if is_remote:
        advice = f"copy it to this machine, {advice}"
    return ValueError(f"{problem}: {advice}")
