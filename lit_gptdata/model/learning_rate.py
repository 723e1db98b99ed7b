"""The learning rate of each optimizer step: a linear warm-up, then half a cosine."""

import math
from numbers import Integral, Real
from typing import Any


def learning_rate_scale(
    step: int, total_steps: float, warmup_steps: int, min_learning_rate_ratio: float
) -> float:
    """Return the factor on the peak learning rate at `step` = 0, 1, 2, …

    It rises linearly from 1 / (warmup_steps + 1) to 1 at step `warmup_steps`. It then falls along half a
    cosine to `min_learning_rate_ratio` at `total_steps`, and stays there. If `total_steps` is infinite
    or below 1, the end is unknown, and the factor stays 1 after the warm-up.
    Source: Loshchilov & Hutter 2017, "SGDR", equation 5, without restarts.
    """
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    if not 1 <= total_steps < math.inf:
        return 1.0
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    cosine = (1 + math.cos(math.pi * progress)) / 2
    return min_learning_rate_ratio + (1 - min_learning_rate_ratio) * cosine


def check_warmup_steps(value: Any) -> int | float:
    """Return a number of steps as an int ≥ 0, or a fraction of all steps as a float in (0, 1)."""
    if isinstance(value, Integral) and int(value) >= 0:
        return int(value)
    if isinstance(value, Real) and 0 <= float(value) < 1:
        return float(value) or 0
    allowed = "an integer ≥ 0 or a fraction of all steps in (0, 1)"
    raise ValueError(f"warmup_steps must be {allowed}, got {value!r}")


def count_warmup_steps(warmup_steps: int | float, total_steps: float) -> int:
    """Return the number of warm-up steps, where `warmup_steps` may be a fraction of `total_steps`."""
    if isinstance(warmup_steps, int):
        return warmup_steps
    if total_steps == 0:  # Trainer(max_steps=0) trains nothing
        return 0
    if not 1 <= total_steps < math.inf:
        advice = "but the Trainer has no limit: give an integer, or set its max_steps or max_epochs"
        raise ValueError(f"warmup_steps={warmup_steps} is a fraction of all steps, {advice}")
    return round(warmup_steps * total_steps)
