"""`lit-gptdata score` on checkpoints: sums equal the validation's, in any number of runs and ranks."""

from __future__ import annotations

import csv
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import lightning as L
import pytest
import torch

from lit_gptdata import GPT, EmbeddingStem, GPTDataModule
from lit_gptdata.cli.main import main
from lit_gptdata.report import scoring
from tests.runs import make_trainer, words

pytestmark = pytest.mark.usefixtures("one_thread")
PACKAGE = Path(scoring.__file__).parents[2]
LENGTHS = [7, 0, 0, 31, 2, 90, 1, 0, 12, 5, 33, 8, 0, 3, 150, 4]  # words of each document


def documents(repeat: int = 1) -> list[str]:
    """Documents of one-token words, some empty, some over several windows."""
    ends = [sum(LENGTHS[: i + 1]) for i in range(len(LENGTHS))]
    return ["".join(words()[end - n : end]) for n, end in zip(LENGTHS, ends, strict=True)] * repeat


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


def test_the_losses_of_all_documents_sum_to_the_val_loss(capsys):
    expected = save(data := made())
    found = scored()
    assert mean(found) == pytest.approx(expected["val_loss"], rel=1e-6)
    begin, end = data.store.manifest.cuts or data._split.val
    assert sum(int(row["tokens"]) for row in found) == end - begin - 1
    n_bytes = sum(int(row["byte_end"]) - int(row["byte_begin"]) for row in found)
    bits = sum(float(row["nats"]) for row in found) / math.log(2) / n_bytes
    assert bits == pytest.approx(expected["val_bits_per_byte"], rel=1e-6)
    assert {data.store.place(t).document for t in range(begin + 1, end)} == {
        int(row["document"]) for row in found
    }
    out = capsys.readouterr().out
    assert f"{expected['val_loss']:.4f}" in out and f"{expected['val_bits_per_byte']:.4f}" in out
    assert Path("a-scores-val.png").read_bytes()[1:4] == b"PNG"
    assert not list(Path().glob(".a-scores*"))


def test_train_and_all_of_a_corpus_can_be_scored_and_other_options_of_the_data_apply():
    save(data := made())
    train = scored("split=train", "output=t.csv", file="t.csv")
    assert sum(int(row["tokens"]) for row in train) == data._split.train[1] - 1
    every = scored("split=all", "output=e.csv", file="e.csv")
    assert sum(int(row["tokens"]) for row in every) == data.store.n_tokens - 1
    assert [row["document"] for row in every] == [str(n) for n in range(1, 17)]
    small = scored("data.batch_size=1", "trainer.precision=64-true", "output=s.csv", file="s.csv")
    assert mean(small) == pytest.approx(mean(scored()), rel=1e-6)
    assert small != scored()


def test_another_text_is_scored_as_a_whole_even_a_short_one():
    save(made())
    Path("other.txt").write_text(" a few words")
    (row,) = scored("other.txt", file="a-scores-all.csv")
    assert (row["source"], row["tokens"]) == (str(Path("other.txt").absolute()), "2")
    assert (row["byte_begin"], row["byte_end"]) == ("2", "12")


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
    write("single.jsonl", documents())
    scored("single.jsonl", "split=val")  # without val_corpus and stages


class Killed(Exception):
    pass


@pytest.mark.parametrize("n_batches", [4, 9, 10, 13, 20])
def test_a_stopped_run_continues_and_gives_the_same_bytes(monkeypatch, capsys, n_batches):
    save(made())
    scored()
    expected = Path("a-scores-val.csv").read_bytes()
    monkeypatch.setattr(scoring, "SAVE_BATCHES", 5)
    monkeypatch.setattr(scoring, "SAVE_S", 0.0)  # after each batch
    taken, losses = [], GPT.predict_step

    def predict_step(self, batch, batch_idx):
        taken.append(batch_idx)
        if len(taken) > n_batches:
            raise Killed
        return losses(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(GPT, "predict_step", predict_step)
        status = main(["score", "a.ckpt", "output=b.csv", "trainer.accelerator=cpu"])
    n_all = 11
    if n_batches < n_all:
        assert status == 1 and not Path("b.csv").exists()
        assert bool(list(Path().glob(".b.csv.*.npz"))) == (n_batches >= 5)
    taken.clear()
    with monkeypatch.context() as patch:
        n_batches = 99
        patch.setattr(GPT, "predict_step", predict_step)
        scored("output=b.csv", file="b.csv")
    assert Path("b.csv").read_bytes() == expected
    assert not list(Path().glob(".b.csv.*"))
    print(len(taken))
