"""List the files that a name means: a path or URL of a file, a folder or a glob.

expand_url("s3://bucket/books/**/*.txt")  ->  [RemoteFile, RemoteFile, …]

fsspec's own glob, find and walk skip a folder that cannot be listed, for example after a server error.
Here it is listed again or raises an error, because a corpus must not lose text unnoticed.
"""

import difflib
import fnmatch
import functools
import glob
import logging
import os
import shlex
import stat
from collections import Counter, deque
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from posixpath import basename
from typing import Any

from lit_gptdata._fsspec import RemoteNotFoundError, filesystem, local_path, redact, retry
from lit_gptdata.text.formats import SEARCHED, is_text
from lit_gptdata.text.remote_file import THREADS, RemoteFile, map_in_threads

_log_once = functools.cache(logging.getLogger(__name__).warning)

Infos = dict[str, dict[str, Any]]  # path in the file system → fsspec's metadata of the file
Pattern = tuple[str, ...]  # for a path below a folder, one per level: ("**", "*.txt")
BELOW = ("**", "*")  # matches all files in a folder and its subfolders
RUN_FILES = ("result.json", "summary.txt", "tokenizer.json", "wandb")  # of train.py, next to config.yaml
MAX_COMPARED = 10_000  # names in a folder that are compared with a misspelled one


def expand_path(
    name: str | os.PathLike[str], folder: Path, not_searched: frozenset[str] = frozenset()
) -> dict[str, Path]:
    """The files that a path, folder or glob on this machine names, sorted by path: real path → path.

    A relative name starts in `folder`. A search leaves out the folders `not_searched`, real paths.
    Raises FileNotFoundError, PermissionError for a folder, ValueError for a pipe or a device.
    """
    path = folder / (local_path(name) or name)
    mode = _mode(path)
    is_folder = stat.S_ISDIR(mode)
    if not is_folder and (mode or os.path.islink(path)):
        return {os.path.realpath(path): _checked(path)}
    root, pattern = path, Pattern()
    while not os.path.isdir(root):
        root, pattern = root.parent, (root.name, *pattern)
    texts_only = is_folder or os.fspath(name).endswith("/")  # as in a shell, d/*/ means the folders in d
    if texts_only:
        pattern += BELOW
    found, left_out = _search(root, pattern, not_searched, texts_only)
    if found:
        _log_left_out(str(name), left_out)
        return found
    if is_folder:
        raise FileNotFoundError(f"{path} {_no_text(str(name), left_out)}")
    problem = f"no such file or folder: {str(name)!r:.200}"
    if closest := difflib.get_close_matches(pattern[0], os.listdir(root)[:MAX_COMPARED]):
        problem += f". The closest names in {root}: {closest}"
    advice = "Give a path, a glob (** searches subfolders), a URL as a string, or 'sample'"
    raise FileNotFoundError(f"{problem}. {advice}. For a text itself, use create_dataloader")


def _mode(path: Path | str) -> int:
    """The `st_mode` of a file, with links followed; 0 if it does not exist."""
    try:
        return os.stat(path).st_mode
    except PermissionError:
        raise
    except (OSError, ValueError):  # also a loop of links, a name that is too long, a null character
        return 0


def _checked(path: Path) -> Path:
    """The path of a regular file; raises FileNotFoundError for a broken link, ValueError for a pipe."""
    if not (mode := _mode(path)):
        raise FileNotFoundError(f"{path} is a broken link to {os.readlink(path)}: repair or remove it")
    if not stat.S_ISREG(mode):
        raise ValueError(f"{path} is a pipe, socket or device: write its text to a file, and name that")
    return path


def _no_text(folder: str, left_out: Iterable[str]) -> str:
    """What a folder without texts holds instead, and a glob that names it."""
    text = f"holds no text: looked for {SEARCHED} in it and its subfolders, except hidden ones"
    return f"{text}. {_other_files(folder, left_out) or 'Name other files'}"


def _log_left_out(folder: str, left_out: Iterable[str]) -> None:
    if others := _other_files(folder, left_out):
        _log_once(f"{folder} also has files that are not read. {others}")


def _other_files(folder: str, names: Iterable[str]) -> str:
    """The number of files with each suffix, and a glob that names the most frequent; "" without any."""
    counts = Counter(
        "".join(PurePosixPath(name).suffixes[-2 if name.endswith((".gz", ".zst")) else -1 :])
        for name in names
        if not name.lower().startswith("readme")
    ).most_common(5)
    if not counts:
        return ""
    found = ", ".join(f"{n:,} *{suffix}" for suffix, n in counts)
    formats = {".bin": "nanogpt", ".idx": "megatron", ".npy": "npy", ".arrow": "arrow"}
    if ids := [formats[suffix] for suffix, _ in counts if suffix in formats]:
        command = f"lit-gptdata import {min(ids)} {shlex.quote(folder)}"  # megatron has .bin files, too
        return f"It holds {found}. For token ids: {command}"
    pattern = f"{folder.rstrip('/')}/**/*{counts[0][0]}"
    return f"It holds {found}. To read them, give a glob such as {pattern!r}"


def _search(
    root: Path, pattern: Pattern, not_searched: frozenset[str], texts_only: bool
) -> tuple[dict[str, Path], list[str]]:
    """The files below `root` that match (real path → path), and the names of the other files."""
    found: dict[str, str] = {}  # path → real path
    left_out: list[str] = []
    searched: set[tuple[str, frozenset[Pattern]]] = set()
    real_root = os.path.realpath(root)
    folders = deque([(str(root), real_root, frozenset([pattern]))])
    while folders:
        folder, real_folder, patterns = folders.pop()
        if (real_folder, patterns) in searched:
            continue
        searched.add((real_folder, patterns))
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        is_of_a_run = any(entry.name == "config.yaml" for entry in entries)
        for entry in entries:
            path, is_link = entry.path, entry.is_symlink()
            real = os.path.realpath(path) if is_link else f"{real_folder}/{entry.name}"
            rests = _rests(entry.name, patterns)
            if not rests or (is_of_a_run and entry.name in RUN_FILES):
                continue
            mode = _mode(path)
            if stat.S_ISDIR(mode) and real_root.startswith(f"{real}/"):
                _log_once(f"{path} leads to a folder around {root}, which is not searched")
            elif stat.S_ISDIR(mode):
                # links come last, so that files have their own paths if these are searched, too
                add = folders.appendleft if is_link else folders.append
                if real not in not_searched and (below := _below(path, rests)):
                    add((path, real, below))
            elif () in rests and (is_text(entry.name) or not texts_only):
                _checked(Path(path))
                found[path] = real
            elif not mode:
                _log_once(f"{path} is a broken link to {os.readlink(path)}, which is left out")
            elif () in rests:
                left_out.append(entry.name)
    files: dict[str, Path] = {}
    for path in sorted(found, key=lambda path: path.split("/")):
        first = files.setdefault(found[path], Path(path))
        if str(first) != path:
            _log_once(f"{path} is the same file as {first}, which is read once. To repeat it, copy it")
    return files, left_out


def _rests(name: str, patterns: Iterable[Pattern]) -> frozenset[Pattern]:
    """The patterns for what is below a file or folder of this name; () if a pattern ends with it."""
    rests: set[Pattern] = set()
    for first, *rest in patterns:
        if first == "**":
            rests |= {(first, *rest)} if _match_name(name, "*") else set()
            rests |= _rests(name, [tuple(rest) or ("*",)])
        elif _match_name(name, first):
            rests.add(tuple(rest))
    return frozenset(rests)


def _below(folder: str, patterns: frozenset[Pattern]) -> frozenset[Pattern]:
    """The patterns for what is in a folder; logs if there are none."""
    if patterns == {()}:
        _log_once(f"{redact(folder)} is a folder, which is not searched: ** searches subfolders")
    return patterns - {()}


def _match_name(name: str, pattern: str) -> bool:
    """Match like a glob on disk: `*` does not match a hidden name, and brackets may be literal."""
    hidden = name == "__MACOSX" or (name.startswith(".") and not pattern.startswith("."))
    return name == pattern or (not hidden and fnmatch.fnmatchcase(name, pattern))


def expand_url(url: str) -> list[RemoteFile]:
    """The files that a URL of a file, folder or glob names now, sorted by path; raises RemoteError."""
    fs, path = filesystem(url)
    found = _list(fs, path, url)
    # what precedes the common end of both: "sftp://host" and "" for "sftp://host/a/*.txt" and "/a/*.txt"
    url, path = url.rstrip("/"), path.rstrip("/")
    n_common = len(os.path.commonprefix([url[::-1], path[::-1]]))  # noqa: RUF071 by characters
    url_prefix, path_prefix = url[: len(url) - n_common], path[: len(path) - n_common]
    return [
        RemoteFile.from_info(url_prefix + path.removeprefix(path_prefix), info)
        for path, info in sorted(found.items(), key=lambda item: item[0].split("/"))  # as Paths sort
    ]


def _list(fs: Any, path: str, url: str) -> Infos:
    """Path → metadata of the files that `path`, the path of `url` in a file system, names."""
    fs.invalidate_cache()
    texts_only = url.endswith("/")
    if not texts_only:
        try:
            info = retry(url, lambda: fs.info(path))
        except FileNotFoundError:
            if not glob.has_magic(path):
                raise
        else:
            if info["type"] != "directory":
                return {path: info}
            texts_only = True
    names = path.rstrip("/").split("/")
    n_fixed = next((i for i, name in enumerate(names) if glob.has_magic(name)), len(names))
    pattern = (*names[n_fixed:], *BELOW * texts_only)

    def entries(folder: str) -> list[dict[str, Any]]:
        return list(retry(url, lambda: fs.ls(folder, detail=True)))

    found: Infos = {}
    left_out: list[str] = []
    level = {"/".join(names[:n_fixed]) or "/": frozenset([pattern])}  # folders with the same depth
    while level:
        # other file systems may have a single connection
        listings = map_in_threads(entries, level, THREADS if fs.async_impl else 1)
        parents, level = level, {}
        for (parent, patterns), infos in zip(parents.items(), listings, strict=True):
            for info in infos:
                child = info["name"].rstrip("/")
                rests = _rests(basename(child), patterns)
                if not rests or child == parent.rstrip("/"):
                    continue
                if info["type"] == "directory":
                    if below := _below(child, rests):
                        level[child] = below
                elif () in rests and (is_text(child) or not texts_only):
                    found[child] = info
                elif () in rests:
                    left_out.append(basename(child))
    if not found:
        problem = _no_text(redact(url), left_out) if texts_only else "matches no file: check the pattern"
        raise RemoteNotFoundError(f"{redact(url)} {problem}")
    _log_left_out(redact(url), left_out)
    return found
