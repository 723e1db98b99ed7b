"""Check options of several layers, and turn them into plain values.

NumPy's numbers pass these checks, but a checkpoint that holds them does not load with weights_only=True.
"""

import operator
import os
import re
from inspect import Parameter, signature
from numbers import Real
from typing import Any

UNITS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "g": 10**9}


def check_integer(name: str, value: Any, least: int | None = None, meaning: str = "") -> int:
    """Return `value` as an int; raise TypeError or ValueError unless it is an integer ≥ `least`."""
    allowed = "an integer" if least is None else f"an integer ≥ {least}"
    problem = f"{name} must be {allowed}, got {value!r}" + (f": it is {meaning}" if meaning else "")
    if _is_boolean(value):
        raise TypeError(problem)
    try:
        number = operator.index(value)
    except TypeError:
        found = re.fullmatch(r"(\d+\.?\d*)([kKmMbBgG]?)", str(value))  # 10k, 1e6
        n = float(found[1]) * UNITS[found[2].lower()] if found else 0.5
        raise TypeError(problem + (f". Write it as {n:_.0f}" if n.is_integer() else "")) from None
    if least is not None and number < least:
        raise ValueError(problem)
    return number


def check_choice(name: str, value: Any, allowed: tuple[str, ...]) -> str:
    """Return `value` as a str; raise ValueError unless it is one of `allowed`."""
    if value not in allowed:
        raise ValueError(f"{name} must be one of {allowed}, got {value!r}")
    return str.__str__(value)


def check_string(name: str, value: Any) -> str:
    """Return `value` as a str; raise TypeError unless it is one."""
    if not isinstance(value, str):
        problem = f"{name} must be a string, got {value!r} ({type(value).__name__})"
        raise TypeError(f"{problem}{hydra_quotes(name, value)}")
    return str.__str__(value)


def hydra_quotes(name: str, value: Any) -> str:
    """How to type a name that YAML reads as a number, or "" for another value."""
    if _is_boolean(value) or not isinstance(value, Real):
        return ""
    return f". For a name that is a number, quote it for Hydra: 'data.{name}=\"{value}\"'"


def plain(value: Any) -> Any:
    """A path, a string of an Enum or a scalar of numpy as a plain value; other values as they are."""
    if getattr(value, "ndim", None) == 0:
        return value.item()
    value = os.fspath(value) if isinstance(value, os.PathLike) else value
    return str.__str__(value) if isinstance(value, str) else value


def check_number(
    name: str, value: Any, high: float, meaning: str = "", *, include_high: bool = False
) -> float:
    """Return `value` as a float; raise TypeError or ValueError unless in [0, high), or [0, high]."""
    problem = f"{name} must be a number in [0, {high:g}{']' if include_high else ')'}, got {value!r}"
    problem += f": it is {meaning}" if meaning else ""
    if _is_boolean(value) or not isinstance(value, Real):
        raise TypeError(problem)
    if not 0 <= float(value) <= high or (value == high and not include_high):
        raise ValueError(problem)
    return float(value)


def check_flag(name: str, value: Any) -> bool:
    """Return `value` as a bool; raise TypeError unless it is True or False. "false" is neither."""
    if not _is_boolean(value):
        raise TypeError(f"{name} must be true or false, got {value!r} ({type(value).__name__})")
    return bool(value)


def accepted(target: Any) -> dict[str, Parameter]:
    """The named parameters of a class or function; **kwargs of a class are the ones of its bases."""
    inits = [
        vars(each)["__init__"] for each in getattr(target, "__mro__", ()) if "__init__" in vars(each)
    ]
    found: dict[str, Parameter] = {}
    for function in inits or [target]:
        parameters = [*signature(function).parameters.values()][bool(inits) :]  # without self
        named = (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY)
        found = {each.name: each for each in parameters if each.kind in named} | found
        if Parameter.VAR_KEYWORD not in [each.kind for each in parameters]:
            break
    return found


def _is_boolean(value: Any) -> bool:
    return isinstance(value, bool) or type(value).__name__ in ("bool_", "bool")  # numpy's bool
