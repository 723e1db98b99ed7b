"""The files of a report: sweep.csv, sweep.html and PNGs, from whatever a sweep's jobs have left so far.

<sweep>/0/, 1/, … : result.json, metrics.csv, config.yaml
    jobs.py    → Sweep: the jobs, best first, and what differs between them
    plots.py   → learning curves, the metric over each key, a map of two
    page.py    → the page that holds them
    this file  → <sweep>/sweep.csv, sweep.html, sweep-*.png
"""

from __future__ import annotations

import csv
import io
from pathlib import Path

from lit_gptdata._io import write_whole
from lit_gptdata.report.axes import short
from lit_gptdata.report.jobs import Sweep, read_sweep
from lit_gptdata.report.page import COLUMNS, FIGURES, as_html, counts, metrics_of, reason_of
from lit_gptdata.report.plots import MADE_BY, draw


def write_report(folder: Path) -> Path:
    """Write the report of the jobs under a sweep's folder, into that folder; returns sweep.html's path.

    Raises ValueError where there are no jobs, and OSError. Each file is whole or absent; pictures of an
    earlier report that are not made any more are removed.
    """
    return write(read_sweep(folder))


def write(sweep: Sweep) -> Path:
    """`write_report` of a sweep that has been read."""
    pictures = draw(sweep)
    for picture in pictures:
        write_whole(sweep.folder / picture.name, picture.png)
    write_whole(sweep.folder / "sweep.csv", as_csv(sweep).encode())
    write_whole(page := sweep.folder / "sweep.html", as_html(sweep, pictures).encode())
    for path in sweep.folder.glob("sweep-*.png"):
        if path.name not in {picture.name for picture in pictures} and _is_ours(path):
            path.unlink(missing_ok=True)
    return page


def tell(folder: Path) -> Sweep:
    """`write_report`, and print what it says in short; returns what was read."""
    sweep = read_sweep(folder)
    page = write(sweep)
    print(f"{text_table(sweep)}\n\nreport  {page}\ntable   {page.with_suffix('.csv')}")
    return sweep


def as_csv(sweep: Sweep) -> str:
    """A row a job, in the report's order, with every figure as it was measured."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    metrics = metrics_of(sweep)
    keys = [f"override {key}" if key in (*COLUMNS, *metrics) else key for key in sweep.keys]
    writer.writerow(["job", "status", *keys, *FIGURES, *metrics, "error"])
    for job in sweep.jobs:
        values = [job.value(key) for key in sweep.keys]
        figures = [getattr(job, name) for name in FIGURES]
        measured = [job.metrics.get(name) for name in metrics]
        writer.writerow([job.name, job.status, *values, *figures, *measured, job.error])
    return file.getvalue()


def text_table(sweep: Sweep) -> str:
    """The report in a few columns, for a terminal: jobs best first, and why others have no result."""
    head = ["job", "status", *(short(key, 24) for key in sweep.keys), sweep.metric, "tokens"]
    rows, errors = [head], [""]
    for job in sweep.jobs:
        values = [short(job.value(key) or "?", 24) for key in sweep.keys]
        score = job.metrics.get(sweep.metric)
        told = ["–" if score is None else f"{score:.4f}", _grouped(job.tokens)]
        rows.append([short(job.name, 40), job.status, *values, *told])
        errors.append(short(reason_of(sweep, job), 100))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row, error in zip(rows, errors, strict=True):
        cells = zip(row, widths, strict=True)
        lines.append("  ".join(cell.ljust(width) for cell, width in cells).rstrip())
        lines += [f"    {error}"] if error else []
    return "\n".join([counts(sweep), "", *lines])


def _grouped(number: float | None) -> str:
    return "–" if number is None else f"{number:,.0f}"


def _is_ours(picture: Path) -> bool:
    with open(picture, "rb") as file:
        return MADE_BY.encode() in file.read(512)
