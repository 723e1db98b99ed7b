"""Windows over tokens: any of them in one look, a whole batch in one gather.

WindowDataset("…", "gpt2", max_length=4, stride=4)[0]  ->  inputs (4,), targets (4,): one token later
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from lit_gptdata.tokens.engines import encode_text
from lit_gptdata.tokens.shards import Tokens
from lit_gptdata.tokens.tokenizer import Tokenizer
from lit_gptdata.windows.spans import Spans, check_lengths

if TYPE_CHECKING:
    import tiktoken

Batch = tuple[Tensor, Tensor]
"""(inputs, targets), int64 (B, max_length), targets one token later."""

IGNORE_INDEX = -100
"""The target that no loss counts: `torch.nn.functional.cross_entropy`'s default."""


class Windows(Dataset[tuple[Tensor, Tensor]]):
    """The windows of the tokens [begin, end): index → (inputs, targets), two int64 (max_length,).

    `fill`: False for training windows; True for val and test, where every token with a predecessor is
    scored and the last window is filled up with input 0 and target -100.
    """

    def __init__(
        self,
        tokens: Tokens,
        *,
        begin: int,
        end: int,
        max_length: int,
        stride: int,
        fill: bool = False,
    ) -> None:
        check_lengths(max_length, stride)
        self.tokens = tokens
        self.begin, self.end = begin, end
        self.spans = Spans(n_tokens=end - begin, max_length=max_length, stride=stride, fill=fill)

    def __len__(self) -> int:
        return len(self.spans)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        n = len(self)
        if not -n <= index < n:
            raise IndexError(f"window {index} of {n}: give an index in [{-n}, {n})")
        inputs, targets = self.batch([index % n])
        return inputs[0], targets[0]

    def batch(self, indices: Sequence[int] | np.ndarray) -> Batch:
        """Windows by index, each within [0, len): (B,) → inputs, targets, int64 (B, max_length).

        With `fill`, an index from len on gives a filler: inputs 0, targets -100.
        """
        starts = np.asarray(indices, dtype=np.int64) * self.spans.stride
        if not self.spans.fill:
            return split(self.tokens.gather(starts + self.begin, self.spans.max_length + 1))
        inputs, targets = split(self._filled(starts))
        n_targets = self.spans.n_tokens - 1 - starts[:, None]  # (B, 1)
        beyond = torch.from_numpy(np.arange(self.spans.max_length) >= n_targets)  # (B, L)
        return inputs.masked_fill_(beyond, 0), targets.masked_fill_(beyond, IGNORE_INDEX)

    def ids(self, indices: np.ndarray, size: int) -> Iterator[np.ndarray]:
        """Training windows, `size` at a time: (N,) → (size, max_length + 1), dtype of the tokens."""
        starts = indices * self.spans.stride + self.begin
        return self.tokens.batches(starts, self.spans.max_length + 1, size)

    def ahead(self, batches: Iterator[Any], blocks: Iterator[np.ndarray], size: int) -> Iterator[Any]:
        """`batches` as they are, of the windows in `blocks`, `size` each; see `Tokens.ahead`."""
        plan = (
            block[i : i + size] * self.spans.stride + self.begin
            for block in blocks
            for i in range(0, len(block), size)
        )
        return self.tokens.ahead(batches, plan, self.spans.max_length + 1)

    def _filled(self, starts: np.ndarray) -> np.ndarray:
        """(B,) → (B, max_length + 1), with zeros beyond the range's end."""
        spans = self.spans
        ids = np.zeros((len(starts), spans.max_length + 1), self.tokens.dtype)
        whole = starts + spans.max_length + 1 <= spans.n_tokens
        ids[whole] = self.tokens.gather(starts[whole] + self.begin, spans.max_length + 1)
        for row in np.flatnonzero(~whole).tolist():
            rest = self.tokens[self.begin + int(starts[row]) : self.end]
            ids[row, : len(rest)] = rest
        return ids


def split(ids: np.ndarray) -> Batch:
    """Windows (B, L + 1) → inputs, targets, int64 (B, L), contiguous."""
    pair = np.empty((2, len(ids), ids.shape[1] - 1), np.int64)
    pair[0] = ids[:, :-1]
    pair[1] = ids[:, 1:]
    return torch.from_numpy(pair[0]), torch.from_numpy(pair[1])


def split_into_views(ids: np.ndarray) -> Batch:
    """As `split`, in less time: both are views of one tensor, on which `.view(-1)` fails."""
    wide = ids.astype(np.int64)
    return torch.from_numpy(wide[:, :-1]), torch.from_numpy(wide[:, 1:])


class WindowDataset(Windows):
    """The course's dataset: a text, encoded, as windows of `max_length` tokens every `stride` tokens.

    `text`: str. `tokenizer`: a `tiktoken.Encoding`, the name of one, or a `Tokenizer`;
    `<|endoftext|>` in the text is the special token, as in the course.

    Raises ValueError if the text has fewer than `max_length + 1` tokens, TypeError for a text that
    is no str.
    """

    def __init__(
        self,
        text: str,
        tokenizer: tiktoken.Encoding | Tokenizer | str = "gpt2",
        max_length: int = 256,
        stride: int = 128,
    ) -> None:
        if not isinstance(text, str):
            raise TypeError(
                f"text is a {type(text).__name__}: give the text itself as a str, such as "
                "open(path, encoding='utf-8').read()"
            )
        check_lengths(max_length, stride)
        self.tokenizer = tokenizer if isinstance(tokenizer, Tokenizer) else Tokenizer(tokenizer)
        ids = encode_text(text, self.tokenizer)
        check_enough(len(ids), max_length, "the text")
        super().__init__(Tokens([ids]), begin=0, end=len(ids), max_length=max_length, stride=stride)


def check_enough(n_tokens: int, max_length: int, what: str) -> None:
    """Raise ValueError if there is no full window in `n_tokens` tokens."""
    if n_tokens < max_length + 1:
        raise ValueError(
            f"{what} has {n_tokens:,} tokens, too few for one window: max_length={max_length} needs "
            f"{max_length + 1:,} (the last target is one token later). Give more text, or set "
            f"max_length <= {max(1, n_tokens - 1)}"
        )
