"""The formats by name, and which files of a list are train, val and test."""

import glob
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

import lit_gptdata.interop.columns as columns
import lit_gptdata.interop.flat as flat
import lit_gptdata.interop.megatron as megatron
from lit_gptdata.interop.blocks import Block, Part

SPLITS = ("train", "val", "test")
_VAL = ("val", "valid", "validation", "eval", "dev")
_WORDS = {"train": "train", "test": "test"} | dict.fromkeys(_VAL, "val")
_SPLIT = re.compile(rf"(?<![a-z])(?:{'|'.join(_WORDS)})(?![a-z])")
_LEFT_OUT = re.compile(r"(^|/)(\.|__MACOSX/|cache-[^/]*\.arrow$)")


class Format(NamedTuple):
    """How to read the ids of another program, and perhaps how to write them."""

    suffix: str
    read: Callable[[Path, np.dtype, str | None], Iterator[Block]]
    """(file, dtype of ids without a header, column with ids) → blocks."""
    write: Callable[[Path, str, Part], None] | None = None
    """(folder, name of the split, its tokens)."""


FORMATS = {
    "nanogpt": Format(".bin", flat.read_nanogpt, flat.write_nanogpt),
    "llmc": Format(".bin", flat.read_llmc, flat.write_llmc),
    "megatron": Format(".idx", megatron.read, megatron.write),
    "parquet": Format(".parquet", columns.read, columns.write),
    "arrow": Format(".arrow", columns.read),
    "npy": Format(".npy", flat.read_npy),
}


def find_files(paths: Sequence[str], suffix: str) -> list[tuple[str, Path]]:
    """(split, file) for each file: those given, of a glob, and in a folder by name; train, val, test.

    All are "train" unless the names have the words train, and val or test. Hidden names and the caches
    of the package datasets are left out. Raises FileNotFoundError, ValueError.
    """
    found: dict[Path, tuple[Path, Path]] = {}  # real path → path, folder
    for path in [path for name in paths for path in _expand(name)]:
        files, folder = [path], path.parent
        if path.is_dir():
            matches, folder = path.rglob(f"*{suffix}"), path
            files = sorted(f for f in matches if not _LEFT_OUT.search(str(f.relative_to(path))))
        elif suffix == ".idx":  # Megatron names an .idx and its .bin without a suffix
            files = [Path(re.sub(r"(\.bin|\.idx)?$", suffix, str(path), count=1))]
        for file in files:
            if not file.is_file():
                raise FileNotFoundError(f"no such file or folder: {file}")
            if file.suffix != suffix:
                raise FileNotFoundError(f"{file} is not a *{suffix} file")
            if (other := found.get(file.resolve())) and suffix != ".idx":
                raise ValueError(f"{other[0]} is given twice, also as {file}: give it once")
            found[file.resolve()] = file, folder
        if not files:
            raise FileNotFoundError(f"{path} holds no *{suffix} files")
    named = [(_split_of(file, str(file.relative_to(folder))), file) for file, folder in found.values()]
    if not any(split for split, _ in named):
        named = [(_split_of(None, folder.absolute().name), file) for file, folder in found.values()]
    splits = {split for split, _ in named}
    if unnamed := [file for split, file in named if not split and splits != {""}]:
        raise ValueError(f"{unnamed[0]} has no split in its name, but others have: rename or omit it")
    if splits == {"val", "test"}:
        raise ValueError("there are files of val and test, but none of train: add some, or omit test")
    if len(splits) == 1:
        return [("train", file) for _, file in named]
    return [(split, file) for split in SPLITS for has, file in named if has == split]


def _expand(name: str) -> list[Path]:
    """The path, or what a glob matches; raises FileNotFoundError if it matches nothing."""
    path = Path(name).expanduser()
    if path.exists() or not glob.has_magic(name):
        return [path]
    if matches := sorted(map(Path, glob.glob(str(path), recursive=True))):
        return matches
    raise FileNotFoundError(f"no file matches {name!r}")


def _split_of(file: Path | None, name: str) -> str:
    """The split in a name; "": none. Raises ValueError that names `file` if there are several."""
    words = {*_SPLIT.findall(name.lower())}
    if len({_WORDS[word] for word in words}) > 1:
        words -= {"eval", "dev"}  # they also mean other things
    splits = sorted({_WORDS[word] for word in words})
    if len(splits) > 1 and file:
        raise ValueError(f"{file} names several splits, {splits}: rename it")
    return splits[0] if len(splits) == 1 else ""
