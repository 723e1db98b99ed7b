"""Readers and writers of other programs' token files, rebuilt from their documentation.

They share no code with lit_gptdata.interop, so that both cannot have the same mistake.
"""

from __future__ import annotations

import itertools
import struct
from pathlib import Path

import numpy as np

END = 50256
Documents = list[list[int]]


def nanogpt_batch(folder: Path, split: str, starts: list[int], block_size: int) -> tuple[list, list]:
    """Inputs and targets as nanoGPT's get_batch reads them, at chosen starts instead of random ones."""
    data = np.memmap(folder / f"{split}.bin", dtype=np.uint16, mode="r")
    rows = [data[i : i + block_size].tolist() for i in starts]
    return rows, [data[i + 1 : i + 1 + block_size].tolist() for i in starts]


def read_llmc(path: Path) -> np.ndarray:
    """The ids of an .bin as llm.c's dataloader.h checks and reads it."""
    content = path.read_bytes()
    header = struct.unpack("<256i", content[:1024])
    sizes = {(20240520, 1): 2, (20240801, 7): 4}
    assert header[:2] in sizes, "magic or version"
    size = sizes[header[:2]]
    assert len(content) == 1024 + header[2] * size, "file size"
    return np.frombuffer(content, f"<u{size}", offset=1024)


def llmc_documents(ids: np.ndarray) -> Documents:
    """The documents that start with an end-of-text id, as modded-nanogpt finds them, without that id."""
    (starts,) = np.nonzero(ids == END)
    pieces = np.split(ids, starts)
    assert len(pieces[0]) == 0, "ids before the first end-of-text"
    return [piece[1:].tolist() for piece in pieces[1:]]


def write_llmc(path: Path, ids: list[int], magic=20240520, version=1, n: int | None = None) -> Path:
    kind = "<u2" if magic == 20240520 else "<u4"
    header = struct.pack("<256i", magic, version, len(ids) if n is None else n, *[0] * 253)
    path.write_bytes(header + np.array(ids, kind).tobytes())
    return path


class IndexedDataset:
    """Megatron's reader: sequences through pointers and lengths, documents through their edges."""

    def __init__(self, prefix: Path) -> None:
        index = prefix.with_suffix(".idx").read_bytes()
        assert index[:9] == b"MMIDIDX\x00\x00"
        version, code, n_sequences, n_edges = struct.unpack_from("<QBQQ", index, 9)
        assert version == 1
        names = ["uint8", "int8", "int16", "int32", "int64", "float64", "float32", "uint16"]
        self.dtype = np.dtype(names[code - 1])
        at = 34
        self.lengths = np.frombuffer(index, np.int32, n_sequences, at)
        self.pointers = np.frombuffer(index, np.int64, n_sequences, at + 4 * n_sequences)
        self.document_indices = np.frombuffer(index, np.int64, n_edges, at + 12 * n_sequences)
        assert len(index) == at + 12 * n_sequences + 8 * n_edges
        assert self.lengths.shape[0] == n_sequences == self.document_indices[-1]
        self.content = prefix.with_suffix(".bin").read_bytes()

    def __getitem__(self, i: int) -> list[int]:
        return np.frombuffer(self.content, self.dtype, self.lengths[i], self.pointers[i]).tolist()

    def documents(self) -> Documents:
        edges = self.document_indices.tolist()
        return [
            [id for i in range(begin, end) for id in self[i]] for begin, end in itertools.pairwise(edges)
        ]


def write_megatron(prefix: Path, documents: list[Documents], code: int = 8) -> Path:
    """Write documents of one or several sequences each."""
    kind = {1: "u1", 4: "<i4", 5: "<i8", 8: "<u2"}[code]
    sequences = [sequence for document in documents for sequence in document]
    lengths = np.array([len(sequence) for sequence in sequences], "<i4")
    pointers = (np.cumsum(lengths) - lengths).astype("<i8") * np.dtype(kind).itemsize
    edges = np.cumsum([0] + [len(document) for document in documents]).astype("<i8")
    head = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, code, len(sequences), len(edges))
    index = prefix.with_suffix(".idx")
    index.write_bytes(head + lengths.tobytes() + pointers.tobytes() + edges.tobytes())
    flat = [id for sequence in sequences for id in sequence]
    prefix.with_suffix(".bin").write_bytes(np.array(flat, kind).tobytes())
    return index
