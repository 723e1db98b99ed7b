"""Windows over tokens. Any window is a view of the tokens, and a whole batch is one gather.

WindowDataset("…", "gpt2", max_length=4, stride=4)[0]  ->  inputs (4,), and targets (4,) one token later
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view
from torch import Tensor
from torch.utils.data import Dataset

from lit_gptdata._checks import check_integer
from lit_gptdata.tokens.engines import encode_text
from lit_gptdata.tokens.shards import Tokens, spread
from lit_gptdata.tokens.tokenizer import Tokenizer
from lit_gptdata.windows.order import EpochPermutation
from lit_gptdata.windows.packing import WindowIndex

if TYPE_CHECKING:
    import tiktoken

Batch = tuple[Tensor, Tensor]  # (inputs, targets), int64 (B, max_length), targets one token later
BatchFormat = Literal["tuple", "hf"]  # what a loader yields: a Batch | its `hf_batch`
WindowKind = Literal["sliding", "packed", "documents"]  # see `GPTDataModule`, option `windows`
Block = tuple[np.ndarray, int]  # windows of several batches, int64, and the batch size
IGNORE_INDEX = -100  # the target that losses skip, torch's default in cross_entropy


@dataclass(frozen=True, kw_only=True)
class Spans:
    """Windows over a range of tokens: window i has the inputs [i * stride, i * stride + max_length).

    Spans(n_tokens=10, max_length=4, stride=3)  ->  2 windows, which start at tokens 0 and 3
    """

    n_tokens: int
    """Length of the range, in tokens."""
    max_length: int
    """Inputs per window, in tokens. A window reads one more token, its last target."""
    stride: int
    """Distance between the starts of neighboring windows, in tokens."""
    pad: bool = False
    """False: full windows only, `range(0, n_tokens - max_length, stride)`. True: enough windows to
    score every token that has a predecessor; the last window may need padding."""

    def __len__(self) -> int:
        if self.pad:  # ceil((n - 1) / stride), because padded windows have stride == max_length
            return max(0, -(-(self.n_tokens - 1) // self.stride))
        return max(0, (self.n_tokens - self.max_length - 1) // self.stride + 1)


class Windows(Dataset[tuple[Tensor, Tensor]]):
    """The windows of the tokens [begin, end): index → (inputs, targets), both int64 (max_length,).

    With `pad`, for val and test, every token with a predecessor is scored, and the last window is padded
    with input 0 and target -100. An index of len or more then gives a window of padding.
    """

    kind: WindowKind = "sliding"
    order: type[EpochPermutation] = EpochPermutation
    """The order of an epoch's windows."""

    def __init__(
        self, tokens: Tokens, *, begin: int, end: int, max_length: int, stride: int, pad: bool = False
    ) -> None:
        max_length = check_integer("max_length", max_length, 1, "the window's length in tokens")
        stride = check_integer("stride", stride, 1, "the distance between two windows in tokens")
        self.tokens, self.begin, self.end = tokens, begin, end
        self.spans = Spans(n_tokens=end - begin, max_length=max_length, stride=stride, pad=pad)

    def __len__(self) -> int:
        return len(self.spans)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        n = len(self)
        if not -n <= index < n:
            raise IndexError(f"window {index} of {n}: give an index in [{-n}, {n})")
        return self.__getitems__([index % n])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
        """The same for several windows, which a DataLoader asks for at once."""
        least, most = min(indices, default=0), max(indices, default=0)
        if least < 0 or (most >= len(self) and not self.spans.pad):
            raise IndexError(f"windows {least} to {most}: give indices in [0, {len(self)})")
        return list(zip(*self.batch(indices), strict=True))

    def __str__(self) -> str:
        windows = f"{len(self):,} windows of {self.spans.max_length} every {self.spans.stride} tokens"
        return f"{windows}, over tokens [{self.begin:,}, {self.end:,})"

    def __repr__(self) -> str:
        return f"{type(self).__name__}: {self}"

    def batch(self, indices: Sequence[int] | np.ndarray) -> Batch:
        """Windows by index, each in [0, len): (B,) → inputs, targets, int64 (B, max_length)."""
        return split(self.rows(indices))

    def rows(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """Windows by index: (B,) → (B, max_length + 1), of which `split` makes a batch.

        The ids are in the dtype of the tokens, or int32 if a row has padding, which is -100.
        """
        if not len(indices):
            return np.empty((0, self.spans.max_length + 1), self.tokens.dtype)
        return next(self.ids(np.asarray(indices, dtype=np.int64), len(indices)))

    def ids(self, indices: np.ndarray, size: int) -> Iterator[np.ndarray]:
        """The `rows` of windows, `size` at a time, with the common work done once for all of them."""
        if not self.spans.pad:
            yield from self.tokens.batches(self.starts(indices), self.spans.max_length + 1, size)
            return
        at_once = max(1, self.tokens.read_at_once // (size * self.spans.max_length)) * size
        for some in batches_of([(indices, at_once)]):
            rows, n_ids = self._read(some)
            for i in range(0, len(rows), size):
                yield _mark_padding(rows[i : i + size], n_ids[i : i + size])

    def _read(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Rows in the dtype of the tokens, and how many ids of each are not padding, int64 (B,).

        The padding of these rows has any ids.
        """
        starts, most = self.starts(indices), self.spans.max_length + 1
        n_ids = np.where(starts < self.end - 1, np.minimum(self.end - starts, most), 0)
        rows, is_full = np.zeros((len(starts), most), self.tokens.dtype), n_ids == most
        rows[is_full] = self.tokens.gather(starts[is_full], most)  # faster than `ranges`
        for row in np.flatnonzero(~is_full).tolist():
            rows[row, : n_ids[row]] = self.tokens[int(starts[row]) : int(starts[row] + n_ids[row])]
        return rows, n_ids

    def starts(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """The first token of each window, as its number in `tokens`: (B,) → int64 (B,)."""
        return np.asarray(indices, dtype=np.int64) * self.spans.stride + self.begin

    def ranges(self, indices: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The tokens [begin, end) of windows, as their numbers in the store: (B,) → int64 (P,) each.

        Packed windows have a range for each of their pieces, without the separator before it.
        """
        starts = self.starts(indices)
        return starts, np.minimum(starts + self.spans.max_length + 1, self.end)

    def target_tokens(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """The number of each target in the store: (B,) → int64 (B, max_length).

        -1: padding, or a separator after the last document, which the store does not have.
        """
        tokens = self.starts(indices)[:, None] + np.arange(1, self.spans.max_length + 1)
        return np.where(tokens < self.end, tokens, -1)

    @property
    def n_targets(self) -> int:
        """Targets of all windows that are not padding."""
        return self.spans.n_tokens - 1 if self.spans.pad else len(self) * self.spans.max_length

    @property
    def padding(self) -> float:
        """The share of all windows' positions that is padding, in [0, 1)."""
        return 1.0 - self.n_targets / max(1, len(self) * self.spans.max_length)

    def ahead(self, batches: Iterator[Any], blocks: Iterator[Block]) -> Iterator[Any]:
        """Pass on `batches`, which hold the windows in `blocks`; see `Tokens.ahead`."""
        return self.tokens.ahead(batches, map(self._edges, batches_of(blocks)))

    def _edges(self, indices: np.ndarray) -> np.ndarray:
        """Tokens of each shard that windows read, as their numbers in `tokens`."""
        begins, ends = self.ranges(indices)
        return np.concatenate([begins, ends - 1])

    def identity(self) -> Any:
        """What determines the windows of these tokens, in plain values."""
        return [self.begin, self.end, self.spans.max_length, self.spans.stride]

    def restore(self, saved: Any) -> None:
        """Raise ValueError if `saved`, an identity, is of other windows."""
        if saved != (now := self.identity()):
            problem = f"the state was saved with other windows: it was {saved}, now {now}"
            advice = "Set the same corpus, weights, split, windows, max_length and stride"
            raise ValueError(f"{problem}. {advice}")


class PackedWindows(Windows):
    """Windows of documents, as packing.py cuts them. The ids at `begin` - 1 and at `end` are `eot`."""

    def __init__(
        self, tokens: Tokens, index: WindowIndex, kind: WindowKind, eot: int, *, begin: int, end: int
    ) -> None:
        length = index.max_length
        super().__init__(tokens, begin=begin, end=end, max_length=length, stride=length, pad=True)
        self.index, self.kind, self.eot = index, kind, eot

    def __len__(self) -> int:
        return self.index.n_windows

    def __str__(self) -> str:
        index = self.index
        split = f"{index.n_split:,} of {index.n_documents:,} documents split"
        what = "of packed documents" if self.kind == "packed" else "of a document each"
        what = f"{self.spans.max_length} tokens {what}"
        windows = f"{len(self):,} windows of {what}, {100 * self.padding:.2f} % padding, {split}"
        return f"{windows}, over tokens [{self.begin:,}, {self.end:,})"

    @property
    def n_targets(self) -> int:
        return self.index.n_targets

    def _read(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        starts, lengths, counts = self.index.pieces(indices)
        last = np.cumsum(counts)[counts > 0] - 1
        lengths[last] += 1  # with the last target; the other last targets are first inputs, too
        n_ids = _sums(lengths, counts)
        return _as_rows(self._ids(starts, lengths), n_ids, self.spans.max_length + 1), n_ids

    def _ids(self, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """`Tokens.ranges`, which may have one token before and after the split."""
        early, late = starts < self.begin, starts + lengths > self.end
        lengths = lengths - early - late
        ids = self.tokens.ranges(starts + early, lengths)
        if early.any() or late.any():
            ends = np.cumsum(lengths)
            ids = np.insert(ids, np.append((ends - lengths)[early], ends[late]), self.eot)
        return ids

    def ranges(self, indices: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        starts, lengths, _ = self.index.pieces(np.asarray(indices, dtype=np.int64))
        return starts + 1, np.minimum(starts + 1 + lengths, self.end)

    def target_tokens(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        starts, lengths, counts = self.index.pieces(np.asarray(indices, dtype=np.int64))
        is_target = np.arange(self.spans.max_length) < _sums(lengths, counts)[:, None]
        tokens, targets = spread(starts + 1, lengths), np.full(is_target.shape, -1)
        targets[is_target] = np.where(tokens < self.end, tokens, -1)
        return targets

    def identity(self) -> Any:
        return [self.begin, self.end, self.spans.max_length, self.kind, len(self)]


def batches_of(blocks: Iterable[Block]) -> Iterator[np.ndarray]:
    """Cut each block into batches of its size, and a smaller last one."""
    return (block[i : i + size] for block, size in blocks for i in range(0, len(block), size))


def _sums(values: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """The sum of each group of values: [5, 2, 4], counts [2, 0, 1] → [7, 0, 4]."""
    return np.diff(np.append(0, np.cumsum(values))[np.cumsum(counts)], prepend=0)


def _as_rows(ids: np.ndarray, n_ids: np.ndarray, length: int) -> np.ndarray:
    """Rows (B, length) of ids that come one row after the other; a short row ends with any ids."""
    if len(ids) == len(n_ids) * length:  # no short row
        return ids.reshape(-1, length)
    every_row = sliding_window_view(np.append(ids, np.zeros(length, ids.dtype)), length)
    return every_row[np.cumsum(n_ids) - n_ids]  # type: ignore[no-any-return]


def _mark_padding(rows: np.ndarray, n_ids: np.ndarray) -> np.ndarray:
    """Rows (B, L + 1), as int32 with -100 after the first ids if a row has less than L + 1 ids."""
    if n_ids.min() == rows.shape[1]:
        return rows
    rows = rows.astype(np.int32)
    rows[np.arange(rows.shape[1]) >= n_ids[:, None]] = IGNORE_INDEX
    return rows


def split(ids: np.ndarray) -> Batch:
    """Split rows (B, L + 1) into inputs and targets, int64 (B, L), both contiguous."""
    inputs, targets = ids[:, :-1].astype(np.int64), ids[:, 1:].astype(np.int64)
    if ids.dtype.kind == "i":
        inputs[targets == IGNORE_INDEX] = 0
    return torch.from_numpy(inputs), torch.from_numpy(targets)


def hf_batch(inputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """A batch for the causal models of transformers: every value is int64 (B, L).

    They compute the loss of `shift_labels`, our targets. Models without this argument shift `labels`,
    the inputs, so they score one target less in each window. Padding is -100 in both.
    """
    labels = inputs.masked_fill(targets == IGNORE_INDEX, IGNORE_INDEX)
    return {"input_ids": inputs, "labels": labels, "shift_labels": targets}


FORMATS: dict[BatchFormat, Callable[[Tensor, Tensor], Any]] = {
    "tuple": lambda inputs, targets: (inputs, targets),
    "hf": hf_batch,
}


class WindowDataset(Windows):
    """The course's dataset: a text as windows of `max_length` tokens every `stride` tokens.

    As in the course, `<|endoftext|>` in the text is the special token. Raises TypeError if the text is
    not a str, and ValueError if it has fewer than `max_length + 1` tokens.
    """

    def __init__(
        self,
        text: str,
        tokenizer: tiktoken.Encoding | Tokenizer | str | Any = "gpt2",
        max_length: int = 256,
        stride: int = 128,
    ) -> None:
        if not isinstance(text, str):
            kind = type(text).__name__
            raise TypeError(f"text is a {kind}: give the text itself as a str, not a path or bytes")
        self.tokenizer = tokenizer if isinstance(tokenizer, Tokenizer) else Tokenizer(tokenizer)
        ids = encode_text(text, self.tokenizer)
        super().__init__(Tokens([ids]), begin=0, end=len(ids), max_length=max_length, stride=stride)
        check_enough(len(ids), max_length, "the text")

    def __str__(self) -> str:
        return f"{super().__str__()} of {self.tokenizer!r}"


class GPTDatasetV1(WindowDataset):
    """`WindowDataset` with the course's name and arguments."""

    def __init__(self, txt: str, tokenizer: Any, max_length: int, stride: int) -> None:
        super().__init__(txt, tokenizer, max_length, stride)


def check_enough(n_tokens: int, max_length: int, name: str, kind: WindowKind = "sliding") -> None:
    """Raise ValueError, which calls the text `name`, if `n_tokens` tokens make no window."""
    if kind != "sliding" and not n_tokens:
        raise ValueError(f"{name} has no tokens: give more text")
    if kind == "sliding" and n_tokens < max_length + 1:
        shorter = f", or set max_length <= {n_tokens - 1}" if n_tokens > 1 else ""
        needs = f"max_length={max_length} needs {max_length + 1:,}, targets included"
        problem = f"{name} has {n_tokens:,} tokens, too few for one window"
        raise ValueError(f"{problem}: {needs}. Give more text{shorter}")
