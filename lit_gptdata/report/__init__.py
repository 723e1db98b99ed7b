"""Report on a sweep: jobs.py reads its folder, rows.py averages over seeds, plots.py draws
pictures, page.py writes sweep.html.

>>> from lit_gptdata.report.page import report_sweep
>>> report_sweep(Path("multirun/2026-11-22/10-00-00-123456"))

usage.py is separate: it draws the picture of `lit-gptdata info --plot`.
"""
