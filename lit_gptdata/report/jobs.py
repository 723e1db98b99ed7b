"""Read what the jobs of a sweep wrote into their folders.

A job may still be running, and a killed job may leave half of a metrics.csv. What cannot be read is
missing in the report, and the job remains a row of the table.
"""

import csv
import json
import math
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from lit_gptdata.configs import SPLITS, find_loss

# Metric → its name in the report. Jobs are compared by the first metric that any of them has.
METRICS = {
    "val_bits_per_byte": "validation bits per byte",
    "val_loss": "validation loss (nats per token)",
    "train_loss": "training loss (nats per token)",
}
SEEDS = ("seed", "data.seed")  # keys that make no other setting, only another sample of it
COUNTS = ("tokens", "steps", "seconds", "parameters")  # other numbers of a job, next to its metrics
# Status → why a job has no result, unless the job says more.
STATUSES = {
    "completed": "",
    "failed": "failed without an error message",
    "stopped": "stopped by Ctrl-C or by a signal",
    "unfinished": "did not end: it was killed, or it is still running",
}
Value = str | float  # of a config key, in the form in which values are compared


@dataclass(frozen=True, kw_only=True)
class Job:
    """One job of a sweep, as its folder describes it."""

    name: str
    """Path of its folder relative to the sweep's folder, such as "3"."""
    status: str
    """One of STATUSES."""
    error: str
    """Why the job has no result; may have several lines."""
    overrides: Mapping[str, str] | None
    """Key → value as text. None if result.json does not say."""
    values: Mapping[str, str]
    """Key → value as text: the resolved config, as far as config.yaml is readable, and the overrides."""
    metrics: Mapping[str, float]
    """COUNTS and final metrics. If the job did not complete: the last values that it logged."""
    seed: str
    """Of the weights; "3/5" if the windows have another one. "" if unknown."""
    val_text: Mapping[str, Any]
    """What its val_loss covers: a hash of the texts, and ranges of their bytes; {} if unknown."""
    curves: Mapping[str, Sequence[tuple[float, float]]]
    """For each of METRICS: (tokens trained on, finite value), ordered by tokens."""

    def value(self, key: str) -> str | None:
        """Return the value of a key as text; "default" if the job did not record it, None if unknown."""
        return self.values.get(key, None if self.overrides is None else "default")

    def score(self, metric: str) -> float:
        """Return a metric of a completed job, or infinity if the job cannot be compared with others."""
        value = _number(self.metrics.get(metric)) if self.status == "completed" else None
        return math.inf if value is None else float(value)


def read_job(folder: Path, name: str) -> Job:
    """Read one job from its folder. `Job.error` says why result.json cannot be read."""
    result: dict[str, Any] = {}
    problem = ""
    try:
        result = dict(json.loads((folder / "result.json").read_bytes()))
    except FileNotFoundError:
        problem = "no result.json: the job was killed at its start, or train.py did not run it"
    except (OSError, ValueError, TypeError) as error:
        problem = f"cannot read result.json: {error}"
    status = result.get("status")
    status = status if status in STATUSES else "unfinished"  # "running" while a job runs
    given = result.get("overrides")
    overrides = None if given is None else _parse_overrides(given)
    config = _flatten(read_yaml(folder / "config.yaml"))
    monitor = config.get("monitor", "null")
    curves = read_curves(folder / "metrics.csv", None if monitor == "null" else monitor)
    values = config | {k: config.get(k, v) if "${" in v else v for k, v in (overrides or {}).items()}
    metrics = {}
    for metric, curve in curves.items():
        if curve and status != "completed":  # the last values that it logged
            tokens, metrics[metric] = curve[-1]
            metrics["tokens"] = max(int(tokens), metrics.get("tokens", 0))
    for metric, value in result.get("metrics", {}).items():
        # JSON has no NaN or infinity, so they are strings
        metrics[metric] = float(value) if isinstance(value, str) else value
    return Job(
        name=name,
        status=status,
        error=(result.get("error") or "").strip() or problem or STATUSES[status],
        overrides=overrides,
        values=values,
        metrics=metrics | {k: n for k in COUNTS if (n := _number(result.get(k))) is not None},
        seed=_seed(result, values),
        val_text=result.get("val_text", {}),
        curves=curves,
    )


def read_columns(metrics_csv: Path) -> dict[str, dict[float, float]]:
    """Column of Lightning's metrics.csv → {tokens trained on: value}, which may be NaN or infinite."""
    text = metrics_csv.read_text(encoding="utf-8", errors="replace") if metrics_csv.exists() else ""
    lines = text[: text.rfind("\n") + 1].splitlines()  # an unfinished last line may end in half a number
    reader = csv.DictReader(line.replace("\0", "") for line in lines)
    columns: dict[str, dict[float, float]] = {name: {} for name in reader.fieldnames or []}
    for row in reader:
        for name, column in columns.items():
            with suppress(KeyError, TypeError, ValueError):  # a row has only some of the columns
                column[float(row["tokens"])] = float(row[name])
    return columns


def read_curves(metrics_csv: Path, monitor: str | None = None) -> dict[str, list[tuple[float, float]]]:
    """Read the points (tokens, finite value) of each of METRICS.

    `monitor` is the column of the val loss; None: see `find_loss`.
    """
    columns = read_columns(metrics_csv)
    losses = {f"{split}_loss": find_loss(columns, split, monitor) for split in SPLITS}
    curves = {metric: columns.get(losses.get(metric) or metric, {}) for metric in METRICS}
    return {
        metric: sorted(point for point in curve.items() if None not in map(_number, point))
        for metric, curve in curves.items()
    }


def canonical(value: str) -> Value:
    """Return what values are compared by: "1e-3" and "0.001" → 0.001, "True" → "true"."""
    if (number := _number(value)) is not None:
        return number
    return value.lower() if value.lower() in ("true", "false", "null") else value


def _seed(result: Mapping[str, Any], values: Mapping[str, str]) -> str:
    """Return the seeds that a job recorded, or those of its config: "3", "3/5" or ""."""
    recorded = zip((result.get("global_seed"), result.get("seed")), SEEDS, strict=True)
    weights, order = (values.get(key, "") if seed is None else str(seed) for seed, key in recorded)
    return weights if order in (weights, "") else f"{weights}/{order}"


def pad(text: object) -> str:
    """Pad numbers in a text with zeros to sort by it: "job 2" comes before "job 10"."""
    return re.sub("[0-9]+", lambda match: match[0].zfill(20), str(text))


def shorten(text: str, max_length: int) -> str:
    """Put a text on one line, without control characters, and cut a long one in the middle."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    n_tail = max_length // 2  # the end of an error says what happened
    return line if len(line) <= max_length else f"{line[: max_length - n_tail - 1]}…{line[-n_tail:]}"


def _parse_overrides(overrides: Sequence[str]) -> dict[str, str]:
    """Parse Hydra's overrides: ["+a=1", "b='x,y'", "~c"] → {"a": "1", "b": "x,y", "c": "removed"}."""
    values = {}
    for override in overrides:
        key, equals, value = override.partition("=")
        if len(value) > 1 and value[0] == value[-1] and value[0] in "'\"":
            value = value[1:-1]
        values[key.lstrip("+~")] = value if equals and not key.startswith("~") else "removed"
    return values


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file as OmegaConf does ("1e-3" is a number); {} if that fails."""
    content: Any = {}
    with suppress(Exception):  # whatever cannot be read: the job's results are still valid
        content = OmegaConf.to_container(OmegaConf.load(path))
    return content if isinstance(content, dict) else {}


def _flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Flatten a config: {"a": {"b": 8, "c": ["x", "y"]}} → {"a.b": "8", "a.c": "[x,y]"}."""
    values: dict[str, str] = {}
    for key, value in config.items():
        if isinstance(value, dict):
            values |= _flatten(value, f"{prefix}{key}.")
        else:  # JSON without quotes: null, true, [a,b]
            text = json.dumps(value, separators=(",", ":"), ensure_ascii=False, default=str)
            values[f"{prefix}{key}"] = value if isinstance(value, str) else text.replace('"', "")
    return values


def _number(value: Any) -> float | None:
    """Return a number from JSON, CSV or an override; None for NaN, infinity and other values."""
    with suppress(TypeError, ValueError, OverflowError):
        if abs(number := float(value)) < 1e100:  # larger numbers overflow in a sum
            return value if isinstance(value, int) else number
    return None
