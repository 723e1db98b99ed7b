"""How a report's pictures place values: scales of keys, limits but for outliers, and short texts."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lit_gptdata.report.jobs import canonical, natural


@dataclass(frozen=True, kw_only=True)
class Scale:
    """Where the values of a key stand on an axis."""

    positions: dict[str | float, float]
    """Canonical value → place."""
    labels: dict[float, str]
    """Place → what is written there, in order."""
    kind: str
    """"linear" | "log" | "categories"."""


def scale_of(values: Sequence[str | None]) -> Scale:
    """Where values stand: numbers on a line, logarithmic where that suits them, else side by side.

    Logarithmic: all above zero, and powers of two or over more than a factor of ten.
    """
    found = sorted({canonical(value) for value in values if value is not None}, key=order)
    numbers = [value for value in found if isinstance(value, int | float)]
    if not numbers or len(numbers) < len(found):
        places = {value: float(i) for i, value in enumerate(found)}
        labels = {float(i): short(shown(value), 16) for i, value in enumerate(found)}
        return Scale(positions=places, labels=labels, kind="categories")
    kind = "linear"
    if numbers[0] > 0 and (
        numbers[-1] > 10 * numbers[0] or all(math.log2(number).is_integer() for number in numbers)
    ):
        kind = "log"
    return Scale(
        positions={number: float(number) for number in numbers},
        labels={float(number): shown(number) for number in numbers},
        kind=kind,
    )


def put_scale(axes: Any, scale: Scale, axis: str = "x") -> None:
    """Put a scale's ticks on an axis: at the values where they have room, else at round numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

    line = axes.xaxis if axis == "x" else axes.yaxis
    places = list(scale.labels)
    stand = [math.log2(place) for place in places] if scale.kind == "log" else places
    width = (stand[-1] - stand[0]) or 1.0
    margin = 0.5 if scale.kind == "categories" else 0.06 * width
    ends = stand[0] - margin, stand[-1] + margin
    if scale.kind == "log":
        axes.set(**{f"{axis}scale": "log"})
        ends = 2 ** ends[0], 2 ** ends[1]
    axes.set(**{f"{axis}lim": ends})
    longest = max(map(len, scale.labels.values()))
    closest = min((b - a for a, b in itertools.pairwise(stand)), default=width) / width
    room = 60 if axis == "x" else 35  # letters, lines that an axis takes
    if scale.kind == "categories":  # side by side, each once as long as there is room for a line
        places = places[:: math.ceil(len(places) / (0.75 * room))]
    if scale.kind == "categories" or closest * room > (longest + 1 if axis == "x" else 1.2):
        line.set_major_locator(_fixed(places))
        line.set_major_formatter(FuncFormatter(lambda value, _: plain(_nearest(scale.labels, value))))
        if axis == "x" and closest * room <= longest + 1:
            axes.tick_params(axis, rotation=90, labelsize=8 if len(places) <= 20 else 6)
    else:
        if scale.kind == "log":
            narrow = width < math.log2(30)
            line.set_major_locator(LogLocator(10, subs=(1, 2, 5) if narrow else (1,), numticks=12))
        else:
            line.set_major_locator(MaxNLocator(7))
        line.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    line.set_minor_locator(NullLocator())
    line.set_minor_formatter(NullFormatter())


def _fixed(places: Sequence[float]) -> Any:
    from matplotlib.ticker import FixedLocator

    return FixedLocator(places)


def _nearest(labels: dict[float, str], value: float) -> str:
    return labels[min(labels, key=lambda place: abs(place - value))]


def limits(values: Sequence[float], margin: float = 0.04) -> tuple[float, float]:
    """Ends of an axis that shows values, but for those far above the others: diverged jobs."""
    low, high = min(values), max(values)
    if len(values) >= 4:
        middle = statistics.median(values)
        fence = middle + 5 * max(middle - low, 0.01 * abs(middle))
        high = max(value for value in values if value <= fence)
    space = margin * ((high - low) or abs(high) or 1.0)
    return low - space, high + space


def few_ticks(axes: Any) -> None:
    """At most seven ticks an axis, those across with k and M for large numbers."""
    from matplotlib.ticker import EngFormatter, MaxNLocator

    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.yaxis.set_major_locator(MaxNLocator(6))


def key_names(keys: Sequence[str]) -> dict[str, str]:
    """Key → its last part, where no other key ends so: data.max_length → max_length."""
    ends = [key.rpartition(".")[2] or key for key in keys]
    return {key: end if ends.count(end) == 1 else key for key, end in zip(keys, ends, strict=True)}


def shown(value: str | float) -> str:
    """A canonical value for people, numbers with four figures."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value) if value != "" else "''"


def order(value: str | float) -> tuple[int, float, Any]:
    """Numbers by size, then texts, with their numbers as numbers."""
    return (1, 0.0, natural(value)) if isinstance(value, str) else (0, value, [])


def short(text: str, letters: int) -> str:
    """A text on one line, without what a terminal or a font cannot show, its middle left out if long."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    if len(line) <= letters:
        return line
    tail = letters // 3
    return f"{line[: letters - tail - 1]}…{line[-tail:]}"


def plain(text: str) -> str:
    """A text that matplotlib takes as it is: no formula between dollars, no hidden label after _."""
    return text.replace("$", r"\$") if not text.startswith("_") else " " + text.replace("$", r"\$")


def spread(wanted: Sequence[float], gap: float, top: float) -> list[float]:
    """Ascending places at least `gap` apart, in [0, top] if they fit, near those wanted."""
    up, down = list(wanted), list(wanted)
    for i in range(1, len(up)):
        up[i] = max(up[i], up[i - 1] + gap)
    for i in reversed(range(len(down) - 1)):
        down[i] = min(down[i], down[i + 1] - gap)
    middle = [(a + b) / 2 for a, b in zip(up, down, strict=True)]  # as far apart as both are
    n = len(middle)
    middle = [min(place, top - (n - 1 - i) * gap) for i, place in enumerate(middle)]
    return [max(place, i * gap) for i, place in enumerate(middle)]
