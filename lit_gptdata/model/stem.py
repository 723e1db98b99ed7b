"""From token ids to vectors: one row of a token table plus one row of a position table.

    ids (B, T) ──► token_embedding (V, D) ──► (B, T, D) ─┐
                                                         + ──► dropout ──► (B, T, D)
    0 … T-1    ──► position table  (L, D) ──►    (T, D) ─┘

V: vocab_size, L: max_length, D: embedding_dim, B: batch, T: tokens in a sequence, at most L.
"""

from collections.abc import Callable
from numbers import Integral
from typing import Literal, get_args

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn import functional as F

Position = Literal["learned", "sinusoidal", "none"]

INIT_STD = 0.02  # GPT-2's standard deviation for tables and matrices (openai/gpt-2, src/model.py)

# What torch.nn.functional.embedding takes as it is; every other integer dtype is converted first.
_INDEX_DTYPES = (torch.int64, torch.int32)
_OTHER_INTEGER_DTYPES = (
    torch.uint8,
    torch.int8,
    torch.uint16,
    torch.int16,
    torch.uint32,
    torch.uint64,
)


class EmbeddingStem(L.LightningModule):
    """Integers (B, T) → float vectors (B, T, embedding_dim): token rows + position rows.

    Args:
        vocab_size: rows of the token table, the data's `vocab_size`
        max_length: the longest sequence taken, in tokens, whatever `position` is
        embedding_dim: width of a row
        position: "learned" (GPT-2: a second table) | "sinusoidal" (a fixed one, see `sinusoids`) |
            "none" (token rows alone)
        dropout: share of the values set to 0 while training, in [0, 1)

    Raises:
        ValueError: a size below 1, an unknown `position`, `dropout` outside [0, 1)

    >>> stem = EmbeddingStem(vocab_size=50257, max_length=4, embedding_dim=256)
    >>> stem(torch.tensor([[171, 119, 123, 464]])).shape
    torch.Size([1, 4, 256])
    """

    sinusoids: Tensor | None  # (L, D), only with position="sinusoidal"

    def __init__(
        self,
        vocab_size: int,
        max_length: int,
        embedding_dim: int,
        position: Position = "learned",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.vocab_size = _size("vocab_size", vocab_size)
        self.max_length = _size("max_length", max_length)
        self.embedding_dim = _size("embedding_dim", embedding_dim)
        if position not in get_args(Position):
            allowed = ", ".join(repr(name) for name in get_args(Position))
            raise ValueError(f"position is {position!r}; allowed are {allowed}")
        if not 0 <= dropout < 1:
            raise ValueError(
                f"dropout is {dropout!r}, the share of values set to zero; it must lie in [0, 1):"
                " 0 turns it off"
            )
        self.position = position
        # Named one by one: without arguments Lightning also reads the frame of whoever builds the
        # stem, and GPT's own `dropout` would be saved in place of this one.
        self.save_hyperparameters(
            {
                "vocab_size": self.vocab_size,
                "max_length": self.max_length,
                "embedding_dim": self.embedding_dim,
                "position": str(position),
                "dropout": float(dropout),
            }
        )

        self.token_embedding = nn.Embedding(self.vocab_size, self.embedding_dim)
        nn.init.normal_(self.token_embedding.weight, std=INIT_STD)
        self.position_embedding: nn.Embedding | None = None
        if position == "learned":
            self.position_embedding = nn.Embedding(self.max_length, self.embedding_dim)
            nn.init.normal_(self.position_embedding.weight, std=INIT_STD)
        table = sinusoids(self.max_length, self.embedding_dim) if position == "sinusoidal" else None
        self.register_buffer("sinusoids", table, persistent=False)  # arithmetic: not in checkpoints
        self.dropout = nn.Dropout(dropout)

    def forward(self, ids: Tensor, positions: Tensor | None = None) -> Tensor:
        """Integers (B, T) → (B, T, D) in the tables' dtype.

        `positions`, (T,) or (B, T) integers, picks rows of the position table; without it token t
        takes row t. With position="none" it changes nothing.
        ValueError: a sequence longer than max_length, a wrong shape. TypeError: ids or positions
        that are not an integer tensor. IndexError (on the CPU, not compiled): a value outside its
        table; elsewhere torch's own report of it stands.
        """
        ids = _as_index("ids", ids)
        if ids.ndim != 2:
            raise ValueError(
                f"ids have the shape {tuple(ids.shape)}; the stem takes (batch, tokens):"
                " a single sequence goes in as ids[None, :]"
            )
        if ids.shape[1] > self.max_length:
            raise ValueError(
                f"a sequence of {ids.shape[1]} tokens is longer than this stem's max_length of"
                f" {self.max_length}; shorten it, as in ids[:, -{self.max_length}:], or build the"
                f" stem with max_length={ids.shape[1]} or more"
            )
        x: Tensor = _lookup(self.token_embedding, ids, "ids", "vocab_size", self.vocab_size)  # (B, T, D)
        if self.position != "none":
            x += self._position_rows(ids, positions)  # in place: nobody else has these token rows
        return self.dropout(x)  # type: ignore[no-any-return]

    def _position_rows(self, ids: Tensor, positions: Tensor | None) -> Tensor:
        """(T, D), a view of the table's head, or the rows that `positions` asks for."""
        table = self.position_embedding.weight if self.position_embedding else self.sinusoids
        assert table is not None
        if positions is None:
            # The table, or a view of it: no arange, no gather, no copy.
            return table if ids.shape[1] == len(table) else table[: ids.shape[1]]
        positions = _as_index("positions", positions)
        if positions.shape != ids.shape[-positions.ndim :]:
            raise ValueError(
                f"positions have the shape {tuple(positions.shape)}; allowed for ids of shape"
                f" {tuple(ids.shape)} are {tuple(ids.shape[1:])} and {tuple(ids.shape)}"
            )
        return _lookup(
            lambda index: F.embedding(index, table),
            positions,
            "positions",
            "max_length",
            self.max_length,
        )

    def extra_repr(self) -> str:
        return f"max_length={self.max_length}, position={self.position!r}"


def sinusoids(max_length: int, embedding_dim: int) -> Tensor:
    """The fixed position table (max_length, embedding_dim) of Vaswani et al. 2017, section 3.5.

    Column 2i holds sin(p / 10000^(2i / D)), column 2i + 1 the cosine of the same angle; an odd D
    ends on a sine. It is added to the token rows as it is, without their factor √D (section 3.4).
    """
    position = torch.arange(max_length, dtype=torch.float64)[:, None]  # (L, 1)
    even = torch.arange(0, embedding_dim, 2, dtype=torch.float64)  # (⌈D/2⌉,)
    angle = position / 10_000 ** (even / embedding_dim)  # (L, ⌈D/2⌉)
    table = torch.empty(max_length, embedding_dim)
    table[:, 0::2] = angle.sin()
    table[:, 1::2] = angle[:, : embedding_dim // 2].cos()
    return table


def _size(name: str, value: int) -> int:
    """A plain int of at least 1: numpy's would keep a checkpoint from loading with weights_only."""
    if not isinstance(value, Integral) or value < 1:
        raise ValueError(f"{name} is {value!r}; it must be a whole number of at least 1")
    return int(value)


def _as_index(name: str, values: Tensor) -> Tensor:
    """The same tensor if nn.Embedding takes its dtype, else a copy as int64."""
    if not isinstance(values, Tensor):
        raise TypeError(
            f"{name} are a {type(values).__name__}; they must be an integer tensor,"
            f" as torch.as_tensor({name}) makes"
        )
    if values.dtype in _INDEX_DTYPES:
        return values
    if values.dtype in _OTHER_INTEGER_DTYPES:
        return values.long()
    raise TypeError(
        f"{name} have the dtype {values.dtype}; they must be integers, such as torch.int64:"
        f" convert them with {name}.long()"
    )


def _lookup(
    rows: Callable[[Tensor], Tensor], index: Tensor, name: str, size_name: str, size: int
) -> Tensor:
    """rows(index); a value outside 0..size-1 is looked for only after the table refused one."""
    if torch.compiler.is_compiling():
        return rows(index)
    try:
        return rows(index)
    except IndexError:
        raise IndexError(
            f"{name} run from {index.min().item()} to {index.max().item()}; allowed are 0 to"
            f" {size - 1}: this stem was built with {size_name}={size}, which must fit the data"
        ) from None
