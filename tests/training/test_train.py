"""train.py as a user runs it, and one step with each config in conf/."""

from __future__ import annotations

import inspect
import itertools
import json
import math
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from hydra.utils import instantiate
from omegaconf import OmegaConf

from lit_gptdata import GPT, GPTDataModule
from lit_gptdata.cli import train
from lit_gptdata.report.rows import read_sweep
from tests.http_server import FileServer
from tests.training.run_train import (
    CONF,
    ROOT,
    STORY,
    column,
    compose_config,
    read_metrics,
    run_train,
    run_train_here,
)

pytestmark = pytest.mark.usefixtures("one_thread")

FAST = ["debug=fast", "hydra.run.dir=run"]


def test_a_run_saves_its_results_and_is_repeatable(tmp_path, monkeypatch, capsys):
    options = ("debug=fast", "data.test_fraction=0.1", "threads=1")
    printed = run_train(*options, "hydra.run.dir=one", cwd=tmp_path)
    run = tmp_path / "one"
    names = {path.name for path in run.iterdir()}
    assert {"config.yaml", "metrics.csv", "checkpoints", "loss.png", "summary.txt"} <= names
    config = (run / "config.yaml").read_text().partition("\nhydra:")[0]
    assert set(re.findall(r"\$\{.*", config)) <= {
        "${output_dir}", "${output_dir}/checkpoints", "${ckpt_path}",
    }  # fmt: skip
    assert OmegaConf.load(run / "config.yaml").data.max_length == 16
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    for name in ("corpus", "tokens", "windows", "parameters", "tokens/s", "prompt", "folder"):
        assert re.search(rf"^{name} +\S", (run / "summary.txt").read_text(), re.MULTILINE)
    for split in ("val", "test"):
        for figure in ("loss", "perplexity", "bits/byte"):
            assert re.search(rf"^{split} {figure} +[\d,]+\.\d", printed, re.MULTILINE)
    rows = read_metrics(run)
    assert len([row for row in rows if row["train_loss"]]) == 4
    losses = [float(row["val_loss"]) for row in rows if row["val_loss"]]
    assert all(math.isfinite(loss) and 5 < loss < 12 for loss in losses)
    for warning in ("LeafSpec", "does not have many workers", "exists and is not empty", "Warning"):
        assert warning not in printed

    for path in (run / "checkpoints").iterdir():
        assert "=" not in path.name
        assert GPT.load_from_checkpoint(path).stem.embedding_dim == 16

    monkeypatch.chdir(tmp_path)
    loss = run_train_here(*options, "output_dir=two")
    assert type(loss) is float
    assert re.search(rf"^val loss +{loss:.4f} ", capsys.readouterr().out, re.MULTILINE)
    repeated = read_metrics(tmp_path / "two")
    for name in ("train_loss", "val_loss", "test_loss"):
        assert [row.get(name) for row in repeated] == [row.get(name) for row in rows]


@pytest.mark.filterwarnings("ignore")  # Lightning warns if the val split is empty
def test_without_a_val_split_main_returns_the_train_loss(capsys):
    Path("story.txt").write_text(STORY)
    options = ("data.corpus=story.txt", "data.val_fraction=0", "threads=1", "output_dir=run")
    loss = run_train_here("debug=fast", *options)
    assert type(loss) is float
    assert re.search(rf"^train loss +{loss:.4f} ", capsys.readouterr().out, re.MULTILINE)
    assert "val loss" not in Path("run/summary.txt").read_text()


def test_the_summary_names_windows_of_documents_and_their_padding(capsys):
    Path("lines.jsonl").write_text("".join(f'{{"text": "{"word " * n}"}}\n' for n in range(2, 42)))
    options = ("data.corpus=lines.jsonl", "data.windows=documents", "model.document_mask=true")
    run_train_here("debug=fast", *options, "threads=1", "output_dir=run")
    printed = capsys.readouterr().out
    assert re.search(
        r"^windows +\d+ train \(documents\), \d+ val, 16 tokens each$", printed, re.MULTILINE
    )
    assert re.search(
        r"^trained on +128 tokens in 4 steps, about [1-9]\d of them padding$", printed, re.M
    )
    padding = read_sweep(Path.cwd()).jobs[0].metrics["padding"]  # a column of a sweep's report
    assert 0.1 < padding < 0.8


@pytest.mark.heavy
def test_train_on_a_url_a_glob_and_a_list_of_files(tmp_path, book):
    with FileServer(book.read_bytes()) as server:
        url = f"data.corpus={server.url}"
        assert "106,361" in run_train(*FAST, "data=url", url, cwd=tmp_path)
    (tmp_path / "books").mkdir()
    for name in ("a.txt", "b.txt"):
        (tmp_path / "books" / name).write_text(STORY)
    for corpus in ("books/*.txt", "[books/a.txt,books/b.txt]"):
        printed = run_train(*FAST, "data=files", f"data.corpus={corpus}", cwd=tmp_path)
        assert "2 documents" in printed


@pytest.mark.heavy
def test_a_mistake_ends_with_a_message_and_status_1(tmp_path):
    for overrides, message in (
        (["data=files", "data.corpus=books/*.txt"], "no such file or folder: 'books/*.txt'"),
        (["data=files"], "data.corpus has no value: give data.corpus=…"),
        (["data.stride=0"], "stride must be an integer"),
    ):
        assert message in run_train(*FAST, *overrides, cwd=tmp_path, expect=1)


@pytest.mark.heavy
def test_without_network_the_error_suggests_the_sample(tmp_path, monkeypatch):
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")  # no server listens on this port
    printed = run_train(*FAST, "data=frankenstein", cwd=tmp_path, expect=1)
    assert "data=sample" in printed
    assert not list((tmp_path / "data" / "downloads").glob("*.txt"))


# Configs that change others or need an extra. tests/training/test_ranks.py runs several processes.
ALONE = ["+sweep=optuna", "debug=fast", "experiment=course"]
SEVERAL_PROCESSES = ["trainer=ddp", "trainer=fsdp"]
# tests/integrations/test_loggers.py runs these.
CLIENTS = ["logger=many", "logger=mlflow", "logger=tensorboard", "logger=wandb"]


def choices_of(group: Path) -> list[str]:
    sign = "+" if group.name == "sweep" else ""
    choices = [f"{sign}{group.name}={path.stem}" for path in sorted(group.glob("*.yaml"))]
    others = [*ALONE, *SEVERAL_PROCESSES, *CLIENTS, "stem=none"]
    return [choice for choice in choices if choice not in others]


COMBINED = itertools.zip_longest(*map(choices_of, sorted(CONF.glob("*/"))))
# Overrides for what a test cannot use: a GPU (the CPU replaces it) and the width of the larger models.
REPLACEMENTS = {
    "trainer=gpu": ["trainer.accelerator=cpu", "trainer.precision=bf16-true"],
    "model=": ["stem.embedding_dim=12", "model.n_heads=2", "data.max_length=16", "data.stride=16"],
}


@pytest.mark.parametrize("choices", [*ALONE, *(" ".join(filter(None, row)) for row in COMBINED)])
def test_each_config_runs_one_step(choices):
    if choices == "+sweep=optuna":
        pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    Path("story.txt").write_text(STORY)
    small = ["trainer.max_steps=1", "trainer.limit_val_batches=1", "trainer.val_check_interval=1"]
    small += ["data.corpus=story.txt", "data.batch_size=2", "output_dir=run"]
    small += [x for group, overrides in REPLACEMENTS.items() if group in choices for x in overrides]
    cfg = compose_config(*choices.split(), *small)
    data = instantiate(cfg.data)
    model = instantiate(cfg.model, stem=instantiate(cfg.stem, vocab_size=data.vocab_size))
    callbacks, loggers = (list(instantiate(node).values()) for node in (cfg.callbacks, cfg.logger))
    trainer = instantiate(cfg.trainer, callbacks=callbacks, logger=loggers)
    trainer.fit(model, datamodule=data)
    assert trainer.global_step == 1
    assert math.isfinite(float(trainer.callback_metrics["val_loss"]))


def test_the_model_gets_the_separator_of_the_data_unless_the_config_has_one():
    def eot_of(*overrides: str, eot: int | None) -> int:
        cfg = compose_config("model.document_mask=true", "stem.embedding_dim=8", *overrides)
        return train.build_model(cfg, SimpleNamespace(vocab_size=50, max_length=64, eot=eot)).eot

    assert eot_of(eot=7) == 7
    assert eot_of("model.eot=9", eot=7) == 9
    with pytest.raises(ValueError, match=r"document_mask needs eot, .* vocabulary of 50"):
        eot_of(eot=None)


def test_the_default_config_lists_all_data_options():
    options = set(inspect.signature(GPTDataModule).parameters)
    assert set(compose_config().data) == options | {"_target_", "_convert_"}


@pytest.mark.heavy
def test_a_preempted_run_resumes_exactly(tmp_path):
    small = (
        "model.dropout=0.1", "data.max_length=8", "data.stride=8", "stem.embedding_dim=16",
        "model.n_heads=2", "model.n_layers=1", "trainer.max_steps=30", "trainer.val_check_interval=10",
        "trainer.limit_val_batches=2", "trainer.log_every_n_steps=1",
    )  # fmt: skip
    run_train(*small, "hydra.run.dir=uninterrupted", cwd=tmp_path)
    command = [sys.executable, ROOT / "train.py", *small, "hydra.run.dir=first"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    process = subprocess.Popen(command, cwd=tmp_path, **pipes)
    while not (tmp_path / "first" / "checkpoints" / "last.ckpt").exists():
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.01)
    process.terminate()
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, printed
    run_train(*small, "hydra.run.dir=second", "ckpt_path=first/checkpoints/last.ckpt", cwd=tmp_path)

    for name in ("train_loss", "val_loss"):
        expected, resumed = column(tmp_path / "uninterrupted", name), column(tmp_path / "second", name)
        assert resumed
        assert resumed == {step: expected[step] for step in expected if step >= min(resumed)}
    assert len(column(tmp_path / "second", "train_loss")) < 30


def test_a_run_with_output_dir_leaves_an_empty_working_folder(tmp_path):
    (work := tmp_path / "work").mkdir()
    words = (f"output_dir={tmp_path / 'run'}", "data=files", "data.corpus=missing.txt")
    run_train(*words, f"data.data_dir={tmp_path / 'data'}", cwd=work, expect=1)
    assert work.is_dir()
    assert json.loads((tmp_path / "run/result.json").read_text())["status"] == "failed"


def test_a_run_in_a_thread_trains(tmp_path):
    (tmp_path / "story.txt").write_text(STORY)
    words = ["debug=fast", "data=files", f"data.corpus={tmp_path / 'story.txt'}"]
    words += [f"data.data_dir={tmp_path}", f"output_dir={tmp_path / 'run'}"]
    thread = threading.Thread(target=run_train_here, args=words)
    thread.start()
    thread.join()
    assert json.loads((tmp_path / "run/result.json").read_text())["status"] == "completed"
