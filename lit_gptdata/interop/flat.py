"""Files of ids without documents: nanoGPT's and llm.c's .bin, and NumPy's .npy.

nanoGPT   ids of uint16 (uint32 for a large vocabulary), and nothing else
llm.c     256 int32 of header (magic, version, number of ids), then the ids; modded-nanogpt reads it, too
NumPy     integers: one row of ids, or several rows, which are read one after another
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from lit_gptdata.interop.blocks import Block, Part, read_binary

HEADER, N_HEADER = np.dtype("<i4"), 256
KINDS: dict[int, tuple[int, np.dtype]] = {20240520: (1, np.dtype("<u2")), 20240801: (7, np.dtype("<u4"))}
"""Magic number → (version, dtype), of GPT-2 and of Llama 3, as in llm.c's dev/data/data_common.py."""
FILE_IDS = 100_000_000  # in a file, as in the files of llm.c's fineweb.py; an int32 counts them


def read_nanogpt(path: Path, dtype: np.dtype, column: str | None) -> Iterator[Block]:
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


def write_nanogpt(folder: Path, name: str, part: Part) -> None:
    """Write `name`.bin with the store's dtype."""
    with open(folder / f"{name}.bin", "wb") as file:
        for block in part.blocks():
            file.write(block.ids.data)


def read_llmc(path: Path, dtype: np.dtype, column: str | None) -> Iterator[Block]:
    """The ids of a file; raises ValueError for another header or size."""
    header, offset = np.fromfile(path, HEADER, N_HEADER), N_HEADER * HEADER.itemsize
    magic, version, n_ids = header[:3].tolist() if len(header) == N_HEADER else (None, None, 0)
    if magic not in KINDS or version != KINDS[magic][0]:
        known = ", ".join(f"{magic} {version}" for magic, (version, _) in KINDS.items())
        problem = f"starts with {magic} {version}, not with the header of llm.c ({known})"
        raise ValueError(f"{path} {problem}. For ids without a header: lit-gptdata import nanogpt")
    size, dtype = path.stat().st_size, KINDS[magic][1]
    if size != (end := offset + n_ids * dtype.itemsize):
        problem = f"ends at offset {size:,}, but its header (offset 8) has {n_ids:,} ids, to {end:,}"
        raise ValueError(f"{path} {problem}: it was cut short, or is not complete yet")
    return read_binary(path, dtype, offset, n_ids)


def write_llmc(folder: Path, name: str, part: Part) -> None:
    """Write `name`_000000.bin, …: an end-of-document id, unless one is first, and all ids.

    modded-nanogpt looks for documents after an end-of-document id.
    """
    dtype = part.store.dtype
    magic, version = next((m, v) for m, (v, has) in KINDS.items() if has == dtype)
    for number, begin in enumerate(range(part.begin, part.end, FILE_IDS)):
        piece = replace(part, begin=begin, end=min(part.end, begin + FILE_IDS))
        adds = number == 0 and part.separator >= 0 and not part.starts_with_separator
        header = [magic, version, piece.end - begin + adds]
        with open(folder / f"{name}_{number:06d}.bin", "wb") as file:
            file.write(np.array(header + [0] * (N_HEADER - 3), HEADER).data)
            file.write(np.array([part.separator] * adds, dtype).data)
            for block in piece.blocks():
                file.write(block.ids.data)


def read_npy(path: Path, dtype: np.dtype, column: str | None) -> Iterator[Block]:
    """The ids of a file; raises ValueError for another dtype or shape, or a file cut short."""
    try:
        ids = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        problem = f"is not an .npy file, or was cut short at offset {path.stat().st_size:,}"
        raise ValueError(f"{path} {problem}: {error}") from None
    if ids.dtype.kind not in "iu" or ids.ndim not in (1, 2):
        problem = f"holds {ids.dtype} of shape {ids.shape}, but must hold integers in 1 or 2 dimensions"
        raise ValueError(f"{path} {problem}: save it again")
    if not ids.flags.c_contiguous:
        raise ValueError(f"{path} is in Fortran order: save it again, from np.ascontiguousarray(ids)")
    return read_binary(path, ids.dtype, ids.offset, ids.size)
