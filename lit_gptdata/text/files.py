"""Text files on disk: path | glob | folder | list → documents.

FilesCorpus("books/*.txt")  ->  one document a file, in the order of their paths
"""

from __future__ import annotations

import codecs
import glob
import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, get_args

from lit_gptdata._io import CHUNK_BYTES, sha256_file
from lit_gptdata.text.document import Document
from lit_gptdata.text.gutenberg import strip_gutenberg

EncodingErrors = Literal["strict", "replace"]

SUFFIXES = (".txt",)
"""What a folder is searched for; a file named outright is read as text whatever its name."""


class FilesCorpus:
    """Text files, one document each, read as `open(path, encoding="utf-8")` reads them.

    `paths`: a path, a folder (searched for .txt, subfolders too), a glob (`**` allowed), or a list
    of these. Each is expanded in the order of its paths; a list keeps its own order; a file that is
    named twice is read once.

    Raises FileNotFoundError if something named does not exist or matches nothing, ValueError for an
    empty file.
    """

    def __init__(
        self,
        paths: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
        *,
        encoding_errors: EncodingErrors = "strict",
        strip_gutenberg: bool = False,
    ) -> None:
        check_encoding_errors(encoding_errors)
        self.encoding_errors: EncodingErrors = encoding_errors
        self.strip_gutenberg = strip_gutenberg
        named = [paths] if isinstance(paths, (str, os.PathLike)) else list(paths)
        if not named:
            raise ValueError("the corpus is an empty list: name at least one file, folder or glob")
        once: dict[str, Path] = {}
        for path in (path for name in named for path in expand(name)):
            once.setdefault(os.path.realpath(path), path)
        self.files = list(once.values())
        for path in self.files:
            if path.stat().st_size == 0:
                raise ValueError(f"{path} is empty (0 bytes): remove it from the corpus, or fill it")

    def __iter__(self) -> Iterator[Document]:
        for path in self.files:
            chunks = read_text(path, self.encoding_errors)
            if self.strip_gutenberg:
                chunks = iter([strip_gutenberg("".join(chunks), str(path))])
            yield Document(source=str(path), chunks=chunks)

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) over the files' contents, in order, and how they are read; reads them all."""
        digest = hashlib.sha256(f"{self.encoding_errors} {self.strip_gutenberg}".encode())
        for path in self.files:
            digest.update(sha256_file(path).encode())
        return digest.hexdigest()

    def stamps(self) -> list[list[str | int]]:
        """Path, size in bytes and mtime in ns of every file: equal stamps mean unchanged contents."""
        stats = [(path, path.stat()) for path in self.files]
        return [[os.path.abspath(path), stat.st_size, stat.st_mtime_ns] for path, stat in stats]

    def __repr__(self) -> str:
        names = [str(path) for path in self.files]
        shown = ", ".join(names if len(names) <= 3 else [names[0], "…", names[-1]])
        return f"FilesCorpus({len(names)} file{'s' if len(names) > 1 else ''}: {shown})"


def check_encoding_errors(encoding_errors: str) -> None:
    """Raise ValueError for an unknown policy."""
    if encoding_errors not in get_args(EncodingErrors):
        raise ValueError(
            f"unknown encoding_errors {encoding_errors!r}: choose 'strict' (invalid UTF-8 is an "
            "error) or 'replace' (it becomes U+FFFD)"
        )


def expand(name: str | os.PathLike[str]) -> list[Path]:
    """The files that a path, folder or glob names, in the order of their paths.

    Raises FileNotFoundError that names the folder it looked in.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        found = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
        if not found:
            raise FileNotFoundError(
                f"the folder {path.resolve()} holds no text: looked for *{', *'.join(SUFFIXES)} in "
                "it and its subfolders. Name another folder, or the files themselves"
            )
        return found
    if path.exists():
        return [path]
    if not glob.has_magic(str(path)):
        raise FileNotFoundError(
            f"no such file or folder: {path} (looked in {Path.cwd()}). Give a path, a folder, a glob "
            "such as 'books/*.txt', a list of these, a URL, 'sample' or 'frankenstein'"
        )
    found = sorted(Path(match) for match in glob.glob(str(path), recursive=True))
    found = [match for match in found if match.is_file()]
    if not found:
        fixed = next(parent for parent in path.parents if not glob.has_magic(str(parent)))
        there = f"there are {_listing(fixed)}" if fixed.is_dir() else "that folder does not exist"
        raise FileNotFoundError(
            f"no file matches {str(path)!r}: looked in {fixed.resolve()}, {there}. Check the pattern"
        )
    return found


def _listing(folder: Path) -> str:
    names = sorted(entry.name for entry in folder.iterdir())
    return f"{len(names)} entries: {', '.join(names[:5])}{', …' if len(names) > 5 else ''}"


def read_text(path: Path, errors: EncodingErrors) -> Iterator[str]:
    """The text of a UTF-8 file in chunks, with universal newlines and a BOM kept.

    Raises UnicodeError that names the file and the byte offset.
    """
    offset, rest, held = 0, b"", ""
    with open(path, "rb", buffering=0) as file:
        while True:
            read = file.read(CHUNK_BYTES)
            data = rest + read
            try:
                text, used = codecs.utf_8_decode(data, errors, not read)
            except UnicodeDecodeError as error:
                raise UnicodeError(
                    f"{path} is not valid UTF-8: byte 0x{data[error.start]:02x} at offset "
                    f"{offset + error.start} ({error.reason}). Convert the file "
                    "(iconv -f latin1 -t utf-8 …), or set encoding_errors=replace"
                ) from None
            offset, rest = offset + used, data[used:]
            text = held + text
            held = "\r" if read and text.endswith("\r") else ""  # its \n may come next
            text = text[: len(text) - len(held)]
            if "\r" in text:
                text = text.replace("\r\n", "\n").replace("\r", "\n")
            if text:
                yield text
            if not read:
                return
