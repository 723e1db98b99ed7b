"""Checks of options that several layers share."""


def check_at_least(name: str, value: int, least: int, meaning: str) -> None:
    """Raise TypeError or ValueError unless `value` is an integer of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(
            f"{name}={value!r} is a {type(value).__name__}; it is {meaning}: give an integer >= {least}"
        )
    if value < least:
        raise ValueError(f"{name}={value} is too small; it is {meaning}: give an integer >= {least}")
