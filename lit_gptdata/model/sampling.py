"""Helpers of GPT.generate: draw the next token, and switch the model to eval mode."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


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


@contextmanager
def eval_mode(module: nn.Module) -> Iterator[None]:
    """Switch `module` to eval mode, and restore the mode of each submodule afterwards."""
    modes = [(submodule, submodule.training) for submodule in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for submodule, training in modes:
            submodule.training = training
