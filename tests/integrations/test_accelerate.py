"""Loaders that accelerate prepares: every window once over all ranks, and an exact resume."""

from __future__ import annotations

import pytest

pytest.importorskip("accelerate")
from tests.windows import test_rank_loaders as without_accelerate
from tests.windows.rank_jobs import on_two_ranks

PREPARED = ("accelerate", "split_batches", "dispatch_batches")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict]:
    return on_two_ranks("tests.integrations.accelerate_jobs", tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("name", [*PREPARED, "not prepared"])
def test_an_epoch_has_each_window_once_over_all_ranks(ranks, name):
    without_accelerate.test_an_epoch_has_each_window_once_over_all_ranks(ranks, name)


@pytest.mark.parametrize("name", PREPARED)
def test_resume_is_exact_inside_an_epoch(ranks, name):
    without_accelerate.test_resume_is_exact_inside_an_epoch(ranks, name)


def test_another_batch_size_continues_with_the_same_order(ranks):
    without_accelerate.test_another_batch_size_continues_with_the_same_order(ranks, "accelerate")
