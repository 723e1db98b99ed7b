"""List the files that a name means: a path or URL of a file, a folder or a glob.

expand_url("s3://bucket/books/**/*.txt")  ->  [RemoteFile, RemoteFile, …]

fsspec's own glob and walk skip a folder that cannot be listed, for example after a server error. Here it
is listed again or raises an error, because a corpus must not lose text unnoticed.
"""

import difflib
import fnmatch
import functools
import glob
import itertools
import logging
import os
import re
import shlex
import stat
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from posixpath import basename
from typing import Any

from lit_gptdata._fsspec import RemoteNotFoundError, filesystem, local_path, redact, retry
from lit_gptdata.text.formats import SEARCHED, is_text
from lit_gptdata.text.remote_file import RemoteFile

log = logging.getLogger(__name__)

Infos = dict[str, dict[str, Any]]  # path in the file system → fsspec's metadata of the file
MAX_NAME, MAX_PATH = 255, 4095  # bytes, of Linux
RUN_FILES = frozenset(
    ("config.yaml", "hparams.yaml", "result.json", "summary.txt", "train.log", "metrics.csv", "loss.png")
)
_MAYBE_TEXT = re.compile(  # the end of a name that may be a text's
    r"(\.(txt|jsonl|parquet))?\.(text|md|markdown|rst|org|tex|csv|tsv|tab|psv|parq|arrow|jl|ldjson|pdf|epub"
    r"|docx?|odt|rtf|zip|tar|tgz|7z|rar|xz|bz2|lz4|br|Z)$|\.(txt|jsonl|parquet)\.(?!bak|tmp|part|lock)[^.]+$",
    re.IGNORECASE,
)
MAX_COMPARED = 10_000  # names in a folder that are compared with a misspelled one


def expand_path(
    name: str | os.PathLike[str], folder: Path, not_searched: frozenset[str] = frozenset()
) -> dict[str, Path]:
    """The files that a path, folder or glob on this machine names, sorted by path: real path → path.

    A relative name starts in `folder`. A search leaves out the folders `not_searched`, real paths.
    Raises FileNotFoundError, PermissionError for a folder, ValueError for a pipe or a device.
    """
    path = folder / (local_path(name) or name)
    if stat.S_ISDIR(mode := _mode(path)):
        found, left_out = _search(path, ["**", "*"], not_searched, texts_only=True)
        if found:
            _warn_of_texts(str(name), left_out)
            return found
        raise FileNotFoundError(f"{path.resolve()} {_no_text(str(name), left_out)}")
    if mode or os.path.islink(path):
        return {os.path.realpath(path): _checked(path, mode)}
    if _is_prose(os.fspath(name)):
        problem = f"no file is named {str(name)[:40] + '…'!r}"
        advice = "Write the text to a file, or give it to WindowDataset or create_dataloader"
        raise ValueError(f"{problem}: corpus is the path of a text, not the text. {advice}")
    parts = path.parts
    absent = (n for n in range(1, len(parts)) if not os.path.lexists(Path(*parts[: n + 1])))
    n_fixed = next((n for n in absent if glob.has_magic(parts[n])), None)
    if n_fixed is None:
        raise _not_found(str(name), path)
    root = Path(*parts[:n_fixed])
    content = "which does not exist"
    if root.is_dir():
        names_folders = os.fspath(name).endswith("/")  # as in a shell, d/*/ means the folders in d
        patterns = [*parts[n_fixed:], *(["**", "*"] if names_folders else [])]
        found, _ = _search(root, patterns, not_searched, texts_only=names_folders)
        if found:
            return found
        names = sorted(entry.name for entry in root.iterdir())
        more = ", …" if len(names) > 5 else ""
        content = f"which has {len(names)} entries: {', '.join(names[:5])}{more}"
    problem = f"no file matches {str(path)!r}: looked in {root.resolve()}, {content}"
    raise FileNotFoundError(f"{problem}. ** searches subfolders")


def _mode(path: str | os.PathLike[str]) -> int:
    """The `st_mode` of a file, with links followed; 0 if it does not exist."""
    try:
        return os.stat(path).st_mode
    except PermissionError:
        raise
    except (OSError, ValueError):  # also a loop of links, a name that is too long, a null character
        return 0


def _checked(path: Path, mode: int) -> Path:
    """The path of a regular file; raises FileNotFoundError for a broken link, ValueError for a pipe."""
    if not mode:
        raise FileNotFoundError(f"{path} is a broken link to {os.readlink(path)}: repair or remove it")
    if not stat.S_ISREG(mode):
        raise ValueError(f"{path} is a pipe, socket or device: write its text to a file, and name that")
    return path


def _is_prose(name: str) -> bool:
    """Whether a user probably gave a text instead of its path."""
    longest = max(len(part.encode(errors="replace")) for part in name.split("/"))
    words = name.split()
    return "\n" in name or "\0" in name or longest > MAX_NAME or len(name) > MAX_PATH or len(words) > 9


def _not_found(name: str, path: Path) -> FileNotFoundError:
    advice = "Give a path, a glob, a URL or 'sample'"
    if re.match(r"[a-z]\w+:/[^/]", name):
        advice = "Give a URL as a string, because a Path drops one of its slashes"
    while not path.parent.is_dir():
        path = path.parent
    names = [entry.name for entry in itertools.islice(path.parent.iterdir(), MAX_COMPARED)]
    if similar := difflib.get_close_matches(path.name, names):
        advice = f"Did you mean {' or '.join(repr(str(path.with_name(s))) for s in similar)}? {advice}"
    return FileNotFoundError(f"no such file or folder: {name} ({path} does not exist). {advice}")


def _no_text(name: str, left_out: Iterable[str]) -> str:
    """What a folder without texts holds instead, and a glob that names it."""
    text = f"holds no text: looked for {SEARCHED} in it and its subfolders, except hidden ones"
    suffixes = Counter(
        "".join(PurePosixPath(file).suffixes[-2 if file.endswith((".gz", ".zst")) else -1 :])
        for file in left_out
    ).most_common(3)
    if not suffixes:
        return f"{text}. Name other files"
    counts = ", ".join(f"{n:,} *{suffix}" for suffix, n in suffixes)
    pattern = f"{name.rstrip('/')}/**/*{suffixes[0][0]}"
    formats = {".bin": "nanogpt", ".idx": "megatron", ".npy": "npy", ".arrow": "arrow"}
    if ids := [formats[suffix] for suffix, _ in suffixes if suffix in formats]:
        command = f"lit-gptdata import {min(ids)} {shlex.quote(name)}"  # megatron has .bin files, too
        return f"{text}. It holds {counts}. For token ids: {command}"
    return f"{text}. It holds {counts}. To read them, give a glob such as {pattern!r}"


def _warn_of_texts(folder: str, left_out: Iterable[str]) -> None:
    """Warn of files that a search through a folder left out but that may be texts, by their names."""
    names = (name for name in left_out if not name.lower().startswith("readme"))
    found = Counter(match[0] for name in names if (match := _MAYBE_TEXT.search(name)))
    if found:
        counts = ", ".join(f"{n:,} *{suffix}" for suffix, n in found.most_common(9))
        pattern = f"{folder.rstrip('/')}/**/*{found.most_common(1)[0][0]}"
        _log_once(f"{folder} has other files that are not read: {counts}. To read them, add {pattern!r}")


def _search(
    root: Path, patterns: list[str], not_searched: frozenset[str], texts_only: bool
) -> tuple[dict[str, Path], list[str]]:
    """Files below `root` that match `patterns`, one per level: real path → path, and other names.

    Folders of runs are left out. If `root` is one, only the files are left out that train.py wrote.
    """
    found: dict[str, str] = {}  # path → real path
    other_names: list[str] = []
    searched: set[tuple[str, int]] = set()
    real_root = os.path.realpath(root)
    folders = [(str(root), real_root, patterns)]
    # links come last, so that files have their own paths if these are searched, too
    links: list[tuple[str, str, list[str]]] = []
    while folders or links:
        if not folders:
            folders, links = sorted(links, reverse=True), []
        folder, real_folder, patterns = folders.pop()
        is_root, key = folder == str(root), (real_folder, len(patterns))
        if key in searched or (real_folder in not_searched and not is_root):
            continue
        searched.add(key)
        entries = list(os.scandir(folder))
        held = {"multirun.yaml", *RUN_FILES}.intersection(entry.name for entry in entries)
        of_a_run = "multirun.yaml" in held or ("config.yaml" in held and len(held) > 1)
        for entry in entries:
            rests = _rests(entry.name, patterns)
            if not rests or (of_a_run and (not is_root or entry.name in RUN_FILES)):
                continue
            path, mode, is_link = entry.path, _mode(entry.path), entry.is_symlink()
            real = os.path.realpath(path) if is_link else f"{real_folder}/{entry.name}"
            if stat.S_ISDIR(mode) and real_root.startswith(f"{real}/"):
                _warn(f"{path} leads to a folder around {root}, which is not searched")
            elif stat.S_ISDIR(mode):
                below = links if is_link else folders
                below += [(path, real, rest) for rest in rests if rest]
                if rests == [[]]:
                    _log_once(f"{path} is a folder, which is not searched: add {path + '/'!r}")
            elif [] in rests and (is_text(entry.name) or not texts_only):
                _checked(Path(path), mode)
                found[path] = real
            elif not mode:
                _warn(f"{path} is a broken link to {os.readlink(path)}, which is left out")
            elif _is_visible(entry.name):
                other_names.append(entry.name)
    files: dict[str, Path] = {}
    for path in sorted(found, key=lambda path: path.split("/")):
        first = files.setdefault(found[path], Path(path))
        if str(first) != path:
            _warn(f"{path} is the same file as {first}, which is read once. To repeat a text, copy it")
    return files, other_names


def _rests(name: str, patterns: list[str]) -> list[list[str]]:
    """The patterns for what is below a name that matches the first one; [] if there are none left."""
    if patterns[0] != "**":
        return [patterns[1:]] if _match_name(name, patterns[0]) else []
    return [patterns] * _is_visible(name) + _rests(name, patterns[1:] or ["*"])


def _is_visible(name: str) -> bool:
    return _match_name(name, "*")


def _warn(message: str) -> None:
    warnings.warn(message, stacklevel=2)


@functools.cache
def _log_once(message: str) -> None:
    log.warning(message)


def expand_url(url: str) -> list[RemoteFile]:
    """The files that a URL of a file, folder or glob names now, sorted by path; raises RemoteError."""
    fs, path = filesystem(url)
    found = retry(url, lambda: _list(fs, path, url))
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
    is_search = url.endswith("/")
    if not is_search:
        try:
            info = fs.info(path)
        except FileNotFoundError:
            if not glob.has_magic(path):
                raise
        else:
            if info["type"] != "directory":
                return {path: info}
            is_search = True
    names, patterns = path.rstrip("/").split("/"), ["**", "*"] * is_search
    if glob.has_magic(path) and not (is_search and fs.exists(path)):
        n_fixed = next(i for i, name in enumerate(names) if glob.has_magic(name))
        names, patterns = names[:n_fixed], names[n_fixed:] + patterns
    files = _matching(fs, "/".join(names) or path, patterns)
    if not is_search:
        if files:
            return files
        raise RemoteNotFoundError(f"no file matches {redact(url)}: check the pattern and the address")
    found = {name: info for name, info in files.items() if is_text(basename(name))}
    left_out = filter(_is_visible, map(basename, files.keys() - found.keys()))
    if not found:
        raise RemoteNotFoundError(f"{redact(url)} {_no_text(redact(url), left_out)}")
    _warn_of_texts(redact(url), left_out)
    return found


def _matching(fs: Any, folder: str, patterns: list[str]) -> Infos:
    """The files below a folder that match `patterns`, one per level, with few requests."""
    from fsspec import AbstractFileSystem
    from fsspec.asyn import AsyncFileSystem

    name, base = ("_find", AsyncFileSystem) if fs.async_impl else ("find", AbstractFileSystem)
    # fsspec's default skips broken folders
    if "**" not in patterns or getattr(type(fs), name) is getattr(base, name):
        return dict(_walk(fs, folder, [patterns]))
    found: Infos = {}
    for path, info in fs.find(folder, detail=True).items():
        choices = [patterns]
        for name in path.removeprefix(folder.rstrip("/")).lstrip("/").split("/"):
            choices = _all_rests(name, choices)
        if [] in choices and info["type"] != "directory":
            found[path] = info
    return found


def _walk(fs: Any, folder: str, choices: list[list[str]]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The files below a folder that match one of the `choices` of patterns."""
    for info in fs.ls(folder, detail=True):
        path = info["name"].rstrip("/")
        rests = _all_rests(basename(path), choices)
        if info["type"] != "directory":
            if [] in rests:
                yield path, info
        elif path != folder.rstrip("/") and any(rests):
            yield from _walk(fs, path, rests)
        elif rests and path != folder.rstrip("/"):
            _log_once(f"{redact(path)} is a folder, which is not searched: ** searches subfolders")


def _all_rests(name: str, choices: list[list[str]]) -> list[list[str]]:
    return [rest for patterns in choices if patterns for rest in _rests(name, patterns)]


def _match_name(name: str, pattern: str) -> bool:
    """Match like a glob on disk: `*` does not match a hidden name, and brackets may be literal."""
    hidden = name == "__MACOSX" or (name.startswith(".") and not pattern.startswith("."))
    return name == pattern or (not hidden and fnmatch.fnmatchcase(name, pattern))
