"""Each named source has its own val loss, and val_loss covers the sources that train."""

from __future__ import annotations

import logging
import math
from pathlib import Path

import pytest
import torch

from lit_gptdata import GPT
from lit_gptdata.training.checkpoints import BestCheckpoint
from lit_gptdata.training.val_sets import ValSets, coverage
from tests.model.small_gpt import SmallData, make_gpt
from tests.runs import StoppableGPT, make_data, make_model, make_trainer, opened, write_val_sources

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("sources")


def mixture(folder: Path, *names: str, **options):
    """Sources without weights, in this order; `val_corpus` may name one of them."""
    sources = write_val_sources(folder)
    if "val_corpus" in options:
        options["val_corpus"] = {name: sources[name]["path"] for name in options["val_corpus"]}
    return make_data(folder, corpus={name: sources[name] for name in names}, **options)


def scores(data, model=None, split: str = "val", **options) -> dict[str, float]:
    trainer = make_trainer(**options)
    run = trainer.test if split == "test" else trainer.validate
    return run(model or make_model(), datamodule=data, verbose=False)[0]


def nats_of(model: GPT, windows) -> tuple[float, int]:
    """Nats and number of the scored targets, window by window."""
    nats, n = 0.0, 0
    with torch.no_grad():
        for inputs, targets in (windows[i] for i in range(len(windows))):
            nats += model.eval().losses((inputs[None], targets[None])).double().sum().item()
            n += int((targets != -100).sum())
    return nats, n


def test_each_set_has_its_own_loss_and_the_total_covers_the_sources_that_train(folder):
    data = mixture(folder, "a", "b", val_corpus=["c"], test_fraction=0.2)
    found, model = scores(data), make_model()
    names = {"val_loss", "val_perplexity", "val_bits_per_byte"}
    assert set(found) == names.union(*({f"val_loss/{s}", f"val_bits_per_byte/{s}"} for s in "abc"))
    sums = {each.name: nats_of(model, each.windows) for each in data.eval_sets("val")}
    for name, (nats, n) in sums.items():
        assert found[f"val_loss/{name}"] == pytest.approx(nats / n, rel=1e-6)
    n_tokens = {name: n for name, (_, n) in sums.items()}
    assert n_tokens["c"] == 499  # all of it is val, and each token but the first is scored
    total = sum(found[f"val_loss/{name}"] * n_tokens[name] for name in "ab")
    assert total == pytest.approx(found["val_loss"] * (n_tokens["a"] + n_tokens["b"]), rel=1e-9)
    assert found["val_perplexity"] == pytest.approx(math.exp(found["val_loss"]))
    assert set(scores(data, split="test")) == {
        f"test_{name}" for name in ("loss", "perplexity", "bits_per_byte", "loss/a", "loss/b",
                                    "bits_per_byte/a", "bits_per_byte/b")
    }  # fmt: skip


def test_bits_per_byte_count_the_bytes_of_each_source(folder):
    data = opened(mixture(folder, "a", "b"))
    model, found = make_model(), scores(data)
    counted = {}
    for name, source in data.sources.items():
        begin, end = source.split.val
        n_bytes = source.store.byte_at(end) - source.store.byte_at(begin + 1)
        counted[name] = nats_of(model, source.val_windows)[0] / math.log(2), n_bytes
        bits, n_bytes = counted[name]
        assert found[f"val_bits_per_byte/{name}"] == pytest.approx(bits / n_bytes, rel=1e-6)
    bits, n_bytes = map(sum, zip(*counted.values(), strict=True))
    assert found["val_bits_per_byte"] == pytest.approx(bits / n_bytes, rel=1e-6)


def test_another_source_or_weight_leaves_the_losses_of_a_source_bit_identical(folder):
    before, after = scores(mixture(folder, "a", "b")), scores(mixture(folder, "c", "b", "a"))
    for name in ("val_loss/a", "val_loss/b", "val_bits_per_byte/a", "val_bits_per_byte/b"):
        assert after[name] == before[name]
    assert after["val_loss"] != before["val_loss"]
    sources = write_val_sources(folder)
    for name, weight in {"a": 0.9, "b": 0.1, "c": 0}.items():
        sources[name]["weight"] = weight
    weighted = scores(make_data(folder, corpus=sources))
    assert weighted == before | {name: after[name] for name in ("val_loss/c", "val_bits_per_byte/c")}


def test_one_named_source_is_the_total_and_a_corpus_without_names_logs_no_names(folder):
    path = write_val_sources(folder)["a"]["path"]
    total = scores(make_data(folder, corpus=path, val_fraction=0.3))
    assert set(total) == {"val_loss", "val_perplexity", "val_bits_per_byte"}
    named = scores(mixture(folder, "a"))
    assert named == total | {f"{name}/a": total[name] for name in ("val_loss", "val_bits_per_byte")}
    with_c = scores(mixture(folder, "a", val_corpus=["c"]))
    unnamed = scores(
        make_data(
            folder,
            corpus=path,
            val_fraction=0.3,
            val_corpus={"c": write_val_sources(folder)["c"]["path"]},
        )
    )
    assert unnamed.items() < with_c.items()


def test_without_val_text_of_the_corpus_val_loss_covers_val_corpus(folder):
    sources = write_val_sources(folder)
    data = make_data(
        folder, corpus=sources["a"]["path"], val_fraction=0, val_corpus={"b": sources["b"]["path"]}
    )
    found = scores(data)
    assert found["val_loss"] == found["val_loss/b"]
    assert "b (170 tokens)" in coverage(data, make_model())


class LoggedPerSet(StoppableGPT):
    """Logs one loss for each set, which Lightning renames."""

    own = None  # value of a val_loss that the model computes itself

    def on_validation_epoch_start(self) -> None: ...

    def on_validation_epoch_end(self) -> None:
        if self.own is not None:
            self.log("val_loss", self.own)

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        n = int((batch[1] != -100).sum())
        self.log("val_loss", self.losses(batch).sum() / n, batch_size=n)


class LoggedOnce(LoggedPerSet):
    def validation_step(self, batch, batch_idx):
        super().validation_step(batch, batch_idx)


def as_model(kind: type) -> StoppableGPT:
    model = make_model()
    model.__class__ = kind
    return model


def test_a_model_that_logs_per_set_gets_the_total_for_callbacks_logs_and_results(folder, tmp_path):
    data = mixture(folder, "a", "b", val_corpus=["c"])
    expected = scores(data)
    found = scores(data, as_model(LoggedPerSet), callbacks=[ValSets()])
    assert found["val_loss"] == pytest.approx(expected["val_loss"], rel=1e-6)
    assert found["val_loss/dataloader_idx_0"] == pytest.approx(expected["val_loss/a"], rel=1e-6)
    best = BestCheckpoint(tmp_path / "best", monitor="val_loss")
    callbacks = [ValSets(), best]
    trainer = make_trainer(
        max_steps=4, val_check_interval=2, callbacks=callbacks, enable_checkpointing=True
    )
    trainer.fit(model := as_model(LoggedPerSet), datamodule=data)
    last = trainer.callback_metrics["val_loss"].item()
    assert best.best_model_score.item() <= last
    assert last == pytest.approx(scores(data, model, callbacks=[ValSets()])["val_loss"], rel=1e-6)


def test_a_total_that_the_model_logs_itself_stays(folder):
    model = as_model(LoggedPerSet)
    model.own = 7.0
    trainer = make_trainer(callbacks=[ValSets()])
    for _ in range(2):
        found = trainer.validate(model, datamodule=mixture(folder, "a", "b"), verbose=False)[0]
        assert found["val_loss"] == 7


def test_a_step_without_dataloader_idx_has_one_loss_over_all_sets(folder):
    data = mixture(folder, "a", "b", val_corpus=["c"])
    found = scores(data, as_model(LoggedOnce), callbacks=[ValSets()])
    assert set(found) == {"val_loss"}
    nats, n = map(
        sum, zip(*(nats_of(make_model(), s.windows) for s in data.eval_sets("val")), strict=True)
    )
    assert found["val_loss"] == pytest.approx(nats / n, rel=1e-6)
    assert "c (500 tokens)" in coverage(data, as_model(LoggedOnce))


def test_a_subclass_of_gpt_with_the_old_step_logs_the_total_of_all_sets(folder):
    class OldStep(StoppableGPT):
        def validation_step(self, batch, batch_idx):
            super().validation_step(batch, batch_idx)

    found = scores(mixture(folder, "a", "b", val_corpus=["c"]), as_model(OldStep))
    assert set(found) == {"val_loss", "val_perplexity", "val_bits_per_byte"}


class TwoLoaders(SmallData):
    """Another data module, with the old `scored_bytes` and several loaders."""

    def val_dataloader(self):
        return [super().val_dataloader(), super().test_dataloader()]

    def scored_bytes(self, split, n_targets, ordinary, special):
        return ordinary


def test_loaders_of_another_data_module_are_scored_by_number():
    found, model, data = scores(TwoLoaders(), make_gpt()), make_gpt(), TwoLoaders()
    parts = [make_trainer().validate(model, each, verbose=False)[0] for each in data.val_dataloader()]
    for i, part in enumerate(parts):
        assert found[f"val_loss/{i}"] == part["val_loss"]
    low, high = sorted(part["val_loss"] for part in parts)
    assert low <= found["val_loss"] <= high


def test_the_log_says_what_val_loss_covers(folder, caplog):
    data = mixture(folder, "a", "b", val_corpus=["c"])
    with caplog.at_level(logging.INFO):
        scores(data, callbacks=[ValSets()])
    (text,) = (record.getMessage() for record in caplog.records if "val_sets" in record.name)
    names = "a (67 tokens), b (49 tokens)"
    assert text == f"val_loss covers {names}, so compare it only with runs over the same sources"


@pytest.mark.parametrize(("limit", "n"), [(2, 16), (0.5, 16), (1.0, 0), (9, 0)])
def test_the_log_says_that_a_limit_of_val_batches_scores_other_text(folder, caplog, limit, n):
    path = write_val_sources(folder)["c"]["path"]
    data = make_data(folder, corpus=path, val_fraction=0.4, batch_size=8)
    with caplog.at_level(logging.INFO):
        scores(data, callbacks=[ValSets()], limit_val_batches=limit)
    texts = [record.getMessage() for record in caplog.records if "val_sets" in record.name]
    found = [f"val_loss covers the first {n} of 25 windows, by limit_val_batches={limit}: "] if n else []
    assert [text[: text.find(": ") + 2] for text in texts] == found
