"""What a run leaves behind: results, one metrics.csv, and a config that can run again."""

from __future__ import annotations

import json
import logging
import math
import os
import re
import shlex
import signal
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from matplotlib.figure import Figure
from omegaconf import OmegaConf

from lit_gptdata import GPT, GPTDataModule
from lit_gptdata.cli import train
from lit_gptdata.report.jobs import read_job
from lit_gptdata.training import summary
from lit_gptdata.training.errors import describe
from lit_gptdata.training.folder import RUN, draw_seed
from lit_gptdata.training.loggers import keep_rows_before
from lit_gptdata.training.sweep import record_result
from tests.training.run_train import STORY, column, compose_config, read_metrics, run_train_here

pytestmark = pytest.mark.usefixtures("one_thread")

TEXT = ("data.corpus=story.txt", "threads=1", "debug=fast")


@pytest.fixture(autouse=True)
def _story():
    Path("story.txt").write_text(STORY)


def strict_json(path: Path) -> dict:
    return json.loads(path.read_text(), parse_constant=lambda token: pytest.fail(f"{token} is not JSON"))


class Foreign(GPT):
    """A model with other metric names that cannot generate."""

    generate = None
    test_step = None

    def log(self, name: str, *args, **options) -> None:
        super().log(name.replace("_loss", "/nats"), *args, **options)


class Broken(GPT):
    def generate(self, *_, **__):
        raise RuntimeError("no memory for a sample")


@pytest.mark.filterwarnings("ignore:no best checkpoint", "ignore:Total length of")
@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        ("trainer.limit_val_batches=0", "train loss +[0-9]"),
        ("+trainer.limit_test_batches=0 data.test_fraction=0.1", "val loss +[0-9]"),
        ("data.val_fraction=0 callbacks.best=null", "train loss +[0-9]"),
        ("callbacks=none logger=none", "val loss +[0-9]"),
        ("callbacks.throughput=null logger.csv=null", "tokens/s +not measured"),
        (f"model._target_={__name__}.Foreign data.test_fraction=0.1", "Foreign has no method generate"),
        (f"model._target_={__name__}.Broken", "sample +none: no memory for a sample"),
        (
            "model.learning_rate=1e9 trainer.gradient_clip_val=null max_tokens=640",
            "val_loss is nan: lower model.learning_rate or raise model.warmup_tokens",
        ),
    ],
)
def test_a_run_ends_with_its_summary_and_its_final_state(overrides, line, capsys):
    run_train_here(*TEXT, *overrides.split(), "output_dir=run")
    assert re.search(line, capsys.readouterr().out)
    assert re.search(line, Path("run/summary.txt").read_text())
    result = strict_json(Path("run/result.json"))
    assert result["status"] == "completed"
    assert (result["global_seed"], result["seed"]) == (0, 0)
    if "callbacks=none" not in overrides:
        last = torch.load("run/checkpoints/last.ckpt", weights_only=True)
        assert last["global_step"] == result["steps"] == result["tokens"] / 32


@pytest.mark.parametrize(
    "option", ["trainer.max_steps=0", "+trainer.limit_train_batches=0", "trainer.max_epochs=0"]
)
def test_a_run_without_steps_ends_with_the_summary_of_the_untrained_model(option, capsys):
    run_train_here(*TEXT, option, "output_dir=run")
    assert "val loss" in capsys.readouterr().out
    assert not Path("run/checkpoints").exists()


WRONG = {
    "ckpt_path=last": "bad/checkpoints/last.ckpt does not exist: .* set output_dir to the folder",
    "ckpt_path=nope.ckpt": "nope.ckpt does not exist",
    "ckpt_path=story.txt": "story.txt is not a Lightning checkpoint",
    "ckpt_path=run": "run is a folder: set ckpt_path=.*/run/checkpoints/last.ckpt",
    "ckpt_path=run/checkpoints": "set ckpt_path=.*/run/checkpoints/last.ckpt",
    "ckpt_path=.": "is not a Lightning checkpoint .*Is a directory.* the last.ckpt of a run",
    "ckpt_path=tensors.ckpt": "tensors.ckpt is not a Lightning checkpoint .*without loops, optimizer_st",
    "ckpt_path=weights.ckpt": "weights.ckpt is not a Lightning checkpoint .*without optimizer_states",
    "ckpt_path=run/checkpoints/last.ckpt data.max_length=32": "stem.max_length was 16, now 32",
    "ckpt_path=run/checkpoints/last.ckpt model.n_heads=1": "model.n_heads was 2, now 1",
    "+callbacks.x=1": "callbacks must be null, or Callbacks with a _target_, got 1",
    "+trainer.logger=false": "trainer.logger has no effect here: set logger",
    "trainer.gradient_clip_val=-1": r"trainer.gradient_clip_val must be .* in \[0, inf\), got -1",
    "trainer.accumulate_grad_batches=-2": "trainer.accumulate_grad_batches must be .* ≥ 1, got -2",
    "trainer.max_steps=abc": "trainer.max_steps must be an integer ≥ -1, got 'abc'",
    "trainer.max_steps=null": "trainer.max_steps must be an integer ≥ -1, got None",
    "trainer.accumulate_grad_batches=null": "accumulate_grad_batches must be .* ≥ 1, got None",
    "logger.csv=abc": "logger must be null, or Loggers with a _target_, got 'abc'",
    "trainer.max_steps=2.5": "trainer.max_steps must be an integer ≥ -1, got 2.5",
    "+trainer.limit_train_batches=abc": "trainer.limit_train_batches must be a number",
    "seed=4294967296": r"seed must be an integer in \[0, 4294967295\], got 4294967296",
    "threads=1000000": r"threads must be an integer in \[1, .*\], got 1000000",
}


def test_a_wrong_checkpoint_callback_or_number_is_named():
    run_train_here(*TEXT, "trainer.max_steps=1", "output_dir=run")
    checkpoint = torch.load("run/checkpoints/last.ckpt", weights_only=True)
    del checkpoint["optimizer_states"], checkpoint["lr_schedulers"]
    torch.save(checkpoint, "weights.ckpt")
    torch.save({"a": torch.zeros(1)}, "tensors.ckpt")
    for overrides, message in WRONG.items():
        with pytest.raises((ValueError, TypeError, OSError), match=message) as caught:
            run_train_here(*TEXT, *overrides.split(), "output_dir=bad")
        assert len(describe(caught.value).splitlines()) == 1


def test_callbacks_for_what_the_trainer_turns_off_are_left_out():
    off = ("+trainer.enable_progress_bar=false", "trainer.enable_checkpointing=false")
    run_train_here(*TEXT, *off, "trainer.max_steps=1", "output_dir=run")
    assert not Path("run/checkpoints").exists()


@pytest.mark.parametrize("value", ["files", None])  # data=files with the config.yaml of a run
@pytest.mark.parametrize("group", ["data", "stem", "model", "trainer"])
def test_a_group_in_place_of_an_option_is_named(group, value):
    if (group, value) == ("stem", None):
        return  # a model without a stem
    cfg = compose_config(*TEXT, "output_dir=run")
    cfg[group] = value
    with pytest.raises(TypeError, match=f"no choices for {group}: leave {group}=… out"):
        train.main(cfg)


class LogsPerSet(GPT):
    """A model that logs one loss for each val set, which Lightning renames."""

    on_validation_epoch_start = on_validation_epoch_end = lambda self: None

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        n = int((batch[1] >= 0).sum())
        self.log("val_loss", self.losses(batch).sum() / n, batch_size=n)


def test_a_mixture_ends_with_the_losses_of_its_sources():
    Path("code.txt").write_text("def november(): return dreary\n" * 300)
    Path("wiki.txt").write_text("November is the eleventh month of a year. " * 100)
    sources = "data.corpus={web: {path: story.txt, weight: 0.6}, code: {path: code.txt, weight: 0.4}}"
    options = (*TEXT[1:], sources, "+data.val_corpus={wiki: wiki.txt}", "threads=1")
    loss = run_train_here(*options, "output_dir=run")
    result, summary = strict_json(Path("run/result.json")), Path("run/summary.txt").read_text()
    assert result["metrics"]["val_loss"] == loss
    for name in ("web", "code", "wiki"):
        val_loss = result["metrics"][f"val_loss/{name}"]
        assert re.search(
            rf"^  {name} +{name if name != 'web' else 'story'}.txt, .* {val_loss:.4f}$", summary, re.M
        )
        assert [*column(Path("run"), f"val_loss/{name}").values()][-1] == val_loss
    assert "weight 0.6" in summary
    covers = r"^val covers +web \([0-9,]+ tokens\), code .*; the first 8 of [0-9]+ windows, by limit_val"
    assert re.search(covers, summary, re.M)
    assert re.search("^after training +'", summary, re.M)
    assert Path("run/loss.png").exists()
    same = run_train_here(*options, f"model._target_={__name__}.LogsPerSet", "output_dir=other")
    assert same == pytest.approx(loss, rel=1e-6)
    assert list(Path("other/checkpoints").glob("best*"))


def test_a_diverged_job_is_nan_in_result_json_and_in_the_report():
    with record_result(Path()) as result:
        result["metrics"] = {"val_loss": math.nan, "val_perplexity": math.inf, "train_loss": 2.0}
        result["overrides"] = ["data.corpus=\udce9.txt"]  # a name that is not UTF-8
    assert strict_json(Path("result.json"))["metrics"]["val_perplexity"] == "inf"
    metrics = read_job(Path(), "0").metrics
    assert math.isnan(metrics["val_loss"])
    assert (metrics["val_perplexity"], metrics["train_loss"]) == (math.inf, 2.0)
    old = {"status": "completed", "metrics": {"val_loss": math.nan}}  # as earlier versions wrote it
    Path("result.json").write_text(json.dumps(old))
    assert math.isnan(read_job(Path(), "0").metrics["val_loss"])


def test_results_stay_if_the_evaluation_or_a_picture_fails(monkeypatch, capsys):
    def fail(*_) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(summary, "plot_losses", fail)
    run_train_here(*TEXT, "output_dir=picture")
    assert "no loss.png: OSError: no space left" in capsys.readouterr().out
    monkeypatch.setattr(GPT, "test_step", fail)
    with pytest.raises(OSError, match="no space left"):
        run_train_here(*TEXT, "output_dir=test", "data.test_fraction=0.1")
    result = strict_json(Path("test/result.json"))
    assert (result["status"], result["tokens"]) == ("failed", 128)
    assert result["metrics"]["train_loss"] > 0


def test_the_last_validation_of_the_fit_is_the_final_one(monkeypatch):
    validated = []
    monkeypatch.setattr(
        GPT, "on_validation_end", lambda self: validated.append(self.trainer.global_step)
    )
    run_train_here(*TEXT, "output_dir=run", "max_tokens=128")
    assert validated == [0, 2, 4]
    run_train_here(*TEXT, "output_dir=run", "max_tokens=96", "callbacks=none")
    assert validated[3:] == [0, 2, 3]


def test_the_summary_has_the_command_that_trains_longer(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["train.py", *TEXT, "output_dir=old", "max_tokens=128"])
    loss = run_train_here(*TEXT, "output_dir=my runs/1", "max_tokens=128")
    (command,) = re.findall("train longer +(.*)", capsys.readouterr().out)
    program, script, *words = shlex.split(command)
    assert (program, script) == ("python", "train.py")
    assert words[-3:] == ['output_dir="my runs/1"', "ckpt_path=last", "max_tokens=256"]
    assert "output_dir=old" not in words
    assert run_train_here(*words) != loss
    assert list(column(Path("my runs/1"), "train_loss")) == list(range(8))


@pytest.mark.parametrize(
    ("where", "stop", "status", "message"),
    [
        (
            "on_train_batch_start",
            signal.SIGTERM,
            143,
            "stopped after 64 tokens. Kept: run/checkpoints/last",
        ),
        (
            "on_train_batch_start",
            signal.SIGINT,
            130,
            "To continue:\n  .* output_dir=run ckpt_path=last\n",
        ),
        ("on_validation_batch_start", signal.SIGTERM, 143, "stopped before the first step"),
        ("on_validation_batch_start", signal.SIGINT, 130, "run the same command again"),
        ("prepare_data", signal.SIGTERM, 143, "stopped before the first step"),
        ("prepare_data", signal.SIGINT, 130, "stopped before the first step"),
    ],
)
def test_a_stopped_run_says_what_was_kept(where, stop, status, message, monkeypatch, capsys):
    kind = GPTDataModule if where == "prepare_data" else GPT

    def send(self, *args, **options) -> None:
        if where != "on_train_batch_start" or args[1] == 1:
            signal.raise_signal(stop)

    monkeypatch.setattr(kind, where, send)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # an earlier run may have left its handler
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(SystemExit) as caught:
        run_train_here(*TEXT, "output_dir=run", "max_tokens=128")
    assert caught.value.code == status
    assert re.search(message, capsys.readouterr().err)
    assert strict_json(Path("run/result.json"))["status"] == "stopped"
    assert signal.getsignal(signal.SIGTERM) == handlers[1]
    signal.signal(signal.SIGINT, handlers[0])  # Lightning ignores it after Ctrl-C


def test_the_plot_is_over_tokens_and_names_a_loss_that_is_not_finite(monkeypatch):
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *_, **__: figures.append(self))
    train_losses = [f"{512 * i},{'nan' if i > 6 else 9 - i}," for i in range(1, 9)]
    Path("metrics.csv").write_text(
        "\n".join(["tokens,train_loss,val_loss", "0,,10.8", *train_losses, "4096,,5", ""])
    )
    summary.plot_losses(Path("metrics.csv"), Path("loss.png"))
    raw, smoothed, val = figures[0].axes[0].lines
    assert list(raw.get_xdata())[:2] == [512, 1024]
    assert list(val.get_xdata()) == [0, 4096]
    assert smoothed.get_label() == "train loss, NaN or inf from 3,584 tokens, smoothed"
    assert summary.smooth([1, 2, 6, 4], 1) == [1, 3, 4, 4]
    assert val.get_marker() == "o"


@pytest.mark.parametrize("in_the_same_folder", [True, False])
def test_a_resumed_run_continues_metrics_csv(in_the_same_folder, caplog):
    options = (*TEXT, "model.warmup_tokens=1", "+model.min_learning_rate_ratio=1")
    run_train_here(*options, "output_dir=whole", "max_tokens=512")
    run_train_here(*options, "output_dir=run", "max_tokens=320")
    first = column(Path("run"), "train_loss")
    with open("run/metrics.csv", "a") as file:
        file.write("0.1,0.2,0.3")  # a killed run left half of a line
    folder = "run" if in_the_same_folder else "next"
    with caplog.at_level(logging.INFO):
        resume = ("ckpt_path=run/checkpoints/last.ckpt", f"output_dir={folder}", "max_tokens=512")
        run_train_here(*options, *resume)
    assert "resumed from step 10, 320 tokens (" in caplog.text
    losses = column(Path(folder), "train_loss")
    assert len(first) == 10
    assert losses == {
        step: loss
        for step, loss in column(Path("whole"), "train_loss").items()
        if in_the_same_folder or step >= 10
    }
    assert len([row for row in read_metrics(Path(folder)) if row["train_loss"]]) == len(losses)
    assert Path(folder, "loss.png").exists()
    recorded = OmegaConf.load(f"{folder}/config.yaml")
    path = None if in_the_same_folder else str(Path("run/checkpoints/last.ckpt").absolute())
    assert recorded.ckpt_path == recorded.logger.csv.ckpt_path == path


@pytest.mark.filterwarnings("ignore:Total length of")
def test_a_new_run_in_a_folder_starts_a_new_metrics_csv():
    run_train_here(*TEXT, "output_dir=run", "max_tokens=320")
    run_train_here(*TEXT, "output_dir=run", "max_tokens=128", "data.val_fraction=0")
    assert list(column(Path("run"), "train_loss")) == [0, 1, 2, 3]
    assert "val_loss" not in read_metrics(Path("run"))[0]


def test_rows_from_the_first_new_step_on_are_removed():
    path = Path("metrics.csv")
    assert keep_rows_before(2, path) == []
    path.write_text("a,step\n1,0\n2,1\n3,2\n4,x\n5,1")
    assert keep_rows_before(2, path) == ["a", "step"]
    assert path.read_text().split() == ["a,step", "1,0", "2,1"]


def test_a_recorded_config_runs_again_without_touching_the_old_folder():
    run_train_here(*TEXT, "output_dir=old", "seed=3")
    before = {path: path.read_bytes() for path in Path("old").rglob("*") if path.is_file()}
    for overrides in ([], ["callbacks=null", "logger=null"]):
        with initialize_config_dir(str(Path("old").absolute()), version_base="1.3"):
            full = compose("config", overrides=overrides, return_hydra_config=True)
            cfg = compose("config", overrides=overrides)
        assert full.hydra.run.dir.startswith("outputs/20")
        assert full.hydra.output_subdir is None
        assert "sweep" in full.hydra.callbacks
        cfg.output_dir = "new"  # what Hydra would choose
        train.main(cfg)
        assert {path: path.read_bytes() for path in before} == before
    assert set(Path("old").rglob("*")) >= set(before)
    assert len([path for path in Path("old").rglob("*") if path.is_file()]) == len(before)
    old, new = (strict_json(Path(name, "result.json"))["metrics"] for name in ("old", "new"))
    assert old["val_loss"] == new["val_loss"]
    assert new.keys() >= {"val_loss", "train_loss"}


def test_a_seed_that_is_null_is_drawn_and_recorded(monkeypatch):
    seeds = []
    for name in ("one", "two"):
        run_train_here(*TEXT, f"output_dir={name}", "seed=null")
        recorded = OmegaConf.load(f"{name}/config.yaml")
        result = strict_json(Path(name, "result.json"))
        assert recorded.seed == recorded.data.seed == result["global_seed"] == result["seed"]
        seeds.append(recorded.seed)
    assert seeds[0] != seeds[1]
    monkeypatch.setenv(RUN, "2026-11-26/09-00-00")  # ranks that torchrun started
    assert draw_seed() == draw_seed()
    monkeypatch.delenv(RUN)
    monkeypatch.setenv("LOCAL_RANK", "1")  # a process that Lightning started
    monkeypatch.setenv("PL_GLOBAL_SEED", "77")
    assert draw_seed() == 77


def test_relative_paths_mean_the_folder_in_which_the_command_was_typed(monkeypatch, tmp_path):
    cfg = compose_config(return_hydra_config=True)
    OmegaConf.set_readonly(cfg.hydra, False)
    cfg.hydra.runtime.cwd = os.getcwd()
    monkeypatch.setattr(HydraConfig.instance(), "cfg", cfg)
    typed = Path.cwd()
    monkeypatch.chdir(tmp_path)  # hydra.job.chdir=true
    folders = []

    def build(*_) -> None:
        folders.append(Path.cwd())
        raise InterruptedError

    monkeypatch.setattr(train, "build", build)
    with pytest.raises(InterruptedError):
        train.train(compose_config("threads=1"), tmp_path, {})
    assert folders == [typed]
