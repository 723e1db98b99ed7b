"""The page of a report: one HTML file that needs no other, no network and no script.

All that jobs wrote is escaped, and a policy in the page keeps it from loading anything.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from html import escape

from lit_gptdata.report.axes import short
from lit_gptdata.report.jobs import METRICS, STATUSES, Job, Sweep, canonical, usable
from lit_gptdata.report.plots import Picture

FIGURES = ("tokens", "steps", "seconds", "parameters")

COLUMNS = ("job", "status", *FIGURES, "error")
"""What else each job has a column for: no metric's name."""

FIRST_METRICS = (*METRICS, "val_perplexity", "test_bits_per_byte", "test_loss", "test_perplexity")
"""Metrics in this order, then the others by name."""

STILL = "did not end: killed, or still running"


def as_html(sweep: Sweep, pictures: Sequence[Picture]) -> str:
    """One page that needs no other file and no network; all that jobs wrote is escaped."""
    folder = sweep.folder.resolve()
    title = escape(short(f"Sweep {folder.parent.name}/{folder.name}", 100))
    drawn = "\n".join(map(_figure, pictures))
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<title>{title}</title>
<style>{STYLE}</style>
</head>
<body>
<header>
<h1>{title}</h1>
{_head(sweep)}
</header>
<main>
{_table(sweep)}
{_note(sweep)}<section class="pictures">
{drawn}
</section>
</main>
<script>{SCRIPT}</script>
</body>
</html>
"""


def _head(sweep: Sweep) -> str:
    lines = [
        f"<p class=folder>{escape(short(str(sweep.folder.resolve()), 300))}</p>",
        f"<p>{counts(sweep)}.</p>",
    ]
    best = sweep.best
    if best is None:
        lines.append("<p>No job has a result yet.</p>")
    else:
        values = [f"{key}={best.value(key)}" for key in sweep.keys]
        lines.append(
            f"<p class=best>Best: job {escape(short(best.name, 60))}"
            + "".join(f", <code>{escape(short(value, 100))}</code>" for value in values)
            + f": <strong>{best.metrics[sweep.metric]:.4f}</strong> {METRICS[sweep.metric]}.</p>"
        )
    if sweep.study:
        lines.append(f"<p>Best trial of the whole study: {escape(short(sweep.study, 300))}.</p>")
    if tokens := _tokens(sweep):
        lines.append(f"<p>{tokens}</p>")
    if sweep.common:
        words = " ".join(f"<code>{escape(short(word, 120))}</code>" for word in sweep.common)
        lines.append(f"<p>All jobs: {words}</p>")
    return "\n".join(lines)


def _tokens(sweep: Sweep) -> str:
    """Whether the jobs that are compared have seen as many tokens."""
    tokens = [job.tokens for job in sweep.scored if job.tokens is not None]
    if not tokens:
        return ""
    low, high = min(tokens), max(tokens)
    if low == high:
        return f"{'Each' if len(tokens) > 1 else 'It'} trained on {low:,.0f} tokens."
    warning = "" if high <= 1.02 * low else " <strong>Not the same budget: compare with care.</strong>"
    return f"Trained on {low:,.0f} to {high:,.0f} tokens.{warning}"


def _table(sweep: Sweep) -> str:
    first, *others = sorted(metrics_of(sweep), key=lambda name: name != sweep.metric) or [sweep.metric]
    heads = ["job", "status", *sweep.keys, first, *FIGURES, *others]
    decimals = {
        name: _decimals([job.metrics.get(name, 0.0) for job in sweep.jobs]) for name in (first, *others)
    }
    bodies = []
    for job in sweep.jobs:
        cells = [_cell(job.name), _cell(job.status)]
        cells += [_cell(job.value(key) or "?") for key in sweep.keys]
        cells += [_figure_cell(job.metrics.get(first), decimals[first])]
        cells += [_figure_cell(getattr(job, name), 1) for name in FIGURES]
        cells += [_figure_cell(job.metrics.get(name), decimals[name]) for name in others]
        error = ""
        if reason := reason_of(sweep, job):
            error = f"<tr class=error><td colspan={len(heads)}><div>{_error(reason)}</div></td></tr>"
        kind = "best" if job is sweep.best else job.status
        bodies.append(f"<tbody class={kind}><tr>{''.join(cells)}</tr>{error}</tbody>\n")
    head = "".join(f"<th scope=col>{_breakable(name)}</th>" for name in heads)
    return f"<div class=wide><table><thead><tr>{head}</tr></thead>\n{''.join(bodies)}</table></div>"


def _note(sweep: Sweep) -> str:
    if not any(job.metrics for job in sweep.jobs if job.status != "completed"):
        return ""
    return "<p class=note>Of a job that has not completed: the last figures that it logged.</p>\n"


def _cell(text: str) -> str:
    """What a text says, or a number with five figures; the whole is its title."""
    number = canonical(text)
    told = short(text, 40) if isinstance(number, str) or len(text) <= 8 else f"{number:.5g}"
    title = f' title="{escape(text)}"' if told != text else ""
    kind = "" if isinstance(number, str) else f' class=number data-value="{number}"'
    return f"<td{kind}{title}>{escape(told)}</td>"


def _figure_cell(number: float | None, decimals: int) -> str:
    if number is None:
        return "<td class=number>–</td>"
    odd = not 0.001 <= abs(number) < 1e12 and number != 0  # a learning rate, a loss that diverged
    form = ",d" if isinstance(number, int) else ".3g" if odd else f",.{decimals}f"
    return f'<td class=number data-value="{number}">{number:{form}}</td>'


def _decimals(values: Sequence[float]) -> int:
    """How many a column of figures is shown with: four, or one where they are large."""
    return 4 if max((abs(value) for value in values if usable(value)), default=0.0) < 100 else 1


def _error(reason: str) -> str:
    """Why a job has no result: one line, the others folded away."""
    first, _, rest = reason.strip().partition("\n")
    line = escape(short(first, 300))
    if not rest.strip() and len(first) <= 300:
        return line
    return f"<details><summary>{line}</summary><pre>{escape(reason)}</pre></details>"


def _figure(picture: Picture) -> str:
    source = f"data:image/png;base64,{base64.b64encode(picture.png).decode()}"
    return (
        f"<figure{' class=long' if picture.width > 720 else ''}><h2>{_breakable(picture.title)}</h2>"
        f'<img src="{source}" width="{picture.width}" alt="{escape(short(picture.alt, 500))}"></figure>'
    )


def counts(sweep: Sweep) -> str:
    n = len(sweep.jobs)
    counts = [(sweep.count(status), status) for status in STATUSES]
    return f"{n} job{'s' if n > 1 else ''}: " + ", ".join(f"{k} {status}" for k, status in counts if k)


def reason_of(sweep: Sweep, job: Job) -> str:
    """Why a job has no result; "" if it has one."""
    if job.status == "completed":
        return f"it has no finite {sweep.metric}" if math.isnan(job.score(sweep.metric)) else ""
    return job.error.strip() or (
        STILL if job.status == "unfinished" else f"{job.status}, and said no more"
    )


def metrics_of(sweep: Sweep) -> list[str]:
    found = {name for job in sweep.jobs for name in job.metrics}.difference(COLUMNS)
    return [name for name in FIRST_METRICS if name in found] + sorted(found.difference(FIRST_METRICS))


def _breakable(name: str) -> str:
    """Escaped, with places where a long name may be broken."""
    text = escape(short(name, 80))
    for sign in "._/@":
        text = text.replace(sign, f"{sign}<wbr>")
    return text


POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
"""What the page may load: nothing but what it holds."""

STYLE = """
:root { color-scheme: light dark; --line: #d5d5d5; --faint: #666; --best: #e3f1e3; --bad: #b3261e; }
body { font: 15px/1.45 system-ui, sans-serif; margin: 1.5rem auto; max-width: 76rem; padding: 0 1rem; }
h1 { font-size: 1.4rem; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1rem; margin: 0 0 .4rem; overflow-wrap: anywhere; }
p { margin: .3rem 0; overflow-wrap: anywhere; }
.folder, .note { color: var(--faint); font-size: .85rem; }
code { font-size: .9em; }
.wide { overflow-x: auto; margin: 1.2rem 0 0; }
.pictures { margin-top: 1.5rem; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .5rem; text-align: left; vertical-align: top; }
th { border-bottom: 2px solid var(--line); vertical-align: bottom; }
th.sorts { cursor: pointer; }
tbody { border-bottom: 1px solid var(--line); }
.number { text-align: right; white-space: nowrap; }
tbody.best { background: var(--best); font-weight: 600; }
tbody.stopped, tbody.unfinished { color: var(--faint); }
.error td { color: var(--bad); padding-top: 0; }
.error div { position: sticky; left: .5rem; max-width: min(60rem, calc(100vw - 3.5rem));
  overflow-wrap: anywhere; }
.unfinished .error td { color: var(--faint); }
pre { white-space: pre-wrap; overflow-wrap: anywhere; }
.pictures { display: grid; gap: 1.2rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 30rem), 1fr)); align-items: start; }
figure { margin: 0; min-width: 0; break-inside: avoid; }
figure.long { grid-column: 1 / -1; }
img { max-width: 100%; height: auto; background: white; border-radius: 4px; }
@media (prefers-color-scheme: dark) {
  :root { --line: #444; --faint: #aaa; --best: #1d3a1f; --bad: #ff8a80; } }
@media print {
  body { font-size: 10pt; margin: 0; max-width: none; }
  table { font-size: 7pt; } th, td { padding: .15rem .3rem; } .wide { overflow: visible; }
  tbody { break-inside: avoid; } .pictures { display: block; } figure { margin-top: 1rem; }
  img { max-height: 23cm; object-fit: contain; object-position: left; } }
"""

SCRIPT = """
for (const head of document.querySelectorAll("th")) {
  const column = head.cellIndex, table = head.closest("table");
  let up = true;
  head.className = "sorts";
  head.title = "sort by this column";
  head.onclick = () => {
    const key = body => body.rows[0].cells[column];
    const number = body => parseFloat(key(body).dataset.value ?? "x");
    const compare = (a, b) => {
      const x = number(a), y = number(b);
      if (isNaN(x) !== isNaN(y)) return isNaN(x) ? 1 : -1;  // what is no number stays last
      const order = isNaN(x) ? key(a).textContent.localeCompare(key(b).textContent) : x - y;
      return up ? order : -order;
    };
    table.append(...[...table.tBodies].sort(compare));
    up = !up;
  };
}
"""
