"""Windows over tokens. Any window is a view of the tokens, and a whole batch is one gather.

WindowDataset("…", "gpt2", max_length=4, stride=4)[0]  ->  inputs (4,), and targets (4,) one token later
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from lit_gptdata._checks import check_integer
from lit_gptdata.tokens.engines import encode_text
from lit_gptdata.tokens.shards import Tokens
from lit_gptdata.tokens.tokenizer import Tokenizer
from lit_gptdata.windows.order import EpochPermutation

if TYPE_CHECKING:
    import tiktoken

Batch = tuple[Tensor, Tensor]  # (inputs, targets), int64 (B, max_length), targets one token later
BatchFormat = Literal["tuple", "hf"]  # what a loader yields: a Batch | its `hf_batch`
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
    with input 0 and target -100.
    """

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
        inputs, targets = self.batch([index % n])
        return inputs[0], targets[0]

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
        """Windows by index, each in [0, len): (B,) → inputs, targets, int64 (B, max_length).

        With `pad`, an index of len or more gives a window of padding: inputs 0, targets -100.
        """
        starts, length = self.starts(indices), self.spans.max_length
        if not self.spans.pad:
            return split(self.tokens.gather(starts, length + 1))
        ids = np.zeros((len(starts), length + 1), self.tokens.dtype)
        is_full = starts + length < self.end
        ids[is_full] = self.tokens.gather(starts[is_full], length + 1)
        for row in np.flatnonzero(~is_full).tolist():
            rest = self.tokens[int(starts[row]) : self.end]
            ids[row, : len(rest)] = rest
        inputs, targets = split(ids)
        beyond = torch.from_numpy(np.arange(length) >= self.end - 1 - starts[:, None])  # (B, L)
        return inputs.masked_fill_(beyond, 0), targets.masked_fill_(beyond, IGNORE_INDEX)

    def starts(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """The first token of each window, as its number in `tokens`: (B,) → int64 (B,)."""
        return np.asarray(indices, dtype=np.int64) * self.spans.stride + self.begin

    def target_tokens(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """The number in `tokens` of each target: (B,) → int64 (B, max_length); -1 for padding."""
        tokens = self.starts(indices)[:, None] + np.arange(1, self.spans.max_length + 1)
        return np.where(tokens < self.end, tokens, -1)

    def ids(self, indices: np.ndarray, size: int) -> Iterator[np.ndarray]:
        """Train windows, `size` at a time: (N,) → (size, max_length + 1), in the dtype of the tokens."""
        return self.tokens.batches(self.starts(indices), self.spans.max_length + 1, size)

    def ahead(self, batches: Iterator[Any], blocks: Iterator[Block]) -> Iterator[Any]:
        """Pass on `batches`, which hold the windows in `blocks`; see `Tokens.ahead`."""
        plan = batches_of((self.starts(block), size) for block, size in blocks)
        return self.tokens.ahead(batches, plan, self.spans.max_length + 1)

    def identity(self) -> Any:
        """What determines the windows of these tokens, in plain values."""
        return [self.begin, self.end, self.spans.max_length, self.spans.stride]

    def restore(self, saved: Any) -> None:
        """Raise ValueError if `saved`, an identity, is of other windows."""
        if saved != (now := self.identity()):
            what = "[begin, end, max_length, stride] was " if isinstance(now, list) else "it was "
            advice = "Set the same corpus, weights, split, max_length and stride"
            problem = f"the state was saved with other windows: {what}{saved}, now {now}"
            raise ValueError(f"{problem}. {advice}")


class ChainedWindows(Windows):
    """The val or test windows of several sets, one set after the other."""

    def __init__(self, sets: Sequence[Windows]) -> None:
        self._sets, self.begin = sets, 0
        self.end = sum(len(windows) for windows in sets)
        self.spans = sets[0].spans

    def __len__(self) -> int:
        return self.end

    def __str__(self) -> str:
        return f"{len(self):,} windows of {self.spans.max_length} tokens, of {len(self._sets)} sets"

    def batch(self, indices: Sequence[int] | np.ndarray) -> Batch:
        shape, local = (len(indices), self.spans.max_length), np.asarray(indices, dtype=np.int64)
        inputs, targets = torch.zeros(shape, dtype=torch.int64), torch.full(shape, IGNORE_INDEX)
        for windows in self._sets:
            rows = np.flatnonzero((local >= 0) & (local < len(windows)))
            inputs[rows], targets[rows] = windows.batch(local[rows])
            local = local - len(windows)
        return inputs, targets

    def ids(self, indices: np.ndarray, size: int) -> Iterator[np.ndarray]:
        for inputs, targets in map(self.batch, batches_of([(indices, size)])):
            yield np.concatenate([inputs, targets[:, -1:]], axis=1)

    def ahead(self, batches: Iterator[Any], blocks: Iterator[Block]) -> Iterator[Any]:
        return batches


def batches_of(blocks: Iterable[Block]) -> Iterator[np.ndarray]:
    """Cut each block into batches of its size, and a smaller last one."""
    return (block[i : i + size] for block, size in blocks for i in range(0, len(block), size))


def split(ids: np.ndarray) -> Batch:
    """Split windows (B, L + 1) into inputs and targets, int64 (B, L), both contiguous."""
    inputs, targets = ids[:, :-1].astype(np.int64), ids[:, 1:].astype(np.int64)
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


def check_enough(n_tokens: int, max_length: int, name: str) -> None:
    """Raise ValueError, which calls the text `name`, if `n_tokens` tokens make no full window."""
    if n_tokens < max_length + 1:
        shorter = f", or set max_length <= {n_tokens - 1}" if n_tokens > 1 else ""
        needs = f"max_length={max_length} needs {max_length + 1:,}, targets included"
        problem = f"{name} has {n_tokens:,} tokens, too few for one window"
        raise ValueError(f"{problem}: {needs}. Give more text{shorter}")
