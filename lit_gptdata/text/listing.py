"""What a URL names, listed as folders on disk are: a file, a folder or a glob → files.

expand_url("s3://bucket/books/**/*.txt")  ->  [RemoteFile, RemoteFile, …]

fsspec's own glob and walk leave out what cannot be listed, a folder behind an error 500, say. Here
nothing is left out: it is listed at another attempt, or there is an error.
"""

from __future__ import annotations

import fnmatch
import glob
import itertools
from collections.abc import Iterator
from typing import Any

from lit_gptdata._fsspec import RemoteNotFoundError, filesystem, redact, retry
from lit_gptdata.text.formats import SEARCHED, is_text
from lit_gptdata.text.remote_file import RemoteFile

Infos = dict[str, dict[str, Any]]
"""Path in the file system → what it says of the file."""


def expand_url(url: str) -> list[RemoteFile]:
    """The files that a URL, a folder or a glob names, in the order of their paths, as they are now.

    Raises RemoteError that names the URL, ValueError and ImportError for its scheme.
    """
    fs, path = filesystem(url)
    found = retry(url, lambda _: _listed(fs, path, url), first_contact=True)
    before, inside = _heads(url.rstrip("/"), path.rstrip("/"))
    return [
        RemoteFile.of(before + path.removeprefix(inside), info)
        for path, info in sorted(found.items(), key=lambda item: item[0].split("/"))  # as `Path`s are
    ]


def _listed(fs: Any, path: str, url: str) -> Infos:
    fs.invalidate_cache()
    if not url.endswith("/"):
        try:
            info = fs.info(path)
        except FileNotFoundError:
            if not glob.has_magic(path):
                raise
            return _globbed(fs, path, url)
        if _is_file(info):
            return {path: info}
    found = {name: info for name, info in _below(fs, path).items() if is_text(_last(name))}
    if not found:
        raise RemoteNotFoundError(
            f"{redact(url)} holds no text: looked for {SEARCHED} in it and below. Name another folder, "
            "or the files themselves"
        )
    return found


def _globbed(fs: Any, pattern: str, url: str) -> Infos:
    names = pattern.split("/")
    n_fixed = next(i for i, name in enumerate(names) if glob.has_magic(name))
    folder, wanted = "/".join(names[:n_fixed]), names[n_fixed:]
    if "**" in wanted:
        every = _below(fs, folder)
        found = {path: every[path] for path in every if _match(path.split("/")[n_fixed:], wanted)}
    else:
        found = dict(_level(fs, folder, wanted))
    if not found:
        raise RemoteNotFoundError(f"no file matches {redact(url)}: check the pattern and the address")
    return found


def _below(fs: Any, folder: str) -> Infos:
    """Every file in a folder and its subfolders, in as few requests as the file system can."""
    from fsspec import AbstractFileSystem
    from fsspec.asyn import AsyncFileSystem

    name, base = ("_find", AsyncFileSystem) if fs.async_impl else ("find", AbstractFileSystem)
    if getattr(type(fs), name) is getattr(base, name):  # it walks
        return dict(_walked(fs, folder))
    infos = fs.find(folder, detail=True)
    return {path: info for path, info in infos.items() if _is_file(info)}


def _walked(fs: Any, folder: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for info in fs.ls(folder, detail=True):
        path = info["name"].rstrip("/")
        if _is_file(info):
            yield path, info
        elif path != folder.rstrip("/"):
            yield from _walked(fs, path)


def _level(fs: Any, folder: str, wanted: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The files whose path below `folder` matches `wanted`, a pattern for each part of it."""
    for info in fs.ls(folder, detail=True):
        path = info["name"].rstrip("/")
        if _fits(_last(path), wanted[0]):
            if len(wanted) > 1 and not _is_file(info):
                yield from _level(fs, path, wanted[1:])
            elif len(wanted) == 1 and _is_file(info):
                yield path, info


def _match(names: list[str], wanted: list[str]) -> bool:
    """Whether the parts of a path match those of a pattern; `**` stands for any folders, or none."""
    if not wanted or not names:
        return not wanted and not names
    if wanted[0] != "**":
        return _fits(names[0], wanted[0]) and _match(names[1:], wanted[1:])
    seen = itertools.takewhile(lambda i: i == 0 or _fits(names[i - 1], "*"), range(len(names)))
    return any(_match(names[i:], wanted[1:] or ["*"]) for i in seen)


def _fits(name: str, pattern: str) -> bool:
    """As on disk, `*` stands for no name that begins with a dot."""
    hidden = name.startswith(".") and not pattern.startswith(".")
    return not hidden and fnmatch.fnmatchcase(name, pattern)


def _heads(url: str, path: str) -> tuple[str, str]:
    """What stands in a URL and in its path in the file system before that which is the same.

    _heads("sftp://host/a/*.txt", "/a/*.txt")  ->  ("sftp://host", "")
    """
    pairs = zip(reversed(url), reversed(path), strict=False)
    same = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
    return url[: len(url) - same], path[: len(path) - same]


def _last(path: str) -> str:
    return path.rpartition("/")[2]


def _is_file(info: dict[str, Any]) -> bool:
    return bool(info["type"] != "directory")
