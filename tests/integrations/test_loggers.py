"""TensorBoard, W&B (offline) and MLflow (sqlite) have a run for each job, which tests read back."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from lit_gptdata.cli import train
from tests.training.run_train import STORY, read_metrics, run_train, run_train_here

mlflow = pytest.importorskip("mlflow")
wandb_records = pytest.importorskip("wandb.proto.wandb_internal_pb2")
multiplexer = pytest.importorskip("tensorboard.backend.event_processing.event_multiplexer")
hparams = pytest.importorskip("tensorboard.plugins.hparams.plugin_data_pb2")

SMALL = ("debug=fast", "data.corpus=story.txt", "data.val_fraction=0.1", "threads=1")
OFFLINE = {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "MLFLOW_DISABLE_TELEMETRY": "true"}
LENGTHS, SEEDS = (8, 8, 16, 16), (1, 2, 1, 2)
NAMES = [f"{n} data.max_length={LENGTHS[n]} seed={SEEDS[n]}" for n in range(4)]
PICTURES = ["lengths", "loss"]

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


@pytest.fixture(scope="module")
def sweep(tmp_path_factory) -> Path:
    """Run a sweep of 4 jobs with all loggers; return the folder where it ran."""
    folder = tmp_path_factory.mktemp("sweep")
    (folder / "story.txt").write_text(STORY)
    jobs = ("data.max_length=8,16", "seed=1,2", "hydra.sweep.dir=multirun/four")
    run_train("-m", *SMALL, "logger=[wandb,mlflow,tensorboard]", *jobs, cwd=folder, env=OFFLINE)
    return folder


def val_losses(sweep: Path, job: int) -> list[tuple[float, float]]:
    """Tokens and loss of each validation, from metrics.csv."""
    rows = read_metrics(sweep / "multirun" / "four" / str(job))
    return [(float(row["tokens"]), float(row["val_loss"])) for row in rows if row["val_loss"]]


@pytest.mark.heavy
def test_mlflow_has_a_finished_run_for_each_job_of_a_sweep(sweep):
    client = mlflow.MlflowClient(f"sqlite:///{sweep}/outputs/mlflow.db")
    experiment = client.get_experiment_by_name("lit_gptdata").experiment_id
    runs = sorted(client.search_runs([experiment]), key=lambda run: run.info.run_name)
    assert [run.info.run_name for run in runs] == NAMES
    for job, run in enumerate(runs):
        assert run.info.status == "FINISHED"
        assert run.data.tags["group"] == "multirun/four"
        assert run.data.params["data/max_length"] == str(LENGTHS[job])
        assert len(run.data.params["fingerprint"]) == 32
        history = client.get_metric_history(run.info.run_id, "val_loss")
        assert [(point.step, point.value) for point in history] == val_losses(sweep, job)
        files = client.list_artifacts(run.info.run_id, "plots")
        assert [Path(file.path).stem for file in files] == PICTURES
    assert {path.name for path in sweep.iterdir()} == {"data", "multirun", "outputs", "story.txt"}


@pytest.mark.heavy
def test_tensorboard_has_a_run_for_each_job_of_a_sweep(sweep):
    events = multiplexer.EventMultiplexer()
    events.AddRunsFromDirectory(str(sweep / "multirun" / "four"))
    events.Reload()
    assert sorted(events.Runs()) == [f"{job}/tensorboard/{name}" for job, name in enumerate(NAMES)]
    for job, name in enumerate(NAMES):
        run = f"{job}/tensorboard/{name}"
        points = [(event.step, event.value) for event in events.Scalars(run, "val_loss")]
        assert points == [(tokens, pytest.approx(loss)) for tokens, loss in val_losses(sweep, job)]
        metadata = events.SummaryMetadata(run, "_hparams_/session_start_info")
        start = hparams.HParamsPluginData.FromString(metadata.plugin_data.content).session_start_info
        assert start.hparams["seed"].number_value == SEEDS[job]
        assert len(start.hparams["fingerprint"].string_value) == 32
        assert events.Runs()[run]["images"] == [f"plots/{each}" for each in PICTURES]


def read_wandb(path: Path) -> list[wandb_records.Record]:
    """Read the records of a .wandb file, which is in LevelDB's log format after a header of 7 bytes."""
    content, at, record, records = path.read_bytes(), 7, b"", []
    while at + 7 <= len(content):
        if (rest := 32768 - at % 32768) < 7:  # the end of a block
            at += rest
            continue
        length, kind = int.from_bytes(content[at + 4 : at + 6], "little"), content[at + 6]
        record += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # the whole or the end of a record
            records.append(wandb_records.Record.FromString(record))
            record = b""
    return records


@pytest.mark.heavy
def test_wandb_has_a_finished_run_for_each_job_of_a_sweep(sweep):
    for job, name in enumerate(NAMES):
        (path,) = sweep.glob(f"multirun/four/{job}/wandb/offline-run-*/*.wandb")
        by_kind: dict[str, list] = {}
        for record in read_wandb(path):
            kind = record.WhichOneof("record_type")
            by_kind.setdefault(kind, []).append(getattr(record, kind))
        (run,) = by_kind["run"]
        assert (run.display_name, run.run_group, run.project) == (name, "multirun/four", "lit_gptdata")
        assert [record.exit_code for record in by_kind["exit"]] == [0]
        config = {
            item.key: json.loads(item.value_json) for each in by_kind["config"] for item in each.update
        }
        assert config["seed"] == SEEDS[job]
        assert len(config["fingerprint"]) == 32
        assert by_kind["metric"][-1].step_metric == "tokens"
        rows = [{"/".join(i.nested_key): i.value_json for i in each.item} for each in by_kind["history"]]
        points = [(float(row["tokens"]), float(row["val_loss"])) for row in rows if "val_loss" in row]
        assert points == val_losses(sweep, job)
        pictures = [key for row in rows for key in row if key.endswith("/count")]
        assert sorted(pictures) == [f"plots/{each}/count" for each in PICTURES]


@pytest.mark.heavy
def test_the_report_of_a_sweep_with_other_loggers_is_complete(sweep):
    results = [json.loads((sweep / f"multirun/four/{job}/result.json").read_text()) for job in range(4)]
    assert [result["status"] for result in results] == ["completed"] * 4
    assert "val loss" in (sweep / "multirun/four/0/summary.txt").read_text()
    assert (sweep / "multirun/four/sweep.html").exists()


@pytest.fixture
def offline(monkeypatch):
    database = f"sqlite:///{Path('outputs/mlflow.db').absolute()}"  # MLflow keeps it in the environment
    for name, value in (OFFLINE | {"MLFLOW_TRACKING_URI": database}).items():
        monkeypatch.setenv(name, value)
    Path("story.txt").write_text(STORY)


def the_run():
    client = mlflow.MlflowClient(os.environ["MLFLOW_TRACKING_URI"])
    (run,) = client.search_runs([client.get_experiment_by_name("lit_gptdata").experiment_id])
    return run


@pytest.mark.parametrize(("error", "status"), [(RuntimeError, "FAILED"), (KeyboardInterrupt, "KILLED")])
def test_a_run_that_fails_or_is_stopped_is_closed(offline, monkeypatch, error, status):
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(train, "save_summary", fail)
    with pytest.raises((RuntimeError, SystemExit)):
        run_train_here(*SMALL, "logger=mlflow", "output_dir=run")
    assert the_run().info.status == status


def test_a_loss_that_is_nan_is_logged(offline):
    run_train_here(*SMALL, "logger=mlflow", "output_dir=a/run", "model.learning_rate=1e30")
    assert the_run().info.status == "FINISHED"
    assert the_run().info.run_name == "run"
    assert str(the_run().data.metrics["val_loss"]) == "nan"
