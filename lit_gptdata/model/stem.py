"""The embedding stem turns each token id into a vector: its token row plus its position row.

    ids (B, T) ──► token_embedding (V, D) ──► (B, T, D) ─┐
                                                         + ──► dropout ──► (B, T, D)
    0 … T-1    ──► position table  (L, D) ──►    (T, D) ─┘

B: batch, T: tokens in a sequence (at most L), V: vocab_size, L: max_length, D: embedding_dim.
"""

import sys
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal, get_args

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lit_gptdata._checks import accepted, check_choice, check_flag, check_integer, check_number

Position = Literal["learned", "sinusoidal", "none"]

INIT_STD = 0.02  # GPT-2's standard deviation for tables and matrices (openai/gpt-2, src/model.py)
GPT2_VOCABULARY = 50_257  # tokens; the last one, <|endoftext|>, is between documents


class EmbeddingStem(L.LightningModule):
    """Embed token ids, integers (B, T), as the sum of token rows and position rows, float (B, T, D).

    Args:
        vocab_size: rows of the token table, the data's `vocab_size`
        max_length: longest allowed sequence in tokens
        embedding_dim: width of each row
        position: "learned" (GPT-2: a second table) | "sinusoidal" (a fixed table, see `sinusoids`) |
            "none" (token rows only)
        dropout: fraction of the output values set to 0 during training, in [0, 1)
        freeze: do not train the tables. GPT's head uses the token table, so it does not train either

    Raises ValueError for a value out of range.

    >>> stem = EmbeddingStem(vocab_size=50257, max_length=4, embedding_dim=256)
    >>> stem(torch.tensor([[171, 119, 123, 464]])).shape
    torch.Size([1, 4, 256])
    """

    sinusoids: Tensor | None  # (L, D) if position="sinusoidal", else None

    def __init__(
        self,
        vocab_size: int,
        max_length: int,
        embedding_dim: int,
        position: Position = "learned",
        dropout: float = 0.0,
        freeze: bool = False,
    ) -> None:
        super().__init__()
        self.vocab_size = check_integer("vocab_size", vocab_size, 1)
        self.max_length = check_integer("max_length", max_length, 1)
        self.embedding_dim = check_integer("embedding_dim", embedding_dim, 1)
        self.position = check_choice("position", position, get_args(Position))
        # An explicit dict: without it Lightning also reads the arguments of the __init__ that calls
        # this one, and would save the `dropout` of a subclass or of GPT in place of the stem's.
        names = ("vocab_size", "max_length", "embedding_dim", "position")
        options = {name: getattr(self, name) for name in names}
        options["dropout"] = check_number("dropout", dropout, 1)
        self.save_hyperparameters(options | ({"freeze": True} if freeze else {}))

        self.token_embedding = nn.Embedding(self.vocab_size, self.embedding_dim)
        nn.init.normal_(self.token_embedding.weight, std=INIT_STD)
        self.position_embedding: nn.Embedding | None = None
        if position == "learned":
            self.position_embedding = nn.Embedding(self.max_length, self.embedding_dim)
            nn.init.normal_(self.position_embedding.weight, std=INIT_STD)
        table = sinusoids(self.max_length, self.embedding_dim) if position == "sinusoidal" else None
        self.register_buffer("sinusoids", table, persistent=False)  # computed, so not in checkpoints
        self.dropout = nn.Dropout(dropout)
        self.requires_grad_(not check_flag("freeze", freeze))

    @property
    def position_table(self) -> Tensor | None:
        """The rows that are added to the token rows, (L, D); None if `position` adds none."""
        return self.sinusoids if self.position_embedding is None else self.position_embedding.weight

    def forward(self, ids: Tensor, positions: Tensor | None = None) -> Tensor:
        """Embed integer `ids` (B, T) as (B, T, D), in the dtype of the tables.

        `positions`, integers (T,) or (B, T), selects rows of the position table. By default token t
        takes row t. With position="none" the argument has no effect.

        Raises ValueError for a wrong shape or a sequence longer than max_length, and TypeError unless
        both are integer tensors. A value outside its table raises IndexError on the CPU without
        torch.compile; otherwise torch reports it in its own way.
        """
        ids = _as_index("ids", ids)
        if ids.ndim != 2:
            shape = tuple(ids.shape)
            raise ValueError(f"ids must have the shape (batch, tokens), got {shape}: try ids[None, :]")
        if (length := ids.shape[1]) > self.max_length:
            problem = f"a sequence may have at most max_length={self.max_length} tokens, got {length}"
            advice = f"ids[:, -{self.max_length}:], or build the stem with max_length={length} or more"
            raise ValueError(f"{problem}: shorten it to {advice}")
        x: Tensor = _lookup(self.token_embedding, ids, "ids", "vocab_size", self.vocab_size)  # (B, T, D)
        if self.position_table is not None:
            x += self._position_rows(self.position_table, ids, positions)  # in place: x is a new tensor
        return self.dropout(x)  # type: ignore[no-any-return]

    def _position_rows(self, table: Tensor, ids: Tensor, positions: Tensor | None) -> Tensor:
        """Return the first T rows of `table` as a view, or the rows that `positions` selects."""
        if positions is None:
            return table[: ids.shape[1]]
        positions = _as_index("positions", positions)
        if positions.shape != ids.shape[-positions.ndim :]:
            allowed = f"{tuple(ids.shape[1:])} or {tuple(ids.shape)}, like ids"
            raise ValueError(f"positions must have the shape {allowed}, got {tuple(positions.shape)}")
        lookup = partial(F.embedding, weight=table)
        return _lookup(lookup, positions, "positions", "max_length", self.max_length)

    def extra_repr(self) -> str:
        return f"max_length={self.max_length}, position={self.position!r}"


def check_stem(stem: Any) -> nn.Module:
    """Return a module that can be the stem of GPT; raise TypeError that names what it lacks."""
    lacks = [name for name in ("max_length", "embedding_dim") if not hasattr(stem, name)]
    table = getattr(getattr(stem, "token_embedding", None), "weight", None)
    lacks += [] if isinstance(table, Tensor) else ["token_embedding.weight"]
    if isinstance(stem, nn.Module) and not lacks:
        return stem
    allowed = "an EmbeddingStem or its arguments, or a module with max_length, embedding_dim"
    got = f"got {type(stem).__name__} without {', '.join(lacks)}"
    raise TypeError(f"stem must be {allowed} and token_embedding.weight, which is the head, {got}")


def check_separator(stem: nn.Module, eot: Any) -> int:
    """Return the id of the token between documents, for a model that masks documents.

    `eot=None` is GPT-2's for a vocabulary of GPT-2's size. Raises TypeError for a stem that takes no
    positions, and TypeError or ValueError for an id that is missing or not in the vocabulary.
    """
    if "positions" not in accepted(stem.forward):
        problem = f"document_mask restarts positions, but {type(stem).__name__}.forward takes none"
        raise TypeError(f"{problem}: add positions=None, integers (B, T), as in EmbeddingStem")
    size: int = len(stem.token_embedding.weight)  # type: ignore[arg-type, union-attr]
    if eot is None and size == GPT2_VOCABULARY:
        return GPT2_VOCABULARY - 1
    if eot is None:
        problem = f"document_mask needs eot, the token between documents, for a vocabulary of {size:,}"
        raise ValueError(f"{problem}: set eot to tokenizer.end_of_document")
    if (found := check_integer("eot", eot, 0)) >= size:
        raise ValueError(f"eot must be in 0 … {size - 1}, the stem's vocabulary, got {found}")
    return found


def stem_arguments(stem: nn.Module) -> dict[str, Any]:
    """The arguments of a stem that are in its hyperparameters; `_target_` names your own class."""
    if type(stem) is EmbeddingStem:
        return dict(stem.hparams)
    hparams = {"freeze": False, **getattr(stem, "hparams", {})}  # EmbeddingStem saves only True
    target = f"{type(stem).__module__}.{type(stem).__qualname__}"
    return {"_target_": target} | {k: hparams[k] for k in accepted(type(stem)) if k in hparams}


def build_stem(arguments: Mapping[str, Any]) -> nn.Module:
    """Build a stem from `stem_arguments`; raises ValueError if an import or an argument is missing.

    A checkpoint must not run code, so the class must have been imported already.
    """
    if "_target_" not in arguments:
        return EmbeddingStem(**arguments)
    module, _, name = arguments["_target_"].rpartition(".")
    kind = getattr(sys.modules.get(module), name, None)
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        advice = f"import {module} before you load it, or pass stem=…"
    elif lacks := [name for name in accepted(kind) if name not in arguments]:
        advice = f"the checkpoint does not contain its {', '.join(lacks)}. Pass stem=…, or train with"
        advice += " a stem that calls self.save_hyperparameters()"
    else:
        return kind(**{name: arguments[name] for name in accepted(kind)})
    raise ValueError(f"the stem of the checkpoint is {arguments['_target_']}: {advice}")


def sinusoids(max_length: int, embedding_dim: int) -> Tensor:
    """Compute the fixed position table of Vaswani et al. 2017, section 3.5, as float32 (L, D).

    Column 2i is sin(p / 10000^(2i / D)) for position p, and column 2i + 1 the cosine of the same angle.
    An odd D ends with a sine. Unlike section 3.4, the stem does not multiply the token rows by √D.
    """
    position = torch.arange(max_length, dtype=torch.float64)[:, None]  # (L, 1)
    even = torch.arange(0, embedding_dim, 2, dtype=torch.float64)  # (⌈D/2⌉,)
    angle = position / 10_000 ** (even / embedding_dim)  # (L, ⌈D/2⌉)
    table = torch.empty(max_length, embedding_dim)
    table[:, 0::2] = angle.sin()
    table[:, 1::2] = angle[:, : embedding_dim // 2].cos()
    return table


def _as_index(name: str, values: Tensor) -> Tensor:
    """Return `values` if nn.Embedding accepts its dtype, else an int64 copy."""
    if not isinstance(values, Tensor):
        got = type(values).__name__
        raise TypeError(f"{name} must be an integer tensor, got {got}: use torch.as_tensor({name})")
    dtype = values.dtype
    if dtype.is_floating_point or dtype.is_complex or dtype == torch.bool:
        raise TypeError(f"{name} must have an integer dtype, got {dtype}: convert with {name}.long()")
    return values if dtype in (torch.int64, torch.int32) else values.long()


def _lookup(
    rows: Callable[[Tensor], Tensor], index: Tensor, name: str, size_name: str, size: int
) -> Tensor:
    """Return rows(index); if torch raises IndexError, raise one that names the range of `index`."""
    if torch.compiler.is_compiling():
        return rows(index)
    try:
        return rows(index)
    except IndexError:
        low, high = index.min().item(), index.max().item()
        problem = f"{name} must be in 0 … {size - 1}, got values from {low} to {high}"
        advice = f"this stem has {size_name}={size}, which must match the data"
        raise IndexError(f"{problem}: {advice}") from None
