"""The rows of a report: jobs that differ only in their seeds, with mean and 95 % interval, lowest first.

    read_sweep(folder).rows[0].score  ->  (2.312, 0.008)

The second number is half of the width of Student's t interval of the mean. It needs two seeds.
"""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np

from lit_gptdata.report.jobs import METRICS, SEEDS, STATUSES, Job, canonical, pad, read_job, read_yaml

JOB_FILES = {"result.json", "config.yaml"}  # only a config.yaml if a job was killed early


@dataclass(frozen=True, kw_only=True, eq=False)
class Row:
    """Jobs that differ only in their seeds."""

    jobs: Sequence[Job]
    metric: str
    """One of METRICS."""

    @property
    def name(self) -> str:
        return ", ".join(job.name for job in self.jobs)

    @property
    def status(self) -> str:
        """The best status of its jobs, one of STATUSES."""
        return min((job.status for job in self.jobs), key=[*STATUSES].index)

    def value(self, key: str) -> str | None:
        return self.jobs[0].value(key)

    @cached_property
    def seeds(self) -> Sequence[Job]:
        """The jobs with a finite metric, one per seed: repeating a seed adds no information."""
        done = {job.seed: job for job in reversed(self.jobs) if job.score(self.metric) < math.inf}
        return [*done.values()]

    def of(self, name: str) -> tuple[float | None, float]:
        """Return the mean and interval of a number over the seeds. A single job may have no result."""
        shown = self.seeds or (self.jobs if len(self.jobs) == 1 else [])
        numbers = [job.metrics[name] for job in shown if name in job.metrics]
        return mean_interval(numbers) if numbers else (None, math.nan)

    @cached_property
    def score(self) -> tuple[float, float]:
        """Mean and interval of the metric; infinity without a result."""
        mean, half = self.of(self.metric)
        return (mean, half) if self.seeds and mean is not None else (math.inf, math.nan)

    @cached_property
    def curve(self) -> list[tuple[float, float, float]]:
        """(tokens, mean, interval) wherever each seed, or else the first job, logged the metric."""
        curves = [dict(job.curves[self.metric]) for job in self.seeds or self.jobs[:1]]
        shared = set(curves[0]).intersection(*curves)
        return [(x, *mean_interval([curve[x] for curve in curves])) for x in sorted(shared)]


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

    @property
    def has_intervals(self) -> bool:
        """Whether any row has two seeds or more."""
        return any(len(row.seeds) > 1 for row in self.rows)

    @cached_property
    def others(self) -> list[Row]:
        """The rows that scored other validation text than the lowest one: they do not compare."""
        lowest = [row.seeds[0] for row in self.scored[:1]]
        return [r for r in self.scored if not all(same_text(job, lowest[0]) for job in r.seeds)]

    @cached_property
    def leaders(self) -> list[Row]:
        """The row with the lowest mean, and those whose intervals overlap its interval."""
        rows = [row for row in self.scored if row not in self.others]
        top = sum(rows[0].score) if rows else 0.0  # NaN for a single seed: then no row is tied with it
        tied = [row for row in rows[1:] if row.score[0] - (row.score[1] if row.seeds[1:] else 0) <= top]
        return rows[:1] + tied

    @property
    def verdict(self) -> str:
        """What is known of `leaders`: "best", "tied", "lowest" (not tested), "" (nothing to compare)."""
        if len(self.scored) < 2:
            return ""
        untested = self.others or any(len(row.seeds) < 2 for row in self.scored)
        return "tied" if len(self.leaders) > 1 else "lowest" if untested else "best"

    def mark(self, row: Row) -> str:
        """Return ★ for a row of `leaders`, ≠ for one of `others`."""
        return "★" if self.verdict and row in self.leaders else "≠" if row in self.others else ""

    def values(self, key: str) -> list[str | float]:
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
    if any(job.values.get("monitor", "null") != "null" for job in jobs):  # the user chose a val loss
        metrics = [metric for metric in metrics if metric != "val_bits_per_byte"]
    metric = next(iter(metrics), "val_bits_per_byte")
    recorded = [job.overrides for job in jobs if job.overrides is not None]
    keys = dict.fromkeys(key for overrides in recorded for key in overrides)
    values = {key: [v for job in jobs if (v := job.value(key)) is not None] for key in keys}
    varied = [key for key in keys if len(set(map(canonical, values[key]))) > 1]
    shared = [key for key in keys if key not in varied and all(key in given for given in recorded)]
    varied = [key for key in varied if key not in SEEDS]
    groups: dict[Any, list[Job]] = {}
    for job in jobs:  # one that does not say what it overrides is a row of its own
        setting = None if job.overrides is None else [canonical(job.value(key) or "") for key in varied]
        groups.setdefault(job.name if setting is None else tuple(setting), []).append(job)
    rows = [Row(jobs=found, metric=metric) for found in groups.values()]
    return Sweep(
        folder=folder,
        rows=sorted(rows, key=lambda row: ([*STATUSES].index(row.status), row.score[0])),
        metric=metric,
        keys=varied,
        common=[f"{key}={values[key][0]}" for key in shared],
        study=read_yaml(folder / "optimization_results.yaml"),
    )


def same_text(one: Job, other: Job) -> bool:
    """Whether two jobs scored the same text for validation, as far as they recorded it.

    1 % of the bytes may differ, because tokenizers cut a text at different bytes.
    """
    if not (one.val_text and other.val_text):
        return True
    if one.val_text.get("sha256") != other.val_text.get("sha256"):
        return False
    edges = one.val_text.get("bytes", []), other.val_text.get("bytes", [])
    n_bytes = sum(edges[0][1::2]) - sum(edges[0][::2])
    return bool(sum(abs(a - b) for a, b in zip(*edges, strict=True)) <= 0.01 * n_bytes)


def mean_interval(numbers: Sequence[float]) -> tuple[float, float]:
    """Return the mean and half of the width of its 95 % interval, which is NaN for one number."""
    n = len(numbers)
    mean = numbers[0] if len(set(numbers)) == 1 else math.fsum(numbers) / n
    if n == 1:
        return mean, math.nan
    variance = math.fsum((number - mean) * (number - mean) for number in numbers) / (n - 1)
    return mean, t_quantile(n - 1) * math.sqrt(variance / n)


@cache
def t_quantile(df: int) -> float:
    """Return t such that 95 % of Student's distribution with `df` degrees of freedom are in [-t, t]."""
    angles = np.linspace(0, np.pi / 2, 1 << 20)  # atan(t / √df) has the density cos(angle) ** (df - 1)
    density = np.cos(angles) ** (df - 1)
    inside = np.append(0, np.cumsum(density[1:] + density[:-1]))
    return float(np.sqrt(df) * np.tan(np.interp(0.95, inside / inside[-1], angles)))


def check_sweep(folder: Path) -> Path:
    """Return the folder of a sweep of Hydra; raises ValueError for another folder."""
    # Hydra's Optuna sweeper leaves a file only at the end.
    marks = ("multirun.yaml", "optimization_results.yaml", *(f"0/{name}" for name in JOB_FILES))
    if not any((folder / mark).exists() for mark in marks):
        raise ValueError(f"{folder} is not the folder of a sweep: give one that `train -m` made")
    return folder
