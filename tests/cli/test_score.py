"""`lit-gptdata score` on checkpoints: sums equal the validation's, in any number of runs and ranks."""

from __future__ import annotations

import csv
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import lightning as L
import pytest
import torch

from lit_gptdata import GPT, EmbeddingStem, GPTDataModule
from lit_gptdata.cli.main import main
from lit_gptdata.report import scoring
from tests.runs import make_trainer, words
from tests.training.run_train import ROOT

pytestmark = pytest.mark.usefixtures("one_thread")
LENGTHS = [7, 0, 0, 31, 2, 90, 1, 0, 12, 5, 33, 8, 0, 3, 150, 4]  # words of each document


@pytest.fixture(autouse=True)
def drawn(monkeypatch) -> list[Path]:
    """The pictures that the commands of a test would draw, which takes as long as all the rest."""
    paths: list[Path] = []
    monkeypatch.setattr(scoring, "draw_scores", lambda *given: paths.append(given[-1]))
    return paths


def documents() -> list[str]:
    """Documents of one-token words, some empty, some over several windows."""
    ends = [sum(LENGTHS[: i + 1]) for i in range(len(LENGTHS))]
    return ["".join(words()[end - n : end]) for n, end in zip(LENGTHS, ends, strict=True)]


def write(name: str, texts: list[str]) -> str:
    Path(name).write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return name


def save(
    data: GPTDataModule, model: L.LightningModule | None = None, file: str = "a.ckpt"
) -> dict[str, float]:
    """Save a checkpoint of an untrained model and its data; return its val scores."""
    torch.manual_seed(0)
    stem = EmbeddingStem(data.vocab_size, data.max_length, embedding_dim=4)
    trainer = make_trainer()
    model = model or GPT(stem, n_layers=1, n_heads=1)
    torch.nn.init.normal_(next(model.parameters()))  # losses that differ
    scores = trainer.validate(model, datamodule=data, verbose=False)[0]
    trainer.save_checkpoint(file)
    return scores


def made(corpus="docs.jsonl", **options) -> GPTDataModule:
    if corpus == "docs.jsonl":
        write(corpus, documents())
    windows = {"max_length": 16, "stride": 16, "batch_size": 2, "val_fraction": 0.5}
    return GPTDataModule(corpus, **windows | {"build_workers": 1, "engine": "tiktoken"} | options)


def rows(file: str | Path) -> list[dict[str, str]]:
    with open(file, newline="") as text:
        return list(csv.DictReader(text))


def scored(*arguments: str, file: str = "a-scores-val.csv") -> list[dict[str, str]]:
    assert main(["score", "a.ckpt", *arguments, "trainer.accelerator=cpu"]) == 0
    return rows(file)


def mean(found: list[dict[str, str]]) -> float:
    return sum(float(row["nats"]) for row in found) / sum(int(row["tokens"]) for row in found)


def test_the_losses_of_all_documents_sum_to_the_val_loss(capsys, drawn):
    expected = save(data := made())
    found = scored()
    assert mean(found) == pytest.approx(expected["val_loss"], rel=1e-6)
    begin, end = data.store.manifest.cuts or data._data.first.split.val
    assert sum(int(row["tokens"]) for row in found) == end - begin - 1
    n_bytes = sum(int(row["byte_end"]) - int(row["byte_begin"]) for row in found)
    bits = sum(float(row["nats"]) for row in found) / math.log(2) / n_bytes
    assert bits == pytest.approx(expected["val_bits_per_byte"], rel=1e-6)
    assert {data.store.place(t).document for t in range(begin + 1, end)} == {
        int(row["document"]) for row in found
    }
    out = capsys.readouterr().out
    assert f"{expected['val_loss']:.4f}  {expected['val_bits_per_byte']:.4f}" in re.sub(" +", "  ", out)
    assert drawn == [Path("a-scores-val.png").absolute()]
    assert not list(Path().glob(".a-scores*"))


def test_train_and_all_of_a_corpus_can_be_scored_and_other_options_of_the_data_apply():
    expected = save(data := made())
    train = scored("split=train", "output=t.csv", file="t.csv")
    assert sum(int(row["tokens"]) for row in train) == data._data.first.split.train[1] - 1
    every = scored("split=all", "output=e.csv", file="e.csv")
    assert sum(int(row["tokens"]) for row in every) == data.store.n_tokens - 1
    assert [row["document"] for row in every] == [str(n) for n in range(1, 17)]
    double = scored("data.batch_size=1", "trainer.precision=64-true")
    assert mean(double) == pytest.approx(expected["val_loss"], rel=1e-6)


def test_another_text_is_scored_as_a_whole_even_a_short_one(capsys):
    save(made())
    capsys.readouterr()
    Path("other.txt").write_text(" a few words")
    (row,) = scored("other.txt", file="a-scores-all.csv")
    assert (row["source"], row["tokens"]) == (str(Path("other.txt").absolute()), "2")
    assert (row["byte_begin"], row["byte_end"]) == ("2", "12")
    assert "of the 1 documents with ≥ 1 tokens" in capsys.readouterr().out


def test_each_set_of_a_mixture_is_scored_with_its_name():
    for number, name in enumerate(("web", "code", "new")):
        write(f"{name}.jsonl", [f"{number} {text}" for text in documents()])
    corpus = {name: {"path": f"{name}.jsonl", "weight": 1} for name in ("web", "code")}
    expected = save(data := made(corpus, val_corpus={"new": "new.jsonl"}))
    found = scored()
    for name in ("web", "code", "new"):
        of = [row for row in found if row["name"] == name]
        assert mean(of) == pytest.approx(expected[f"val_loss/{name}"], rel=1e-6)
        assert {row["source"] for row in of} == {str(Path(f"{name}.jsonl").absolute())}
    both = [row for row in found if row["name"] != "new"]
    assert mean(both) == pytest.approx(expected["val_loss"], rel=1e-6)
    assert len(data.eval_sets("val")) == 3
    every = scored("split=all", "output=e.csv", file="e.csv")
    assert sum(int(row["tokens"]) for row in every) == sum(s.store.n_tokens - 1 for s in data._data.all)
    write("single.jsonl", documents())
    assert {row["name"] for row in scored("single.jsonl", "split=val")} == {""}


@pytest.mark.parametrize("kind", ["packed", "documents"])
def test_windows_of_documents_score_each_token_and_a_separator(kind, capsys):
    expected = save(data := made(eval_windows=kind))
    found = scored()
    assert f"windows  {kind}, 16 tokens each" in capsys.readouterr().out
    assert mean(found) == pytest.approx(expected["val_loss"], rel=1e-6)
    assert sum(int(row["tokens"]) for row in found) == data.val_windows.n_targets
    utf8 = [text.encode() for text in documents()]
    for row in found:  # all of them are whole, because a border of the split is between two documents
        assert (row["byte_begin"], row["byte_end"]) == ("0", str(len(utf8[int(row["document"]) - 1])))
    assert scored(f"data.eval_windows={kind}") == found
    assert mean(scored("data.eval_windows=sliding")) != pytest.approx(mean(found), rel=1e-6)


class KilledError(Exception):
    """Stops a run between two batches."""


def stop_after(n_batches: float, taken: list[int], monkeypatch) -> None:
    predict_step = GPT.predict_step

    def stopping(self, batch, batch_idx):
        if len(taken) == n_batches:
            raise KilledError
        taken.append(batch_idx)
        return predict_step(self, batch, batch_idx)

    monkeypatch.setattr(GPT, "predict_step", stopping)


@pytest.mark.parametrize("n_batches", [4, 8])
def test_a_stopped_run_continues_and_gives_the_same_bytes(monkeypatch, capsys, n_batches):
    save(made(batch_size=1))
    taken: list[int] = []
    monkeypatch.setattr(scoring, "SAVE_BATCHES", 3)
    monkeypatch.setattr(scoring, "SAVE_S", 0.0)  # then after each batch
    with monkeypatch.context() as patch:
        stop_after(math.inf, taken, patch)
        scored()
    n_all = len(taken)
    with monkeypatch.context() as patch:
        taken.clear()
        stop_after(n_batches, taken, patch)
        assert main(["score", "a.ckpt", "output=b.csv", "trainer.accelerator=cpu"]) == 1
    assert not Path("b.csv").exists()
    assert len(list(Path().glob(".b.csv.*.npy"))) == 1
    with monkeypatch.context() as patch:
        taken.clear()
        stop_after(math.inf, taken, patch)
        scored("output=b.csv", file="b.csv")
    assert len(taken) == n_all - n_batches
    assert Path("b.csv").read_bytes() == Path("a-scores-val.csv").read_bytes()
    assert not list(Path().glob(".*"))


def test_a_file_that_could_not_be_written_is_written_without_scoring_again(monkeypatch, capsys):
    save(made(batch_size=1))
    monkeypatch.setattr(scoring, "SAVE_BATCHES", 1)
    monkeypatch.setattr(scoring, "SAVE_S", 0.0)
    with monkeypatch.context() as patch:
        patch.setattr(scoring, "write_scores", lambda *_: 1 / 0)
        assert main(["score", "a.ckpt", "trainer.accelerator=cpu"]) == 1
    stop_after(0, [], monkeypatch)
    capsys.readouterr()
    assert len(scored()) == 5
    assert capsys.readouterr().out.startswith("continues after batch 11 of 11")


def test_another_checkpoint_or_text_starts_again_and_removes_the_old_sums(monkeypatch):
    save(made(batch_size=1))
    monkeypatch.setattr(scoring, "SAVE_BATCHES", 3)
    for options in ([], ["split=train"], ["data.batch_size=2"]):
        with monkeypatch.context() as patch:
            stop_after(4, [], patch)
            assert main(["score", "a.ckpt", "output=b.csv", "trainer.accelerator=cpu", *options]) == 1
        (old,) = Path().glob(".b.csv.*.npy")
    save(made(batch_size=1))
    with monkeypatch.context() as patch:
        stop_after(math.inf, taken := [], patch)
        scored("output=b.csv", "data.batch_size=2", file="b.csv")
    assert len(taken) == 6
    assert not old.exists()


class Plain(L.LightningModule):
    """A foreign model that only trains."""

    def __init__(self, vocab_size: int = 50257) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.table = torch.nn.Embedding(vocab_size, 4)

    def training_step(self, batch, batch_idx):
        return self.table(batch[0]).sum()


class WithLogits(Plain):
    def predict_step(self, batch, batch_idx):
        return {"logits": self.table(batch[0]) @ self.table.weight.T}


class WithMean(Plain):
    def predict_step(self, batch, batch_idx):
        return self.table(batch[0]).mean()


def save_foreign(kind: type[L.LightningModule]) -> None:
    torch.manual_seed(0)
    trainer = make_trainer()
    trainer.strategy.connect(kind())
    trainer._data_connector.attach_datamodule(trainer.lightning_module, made())
    Path("run/checkpoints").mkdir(parents=True, exist_ok=True)
    trainer.save_checkpoint("run/checkpoints/a.ckpt")
    name = f"{kind.__module__}.{kind.__qualname__}"
    Path("run/config.yaml").write_text(f"model:\n  _target_: {name}\n")


def test_other_models_need_a_predict_step_that_returns_losses_or_logits(capsys):
    save_foreign(WithLogits)
    assert main(["score", "run", "output=a.csv", "trainer.accelerator=cpu"]) == 0
    assert len(rows("a.csv")) == 5
    for kind, problem in ((Plain, "has no predict_step: add"), (WithMean, "returned Tensor")):
        save_foreign(kind)
        assert main(["score", "run", "output=a.csv", "trainer.accelerator=cpu"]) == 1
        err = capsys.readouterr().err
        assert problem in err
        assert "It must return losses in nats, float (B, T), or logits" in err


def test_wrong_options_are_refused_in_one_line(capsys):
    save(made())
    Path("folder.csv").mkdir()
    Path("one.txt").write_text("a")
    capsys.readouterr()
    for word, message in {
        "output=folder.csv": "folder.csv: Is a folder: set output=… to a file",
        "split=dev": "split must be one of ('val', 'test', 'train', 'all'), got 'dev'",
        "one.txt": "the text has only one token, with none before it: give more text",
        "split=test": "there is no test split to score: give a text, split=all, or",
        "model.n_heads=2": "model.n_heads=2 has no effect, because the model is the checkpoint's",
        "data.max_lenght=8": "did you mean data.max_length?",
        "output=a.txt": "output must be a .csv or .parquet file",
        "min_token=3": "min_token=… does not exist: did you mean min_tokens=…?",
    }.items():
        assert main(["score", "a.ckpt", word]) == 1
        errors = [e for e in capsys.readouterr().err.splitlines() if e.startswith("error")]
        assert len(errors) == 1
        assert message in errors[0]


KILLED = """
import os, signal
from lit_gptdata import GPT
from lit_gptdata.report import scoring
scoring.SAVE_BATCHES, scoring.SAVE_S = 2, 0.0

class KilledGPT(GPT):
    def predict_step(self, batch, batch_idx):
        kill = os.environ.get("KILL", "").split()  # rank, batch
        if kill == [str(self.global_rank), str(batch_idx)]:
            os.kill(os.getpid(), signal.SIGKILL)
        with open(f"batches-{self.global_rank}", "a") as file:
            file.write("x")
        return super().predict_step(batch, batch_idx)
"""


@pytest.mark.heavy
@pytest.mark.parametrize("n_ranks", [1, 2])
def test_a_killed_run_continues_and_gives_the_same_bytes(n_ranks):
    Path("killed.py").write_text(KILLED)
    Path("run/checkpoints").mkdir(parents=True)
    Path("run/config.yaml").write_text("model:\n  _target_: killed.KilledGPT\n")
    expected = save(made(), file="run/checkpoints/a.ckpt")
    command = [sys.executable, "-m", "lit_gptdata", "score", "run", "data.batch_size=1"]
    command += ["trainer=ddp", f"trainer.devices={n_ranks}", "trainer.accelerator=cpu"]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

    def start(output: str, kill: str = "") -> int:
        options = {"env": env | {"KILL": kill}, "timeout": 300, "capture_output": True}
        return subprocess.run([*command, f"output={output}"], **options).returncode

    assert start("a.csv") == 0
    assert mean(rows("a.csv")) == pytest.approx(expected["val_loss"], rel=1e-6)
    n_all = Path("batches-0").stat().st_size
    Path("batches-0").unlink()
    assert start("b.csv", f"{n_ranks - 1} 4") != 0
    assert len(list(Path().glob(".b.csv.*.npy"))) >= n_ranks
    Path("batches-0").unlink()
    assert start("b.csv") == 0
    assert Path("batches-0").stat().st_size < n_all
    assert Path("b.csv").read_bytes() == Path("a.csv").read_bytes()
    assert not list(Path().glob(".*"))
