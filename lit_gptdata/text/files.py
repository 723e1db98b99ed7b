"""A corpus of text files, on disk or at URLs.

FilesCorpus("books/*.txt")         ->  one document per file, in the order of their paths
FilesCorpus("s3://bucket/books/")  ->  the same from a URL, without a local copy
"""

import functools
import hashlib
import itertools
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lit_gptdata._checks import plain
from lit_gptdata._fsspec import canonical, local_path, redacted
from lit_gptdata._io import working_folder
from lit_gptdata.text.document import Document, SourceEntry
from lit_gptdata.text.formats import FileSlice, Reading, format_of, read_documents
from lit_gptdata.text.listing import expand_path, expand_url
from lit_gptdata.text.remote_file import (
    OnBytes,
    RemoteFile,
    TextFile,
    map_in_threads,
    open_raw,
    sha256_of,
    size_of,
)

REMOTE_HASHERS = 4  # threads that hash remote files, at least: each one waits for its connection
CONTEXT_BYTES = 4  # before a cut that a `FindCut` may look at: the longest UTF-8 character

PathLike = str | os.PathLike[str]
# (buffer, start) → the first position at or after `start` where a text may be cut, or -1.
FindCut = Callable[[bytes, int], int]


def flatten(names: Any) -> Iterator[Any]:
    """The entries of a list, tuple, ListConfig or array of any depth, in order; other objects as one."""
    if hasattr(names, "tolist"):  # of numpy, pandas, torch
        names = names.tolist()
    if isinstance(names, Sequence) and not isinstance(names, (str, bytes, bytearray)):
        for entry in names:
            yield from flatten(entry)
    else:
        yield names if isinstance(names, os.PathLike) else plain(names)


def check_names(names: Sequence[PathLike]) -> None:
    """Raise ValueError for a corpus without a name."""
    if not names or "" in names:  # Path("") would be the current folder
        kind = "string" if names else "list"
        advice = "name a file, a folder ('.' is the current one) or a glob"
        raise ValueError(f"the corpus is an empty {kind}: {advice}")


class FilesCorpus:
    """Text files as a corpus: a .txt is one document, a .jsonl or .parquet has one document per row.

    `paths` is a path, a folder (searched with its subfolders), a glob (`**` is allowed) or a list of
    these, on this machine or at URLs that fsspec knows. Matches are sorted by path; a list keeps its own
    order. A search follows links, and leaves out hidden names and the folders `not_searched` (real
    paths). Relative paths start in `folder`. Text is read like `open(path, encoding="utf-8")`.

    Raises FileNotFoundError if a name does not exist or matches nothing, ValueError for a file that is
    named twice or, unless `keep_empty`, an empty one, RemoteError (an OSError) for a URL that cannot be
    read.
    """

    def __init__(
        self, paths: PathLike | Sequence[PathLike], reading: Reading | None = None,
        folder: Path | None = None, not_searched: frozenset[str] = frozenset(), keep_empty: bool = False,
    ) -> None:  # fmt: skip
        self.reading = reading or Reading()
        names = [plain(name) for name in flatten(paths)]
        check_names(names)
        self._urls = [name for name in names if local_path(name) is None]
        remote = self._list_urls()
        folder = folder or working_folder()
        self.files: list[TextFile] = []
        named: dict[str, int] = {}  # real path or URL of a file → index of the name that means it
        for index, name in enumerate(names):
            urls = {canonical(file.url): file for file in remote.get(name, ())}
            found: Mapping[str, TextFile] = urls or expand_path(name, folder, not_searched)
            for key in (key for key in found if key in named):
                one, other = (redacted(repr(names[i])) for i in (named[key], index))
                advice = "name it once. To repeat a text, copy its file, or train for more epochs"
                raise ValueError(f"{found[key]} is in the corpus twice, as {one} and {other}: {advice}")
            named |= dict.fromkeys(found, index)
            self.files += found.values()
        for file in self.files:
            if size_of(file) == 0 and not keep_empty:
                raise ValueError(f"{file} is empty (0 bytes): remove it from the corpus, or fill it")

    def _list_urls(self) -> dict[str, list[RemoteFile]]:
        """Each URL that the user named → its files as they are now."""
        return dict(zip(self._urls, map_in_threads(expand_url, self._urls), strict=True))

    def __iter__(self) -> Iterator[Document]:
        return self.documents()

    def documents(self, keep_bad: bool = False) -> Iterator[Document]:
        """Like `iter`, or with `keep_bad` with bad documents as well, each with its `problem`."""
        for number, file in enumerate(self.files):
            yield from read_documents(FileSlice(path=file, number=number), self.reading, keep_bad)

    def work_units(self, unit_bytes: int, find_cut: FindCut | None) -> list[list[FileSlice]]:
        """Work units of about `unit_bytes`: small files, or, with a `find_cut`, slices of large ones."""
        units: list[list[FileSlice]] = [[]]
        free_bytes = unit_bytes
        for number, file in enumerate(self.files):
            size = size_of(file)
            edges = [0, *self._cuts(file, size, unit_bytes, find_cut), size]
            for start, stop in itertools.pairwise(edges):
                if stop - start > free_bytes and units[-1]:
                    units.append([])
                    free_bytes = unit_bytes
                free_bytes -= stop - start
                end = stop if len(edges) > 2 else None  # None: up to the end of the file
                units[-1].append(FileSlice(path=file, number=number, start=start, stop=end))
        return units

    def _cuts(self, file: TextFile, size: int, unit_bytes: int, find_cut: FindCut | None) -> list[int]:
        """Byte offsets inside a file that divide it into slices of about `unit_bytes`."""
        cut = format_of(file).cut
        if cut == "after_newline":
            find_cut = _after_newline
        elif cut == "never" or self.reading.strip_gutenberg:
            find_cut = None
        n_slices = -(-size // unit_bytes)
        if find_cut is None or n_slices < 2:
            return []
        find = functools.partial(_cut_in_file, file, find_cut=find_cut)
        targets = (size * i // n_slices for i in range(1, n_slices))
        return sorted(set(map_in_threads(find, targets)) - {0, size})

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) over the contents of the files in order and the reading options; reads all."""
        hashes = [source.sha256 for source in self.sources()]
        return hashlib.sha256(repr((self.reading, hashes)).encode()).hexdigest()

    def sources(self, on_bytes: OnBytes = lambda _: None) -> list[SourceEntry]:
        """Path, size in bytes, format and SHA-256 of every file; reads them all, in threads."""
        # half as many as cores, because a build runs at the same time, and takes ten times as long
        least = REMOTE_HASHERS if any(isinstance(file, RemoteFile) for file in self.files) else 1
        n_threads = max((os.cpu_count() or 1) // 2, least)
        hash_file = functools.partial(sha256_of, on_bytes=on_bytes)
        hashes = map_in_threads(hash_file, self.files, n_threads)
        return [
            SourceEntry(path=printable(f), size=size_of(f), format=format_of(f).name, sha256=sha256)
            for f, sha256 in zip(self.files, hashes, strict=True)
        ]

    @functools.cached_property
    def names(self) -> list[str]:
        """A unique name for every file, without a look at it: its absolute path or its URL."""
        return [
            f.label if isinstance(f, RemoteFile) else printable(os.path.abspath(f)) for f in self.files
        ]

    def file_stats(self) -> list[list[str | int]]:
        """Name, size and version (mtime in ns, or a URL's) of every file now; lists each URL again."""
        listed = {file.url: file for files in self._list_urls().values() for file in files}
        for file in self.files:
            if isinstance(file, RemoteFile) and file.url not in listed:
                raise file.removed_error()
        # later reads expect the files of this listing
        self.files = [listed[f.url] if isinstance(f, RemoteFile) else f for f in self.files]
        return [[name, *_stats(file)[:2]] for name, file in zip(self.names, self.files, strict=True)]

    def contents(self) -> list[list[int]]:
        """ctime (ns) and inode of each file, [] for a URL: a change may keep the size and mtime."""
        return [_stats(file)[2:] for file in self.files]

    def __repr__(self) -> str:
        names = [printable(file) for file in self.files]
        text = ", ".join(names if len(names) <= 3 else [names[0], "…", names[-1]])
        return f"FilesCorpus({len(names)} file{'s' if len(names) > 1 else ''}: {text})"


def _stats(file: TextFile) -> list[Any]:
    """Size, version, and of a file on this machine also ctime and inode."""
    if isinstance(file, RemoteFile):  # without a version it may have changed, so it is read
        return [file.size, file.version, *([] if file.version else [time.time_ns()])]
    stat = file.stat()
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]


def _cut_in_file(file: TextFile, target: int, find_cut: FindCut) -> int:
    """The first cut at or after byte `target`, or the file's size if there is none."""
    buffer_start = max(0, target - CONTEXT_BYTES)
    with open_raw(file, buffer_start) as raw:
        buffer = b""
        while chunk := raw.read(1 << 16):
            buffer += chunk
            cut = find_cut(buffer, target - buffer_start)
            if cut >= 0:
                return buffer_start + cut
            # a match that continues in the next chunk can start in the last 2 bytes
            target = max(target, buffer_start + len(buffer) - 2)
            dropped = max(0, target - CONTEXT_BYTES - buffer_start)
            buffer_start, buffer = buffer_start + dropped, buffer[dropped:]
        return size_of(file)


def _after_newline(buffer: bytes, start: int) -> int:
    """A `FindCut` for jsonl: after any \\n, because a line of JSON contains none."""
    return buffer.find(b"\n", start - 1) + 1 or -1


def printable(file: TextFile | str) -> str:
    """The path as text for JSON: file names on disk may be any bytes, and URLs may hold secrets."""
    if isinstance(file, RemoteFile):
        return str(file)
    path = str.__str__(file) if isinstance(file, str) else file
    return os.fsencode(path).decode(errors="backslashreplace")
