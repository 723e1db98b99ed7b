"""The commands and configs of a mixture, run as a user runs them, on three small texts."""

from __future__ import annotations

import json
import re
import shlex
from itertools import pairwise
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from hydra.utils import instantiate

from lit_gptdata import GPTDataModule
from lit_gptdata.cli.main import main
from lit_gptdata.cli.overrides import build_data, compose_config
from lit_gptdata.cli.show import as_ranges
from lit_gptdata.report import usage
from lit_gptdata.text.corpus import open_corpus
from lit_gptdata.tokens.shards import Tokens
from lit_gptdata.windows.dataset import Windows
from lit_gptdata.windows.identity import trained_ranges
from lit_gptdata.windows.mixture import EndlessOrder, Mixture, Stage, epochs_of, taken_windows
from lit_gptdata.windows.sampler import windows_of_batch
from lit_gptdata.windows.steps import Position, RunSegment, Steps
from tests.cli.test_cli import parse_windows, run
from tests.training.run_train import run_train

ROOT = Path(__file__).parents[2]
OPTIONS = {"max_length": 8, "stride": 6, "batch_size": 4, "build_workers": 1, "engine": "tiktoken"}
STAGES = "[{tokens: 200, weights: {web: 0.8, code: 0.2}}, {weights: {web: 0.3, code: 0.7}}]"
WORDS = "the old man and a river under seven bright stars sang of home while rain fell on roads"


def rows(n: int, first: int) -> str:
    """Rows of jsonl with different texts of 3 to 40 words."""
    words = WORDS.split()
    texts = [" ".join(words[(i * k) % len(words)] for k in range(3 + i % 38)) for i in range(first, n)]
    return "".join(json.dumps({"text": text}) + "\n" for text in texts)


def mixture(folder: Path, *more: str, web: str = "{path: %s, weight: 3}") -> list[str]:
    """Overrides for two sources of text, and a text that is only validated."""
    corpus = f"{{web: {web % (folder / 'web.jsonl')}, code: {{path: {folder}/code, weight: 1}}}}"
    corpus = corpus.replace(", weight: 1", "") if "weight" not in web else corpus
    options = [f"data.{name}={value}" for name, value in OPTIONS.items()]
    options += [f"data.val_corpus={{wiki: {folder}/wiki.txt}}", f"data.data_dir={folder}/data"]
    return ["data=sources", f"data.corpus={corpus}", *options, *more]


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("mixture")
    (folder / "web.jsonl").write_text(rows(60, 0))
    (folder / "code").mkdir()
    for number in range(5):
        code = f"def f{number}(x):\n    return x + {number}\n"
        (folder / "code" / f"{number}.txt").write_text(code * 9)
    (folder / "wiki.txt").write_text("Wind and water shaped this valley. " * 20)
    assert main(["prepare", *mixture(folder)]) == 0
    return folder


def opened(folder: Path, *more: str, **changes: str) -> GPTDataModule:
    data = build_data(mixture(folder, *more, **changes))
    data.setup()
    return data


def numbers(text: str) -> list[float]:
    return [float(number.replace(",", "")) for number in re.findall(r"[\d,.]*\d", text)]


def test_print_shows_a_row_for_each_source(texts):
    data = opened(texts)
    head, web, code, wiki, *rest = str(data).splitlines()[1:]
    assert head.split() == [
        "source", "tokens", "share", "epochs", "val", "tokens", "test", "tokens", "store", "text",
    ]  # fmt: skip
    assert {line.index(" tok") for line in (head,)} == {head.index(" tok")}
    n = len(data.train_windows)
    for line, name, share in ((web, "web", 75), (code, "code", 25)):
        source = data.sources[name]
        begin, end = source.split.val
        assert line.split()[:2] == [name, f"{source.store.n_tokens:,}"]
        epochs = f"{n * share / 100 / len(source.train_windows):.2f}"
        assert line.split()[2:6] == [f"{share}", "%", epochs, f"{end - begin:,}"]
        assert source.store.fingerprint[:8] in line
    assert wiki.split()[2] == wiki.split()[1]  # all of its tokens are val tokens
    assert wiki.endswith("wiki.txt' (val_corpus)")
    assert rest[0] == f"  epochs   of each source in one epoch of {n} windows of 8 every 6 tokens"
    assert "warning" not in str(data)


def test_info_counts_the_epochs_that_the_budget_takes_and_warns_above_four(texts, capsys):
    data = opened(texts)
    size = len(data.sources["web"].train_windows)
    printed = run(capsys, "info", *mixture(texts, f"max_tokens={8 * size * 4}"))
    assert "3.00" in re.search("  web .*", printed)[0]
    assert "warning" not in printed
    assert "of each source in " in printed
    printed = run(capsys, "info", *mixture(texts, "trainer.max_steps=1000", "trainer.devices=2"))
    assert "64,000 training tokens" in printed
    assert re.search("  warning  web, code: over 4 epochs; add text", printed)
    for source in [*data.sources.values(), *data._data.val_corpus.values()]:
        assert str(source.store.path) in printed
    assert "bytes per token" in printed


def test_the_shares_of_stages_have_a_column_each_and_epochs_count_all_stages(texts, capsys):
    options = mixture(texts, f"data.stages={STAGES}", "max_tokens=1_000", web="%s")
    printed = run(capsys, "info", *options)
    head, web, code = printed.splitlines()[1:4]
    assert re.search("share +share from 200 +epochs", head)
    assert re.search("80 % +30 % ", web)
    assert re.search("20 % +70 % ", code)
    sizes = {name: len(s.train_windows) for name, s in opened(texts).sources.items()}
    expected = (200 * 0.8 + 800 * 0.3) / 8 / sizes["web"]
    assert f" {expected:.2f} " in web
    weights = [{"web": 8, "code": 2}, {"web": 3, "code": 7}]
    assert epochs_of(1000, 8, [200], weights, sizes)["web"] == pytest.approx(expected)
    assert epochs_of(100, 8, [200], weights, sizes)["code"] == pytest.approx(20 / 8 / sizes["code"])


def test_info_plot_draws_target_and_realized_shares(texts, capsys, monkeypatch):
    drawn = []
    stages = f"data.stages={STAGES}"
    with monkeypatch.context() as patched:
        save = "matplotlib.figure.Figure.savefig"
        patched.setattr(save, lambda figure, *args, **options: drawn.append(figure))
        run(capsys, "info", "--plot", "a.png", *mixture(texts, stages, "max_tokens=8_000", web="%s"))
    shares, lengths = drawn[0].axes
    assert "documents exceed max_length=8" in lengths.get_title()
    targets = [line.get_ydata().tolist() for line in shares.lines]
    assert sorted(targets) == [pytest.approx([0.2, 0.2, 0.7, 0.7]), pytest.approx([0.8, 0.8, 0.3, 0.3])]
    realized = np.array([step.get_data().values for step in shares.patches])  # (2, intervals)
    assert np.allclose(realized.sum(axis=0), 1)
    assert abs(realized[:, 5:].mean(axis=1) - [0.7, 0.3]).max() < 0.02  # code has the larger share
    run(capsys, "info", "--plot", "a.png", *mixture(texts, "max_tokens=null"))
    assert Path("a.png").read_bytes().startswith(b"\x89PNG")


def test_many_sources_share_a_color(texts, tmp_path):
    windows = {f"s{i}": opened_windows(40 + i) for i in range(15)}
    mixed = Mixture(windows, [Stage(0, (1.0,) * 15)], seed=0)
    stores = dict.fromkeys(windows, opened(texts).sources["web"].store)
    usage.draw_shares(mixed, 4000, stores, tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 10_000


def opened_windows(n: int) -> Windows:
    return Windows(Tokens([np.arange(n, dtype=np.uint16)]), begin=0, end=n, max_length=4, stride=4)


def test_show_names_the_source_of_each_window_and_its_place_in_that_source(texts, capsys):
    data = opened(texts)
    names, windows = data.train_windows.locate(data.windows_at(5))
    inputs, _ = data.batch_at(5)
    printed = run(capsys, "show", "step=5", *mixture(texts))
    found = re.findall(r"^window ([\d,]+) of (\w+), tokens", printed, re.MULTILINE)
    assert found == [(f"{w:,}", name) for w, name in zip(windows, names, strict=True)]
    assert len(set(names)) == 2
    rows = parse_windows(re.sub(" of (web|code),", ",", printed))
    for (_, start, end, origin, text), name, ids in zip(rows, names, inputs.tolist(), strict=True):
        store = data.sources[name].store
        assert store.tokens[start:end].tolist() == ids
        assert origin.startswith(str(store.place(start)))
        assert text.replace("·", "") == data.tokenizer.decode(ids)
    position = len(data.train_windows) + 3  # positions of a mixture never end
    name, window = (found[0] for found in data.train_windows.locate([position]))
    assert f"window {window:,} of {name}" in run(capsys, "show", f"window={position}", *mixture(texts))


def test_verify_checks_every_store(texts, capsys):
    printed = run(capsys, "verify", *mixture(texts)).splitlines()
    assert len(printed) == 3
    assert all(line.endswith("every SHA-256 matches") for line in printed)


@pytest.mark.parametrize("stages", [True, False])
def test_publish_prints_overrides_that_train_on_the_same_batches(texts, capsys, tmp_path, stages):
    given = mixture(texts, f"data.stages={STAGES}", web="%s") if stages else mixture(texts)
    words = shlex.split(run(capsys, "publish", f"{tmp_path}/pub", *given))
    assert words[0] == "data=sources"
    options = [word for word in given if re.match("data.(max|stride|batch)", word)]
    published = [*words, f"data.data_dir={tmp_path}/data", *options]
    run(capsys, "prepare", *published)
    data, expected = build_data(published), build_data(given)
    data.setup(), expected.setup()
    for step in (0, 7, 40):
        assert torch.equal(data.batch_at(step)[0], expected.batch_at(step)[0])
    assert len(data.val_windows) == len(expected.val_windows)
    again = run(capsys, "publish", f"{tmp_path}/pub", *published)  # published sources keep their URL
    assert shlex.split(again) == words


def documents_of(data: GPTDataModule, steps: int, ranks: int = 1) -> dict[str, tuple[int, set[int]]]:
    """Token by token: how many, and of which documents, each source has in the first batches."""
    found = {name: [0, set()] for name in data.sources}
    end_of_text = data.tokenizer.end_of_document
    separators = {n: np.cumsum(s.store.tokens[:] == end_of_text) for n, s in data.sources.items()}
    for step in range(steps):
        for rank in range(ranks):
            indices = data.windows_at(step, rank=rank, world_size=ranks)
            names, windows = ["corpus"] * len(indices), indices
            if isinstance(data.train_windows, Mixture):
                names, windows = data.train_windows.locate(indices)
            for name, window in zip(names, windows, strict=True):
                source = data.sources[name]
                ranges = zip(*source.train_windows.ranges([window]), strict=True)
                found[name][0] += data.max_length
                ids = np.concatenate([np.arange(begin, end) for begin, end in ranges])
                before = separators[name][ids] - (source.store.tokens[:][ids] == end_of_text)
                found[name][1] |= set((1 + before).tolist())
    return {name: (tokens, documents) for name, (tokens, documents) in found.items()}


def parsed(printed: str) -> dict[str, tuple[int, set[int]]]:
    """The same from `seen --json`."""
    return {
        source["source"]: (
            source["tokens"],
            {d for first, last in source["documents"] for d in range(first, last + 1)},
        )
        for source in json.loads(printed)["sources"]
    }


@pytest.mark.parametrize("step", [0, 1, 9, 60])
def test_seen_lists_tokens_and_documents_of_each_source(texts, capsys, step):
    data = opened(texts)
    printed = run(capsys, "seen", f"step={step}", "--json", *mixture(texts))
    assert parsed(printed) == documents_of(data, step)
    report = json.loads(printed)
    assert report["tokens"] == step * 4 * 8
    shares = {source["source"]: source["share"] for source in report["sources"]}
    if step >= 60:
        assert shares == pytest.approx({"web": 0.75, "code": 0.25}, abs=0.02)
        sizes = [len(source.train_windows) for source in data.sources.values()]
        epochs = [source["tokens"] / 8 / n for source, n in zip(report["sources"], sizes, strict=True)]
        assert [source["epochs"] for source in report["sources"]] == epochs


@pytest.mark.parametrize(
    "options",
    [
        ["data.stride=13"],  # tokens between the windows
        ["data.drop_last=false", "data.batch_size=7"],
        ["data.shuffle=false"],
        ["data.seed=5", "data.batch_size=11"],
        ["data.windows=packed"],
    ],
)
def test_seen_is_exact_for_other_windows_and_orders(texts, capsys, options):
    data = opened(texts, *options)
    for step in (3, 90):
        printed = run(capsys, "seen", f"step={step}", "--json", *mixture(texts, *options))
        assert parsed(printed) == documents_of(data, step)


def test_seen_counts_all_ranks_of_the_config(texts, capsys):
    ranks = ["trainer.devices=2", "data.batch_size=2"]
    printed = run(capsys, "seen", "step=9", "--json", *mixture(texts, *ranks))
    assert printed == run(capsys, "seen", "step=9", "--json", *mixture(texts))
    assert parsed(printed) == documents_of(opened(texts, "data.batch_size=2"), 9, ranks=2)


@pytest.mark.parametrize(("step", "shuffle"), [(0, "true"), (5, "true"), (90, "true"), (90, "false")])
def test_seen_works_for_one_corpus(texts, capsys, step, shuffle):
    options = [*mixture(texts)[3:], f"data.corpus={texts}/web.jsonl", f"data.shuffle={shuffle}"]
    run(capsys, "prepare", "data=files", *options)
    data = build_data(["data=files", *options])
    data.setup()
    printed = run(capsys, "seen", f"step={step}", "--json", "data=files", *options)
    assert parsed(printed) == documents_of(data, step)


def test_seen_prints_a_table_with_the_first_documents(texts, capsys):
    head, columns, web, code = run(capsys, "seen", "step=60", *mixture(texts)).splitlines()
    assert head == "before step 60: 1,920 training tokens"
    assert columns.split() == ["source", "steps", "tokens", "share", "epochs", "documents"]
    assert web.startswith("web")
    assert "  75.00 %  " in web
    assert code.split()[-1] == "1-5"
    assert "5 of 5: 1-5" in code
    assert as_ranges([(1, 120), (125, 125)]) == "1-120, 125"
    assert as_ranges([(i, i) for i in range(1, 20, 2)]) == "1, 3, 5, 7, 9, 11, 13, 15, …"
    assert as_ranges([]) == "none"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give step=N or the checkpoint of a run"),
        (["window=3"], "give step=N"),
        (["step=-1"], "step must be an integer ≥ 0, got -1"),
        (["a.ckpt", "data=mixture"], "a.ckpt has the options of its run: remove data=mixture"),
        (["a.ckpt", "b.ckpt"], "remove b.ckpt"),
        (["a.ckpt"], "a.ckpt"),
        (["step=3", "data.seed=null"], "seed=None"),
    ],
)
def test_seen_says_what_is_wrong(texts, capsys, words, message):
    rest = mixture(texts) if "data.seed=null" in words else []
    assert message in run(capsys, "seen", *words, *rest, expect=1)


class Still(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def training_step(self, batch, batch_idx):
        return self.weight.sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def train(data: GPTDataModule, steps: int, resume: str | None = None) -> str:
    trainer = L.Trainer(
        max_steps=steps, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Still(), datamodule=data, ckpt_path=resume, weights_only=True)
    trainer.save_checkpoint(f"{steps}.ckpt")
    return f"{steps}.ckpt"


@pytest.mark.filterwarnings("ignore")
def test_seen_follows_the_history_of_a_checkpoint(texts, capsys):
    first = train(opened(texts), 30)
    second = train(opened(texts, "data.batch_size=8"), 50, first)
    data = GPTDataModule.load_from_checkpoint(second, weights_only=True)
    data.setup()
    printed = run(capsys, "seen", second, "--json")
    assert parsed(printed) == documents_of(data, 50)
    assert json.loads(printed)["tokens"] == 8 * (30 * 4 + 20 * 8)
    early = run(capsys, "seen", "step=33", second, "--json")
    assert parsed(early) == documents_of(data, 33)

    changed = opened(texts, "data.corpus.web.weight=1", "data.on_change=continue")
    third = train(changed, 70, second)
    report = json.loads(run(capsys, "seen", third, "--json"))
    assert [(s["source"], *s["steps"]) for s in report["sources"]] == [
        ("web", 0, 50), ("code", 0, 50), ("web", 50, 70), ("code", 50, 70),
    ]  # fmt: skip
    assert report["sources"][:2] == [
        source | {"share": source["tokens"] / report["tokens"]}
        for source in json.loads(printed)["sources"]
    ]
    assert [source["tokens"] for source in report["sources"][2:]] == [320, 320]
    assert "[50, 70)" in run(capsys, "seen", third)


def test_trained_ranges_are_the_positions_of_all_batches():
    steps = Steps(n=23, batch_size=3, world_size=2, tail="share")
    first = RunSegment(batch=0, start=Position(0, 0), steps=Steps(n=23, batch_size=4), limit=5)
    segments = [first, RunSegment(batch=7, start=first.position(7), steps=steps, limit=3)]
    for stop in range(40):
        expected = []
        for batch in range(stop):
            segment = segments[batch >= 7]
            epoch = segment.position(batch).epoch
            for rank in range(segment.steps.world_size):
                windows = windows_of_batch(segments, batch, None, rank=rank, seed=None)
                expected += (windows + epoch * 23).tolist()
        ranges = trained_ranges(segments, stop)
        assert [p for begin, end in ranges for p in range(begin, end)] == expected
        assert all(end < begin for (_, end), (begin, _) in pairwise(ranges))


def test_a_whole_epoch_has_all_windows_without_asking_for_them(monkeypatch):
    order = EndlessOrder(10, seed=None)
    assert taken_windows(order, [(9, 12), (15, 15)])[0] == 3
    assert taken_windows(order, [(9, 12), (15, 15)])[1].nonzero()[0].tolist() == [0, 1, 9]
    assert taken_windows(order, [(3, 8), (18, 23)])[1].all()
    monkeypatch.setattr(EndlessOrder, "at", None)
    n_windows, taken = taken_windows(order, [(9, 30)])
    assert (n_windows, taken.all()) == (21, True)


def test_the_standard_library_is_a_corpus_of_its_top_modules(tmp_path):
    corpus = open_corpus("stdlib")
    names = [Path(str(file)).name for file in corpus.files]
    assert {"argparse.py", "os.py"} <= set(names)
    assert names == sorted(names)
    assert sum(Path(str(file)).stat().st_size for file in corpus.files) > 2_000_000
    (tmp_path / "a.txt").write_text("a")
    assert len(open_corpus(["stdlib", tmp_path / "a.txt"]).files) == len(names) + 1
    with pytest.raises(FileNotFoundError, match="stdlib"):
        open_corpus("./stdlib")


def documented() -> list[str]:
    """The first commands in docs/mixtures.md, and the commands in the configs' comments."""
    text = (ROOT / "docs" / "mixtures.md").read_text().partition("\n## ")[0].replace("\\\n", "")
    text += "".join((ROOT / f"conf/data/{name}.yaml").read_text() for name in ("mixture", "sources"))
    found = re.findall(r"(?:python train\.py|lit-gptdata train) (.*)", text)
    return [line for line in found if "data=mine" not in line]


@pytest.mark.parametrize("line", documented())
def test_every_documented_command_gives_the_mixture_that_it_says(line):
    words = [word for word in shlex.split(line, comments=True) if word != "-m"]
    weight = re.search(r"code\.weight=(\S+)", line)
    for value in weight[1].split(",") if weight else [""]:
        cfg = compose_config([f"data.corpus.code.weight={value}" if "code.w" in w else w for w in words])
        data = instantiate(cfg.data)
        names = {"prose", "code", "books", "web"}
        names -= {"books"} if "books" not in line else set()
        names -= {"code"} if "~" in line else set()
        names -= {"prose"} if "data=sources" in line else {"web"}
        assert set(data.sources) == names
        if weight:
            assert data.hparams["corpus"]["code"]["weight"] == float(value)
            assert data.hparams["corpus"]["code"]["path"] == "stdlib"


def test_stages_and_val_sets_of_the_command_line_reach_the_data_module():
    stages = STAGES.replace("200", "1_000_000")
    options = ["data.corpus={web: web/, code: code/}", f"data.stages={stages}"]
    data = build_data(
        ["data=sources", *options, "data.val_corpus={wiki: wiki/}", "data.on_change=continue"]
    )
    assert data.hparams["stages"] == [
        {"tokens": 1_000_000, "weights": {"web": 0.8, "code": 0.2}},
        {"tokens": None, "weights": {"web": 0.3, "code": 0.7}},
    ]
    assert data.hparams["val_corpus"] == {"wiki": {"path": "wiki/"}}
    assert data.hparams["on_change"] == "continue"
    assert build_data(["data=mixture", "+data.val_corpus.wiki=wiki/"]).hparams["val_corpus"]


@pytest.mark.heavy
def test_a_sweep_over_a_weight_tokenizes_each_source_once_and_has_a_report(tmp_path):
    words = ["-m", "data=mixture", "debug=fast", "data.corpus.code.weight=0.2,0.5,0.8"]
    printed = run_train(*words, cwd=tmp_path)
    assert "3 jobs: 3 completed" in printed
    (table,) = tmp_path.glob("multirun/*/*/sweep.csv")
    assert {row.split(",")[2] for row in table.read_text().splitlines()[1:]} == {"0.2", "0.5", "0.8"}
    assert len(list(tmp_path.glob("data/tokens/*/manifest.json"))) == 2
