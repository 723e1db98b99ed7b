"""Check the arguments of a model and turn them into plain numbers.

NumPy's numbers pass these checks, but a checkpoint that holds them does not load with weights_only=True.
"""

from numbers import Integral, Real
from typing import Any


def check_integer(name: str, value: Any, minimum: int) -> int:
    """Return `value` as an int; raise ValueError unless it is an integer ≥ `minimum`."""
    if not isinstance(value, Integral) or int(value) < minimum:
        raise ValueError(f"{name} must be an integer ≥ {minimum}, got {value!r}")
    return int(value)


def check_number(name: str, value: Any, high: float, *, include_high: bool = False) -> float:
    """Return `value` as a float; raise ValueError unless it is in [0, high), or [0, high]."""
    if (
        not isinstance(value, Real)
        or not 0 <= float(value) <= high
        or (value == high and not include_high)
    ):
        interval = f"[0, {high}{']' if include_high else ')'}"
        raise ValueError(f"{name} must be a number in {interval}, got {value!r}")
    return float(value)
