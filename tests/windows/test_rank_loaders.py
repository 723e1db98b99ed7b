"""Ranks without a Trainer: every window once over all ranks, and an exact resume."""

from __future__ import annotations

from itertools import chain

import pytest

from lit_gptdata import create_dataloader
from tests.runs import N_WINDOWS
from tests.test_resume import order_from
from tests.windows.rank_jobs import on_two_ranks

RESUMABLE = ("process group", "Fabric", "workers", "rebuilt", "create_dataloader", "seed=None")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict]:
    return on_two_ranks("tests.windows.rank_jobs", tmp_path_factory.mktemp("ranks"))


def both(ranks: list[dict], name: str, key: str) -> list[list[int]]:
    """The windows of each step over both ranks."""
    return [list(chain(*step)) for step in zip(*(rank[name][key] for rank in ranks), strict=True)]


OTHERS = ("early", "DistributedSampler", "two loaders")


@pytest.mark.parametrize("name", [*RESUMABLE, *OTHERS])
def test_an_epoch_has_each_window_once_over_all_ranks(ranks, name):
    epochs = list(zip(*(rank[name]["epochs"] for rank in ranks), strict=True))
    for one, two in epochs:
        windows = list(chain(*one, *two))
        assert len(set(windows)) == len(windows) >= N_WINDOWS - 8
    assert len({str(epoch) for epoch in epochs}) == len(epochs)


@pytest.mark.parametrize("name", RESUMABLE)
def test_resume_is_exact_inside_an_epoch(ranks, name):
    for rank in ranks:
        first_epoch, second_epoch = rank[name]["epochs"]
        n_rest = len(first_epoch) - len(rank[name]["first"])
        assert len(rank[name]["rest"]) == n_rest
        if name not in ("create_dataloader", "seed=None"):  # each loader draws its own seed
            assert rank[name]["first"] + rank[name]["rest"] == first_epoch
            assert rank[name]["following"] == second_epoch


@pytest.mark.parametrize("name", ["create_dataloader", "seed=None"])
def test_resume_of_a_drawn_seed_has_each_window_once(ranks, name):
    windows = [
        w for rank in ranks for key in ("first", "rest") for batch in rank[name][key] for w in batch
    ]
    assert len(set(windows)) == len(windows) >= N_WINDOWS - 8


def test_a_drawn_seed_from_a_checkpoint_is_kept(ranks):
    assert [rank["loaded seed"] for rank in ranks] == [7, 7]


@pytest.mark.parametrize("name", ["process group", "Fabric", "workers", "rebuilt"])
def test_another_batch_size_continues_with_the_same_order(ranks, name):
    assert both(ranks, name, "rest with another batch size") == order_from(0, 5 * 8, 12)


@pytest.mark.parametrize("name", ["Trainer.fit(model, loader)", "wrapped data module"])
def test_a_trainer_without_our_data_module_divides_the_windows(ranks, name):
    assert both(ranks, name, "fitted") == order_from(0, 0, 8) + order_from(1, 0, 8)


def test_a_process_that_cannot_know_its_rank_is_refused(ranks):
    for number, rank in enumerate(ranks):
        assert f"RANK={number} and WORLD_SIZE=2" in rank["refusal"]
        assert "init_process_group()" in rank["refusal"]


@pytest.mark.parametrize(
    ("variables", "refused"),
    [
        ({"RANK": "1", "WORLD_SIZE": "2"}, True),
        ({"RANK": "0", "WORLD_SIZE": "1"}, False),
        ({"WORLD_SIZE": "2"}, False),
        ({"SLURM_NTASKS": "4"}, False),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}, True),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "1"}, False),
        ({"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"}, True),
        ({"PMI_RANK": "1", "PMI_SIZE": "x"}, False),
    ],
)
def test_what_a_launcher_says_is_noticed(variables, refused, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    loader = create_dataloader("one two three four", max_length=1, stride=1, batch_size=1)
    assert len(loader) == 3
    if not refused:
        assert len(list(loader)) == 3
        return
    with pytest.raises(RuntimeError, match="this process is one of several"):
        next(iter(loader))
