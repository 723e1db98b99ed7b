"""metrics.csv, which a resumed run continues instead of starting it again."""

import csv
import io
from pathlib import Path
from typing import Any

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.utilities import rank_zero_only

from lit_gptdata._io import write_whole


class _KeepingWriter(ExperimentWriter):
    def _check_log_dir_exists(self) -> None:
        pass  # Lightning deletes metrics.csv here


class RunCSVLogger(CSVLogger):
    """Lightning's CSVLogger, but a run with a `ckpt_path` continues the metrics.csv in its folder.

    Rows of the earlier run from the first new row's step on are removed: the new run repeats them.
    """

    def __init__(self, save_dir: str, ckpt_path: str | None = None, **options: Any) -> None:
        super().__init__(save_dir, **options)
        self._continues = ckpt_path is not None and "://" not in str(save_dir)

    @property
    @rank_zero_experiment
    def experiment(self) -> ExperimentWriter:
        """The writer of the file."""
        if self._experiment is None and self._continues:
            self._experiment = _KeepingWriter(log_dir=self.log_dir)
        return super().experiment  # type: ignore[no-any-return]

    @rank_zero_only
    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        if self._continues and step is not None:
            writer = self.experiment
            writer.metrics_keys = keep_rows_before(step, Path(writer.metrics_file_path))
            self._continues = False
        super().log_metrics(metrics, step)


def keep_rows_before(step: int, metrics_csv: Path) -> list[str]:
    """Remove the rows from `step` on, and an incomplete last line; return the names of the columns."""
    if not metrics_csv.exists():
        return []
    text = metrics_csv.read_text(encoding="utf-8")
    reader = csv.DictReader(text[: text.rfind("\n") + 1].splitlines())
    columns = list(reader.fieldnames or [])
    rows = [row for row in reader if (row.get("step") or "").isdigit() and int(row["step"]) < step]
    file = io.StringIO()
    writer = csv.DictWriter(file, columns, extrasaction="ignore")
    writer.writeheader()
    writer.writerows(rows)
    write_whole(metrics_csv, file.getvalue().encode())
    return columns
