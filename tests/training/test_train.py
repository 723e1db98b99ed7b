"""train.py as a user runs it, and one step with each config in conf/."""

from __future__ import annotations

import csv
import inspect
import math
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import OmegaConf

from lit_gptdata import GPT, GPTDataModule
from lit_gptdata.configs import register_resolvers
from tests.http_server import FileServer

ROOT = Path(__file__).parents[2]
CONF = ROOT / "conf"
FAST = ["debug=fast", "hydra.run.dir=run"]


def train(*overrides: str, cwd: Path, expect: int = 0) -> str:
    """Run train.py in a separate process; return what it prints."""
    done = subprocess.run(
        [sys.executable, ROOT / "train.py", *overrides],
        cwd=cwd, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == expect, done.stdout + done.stderr
    return done.stdout + done.stderr


def composed(*overrides: str):
    register_resolvers()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("train", overrides=list(overrides))


def test_a_run_saves_its_results_and_is_repeatable(tmp_path):
    printed = train("debug=fast", "hydra.run.dir=one", "data.test_fraction=0.1", cwd=tmp_path)
    run = tmp_path / "one"
    names = {path.name for path in run.iterdir()}
    assert {"config.yaml", "metrics.csv", "checkpoints", "loss.png", "summary.txt"} <= names
    assert "${" not in (run / "config.yaml").read_text()
    assert OmegaConf.load(run / "config.yaml").data.max_length == 16
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    for name in ("corpus", "tokens", "windows", "parameters", "tokens/s", "sample", "folder"):
        assert re.search(rf"^{name} +\S", (run / "summary.txt").read_text(), re.MULTILINE)
    for split in ("val", "test"):
        for figure in ("loss", "perplexity", "bits/byte"):
            assert re.search(rf"^{split} {figure} +[\d,]+\.\d", printed, re.MULTILINE)
    with open(run / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    assert len([row for row in rows if row["train_loss"]]) == 4
    losses = [float(row["val_loss"]) for row in rows if row["val_loss"]]
    assert all(math.isfinite(loss) and 5 < loss < 12 for loss in losses)
    for warning in ("LeafSpec", "does not have many workers", "exists and is not empty", "Warning"):
        assert warning not in printed

    for path in (run / "checkpoints").iterdir():
        assert "=" not in path.name
        assert GPT.load_from_checkpoint(path).stem.embedding_dim == 16

    train("debug=fast", "hydra.run.dir=two", "data.test_fraction=0.1", cwd=tmp_path)
    with open(tmp_path / "two" / "metrics.csv") as file:
        again = list(csv.DictReader(file))
    for name in ("train_loss", "val_loss", "test_loss"):
        assert [row.get(name) for row in again] == [row.get(name) for row in rows]


def test_main_returns_the_loss(tmp_path):
    code = f"""
import sys
import time
sys.path.insert(0, {str(ROOT)!r})
from hydra import compose, initialize_config_dir
import train
for overrides, name in ([], "val loss"), (["data.val_fraction=0"], "train loss"):
    with initialize_config_dir({str(CONF)!r}, version_base="1.3"):
        cfg = compose("train", overrides=["debug=fast", "output_dir=run", *overrides])
    loss = train.main.__wrapped__(cfg)
    (line,) = [l for l in open("run/summary.txt") if l.startswith(name)]
    assert type(loss) is float and f"{{loss:.4f}}" in line, (loss, line)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_without_val_the_summary_has_the_training_loss(tmp_path):
    printed = train(*FAST, "data.val_fraction=0", cwd=tmp_path)
    assert re.search(r"^train loss +\d+\.\d", printed, re.MULTILINE)
    assert "val loss" not in printed


@pytest.mark.heavy
def test_train_on_a_url_a_glob_and_a_list_of_files(tmp_path, book):
    with FileServer(book.read_bytes()) as server:
        printed = train(
            *FAST, "data=url", f"data.corpus={server.url}", "data.val_fraction=0.05", cwd=tmp_path
        )
    assert "106,361" in printed
    (tmp_path / "books").mkdir()
    for name in ("a.txt", "b.txt"):
        (tmp_path / "books" / name).write_text("It was on a dreary night of November. " * 200)
    printed = train(*FAST, "data=files", "data.corpus=books/*.txt", cwd=tmp_path)
    assert "2 documents" in printed
    printed = train(*FAST, "data=files", "data.corpus=[books/a.txt,books/b.txt]", cwd=tmp_path)
    assert "2 documents" in printed


@pytest.mark.heavy
def test_it_resumes_from_a_checkpoint(tmp_path):
    train("debug=fast", "hydra.run.dir=one", cwd=tmp_path)
    resume = ("ckpt_path=one/checkpoints/last.ckpt", "trainer.max_steps=6", "hydra.run.dir=two")
    train("debug=fast", *resume, cwd=tmp_path)
    with open(tmp_path / "two" / "metrics.csv") as file:
        steps = [int(row["step"]) for row in csv.DictReader(file) if row["train_loss"]]
    assert steps == [4, 5]


@pytest.mark.heavy
def test_a_mistake_ends_with_a_message_and_status_1(tmp_path):
    printed = train(*FAST, "data=files", "data.corpus=books/*.txt", cwd=tmp_path, expect=1)
    assert "no file matches 'books/*.txt'" in printed
    printed = train(*FAST, "data=files", cwd=tmp_path, expect=1)
    assert "Missing mandatory value: data.corpus" in printed
    printed = train(*FAST, "data.stride=0", cwd=tmp_path, expect=1)
    assert "stride=0" in printed


@pytest.mark.heavy
def test_without_network_the_error_suggests_the_sample(tmp_path, monkeypatch):
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")  # no server listens on this port
    printed = train(*FAST, "data=frankenstein", cwd=tmp_path, expect=1)
    assert "data=sample" in printed
    assert not list((tmp_path / "data" / "downloads").glob("*.txt"))


GROUPS = sorted(
    f"{'+' if path.parent.name == 'sweep' else ''}{path.parent.relative_to(CONF)}={path.stem}"
    for path in CONF.rglob("*.yaml")
    if path.parent != CONF
)
# Overrides for what a test cannot use: the network (a file replaces it), a GPU (the CPU replaces it)
# and the width of the larger models.
REPLACEMENTS = {
    "data=": ["data.corpus=story.txt"],
    "experiment=": ["data.corpus=story.txt"],
    "trainer=gpu": ["trainer.accelerator=cpu", "trainer.precision=bf16-true"],
    "model=": ["stem.embedding_dim=12", "model.n_heads=2", "data.max_length=16", "data.stride=16"],
}
SEVERAL_PROCESSES = {"trainer=ddp", "trainer=fsdp"}  # tests/training/test_ranks.py runs them


@pytest.mark.parametrize("choice", sorted({*GROUPS} - SEVERAL_PROCESSES))
def test_each_config_runs_one_step(choice, tmp_path, monkeypatch):
    if choice == "+sweep=optuna":
        pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    monkeypatch.chdir(tmp_path)
    Path("story.txt").write_text("It was on a dreary night of November. " * 300)
    small = ["trainer.max_steps=1", "trainer.limit_val_batches=1", "trainer.val_check_interval=1"]
    small += ["data.corpus=story.txt", "data.batch_size=2", f"output_dir={tmp_path}/run"]
    for group, overrides in REPLACEMENTS.items():
        small += overrides if choice.startswith(group) else []
    cfg = composed(choice, *small)
    data = instantiate(cfg.data)
    model = instantiate(cfg.model, stem=instantiate(cfg.stem, vocab_size=data.vocab_size))
    callbacks, loggers = (list(instantiate(node).values()) for node in (cfg.callbacks, cfg.logger))
    trainer = instantiate(cfg.trainer, callbacks=callbacks, logger=loggers)
    trainer.fit(model, datamodule=data)
    assert trainer.global_step == 1
    assert math.isfinite(float(trainer.callback_metrics["val_loss"]))


def test_the_default_config_lists_all_data_options():
    options = set(inspect.signature(GPTDataModule).parameters)
    assert set(composed().data) == options | {"_target_", "_convert_"}


@pytest.mark.heavy
def test_a_preempted_run_resumes_exactly(tmp_path):
    small = (
        "model.dropout=0.1", "data.max_length=8", "data.stride=8", "stem.embedding_dim=16",
        "model.n_heads=2", "model.n_layers=1", "trainer.max_steps=30", "trainer.val_check_interval=10",
        "trainer.limit_val_batches=2", "trainer.log_every_n_steps=1",
    )  # fmt: skip
    train(*small, "hydra.run.dir=uninterrupted", cwd=tmp_path)
    process = subprocess.Popen(
        [sys.executable, ROOT / "train.py", *small, "hydra.run.dir=first"],
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    while not (tmp_path / "first" / "checkpoints" / "last.ckpt").exists():
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.01)
    process.terminate()
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, printed
    train(*small, "hydra.run.dir=second", "ckpt_path=first/checkpoints/last.ckpt", cwd=tmp_path)

    def column(run: str, name: str) -> dict[int, float]:
        with open(tmp_path / run / "metrics.csv") as file:
            return {int(row["step"]): float(row[name]) for row in csv.DictReader(file) if row[name]}

    for name in ("train_loss", "val_loss"):
        expected, resumed = column("uninterrupted", name), column("second", name)
        assert resumed
        assert resumed == {step: expected[step] for step in expected if step >= min(resumed)}
    assert len(column("second", "train_loss")) < 30
