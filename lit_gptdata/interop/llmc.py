"""llm.c's and modded-nanogpt's .bin: 256 int32 of header (magic, version, number of ids), then the ids.

An end-of-document id comes first, because modded-nanogpt looks for documents after one.
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


def read(path: Path, dtype: np.dtype, column: str | None) -> Iterator[Block]:
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


def write(folder: Path, name: str, part: Part) -> None:
    """Write `name`_000000.bin, …: an end-of-document id, unless one is first, and all ids."""
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
