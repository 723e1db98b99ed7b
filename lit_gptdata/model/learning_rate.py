"""The learning rate of each optimizer step, as a function of the tokens before it.

    1 ┤     ╭───────────────────╮            cosine: falls from the end of the warm-up
      │   ╭╯                     ╲           warmup-stable-decay: falls over the last `decay` tokens
ratio ┤ ╭╯                        ╲____
      0     warmup        total − decay   total tokens

Tokens, not steps: a run that continues with another batch size follows the same curve. Data that does
not count its tokens counts optimizer steps; all numbers are then numbers of steps.
"""

import math
from bisect import bisect_left
from collections.abc import Callable, Mapping
from numbers import Integral, Real
from typing import Any, Literal, get_args

from lit_gptdata._checks import check_choice

Schedule = Literal["cosine", "warmup-stable-decay"]


def learning_rate_scale(
    tokens: int, total: float, warmup: int, ratio: float, *, own: int = 1, decay: int | None = None
) -> float:
    """Return the factor on the peak learning rate of an optimizer step after `tokens` tokens.

    `own` is the number of tokens of the step itself. The warm-up rises linearly, from
    own / (warmup + own) at the start of the run to 1 after `warmup` tokens. With `decay=None` the factor
    then falls along half a cosine to `ratio` at `total` tokens. Otherwise it stays 1, and falls linearly
    over the last `decay` tokens. If `total` is infinite or below 1, the factor stays 1.

    Sources: Loshchilov & Hutter 2017, "SGDR", equation 5, without restarts. Hu et al. 2024, "MiniCPM",
    section 4.2, and Hägele et al. 2024, "Scaling Laws and Compute-Optimal Training Beyond Fixed Training
    Durations", whose linear decay over 20 % of the run ends with the loss of a cosine.
    """
    if tokens < warmup:
        return (tokens + own) / (warmup + own)
    if not 1 <= total < math.inf:
        return 1.0
    start = warmup if decay is None else max(warmup, int(total) - decay)
    progress = min(1.0, max(0, tokens - start) / max(1, total - start))
    left = (1 + math.cos(math.pi * progress)) / 2 if decay is None else 1 - progress
    return ratio + (1 - ratio) * left


def check_length(name: str, value: Any, unit: str = "tokens") -> int | float:
    """Return a number of tokens as an int ≥ 0, or a fraction of all tokens as a float in (0, 1)."""
    if isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= 0:
        return int(value)
    if isinstance(value, Real) and not isinstance(value, Integral) and 0 <= float(value) < 1:
        return float(value) or 0
    allowed = f"an integer ≥ 0 or a fraction of all {unit} in (0, 1)"
    raise ValueError(f"{name} must be {allowed}, got {value!r}")


def count_tokens(
    name: str, length: int | float, total: float, count: Callable[[int], int] | None = None
) -> int:
    """Return the tokens of a `length` that may be a fraction of `total` tokens.

    With `count`, the tokens before a step, the length is in optimizer steps, rounded to whole ones.
    """
    if isinstance(length, int):
        return count(length) if count else length
    if total == 0:  # Trainer(max_steps=0) trains nothing
        return 0
    if not 1 <= total < math.inf:
        advice = "but the Trainer has no limit: give an integer, or set its max_steps or max_epochs"
        raise ValueError(f"{name}={length} is a fraction of the whole run, {advice}")
    tokens = length * total
    if count is None:
        return round(tokens)
    step = bisect_left(range(int(total) + 1), tokens, key=count)  # the first one that is not too early
    nearest = min(max(0, step - 1), step, key=lambda s: (abs(count(s) - tokens), s % 2))
    return count(nearest)


def check_schedule(steps: Any, tokens: Any, schedule: Any, decay: Any) -> dict[str, Any]:
    """Return the options of a schedule as plain values; raises ValueError for a value out of range."""
    if steps is not None and tokens is not None:
        got = f"warmup_tokens={tokens!r} and warmup_steps={steps!r}"
        advice = "add warmup_tokens=null or warmup_steps=null"
        raise ValueError(f"give either warmup_tokens or warmup_steps, got {got}: {advice}")
    steps = 100 if steps is None else steps
    return {
        "warmup_steps": check_length("warmup_steps", steps, "steps") if tokens is None else None,
        "warmup_tokens": None if tokens is None else check_length("warmup_tokens", tokens),
        "schedule": check_choice("schedule", schedule, get_args(Schedule)),
        "decay_tokens": check_length("decay_tokens", decay),
    }


def make_schedule(options: Mapping[str, Any], trainer: Any) -> Callable[[int], float]:
    """The factor on the peak learning rate, by optimizer step; `options`: what check_schedule returns.

    A data module with `tokens_at(step=…)` and `tokens_at()`, the tokens of the whole run, gives a
    schedule in tokens. Other data gives one in steps.
    """
    first = trainer.global_step  # more than 0 in a second fit of one Trainer
    total_steps = trainer.estimated_stepping_batches  # inf or -1 without a limit; it loads the data
    tokens_at = getattr(trainer.datamodule, "tokens_at", None)
    name = "warmup_steps" if options["warmup_tokens"] is None else "warmup_tokens"
    lengths = {name: options[name]}
    if options["schedule"] != "cosine":
        lengths["decay_tokens"] = options["decay_tokens"]
    for option, length in lengths.items():
        if tokens_at is None and option.endswith("tokens") and isinstance(length, int) and length:
            problem = f"{option}={length}, but the data module does not count tokens"
            raise ValueError(f"{problem}: give a fraction of the run, or fit with a GPTDataModule")

    def count(step: int) -> int:
        return step if tokens_at is None else int(tokens_at(step=step))

    def scale(step: int) -> float:
        before, total = count(first + step), total_steps if tokens_at is None else tokens_at()
        warmup = count_tokens(name, lengths[name], total, count if name == "warmup_steps" else None)
        own = count(first + step + 1) - before if before < warmup else 1
        decay = lengths.get("decay_tokens") if total < math.inf else None
        decay = decay and count_tokens("decay_tokens", decay, max(0, total))
        ratio = options["min_learning_rate_ratio"]
        return learning_rate_scale(before, total, warmup, ratio, own=own, decay=decay)

    return scale
