"""List the files that a name means: a path or URL of a file, a folder or a glob.

expand_url("s3://bucket/books/**/*.txt")  ->  [RemoteFile, RemoteFile, …]

fsspec's own glob and walk skip a folder that cannot be listed, for example after a server error. Here it
is listed again or raises an error, because a corpus must not lose text unnoticed.
"""

import fnmatch
import glob
import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from posixpath import basename
from typing import Any
from urllib.parse import unquote

from lit_gptdata._fsspec import RemoteNotFoundError, filesystem, redact, retry
from lit_gptdata.text.formats import SEARCHED, is_text
from lit_gptdata.text.remote_file import RemoteFile

Infos = dict[str, dict[str, Any]]  # path in the file system → fsspec's metadata of the file
NO_TEXT = f"holds no text: looked for {SEARCHED} in it and its subfolders. Name other files"


def expand_path(name: str | os.PathLike[str]) -> list[Path]:
    """The files that a path, folder or glob on this machine names, sorted by path.

    Raises FileNotFoundError that names the folder it searched.
    """
    if str(name).startswith("file://"):
        name = unquote(str(name).removeprefix("file://"))
        if not name.startswith("/"):
            raise ValueError(f"file://{name} is not a path on this machine: give file:///… or a path")
    path = Path(name).expanduser()
    if path.is_dir():
        found = sorted(p for p in path.rglob("*") if is_text(p.name) and p.is_file())
        if not found:
            raise FileNotFoundError(f"{path.resolve()} {NO_TEXT}")
        return found
    if path.exists():
        return [path]
    if not glob.has_magic(str(path)):
        raise FileNotFoundError(
            f"no such file or folder: {path} (in {Path.cwd()}). Give a path, a glob, a URL or 'sample'"
        )
    matches = map(Path, glob.glob(str(path), recursive=True))
    if found := sorted(match for match in matches if match.is_file()):
        return found
    folder = next(parent for parent in path.parents if not glob.has_magic(str(parent)))
    content = "which does not exist"
    if folder.is_dir():
        names = sorted(entry.name for entry in folder.iterdir())
        more = ", …" if len(names) > 5 else ""
        content = f"which has {len(names)} entries: {', '.join(names[:5])}{more}"
    raise FileNotFoundError(f"no file matches {str(path)!r}: looked in {folder.resolve()}, {content}")


def expand_url(url: str) -> list[RemoteFile]:
    """The files that a URL of a file, a folder or a glob names now, sorted by path.

    Raises RemoteError that names the URL, ValueError or ImportError for its scheme.
    """
    fs, path = filesystem(url)
    found = retry(url, lambda _: _list(fs, path, url), first_contact=True)
    # what precedes the common end of both: "sftp://host" and "" for "sftp://host/a/*.txt" and "/a/*.txt"
    url, path = url.rstrip("/"), path.rstrip("/")
    n_common = len(os.path.commonprefix([url[::-1], path[::-1]]))  # noqa: RUF071 by characters
    url_prefix, path_prefix = url[: len(url) - n_common], path[: len(path) - n_common]
    return [
        RemoteFile.from_info(url_prefix + path.removeprefix(path_prefix), info)
        for path, info in sorted(found.items(), key=lambda item: item[0].split("/"))  # as Paths sort
    ]


def _list(fs: Any, path: str, url: str) -> Infos:
    fs.invalidate_cache()
    if not url.endswith("/"):
        try:
            info = fs.info(path)
        except FileNotFoundError:
            if not glob.has_magic(path):
                raise
            return _glob(fs, path, url)
        if _is_file(info):
            return {path: info}
    found = {name: info for name, info in _find(fs, path).items() if is_text(basename(name))}
    if not found:
        raise RemoteNotFoundError(f"{redact(url)} {NO_TEXT}")
    return found


def _glob(fs: Any, pattern: str, url: str) -> Infos:
    names = pattern.split("/")
    n_fixed = next(i for i, name in enumerate(names) if glob.has_magic(name))
    folder, patterns = "/".join(names[:n_fixed]), names[n_fixed:]
    if "**" in patterns:
        files = _find(fs, folder)
        found = {path: files[path] for path in files if _match(path.split("/")[n_fixed:], patterns)}
    else:
        found = dict(_match_levels(fs, folder, patterns))
    if not found:
        raise RemoteNotFoundError(f"no file matches {redact(url)}: check the pattern and the address")
    return found


def _find(fs: Any, folder: str) -> Infos:
    """Every file in a folder and its subfolders, with as few requests as the file system allows."""
    from fsspec import AbstractFileSystem
    from fsspec.asyn import AsyncFileSystem

    name, base = ("_find", AsyncFileSystem) if fs.async_impl else ("find", AbstractFileSystem)
    if getattr(type(fs), name) is getattr(base, name):  # fsspec's default, which skips broken folders
        return dict(_walk(fs, folder))
    infos = fs.find(folder, detail=True)
    return {path: info for path, info in infos.items() if _is_file(info)}


def _walk(fs: Any, folder: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for info in fs.ls(folder, detail=True):
        path = info["name"].rstrip("/")
        if _is_file(info):
            yield path, info
        elif path != folder.rstrip("/"):
            yield from _walk(fs, path)


def _match_levels(fs: Any, folder: str, patterns: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The files below `folder` whose path matches `patterns`, one pattern per level."""
    for info in fs.ls(folder, detail=True):
        path = info["name"].rstrip("/")
        if _match_name(basename(path), patterns[0]):
            if len(patterns) > 1 and not _is_file(info):
                yield from _match_levels(fs, path, patterns[1:])
            elif len(patterns) == 1 and _is_file(info):
                yield path, info


def _match(names: list[str], patterns: list[str]) -> bool:
    """Whether the names of a path match one pattern each; `**` matches any number of folders."""
    if not patterns or not names:
        return not patterns and not names
    if patterns[0] != "**":
        return _match_name(names[0], patterns[0]) and _match(names[1:], patterns[1:])
    counts = itertools.takewhile(lambda n: n == 0 or _match_name(names[n - 1], "*"), range(len(names)))
    return any(_match(names[n:], patterns[1:] or ["*"]) for n in counts)


def _match_name(name: str, pattern: str) -> bool:
    """Match like a glob on disk: `*` does not match a name with a leading dot."""
    hidden = name.startswith(".") and not pattern.startswith(".")
    return not hidden and fnmatch.fnmatchcase(name, pattern)


def _is_file(info: dict[str, Any]) -> bool:
    return bool(info["type"] != "directory")
