"""Seeds in the report of a sweep: means, 95 % intervals, and what may be called best."""

from __future__ import annotations

import json
import math
import statistics
from itertools import product
from pathlib import Path

import pytest

from lit_gptdata.report.page import as_text, headline, report_sweep
from lit_gptdata.report.rows import mean_interval, read_sweep, t_quantile
from tests.report.test_report import csv_rows, figures, legend_of, text_of, write_job

WIDE, NARROW = (2.31, 2.33, 2.30), (2.51, 2.46, 2.55)


def write_seeds(folder: Path, *scores: float, first: int = 0, **job) -> None:
    """Write a job for each score, which differ in their seeds only."""
    for seed, bits in enumerate(scores):
        write_job(folder / str(first + seed), f"seed={seed}", bits=bits, **job)


def change(folder: Path, **values) -> None:
    """Change values of a job's result.json."""
    path = folder / "result.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.fixture
def widths(tmp_path) -> Path:
    """Two widths and three seeds, numbered as Hydra numbers them."""
    for i, (width, seed) in enumerate(product((16, 32), range(3))):
        bits = (NARROW if width == 16 else WIDE)[seed]
        write_job(tmp_path / str(i), f"stem.dim={width}", f"seed={seed}", bits=bits)
    return tmp_path


def test_two_widths_with_three_seeds_are_two_rows_with_intervals(widths):
    sweep = report_sweep(widths)
    assert [row.name for row in sweep.rows] == ["3, 4, 5", "0, 1, 2"]
    assert sweep.keys == ["stem.dim"]
    for row, scores in zip(sweep.rows, (WIDE, NARROW), strict=True):
        assert row.score[0] == pytest.approx(statistics.mean(scores), rel=1e-14)
        # 4.302653: the table of Student's t for two degrees of freedom
        assert row.score[1] == pytest.approx(
            4.302653 * statistics.stdev(scores) / math.sqrt(3), rel=1e-7
        )
    assert headline(sweep) == [
        "Best by validation bits per byte: jobs 3, 4, 5, stem.dim=32: 2.3133 ± 0.0379.",
        "± is the 95 % interval of the mean over seeds (Student's t).",
    ]
    rows = csv_rows(widths)
    assert [row["job"] for row in rows] == ["3", "4", "5", "0", "1", "2"]
    assert [row["seed"] for row in rows] == ["0", "1", "2"] * 2
    assert {row["seeds"] for row in rows} == {"3"}
    for row, found in zip(rows[::3], sweep.rows, strict=True):
        summary = [float(row[f"val_bits_per_byte {name}"]) for name in ("mean", "ci95")]
        assert summary == list(found.score)
    html = (widths / "sweep.html").read_text()
    assert html.count("<summary>3 jobs</summary>") == 2
    assert "2.3133 ± 0.0379" in text_of(html)


def test_intervals_equal_those_of_scipy():
    stats = pytest.importorskip("scipy.stats")
    for df in [*range(1, 40), 100, 999]:
        assert t_quantile(df) == pytest.approx(stats.t.ppf(0.975, df), rel=1e-9)
    for scores in (WIDE, NARROW, (1.0, 1.5), tuple(range(30))):
        mean, half = mean_interval(scores)
        low, high = stats.t.interval(0.95, len(scores) - 1, statistics.mean(scores), stats.sem(scores))
        assert (mean - half, mean + half) == pytest.approx((low, high), rel=1e-9)
    assert mean_interval([2.0]) == (2.0, pytest.approx(math.nan, nan_ok=True))
    assert mean_interval([2.0, 2.0]) == (2.0, 0.0)


def test_rows_whose_intervals_overlap_are_tied(tmp_path):
    for number, scores in enumerate(((2.0, 2.1, 2.05), (2.04, 2.12, 2.1), (3.0, 3.1, 3.05))):
        for seed, bits in enumerate(scores):
            write_job(tmp_path / f"{number}{seed}", f"a={number}", f"seed={seed}", bits=bits)
    sweep = read_sweep(tmp_path)
    assert sweep.verdict == "tied"
    assert [sweep.mark(row) for row in sweep.rows] == ["★", "★", ""]
    claim, meaning = headline(sweep)
    results = ["jobs 00, 01, 02, a=0: 2.0500 ± 0.1242", "jobs 10, 11, 12, a=1: 2.0867 ± 0.1034"]
    assert claim == f"Tied by validation bits per byte: {'; '.join(results)}."
    assert meaning.endswith("and these intervals overlap.")
    labels = [line.get_label() for line in figures(tmp_path)["sweep-a.png"].axes[0].lines]
    assert "tied" in labels


def test_a_row_with_a_single_seed_is_not_called_best(tmp_path):
    write_job(tmp_path / "0", "a=1", "seed=0", bits=1.0)
    write_job(tmp_path / "1", "a=2", "seed=0", bits=2.0)
    write_job(tmp_path / "2", "a=2", "seed=1", bits=2.01)
    sweep = read_sweep(tmp_path)
    assert sweep.verdict == "lowest"
    assert headline(sweep)[-1].endswith("may be chance: repeat with seed=0,1,2.")
    write_job(tmp_path / "3", "a=1", "seed=1", bits=1.01)
    assert read_sweep(tmp_path).verdict == "best"


def test_failed_and_diverged_seeds_are_counted_and_named_but_not_averaged(widths):
    write_job(widths / "6", "stem.dim=32", "seed=3", status="failed", error="RuntimeError: no memory")
    write_job(widths / "7", "stem.dim=32", "seed=4", bits=math.nan)
    sweep = read_sweep(widths)
    assert len(sweep.rows) == 2
    assert sweep.rows[0].score[0] == pytest.approx(statistics.mean(WIDE))
    assert ": 2.3133 ± 0.0379 (3 of 5 seeds)." in headline(sweep)[0]
    text = as_text(sweep)
    assert "3, 4, 5, 6, 7 ★  completed        32      3    2.3133 ± 0.0379  1,000" in text
    assert "\n    job 6, seed 3, failed: RuntimeError: no memory\n" in text
    assert "\n    job 7, seed 4, completed: it has no finite val_bits_per_byte\n" in text


def test_jobs_that_repeat_a_seed_count_once(tmp_path):
    write_seeds(tmp_path, 2.0, 2.2)
    write_seeds(tmp_path, 2.0, 2.2, first=2)
    (row,) = read_sweep(tmp_path).rows
    assert (len(row.jobs), len(row.seeds)) == (4, 2)
    assert row.of("val_bits_per_byte") == mean_interval([2.0, 2.2])


def test_seeds_are_those_that_the_job_recorded_or_else_those_of_its_config(tmp_path):
    for number, (override, recorded) in enumerate([
        ("seed=null", {"global_seed": 17, "seed": 17}),
        ("data.seed=null", {"global_seed": 0, "seed": 5}), ("data.seed=3", {}), ("seed=4", {}),
    ]):  # fmt: skip
        write_job(tmp_path / str(number), override, bits=2.0 + number)
        change(tmp_path / str(number), **recorded)
        config = "seed: 4\ndata:\n  seed: 4\n" if number == 3 else "seed: 0\n"
        (tmp_path / str(number) / "config.yaml").write_text(config)
    (row,) = read_sweep(tmp_path).rows
    assert [job.seed for job in row.jobs] == ["17", "0/5", "0/3", "4"]


def test_curves_have_a_band_and_points_have_error_bars(widths):
    write_job(widths / "6", "stem.dim=64", "seed=0", bits=2.4)
    pictures = figures(widths)
    assert [*pictures] == ["sweep-curves.png", "sweep-stem.dim.png"]
    for panel in pictures["sweep-curves.png"].axes:
        assert len(panel.lines) == 3
        assert len(panel.collections) == 2  # one seed has no band
    labels = legend_of(pictures["sweep-curves.png"])
    assert labels[0] == "★ 3, 4, 5 · 32 → 2.313 ± 0.038"
    assert labels[1] == " 6 · 64 → 2.400"
    (bars,) = pictures["sweep-stem.dim.png"].axes[0].collections
    heights = [
        path.vertices[1, 1] - path.vertices[0, 1] for path in bars.get_paths() if len(path.vertices)
    ]
    assert max(heights) / 2 == pytest.approx(read_sweep(widths).rows[2].score[1])


def test_error_bars_of_different_settings_are_side_by_side(tmp_path):
    for i, (a, b, seed) in enumerate(product(range(2), range(3), range(2))):
        write_job(tmp_path / str(i), f"a={a}", f"b={b}", f"seed={seed}", bits=2 + (a + b + seed) / 10)
    axes = figures(tmp_path)["sweep-a.png"].axes[0]
    bars = [collection.get_segments()[0] for collection in axes.collections]
    assert [round(float(bar[0][0]), 2) for bar in bars] == [-0.04, 0.0, 0.04]


def test_rows_over_other_validation_text_are_marked_and_not_ranked(widths):
    text = {"sha256": "a" * 64, "bytes": [9000, 10000]}
    for number in range(6):
        change(widths / str(number), val_text=text)
    assert read_sweep(widths).verdict == "best"
    for number in range(3):
        change(widths / str(number), val_text=text | {"bytes": [9004, 10000]})
    assert read_sweep(widths).verdict == "best"  # tokenizers may cut at different bytes
    for other in ({"bytes": [9000, 9500]}, {"sha256": "b" * 64}):
        change(widths / "1", val_text=text | other)  # a single seed is enough
        sweep = read_sweep(widths)
        assert sweep.verdict == "lowest"
        assert [sweep.mark(row) for row in sweep.rows] == ["★", "≠"]
        assert as_text(sweep).count("scored other validation text") == 2
        assert "seed=0,1,2" not in "".join(headline(sweep))
        (warning,) = figures(widths)["sweep-curves.png"].texts
        assert "do not compare" in warning.get_text()
    change(widths / "1", val_text={})  # of an earlier version
    assert not read_sweep(widths).others


def test_a_value_with_an_interpolation_is_the_one_of_the_config(tmp_path):
    for number, half in enumerate(
        ("${lit_gptdata.floordiv:${data.max_length},2}", "${data.max_length}")
    ):
        write_job(tmp_path / str(number), f'data.stride="{half}"', bits=2.0)
        (tmp_path / str(number) / "config.yaml").write_text(f"data:\n  stride: {32 * (number + 1)}\n")
    assert read_sweep(tmp_path).values("data.stride") == [32, 64]
