"""Text files on disk: path | glob | folder | list → documents.

FilesCorpus("books/*.txt")  ->  one document a file, in the order of their paths
"""

from __future__ import annotations

import glob
import hashlib
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from lit_gptdata._io import sha256_file
from lit_gptdata.text.document import Document
from lit_gptdata.text.formats import NAME, FileSlice, Reading, format_of, read_documents

SEARCHED = "*.txt, *.jsonl, *.parquet and these as .gz or .zst"

FindCut = Callable[[bytes, int], int]
"""(buffer, start) → the first place at or after `start` where a text may be cut, -1 if none."""

CONTEXT = 4
"""Bytes before a cut that a `FindCut` may look at: the longest character."""


class FilesCorpus:
    """Text files: .txt (a document each), .jsonl, .parquet (a document a row), plain, .gz or .zst.

    `paths`: a path, a folder (searched, subfolders too), a glob (`**` allowed), or a list of these.
    Each is expanded in the order of its paths; a list keeps its own order; a file that is named twice
    is read once. Text is read as `open(path, encoding="utf-8")` reads it.

    Raises FileNotFoundError if something named does not exist or matches nothing, ValueError for an
    empty file.
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
        once: dict[str, Path] = {}
        for path in (path for name in named for path in expand(name)):
            once.setdefault(os.path.realpath(path), path)
        self.files = list(once.values())
        for path in self.files:
            if path.stat().st_size == 0:
                raise ValueError(f"{path} is empty (0 bytes): remove it from the corpus, or fill it")

    def __iter__(self) -> Iterator[Document]:
        for number, path in enumerate(self.files):
            yield from read_documents(FileSlice(path=path, number=number), self.reading)

    def parts(self, part_bytes: int, find_cut: FindCut | None) -> list[list[FileSlice]]:
        """The corpus as slices of about `part_bytes`, some small files or a piece of a large one each.

        Where they fall depends on the files alone. `find_cut=None`: a text must stay whole.
        """
        parts: list[list[FileSlice]] = [[]]
        room = part_bytes
        for number, path in enumerate(self.files):
            size = path.stat().st_size
            for part in self._slices(path, number, size, part_bytes, find_cut):
                length = (part.stop or size) - part.start
                if length > room and parts[-1]:
                    parts.append([])
                    room = part_bytes
                parts[-1].append(part)
                room -= length
        return parts

    def _slices(
        self, path: Path, number: int, size: int, part_bytes: int, find_cut: FindCut | None
    ) -> list[FileSlice]:
        kind, compression = format_of(path)
        if kind == "jsonl":
            find_cut = _after_newline
        elif kind == "parquet" or self.reading.strip_gutenberg:
            find_cut = None
        n = -(-size // part_bytes)
        if compression or find_cut is None or n < 2:
            return [FileSlice(path=path, number=number)]
        inner = [_cut_in_file(path, size * i // n, find_cut) for i in range(1, n)]
        edges = sorted({0, *inner, size})
        return [
            FileSlice(path=path, number=number, start=start, stop=stop)
            for start, stop in itertools.pairwise(edges)
        ]

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) over the files' contents, in order, and how they are read; reads them all."""
        return hashlib.sha256(
            repr((self.reading, [s["sha256"] for s in self.sources()])).encode()
        ).hexdigest()

    def sources(self, on_bytes: Callable[[int], None] = lambda _: None) -> list[dict[str, Any]]:
        """Path, size in bytes, format and SHA-256 of every file; reads them all.

        `on_bytes` is called with the bytes read since the last call.
        """
        return [
            {
                "path": _printable(path),
                "size": path.stat().st_size,
                "format": "".join(format_of(path)),
                "sha256": sha256_file(path, on_bytes),
            }
            for path in self.files
        ]

    def stamps(self) -> list[list[str | int]]:
        """Path, size in bytes and mtime in ns of every file: equal stamps mean unchanged contents."""
        stats = [(path, path.stat()) for path in self.files]
        return [
            [_printable(os.path.abspath(path)), stat.st_size, stat.st_mtime_ns] for path, stat in stats
        ]

    def __repr__(self) -> str:
        names = [_printable(path) for path in self.files]
        shown = ", ".join(names if len(names) <= 3 else [names[0], "…", names[-1]])
        return f"FilesCorpus({len(names)} file{'s' if len(names) > 1 else ''}: {shown})"


def _cut_in_file(path: Path, at: int, find_cut: FindCut) -> int:
    """The first cut at or after byte `at`; the file's size if there is none."""
    with open(path, "rb", buffering=0) as file:
        begin = max(0, at - CONTEXT)
        file.seek(begin)
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
        return path.stat().st_size


def _is_text(path: Path) -> bool:
    found = NAME.search(path.name)
    return found is not None and found["format"] is not None and path.is_file()


def _printable(path: str | os.PathLike[str]) -> str:
    """The path as text that JSON can hold: a name on disk may be any bytes."""
    return os.fsencode(path).decode(errors="backslashreplace")


def _after_newline(buffer: bytes, start: int) -> int:
    """jsonl may be cut after any \\n: none stands inside a line."""
    return buffer.find(b"\n", start - 1) + 1 or -1


def expand(name: str | os.PathLike[str]) -> list[Path]:
    """The files that a path, folder or glob names, in the order of their paths.

    Raises FileNotFoundError that names the folder it looked in.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        found = sorted(p for p in path.rglob("*") if _is_text(p))
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
