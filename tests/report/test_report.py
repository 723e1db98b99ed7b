"""The report of a sweep, on folders as jobs leave them and with numbers that are known."""

from __future__ import annotations

import csv
import json
import math
import re
import subprocess
import sys
from html import unescape
from itertools import pairwise, product
from pathlib import Path

import pytest
from markupsafe import escape
from matplotlib.figure import Figure

from lit_gptdata.cli.main import main
from lit_gptdata.report import plots
from lit_gptdata.report.jobs import METRICS, read_curves, shorten
from lit_gptdata.report.page import as_html, as_text, report_sweep
from lit_gptdata.report.plots import axis_limits, file_name
from lit_gptdata.report.rows import read_sweep

HEAD = "step,epoch,tokens,train_loss,val_loss,val_bits_per_byte\n"
CONFIG = "data:\n  max_length: 64\n  stride: 32\n  corpus: [a.txt, b.txt]\nmodel:\n  rate: 0.001\n"


def write_job(
    folder: Path,
    *overrides: str,
    bits: float | None = None,
    status: str = "completed",
    error: str | None = None,
    tokens: int = 1000,
    curve: dict[int, float] | None = None,
    **metrics: float,
) -> Path:
    """Write the files that a job of train.py writes into its folder."""
    folder.mkdir(parents=True)
    if bits is not None:
        metrics |= {"val_bits_per_byte": bits, "val_loss": 2 * bits}
        curve = curve or {0: 6.0, tokens // 2: bits + 0.3, tokens * 3 // 4: bits + 0.1, tokens: bits}
    result = {"status": status, "error": error, "overrides": overrides, "seconds": 1.5}
    if status == "completed":
        result |= {"tokens": tokens, "steps": 10, "parameters": 77, "metrics": metrics}
    (folder / "result.json").write_text(json.dumps(result))
    (folder / "config.yaml").write_text(CONFIG)
    if curve:
        rows = "".join(f"{step},0,{float(step)},,{2 * y},{y}\n" for step, y in curve.items())
        (folder / "metrics.csv").write_text(HEAD + rows)
    return folder


def csv_rows(folder: Path) -> list[dict[str, str]]:
    with open(folder / "sweep.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def figures(folder: Path) -> dict[str, Figure]:
    """Draw a sweep and return its figures by the name of their file."""
    return {picture.name: picture.figure for picture in plots.draw(read_sweep(folder))}


def text_of(html: str) -> str:
    """Return what a browser shows, without tags."""
    return unescape(re.sub("<[^>]*>", "", html))


def read_page(folder: Path) -> tuple[str, list[list[str]]]:
    """Return the HTML of a report, and the texts of its table's cells row by row."""
    html = (folder / "sweep.html").read_text(encoding="utf-8")
    rows = re.findall("<tr.*?</tr>", html, re.DOTALL)
    cells = [re.findall("<t[dh].*?</t[dh]>", row, re.DOTALL) for row in rows]
    return html, [[text_of(cell).strip() for cell in row] for row in cells]


@pytest.fixture
def grid(tmp_path) -> Path:
    """Two keys and four jobs, of which one failed. The best is job 3."""
    sweep = tmp_path / "2026-11-22" / "10-00-00"
    for i, (length, dim) in enumerate(product((32, 64), (8, 16))):
        overrides = ("+sweep=x", f"data.max_length={length}", f"stem.dim={dim}")
        if i == 1:
            write_job(sweep / "1", *overrides, status="failed", error="ValueError: stride=0\ngive >= 1")
        else:
            write_job(sweep / f"{i}", *overrides, bits=2.5 - i / 10, train_loss=4.0 + i)
    return sweep


def test_a_report_has_a_table_pictures_and_a_page_that_loads_nothing(grid):
    sweep = report_sweep(grid)
    assert [sweep.count(status) for status in ("completed", "failed", "stopped")] == [3, 1, 0]
    rows = csv_rows(grid)
    assert [row["job"] for row in rows] == ["3", "2", "0", "1"]
    columns = "job,status,data.max_length,stem.dim,seed,tokens,steps,seconds,parameters"
    columns += ",val_bits_per_byte,val_loss,train_loss,error,seeds"
    assert ",".join(rows[0]) == f"{columns},val_bits_per_byte mean,val_bits_per_byte ci95"
    assert ",".join(rows[1].values()) == "2,completed,64,8,,1000,10,1.5,77,2.3,4.6,6.0,,1,2.3,"
    error = "ValueError: stride=0\ngive >= 1"
    assert ",".join(rows[3].values()) == f"1,failed,32,16,,,,1.5,,,,,{error},0,,"

    html, table = read_page(grid)
    text = text_of(html)
    assert "4 jobs: 3 completed, 1 failed." in text
    lowest = "Lowest by validation bits per byte: job 3, data.max_length=64, stem.dim=16: 2.2000."
    assert f"{lowest}\nOne seed shows no spread" in text
    assert "Each job trained on 1,000 tokens." in text
    assert "All jobs: sweep=x" in text
    assert "2026-11-22/10-00-00" in text
    columns = (
        "job data.max_length stem.dim seeds val_bits_per_byte status tokens steps seconds parameters"
    )
    assert " ".join(table[0]) == f"{columns} val_loss train_loss"
    assert " ".join(table[1]) == "3 ★ 64 16 1 2.2000 completed 1,000 10 1.5 77 4.4000 7.0000"
    assert table[-2][:6] == ["1", "32", "16", "0", "–", "failed"]
    assert table[-1] == ["ValueError: stride=0 give >= 1ValueError: stride=0\ngive >= 1"]  # folded, open

    pictures = {path.name: path.read_bytes() for path in grid.glob("*.png")}
    names = ("curves", "data.max_length", "heatmap", "stem.dim")
    assert sorted(pictures) == [f"sweep-{name}.png" for name in names]
    assert all(content.startswith(b"\x89PNG\r\n\x1a\n") for content in pictures.values())
    assert (
        len(
            re.findall(
                'alt="[^"]+: validation bits per byte. Lowest by validation bits per byte: job 3', html
            )
        )
        == 4
    )

    loads = re.findall("(?:src|href|srcset|data)=[\"']?([^\"' >]*)", html)
    assert len(loads) == 4
    assert all(source.startswith("data:image/png;base64,") for source in loads)
    assert "default-src 'none'" in html
    for outside in ("http://", "https://", "url(", "@import", "import(", "fetch(", "<link"):
        assert outside not in html


def test_a_report_says_that_losses_over_different_texts_are_not_comparable(tmp_path):
    for number, digest in enumerate("abb"):
        path = write_job(tmp_path / str(number), f"a={number}", bits=2.0) / "result.json"
        text = {"val_text": {"sha256": digest, "bytes": [0, 100]}}
        path.write_text(json.dumps(json.loads(path.read_text()) | text))
    warning = "3 jobs: 3 completed; rows with ≠ scored other validation text than the lowest row"
    report_sweep(tmp_path)
    assert f"{warning}." in read_page(tmp_path)[0]
    (tmp_path / "0" / "result.json").unlink()
    assert "other validation text" not in as_text(read_sweep(tmp_path))


def test_a_second_report_is_the_same(grid):
    report_sweep(grid)
    before = {path: path.read_bytes() for path in grid.iterdir() if path.is_file()}
    report_sweep(grid)
    assert {path: path.read_bytes() for path in grid.iterdir() if path.is_file()} == before


def test_what_jobs_wrote_is_only_text(tmp_path):
    values = [
        "<script>alert(1)</script>", "'a,b'", '"say ""x"""', "日本語 🎉", "x" * 300, "$\\frac{a$", "_h",
        "{{ 7 * 7 }}",
    ]  # fmt: skip
    for i, value in enumerate(values):
        name = '_x"><script>$i$' if i == 0 else str(i)
        write_job(tmp_path / name, f"lit/data@data={value}", f"++a.b/c={i}", bits=2 + i / 10)
    error = '<img src="http://x.test/a.png"> & \x1b[31m\nmore'
    write_job(tmp_path / "8", "lit/data@data=\ud800", "~trainer.x", status="failed", error=error)
    report_sweep(tmp_path)
    html, _ = read_page(tmp_path)
    assert html.count("<script") == 1  # the one that sorts the table
    assert html.count("<img") == 4  # curves and three keys
    for text in ("<script>alert(1)</script>", '<img src="http://x.test/a.png"> & [31m', "{{ 7 * 7 }}"):
        assert str(escape(text)) in html
    assert "日本語 🎉" in html
    rows = csv_rows(tmp_path)
    assert rows[0]["job"] == '_x"><script>$i$'
    assert [row["lit/data@data"] for row in rows] == [values[0], "a,b", 'say ""x""', *values[3:], "?"]
    assert [row["trainer.x"] for row in rows] == ["default"] * 8 + ["removed"]
    assert [row["a.b/c"] for row in rows] == [*map(str, range(8)), "default"]
    names = {path.name for path in tmp_path.glob("*.png")}
    assert {"sweep-lit-data-data.png", "sweep-a.b-c.png", "sweep-trainer.x.png"} < names
    assert "\x1b" not in as_text(read_sweep(tmp_path))
    (legend,) = figures(tmp_path)["sweep-curves.png"].legends
    assert len(legend.get_texts()) == 8  # matplotlib would hide labels that start with _


def test_jobs_that_were_killed_or_wrote_garbage_remain_rows(tmp_path):
    write_job(tmp_path / "0", "data.max_length=16", bits=2.4)
    write_job(tmp_path / "1", "data.max_length=32", status="running", curve={0: 6.0, 500: 3.0})
    complete = HEAD + "0,0,0.0,,12.0,6.0\n5,0,500.0,,5.0,2.5\n"
    (tmp_path / "1" / "metrics.csv").write_text(complete + "9,0,900.0,,2.2,1.1")  # cut from 1.1875
    garbage = (b'{"status": "comp', b"\xff\x00\xfe", b"null", b"[" * 100)
    for i, content in enumerate(garbage, 2):
        (write_job(tmp_path / str(i), bits=1.0) / "result.json").write_bytes(content)
    for name, config in (("6", "data:\n  max_length: 128\n"), ("7", "a: [\n")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text(config)
    write_job(tmp_path / "8", "data.max_length=8", status="stopped")
    write_job(tmp_path / "9", "data.max_length=4", bits=math.nan)
    (tmp_path / "empty").mkdir()
    report_sweep(tmp_path)
    rows = {row["job"]: row for row in csv_rows(tmp_path)}
    assert list(rows) == ["0", "9", "8", *"1234567"]  # completed, stopped, unfinished
    assert {job for job, row in rows.items() if row["status"] == "unfinished"} == {*"1234567"}
    assert (rows["1"]["val_bits_per_byte"], rows["1"]["tokens"]) == ("2.5", "500")
    assert rows["9"]["val_bits_per_byte"] == "nan"
    for job in "2345":
        assert rows[job]["error"].startswith("cannot read result.json: ")
        assert rows[job]["data.max_length"] == "64"  # from its config
    assert rows["6"]["data.max_length"] == "128"
    assert rows["6"]["error"].startswith("no result.json")
    assert rows["7"]["data.max_length"] == ""
    text = text_of(read_page(tmp_path)[0])
    assert "10 jobs: 2 completed, 1 stopped, 7 unfinished" in text
    assert "Jobs that did not complete show the last values that they logged." in text
    assert "did not end: it was killed, or it is still running" in text
    assert "it has no finite val_bits_per_byte" in text
    assert "Result by validation bits per byte: job 0" in text


def test_a_metrics_file_that_ends_anywhere_is_read_up_to_its_last_complete_line(tmp_path):
    points = [(0.0, 5.5), (100.0, 4.25), (200.0, 3.125)]
    complete = HEAD + "".join(f"1,0,{x},,,{y}\n9,0,{x + 50},7.5,,\n" for x, y in points)
    for end in range(len(complete) + 1):
        (tmp_path / "metrics.csv").write_bytes(complete[:end].encode())
        curves = read_curves(tmp_path / "metrics.csv")
        n_lines = max(0, complete[:end].count("\n") - 1)
        assert curves["val_bits_per_byte"] == points[: (n_lines + 1) // 2]
        assert curves["train_loss"] == [(x + 50, 7.5) for x, _ in points[: n_lines // 2]]
        assert curves["val_loss"] == []
    odd_lines = "1,0,1.0,nan,,2\n1,0,x,,,3\n,,,,\n1,0,inf,,,3\n1,0,0,,,4\n"
    (tmp_path / "metrics.csv").write_text(HEAD + odd_lines)
    assert read_curves(tmp_path / "metrics.csv")["val_bits_per_byte"] == [(0, 4), (1.0, 2)]
    assert not any(read_curves(tmp_path / "absent.csv").values())


@pytest.mark.parametrize(
    ("metrics", "name"),
    [
        ([{"val_bits_per_byte": 9.0, "val_loss": 1.0}, {"val_loss": 2.0, "train_loss": 3.0}], 0),
        ([{"val_loss": 1.0, "train_loss": 9.0}, {"val_loss": 2.0, "train_loss": 3.0}], 1),
        ([{"val_loss": math.nan, "train_loss": 3.0}, {"train_loss": 4.0}], 2),
        ([{}, {}], 0),
    ],
)
def test_jobs_are_compared_by_the_first_metric_that_any_has(tmp_path, metrics, name):
    for i, values in enumerate(metrics):
        write_job(tmp_path / str(i), f"a={i}", **values)
    sweep = report_sweep(tmp_path)
    assert sweep.metric == list(METRICS)[name]
    assert [row.name for row in sweep.rows] == ["0", "1"]
    assert sweep.leaders == (sweep.rows[:1] if metrics[0] else [])
    assert (tmp_path / "sweep-a.png").exists() == bool(metrics[0])


def test_a_sweep_without_any_result_has_a_page(tmp_path):
    for i in range(3):
        write_job(tmp_path / str(i), f"a={i}", status="failed", error="RuntimeError: no memory")
    report_sweep(tmp_path)
    text = text_of(read_page(tmp_path)[0])
    assert "3 jobs: 3 failed." in text
    assert "No job has a result yet." in text
    assert text.count("RuntimeError: no memory") == 3
    assert as_text(read_sweep(tmp_path)).count("RuntimeError: no memory") == 3
    assert not list(tmp_path.glob("*.png"))


def test_results_of_jobs_with_unknown_settings(tmp_path):
    for i in range(4):
        path = write_job(tmp_path / str(i), f"a={i}", f"b={i % 2}", bits=2.0 if i > 1 else None)
        if i > 1:
            path /= "result.json"
            path.write_text(json.dumps(json.loads(path.read_text()) | {"overrides": None}))
    report_sweep(tmp_path)
    assert [row["a"] for row in csv_rows(tmp_path)] == ["", "", "0", "1"]
    assert not (tmp_path / "sweep-heatmap.png").exists()


def test_a_sweep_of_one_job_has_one_picture(tmp_path):
    write_job(tmp_path / "0", "model=nano", bits=2.5)
    report_sweep(tmp_path)
    text = text_of(read_page(tmp_path)[0])
    assert "1 job: 1 completed." in text
    assert "Result by validation bits per byte: job 0: 2.5000." in text
    assert [path.name for path in tmp_path.glob("*.png")] == ["sweep-curves.png"]
    (tmp_path / "0" / "metrics.csv").write_text(HEAD + "0,0,0.0,,12.0,6.0\n")  # only the first point
    report_sweep(tmp_path)


def test_the_page_warns_about_different_token_budgets(tmp_path):
    write_job(tmp_path / "0", "a=1", bits=2.5, tokens=1000)
    write_job(tmp_path / "1", "a=2", bits=2.4, tokens=1008)
    assert "The jobs trained on 1,000 to 1,008 tokens.</p>" in as_html(read_sweep(tmp_path), [])
    write_job(tmp_path / "2", "a=3", bits=2.3, tokens=2000)
    html = as_html(read_sweep(tmp_path), [])
    assert "The jobs trained on 1,000 to 2,000 tokens. <strong>The budgets differ" in html


def test_a_value_comes_from_the_override_or_else_from_the_config(tmp_path):
    overrides = ("data.max_length=64", "model.rate=1e-3", "model=nano", "flag=True")
    write_job(tmp_path / "0", *overrides, bits=2.0)
    write_job(tmp_path / "1", "+data.stride=8", "data.corpus=[c.txt]", "flag=true", bits=2.1)
    sweep = read_sweep(tmp_path)
    assert sweep.keys == ["model", "data.stride", "data.corpus"]
    assert sweep.common == ["flag=True"]
    values = [[job.value(key) for key in [*sweep.keys, "model.rate"]] for job in sweep.jobs]
    assert values == [["nano", "32", "[a.txt,b.txt]", "1e-3"], ["default", "8", "[c.txt]", "0.001"]]


def test_jobs_in_subfolders_are_found_and_ordered_by_their_numbers(tmp_path):
    for name in ("10", "9", "b/2", "b/11", ".hidden/1", "9/checkpoints/3"):
        write_job(tmp_path / name, "a=1")
    assert [job.name for job in read_sweep(tmp_path).jobs] == ["9", "10", "b/2", "b/11"]
    for i, value in enumerate(["v10", "9" * 5000, "v9", "1e-3", "10", "9"]):
        write_job(tmp_path / f"c{i}", f"b={value}")
    assert read_sweep(tmp_path).values("b") == [0.001, 9, 10, "9" * 5000, "default", "v9", "v10"]


def legend_of(figure: Figure) -> list[str]:
    """Return the labels of a figure's legend, which nothing may cut or cover."""
    figure.draw_without_rendering()
    (legend,) = figure.legends
    box = legend.get_window_extent()
    assert figure.bbox.x0 <= box.x0 < box.x1 <= figure.bbox.x1
    assert figure.bbox.y0 <= box.y0 < box.y1 <= min(ax.get_tightbbox().y0 for ax in figure.axes) + 1
    return [text.get_text() for text in legend.get_texts()]


@pytest.mark.parametrize(("n", "n_keys"), [(1, 1), (4, 2), (12, 3), (40, 4)])
def test_the_legend_names_the_best_curves(tmp_path, n, n_keys):
    for i in range(n):  # job 7 fails early, job 9 has not validated yet, job 3 diverges
        values = (2 ** (i % 5 + 3), 10 ** -(1 + i / n * 3), ("learned", "sinusoidal")[i % 2], i)[:n_keys]
        overrides = [f"some.key_{k}={value}" for k, value in enumerate(values)]
        odd = {7: {"status": "failed", "curve": {0: 6.0, 100: 5.0}}, 9: {"status": "running"}}
        result = odd.get(i) or {"bits": 40.0 if i == 3 else 2.0 + (i * 7 % n) / 60}
        write_job(tmp_path / str(i), *overrides, **result)
    pictures = {picture.name: picture for picture in plots.draw(read_sweep(tmp_path))}
    curves = pictures["sweep-curves.png"]
    labels = legend_of(curves.figure)
    jobs = [job for job in read_sweep(tmp_path).jobs if job.name != "9"]
    assert [label.strip("★ ").split()[0] for label in labels[:20]] == [job.name for job in jobs[:20]]
    assert [label.startswith("★") for label in labels] == [n > 1] + [False] * (len(labels) - 1)
    assert labels[20:] == (["other jobs"] if n == 40 else [])
    assert all(len(axes.lines) == len(jobs) for axes in curves.figure.axes)
    if n > 1:
        legend_of(pictures["sweep-some.key_0.png"].figure)


def ticks_of(figure: Figure, axis: str) -> list[str]:
    """Return the tick labels of an axis, which may neither overlap nor leave the figure."""
    figure.draw_without_rendering()
    low, high = getattr(figure.axes[0], f"get_{axis}lim")()
    labels = getattr(figure.axes[0], f"get_{axis}ticklabels")()
    place = "xy".index(axis)
    labels = [label for label in labels if low <= label.get_position()[place] <= high]
    boxes = [label.get_window_extent() for label in labels]
    assert all(a.max[place] <= b.min[place] + 1 for a, b in pairwise(boxes))
    assert all(figure.bbox.y0 <= box.y0 and figure.bbox.x0 <= box.x0 for box in boxes)
    return [label.get_text() for label in labels]


@pytest.mark.parametrize(
    ("values", "scale"),
    [
        ([8, 16, 32, 64], "linear"),  # few: equal distances
        ([1, 2, 3, 1000], "linear"),
        ([10 ** (-4 + i / 20) for i in range(40)], "log"),
        ([10 ** (-9 + i / 5) for i in range(40)], "log"),
        ([0.1 + i / 997 for i in range(40)], "linear"),
        ([0, *range(100, 4000, 100)], "linear"),
        ([f"a long name of a tokenizer {i}" for i in range(12)], "linear"),
        ([f"v{i}" for i in range(40)], "linear"),
        ([f"v{i}" for i in range(150)], "linear"),
        (["null", 8, "true"], "linear"),
    ],
)
def test_the_values_of_a_key_have_room(tmp_path, values, scale):
    for i, value in enumerate(values):
        write_job(tmp_path / str(i), f"key={value}", bits=2.0 + i % 3)
    figure = figures(tmp_path)["sweep-key.png"]
    assert figure.axes[0].get_xscale() == scale
    assert len(ticks_of(figure, "x")) >= 2


def test_the_picture_of_a_key_marks_failed_and_diverged_jobs(tmp_path):
    for i in range(8):
        write_job(tmp_path / str(i), f"a={i}", bits=50.0 if i == 3 else 2 + i / 10)
    write_job(tmp_path / "8", "a=8", status="failed")
    figure = figures(tmp_path)["sweep-a.png"]
    marks = {line.get_label(): list(line.get_xdata()) for line in figure.axes[0].lines}
    assert marks["failed, NaN or above the axis"] == [3, 8]
    assert marks["lowest: job 0"] == [0]
    assert figure.axes[0].get_ylim()[1] < 3


def test_the_heat_map_has_a_number_per_cell_and_a_cross_where_a_job_failed(grid):
    figure = figures(grid)["sweep-heatmap.png"]
    texts = {text.get_position(): text.get_text() for text in figure.axes[0].texts}
    assert texts == {(0, 0): "2.500", (0, 1): "×", (1, 0): "2.300", (1, 1): "★ 2.200"}
    assert (ticks_of(figure, "x"), ticks_of(figure, "y")) == (["32", "64"], ["8", "16"])


@pytest.mark.parametrize("n", [3, 12, 60])
def test_the_values_of_a_heat_map_have_room(tmp_path, n):
    for i, half in product(range(n), range(2)):
        write_job(tmp_path / f"{i}-{half}", f"key=a tokenizer {i}", f"half={half}", bits=2.0 + i % 3)
    figure = figures(tmp_path)["sweep-heatmap.png"]
    assert ticks_of(figure, "x") == ["0", "1"]
    assert len(ticks_of(figure, "y")) >= min(n, 20)


def test_many_pairs_of_numbers_have_no_heat_map(tmp_path):
    for i in range(20):
        overrides = (f"model.rate={10 ** (-4 + i / 9)}", f"model.decay={i * 7 % 20 / 99}")
        write_job(tmp_path / str(i), *overrides, bits=2)
    assert [*figures(tmp_path)] == ["sweep-curves.png", "sweep-model.rate.png", "sweep-model.decay.png"]


def test_axis_limits_leave_out_jobs_that_diverged():
    def limits(*means: float, half: float = math.nan, margin: float = 0.0) -> tuple[float, float]:
        return axis_limits([(mean, half) for mean in means], margin)

    assert limits(2.0, 2.1, 2.2, 2.3, 50.0) == (2.0, 2.3)
    assert limits(2.0, 50.0) == (2.0, 50.0)
    assert limits(2.0, 2.1, 2.2, 50.0, half=0.5) == (1.5, 2.7)
    low, high = limits(*[3.0] * 5, margin=0.04)
    assert low < 3 < high


def test_names_of_pictures_are_short_and_differ_on_any_file_system():
    names: set[str] = set()
    for key in ("curves", "heatmap", "a/b", "a@b", "A-B", "日本", "~", "x" * 300):
        names.add(file_name(key, names))
    assert len({name.lower() for name in names}) == 8
    assert {"sweep-curves-2.png", "sweep-heatmap-2.png", "sweep-a-b.png", "sweep-key.png"} < names
    assert max(map(len, names)) < 100
    assert shorten("a\x1b[31m\n  b", 20) == "a [31m b"
    assert shorten("0123456789" * 3, 10) == "0123…56789"


def test_the_command_prints_a_table(grid, capsys, monkeypatch):
    monkeypatch.chdir(grid)
    assert main(["report", "."]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "4 jobs: 3 completed, 1 failed"
    assert printed[1].startswith("Lowest by validation bits per byte: job 3, data.max_length=64")
    columns = "job status data.max_length stem.dim seeds val_bits_per_byte tokens"
    assert printed[4].split() == columns.split()
    assert printed[5].split() == ["3", "★", "completed", "64", "16", "1", "2.2000", "1,000"]
    assert printed[8].split() == ["1", "failed", "32", "16", "0", "–", "–"]
    assert printed[9] == "    ValueError: stride=0 give >= 1"
    assert printed[-2:] == ["report  sweep.html", "table   sweep.csv"]
    assert (grid / "sweep.html").stat().st_size > 10_000


def test_the_command_refuses_a_folder_that_is_not_a_sweep(grid, capsys, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "outputs" / "run").mkdir(parents=True)
    (tmp_path / "outputs" / "run" / "result.json").write_text("{}")
    (grid / "multirun.yaml").touch()  # by Hydra
    for folder, message in (
        (tmp_path / "outputs" / "run", "is not the folder of a sweep: give one that"),
        (tmp_path / "none", "is not the folder of a sweep"),
        (tmp_path / "empty", "is not the folder of a sweep"),
        (grid.parent, "is not the folder of a sweep"),
        (grid / "0", "is not the folder of a sweep"),
        (grid / "0" / "result.json", "is not the folder of a sweep"),
    ):
        assert main(["report", str(folder)]) == 1
        printed = capsys.readouterr()
        assert printed.err.startswith("error: ")
        assert message in printed.err
        assert printed.out == ""
    assert not [*tmp_path.rglob("sweep*")]
    with pytest.raises(SystemExit, match=r"^2$"):
        main(["report"])
    assert "required: DIR" in capsys.readouterr().err


def test_a_report_needs_neither_torch_nor_a_display(grid):
    code = f"""
import sys
from pathlib import Path
from lit_gptdata.report.rows import read_sweep
read_sweep(Path({str(grid)!r}))
assert not {{"matplotlib", "jinja2", "hydra"}} & set(sys.modules)
from lit_gptdata.report.page import report_sweep
report_sweep(Path({str(grid)!r}))
assert not {{"torch", "lightning", "matplotlib.pyplot"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)
