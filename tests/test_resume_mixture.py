"""A run on a mixture resumes exactly on any number of ranks, and continues with other data on demand."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lit_gptdata import GPTDataModule
from tests.runs import (
    EPOCH_BATCHES,
    LENGTH,
    make_data,
    opened,
    train,
    windows_of,
    write_documents,
    write_sources,
)
from tests.test_resume import STOP_AT, assert_resumes, grid, ranks_job, results, run_jobs, seen_by_all

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*exists and is not empty.*"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed.*"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks.*"),
]

WEIGHTS = {"web": 0.6, "code": 0.3, "books": 0.1}
SAVE = {"every_n_train_steps": 5, "filename": "{step}"}
STEP = 4 * LENGTH  # tokens of a step
STAGES = [  # they change after 12 and 42 batches of 4 windows, between the places where runs stop
    {"tokens": 12 * STEP, "weights": WEIGHTS},
    {"tokens": 30 * STEP, "weights": {"web": 0, "code": 0.3, "books": 0.7}},
    {"weights": {"web": 0.8, "code": 0.2, "books": 0}},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("resume_mixture")
    write_sources(folder)
    return folder


def weighted(folder: Path, **weights: float) -> dict[str, Any]:
    return {name: {"path": str(folder / f"{name}.txt"), "weight": w} for name, w in weights.items()}


def mixture(folder: Path) -> dict[str, Any]:
    return {"corpus": weighted(folder, **WEIGHTS)}


def staged(folder: Path) -> dict[str, Any]:
    return {"corpus": write_sources(folder), "stages": STAGES}


PACKED = {"windows": "packed", "eval_windows": "packed", "val_fraction": 0.23}  # 25 batches, and a tail


def packed(folder: Path) -> dict[str, Any]:
    return {"corpus": write_documents(folder)["all"], **PACKED}


def packed_mixture(folder: Path) -> dict[str, Any]:
    paths = write_documents(folder)
    return {"corpus": {n: {"path": paths[n], "weight": w} for n, w in WEIGHTS.items()}, **PACKED}


STAGED = grid({("by step", 3, 2), ("exception", 4, 1)}, shift=1)
MIXTURE = grid(set())[::5]  # each way to save, and each of the other options
DOCUMENTS = grid({("by step", 3, 2)}, shift=1)  # of windows of documents
CELLS = [
    pytest.param(*cell.values, kind, marks=cell.marks)
    for cells, kind in (
        (STAGED, staged),
        (MIXTURE, mixture),
        (DOCUMENTS, packed),
        (DOCUMENTS[::5], packed_mixture),
    )
    for cell in cells
]


@pytest.mark.parametrize(("saved_by", "accumulate", "workers", "limit", "epoch", "kind"), CELLS)
def test_a_resumed_mixture_equals_a_run_that_never_stops(
    folder, tmp_path, saved_by, accumulate, workers, limit, epoch, kind
):
    data = json.dumps(kind(folder))
    assert_resumes(folder, tmp_path, saved_by, accumulate, workers, limit, epoch, data)


def test_windows_of_documents_have_as_many_batches_as_sliding_ones(folder):
    for kind in (packed, packed_mixture):
        data = opened(make_data(folder, **kind(folder)))
        assert len(data.train_windows) // 4 == EPOCH_BATCHES
        assert data.train_windows.padding > 0.01


def test_stages_change_before_and_after_the_places_where_runs_stop(folder):
    data = opened(make_data(folder, **staged(folder)))
    n = len(data.train_windows)
    assert n // 4 == EPOCH_BATCHES
    begins = [stage.begin for stage in data.train_windows.stages]
    assert begins == [0, 12 * 4, n + (42 - EPOCH_BATCHES) * 4]
    assert STOP_AT[1] < 12 < STOP_AT[2] < 42


@functools.cache
def at(folder: Path, kind: Any, batch_size: int, begin: int, end: int) -> list[int]:
    """The windows at positions of a run with this many windows per step."""
    data = opened(make_data(folder, **kind(folder), batch_size=batch_size))
    return windows_of(data.train_windows.batch(np.arange(begin, end))[0])


def order_from(folder: Path, kind: Any, epoch: int, index: int, width: int) -> list[list[int]]:
    """The remaining steps of an epoch, in the order of a run of 8 windows per step, without the tail."""
    n = len(opened(make_data(folder, **kind(folder))).train_windows)
    order = at(folder, kind, 8, epoch * n + index, epoch * n + n)
    return [order[i : i + width] for i in range(0, len(order) - width + 1, width)]


KINDS = {"mixture": mixture, "staged": staged, "packed": packed_mixture}
TWO_RANKS = [pytest.param(kind, marks=pytest.mark.heavy) for kind in KINDS]


@pytest.fixture(scope="module", params=TWO_RANKS)
def two_ranks(folder, request) -> tuple[Path, Any]:
    """Runs on 2 ranks × 4 windows for two epochs: one saves at step 5, and others resume there."""
    out, data = folder / request.param, KINDS[request.param](folder)
    ckpt, save = str(out / "step=5.ckpt"), SAVE | {"dirpath": str(out)}
    jobs = [
        ranks_job(folder, out / "whole", 2, 4, data=data, max_epochs=2, save=save),
        ranks_job(folder, out / "same", 2, 4, data=data, max_epochs=2, ckpt_path=ckpt),
        ranks_job(folder, out / "2x6", 2, 6, data=data, max_epochs=2, ckpt_path=ckpt),
    ]
    assert run_jobs(jobs, folder) == 0
    return out, KINDS[request.param]


def test_two_ranks_see_the_positions_of_the_mixture_in_order(folder, two_ranks):
    out, kind = two_ranks
    ranks, same = results(out / "whole"), results(out / "same")
    assert seen_by_all(ranks) == order_from(folder, kind, 0, 0, 8) + order_from(folder, kind, 1, 0, 8)
    for number, rank in enumerate(ranks):
        assert [step[number] for step in rank["batch_at"]] == rank["seen"]
    assert seen_by_all(same) == seen_by_all(ranks)[5:]
    assert [rank["weights"] for rank in same] == [rank["weights"] for rank in ranks]


def test_two_ranks_continue_with_another_batch_size(folder, two_ranks):
    out, kind = two_ranks
    ranks = results(out / "2x6")
    later = order_from(folder, kind, 0, 5 * 8, 12) + order_from(folder, kind, 1, 0, 12)
    assert seen_by_all(ranks) == later
    for number, rank in enumerate(ranks):
        assert [step[number] for step in rank["batch_at"]] == rank["seen"]


@pytest.mark.parametrize("batch_size", [8, 4])
def test_one_rank_continues_a_mixture_of_two(folder, two_ranks, batch_size):
    out, kind = two_ranks
    data = kind(folder) | {"batch_size": batch_size}
    alone, _ = train(folder, data=data, ckpt_path=out / "step=5.ckpt", max_epochs=2)
    first, second = (order_from(folder, kind, *start, batch_size) for start in ((0, 5 * 8), (1, 0)))
    assert alone.seen == first + second
    batches = [windows_of(alone.data.batch_at(5 + i)[0]) for i in range(len(alone.seen))]
    assert batches == alone.seen
    before = [windows_of(alone.data.batch_at(i, rank=r)[0]) for i in range(5) for r in (0, 1)]
    assert before == order_from(folder, kind, 0, 0, 4)[:10]


@pytest.mark.heavy
def test_four_ranks_continue_a_mixture_of_two(folder, two_ranks):
    out, kind = two_ranks
    ckpt, data = str(out / "step=5.ckpt"), kind(folder)
    assert (
        run_jobs([ranks_job(folder, out / "4x2", 4, 2, data=data, max_epochs=2, ckpt_path=ckpt)], folder)
        == 0
    )
    ranks = results(out / "4x2")
    assert len(ranks) == 4
    later = order_from(folder, kind, 0, 5 * 8, 8) + order_from(folder, kind, 1, 0, 8)
    assert seen_by_all(ranks) == later


DATA: dict[str, Any] = {
    "weights": mixture,
    "other weights": lambda folder: {"corpus": weighted(folder, web=0.2, code=0.7, books=0.1)},
    "two sources": lambda folder: {"corpus": weighted(folder, web=0.5, code=0.5)},
    "stages": staged,
    "one corpus": lambda folder: {"corpus": str(folder / "code.txt")},
    "another corpus": lambda folder: {"corpus": str(folder / "web.txt"), "stride": 4},
    "no weights": lambda folder: {"corpus": write_sources(folder)},
    "sliding": lambda folder: packed(folder) | {"windows": "sliding"},
    "packed": packed,
    "documents": lambda folder: packed(folder) | {"windows": "documents"},
}


def saved(folder: Path, out: Path, name: str, max_steps: int = 10) -> Path:
    """Train on some data until step 10; the checkpoint of step 5."""
    train(folder, data=DATA[name](folder), save=SAVE | {"dirpath": out}, max_steps=max_steps)
    return out / "step=5.ckpt"


def continued(folder: Path, name: str, ckpt: Path, max_steps: int, **options: Any):
    data = DATA[name](folder) | {"on_change": "continue"} | options.pop("data", {})
    return train(folder, data=data, ckpt_path=ckpt, max_steps=max_steps, **options)


def fresh(folder: Path, name: str, n: int, epoch: int = 0, **options) -> list[list[int]]:
    """The batches of a run that starts with this data: those of `epoch` for a corpus without a name."""
    data = opened(make_data(folder, **DATA[name](folder), **options))
    named = isinstance(data.hparams.corpus, dict)
    return [windows_of(data.batch_at(i, epoch=None if named else epoch)[0]) for i in range(n)]


CHANGES = [
    ("weights", "other weights"), ("weights", "stages"), ("stages", "weights"),
    ("two sources", "weights"), ("weights", "two sources"), ("one corpus", "weights"),
    ("stages", "one corpus"),
    ("one corpus", "another corpus"), ("weights", "no weights"),
    ("sliding", "packed"), ("packed", "sliding"),
]  # fmt: skip


@pytest.mark.parametrize(("before", "after"), CHANGES)
def test_a_run_continues_with_new_data_from_its_beginning(folder, tmp_path, before, after):
    ckpt = saved(folder, tmp_path, before)
    watch, _ = continued(folder, after, ckpt, 11)
    assert watch.seen == fresh(folder, after, 6, epoch=1)
    trainer = watch.data.trainer
    assert trainer.global_step == 11, "the step continues"
    assert trainer.optimizers[0].state_dict()["state"][0]["step"] == 11, "and so does the optimizer"
    assert trainer.lr_scheduler_configs[0].scheduler.last_epoch == 11
    first = fresh(folder, before, 5)
    assert [windows_of(watch.data.batch_at(i)[0]) for i in range(11)] == first + watch.seen
    assert windows_of(watch.data.batch_at(3, epoch=0)[0]) == first[3]
    assert windows_of(watch.data.batch_at(3, epoch=1)[0]) == watch.seen[3]


REFUSED = [
    ("weights", "other weights", ["web: weight was 0.6, now 0.2", "code: weight was 0.3, now 0.7"]),
    ("weights", "two sources", ["source books is missing now", "source web: weight was 0.6, now 0.5"]),
    ("two sources", "weights", ["source books was not there"]),
    ("weights", "stages", ["stages was None, now [{'tokens': 384"]),
    ("stages", "weights", ["stages was [{'tokens': 384", "now None"]),
    ("one corpus", "weights", ["the corpus was one corpus, now it is a mixture"]),
    ("stages", "one corpus", ["the corpus was a mixture, now it is one corpus"]),
    ("sliding", "packed", ["windows was 'sliding', now 'packed'"]),
    ("documents", "packed", ["windows was 'documents', now 'packed'. Set"]),
]  # fmt: skip


@pytest.mark.parametrize(("before", "after", "messages"), REFUSED)
def test_other_data_is_refused_with_the_source_and_both_values(
    folder, tmp_path, before, after, messages
):
    ckpt = saved(folder, tmp_path, before)
    with pytest.raises(ValueError, match="on_change=continue") as error:
        train(folder, data=DATA[after](folder), ckpt_path=ckpt, max_steps=14)
    for message in messages:
        assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.filterwarnings("ignore:source code. val changed since the last run")
def test_a_changed_text_of_a_source_is_refused_by_name(folder, tmp_path):
    path = tmp_path / "code.txt"
    path.write_text((folder / "code.txt").read_text())
    corpus = weighted(folder, web=0.5, code=0.5) | {"code": {"path": str(path), "weight": 0.5}}
    save = SAVE | {"dirpath": tmp_path}
    train(folder, data={"corpus": corpus}, save=save, max_steps=5)
    path.write_text((folder / "books.txt").read_text())
    with pytest.raises(ValueError, match=r"source code: store was '[0-9a-f]+', now '[0-9a-f]+'"):
        train(
            folder,
            data={"corpus": corpus, "val_fraction": 0.1},
            ckpt_path=tmp_path / "step=5.ckpt",
            max_steps=6,
        )


def test_a_continued_run_resumes_bitwise_and_continues_a_second_time(folder, tmp_path):
    ckpt = saved(folder, tmp_path / "a", "weights")
    whole, weights = continued(folder, "stages", ckpt, 40, save=SAVE | {"dirpath": tmp_path / "b"})
    middle = tmp_path / "b" / "step=15.ckpt"
    for on_change in ("refuse", "continue"):
        again, same = continued(folder, "stages", middle, 40, data={"on_change": on_change})
        assert again.seen == whole.seen[10:]
        assert all(torch.equal(same[name], weight) for name, weight in weights.items())
        assert windows_of(again.data.batch_at(2)[0]) == fresh(folder, "weights", 3)[2]

    third, _ = continued(folder, "two sources", middle, 22, save=SAVE | {"dirpath": tmp_path / "c"})
    assert third.seen == fresh(folder, "two sources", 7)
    history = fresh(folder, "weights", 5) + whole.seen[:10] + third.seen
    assert [windows_of(third.data.batch_at(i)[0]) for i in range(22)] == history

    ckpt = tmp_path / "c" / "step=20.ckpt"
    loaded = GPTDataModule.load_from_checkpoint(ckpt, weights_only=True)
    loaded.setup()
    assert [windows_of(loaded.batch_at(i)[0]) for i in range(22)] == history
    state = loaded.state_dict()
    assert len(state["earlier"]) == 2
    loaded.train_dataloader()
    assert len(loaded.state_dict()["earlier"]) == 2, "also when a loader keeps the position"


@pytest.mark.parametrize("gone", [False, True], ids=["exists", "is gone"])
def test_batches_of_earlier_data_need_its_store(folder, tmp_path, gone):
    text = {"web": str(folder / "web.txt")}
    url = opened(make_data(folder, corpus=text)).publish(tmp_path / "published")["web"]
    published = {"corpus": {"web": {"store_url": url}}, "data_dir": str(tmp_path / "other")}
    first, _ = train(folder, data=published, save=SAVE | {"dirpath": tmp_path}, max_steps=5)
    other = {"data_dir": str(tmp_path / "new")}
    watch, _ = continued(folder, "one corpus", tmp_path / "step=5.ckpt", 8, data=other)
    assert [windows_of(watch.data.batch_at(i)[0]) for i in range(8)] == first.seen + watch.seen

    local = {"corpus": text, "data_dir": str(tmp_path / "local")}
    first, _ = train(folder, data=local, save=SAVE | {"dirpath": tmp_path / "b"}, max_steps=5)
    other = {"data_dir": str(tmp_path / ("new" if gone else "local"))}
    watch, _ = continued(folder, "one corpus", tmp_path / "b" / "step=5.ckpt", 8, data=other)
    assert windows_of(watch.data.batch_at(5)[0]) == watch.seen[0]
    if gone:
        with pytest.raises(FileNotFoundError, match=r"the store of earlier data, .*web\.txt.* any more"):
            watch.data.batch_at(4)
    else:
        assert windows_of(watch.data.batch_at(4)[0]) == first.seen[4]


def test_a_continued_run_on_unchanged_data_is_an_exact_resume(folder, tmp_path):
    ckpt = saved(folder, tmp_path, "stages", max_steps=40)
    whole, weights = train(folder, data=DATA["stages"](folder), max_steps=40)
    again, same = continued(folder, "stages", ckpt, 40)
    assert again.seen == whole.seen[5:]
    assert all(torch.equal(same[name], weight) for name, weight in weights.items())


def test_stages_of_continued_data_start_with_that_data(folder, tmp_path):
    ckpt = saved(folder, tmp_path, "two sources")
    watch, _ = continued(folder, "stages", ckpt, 30)
    assert watch.seen == fresh(folder, "stages", 25)
    begins = [stage.begin for stage in watch.data.train_windows.stages]
    assert begins[1] - begins[0] == 12 * 4


def test_a_mixture_without_a_seed_resumes_with_the_drawn_one(folder, tmp_path):
    data = mixture(folder) | {"seed": None}
    whole, _ = train(folder, data=data, save=SAVE | {"dirpath": tmp_path}, max_steps=12)
    again, _ = train(folder, data=data, ckpt_path=tmp_path / "step=5.ckpt", max_steps=12)
    assert again.seen == whole.seen[5:]
    other, _ = train(folder, data=data, max_steps=12)
    assert other.seen != whole.seen


def test_stages_count_the_batches_that_a_limit_leaves(folder, tmp_path):
    options = {"data": staged(folder), "limit_train_batches": 7, "max_steps": 30}
    whole, weights = train(folder, save=SAVE | {"dirpath": tmp_path}, **options)
    data = whole.data
    n = len(data.train_windows)
    assert [stage.begin for stage in data.train_windows.stages][1] == n + 5 * 4, "12 steps: 7, then 5"
    again, same = train(folder, ckpt_path=tmp_path / "step=10.ckpt", **options)
    assert again.seen == whole.seen[10:]
    assert all(torch.equal(same[name], weight) for name, weight in weights.items())


def test_compact_batches_train_a_mixture_to_the_same_weights(folder, monkeypatch):
    plain, weights = train(folder, data=staged(folder), max_steps=20)
    monkeypatch.setattr("lit_gptdata._lightning.sends_compact", lambda trainer: True)
    compact, same = train(folder, data=staged(folder), max_steps=20)
    assert compact.seen == plain.seen
    assert all(torch.equal(same[name], weight) for name, weight in weights.items())


def test_a_checkpoint_names_each_source_in_plain_values(folder, tmp_path):
    ckpt = saved(folder, tmp_path, "weights")
    state = torch.load(ckpt, weights_only=True)
    assert list(state["GPTDataModule"]["data"]["sources"]) == ["web", "code", "books"]
    loaded = GPTDataModule.load_from_checkpoint(ckpt, weights_only=True)
    assert loaded.hparams.corpus == DATA["weights"](folder)["corpus"]
