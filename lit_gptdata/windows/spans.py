"""Where windows begin: pure integer arithmetic, nothing is read.

Spans(n_tokens=10, max_length=4, stride=3).starts()  ->  [0, 3]
"""

from __future__ import annotations

from dataclasses import dataclass

from lit_gptdata._checks import check_at_least


@dataclass(frozen=True, kw_only=True)
class Spans:
    """The windows of a range of tokens: window i covers tokens [i * stride, i * stride + max_length]."""

    n_tokens: int
    """Length of the range, in tokens."""

    max_length: int
    """Inputs of a window, in tokens; a window reads one token more, its last target."""

    stride: int
    """Distance between the first tokens of two neighbours, in tokens."""

    fill: bool = False
    """False: only full windows, the course's `range(0, n - max_length, stride)`. True: as many as
    score every token that has a predecessor; the last may be short and is filled up."""

    def __len__(self) -> int:
        if self.fill:  # ceil((n - 1) / stride): used with stride == max_length
            return max(0, -(-(self.n_tokens - 1) // self.stride))
        return max(0, (self.n_tokens - self.max_length - 1) // self.stride + 1)

    def start(self, index: int) -> int:
        """First token of window `index`, counted from the range's first token."""
        return index * self.stride

    def starts(self) -> list[int]:
        """The first token of every window."""
        return [self.start(i) for i in range(len(self))]


def check_lengths(max_length: int, stride: int) -> None:
    """Raise ValueError, TypeError if `max_length` or `stride` is no integer of at least 1."""
    check_at_least("max_length", max_length, 1, "the window's length in tokens")
    check_at_least("stride", stride, 1, "the distance between two windows in tokens")
