"""Windows over tokens: any of them in one look, a whole batch in one gather.

WindowDataset("…", "gpt2", max_length=4, stride=4)[0]  ->  inputs (4,), targets (4,): one token later
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from lit_gptdata.tokens.engine import encode_text
from lit_gptdata.tokens.shard import Tokens
from lit_gptdata.tokens.tokenizer import Tokenizer
from lit_gptdata.windows.spans import Spans, check_lengths

if TYPE_CHECKING:
    import tiktoken

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

    def batch(self, indices: Sequence[int] | np.ndarray) -> tuple[Tensor, Tensor]:
        """Windows by index, each within [0, len): (B,) → inputs, targets, int64 (B, max_length)."""
        spans = self.spans
        starts = np.asarray(indices, dtype=np.int64) * spans.stride
        pair = np.empty((2, len(starts), spans.max_length), np.int64)
        short = starts + spans.max_length + 1 > spans.n_tokens  # a filled range's last window, if any
        ids = self._filled(starts, short) if short.any() else self._gather(starts)
        pair[0] = ids[:, :-1]
        pair[1] = ids[:, 1:]
        if short.any():
            n_targets = spans.n_tokens - 1 - starts[:, None]  # (B, 1)
            beyond = short[:, None] & (np.arange(spans.max_length) >= n_targets)
            pair[0][beyond] = 0
            pair[1][beyond] = IGNORE_INDEX
        inputs, targets = torch.from_numpy(pair)
        return inputs, targets  # (B, L), (B, L)

    def _gather(self, starts: np.ndarray) -> np.ndarray:
        return self.tokens.gather(starts + self.begin, self.spans.max_length + 1)  # (B, L + 1)

    def _filled(self, starts: np.ndarray, short: np.ndarray) -> np.ndarray:
        """As `_gather`, with zeros where a window reaches beyond the range."""
        ids = np.zeros((len(starts), self.spans.max_length + 1), self.tokens.dtype)
        ids[~short] = self._gather(starts[~short])
        for row in np.flatnonzero(short).tolist():
            rest = self.tokens[self.begin + int(starts[row]) : self.end]
            ids[row, : len(rest)] = rest
        return ids


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
