"""What a sweep has found: one page, one table, some pictures.

<sweep>/0/, 1/, …  →  jobs  →  axes, plots  →  page  →  sweep.csv, sweep.html, sweep-*.png

>>> from lit_gptdata.report.files import write_report
>>> write_report(Path("multirun/2026-11-22/10-00-00-123456"))
"""
