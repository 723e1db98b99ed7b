"""Write the report of a sweep: sweep.html, a single file that works without a network, and sweep.csv."""

import base64
import csv
import io
import math
import re
from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from lit_gptdata._io import write_whole
from lit_gptdata.report.jobs import COUNTS, METRICS, STATUSES, Job, Sweep, canonical, read_sweep, shorten
from lit_gptdata.report.plots import SOFTWARE, Picture, draw

COLUMNS = ("job", "status", *COUNTS, "error")  # of every sweep.csv; no metric may have such a name


def report_sweep(folder: Path) -> Sweep:
    """Write the report of a sweep into its folder, print its table, and return what was read."""
    sweep = read_sweep(folder)
    pictures = draw(sweep)
    for picture in pictures:
        write_whole(folder / picture.name, picture.png)
    # "replace", because JSON and file names can contain lone surrogates and UTF-8 files cannot
    write_whole(folder / "sweep.csv", as_csv(sweep).encode("utf-8", "replace"))
    write_whole(folder / "sweep.html", as_html(sweep, pictures).encode("utf-8", "replace"))
    for path in {*folder.glob("sweep-*.png")} - {folder / picture.name for picture in pictures}:
        if SOFTWARE.encode() in path.read_bytes()[:512]:  # of an earlier report, not of the user
            path.unlink(missing_ok=True)
    print(f"{as_text(sweep)}\n\nreport  {folder / 'sweep.html'}\ntable   {folder / 'sweep.csv'}")
    return sweep


def as_html(sweep: Sweep, pictures: Sequence[Picture]) -> str:
    """Render the page. The template escapes what jobs wrote, and its policy (CSP) forbids loads."""
    environment = Environment(
        loader=PackageLoader("lit_gptdata.report", ""),
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {
        "base64": lambda content: base64.b64encode(content).decode(),
        "breakable": lambda name: Markup("<wbr>").join(re.split("(?<=[._/@])", shorten(name, 80))),
        "canonical": canonical,
        "format_number": _format_number,
        "shorten": shorten,
    }
    return environment.get_template("page.html.j2").render(
        sweep=sweep,
        summary=_count_jobs(sweep),
        budgets=[tokens for job in sweep.scored if (tokens := job.counts["tokens"]) is not None],
        metric=METRICS[sweep.metric],
        counts=[*COUNTS],
        metrics=[sweep.metric, *(name for name in _metric_names(sweep) if name != sweep.metric)],
        reasons=[why_no_result(sweep, job) for job in sweep.jobs],
        pictures=pictures,
    )


def as_csv(sweep: Sweep) -> str:
    """Format one row per job, best first, with every number in full precision."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    metrics = _metric_names(sweep)
    keys = [f"override {key}" if key in (*COLUMNS, *metrics) else key for key in sweep.keys]
    writer.writerow(["job", "status", *keys, *COUNTS, *metrics, "error"])
    for job in sweep.jobs:
        numbers = [*map(job.counts.get, COUNTS), *map(job.metrics.get, metrics)]
        writer.writerow([job.name, job.status, *map(job.value, sweep.keys), *numbers, job.error])
    return file.getvalue()


def as_text(sweep: Sweep) -> str:
    """Format the most important columns for a terminal, with the error below each failed job."""
    rows = [["job", "status", *(shorten(key, 24) for key in sweep.keys), sweep.metric, "tokens"]]
    for job in sweep.jobs:
        values = [shorten(job.value(key) or "?", 24) for key in sweep.keys]
        numbers = map(_format_number, (job.metrics.get(sweep.metric), job.counts["tokens"]))
        rows.append([shorten(job.name, 40), job.status, *values, *numbers])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    for i, job in enumerate(sweep.jobs, 1):
        if reason := why_no_result(sweep, job):
            lines[i] += f"\n    {shorten(reason, 100)}"
    return "\n".join([_count_jobs(sweep), "", *lines])


def why_no_result(sweep: Sweep, job: Job) -> str:
    """Say why a job has no result; "" if it has one."""
    if job.status == "completed" and job.score(sweep.metric) == math.inf:
        return f"it has no finite {sweep.metric}"
    return job.error


def _count_jobs(sweep: Sweep) -> str:
    n = len(sweep.jobs)
    counts = [f"{k} {status}" for status in STATUSES if (k := sweep.count(status))]
    differ = len({tuple(job.val_sources) for job in sweep.scored}) > 1
    warning = "; val_loss covers different sources, so do not compare it" if differ else ""
    return f"{n} job{'s' if n > 1 else ''}: {', '.join(counts)}{warning}"


def _metric_names(sweep: Sweep) -> list[str]:
    """List every metric that a job has: first METRICS, then the others by name."""
    names = {name for job in sweep.jobs for name in job.metrics}.difference(COLUMNS)
    return [name for name in METRICS if name in names] + sorted(names.difference(METRICS))


def _format_number(number: float | None, decimals: int = 4) -> str:
    if number is None:
        return "–"
    if number != 0 and not 0.001 <= abs(number) < 1e12:  # a learning rate, or a loss that diverged
        return f"{number:.3g}"
    decimals = 0 if isinstance(number, int) else decimals if abs(number) < 100 else 1
    return f"{number:,.{decimals}f}"
