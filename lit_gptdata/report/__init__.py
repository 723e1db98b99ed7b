"""Report on a sweep: jobs.py reads its folder, rows.py averages over seeds, plots.py draws
pictures, page.py writes sweep.html.

>>> from lit_gptdata.report.page import report_sweep
>>> report_sweep(Path("multirun/2026-11-22/10-00-00-123456"))

Two files are separate: usage.py draws the picture of `lit-gptdata info --plot`, and show.py is the text
of a training step, `data.show(step)`.
"""
