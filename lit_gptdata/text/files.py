"""Text files, here or at a URL: path | glob | folder | list → documents.

FilesCorpus("books/*.txt")         ->  one document a file, in the order of their paths
FilesCorpus("s3://bucket/books/")  ->  the same, listed and read where they are
"""

from __future__ import annotations

import functools
import glob
import hashlib
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from urllib.parse import unquote

from lit_gptdata.text.document import Document, SourceEntry
from lit_gptdata.text.formats import SEARCHED, FileSlice, Reading, format_of, is_text, read_documents
from lit_gptdata.text.listing import expand_url
from lit_gptdata.text.remote_file import (
    RemoteFile,
    TextFile,
    gone,
    map_in_threads,
    open_raw,
    sha256_of,
    size_of,
)

HASHERS = 4
"""Remote files hashed at a time, or more: a single one waits for its connection."""

HashFiles = Callable[[Sequence[TextFile], Callable[[int], object]], list[str]]
"""(files, on_bytes) → the SHA-256 (hex) of each, on_bytes called as in `FilesCorpus.sources`."""

FindCut = Callable[[bytes, int], int]
"""(buffer, start) → the first place at or after `start` where a text may be cut, -1 if none."""

CONTEXT = 4
"""Bytes before a cut that a `FindCut` may look at: the longest character."""


def hash_files(
    files: Sequence[TextFile], on_bytes: Callable[[int], object], n: int | None = None
) -> list[str]:
    """A `HashFiles`: by `n` threads of this process, None: half of the cores, beside a build."""
    if n is None:  # one core hashes what ten encode
        n = max(1, (os.cpu_count() or 1) // 2)
    if any(isinstance(file, RemoteFile) for file in files):
        n = max(n, HASHERS)
    return map_in_threads(functools.partial(sha256_of, on_bytes=on_bytes), files, n)


class FilesCorpus:
    """Text files: .txt (a document each), .jsonl, .parquet (a document a row), plain, .gz or .zst.

    `paths`: a path, a folder (searched, subfolders too), a glob (`**` allowed), each of them on this
    machine or at a URL that fsspec knows, or a list of these. Each is expanded in the order of its
    paths; a list keeps its own order; a file that is named twice is read once. Text is read as
    `open(path, encoding="utf-8")` reads it.

    Raises FileNotFoundError if something named does not exist or matches nothing, ValueError for an
    empty file, RemoteError (an OSError) for a URL that cannot be read.
    """

    def __init__(
        self,
        paths: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
        reading: Reading | None = None,
    ) -> None:
        self.reading = reading or Reading()
        named = [paths] if isinstance(paths, (str, os.PathLike)) else list(paths)
        if not named:
            raise ValueError("the corpus is an empty list: name at least one file, folder or glob")
        if "" in named:  # which a Path takes for this folder
            raise ValueError(
                "the corpus is an empty string: name a file, a folder ('.': this one) or a glob"
            )
        self._urls = [name for name in named if isinstance(name, str) and _is_remote(name)]
        listed = self._listed()
        once: dict[str, TextFile] = {}
        for path in (path for name in named for path in listed.get(str(name)) or expand(name)):
            once.setdefault(path.url if isinstance(path, RemoteFile) else os.path.realpath(path), path)
        self.files = list(once.values())
        for path in self.files:
            if size_of(path) == 0:
                raise ValueError(f"{path} is empty (0 bytes): remove it from the corpus, or fill it")

    def _listed(self) -> dict[str, list[RemoteFile]]:
        """Each URL that was named → its files as they are now."""
        found = map_in_threads(expand_url, self._urls)
        return dict(zip(self._urls, found, strict=True))

    def __iter__(self) -> Iterator[Document]:
        for number, path in enumerate(self.files):
            yield from read_documents(FileSlice(path=path, number=number), self.reading)

    def work_units(self, part_bytes: int, find_cut: FindCut | None) -> list[list[FileSlice]]:
        """The corpus as slices of about `part_bytes`, some small files or a piece of a large one each.

        Where they fall depends on the files alone. `find_cut=None`: a text must stay whole.
        """
        parts: list[list[FileSlice]] = [[]]
        room = part_bytes
        for number, path in enumerate(self.files):
            size = size_of(path)
            for part in self._slices(path, number, size, part_bytes, find_cut):
                length = (part.stop or size) - part.start
                if length > room and parts[-1]:
                    parts.append([])
                    room = part_bytes
                parts[-1].append(part)
                room -= length
        return parts

    def _slices(
        self, path: TextFile, number: int, size: int, part_bytes: int, find_cut: FindCut | None
    ) -> list[FileSlice]:
        kind, compression = format_of(path)
        if kind == "jsonl":
            find_cut = _after_newline
        elif kind == "parquet" or self.reading.strip_gutenberg:
            find_cut = None
        n = -(-size // part_bytes)
        if compression or find_cut is None or n < 2:
            return [FileSlice(path=path, number=number)]
        cut = functools.partial(_cut_in_file, path, find_cut=find_cut)
        near = (size * i // n for i in range(1, n))
        inner = map_in_threads(cut, near) if isinstance(path, RemoteFile) else map(cut, near)
        edges = sorted({0, *inner, size})
        return [
            FileSlice(path=path, number=number, start=start, stop=stop)
            for start, stop in itertools.pairwise(edges)
        ]

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) over the files' contents, in order, and how they are read; reads them all."""
        return hashlib.sha256(
            repr((self.reading, [source.sha256 for source in self.sources()])).encode()
        ).hexdigest()

    def sources(
        self,
        on_bytes: Callable[[int], object] = lambda _: None,
        hash_files: HashFiles = hash_files,
    ) -> list[SourceEntry]:
        """Path, size in bytes, format and SHA-256 of every file; reads them all.

        `on_bytes` is called with the bytes read since the last call. `hash_files`: who reads them.
        """
        hashes = hash_files(self.files, on_bytes)
        return [
            SourceEntry(
                path=_printable(path),
                size=size_of(path),
                format="".join(format_of(path)),
                sha256=sha256,
            )
            for path, sha256 in zip(self.files, hashes, strict=True)
        ]

    @property
    def names(self) -> list[str]:
        """What tells every file from any other, without looking at it: its absolute path or its URL."""
        return [
            file.label if isinstance(file, RemoteFile) else _printable(os.path.abspath(file))
            for file in self.files
        ]

    def file_stats(self) -> list[list[str | int]]:
        """Name, size in bytes and version of every file, now: equal stamps mean unchanged contents.

        The version is the mtime in ns, or what a URL's server calls it. Each URL is listed once, and
        from then on its files are read as long as they are now.
        """
        now = {file.url: file for files in self._listed().values() for file in files}
        self.files = [_as_listed(file, now) for file in self.files]
        return [[name, *_version(file)] for name, file in zip(self.names, self.files, strict=True)]

    def __repr__(self) -> str:
        names = [_printable(path) for path in self.files]
        shown = ", ".join(names if len(names) <= 3 else [names[0], "…", names[-1]])
        return f"FilesCorpus({len(names)} file{'s' if len(names) > 1 else ''}: {shown})"


def _as_listed(file: TextFile, now: dict[str, RemoteFile]) -> TextFile:
    if isinstance(file, Path):
        return file
    if file.url not in now:
        raise gone(file)
    return now[file.url]


def _version(file: TextFile) -> tuple[int, int | str]:
    if isinstance(file, RemoteFile):
        return file.size, file.version
    stat = file.stat()
    return stat.st_size, stat.st_mtime_ns


def _cut_in_file(path: TextFile, at: int, find_cut: FindCut) -> int:
    """The first cut at or after byte `at`; the file's size if there is none."""
    begin = max(0, at - CONTEXT)
    with open_raw(path, begin) as file:
        buffer = b""
        while chunk := file.read(1 << 16):
            buffer += chunk
            cut = find_cut(buffer, at - begin)
            if cut >= 0:
                return begin + cut
            # the longest match begins 3 bytes before the end, and looks CONTEXT bytes back
            at = max(at, begin + len(buffer) - 2)
            dropped = max(0, at - CONTEXT - begin)
            begin, buffer = begin + dropped, buffer[dropped:]
        return size_of(path)


def _is_remote(name: str) -> bool:
    return "://" in name and not name.startswith("file://")


def _printable(path: str | TextFile) -> str:
    """The path as text that JSON can hold: a name on disk may be any bytes; a URL without secrets."""
    if isinstance(path, RemoteFile):
        return str(path)
    return os.fsencode(path).decode(errors="backslashreplace")


def _after_newline(buffer: bytes, start: int) -> int:
    """jsonl may be cut after any \\n: none stands inside a line."""
    return buffer.find(b"\n", start - 1) + 1 or -1


def expand(name: str | os.PathLike[str]) -> list[Path]:
    """The files that a path, folder or glob names, in the order of their paths.

    Raises FileNotFoundError that names the folder it looked in.
    """
    if str(name).startswith("file://"):
        name = unquote(str(name).removeprefix("file://"))
        if not name.startswith("/"):
            raise ValueError(f"file://{name} names no path on this machine: give file:///… or a path")
    path = Path(name).expanduser()
    if path.is_dir():
        found = sorted(p for p in path.rglob("*") if is_text(p.name) and p.is_file())
        if not found:
            raise FileNotFoundError(
                f"the folder {path.resolve()} holds no text: looked for {SEARCHED} in it and its "
                "subfolders. Name another folder, or the files themselves"
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
