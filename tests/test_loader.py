"""Batches from a DataLoader: every window once an epoch, in the epoch's order."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lit_gptdata import create_dataloader
from lit_gptdata.tokens.shard import Tokens
from lit_gptdata.windows.dataset import Windows
from lit_gptdata.windows.loader import window_loader
from lit_gptdata.windows.steps import Steps

TEXT = " ".join(f"word{i}" for i in range(400))


def loader_over(n_tokens: int, *, batch_size: int = 2, tail: str = "share", num_workers: int = 0):
    tokens = Tokens([np.arange(n_tokens, dtype="<u2")])
    windows = Windows(tokens, begin=0, end=n_tokens, max_length=4, stride=4)
    steps = Steps(n=len(windows), batch_size=batch_size, tail=tail)
    return window_loader(windows, steps, seed=0, num_workers=num_workers)


def first_tokens(loader) -> list[int]:
    """The windows of an epoch, each by its first token, which is its place in the text."""
    return [int(x) for inputs, _ in loader for x in inputs[:, 0]]


def test_every_epoch_has_every_window_once_in_an_order_of_its_own():
    loader = loader_over(401)
    epochs = [first_tokens(loader) for _ in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(0, 400, 4))
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    loader.sampler.set_epoch(1)
    assert first_tokens(loader) == epochs[1]


def test_worker_processes_load_the_same_batches():
    assert first_tokens(loader_over(401, num_workers=2)) == first_tokens(loader_over(401))


def test_drop_last_leaves_out_the_small_batch():
    assert [len(x) for x, _ in loader_over(29, batch_size=3)] == [3, 3, 1]
    loader = loader_over(29, batch_size=3, tail="drop")
    assert [len(x) for x, _ in loader] == [3, 3]
    assert len(loader) == 2
    assert loader.batch_size == 3


def test_no_batch_at_all_is_refused():
    message = (
        "batch_size=8 with drop_last=True leaves no batch: there are 7 windows. Set batch_size <= 7"
    )
    with pytest.raises(ValueError, match=message):
        loader_over(29, batch_size=8, tail="drop")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, r"batch_size=0 is too small; .* give an integer >= 1"),
        ({"num_workers": -1}, r"num_workers=-1 is too small; .* give an integer >= 0"),
    ],
)
def test_sizes_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        create_dataloader(TEXT, **options)


def test_create_dataloader_unshuffled_is_the_text_in_order():
    loader = create_dataloader(
        TEXT, batch_size=2, max_length=8, stride=8, shuffle=False, drop_last=False
    )
    ids = torch.cat([inputs.flatten() for inputs, _ in loader]).tolist()
    from lit_gptdata import Tokenizer

    expected = Tokenizer("gpt2").encode(TEXT)
    assert ids == expected[: len(ids)]
    assert len(ids) == (len(expected) - 1) // 8 * 8


def test_create_dataloader_shuffled_is_new_each_time_and_repeats_under_manual_seed():
    def epochs() -> list[list[int]]:
        torch.manual_seed(7)
        loader = create_dataloader(TEXT, batch_size=2, max_length=8, stride=8, drop_last=False)
        return [[x[:, 0].tolist() for x, _ in loader] for _ in range(2)]

    first, second = epochs()
    assert first != second
    assert epochs() == [first, second]
    torch.manual_seed(8)
    loader = create_dataloader(TEXT, batch_size=2, max_length=8, stride=8, drop_last=False)
    assert [x[:, 0].tolist() for x, _ in loader] != first


def test_a_plain_dataloader_takes_the_dataset_as_in_the_course():
    from torch.utils.data import DataLoader

    from lit_gptdata import WindowDataset

    dataset = WindowDataset(TEXT, "gpt2", max_length=8, stride=8)
    plain = next(iter(DataLoader(dataset, batch_size=4)))
    ours = next(iter(create_dataloader(TEXT, batch_size=4, max_length=8, stride=8, shuffle=False)))
    assert torch.equal(plain[0], ours[0])
    assert torch.equal(plain[1], ours[1])
