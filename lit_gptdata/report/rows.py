"""The rows of a report: jobs that differ only in their seeds, with mean and 95 % interval, lowest first.

    read_sweep(folder).rows[0].mean, .interval  ->  2.312, 0.008

The interval is Student's t interval of the mean, so it needs two seeds.
"""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from lit_gptdata.report.jobs import (
    METRICS,
    SEEDS,
    STATUSES,
    Job,
    Value,
    canonical,
    pad,
    read_job,
    read_yaml,
)

JOB_FILES = {"result.json", "config.yaml"}  # only a config.yaml if a job was killed early


@dataclass(frozen=True, kw_only=True, eq=False)
class Row:
    """Jobs with the same settings, which scored the same validation text."""

    jobs: Sequence[Job]
    metric: str
    """One of METRICS."""

    @property
    def name(self) -> str:
        """The names of its jobs, "0, 2, 4" or "3–5"."""
        names = [job.name for job in self.jobs]
        is_run = len(names) > 2 and names[0].isdecimal()
        is_run = is_run and names == [str(int(names[0]) + i) for i in range(len(names))]
        return f"{names[0]}–{names[-1]}" if is_run else ", ".join(names)

    @cached_property
    def seeds(self) -> Sequence[Job]:
        """The jobs with a finite metric, one per seed: repeating a seed adds no information."""
        return [
            *{job.seed: job for job in reversed(self.jobs) if job.score(self.metric) < math.inf}.values()
        ]

    @property
    def shown(self) -> Sequence[Job]:
        """The jobs whose numbers the row shows: its seeds, or a single job without a result."""
        return self.seeds or (self.jobs if len(self.jobs) == 1 else [])

    @property
    def status(self) -> str:
        """The best status of its jobs, one of STATUSES."""
        return min((job.status for job in self.jobs), key=[*STATUSES].index)

    @property
    def mean(self) -> float:
        """Of the metric over the seeds; infinity without a result."""
        return self.of(self.metric)[0] if self.seeds else math.inf

    @property
    def interval(self) -> float | None:
        """Half of the width of the mean's 95 % interval; None with a single seed."""
        return self.of(self.metric)[1] if self.seeds else None

    def of(self, name: str) -> tuple[float | None, float | None]:
        """Return mean and interval of a metric or count; None if it is not known."""
        numbers = [job.metrics.get(name, job.counts.get(name)) for job in self.shown]
        return mean_interval([number for number in numbers if number is not None])

    def curve(self) -> list[tuple[float, float, float]]:
        """Return (tokens, mean, interval) where all seeds logged the metric; 0 for a single seed."""
        curves = [
            job.curves[self.metric] for job in self.seeds or self.jobs if job.curves.get(self.metric)
        ]
        curves = [dict(curve) for curve in (curves if self.seeds else curves[:1])]
        points = [(x, [curve.get(x) for curve in curves]) for x in (curves[0] if curves else ())]
        means = [(x, mean_interval(ys)) for x, ys in points if None not in ys]  # type: ignore[arg-type]
        return [(x, mean or 0.0, half or 0.0) for x, (mean, half) in means]

    def overlaps(self, other: "Row") -> bool:
        """Whether the 95 % intervals overlap; False if this row has none. Another's may be a point."""
        half = -math.inf if self.interval is None else self.interval
        return abs(self.mean - other.mean) <= half + (other.interval or 0)

    def value(self, key: str) -> str | None:
        return self.jobs[0].value(key)


@dataclass(frozen=True, kw_only=True, eq=False)
class Sweep:
    """The jobs in a folder, and how to compare them."""

    folder: Path
    rows: Sequence[Row]
    """Those with a result by the mean of `metric`, lowest first, then the others by status."""
    metric: str
    """One of METRICS; lower is better."""
    keys: Sequence[str]
    """Overridden keys whose values differ between rows, in the order in which they were given."""
    common: Sequence[str]
    """Overrides that all jobs share, such as "model=nano"."""
    study: Mapping[str, Any]
    """What Hydra's Optuna sweeper wrote about its study, earlier sweeps included; {} without one."""

    @property
    def jobs(self) -> list[Job]:
        return [job for row in self.rows for job in row.jobs]

    @property
    def scored(self) -> list[Row]:
        """The rows with a result, lowest first."""
        return [row for row in self.rows if row.seeds]

    @cached_property
    def leaders(self) -> list[Row]:
        """The row with the lowest mean, and those that are tied with it: their intervals overlap."""
        lowest, others = self.scored[:1], self.scored[1:]
        tied = [row for row in others if lowest[0].overlaps(row) and row not in self.others]
        return lowest + tied

    @cached_property
    def others(self) -> list[Row]:
        """The rows that scored other validation text than the lowest one: they do not compare."""
        return [row for row in self.scored if not same_text(row.seeds[0], self.scored[0].seeds[0])]

    @property
    def verdict(self) -> str:
        """What is known of `leaders`: "best", "tied", "lowest" (not tested), "" (nothing to compare)."""
        if len(self.scored) < 2:
            return ""
        if len(self.leaders) > 1:
            return "tied"
        return "lowest" if self.others or None in [row.interval for row in self.scored] else "best"

    def mark(self, row: Row) -> str:
        """Return ★ for a row of `leaders`, ≠ for one of `others`."""
        return "★" if self.verdict and row in self.leaders else "≠" if row in self.others else ""

    def values(self, key: str) -> list[Value]:
        """Return the distinct known values of a key: numbers by size, then texts."""
        values = {canonical(value) for row in self.rows if (value := row.value(key)) is not None}
        return sorted(values, key=lambda v: (1, 0, pad(v)) if isinstance(v, str) else (0, v, ""))

    def count(self, status: str) -> int:
        return sum(job.status == status for job in self.jobs)


def read_sweep(folder: Path) -> Sweep:
    """Read all jobs under a sweep's folder; raises ValueError if there are none."""
    folders = []
    for root, subfolders, files in os.walk(folder):
        is_job = root != str(folder) and not JOB_FILES.isdisjoint(files)
        folders += [Path(root)] if is_job else []
        subfolders[:] = [] if is_job else [name for name in subfolders if not name.startswith(".")]
    if not folders:
        raise ValueError(f"{folder} contains no jobs: wait until a job of the sweep has started")
    jobs = [read_job(path, path.relative_to(folder).as_posix()) for path in sorted(folders, key=pad)]
    metrics = [metric for metric in METRICS if any(job.score(metric) < math.inf for job in jobs)]
    metrics += [metric for metric in METRICS if any(metric in job.metrics for job in jobs)]
    metric = next(iter(metrics), "val_bits_per_byte")
    recorded = [job.overrides for job in jobs if job.overrides is not None]
    keys = dict.fromkeys(key for overrides in recorded for key in overrides)
    values = {key: [v for job in jobs if (v := job.value(key)) is not None] for key in keys}
    varied = [key for key in keys if len(set(map(canonical, values[key]))) > 1]
    shared = [key for key in keys if key not in varied and all(key in given for given in recorded)]
    varied = [key for key in varied if key not in SEEDS]
    rows = [Row(jobs=found, metric=metric) for found in group(jobs, varied)]
    return Sweep(
        folder=folder,
        rows=sorted(rows, key=lambda row: ([*STATUSES].index(row.status), row.mean)),
        metric=metric,
        keys=varied,
        common=[f"{key}={values[key][0]}" for key in shared],
        study=read_yaml(folder / "optimization_results.yaml"),
    )


def group(jobs: Sequence[Job], keys: Sequence[str]) -> list[list[Job]]:
    """Group jobs with the same values of `keys` and the same validation text."""
    groups: dict[tuple[Any, ...], list[Job]] = {}
    for job in sorted(jobs, key=lambda job: job.status != "completed"):
        values = [job.value(key) for key in keys]
        known = job.overrides is not None and None not in values
        setting = tuple(canonical(value or "") for value in values) if known else (job.name, None)
        number = 0
        while (setting, number) in groups and not same_text(groups[setting, number][0], job):
            number += 1
        groups.setdefault((setting, number), []).append(job)
    return [sorted(found, key=lambda job: pad(job.name)) for found in groups.values()]


def same_text(one: Job, other: Job) -> bool:
    """Whether two jobs scored the same text for validation, as far as they completed and recorded it.

    1 % of the bytes may differ, because tokenizers cut a text at different bytes.
    """
    if not one.status == other.status == "completed":
        return True
    texts = one.val_text, other.val_text
    if one.val_sources != other.val_sources or not all(texts):
        return one.val_sources == other.val_sources
    if any(texts[0][name]["sha256"] != texts[1].get(name, {}).get("sha256") for name in texts[0]):
        return False
    edges = [[edge for name in texts[0] for edge in text[name]["bytes"]] for text in texts]
    n_bytes = sum(edges[0][1::2]) - sum(edges[0][::2])
    return sum(abs(a - b) for a, b in zip(*edges, strict=True)) <= 0.01 * n_bytes


def mean_interval(numbers: Sequence[float]) -> tuple[float | None, float | None]:
    """Return the mean and half of the width of its 95 % interval; None for too few numbers."""
    n = len(numbers)
    if n < 2:
        return (numbers[0] if numbers else None), None
    mean = numbers[0] if len(set(numbers)) == 1 else math.fsum(numbers) / n
    variance = math.fsum((number - mean) * (number - mean) for number in numbers) / (n - 1)
    return mean, t_quantile(n - 1) * math.sqrt(variance / n)


def t_quantile(df: int) -> float:
    """Return t such that 95 % of Student's distribution with `df` degrees of freedom are in [-t, t].

    Bisects the sums in Abramowitz and Stegun, Handbook of Mathematical Functions, 26.7.3 and 26.7.4.
    """
    low, high = 0.0, math.pi / 2  # of atan(t / √df)
    for _ in range(60):
        angle = (low + high) / 2
        total, term = 0.0, math.cos(angle) ** (df % 2)
        for power in range(df % 2, df - 1, 2):
            total += term
            term *= math.cos(angle) ** 2 * (power + 1) / (power + 2)
        inside = math.sin(angle) * total
        inside = (inside + angle) * 2 / math.pi if df % 2 else inside
        low, high = (angle, high) if inside < 0.95 else (low, angle)
    return math.sqrt(df) * math.tan(low)


def is_sweep(folder: Path) -> bool:
    """Whether Hydra ran a sweep in a folder. Its Optuna sweeper leaves a file only at the end."""
    marks = ("multirun.yaml", "optimization_results.yaml", *(f"0/{name}" for name in JOB_FILES))
    return any((folder / mark).exists() for mark in marks)


def check_sweep(folder: Path) -> Path:
    """Return the folder of a sweep; raises ValueError for another folder, with what to give instead."""
    if not folder.is_dir():
        problem = "is not a folder: give a sweep's folder, such as multirun/2026-11-22/10-00-00"
    elif is_sweep(folder):
        return folder
    elif is_sweep(parent := folder.resolve().parent):
        problem = f"is the folder of a single job: give its sweep's folder, {parent}"
    elif any((folder / name).exists() for name in JOB_FILES):
        problem = "is a single run: see its summary.txt, or give the folder of a sweep, under multirun/"
    elif sweeps := sorted(filter(is_sweep, folder.iterdir())):
        problem = f"contains {len(sweeps)} sweeps: give one of them, such as {sweeps[-1]}"
    else:
        problem = "is not the folder of a sweep: give a folder under multirun/ that `train.py -m` made"
    raise ValueError(f"{folder} {problem}")
