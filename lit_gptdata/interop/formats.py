"""The formats by name, and which files of a list are train, val and test."""

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

import lit_gptdata.interop.columns as columns
import lit_gptdata.interop.llmc as llmc
import lit_gptdata.interop.megatron as megatron
import lit_gptdata.interop.nanogpt as nanogpt
import lit_gptdata.interop.npy as npy
from lit_gptdata.interop.blocks import Block, Part

SPLITS = ("train", "val", "test")
_SPLIT = re.compile(rf"(?<![a-z])({'|'.join(SPLITS)})(?:id|idation)?(?![a-z])")


class Format(NamedTuple):
    """How to read the ids of another program, and perhaps how to write them."""

    suffix: str
    read: Callable[[Path, np.dtype, str | None], Iterator[Block]]
    """(file, dtype of ids without a header, column with ids) → blocks."""
    write: Callable[[Path, str, Part], None] | None = None
    """(folder, name of the split, its tokens)."""


FORMATS = {
    "nanogpt": Format(".bin", nanogpt.read, nanogpt.write),
    "llmc": Format(".bin", llmc.read, llmc.write),
    "megatron": Format(".idx", megatron.read, megatron.write),
    "parquet": Format(".parquet", columns.read, columns.write),
    "arrow": Format(".arrow", columns.read),
    "npy": Format(".npy", npy.read),
}


def find_files(paths: Sequence[str], suffix: str) -> list[tuple[str, Path]]:
    """(split, file) for each file: those given, and those in a folder by name; train, val, test.

    All are "train" unless the names have the words train, and val or test. Raises FileNotFoundError,
    ValueError.
    """
    found: dict[Path, str] = {}
    for folder in map(Path, paths):
        files = sorted(folder.rglob(f"[!.]*{suffix}")) if folder.is_dir() else [folder]
        if suffix == ".idx":  # Megatron names an .idx and its .bin without a suffix
            files = [Path(re.sub(r"(\.bin|\.idx)?$", suffix, str(file), count=1)) for file in files]
        for file in files:
            shown = file.relative_to(folder) if folder.is_dir() else file.name
            found[file] = "".join(_SPLIT.findall(str(shown).lower())[-1:])
            if file.suffix != suffix or not file.is_file():
                raise FileNotFoundError(f"{file} is not a file, or not a *{suffix} file")
        if not files:
            raise FileNotFoundError(f"{folder} holds no *{suffix} files")
    splits = {*found.values()}
    if "train" not in splits or not splits & {"val", "test"}:
        return [("train", file) for file in found]
    if unnamed := [file for file, split in found.items() if not split]:
        raise ValueError(f"{unnamed[0]} has no split in its name, but others have: leave it out")
    return [(split, file) for split in SPLITS for file, has in found.items() if has == split]
