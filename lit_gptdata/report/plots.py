"""Draw the pictures of a sweep, with large letters for phones. pyplot would need a display."""

import io
import math
import re
import statistics
import warnings
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, NullLocator

from lit_gptdata.report.jobs import METRICS, Value, canonical, shorten
from lit_gptdata.report.rows import Sweep

# "$x$" in a value is text, not a formula.
STYLE: dict[Any, Any] = {"font.size": 8, "text.parse_math": False, "axes.grid": True, "grid.alpha": 0.25}

MAX_LINES = 10  # in the picture of one key; for more settings of the other keys it shows points
MAX_EVEN_NUMBERS = 12  # up to this many have equal distances on an axis, and room for their labels
# matplotlib's largest set of distinct colors, strong ones first. Other curves are gray.
TAB20 = matplotlib.color_sequences["tab20"]
COLORS = [*TAB20[::2], *TAB20[1::2]]


class Picture(NamedTuple):
    """A figure, and its PNG file."""

    name: str
    title: str
    figure: Figure
    png: bytes


def draw(sweep: Sweep) -> list[Picture]:
    """Draw every picture for which the jobs left data."""
    drawings: dict[str, tuple[str, Figure]] = {}
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*Glyph")  # a box replaces an unknown character
        if any(row.curve for row in sweep.rows):
            drawings["sweep-curves.png"] = _draw_curves(sweep)
        grid = all(_is_even(sweep.values(key)) for key in sweep.keys) and len(sweep.keys) == 2
        if grid and any(None not in map(row.value, sweep.keys) for row in sweep.scored):
            drawings["sweep-heatmap.png"] = _draw_heat_map(sweep)
        for key in sweep.keys if sweep.scored else ():
            drawings[file_name(key, drawings)] = _draw_key(sweep, key)
        pictures = []
        for name, (title, figure) in drawings.items():
            if sweep.others:
                figure.suptitle("≠ scored other text: do not compare", color="tab:red", fontsize=8)
            figure.savefig(buffer := io.BytesIO(), dpi=180)
            pictures.append(Picture(name, title, figure, buffer.getvalue()))
        return pictures


def _draw_curves(sweep: Sweep) -> tuple[str, Figure]:
    """Draw the metric over tokens, a curve and its interval per row, then the second half enlarged."""
    rows = [row for row in sweep.rows if row.curve]
    figure = Figure(layout="constrained")
    panels = figure.subplots(2, height_ratios=(2, 3))
    for i, row in enumerate(rows):
        tokens, means, halves = (np.array(column) for column in zip(*row.curve, strict=True))
        has_band = not math.isnan(halves[-1])
        settings = [_format(canonical(row.value(key) or "?")) for key in sweep.keys]
        name = shorten(" · ".join([shorten(row.name, 16), *settings]), 48)
        status, line = ("", "-") if row.status == "completed" else (f" ({row.status})", "--")
        half = f" ± {halves[-1]:.2g}" if has_band else ""
        label = f"{sweep.mark(row)} {name}{status} → {means[-1]:#.4g}{half}"  # matplotlib hides "_…"
        if i >= len(COLORS):
            label = "other jobs" if i == len(COLORS) else ""
        style: Any = {"color": COLORS[i] if i < len(COLORS) else "#bbb", "zorder": 3 - i / len(rows)}
        style |= {"lw": 2.2 if row in sweep.leaders else 1.2, "ls": line}
        style |= {"marker": "." if len(tokens) < 30 else ""}
        for axes in panels:
            axes.plot(tokens, means, label=label or None, **style)
            if has_band:
                low, high, color = means - halves, means + halves, style["color"]
                axes.fill_between(tokens, low, high, color=color, alpha=0.15, lw=0)
    for axes in panels:
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.set_ylabel(METRICS[sweep.metric])
    points = [point for row in rows for point in row.curve]
    end = max(tokens for tokens, *_ in points)
    limits = axis_limits([(mean, half) for tokens, mean, half in points if tokens >= end / 2])
    panels[0].set_title("from the first token")
    panels[1].set(title="the second half, enlarged", xlabel="tokens trained on", ylim=limits)
    panels[1].set_xlim(left=0.49 * end)
    _add_legend(figure, panels[0], 5.0, ["job", *sweep.keys])
    return "Learning curves", figure


def _draw_key(sweep: Sweep, key: str) -> tuple[str, Figure]:
    """Draw the metric over a key: a line per setting of the other keys, or a point per row."""
    figure = Figure(layout="constrained")
    axes = figure.subplots()
    positions = _place_values(axes, "x", sweep.values(key))
    low, high = axis_limits([row.score for row in sweep.scored], margin=0.08)
    others = [other for other in sweep.keys if other != key]
    settings = [tuple(canonical(row.value(other) or "?") for other in others) for row in sweep.rows]
    lines: dict[tuple[Value, ...], list[tuple[float, float, float]]] = {each: [] for each in settings}
    are_many = len(lines) > MAX_LINES
    has_room = not are_many and _is_even(sweep.values(key))
    shift = 0.04 if has_room and sweep.has_intervals else 0.0  # error bars are side by side
    outside: list[float] = []
    stars: list[tuple[float, float]] = []
    for row, setting in zip(sweep.rows, settings, strict=True):
        if (value := row.value(key)) is None:
            continue
        x = positions[canonical(value)] + shift * ([*lines].index(setting) - (len(lines) - 1) / 2)
        y, half = row.score
        if y <= high:
            lines[setting].append((x, y, half))
        elif row.status in ("completed", "failed"):
            outside.append(x)
        stars += [(x, y)] * (sweep.mark(row) == "★")
    if stars:
        name = f": job {shorten(sweep.leaders[0].name, 12)}" if len(sweep.leaders) == 1 else ""
        label = f"{sweep.verdict}{name}"
        axes.plot(*zip(*stars, strict=True), "k*", ms=13, mfc="none", zorder=5, label=label)

    style: Any = {"fmt": "o-", "ms": 4, "lw": 1.4, "capsize": 3}
    style |= {"fmt": "o", "color": "tab:blue", "alpha": 0.55} if are_many else {}
    for setting, points in lines.items():
        if not points:
            continue
        # a space, because matplotlib hides the label "_…"
        name = f" {' · '.join(map(_format, setting))}" if others and not are_many else ""
        xs, ys, halves = zip(*sorted(points), strict=True)
        axes.errorbar(xs, ys, halves, label=name or None, **style)
    if outside:
        top, label = [0.98] * len(outside), "failed, NaN or above the axis"
        axes.plot(outside, top, "rx", transform=axes.get_xaxis_transform(), label=label)
    axes.set(xlabel=shorten(key, 60), ylabel=METRICS[sweep.metric], ylim=(low, high))
    _add_legend(figure, axes, 3.4, [] if are_many else others)
    return f"Over {key}", figure


def _draw_heat_map(sweep: Sweep) -> tuple[str, Figure]:
    """Draw the metric as color over two keys, with a cell per pair of values."""
    across, down = sorted(sweep.keys, key=lambda key: len(sweep.values(key)))  # tall, not wide
    columns, rows = sweep.values(across), sweep.values(down)
    width, height = 0.55 * len(columns) + 2, 0.3 * len(rows) + 1.5  # inches
    figure = Figure(figsize=(min(7, max(5.2, width)), min(10, height)), layout="constrained")
    axes = figure.subplots()
    xs, ys = _place_values(axes, "x", columns), _place_values(axes, "y", rows)
    cells: dict[tuple[float, float], float] = {}
    stars = []
    for row in sweep.rows:  # the best row of a cell comes first; infinity: all of them failed
        x, y = row.value(across), row.value(down)
        if x is not None and y is not None and row.status in ("completed", "failed"):
            cell = xs[canonical(x)], ys[canonical(y)]
            cells.setdefault(cell, row.score[0])
            stars += [cell] * (sweep.mark(row) == "★")
    scores = [score for score in cells.values() if score < math.inf]
    low, high = min(scores), axis_limits([(score, 0.0) for score in scores], margin=0)[1]
    table = [[cells.get((x, y), math.nan) for x in xs.values()] for y in ys.values()]
    colors: Any = {"cmap": "viridis_r", "vmin": low, "vmax": max(high, low + 1e-9)}
    image = axes.imshow(table, aspect="auto", origin="lower", **colors)
    axes.set_facecolor("#e4e4e4")
    axes.grid(False)
    has_room = width <= 7 and height <= 10
    for cell, score in cells.items():
        text = "×" if score == math.inf else f"{score:#.4g}" if has_room else ""
        text = f"★ {text}".strip() if cell in stars else text
        color = "white" if (low + high) / 2 < score < math.inf else "black"
        axes.text(*cell, text, ha="center", va="center", color=color)
    axes.set(xlabel=shorten(across, 50), ylabel=shorten(down, 50))
    extend = "max" if max(scores) > high else "neither"
    figure.colorbar(image, label=METRICS[sweep.metric], extend=extend)
    return f"{across} × {down}", figure


def _place_values(axes: Axes, axis: str, values: Sequence[Value]) -> dict[Value, float]:
    """Scale and label an axis ("x" or "y") for sorted values; returns the position of each value."""
    ticks = axes.xaxis if axis == "x" else axes.yaxis
    if not _is_even(values):
        numbers = [value for value in values if not isinstance(value, str)]
        if numbers[-1] > 10 * numbers[0] > 0:
            axes.set(**{f"{axis}scale": "log"})
            is_short = numbers[-1] < 1e4 * numbers[0]
            ticks.set_major_locator(LogLocator(subs=(1, 3) if is_short else (1,)))
        ticks.set_major_formatter("{x:g}")
        ticks.set_minor_locator(NullLocator())
        return {number: number for number in numbers}
    step = math.ceil(len(values) / 30)  # 30 labels have room
    labels = [_format(value) for value in values[::step]]
    ticks.set_ticks(range(0, len(values), step), labels)
    n_letters = len(labels) * (2 + max(map(len, labels)))
    if axis == "x" and n_letters > 55:  # as many as fit into 5 inches
        ticks.set_tick_params(rotation=90, labelsize=8 if len(labels) <= 20 else 6)
    axes.set(**{f"{axis}lim": (-0.5, len(values) - 0.5)})
    return {value: i for i, value in enumerate(values)}


def _is_even(values: Sequence[Value]) -> bool:
    """Tell whether values have equal distances on an axis: texts, and numbers if they are few."""
    return len(values) <= MAX_EVEN_NUMBERS or any(isinstance(value, str) for value in values)


def axis_limits(scores: Sequence[tuple[float, float]], margin: float = 0.04) -> tuple[float, float]:
    """Return the ends of an axis for (mean, interval), without the highest means: those diverged."""
    means = [mean for mean, _ in scores]
    low, median = min(means), statistics.median(means)
    fence = median + 5 * max(median - low, 0.01 * abs(median))
    bars = [(mean, 0.0 if math.isnan(half) else half) for mean, half in scores if mean <= fence]
    low, high = min(mean - half for mean, half in bars), max(mean + half for mean, half in bars)
    space = margin * ((high - low) or abs(high) or 1.0)
    return low - space, high + space


def file_name(key: str, taken: Collection[str]) -> str:
    """Return a new file name for a key's picture: "data@x.y/z" → "sweep-data-x.y-z.png"."""
    stem = re.sub("[^A-Za-z0-9._]+", "-", key)[:80].strip("-.") or "key"
    used = {"sweep-curves.png", "sweep-heatmap.png", *map(str.lower, taken)}
    while f"sweep-{stem}.png".lower() in used:  # macOS takes A.png and a.png for the same file
        stem += "-2"
    return f"sweep-{stem}.png"


def _format(value: Value) -> str:
    """Format a value for a label; a fraction with four significant digits."""
    if isinstance(value, str):
        return shorten(value, 16) or "''"
    return f"{value:.10g}" if value == int(value) else f"{value:.4g}"


def _add_legend(figure: Figure, axes: Axes, height: float, title: Sequence[str]) -> None:
    """Add a legend below axes of a height in inches, and make the figure tall enough for both."""
    handles, labels = axes.get_legend_handles_labels()
    if any(labels):
        n_columns = max(1, min(3, 80 // (8 + max(map(len, labels)))))  # 80 letters fit into a line
        names = shorten(" · ".join(name.rpartition(".")[2] for name in title), 60)
        figure.legend(handles, labels, loc="outside lower center", ncols=n_columns, title=names or None)
        height += 0.17 * (math.ceil(len(labels) / n_columns) + bool(title)) + 0.1
    figure.set_size_inches(5.2, height + 0.3)
