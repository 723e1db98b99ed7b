"""lit-gptdata rerun: a job again, bit for bit, and the unfinished jobs of a sweep."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from lit_gptdata.cli import rerun, train
from lit_gptdata.cli.main import main
from tests.cli.test_cli import run
from tests.training.run_train import STORY, run_train, run_train_here

TEXT = ("data.corpus=story.txt", "threads=1", "debug=fast")


def read(folder: str) -> dict:
    return json.loads(Path(folder, "result.json").read_text())


def train_here(words: list[str]) -> int:
    """Stands for `lit-gptdata train` with a recorded config."""
    options = dict(word.split("=", 1) for word in words)
    with initialize_config_dir(options["--config-path"], version_base="1.3"):
        cfg = compose(options["--config-name"])
    assert cfg.output_dir is None
    cfg.output_dir = options["hydra.run.dir"]
    train.main(cfg)
    return 0


@pytest.mark.usefixtures("one_thread")
def test_a_job_repeats_bit_by_bit_in_a_new_folder_and_a_difference_is_an_error(monkeypatch, capsys):
    monkeypatch.setattr(rerun, "train", train_here)
    Path("story.txt").write_text(STORY)
    run_train_here(*TEXT, "output_dir=old", "seed=null")
    before = {path: path.read_bytes() for path in Path("old").rglob("*") if path.is_file()}
    assert main(["rerun", "old"]) == 0
    assert {path: path.read_bytes() for path in before} == before
    printed = capsys.readouterr().out
    assert (
        printed.count("  bitwise equal\n") == len(read("old")["metrics"].keys() - {*rerun.SPEEDS}) >= 4
    )
    old = read("old")
    del old["metrics"]["train_loss"]  # as an old version, which recorded fewer
    old["metrics"]["val_loss"] = math.nextafter(old["metrics"]["val_loss"], 0)
    Path("old/result.json").write_text(json.dumps(old))
    assert main(["rerun", "old"]) == 1
    printed = capsys.readouterr()
    assert printed.out.count("  different\n") == 1
    assert "error: 1 of " in printed.err


@pytest.mark.heavy
def test_each_job_of_a_sweep_repeats_and_unfinished_jobs_run_in_their_folders(capsys):
    Path("story.txt").write_text(STORY)
    words = ("-m", *TEXT[:2], "+sweep=context", "debug=fast", "data.max_length=8,16,32", "seed=null")
    run_train(*words, "max_tokens=256", "hydra.sweep.dir=sweep", cwd=Path.cwd())
    for job in "012":
        main(["rerun", f"sweep/{job}"])
    recorded = [read(f"sweep/{job}") for job in "012"]
    new = [json.loads(path.read_text()) for path in sorted(Path("outputs").glob("*/*/result.json"))]
    for old, again in zip(recorded, new, strict=True):
        for speed in rerun.SPEEDS:
            old["metrics"].pop(speed, None), again["metrics"].pop(speed, None)
        assert again["metrics"] == old["metrics"]
    Path("sweep/1/result.json").write_text(json.dumps(recorded[1] | {"status": "running"}))
    for path in sorted(Path("sweep/2").rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    Path("sweep/2").rmdir()  # never started
    unchanged = Path("sweep/0/result.json").stat()
    assert main(["rerun", "sweep", "--unfinished"]) == 0
    assert Path("sweep/0/result.json").stat() == unchanged
    for job in "12":
        result = read(f"sweep/{job}")
        assert (result["status"], result["overrides"]) == ("completed", recorded[int(job)]["overrides"])
    assert Path("sweep/sweep.html").exists()
    assert "+sweep=context" in result["overrides"]
    Path("sweep/multirun.yaml").unlink()
    assert "as after an Optuna sweep" in run(capsys, "rerun", "sweep", "--unfinished", expect=1)
