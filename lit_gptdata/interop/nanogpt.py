"""nanoGPT's train.bin and val.bin: ids of uint16 (uint32 for a large vocabulary), and nothing else."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from lit_gptdata.interop.blocks import Block, Part, read_binary
from lit_gptdata.interop.llmc import HEADER, KINDS


def read(path: Path, dtype: np.dtype, column: str | None) -> Iterator[Block]:
    """The ids of a file; raises ValueError for a file of another format, or an odd size."""
    size, other = path.stat().st_size, "megatron" if path.with_suffix(".idx").is_file() else None
    if {*np.fromfile(path, HEADER, 1).tolist()} & {*KINDS}:
        other = "llmc"
    if other:
        raise ValueError(f"{path} has the format {other}: lit-gptdata import {other} {path}")
    if size % dtype.itemsize:
        problem = f"ends inside an id of {dtype.name}, at offset {size:,}: it was cut short, or has"
        raise ValueError(f"{path} {problem} another type: give --dtype")
    if not size:
        raise ValueError(f"{path} is empty (0 bytes): remove it, or write its ids")
    head = np.fromfile(path, dtype, 1 << 12)
    if len(head) > 8 and (largest := head[1::2].max()) <= 3 < head.max():
        problem = f"every second id of {dtype.name} is ≤ {largest}, so they are of a larger type"
        raise ValueError(f"{path}: {problem}: give --dtype uint32, or save them as uint32")
    return read_binary(path, dtype, 0, size // dtype.itemsize)


def write(folder: Path, name: str, part: Part) -> None:
    """Write `name`.bin with the store's dtype."""
    with open(folder / f"{name}.bin", "wb") as file:
        for block in part.blocks():
            file.write(block.ids.data)
