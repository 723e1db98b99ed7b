"""The report of a sweep, on folders as jobs leave them, with figures that are known."""

from __future__ import annotations

import csv
import json
import math
import subprocess
import sys
from html.parser import HTMLParser
from itertools import pairwise, product
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib import rc_context
from matplotlib.text import Annotation

from lit_gptdata.cli.main import main
from lit_gptdata.report.axes import key_names, limits, scale_of, short, spread
from lit_gptdata.report.files import as_csv, text_table, write_report
from lit_gptdata.report.jobs import METRICS, canonical, natural, read_curves, read_jobs, read_sweep
from lit_gptdata.report.page import as_html
from lit_gptdata.report.plots import STYLE, draw_curves, draw_key, draw_map, file_name

HEAD = "step,epoch,tokens,train_loss,val_loss,val_bits_per_byte\n"
CONFIG = "data:\n  max_length: 64\n  stride: 32\n  corpus: [a.txt, b.txt]\nmodel:\n  rate: 0.001\n"


def leave(
    folder: Path,
    *overrides: str,
    bits: float | None = None,
    status: str = "completed",
    error: str | None = None,
    tokens: int | None = 1000,
    curve: dict[int, float] | None = None,
    **metrics: float,
) -> Path:
    """What a job leaves in its folder."""
    folder.mkdir(parents=True)
    if bits is not None:
        metrics |= {"val_bits_per_byte": bits, "val_loss": 2 * bits}
        curve = curve or {0: 6.0, tokens // 2: bits + 0.3, tokens * 3 // 4: bits + 0.1, tokens: bits}
    done = status == "completed"
    result = {
        "status": status,
        "error": error,
        "overrides": overrides,
        "tokens": tokens if done else None,
        "steps": 10 if done else None,
        "seconds": 1.5,
        "parameters": 77 if done else None,
        "metrics": metrics if done else {},
    }
    (folder / "result.json").write_text(json.dumps(result))
    (folder / "config.yaml").write_text(CONFIG)
    if curve:
        rows = "".join(f"{step},0,{float(step)},,{2 * y},{y}\n" for step, y in curve.items())
        (folder / "metrics.csv").write_text(HEAD + rows)
    return folder


def rows_of(folder: Path) -> list[dict[str, str]]:
    with open(folder / "sweep.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


class Page(HTMLParser):
    """What a page says, and what it would load."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.loads: list[str] = []
        self.images: list[dict[str, str]] = []
        self.rows: list[list[str]] = []
        self.text, self.in_cell = "", False
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.loads += [value for name, value in attrs if name in ("src", "href", "srcset", "data")]
        if tag == "img":
            self.images.append(dict(attrs))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self.in_cell = True

    def handle_endtag(self, tag):
        self.in_cell = self.in_cell and tag not in ("td", "th")

    def handle_data(self, data):
        self.text += data
        if self.in_cell:
            self.rows[-1][-1] += data


def page_of(folder: Path) -> Page:
    return Page((folder / "sweep.html").read_text(encoding="utf-8"))


@pytest.fixture
def grid(tmp_path) -> Path:
    """Two keys, four jobs, of which one failed: the best is job 2."""
    sweep = tmp_path / "2026-11-22" / "10-00-00"
    for i, (length, dim) in enumerate(product((32, 64), (8, 16))):
        words = ("+sweep=x", f"data.max_length={length}", f"stem.dim={dim}")
        if i == 1:
            leave(sweep / "1", *words, status="failed", error="ValueError: stride=0\ngive >= 1")
        else:
            leave(sweep / f"{i}", *words, bits=2.5 - i / 10, train_loss=4.0 + i)
    return sweep


def test_table_page_and_pictures_of_two_keys(grid):
    assert write_report(grid) == grid / "sweep.html"
    rows = rows_of(grid)
    assert [row["job"] for row in rows] == ["3", "2", "0", "1"]
    assert list(rows[0]) == [
        "job", "status", "data.max_length", "stem.dim", "tokens", "steps", "seconds", "parameters",
        "val_bits_per_byte", "val_loss", "train_loss", "error",
    ]  # fmt: skip
    assert list(rows[1].values()) == [
        "2", "completed", "64", "8", "1000", "10", "1.5", "77", "2.3", "4.6", "6.0", "",
    ]  # fmt: skip
    assert list(rows[3].values()) == [
        "1", "failed", "32", "16", "", "", "1.5", "", "", "", "", "ValueError: stride=0\ngive >= 1",
    ]  # fmt: skip

    page = page_of(grid)
    assert "4 jobs: 3 completed, 1 failed." in page.text
    assert "Best: job 3, data.max_length=64, stem.dim=16: 2.2000 validation bits per byte" in page.text
    assert "Each trained on 1,000 tokens" in page.text
    assert "All jobs: sweep=x" in page.text
    assert "2026-11-22/10-00-00" in page.text
    head, first, *_ = page.rows
    assert dict(zip(head, first, strict=True)) == {
        "job": "3", "status": "completed", "data.max_length": "64", "stem.dim": "16",
        "val_bits_per_byte": "2.2000", "tokens": "1,000", "steps": "10", "seconds": "1.5",
        "parameters": "77", "val_loss": "4.4000", "train_loss": "7.0000",
    }  # fmt: skip
    assert page.rows[-2][:4] == ["1", "failed", "32", "16"]
    assert page.rows[-1] == ["ValueError: stride=0ValueError: stride=0\ngive >= 1"]  # short, then whole

    pictures = sorted(path.name for path in grid.glob("*.png"))
    assert pictures == [
        "sweep-curves.png", "sweep-data.max_length.png", "sweep-heatmap.png", "sweep-stem.dim.png",
    ]  # fmt: skip
    assert len(page.images) == 4
    for image in page.images:
        assert len(image["alt"]) > 40
        assert int(image["width"]) > 300
    for path in grid.glob("*.png"):
        assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_the_page_loads_nothing(grid):
    html = write_report(grid).read_text()
    page = Page(html)
    assert len(page.loads) == 4
    assert all(source.startswith("data:image/png;base64,") for source in page.loads)
    assert "default-src 'none'" in html
    for outside in ("http://", "https://", "url(", "@import", "import(", "fetch(", "<link"):
        assert outside not in html


def test_a_report_made_again_is_the_same_and_leaves_no_old_pictures(grid):
    write_report(grid)
    before = {path.name: path.read_bytes() for path in grid.iterdir() if path.is_file()}
    (grid / "sweep-mine.png").write_bytes(b"\x89PNG, of my own making")
    write_report(grid)
    for name, content in before.items():
        assert (grid / name).read_bytes() == content
    for number in (0, 1):
        for path in (grid / f"{number}").iterdir():
            path.unlink()
        (grid / f"{number}").rmdir()
    write_report(grid)  # of max_length=64 alone
    assert {path.name for path in grid.iterdir() if path.is_file()} == {
        "sweep.csv", "sweep.html", "sweep-curves.png", "sweep-stem.dim.png", "sweep-mine.png",
    }  # fmt: skip


def test_what_jobs_wrote_is_text_and_nothing_else(tmp_path):
    values = [
        "<script>alert(1)</script>", "'a,b'", '"say ""x"""', "日本語 🎉", "x" * 300, "$\\frac{a$", "_h",
    ]  # fmt: skip
    for i, value in enumerate(values):
        leave(tmp_path / str(i), f"lit/data@data={value}", f"++a.b/c={i}", bits=2 + i / 10)
    leave(
        tmp_path / "7", "lit/data@data=\ud800", "~trainer.x", status="failed",
        error='<img src="http://x.test/a.png"> & \x1b[31m\nmore',
    )  # fmt: skip
    html = write_report(tmp_path).read_text(encoding="utf-8")
    page = Page(html)
    assert page.tags.count("script") == 1  # ours
    assert page.tags.count("img") == len(page.loads) == 4  # curves, and a key each
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html
    assert "&lt;img src=&quot;http://x.test/a.png&quot;&gt; &amp; [31m" in html
    assert "日本語 🎉" in html
    rows = rows_of(tmp_path)
    found = [row["lit/data@data"] for row in rows]
    assert found == [values[0], "a,b", 'say ""x""', *values[3:], "?"]
    assert [row["trainer.x"] for row in rows] == ["default"] * 7 + ["removed"]
    assert [row["a.b/c"] for row in rows] == [*map(str, range(7)), "default"]
    names = {path.name for path in tmp_path.glob("*.png")}
    assert {"sweep-lit-data-data.png", "sweep-a.b-c.png", "sweep-trainer.x.png"} < names
    assert "\x1b" not in text_table(read_sweep(tmp_path))


def test_jobs_that_were_killed_or_left_rubbish(tmp_path):
    leave(tmp_path / "0", "data.max_length=16", bits=2.4)
    leave(tmp_path / "1", "data.max_length=32", status="running", curve={0: 6.0, 500: 3.0})
    whole = HEAD + "0,0,0.0,,12.0,6.0\n5,0,500.0,,5.0,2.5\n"
    (tmp_path / "1" / "metrics.csv").write_text(whole + "9,0,900.0,,2.2,1.1")  # of 1.1875, or so
    for i, content in enumerate((b'{"status": "comp', b"\xff\x00\xfe", b"[1, 2]", b"[" * 100_000), 2):
        leave(tmp_path / f"{i}", bits=1.0)
        (tmp_path / f"{i}" / "result.json").write_bytes(content)
    (tmp_path / "6").mkdir()
    (tmp_path / "6" / "config.yaml").write_text("data:\n  max_length: 128\n")
    (tmp_path / "7").mkdir()
    (tmp_path / "7" / "config.yaml").write_text("a: [\n")
    leave(tmp_path / "8", "data.max_length=8", status="stopped")
    leave(tmp_path / "9", "data.max_length=4", bits=math.nan)
    (tmp_path / "empty").mkdir()
    write_report(tmp_path)
    rows = {row["job"]: row for row in rows_of(tmp_path)}
    assert list(rows) == ["0", "9", "8", *"1234567"]  # completed, stopped, unfinished
    assert {job for job, row in rows.items() if row["status"] == "unfinished"} == set("1234567")
    assert rows["1"]["val_bits_per_byte"] == "2.5"
    assert rows["1"]["tokens"] == "500"
    for job in "235":
        assert rows[job]["error"].startswith("result.json cannot be read: ")
        assert rows[job]["data.max_length"] == "64"  # as its config says
    assert rows["4"]["error"] == "result.json holds no JSON object"
    assert rows["6"]["data.max_length"] == "128"
    assert rows["6"]["error"].startswith("no result.json")
    assert rows["7"]["data.max_length"] == ""
    text = page_of(tmp_path).text
    assert "10 jobs: 2 completed, 1 stopped, 7 unfinished" in text
    assert "Of a job that has not completed: the last figures that it logged." in text
    assert "did not end: killed, or still running" in text
    assert "it has no finite val_bits_per_byte" in text
    assert "Best: job 0" in text


def test_a_metrics_file_cut_anywhere_is_read_as_far_as_it_is_whole(tmp_path):
    points = [(0.0, 5.5), (100.0, 4.25), (200.0, 3.125)]
    whole = HEAD + "".join(f"1,0,{x},,,{y}\n9,0,{x + 50},7.5,,\n" for x, y in points)
    for end in range(len(whole) + 1):
        (tmp_path / "metrics.csv").write_bytes(whole[:end].encode())
        found = read_curves(tmp_path / "metrics.csv")
        lines = max(0, whole[:end].count("\n") - 1)
        assert found["val_bits_per_byte"] == points[: (lines + 1) // 2]
        assert found["train_loss"] == [(x + 50, 7.5) for x, _ in points[: lines // 2]]
        assert found["val_loss"] == []
    (tmp_path / "metrics.csv").write_text(
        f"{HEAD}1,0,1.0,nan,,2\n1,0,x,,,3\n,,,,\n1,0,inf,,,3\n1,0,0,,,4\n"
    )
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
def test_what_jobs_are_compared_by(tmp_path, metrics, name):
    for i, found in enumerate(metrics):
        leave(tmp_path / str(i), f"a={i}", **found)
    sweep = read_sweep(tmp_path)
    assert sweep.metric == list(METRICS)[name]
    assert [job.name for job in sweep.jobs] == ["0", "1"]
    assert sweep.best is (sweep.jobs[0] if metrics[0] else None)
    write_report(tmp_path)
    assert (tmp_path / "sweep-a.png").exists() == bool(metrics[0])


def test_without_any_result_there_is_a_page(tmp_path):
    for i in range(3):
        leave(
            tmp_path / str(i), f"data.max_length={i}", status="failed", error="RuntimeError: no memory"
        )
    write_report(tmp_path)
    page = page_of(tmp_path)
    assert "3 jobs: 3 failed." in page.text
    assert "No job has a result yet." in page.text
    assert page.text.count("RuntimeError: no memory") == 3
    assert not list(tmp_path.glob("*.png"))
    assert "RuntimeError: no memory" in text_table(read_sweep(tmp_path))


def test_results_of_jobs_whose_settings_are_not_known(tmp_path):
    for i in range(4):
        folder = leave(tmp_path / str(i), f"a={i}", f"b={i % 2}", bits=2.0 if i > 1 else None)
        if i > 1:
            result = json.loads((folder / "result.json").read_text())
            (folder / "result.json").write_text(json.dumps(result | {"overrides": None}))
    write_report(tmp_path)
    assert [row["a"] for row in rows_of(tmp_path)] == ["", "", "0", "1"]
    assert not (tmp_path / "sweep-heatmap.png").exists()


def test_one_job(tmp_path):
    leave(tmp_path / "0", "model=nano", bits=2.5)
    write_report(tmp_path)
    page = page_of(tmp_path)
    assert "1 job: 1 completed." in page.text
    assert "Best: job 0: 2.5000" in page.text
    assert [path.name for path in tmp_path.glob("*.png")] == ["sweep-curves.png"]


def test_unequal_budgets_are_said(tmp_path):
    leave(tmp_path / "0", "a=1", bits=2.5, tokens=1000)
    leave(tmp_path / "1", "a=2", bits=2.4, tokens=1008)
    assert "Trained on 1,000 to 1,008 tokens.</p>" in as_html(read_sweep(tmp_path), [])
    leave(tmp_path / "2", "a=3", bits=2.3, tokens=2000)
    told = as_html(read_sweep(tmp_path), [])
    assert "Trained on 1,000 to 2,000 tokens. <strong>Not the same budget" in told


def test_a_value_comes_from_the_override_or_else_from_the_config(tmp_path):
    leave(tmp_path / "0", "data.max_length=64", "model.rate=1e-3", "model=nano", "flag=True", bits=2.0)
    leave(tmp_path / "1", "+data.stride=8", "data.corpus=[c.txt]", "flag=true", bits=2.1)
    sweep = read_sweep(tmp_path)
    assert sweep.keys == ["model", "data.stride", "data.corpus"]
    assert sweep.common == ["flag=True"]
    assert [sweep.jobs[0].value(key) for key in sweep.keys] == ["nano", "32", "[a.txt,b.txt]"]
    assert [sweep.jobs[1].value(key) for key in sweep.keys] == ["default", "8", "[c.txt]"]
    assert sweep.jobs[0].value("model.rate") == "1e-3"
    assert sweep.jobs[1].value("model.rate") == "0.001"


def test_jobs_are_found_below_and_in_the_order_of_their_numbers(tmp_path):
    for name in ("10", "9", "b/2", "b/11", ".hidden/1", "9/checkpoints/3"):
        leave(tmp_path / name, "a=1")
    assert [job.name for job in read_jobs(tmp_path)] == ["9", "10", "b/2", "b/11"]


def test_a_key_that_is_named_like_a_column(tmp_path):
    for i in range(2):
        leave(tmp_path / str(i), f"tokens={i}", bits=2.0 + i)
    head, first, _ = csv.reader(as_csv(read_sweep(tmp_path)).splitlines())
    assert len(set(head)) == len(head)
    assert first[head.index("tokens")] == "1000"
    assert first[head.index("override tokens")] == "0"


def sweep_of(folder: Path, n: int, n_keys: int) -> Path:
    """n jobs of distinct settings; one failed early, one diverged, one has not begun to validate."""
    for i in range(n):
        values = (2 ** (i % 5 + 3), 10 ** -(1 + i / n * 3), ("learned", "sinusoidal")[i % 2], i)[:n_keys]
        words = [f"some.key_{k}={value}" for k, value in enumerate(values)]
        if i == 7:
            leave(folder / str(i), *words, status="failed", curve={0: 6.0, 100: 5.0})
        elif i == 9:
            leave(folder / str(i), *words, status="running")
        else:
            leave(folder / str(i), *words, bits=40.0 if i == 3 else 2.0 + (i * 7 % n) / 60)
    return folder


@pytest.mark.parametrize(("n", "n_keys"), [(1, 1), (4, 2), (12, 3), (40, 4)])
def test_every_curve_is_labelled_and_every_label_is_seen(tmp_path, n, n_keys):
    sweep = read_sweep(sweep_of(tmp_path, n, n_keys))
    with rc_context(STYLE):
        figure = draw_curves(sweep).figure
        figure.draw_without_rendering()
    labels = [a for axes in figure.axes for a in axes.texts if isinstance(a, Annotation)]
    named = {a.get_text().removeprefix("★ ").partition(":")[0] for a in labels}
    drawn = {job.name for job in sweep.jobs if job.curves["val_bits_per_byte"]}
    assert len(drawn) == n - (n > 9)
    assert named == drawn | {"job"}
    (best,) = (a for a in labels if a.get_text().startswith("★"))
    assert best.get_text().startswith(f"★ {sweep.best.name}")
    room = figure.bbox
    boxes = [super(Annotation, a).get_window_extent() for a in labels]  # of the text alone
    for box in boxes:
        assert room.x0 <= box.x0
        assert box.x1 <= room.x1
        assert room.y0 <= box.y0
        assert box.y1 <= room.y1
    boxes.sort(key=lambda box: box.y0)
    assert all(a.y1 <= b.y0 + 1 for a, b in pairwise(boxes))


def test_of_a_thousand_curves_the_best_are_drawn(tmp_path, monkeypatch):
    monkeypatch.setattr("lit_gptdata.report.plots.MOST", 3)
    figure, title, _ = draw_curves(read_sweep(sweep_of(tmp_path, 6, 1)))
    assert title == "Learning curves of 3 of 6 jobs, best first"
    assert len(figure.axes[0].lines) == 3


def text_boxes(figure) -> list:
    figure.draw_without_rendering()
    texts = [text for text in figure.axes[0].get_xticklabels() if text.get_text()]
    return [text.get_window_extent() for text in texts]


@pytest.mark.parametrize(
    "values",
    [
        [8, 16, 32, 64],
        [1, 2, 3, 1000],
        [10 ** (-4 + i / 20) for i in range(40)],
        [0.1 + i / 997 for i in range(40)],
        [f"a long name of a tokenizer {i}" for i in range(12)],
        [f"v{i}" for i in range(40)],
        [f"v{i}" for i in range(150)],
        ["null", 8, "true"],
    ],
)
def test_the_values_of_a_key_have_room(tmp_path, values):
    for i, value in enumerate(values):
        leave(tmp_path / str(i), f"key={value}", bits=2.0 + i % 3)
    with rc_context(STYLE):
        figure = draw_key(read_sweep(tmp_path), "key").figure
    boxes = text_boxes(figure)
    assert len(boxes) >= 2
    assert all(a.x1 <= b.x0 + 1 for a, b in pairwise(boxes))
    for box in boxes:
        assert figure.bbox.y0 <= box.y0


def test_the_map_has_a_figure_in_each_cell_and_none_where_a_job_failed(grid):
    with rc_context(STYLE):
        figure = draw_map(read_sweep(grid)).figure
    told = {text.get_position(): text.get_text() for text in figure.axes[0].texts}
    assert told == {(0, 0): "2.500", (0, 1): "×", (1, 0): "2.300", (1, 1): "2.200"}
    assert [t.get_text() for t in figure.axes[0].get_xticklabels()] == ["32", "64"]
    assert [t.get_text() for t in figure.axes[0].get_yticklabels()] == ["8", "16"]


@pytest.mark.parametrize("n", [3, 12, 60])
def test_the_values_of_a_map_have_room(tmp_path, n):
    for i, half in product(range(n), range(2)):
        leave(tmp_path / f"{i}-{half}", f"key=name of a tokenizer {i}", f"half={half}", bits=2.0 + i % 3)
    with rc_context(STYLE):
        figure = draw_map(read_sweep(tmp_path)).figure
    boxes = text_boxes(figure)
    assert len(boxes) >= min(n, 20)
    assert all(a.x1 <= b.x0 + 1 for a, b in pairwise(boxes))
    assert min(box.y0 for box in boxes) >= figure.bbox.y0


def test_trials_of_two_numbers_are_points_on_a_map(tmp_path):
    for i in range(20):
        leave(
            tmp_path / str(i),
            f"model.rate={10 ** (-4 + i / 9)}",
            f"model.decay={i * 7 % 20 / 99}",
            bits=2,
        )
    with rc_context(STYLE):
        axes = draw_map(read_sweep(tmp_path)).figure.axes[0]
    assert len(axes.collections[0].get_offsets()) == 20
    assert axes.get_xscale() == "log"
    assert axes.get_yscale() == "linear"


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        (["8", "16", "64"], "log"),
        (["10", "20", "30"], "linear"),
        (["0.0001", "1e-2"], "log"),
        (["0", "1000"], "linear"),
        (["-8", "8"], "linear"),
        (["8", "default"], "categories"),
        (["nan", "1"], "categories"),
    ],
)
def test_scales(values, kind):
    scale = scale_of([*values, None])
    assert scale.kind == kind
    places = [scale.positions[canonical(value)] for value in values]
    assert sorted(places) == sorted(scale.labels)
    if kind != "categories":
        assert places == [float(value) for value in values]


@given(st.lists(st.floats(0, 1), min_size=1, max_size=60), st.floats(0.001, 0.02))
def test_spread_keeps_order_and_distance(wanted, gap):
    wanted = sorted(wanted)
    places = spread(wanted, gap, top=1 + 60 * gap)
    assert len(places) == len(wanted)
    assert all(b - a > gap * 0.999 for a, b in pairwise(places))
    assert places[0] >= 0
    assert places[-1] <= 1 + 60 * gap
    if all(b - a > gap for a, b in pairwise(wanted)):
        assert places == pytest.approx(wanted, abs=60 * gap)


def test_limits_leave_out_what_diverged():
    assert limits([2.0, 2.1, 2.2, 2.3, 50.0], margin=0) == (2.0, 2.3)
    assert limits([2.0, 50.0], margin=0) == (2.0, 50.0)
    low, high = limits([3.0] * 5)
    assert low < 3 < high


def test_names():
    assert key_names(["data.max_length", "a.x", "b.x", "x"]) == {
        "data.max_length": "max_length", "a.x": "a.x", "b.x": "b.x", "x": "x",
    }  # fmt: skip
    names = set()
    for key in ("curves", "heatmap", "a/b", "a@b", "A-B", "日本", "~", "x" * 300):
        names.add(file_name(key, names))
    assert len({name.lower() for name in names}) == 8
    assert {"sweep-curves-2.png", "sweep-heatmap-2.png", "sweep-a-b.png", "sweep-key.png"} < names
    assert max(map(len, names)) < 100
    assert sorted(["b10", "9" * 5000, "b9"], key=natural) == ["9" * 5000, "b9", "b10"]
    assert short("a\x1b[31m\n  b", 20) == "a [31m b"
    assert short("0123456789" * 3, 10) == "012345…789"


def test_the_command(grid, capsys, monkeypatch):
    monkeypatch.chdir(grid)
    assert main(["report", "."]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "4 jobs: 3 completed, 1 failed"
    assert printed[2].split() == [
        "job", "status", "data.max_length", "stem.dim", "val_bits_per_byte", "tokens",
    ]  # fmt: skip
    assert printed[3].split() == ["3", "completed", "64", "16", "2.2000", "1,000"]
    assert printed[6].split() == ["1", "failed", "32", "16", "–", "–"]
    assert printed[7] == "    ValueError: stride=0 give >= 1"
    assert printed[-2:] == ["report  sweep.html", "table   sweep.csv"]
    assert (grid / "sweep.html").stat().st_size > 10_000


def test_the_command_says_what_is_no_sweep(grid, capsys, tmp_path):
    (tmp_path / "empty").mkdir()
    for folder, says in (
        (tmp_path / "none", "there is no folder"),
        (tmp_path / "empty", "holds no job of a sweep"),
        (grid / "0", f"is the folder of one job: give the folder of its sweep, {grid}"),
        (grid / "0" / "result.json", "there is no folder"),
    ):
        assert main(["report", str(folder)]) == 1
        printed = capsys.readouterr()
        assert printed.err.startswith("lit-gptdata report: ")
        assert says in printed.err
        assert printed.out == ""
    with pytest.raises(SystemExit) as stopped:
        main(["report"])
    assert stopped.value.code == 2
    assert "required: DIR" in capsys.readouterr().err


def test_reading_a_sweep_loads_no_torch_and_draws_without_a_display(grid):
    code = f"""
import sys
from pathlib import Path
from lit_gptdata.report.files import write
from lit_gptdata.report.jobs import read_sweep
assert not {{"matplotlib", "numpy", "hydra", "omegaconf"}} & set(sys.modules)
sweep = read_sweep(Path({str(grid)!r}))
assert "matplotlib" not in sys.modules
write(sweep)
assert not {{"torch", "lightning", "matplotlib.pyplot"}} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
