"""Continue a prompt token by token, with a cache of keys and values, as GPT.generate does."""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from lit_gptdata._checks import check_integer, check_number
from lit_gptdata.model.block import KeyValueCache


@torch.no_grad()
def sample_tokens(
    model: Any, ids: Tensor, max_new_tokens: int, temperature: float, top_k: int | None,
    generator: torch.Generator | None,
) -> Iterator[Tensor]:  # fmt: skip
    """Yield the tokens that `GPT.generate` appends to a prompt, one at a time, int64 (B, 1)."""
    if not isinstance(ids, Tensor) or ids.ndim != 2 or 0 in ids.shape:
        got = f"the shape {tuple(ids.shape)}" if isinstance(ids, Tensor) else type(ids).__name__
        problem = f"the prompt must be a tensor (batch, tokens) with at least one token, got {got}"
        raise ValueError(f"{problem}; to generate without a prompt, pass the end-of-text token")
    check_integer("max_new_tokens", max_new_tokens, 0)
    check_number("temperature", temperature, math.inf)
    if top_k is not None:
        check_integer("top_k", top_k, 1)

    ids, limit = ids.to(model.device, torch.int64), model.stem.max_length
    caches = [] if model._own_code else [KeyValueCache() for _ in model.blocks]
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        for _ in range(max_new_tokens):
            if caches and ids.shape[1] <= limit:
                features = model._features(ids, caches)  # of the tokens that are not cached
            else:  # the window slides, so each token gets another position in each step
                features = model._features(ids[:, -limit:])  # (B, ≤ max_length, D)
            logits = model._head(features[:, -1]).float()  # (B, V)
            next_token = sample_token(logits, temperature, top_k, generator)
            ids = torch.cat((ids, next_token), dim=1)
            yield next_token
    finally:
        for module, training in modes:
            module.training = training


def sample_token(
    logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator | None
) -> Tensor:
    """Draw one token per row: logits (B, V) → int64 (B, 1). Temperature 0 takes the most likely one.

    Raises ValueError for logits with NaN or infinity, which a model that diverged gives.
    """
    if not logits.isfinite().all():
        advice = "train again with a lower learning rate or with gradient clipping"
        raise ValueError(f"the model's logits are NaN or infinite, so its training diverged: {advice}")
    if temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    vocab_size = logits.shape[-1]
    top_logits, tokens = logits.topk(min(top_k or vocab_size, vocab_size))  # both (B, k), largest first
    # Subtract the largest logit before dividing: a tiny temperature then gives -inf, never inf - inf.
    probabilities = ((top_logits - top_logits[:, :1]) / temperature).softmax(dim=-1)
    return tokens.gather(-1, torch.multinomial(probabilities, 1, generator=generator))
