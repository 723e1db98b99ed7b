"""Which document each token of a window belongs to, and attention that stays inside documents.

    inputs       7  9  E  5  6  E  8     E: eot, the separator; it starts a document
    documents    0  0  1  1  1  2  2     → an attention mask, or cu_seqlens
    positions    0  1  0  1  2  0  1     → rows of the position table

All functions work on any device and in torch.compile, and no shape depends on the values of `inputs`.
"""

from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import flex_attention as flex
from torch.nn.attention.flex_attention import BlockMask

Mask = Tensor | BlockMask  # a tensor is a mask of pairs, bool (B, 1, T, T)
HAS_TRITON = find_spec("triton") is not None  # the compiler of FlexAttention; not on Windows


def document_ids(inputs: Tensor, eot: int) -> Tensor:
    """Number the documents of each row: integers (B, T) → int64 (B, T).

    Each token `eot` starts the next document. Tokens before the first `eot` are document 0.

    >>> document_ids(torch.tensor([[7, 9, 50256, 5, 6, 50256, 8]]), eot=50256)
    tensor([[0, 0, 1, 1, 1, 2, 2]])
    """
    return (inputs == eot).cumsum(1)


def document_positions(inputs: Tensor, eot: int) -> Tensor:
    """Count the tokens since the start of each token's document: integers (B, T) → int64 (B, T).

    Tokens before the first `eot` count from the start of the row.

    >>> document_positions(torch.tensor([[7, 9, 50256, 5, 6, 50256, 8]]), eot=50256)
    tensor([[0, 1, 0, 1, 2, 0, 1]])
    """
    places = torch.arange(inputs.shape[1], device=inputs.device).expand(inputs.shape)  # (B, T)
    return places - torch.where(inputs == eot, places, 0).cummax(1).values


def cu_seqlens(inputs: Tensor, eot: int, size: int) -> Tensor:
    """Return where each document of the flattened batch starts: integers (B, T) → int32 (size,).

    This is the argument of variable-length attention, such as flash_attn_varlen_func. Each row starts a
    document, too. The end is padded with B·T, so sequences there are empty. `size` must be larger than
    the number of documents in the batch, and B·T + 1 is always enough. A `size` that is too small raises
    RuntimeError. On CUDA an assertion on the device stops the program, without a synchronization.

    >>> cu_seqlens(torch.tensor([[7, 9, 50256, 5], [6, 50256, 8, 8]]), eot=50256, size=6)
    tensor([0, 2, 4, 5, 8, 8], dtype=torch.int32)
    """
    starts = document_positions(inputs, eot).flatten() == 0  # (B·T,)
    n, places = starts.numel(), torch.arange(starts.numel(), device=inputs.device)
    problem = f"cu_seqlens must have a size larger than the number of documents, got size={size}"
    problem += f": {n + 1} is enough for any batch of this shape"
    if inputs.device.type in ("cpu", "cuda", "meta"):
        torch._assert_async(starts.sum() < size, problem)
    elif starts.sum() >= size:  # a synchronization: other devices do not have such assertions
        raise RuntimeError(problem)
    # One more place gets all tokens that start no document, and is cut off.
    number = torch.where(starts, starts.cumsum(0) - 1, size).clamp(max=size)
    found = torch.full((size + 1,), n, dtype=torch.int32, device=inputs.device)
    return found.scatter(0, number, places.int())[:size]


def attention_mask(inputs: Tensor, eot: int, begin: int = 0) -> Tensor:
    """Which tokens the tokens from `begin` on attend to: integers (B, T) → bool (B, 1, T - begin, T)."""
    documents = document_ids(inputs, eot)[:, None]  # (B, 1, T)
    places = torch.arange(inputs.shape[1], device=inputs.device)
    is_causal = places[begin:, None] >= places  # (T - begin, T)
    return is_causal & (documents[..., begin:, None] == documents[..., None, :])


def block_mask(inputs: Tensor, eot: int) -> BlockMask:
    """The same mask for FlexAttention, which skips blocks of 128 × 128 pairs without an allowed one."""
    documents, (B, T) = document_ids(inputs, eot), inputs.shape

    def attends(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (q >= k) & (documents[b, q] == documents[b, k])

    make = _compiled(flex.create_block_mask)
    return make(attends, B, None, T, T, inputs.device)  # type: ignore[no-any-return]


def flex_attention(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask) -> Tensor:
    """Attention with a mask of `block_mask`, each (B, H, T, D/H) → (B, H, T, D/H)."""
    return _compiled(flex.flex_attention)(q, k, v, block_mask=mask)  # type: ignore[no-any-return]


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function for torch.compile; without it, FlexAttention computes all pairs."""
    return function if torch.compiler.is_compiling() else _compile(function)


_compile = cache(torch.compile)
