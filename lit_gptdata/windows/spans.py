"""Where windows start: integer arithmetic that reads no tokens.

Spans(n_tokens=10, max_length=4, stride=3)  ->  2 windows, which start at tokens 0 and 3
"""

from dataclasses import dataclass

from lit_gptdata._checks import check_integer


@dataclass(frozen=True, kw_only=True)
class Spans:
    """Windows over a range of tokens: window i has the inputs [i * stride, i * stride + max_length)."""

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

    def start(self, index: int) -> int:
        """The first token of window `index`, counted from the start of the range."""
        return index * self.stride


def check_lengths(max_length: int, stride: int) -> tuple[int, int]:
    """Return both as ints; raise TypeError or ValueError unless they are integers of at least 1."""
    max_length = check_integer("max_length", max_length, 1, "the window's length in tokens")
    return max_length, check_integer("stride", stride, 1, "the distance between two windows in tokens")
