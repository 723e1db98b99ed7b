"""Which documents share a window: an index over document ends, built once and then memory-mapped.

documents ──cut──▶ pieces of at most max_length positions ──best fit──▶ windows

A document with the tokens [s, e) has e - s + 1 positions: the inputs are the tokens s - 1 to e - 1, and
the targets are s to e. The separators before and after it are its first input and its last target. A
document with more than max_length positions is cut. Its first piece has what exceeds a multiple of
max_length, and each later piece fills a window alone. So in a window with several pieces, each of them
starts with a separator.

Kind "packed": best-fit decreasing. The longest piece comes first, and each goes into the window with
the least space that it fits into (D. S. Johnson, "Near-optimal bin packing algorithms", MIT, 1973).
Pieces of equal length are interchangeable, and so are windows with equal space, so a step handles all of
them at once. Kind "documents": each piece has its own window. The windows, and the pieces in each window,
are in the order of the text.

<data_dir>/windows/<fingerprint>-<begin>-<end>-<max_length>-<kind>-<version>/
    starts.bin, lengths.bin    of each piece, in the order of the windows
    firsts.bin                 if packed: the first piece of each window, and the number of pieces
    index.json                 counts; written last
"""

import json
import shutil
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from lit_gptdata._io import AtomicFile, locked, write_json
from lit_gptdata.tokens.shards import writing
from lit_gptdata.tokens.store import TokenStore

Kind = Literal["packed", "documents"]
VERSION = 1  # increase it when other windows come out, because checkpoints count on them

BLOCK_DOCUMENTS = 1 << 16
"""Documents that are packed together; the last block has up to twice as many. Larger blocks need less
padding. In smaller ones, the pieces of a window come from fewer shards."""


class WindowIndex:
    """The pieces in each window of a split. The arrays are memory-mapped, also after pickling.

    Raises FileNotFoundError, ValueError, KeyError or TypeError unless `folder` is complete.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        counts = json.loads((folder / "index.json").read_bytes())
        self.max_length: int = counts["max_length"]
        self.n_windows: int = counts["n_windows"]
        self.n_documents: int = counts["n_documents"]
        self.n_split: int = counts["n_split"]
        """Documents with more than `max_length` positions."""
        self.n_targets: int = counts["n_targets"]
        """Positions that are not padding."""
        self.n_padded: int = counts["n_padded"]
        """Windows with padding, which can be anywhere."""
        self._starts, self._lengths, self._firsts = (
            _map(folder / f"{name}.bin", *counts[name]) for name in ("starts", "lengths", "firsts")
        )

    def __len__(self) -> int:
        return self.n_windows

    def __reduce__(self) -> tuple[type, tuple[Path]]:
        return type(self), (self.folder,)

    def pieces(self, windows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The pieces of windows, which are in [0, n_windows): int64 (B,) → starts, lengths, counts, int64.

        starts (P,): the token that is a piece's first input; one before the split must not be read.
        lengths (P,): its positions. counts (B,): the pieces of each window, which come in this order.
        """
        if not len(self._firsts):
            chosen, counts = windows, np.ones(len(windows), np.int64)
        else:
            firsts = self._firsts[windows].astype(np.int64)
            counts = self._firsts[windows + 1].astype(np.int64) - firsts
            chosen = np.repeat(firsts - (np.cumsum(counts) - counts), counts)
            chosen += np.arange(len(chosen))
        return self._starts[chosen], self._lengths[chosen].astype(np.int64), counts


def _map(path: Path, dtype: str, size: int) -> np.ndarray:
    if path.stat().st_size != size * np.dtype(dtype).itemsize:
        raise ValueError(f"{path} does not have {size:,} items")
    # not as a np.memmap, which is slower to index
    return np.asarray(np.memmap(path, dtype, "r")) if size else np.empty(0, dtype)


def open_index(
    store: TokenStore, begin: int, end: int, max_length: int, kind: Kind, folder: Path
) -> WindowIndex:
    """Map the index of the tokens [begin, end), and first build it if `folder` has no complete one.

    Of several processes, one builds and the others wait. Raises OSError if it cannot be written.
    """
    name = f"{store.fingerprint}-{begin}-{end}-{max_length}-{kind}-{VERSION}"
    if (index := _found(folder / name)) is None:
        with writing(folder, "the index of the windows"):
            (folder / ".locks").mkdir(parents=True, exist_ok=True)
            with locked(folder / ".locks" / name, f"builds the windows in {folder / name}"):
                if (index := _found(folder / name)) is None:
                    _build(store, begin, end, max_length, kind, folder / name)
                    index = WindowIndex(folder / name)
    return index


def _found(folder: Path) -> WindowIndex | None:
    try:
        return WindowIndex(folder)
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError):
        return None  # absent, or damaged


def _build(store: TokenStore, begin: int, end: int, max_length: int, kind: Kind, folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)  # of a killed process
    folder.mkdir()
    n_pieces = store.n_documents + 1 + (end - begin + store.n_documents) // max_length  # at most
    dtypes = {"starts": "<i8", "lengths": _smallest(max_length), "firsts": _smallest(n_pieces)}
    sizes = dict.fromkeys(dtypes, 0)
    files = {name: AtomicFile(folder / f"{name}.bin") for name in dtypes}
    totals = dict.fromkeys(("n_windows", "n_documents", "n_split", "n_targets", "n_padded"), 0)
    try:
        for starts, ends in document_blocks(store, begin, end):
            block = build_index(starts, ends, max_length, kind)
            filled = np.add.reduceat(block.lengths, block.firsts)
            arrays = block._asdict()
            arrays["firsts"] = block.firsts + sizes["starts"] if kind == "packed" else block.firsts[:0]
            for name, dtype in dtypes.items():
                files[name].write(arrays[name].astype(dtype).data)
                sizes[name] += len(arrays[name])
            totals["n_windows"] += len(filled)
            totals["n_documents"] += len(starts)
            totals["n_split"] += int((ends - starts >= max_length).sum())
            totals["n_targets"] += int(filled.sum())
            totals["n_padded"] += int((filled < max_length).sum())
        if sizes["firsts"]:
            files["firsts"].write(np.array([sizes["starts"]], dtypes["firsts"]).data)
            sizes["firsts"] += 1
        for file in files.values():
            file.commit()
    finally:
        for file in files.values():
            file.discard()
    shapes = {name: (dtype, sizes[name]) for name, dtype in dtypes.items()}
    write_json(folder / "index.json", {"max_length": max_length, **totals, **shapes})


def _smallest(value: int) -> str:
    return next(dtype for dtype in ("<u2", "<u4", "<u8") if value <= np.iinfo(dtype).max)


def document_blocks(store: TokenStore, begin: int, end: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The documents of the tokens [begin, end) in blocks: first tokens and ends, int64 (D,) each.

    A document that the range cuts is a document here. A separator at the start of the range is not.
    """
    if begin >= end:
        return
    shard_ends = np.cumsum([shard.n_tokens for shard in store.shards])
    first, last = np.searchsorted(shard_ends, begin), np.searchsorted(shard_ends, end, side="right")
    starts = np.empty(0, np.int64)
    is_first = True
    for shard in range(int(first), min(int(last) + 1, len(store.shards))):
        rows = store.rows(shard)
        tokens = rows["token"][rows["document"] == 1]
        tokens = tokens[(begin <= tokens) & (tokens <= end)]
        if is_first and len(tokens):
            is_first = False
            tokens = tokens if tokens[0] <= begin + 1 else np.append(begin, tokens)
        starts = np.append(starts, tokens)
        while len(starts) > 2 * BLOCK_DOCUMENTS:
            yield starts[:BLOCK_DOCUMENTS], starts[1 : BLOCK_DOCUMENTS + 1] - 1
            starts = starts[BLOCK_DOCUMENTS:]
    if is_first:  # inside one document
        starts = np.array([begin])
    ends = np.append(starts[1:] - 1, end)
    # A document that starts at `end` is in the next split, unless it is the store's last one, and empty.
    kept = (starts < end) | (end == store.n_tokens)
    if kept.any():
        yield starts[kept], ends[kept]


class Block(NamedTuple):
    """Windows of neighboring documents; all int64."""

    starts: np.ndarray
    """The first input of each piece, as a token of the store, in the order of the windows."""
    lengths: np.ndarray
    """The positions of each piece."""
    firsts: np.ndarray
    """The first piece of each window."""


def build_index(starts: np.ndarray, ends: np.ndarray, max_length: int, kind: Kind) -> Block:
    """Documents with the tokens [start, end), int64 (D,) each, in windows of `max_length` positions."""
    n_later, head = np.divmod(ends - starts, max_length)  # (D,)
    head, n_pieces = head + 1, n_later + 1
    first = np.cumsum(n_pieces) - n_pieces  # each document's first piece
    number = np.arange(n_pieces.sum()) - np.repeat(first, n_pieces)  # of a piece in its document
    lengths = np.full(len(number), max_length)
    lengths[first] = head
    offsets = np.maximum(0, np.repeat(head, n_pieces) + (number - 1) * max_length)
    inputs = np.repeat(starts - 1, n_pieces) + offsets
    if kind == "documents":
        return Block(inputs, lengths, np.arange(len(inputs)))
    packed, n_packed = best_fit(head, max_length)
    windows = n_packed + np.arange(len(inputs))
    windows[first] = packed
    _, leaders, windows = np.unique(windows, return_index=True, return_inverse=True)
    leaders = leaders[windows]  # (P,): the first piece of a piece's window
    order = np.argsort(leaders, kind="stable")
    firsts = np.flatnonzero(np.diff(leaders[order], prepend=-1))
    return Block(inputs[order], lengths[order], firsts)


def best_fit(lengths: np.ndarray, capacity: int) -> tuple[np.ndarray, int]:
    """Best-fit decreasing: int64 (N,), each in [1, capacity] → the window of each, and how many windows.

    best_fit(np.array([2, 3, 2, 1]), 4)  ->  [1, 0, 1, 0], 2
    """
    windows, n_windows, done = np.empty(len(lengths), np.int64), 0, 0
    order = np.argsort(-lengths, kind="stable")
    counts = np.bincount(lengths)
    by_space: dict[int, list[np.ndarray]] = defaultdict(list)
    spaces = 0  # bit s is set if a window has the space s

    for length in np.flatnonzero(counts)[::-1].tolist():
        remaining = int(counts[length])
        while remaining:
            if fitting := spaces >> length:
                space = length + (fitting & -fitting).bit_length() - 1  # the lowest bit
                opened = np.concatenate(by_space.pop(space))
                spaces ^= 1 << space
            else:
                space = capacity
                opened = np.arange(n_windows, n_windows - (-remaining // (capacity // length)))
                n_windows += len(opened)
            # What remains in a window after one piece is still the least space, until no other fits.
            per_window = space // length
            n_pieces = min(remaining, len(opened) * per_window)
            windows[order[done : done + n_pieces]] = np.repeat(opened, per_window)[:n_pieces]
            done, remaining = done + n_pieces, remaining - n_pieces
            full, rest = divmod(n_pieces, per_window)
            for n_in_each, group in (
                (per_window, opened[:full]),
                (rest, opened[full : full + 1]),
                (0, opened[full + 1 :]),
            ):
                left = space - n_in_each * length
                if left and len(group):
                    by_space[left].append(group)
                    spaces |= 1 << left
    return windows, n_windows
