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

from lit_gptdata._io import aligned, write_whole
from lit_gptdata.report.jobs import COUNTS, METRICS, STATUSES, canonical, shorten
from lit_gptdata.report.plots import Picture, draw
from lit_gptdata.report.rows import Row, Sweep, read_sweep

# Of every sweep.csv, next to the keys and the metrics; no metric may have such a name.
COLUMNS = ("job", "status", "seed", *COUNTS, "error")
MAX_TIED = 3  # rows in the headline


def report_sweep(folder: Path) -> Sweep:
    """Write the report of a sweep into its folder, print its table, and return what was read."""
    sweep = read_sweep(folder)
    pictures = draw(sweep)
    for picture in pictures:
        write_whole(folder / picture.name, picture.png)
    # "replace", because JSON and file names can contain lone surrogates and UTF-8 files cannot
    write_whole(folder / "sweep.csv", as_csv(sweep).encode("utf-8", "replace"))
    write_whole(folder / "sweep.html", as_html(sweep, pictures).encode("utf-8", "replace"))
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
        "format_number": format_number,
        "shorten": shorten,
    }
    return environment.get_template("page.html.j2").render(
        sweep=sweep,
        summary=_count_jobs(sweep),
        headline=headline(sweep),
        notes=[notes(sweep, row) for row in sweep.rows],
        budgets=[tokens for row in sweep.scored if (tokens := row.of("tokens")[0]) is not None],
        metric=METRICS[sweep.metric],
        counts=[*COUNTS],
        metrics=[sweep.metric, *(name for name in _metric_names(sweep) if name != sweep.metric)],
        partial=any(sweep.metric in j.metrics for j in sweep.jobs if j.status != "completed"),
        pictures=pictures,
    )


def as_csv(sweep: Sweep) -> str:
    """Format one row per job, best first, with every number in full precision.

    The last columns repeat the result of the job's row in the report: its seeds, mean and interval.
    """
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    metrics = [*COUNTS, *_metric_names(sweep)]
    summary = ["seeds", f"{sweep.metric} mean", f"{sweep.metric} ci95"]
    writer.writerow(["job", "status", *sweep.keys, "seed", *metrics, "error", *summary])
    for row in sweep.rows:
        result = [len(row.seeds), *(x if math.isfinite(x) else None for x in row.score)]
        for job in row.jobs:
            settings = [job.name, job.status, *map(job.value, sweep.keys), job.seed]
            writer.writerow([*settings, *map(job.metrics.get, metrics), job.error, *result])
    return file.getvalue()


def as_text(sweep: Sweep) -> str:
    """Format the most important columns for a terminal, with notes below each row."""
    keys = [shorten(key, 24) for key in sweep.keys]
    table = [["job", "status", *keys, "seeds", sweep.metric, "tokens"]]
    for row in sweep.rows:
        values = [shorten(row.value(key) or "?", 24) for key in sweep.keys]
        numbers = [format_number(*row.of(sweep.metric)), format_number(row.of("tokens")[0])]
        name = f"{shorten(row.name, 40)} {sweep.mark(row)}"
        table.append([name, row.status, *values, str(len(row.seeds)), *numbers])
    head, *lines = aligned(table)
    found = [_count_jobs(sweep), *headline(sweep), "", head]
    for row, line in zip(sweep.rows, lines, strict=True):
        found += [line, *(f"    {shorten(note, 160)}" for note in notes(sweep, row))]
    return "\n".join(found)


def headline(sweep: Sweep) -> list[str]:
    """Name the best row, as far as the intervals tell, and then explain the claim."""
    if not sweep.scored:
        return ["No job has a result yet."]
    rows, found = sweep.leaders if sweep.verdict == "tied" else sweep.scored[:1], []
    for row in rows[:MAX_TIED]:
        name = f"job{'s' if len(row.jobs) > 1 else ''} {shorten(row.name, 60)}"
        settings = [shorten(f"{key}={row.value(key)}", 100) for key in sweep.keys]
        n, n_all = len(row.seeds), len({job.seed for job in row.jobs})
        few = f" ({n} of {n_all} seeds)" if n < n_all else ""
        found.append(f"{', '.join([name, *settings])}: {format_number(*row.score)}{few}")
    found += [f"{len(rows) - MAX_TIED} more"] * (len(rows) > MAX_TIED)
    verdict = (sweep.verdict or "result").capitalize()
    sentences = [f"{verdict} by {METRICS[sweep.metric]}: {'; '.join(found)}."]
    if sweep.has_intervals:
        overlap = ", and these intervals overlap" if sweep.verdict == "tied" else ""
        sentences += [f"± is the 95 % interval of the mean over seeds (Student's t){overlap}."]
    if sweep.verdict == "lowest" and not sweep.others:
        sentences += ["One seed shows no spread, so a difference may be chance: repeat with seed=0,1,2."]
    return sentences


def notes(sweep: Sweep, row: Row) -> list[str]:
    """Note other validation text, and why jobs have no result."""
    found = ["scored other validation text than the lowest row: do not compare"] * (row in sweep.others)
    for job in row.jobs:
        if job.score(sweep.metric) == math.inf:
            completed = job.status == "completed"
            reason = f"it has no finite {sweep.metric}" if completed else job.error
            prefix = f"job {job.name}, seed {job.seed}, {job.status}: " if len(row.jobs) > 1 else ""
            found.append(prefix + reason)
    return found


def _count_jobs(sweep: Sweep) -> str:
    n = len(sweep.jobs)
    counts = [f"{k} {status}" for status in STATUSES if (k := sweep.count(status))]
    warning = "; rows with ≠ scored other validation text than the lowest row" if sweep.others else ""
    return f"{n} job{'s' if n > 1 else ''}: {', '.join(counts)}{warning}"


def _metric_names(sweep: Sweep) -> list[str]:
    """List every metric that a job has: first METRICS, then the others by name."""
    names = {name for job in sweep.jobs for name in job.metrics}.difference(COLUMNS)
    return [name for name in METRICS if name in names] + sorted(names.difference(METRICS))


def format_number(number: float | None, half: float | None = None, decimals: int = 4) -> str:
    """Format a number, and half of its interval if it has one: "2.3133 ± 0.0379"."""
    if number is None:
        return "–"
    if number != 0 and not 0.001 <= abs(number) < 1e12:  # a learning rate, or a loss that diverged
        text = f"{number:.3g}"
    else:
        decimals = 0 if isinstance(number, int) else decimals if abs(number) < 100 else 1
        text = f"{number:,.{decimals}f}"
    has_half = half is not None and not math.isnan(half)
    return f"{text} ± {format_number(half, decimals=decimals)}" if has_half else text
