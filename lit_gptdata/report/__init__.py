"""What commands report on data and runs.

sweep    jobs.py reads its folder, rows.py averages over seeds, plots.py draws, page.py writes sweep.html
data     overview.py: `print(data)`; usage.py and duplicates.py: `lit-gptdata info`; show.py: `data.show`
scores   scoring.py predicts the losses, documents.py adds them up and writes them: `lit-gptdata score`

>>> from lit_gptdata.report.page import report_sweep
>>> report_sweep(Path("multirun/2026-11-22/10-00-00-123456"))
"""
