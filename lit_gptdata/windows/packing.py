"""Which documents are in which window: an index over document ends, built once and then memory-mapped.

documents ──cut──▶ pieces of at most max_length positions ──best fit──▶ windows

A document with the tokens [s, e) has e - s + 1 positions: the inputs are the tokens s - 1 to e - 1, and
the targets are s to e. The separators before and after it are its first input and its last target.

A window is one row of ids, so the last target of a piece is the first input of the next one. That holds
at separators. So only a window's first piece may start inside a document, and only its last piece may
end inside one. A document with more than max_length positions is cut into full pieces, which have their
own windows, and a rest. The rest is its head, at the end of a window, or its tail, at the start of one:

    tail of a  |  all of b  |  all of c  |  head of d  |  padding

Kind "packed": best-fit decreasing of documents and rests. The longest comes first, and each goes into
the window with the least space that it fits into (D. S. Johnson, "Near-optimal bin packing algorithms",
MIT, 1973). A window may get several rests. One of them is the head. The documents of the others follow
each other through windows without padding, and end in one tail, as long as their rests together.
Kind "documents": each piece has its own window, heads first. Windows are in the order of the text.

<data_dir>/windows/<fingerprint>-<begin>-<end>-<max_length>-<kind>-<version>/
    starts.bin, lengths.bin    of each piece, in the order of the windows
    firsts.bin                 if packed: the first piece of each window, and the number of pieces
    index.json                 counts, types and sizes; written last
"""

import json
import shutil
from collections import defaultdict
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from lit_gptdata._io import AtomicFile, locked, write_json
from lit_gptdata.tokens.shards import spread, writing
from lit_gptdata.tokens.store import TokenStore

Kind = Literal["packed", "documents"]
VERSION = 1  # increase it if the same documents get other windows, because checkpoints rely on them
ARRAYS = ("starts", "lengths", "firsts")

BLOCK_DOCUMENTS = 1 << 16
"""Documents that are packed together; the last block may have twice that number. Larger blocks give less
padding. In smaller ones, the pieces of a window come from fewer shards."""


class WindowIndex:
    """The pieces in each window of a split. The arrays are memory-mapped, also after pickling.

    Raises FileNotFoundError, ValueError, KeyError or TypeError unless `folder` is complete.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        saved = json.loads((folder / "index.json").read_bytes())
        self.max_length: int = saved["max_length"]
        self.n_windows: int = saved["n_windows"]
        self.n_documents: int = saved["n_documents"]
        self.n_split: int = saved["n_split"]
        """Documents with more than `max_length` positions."""
        self.n_targets: int = saved["n_targets"]
        """Positions that are not padding."""
        arrays = (_map(folder / f"{name}.bin", *saved[name]) for name in ARRAYS)
        self._starts, self._lengths, self._firsts = arrays

    def __reduce__(self) -> tuple[type, tuple[Path]]:
        return type(self), (self.folder,)

    def pieces(self, windows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The pieces of windows, each at least 0: int64 (B,) → starts, lengths, counts, int64.

        starts (P,): the token that is a piece's first input; one before the split must not be read.
        lengths (P,): its positions. counts (B,): the pieces of each window, which come in this order.
        From `n_windows` on, windows have no pieces.
        """
        firsts, ends = np.minimum([windows, windows + 1], self.n_windows)
        if len(self._firsts):
            firsts, ends = self._firsts[firsts].astype(np.int64), self._firsts[ends].astype(np.int64)
        counts = ends - firsts
        pieces = spread(firsts, counts)
        return self._starts[pieces], self._lengths[pieces].astype(np.int64), counts


def _map(path: Path, dtype: str, size: int) -> np.ndarray:
    if path.stat().st_size != size * np.dtype(dtype).itemsize:
        raise ValueError(f"{path} does not have {size:,} items")
    # a np.memmap would be slower to index
    return np.asarray(np.memmap(path, dtype, "r")) if size else np.empty(0, dtype)


def open_index(
    store: TokenStore, begin: int, end: int, max_length: int, kind: Kind, folder: Path
) -> WindowIndex:
    """Map the index of the tokens [begin, end), and first build it if `folder` has no complete one.

    Of several processes, one builds and the others wait. Raises ValueError for documents without
    separators, OSError if the index cannot be written.
    """
    name = f"{store.fingerprint}-{begin}-{end}-{max_length}-{kind}-{VERSION}"
    if (index := _find(folder / name)) is None:
        with writing(folder, "the index of the windows"):
            (folder / ".locks").mkdir(parents=True, exist_ok=True)
            with locked(folder / ".locks" / name, f"builds the index {folder / name}"):
                if (index := _find(folder / name)) is None:
                    shutil.rmtree(folder / name, ignore_errors=True)  # of a killed process
                    (folder / name).mkdir()
                    _write(store, begin, end, max_length, kind, folder / name)
                    index = WindowIndex(folder / name)
    return index


def _find(folder: Path) -> WindowIndex | None:
    try:
        return WindowIndex(folder)
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError):
        return None  # absent, or damaged


def _write(store: TokenStore, begin: int, end: int, length: int, kind: Kind, folder: Path) -> None:
    n_pieces = store.n_documents + 1 + (end - begin + store.n_documents) // length  # at most
    small = [np.min_scalar_type(n).newbyteorder("<").str for n in (length, n_pieces)]
    dtypes = dict(zip(ARRAYS, ("<i8", *small), strict=True))
    files = {name: AtomicFile(folder / f"{name}.bin") for name in ARRAYS}
    sizes = dict.fromkeys(ARRAYS, 0)
    totals = dict.fromkeys(("n_windows", "n_documents", "n_split", "n_targets"), 0)

    def append(name: str, array: np.ndarray) -> None:
        files[name].write(array.astype(dtypes[name]).data)
        sizes[name] += len(array)

    try:
        for starts, ends in document_blocks(store, begin, end):
            block = build_index(starts, ends, length, kind)
            if kind == "packed":
                append("firsts", block.firsts + sizes["starts"])
            append("starts", block.starts)
            append("lengths", block.lengths)
            totals["n_windows"] += len(block.firsts)
            totals["n_documents"] += len(starts)
            totals["n_split"] += int((ends - starts >= length).sum())
            totals["n_targets"] += int(block.lengths.sum())
        if kind == "packed":
            append("firsts", np.array([sizes["starts"]]))
        for file in files.values():
            file.commit()
    finally:
        for file in files.values():
            file.close()
    shapes = {name: (dtypes[name], sizes[name]) for name in ARRAYS}
    write_json(folder / "index.json", {"max_length": length, **totals, **shapes})


Documents = tuple[np.ndarray, np.ndarray]  # first tokens and ends, int64 (D,) each


def document_blocks(store: TokenStore, begin: int, end: int) -> Iterator[Documents]:
    """The documents of the tokens [begin, end), in blocks. The index of one shard is read at a time.

    A document that the range cuts is a document here. A separator at the start of the range is not.
    """
    if begin >= end:
        return
    shard_ends = np.cumsum([shard.n_tokens for shard in store.shards])
    first, last = np.searchsorted(shard_ends, begin), np.searchsorted(shard_ends, end, side="right")
    starts, is_checked = np.empty(0, np.int64), False
    for shard in range(int(first), min(int(last) + 1, len(store.shards))):
        found = store.document_rows([shard])["token"]
        found = found[(begin <= found) & (found <= end)]
        if not len(starts) and len(found) and found[0] > begin + 1:
            found = np.append(begin, found)
        if not is_checked and len(inner := found[(begin < found) & (found < end)]):
            is_checked = True
            _check_separators(store, inner[:100] - 1)
        starts = np.append(starts, found)
        while len(starts) > 2 * BLOCK_DOCUMENTS:
            yield starts[:BLOCK_DOCUMENTS], starts[1 : BLOCK_DOCUMENTS + 1] - 1
            starts = starts[BLOCK_DOCUMENTS:]
    if not len(starts):  # the range is inside a document
        starts = np.array([begin])
    ends = np.append(starts[1:] - 1, end)
    if starts[-1] == end < store.n_tokens and _has_text(store, starts[-1:] - 1)[0]:
        ends[-2:-1] = end  # an imported split may end without a separator
    # A document that starts at `end` is in the next split, unless it is the store's last one, and empty.
    kept = (starts < end) | (end == store.n_tokens)
    if kept.any():
        yield starts[kept], ends[kept]


def _check_separators(store: TokenStore, tokens: np.ndarray) -> None:
    """Raise ValueError if one of `tokens`, those before documents, has text."""
    if (has_text := _has_text(store, tokens)).any():
        token = f"token {int(tokens[has_text][0]):,} of {store.location}"
        problem = f"{token} is the last one before a document, and it is text"
        advice = "Import the files again with --separate, or set windows=sliding"
        raise ValueError(f"windows=packed and documents need separators: {problem}. {advice}")


def _has_text(store: TokenStore, tokens: np.ndarray) -> np.ndarray:
    has_text: np.ndarray = store.vocab["n_bytes"][store.tokens.gather(tokens, 1)[:, 0]] > 0
    return has_text


class Block(NamedTuple):
    """Windows of neighboring documents; all int64."""

    starts: np.ndarray
    """The first input of each piece, as a token of the store, in the order of the windows."""
    lengths: np.ndarray
    """The positions of each piece."""
    firsts: np.ndarray
    """The first piece of each window."""


def build_index(starts: np.ndarray, ends: np.ndarray, max_length: int, kind: Kind) -> Block:
    """Put documents, which have the tokens [start, end), into windows of `max_length` positions.

    build_index(np.array([0, 6]), np.array([5, 7]), 4, "packed")  ->  starts [-1, 5, 1], firsts [0, 2]
    """
    positions = ends - starts + 1  # (D,)
    head = (positions - 1) % max_length + 1  # (D,): the positions of the first piece, here the rest
    if kind == "packed":
        windows, place = best_fit(head, max_length), np.ones(len(head), np.int64)
        cut = np.flatnonzero(positions > max_length)
        place[cut] = 0
        place[cut[np.unique(windows[cut], return_index=True)[1]]] = 2  # one of each window ends it
        order = np.argsort(3 * windows + place, kind="stable")
        starts, positions, head, place, windows = (
            array[order] for array in (starts, positions, head, place, windows)
        )
        before = np.cumsum(positions) - positions  # (D,): positions of the same window's documents
        before = (before - before[np.diff(windows, prepend=-1) > 0][windows]) % max_length
        head = np.where(place == 2, head, np.minimum(positions, max_length - before))
    n_pieces = 1 - (head - positions) // max_length
    ends = np.cumsum(n_pieces)
    number = np.arange(ends[-1]) - np.repeat(ends - n_pieces, n_pieces)  # (P,): in its document
    stops = np.repeat(head, n_pieces) + number * max_length  # beyond the last position, in a tail
    offsets = np.maximum(0, stops - max_length)
    lengths = np.minimum(stops, np.repeat(positions, n_pieces)) - offsets
    inputs = np.repeat(starts - 1, n_pieces) + offsets
    if kind == "documents":
        return Block(inputs, lengths, np.arange(len(inputs)))
    firsts = np.flatnonzero((number > 0) | (np.repeat(before, n_pieces) == 0))
    counts = np.diff(firsts, append=len(inputs))
    order = np.argsort(np.minimum.reduceat(inputs, firsts), kind="stable")
    pieces, counts = spread(firsts[order], counts[order]), counts[order]
    return Block(inputs[pieces], lengths[pieces], np.cumsum(counts) - counts)


def best_fit(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """Best-fit decreasing: int64 (N,), each in [1, capacity] → the window of each, numbered from 0.

    best_fit(np.array([2, 3, 2, 1]), 4)  ->  [1, 0, 1, 0]

    Pieces of equal length are interchangeable, and so are windows with equal space. So a step puts all
    pieces of a length into all windows with the least space. That takes O(capacity) steps in practice.
    """
    windows, n_windows = np.empty(len(lengths), np.int64), 0
    order = np.argsort(-lengths, kind="stable")
    by_space: dict[int, list[np.ndarray]] = defaultdict(list)
    spaces = 0  # bit s is set if a window has space for s more positions
    bounds = np.flatnonzero(np.diff(lengths[order], prepend=0, append=0)).tolist()
    for done, stop in pairwise(bounds):  # pieces of equal length
        length = int(lengths[order[done]])
        while done < stop:
            if fitting := spaces >> length:
                space = length + (fitting & -fitting).bit_length() - 1  # the lowest bit
                spaces ^= 1 << space
                opened = np.concatenate(by_space.pop(space))
            else:
                space, n_new = capacity, -((done - stop) // (capacity // length))
                opened = np.arange(n_windows, n_windows + n_new)
                n_windows += n_new
            # After the first piece, a window has the least space of all, until no other piece fits.
            per_window = space // length
            chosen = order[done:stop][: per_window * len(opened)]
            windows[chosen] = np.repeat(opened, per_window)[: len(chosen)]
            done += len(chosen)
            full, rest = divmod(len(chosen), per_window)
            groups = opened[:full], opened[full : full + 1], opened[full + 1 :]
            for n_put, group in zip((per_window, rest, 0), groups, strict=True):
                if len(group) and (left := space - n_put * length):
                    by_space[left].append(group)
                    spaces |= 1 << left
    return windows
