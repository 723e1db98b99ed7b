"""What the jobs of a sweep left in their folders, in the order of a report: best first.

Nothing here trusts a file to be whole: a job may have been killed at any instant, or run still.
"""

from __future__ import annotations

import csv
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

METRICS = {
    "val_bits_per_byte": "validation bits per byte",
    "val_loss": "validation loss (nats a token)",
    "train_loss": "training loss (nats a token)",
}
"""What jobs are compared by, the lower the better: the first of these that any of them has."""

STATUSES = ("completed", "failed", "stopped", "unfinished")

DEFAULT = "default"
"""Value of a key that a job does not override, where its config does not tell (a group: model=nano)."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """A job of a sweep, by what it left in its folder."""

    name: str
    """Its folder, from the sweep's folder on: "3"."""
    status: str
    """One of STATUSES."""
    error: str = ""
    """Why it has no result, in one or several lines."""
    overrides: Mapping[str, str] | None = None
    """Key → value, as text; None: not known."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """The resolved config; {}: not known."""
    tokens: float | None = None
    """Trained on, over all ranks; of a job that has not completed, as far as metrics.csv tells."""
    steps: float | None = None
    seconds: float | None = None
    parameters: float | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    """At its end; of a job that has not completed, the last of METRICS in metrics.csv."""
    curves: Mapping[str, Sequence[tuple[float, float]]] = field(default_factory=dict)
    """Each of METRICS → (tokens seen, finite value), by tokens."""

    def value(self, key: str) -> str | None:
        """What a key is for this job, as text; None: not known."""
        if self.overrides is not None and key in self.overrides:
            return self.overrides[key]
        node: Any = self.config
        for part in key.split("."):
            node = node.get(part, MISSING) if isinstance(node, dict) else MISSING
        if isinstance(node, list) and not any(isinstance(item, dict | list) for item in node):
            return f"[{','.join(map(_text, node))}]"
        if node is not MISSING and not isinstance(node, dict | list):
            return _text(node)
        return None if self.overrides is None else DEFAULT

    def score(self, metric: str) -> float:
        """A metric of a job that has completed; NaN: nothing to compare with others."""
        value = self.metrics.get(metric, math.nan) if self.status == "completed" else math.nan
        return value if usable(value) else math.nan


MISSING = object()


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """The jobs of a folder, and what they are compared by."""

    folder: Path
    jobs: Sequence[Job]
    """Completed ones by `metric`, lowest first, then the others."""
    metric: str
    """One of METRICS."""
    keys: Sequence[str]
    """Overrides that differ between jobs, in the order in which they were given."""
    common: Sequence[str]
    """Overrides that all jobs share: "model=nano"."""
    study: str = ""
    """Optuna's best, in earlier sweeps too: "4.1234 with stem.embedding_dim=64"; "": no study."""

    @property
    def best(self) -> Job | None:
        """The completed job with the lowest metric."""
        scored = self.scored
        return scored[0] if scored else None

    @property
    def scored(self) -> list[Job]:
        """The jobs that can be compared, best first."""
        return [job for job in self.jobs if not math.isnan(job.score(self.metric))]

    def count(self, status: str) -> int:
        """How many jobs ended so."""
        return sum(job.status == status for job in self.jobs)


def read_sweep(folder: Path) -> Sweep:
    """The jobs under a sweep's folder, as far as they are; raises ValueError where there are none."""
    jobs = read_jobs(folder)
    if not jobs:
        raise ValueError(_no_jobs(folder))
    metric = _metric([job for job in jobs if job.status == "completed"]) or _metric(jobs)
    metric = metric or next(iter(METRICS))
    given = dict.fromkeys(key for job in jobs for key in job.overrides or ())
    known = {key: [value for job in jobs if (value := job.value(key)) is not None] for key in given}
    keys = [key for key in given if len({canonical(value) for value in known[key]}) > 1]
    shared = [job.overrides for job in jobs if job.overrides is not None]
    common = [
        f"{key}={known[key][0]}"
        for key in given
        if key not in keys and all(key in overrides for overrides in shared)
    ]

    def rank(job: Job) -> tuple[int, float]:
        score = job.score(metric)
        scored = not math.isnan(score)
        return (0 if scored else 1 + STATUSES.index(job.status), score if scored else 0.0)

    return Sweep(
        folder=folder,
        jobs=sorted(jobs, key=rank),
        metric=metric,
        keys=keys,
        common=common,
        study=_read_study(folder / "optimization_results.yaml"),
    )


def read_jobs(folder: Path) -> list[Job]:
    """Every folder below `folder` with a result.json or, of a job killed early, a config.yaml.

    By name, numbers as numbers: 2 before 10.
    """
    found = []
    for root, folders, files in os.walk(folder):
        is_job = root != str(folder) and not {"result.json", "config.yaml"}.isdisjoint(files)
        if is_job:
            found.append(Path(root))
        folders[:] = [] if is_job else [name for name in folders if not name.startswith(".")]
    return [read_job(path, path.relative_to(folder).as_posix()) for path in sorted(found, key=natural)]


def read_job(folder: Path, name: str) -> Job:
    """A job from its folder; what is not there, or cannot be read, is said in `error`."""
    curves = read_curves(folder / "metrics.csv")
    config = _read_config(folder / "config.yaml")
    result: Any = None
    try:
        result = json.loads((folder / "result.json").read_bytes())
        problem = "" if isinstance(result, dict) else "result.json holds no JSON object"
    except FileNotFoundError:
        problem = "no result.json: it was killed as it began, or was not run by train.py"
    except (OSError, ValueError, RecursionError) as error:
        problem = f"result.json cannot be read: {error}"
    if not isinstance(result, dict):
        result = {}
    status, told = result.get("status"), result.get("error")
    if status not in ("completed", "failed", "stopped"):
        status = "unfinished"
    metrics, overrides = result.get("metrics"), result.get("overrides")
    tokens = _number(result.get("tokens"))
    last = {}
    if status != "completed":
        last = {metric: curve[-1][1] for metric, curve in curves.items() if curve}
        ends = [int(curve[-1][0]) for curve in curves.values() if curve]
        tokens = max(ends, default=None) if tokens is None else tokens
    return Job(
        name=_clean(name),
        status=status,
        error=problem if told is None else _clean(str(told)),
        overrides=_overrides(overrides) if isinstance(overrides, list) else None,
        config=config,
        tokens=tokens,
        steps=_number(result.get("steps")),
        seconds=_number(result.get("seconds")),
        parameters=_number(result.get("parameters")),
        metrics=last
        | {
            _clean(key): number
            for key, value in (metrics.items() if isinstance(metrics, dict) else ())
            if (number := _number(value)) is not None
        },
        curves=curves,
    )


def read_curves(metrics_csv: Path) -> dict[str, list[tuple[float, float]]]:
    """Each of METRICS over tokens seen, from Lightning's metrics.csv; a cut last line is left out."""
    try:
        text = metrics_csv.read_text(encoding="utf-8", errors="replace").replace("\0", "")
    except OSError:
        text = ""
    lines = text[: text.rfind("\n") + 1].splitlines()  # half a number looks like a number
    points: dict[str, dict[float, float]] = {metric: {} for metric in METRICS}
    for row in csv.DictReader(line for line in lines if len(line) < 10_000):  # no line of Lightning's
        tokens = _number(row.get("tokens"))
        if not usable(tokens):
            continue
        for metric, curve in points.items():
            value = _number(row.get(metric))
            if usable(value):
                curve[tokens] = value
    return {metric: sorted(curve.items()) for metric, curve in points.items()}


def usable(number: float | None) -> TypeGuard[float]:
    """Whether a number can be compared and drawn: it is neither NaN nor so large that sums overflow."""
    return number is not None and abs(number) < 1e100


def canonical(value: str) -> str | float:
    """What values are compared by: a number, or a text; "1e-3" is 0.001, "True" is "true"."""
    number = _number(value)
    if usable(number):
        return number
    return value.lower() if value.lower() in ("true", "false", "null") else value


def natural(text: object) -> list[tuple[int, int, str]]:
    """A key to sort by, numbers as numbers: "2" before "10"."""
    parts = re.split("([0-9]{1,18})", str(text))
    return [(0, int(part), "") if part.isascii() and part.isdigit() else (1, 0, part) for part in parts]


def _metric(jobs: Sequence[Job]) -> str:
    """The first of METRICS of which any of the jobs has a value; "": none has."""
    found = (m for m in METRICS if any(usable(job.metrics.get(m)) for job in jobs))
    return next(found, "")


def _overrides(words: Sequence[Any]) -> dict[str, str]:
    """Key → value of Hydra's overrides: ["+a=1", "b='x,y'", "~c"]  ->  {a: 1, b: x,y, c: removed}."""
    found = {}
    for word in map(str, words):
        key, equals, value = _clean(word).partition("=")
        if len(value) > 1 and value[0] == value[-1] and value[0] in "'\"":
            value = value[1:-1]
        removed = key.startswith("~") or not equals
        found[key.lstrip("+~")] = "removed" if removed else value
    return found


def _read_study(path: Path) -> str:
    """The best trial that Hydra's sweeper notes at a study's end; "" where there is none."""
    found = _read_config(path)
    value, params = _number(found.get("best_value")), found.get("best_params")
    if not usable(value) or not isinstance(params, dict):
        return ""
    return f"{value:.4f} with " + ", ".join(f"{key}={_text(param)}" for key, param in params.items())


def _read_config(path: Path) -> dict[str, Any]:
    """A resolved config as plain values; {} where there is none that can be read."""
    from omegaconf import OmegaConf

    try:
        config = OmegaConf.to_container(OmegaConf.load(path))
    except Exception:  # of the file, of YAML, of OmegaConf: the job stays a row, its figures stand
        return {}
    return {str(key): value for key, value in config.items()} if isinstance(config, dict) else {}


def _text(value: Any) -> str:
    """A config's value as one would write it in an override."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    return _clean(str(value))


def _number(value: Any) -> float | None:
    """A number from JSON, CSV or an override; None where it is none. Integers stay integers."""
    if isinstance(value, str):
        try:
            value = int(value)
        except ValueError:
            try:
                value = float(value)
            except ValueError:
                return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return value if abs(value) < 2**63 or isinstance(value, float) else None


def _clean(text: str) -> str:
    """Without the lone surrogates that JSON and file names can hold, and that no file can."""
    return text.encode("utf-8", "replace").decode()


def _no_jobs(folder: Path) -> str:
    if not folder.is_dir():
        return (
            f"there is no folder {folder}: give a sweep's folder, such as multirun/2026-11-22/10-00-00"
        )
    if (folder / "result.json").exists() or (folder / "config.yaml").exists():
        return (
            f"{folder} is the folder of one job: give the folder of its sweep, {folder.resolve().parent}"
        )
    return (
        f"{folder} holds no job of a sweep, a folder with a result.json or a config.yaml: "
        "`python train.py -m data.max_length=32,64` makes such folders under multirun/"
    )
