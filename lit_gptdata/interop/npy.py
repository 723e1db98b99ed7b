"""NumPy's .npy with integers: one row of ids, or several rows, which are read one after another."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from lit_gptdata.interop.blocks import Block, read_binary


def read(path: Path, dtype: np.dtype, column: str | None) -> Iterator[Block]:
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
