"""The pictures of a sweep's report: learning curves, the metric over each key, a map of two keys.

Drawn without pyplot: no display, no state left behind. Pictures are small and their letters large,
since they are looked at on telephones too.
"""

from __future__ import annotations

import io
import itertools
import math
import re
import statistics
import warnings
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from lit_gptdata.report.axes import (
    Scale,
    few_ticks,
    key_names,
    limits,
    order,
    plain,
    put_scale,
    scale_of,
    short,
    shown,
    spread,
)
from lit_gptdata.report.jobs import METRICS, Job, Sweep, canonical

MADE_BY = "lit-gptdata report"
"""Stands in each PNG, so that a later report knows which files are its own."""

STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",  # comes with matplotlib
    "font.size": 9,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
}

RESERVED = ("sweep-curves.png", "sweep-heatmap.png")
"""Names that no key's picture gets."""

FEW = 10
"""Up to so many curves have a colour each that can be told from the others."""

MOST = 200
"""Learning curves in a picture; a file holds so many labels, and nobody reads more."""

LABEL_INCHES = 0.15
"""Height of a line of the labels beside curves."""

LABEL_LETTERS = 56
"""The longest label beside a curve."""


class Drawing(NamedTuple):
    """A figure of matplotlib, and what it shows, in words."""

    figure: Any
    title: str
    alt: str


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A drawing as a PNG file."""

    name: str
    title: str
    alt: str
    width: int
    """To be shown at, in CSS pixels; `png` has more, for sharp screens and paper."""
    png: bytes


Cell = tuple[str | float, str | float]
"""Values of the key down and of the key across."""


def is_lost(sweep: Sweep, job: Job) -> bool:
    """Whether a job ended without a figure: it failed, or diverged."""
    return job.status == "failed" or (job.status == "completed" and math.isnan(job.score(sweep.metric)))


def draw(sweep: Sweep) -> list[Picture]:
    """Every picture that a sweep's jobs allow: none without a curve or a result."""
    from matplotlib import rc_context

    with rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*Glyph")  # a box stands where the font has no sign
        drawings = {}
        if any(job.curves.get(sweep.metric) for job in sweep.jobs):
            drawings["sweep-curves.png"] = draw_curves(sweep)
        if sweep.scored:
            if len(sweep.keys) == 2 and any(
                None not in map(job.value, sweep.keys) for job in sweep.scored
            ):
                drawings["sweep-heatmap.png"] = draw_map(sweep)
            for key in sweep.keys:
                drawings[file_name(key, drawings)] = draw_key(sweep, key)
        return [_picture(name, drawing) for name, drawing in drawings.items()]


def file_name(key: str, taken: Collection[str]) -> str:
    """A PNG's name for a key, unlike those taken: "data@x.y/z"  ->  "sweep-data-x.y-z.png"."""
    stem = re.sub("[^A-Za-z0-9._]+", "-", key)[:80].strip("-.") or "key"
    lower = {name.lower() for name in taken}  # some file systems take a.png for A.png
    numbers = itertools.chain([""], (f"-{i}" for i in itertools.count(2)))
    names = (f"sweep-{stem}{number}.png" for number in numbers)
    return next(name for name in names if name.lower() not in {*lower, *RESERVED})


# ---- learning curves


def draw_curves(sweep: Sweep) -> Drawing:
    """The metric over tokens seen, a labelled curve a job; its later part once more, larger."""
    from matplotlib.figure import Figure

    known = [job for job in sweep.jobs if job.curves.get(sweep.metric)]
    jobs = known[:MOST]
    curves = {job.name: job.curves[sweep.metric] for job in jobs}
    end = max(curve[-1][0] for curve in curves.values())
    late = {name: [point for point in curve if point[0] >= end / 2] for name, curve in curves.items()}
    values = [value for curve in curves.values() for _, value in curve]
    low, high = limits([value for curve in late.values() for _, value in curve])
    two = max(map(len, late.values())) > 1 and max(values) - low > 3 * (high - low)
    labels = {job.name: _job_label(sweep, job) for job in jobs}
    # each curve is labelled where its end is seen, the later part if there is one
    seen = [[job for job in jobs if not late[job.name]], [job for job in jobs if late[job.name]]]
    labelled = seen if two else [jobs]

    heights = [
        max(least, (len(found) + 2) * LABEL_INCHES)
        for least, found in zip((2.0, 3.0) if two else (3.4,), labelled, strict=True)
    ]
    letters = max(map(len, [*labels.values(), _label_head(sweep)]))
    figure: Any = Figure(figsize=(4.3 + 0.062 * letters, sum(heights) + 0.9), layout="constrained")
    panels = figure.subplots(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    looks = _looks(sweep, jobs)
    for job in reversed(jobs):  # the best on top
        for axes in panels:
            tokens, scores = zip(*curves[job.name], strict=True)
            markers = {"marker": "."} if len(tokens) < 30 else {}
            axes.plot(tokens, scores, **looks[job.name], **markers)
    for axes in panels:
        few_ticks(axes)
        axes.set_ylabel(_metric_label(sweep), fontsize=8)
    if two:
        panels[0].set_title("from the first token", loc="left", fontsize=8)
        panels[1].set_title("the second half, larger", loc="left", fontsize=8)
        panels[1].set_xlim(end * 0.49, end * 1.01)
        panels[1].set_ylim(low, high)
    for axes, found in zip(panels, labelled, strict=True):
        if found:
            _label_ends(axes, sweep, found, curves, labels, looks)
    panels[-1].set_xlabel("tokens trained on")
    best = sweep.best
    told = f" Lowest at the end: job {best.name}, {best.metrics[sweep.metric]:.4g}." if best else ""
    return Drawing(
        figure,
        "Learning curves" + (f" of {MOST} of {len(known)} jobs, best first" if jobs != known else ""),
        f"{METRICS[sweep.metric].capitalize()} over tokens trained on, {len(jobs)} jobs.{told}",
    )


def _label_ends(
    axes: Any,
    sweep: Sweep,
    jobs: Sequence[Job],
    curves: dict[str, Any],
    labels: dict[str, str],
    looks: dict[str, dict[str, Any]],
) -> None:
    """Write each curve's label right of the axes, at the height of its end as far as there is room."""
    axes.figure.draw_without_rendering()  # sizes and limits are known from here on
    (low, high), height = axes.get_ylim(), axes.get_window_extent().height
    gap = LABEL_INCHES * axes.figure.dpi / height
    ends = sorted((curves[job.name][-1][1], job.name) for job in jobs)
    wanted = [min(1.0, max(0.0, (value - low) / (high - low))) for value, _ in ends]
    places = spread([*wanted, 1.0 + gap], gap, top=1.0 + gap)
    font: dict[str, Any] = {"fontsize": 7.5, "va": "center", "annotation_clip": False}
    for (value, name), place in zip(ends, places[:-1], strict=True):
        outside = f" ({value:.4g} ↑)" if value > high else f" ({value:.4g} ↓)" if value < low else ""
        colour = looks[name]["color"]
        axes.annotate(
            labels[name] + outside,
            (curves[name][-1][0], min(high, max(low, value))),
            (1.07, place),
            xycoords="data",
            textcoords="axes fraction",
            arrowprops={"arrowstyle": "-", "color": colour, "lw": 0.6, "alpha": 0.7, "relpos": (0, 0.5)},
            color=_darker(colour),
            weight="bold" if sweep.best is not None and name == sweep.best.name else "normal",
            **font,
        )
    axes.annotate(_label_head(sweep), (1.07, places[-1]), xycoords="axes fraction", color="#555", **font)


def _looks(sweep: Sweep, jobs: Sequence[Job]) -> dict[str, dict[str, Any]]:
    """A line's look for each job: colours of their own if they are few, else by a key's value."""
    import matplotlib

    best = sweep.best.name if sweep.best is not None else None
    by_key = [
        sorted({canonical(v) for j in jobs if (v := j.value(key)) is not None}, key=order)
        for key in sweep.keys
    ]
    # along the first key with few values, else by rank; dashes along the next with very few
    main = next((i for i, found in enumerate(by_key) if 2 < len(found) <= 12), None)
    dashes = next((i for i, found in enumerate(by_key) if i != main and len(found) <= 4), None)
    looks = {}
    for rank, job in enumerate(jobs):
        style = "-"
        if len(jobs) <= FEW:
            colour = matplotlib.colormaps["tab10"](rank)
        else:
            share = rank / (len(jobs) - 1)
            value = None if main is None else job.value(sweep.keys[main])
            if main is not None and value is not None:
                share = by_key[main].index(canonical(value)) / (len(by_key[main]) - 1)
            colour = matplotlib.colormaps["turbo"](0.05 + 0.9 * share)
            value = None if dashes is None else job.value(sweep.keys[dashes])
            if dashes is not None and value is not None:
                style = ("-", "--", ":", "-.")[by_key[dashes].index(canonical(value))]
        width = 2.2 if job.name == best else 1.1
        alpha = 0.9 if job.status == "completed" else 0.5
        looks[job.name] = {"color": colour, "linestyle": style, "linewidth": width, "alpha": alpha}
    return looks


def _job_label(sweep: Sweep, job: Job) -> str:
    """What a curve is called: its job's name, if it is short, and the values of the varied keys."""
    values = " · ".join(_value_label(job, key) for key in sweep.keys)
    name = short(job.name, 8 if values else 30)
    label = short(f"{name}: {values}" if values else name, LABEL_LETTERS)
    best = "★ " if sweep.best is not None and job.name == sweep.best.name else ""
    return plain(f"{best}{label}" + ("" if job.status == "completed" else f" ({job.status})"))


def _label_head(sweep: Sweep) -> str:
    names = " · ".join(key_names(sweep.keys).values())
    return plain(short(f"job: {names}" if names else "job", LABEL_LETTERS))


# ---- the metric over a key


def draw_key(sweep: Sweep, key: str) -> Drawing:
    """The metric over a key's values: a line for each setting of the others, or points if many."""
    from matplotlib.figure import Figure

    scale = scale_of([job.value(key) for job in sweep.jobs])
    others = [other for other in sweep.keys if other != key]
    low, high = limits([job.score(sweep.metric) for job in sweep.scored], margin=0.08)
    groups: dict[tuple[str | float, ...], list[Job]] = {}
    for job in sweep.scored:
        if job.value(key) is not None:
            groups.setdefault(tuple(canonical(job.value(k) or "?") for k in others), []).append(job)

    def point(job: Job) -> tuple[float, float]:
        return scale.positions[canonical(job.value(key) or "")], job.score(sweep.metric)

    curves = {
        " · ".join(_value_label(groups[group][0], other) for other in others): sorted(
            point(job) for job in groups[group] if job.score(sweep.metric) <= high
        )
        for group in sorted(groups, key=lambda group: [*map(order, group)])
    }
    n_lines = sum(len({x for x, _ in curve}) > 1 for curve in curves.values())
    lines = len(curves) <= FEW and 2 * n_lines >= len(curves)

    legend_rows = math.ceil((len(curves) + 2) / 3) if lines and others else 1
    figure: Any = Figure(figsize=(5.2, 3.4 + 0.17 * legend_rows), layout="constrained")
    axes = figure.subplots()
    handles = (
        _lines(axes, curves, ordered=len(others) == 1)
        if lines
        else _points(axes, [*itertools.chain(*curves.values())])
    )
    if not others:
        handles.clear()  # a single line is named by the axis
    best = sweep.best
    if best is not None and best.value(key) is not None:
        handles += axes.plot(
            *point(best), "*", ms=13, mfc="none", mec="black", mew=1.1, linestyle="none", zorder=5,
            label=f"best: job {short(best.name, 12)}",
        )  # fmt: skip
    lost = [
        scale.positions[canonical(value)]
        for job in sweep.jobs
        if is_lost(sweep, job) and (value := job.value(key)) is not None
    ]
    if lost:
        handles += axes.plot(
            lost, [1.0] * len(lost), "x", ms=6, color="#b3261e", clip_on=False, linestyle="none",
            transform=axes.get_xaxis_transform(), label="failed or NaN",
        )  # fmt: skip
    above = [at for jobs in groups.values() for at in map(point, jobs) if at[1] > high]
    axes.set_ylim(low, top := high + (0.06 * (high - low) if above else 0))
    for x, y in above:
        axes.annotate(
            f"{y:.3g} ↑", (x, top), (0, -6), textcoords="offset points", ha="center", va="top",
            fontsize=7, color="#555",
        )  # fmt: skip
    axes.set_xlabel(plain(short(key, 60)))
    axes.set_ylabel(_metric_label(sweep), fontsize=8)
    put_scale(axes, scale)
    if handles:
        title = plain(short(" · ".join(key_names(others).values()), 60)) if lines and others else None
        figure.legend(
            handles=handles, loc="outside lower center", fontsize=7.5, ncols=min(3, len(handles)),
            title=title, title_fontsize=7.5,
        )  # fmt: skip
    told = f" Best: {key}={best.value(key)}, {best.metrics[sweep.metric]:.4g}." if best else ""
    shown = "a line for each setting of the other keys" if lines and others else "a point a job"
    return Drawing(
        figure,
        f"Over {key}",
        f"{METRICS[sweep.metric].capitalize()} over {key}, {shown}, {len(sweep.scored)} jobs.{told}",
    )


def _lines(axes: Any, curves: dict[str, list[tuple[float, float]]], ordered: bool) -> list[Any]:
    """A line each, `ordered`: from dark to light; returns what stands for them in a legend."""
    import matplotlib

    fade = ordered and len(curves) > 3
    colours = matplotlib.colormaps["viridis" if fade else "tab10"]
    handles = []
    for i, (label, curve) in enumerate(curves.items()):
        colour = colours(0.9 * i / (len(curves) - 1)) if fade else colours(i)
        xs, ys = zip(*curve, strict=True) if curve else ((), ())
        handles += axes.plot(xs, ys, "o-", ms=4, lw=1.4, color=colour, label=plain(short(label, 30)))
    return handles


def _points(axes: Any, points: list[tuple[float, float]]) -> list[Any]:
    """A point each, and a line along the lowest where values repeat."""
    axes.plot(*zip(*points, strict=True), "o", ms=4.5, color="#3566a8", alpha=0.55, mec="none")
    lowest: dict[float, float] = {}
    for x, y in sorted(points):
        lowest[x] = min(y, lowest.get(x, y))
    if not 1 < len(lowest) <= len(points) / 2:
        return []
    xs, ys = zip(*lowest.items(), strict=True)
    return [*axes.plot(xs, ys, color="#3566a8", lw=1.2, label="best at each value")]


# ---- a map of two keys


def draw_map(sweep: Sweep) -> Drawing:
    """The metric by colour over two keys: a cell for each pair of values, or points if few are taken."""
    from matplotlib.figure import Figure

    scales = {key: scale_of([job.value(key) for job in sweep.jobs]) for key in sweep.keys}
    across, down = sorted(sweep.keys, key=lambda key: -len(scales[key].positions))
    n_across, n_down = (len(scales[key].positions) for key in (across, down))
    cells: dict[Cell, list[float]] = {}
    lost: set[Cell] = set()
    for job in sweep.jobs:
        x, y, score = job.value(across), job.value(down), job.score(sweep.metric)
        if x is None or y is None:
            continue
        if not math.isnan(score):
            cells.setdefault((canonical(y), canonical(x)), []).append(score)
        elif is_lost(sweep, job):
            lost.add((canonical(y), canonical(x)))
    scores = [score for found in cells.values() for score in found]
    low, high = min(scores), limits(scores, margin=0)[1]
    colours: dict[str, Any] = {"cmap": "viridis_r", "vmin": low, "vmax": max(high, low + 1e-9)}
    grid = 2 * len(cells) >= n_across * n_down or n_across * n_down <= 30

    size = (5.4, 4.2)
    if grid:
        size = (min(14.0, max(3.6, n_across * 0.6 + 1.6)), min(14.0, max(2.4, n_down * 0.45 + 1.4)))
    figure: Any = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    axes.grid(not grid)
    if grid:
        image = _cells(
            axes, cells, lost, scales[across], scales[down], colours, (size[0] - 1.6) / n_across * 72
        )
    else:
        points = [
            (scales[across].positions[x], scales[down].positions[y], score)
            for (y, x), found in cells.items()
            for score in found
        ]
        xs, ys, by = zip(*points, strict=True)
        image = axes.scatter(xs, ys, c=by, s=45, edgecolors="#444", linewidths=0.5, **colours)
        best = min(points, key=lambda point: point[2])
        axes.plot(*best[:2], "*", ms=15, mfc="none", mec="#b3261e", mew=1.3)
        put_scale(axes, scales[across])
        put_scale(axes, scales[down], "y")
    axes.set_xlabel(plain(short(across, 50)))
    axes.set_ylabel(plain(short(down, 50)))
    extend = "max" if max(scores) > high else "neither"
    bar = figure.colorbar(image, ax=axes, extend=extend, pad=0.02)
    bar.set_label(_metric_label(sweep), fontsize=8)
    bar.outline.set_visible(False)
    mean = ", mean of the jobs of a cell" if any(len(found) > 1 for found in cells.values()) else ""
    return Drawing(
        figure,
        f"{across} × {down}",
        f"{METRICS[sweep.metric].capitalize()} by colour{mean if grid else ''}, {across} across and "
        f"{down} down, {len(cells)} of {n_across * n_down} pairs of values; lowest {min(scores):.4g}.",
    )


def _cells(
    axes: Any,
    cells: dict[Cell, list[float]],
    lost: Collection[Cell],
    across: Scale,
    down: Scale,
    colours: dict[str, Any],
    width: float,
) -> Any:
    """Fill a grid, each cell, `width` points wide, with its figure; missing ones are grey, × if lost."""
    xs, ys = (sorted(scale.positions, key=order) for scale in (across, down))
    means = {cell: statistics.fmean(found) for cell, found in cells.items()}
    values = [[means.get((y, x), math.nan) for x in xs] for y in ys]
    axes.set_facecolor("#e4e4e4")
    image = axes.imshow(values, aspect="auto", origin="lower", **colours)
    best = min(means.values())
    letters = max(4, max(len(f"{mean:.3f}") for mean in means.values()))
    size = min(9.0, width * 0.9 / (0.64 * letters))
    if size >= 4.5:
        for row, y in enumerate(ys):
            for column, x in enumerate(xs):
                mean = means.get((y, x))
                told = f"{mean:.3f}" if mean is not None else "×" if (y, x) in lost else ""
                light = mean is None or (mean - colours["vmin"]) < 0.45 * (
                    colours["vmax"] - colours["vmin"]
                )
                axes.text(
                    column, row, told, ha="center", va="center", fontsize=size,
                    color="black" if light else "white", weight="bold" if mean == best else "normal",
                )  # fmt: skip
    row, column = next(
        (r, c) for r, y in enumerate(ys) for c, x in enumerate(xs) if means.get((y, x)) == best
    )
    axes.add_patch(_outline(column, row))
    for names, axis in ((xs, "x"), (ys, "y")):
        texts = [plain(short(shown(name), 16)) for name in names]
        every = math.ceil(len(texts) / 40)
        ticks = range(0, len(texts), every)
        turned = axis == "x" and max(map(len, texts)) * 5.2 > width
        axes.set(**{f"{axis}ticks": list(ticks)})
        axes.set(**{f"{axis}ticklabels": [texts[i] for i in ticks]})
        axes.tick_params(axis, length=0, labelsize=8 if len(texts) <= 20 else 6.5)
        if turned:
            axes.tick_params(axis, rotation=90)
    axes.spines[:].set_visible(False)
    return image


def _outline(column: int, row: int) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((column - 0.48, row - 0.48), 0.96, 0.96, fill=False, ec="#b3261e", lw=2)


def _picture(name: str, drawing: Drawing) -> Picture:
    figure, title, alt = drawing
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=180, metadata={"Software": MADE_BY})
    width = round(figure.get_size_inches()[0] * 104)
    return Picture(name=name, title=title, alt=alt, width=width, png=buffer.getvalue())


def _metric_label(sweep: Sweep) -> str:
    return METRICS[sweep.metric].replace(" (", "\n(")


def _value_label(job: Job, key: str) -> str:
    value = job.value(key)
    return "?" if value is None else short(shown(canonical(value)), 16)


def _darker(colour: tuple[float, float, float, float]) -> tuple[float, float, float]:
    """A colour dark enough for letters on white."""
    luminance = 0.3 * colour[0] + 0.59 * colour[1] + 0.11 * colour[2]
    factor = min(1.0, 0.4 / max(luminance, 1e-6))
    return colour[0] * factor, colour[1] * factor, colour[2] * factor
