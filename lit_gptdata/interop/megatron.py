"""Megatron's .bin of ids and .idx of documents, as IndexedDataset in megatron/core/datasets has them.

An .idx is a header; per sequence its length (int32); per sequence its first byte in the .bin (int64);
per document its first sequence (int64), and the number of sequences. We write a sequence per document.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from lit_gptdata.interop.blocks import Block, Part, read_binary

MAGIC = b"MMIDIDX\0\0"
HEADER = np.dtype("V9, <u8, u1, <u8, <u8")  # magic, version, dtype, sequences, documents and the end
DTYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}  # 6 and 7 are floats


def read(path: Path, dtype: np.dtype, column: str | None) -> Iterator[Block]:
    """The ids of an .idx and its .bin; raises ValueError for another header, or sizes that differ."""
    header, binary = np.fromfile(path, HEADER, 1).tolist(), path.with_suffix(".bin")
    magic, version, code, n, n_edges = header[0] if header else (b"", 0, 0, 0, 0)
    if bytes(magic) != MAGIC or version != 1 or code not in DTYPES:
        problem = f"starts with {bytes(magic)!r}, version {version} and dtype {code}"
        raise ValueError(f"{path} {problem}, not with {MAGIC!r}, 1 and one of {sorted(DTYPES)}")
    tables, offset, dtype = [], HEADER.itemsize, np.dtype(DTYPES[code])
    size = path.stat().st_size
    for kind, count in (("<i4", n), ("<i8", n), ("<i8", n_edges)):
        table_end = offset + count * np.dtype(kind).itemsize
        if table_end > size:  # checked first, because a damaged count would reserve memory
            end = f"{size:,}, inside the table of {count:,} rows at {offset:,}"
            raise ValueError(f"{path} ends at offset {end}: it was cut short, or its header is damaged")
        tables.append(np.fromfile(path, kind, count, offset=offset))
        offset = table_end
    lengths, begins, edges = tables
    ends = np.append(0, np.cumsum(lengths, dtype=np.int64)) * dtype.itemsize
    if len(edges) < 2 or edges[0] or edges[-1] != n or (np.diff(edges) < 0).any() or (lengths < 0).any():
        raise ValueError(f"{path}: its documents are not all of its {n:,} sequences: write it again")
    if (wrong := np.flatnonzero(begins != ends[:-1])).size:
        place = f"sequence {wrong[0]:,} (offset {HEADER.itemsize + 4 * n + 8 * int(wrong[0]):,})"
        raise ValueError(f"{path}: {place} does not follow the one before it: write it again")
    size = binary.stat().st_size if binary.is_file() else 0
    if size != ends[-1]:
        raise ValueError(f"{binary} ends at offset {size:,}, not {ends[-1]:,} as in {path}: copy both")
    starts = np.unique(ends[edges[:-1]]) // dtype.itemsize  # an empty document is left out
    n_ids = size // dtype.itemsize
    return read_binary(binary, dtype, 0, n_ids, starts[starts < n_ids])


def write(folder: Path, name: str, part: Part) -> None:
    """Write `name`.bin and `name`.idx; raises ValueError for a document that an .idx cannot describe."""
    dtype = np.dtype("<u2" if part.store.dtype.itemsize == 2 else "<i4")  # Megatron has no uint32
    code = next(code for code, kind in DTYPES.items() if kind == dtype.str)
    starts, n_ids = [], 0
    with open(folder / f"{name}.bin", "wb") as file:
        for block in part.blocks():
            file.write(block.ids.astype(dtype).data)
            starts.append(np.asarray(block.starts) + n_ids)
            n_ids += len(block.ids)
    begins = np.concatenate(starts)
    lengths = np.diff(begins, append=n_ids)
    if lengths.max() >= 1 << 31:
        raise ValueError(f"an .idx has int32 lengths, but a document has {lengths.max():,} ids")
    header = np.array([(MAGIC, 1, code, len(begins), len(begins) + 1)], HEADER)
    edges = np.arange(len(begins) + 1)
    with open(folder / f"{name}.idx", "wb") as file:
        for table in (header, lengths.astype("<i4"), begins * dtype.itemsize, edges):
            file.write(table.tobytes())
