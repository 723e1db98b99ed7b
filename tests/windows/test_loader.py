"""Batches from a DataLoader: every window once per epoch, in the order of the epoch."""

from __future__ import annotations

import itertools
import json
from itertools import chain, product

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

import lit_gptdata.windows.sampler as sampler_module
from lit_gptdata import Tokenizer, WindowDataset, create_dataloader
from lit_gptdata.tokens.shards import Tokens
from lit_gptdata.windows.dataset import Windows
from lit_gptdata.windows.loader import window_loader
from lit_gptdata.windows.order import EpochPermutation
from lit_gptdata.windows.steps import Steps

TEXT = " ".join(f"word{i}" for i in range(400))


def loader_over(n_tokens: int, *, batch_size: int = 2, tail: str = "share", num_workers: int = 0):
    tokens = Tokens([np.arange(n_tokens, dtype="<u2")])
    windows = Windows(tokens, begin=0, end=n_tokens, max_length=4, stride=4)
    steps = Steps(n=len(windows), batch_size=batch_size, tail=tail)
    return window_loader(windows, steps, seed=0, num_workers=num_workers)


def first_tokens(loader) -> list[int]:
    """The windows of an epoch, each by its first token, which equals its place in the text."""
    return [int(x) for inputs, _ in loader for x in inputs[:, 0]]


def test_every_epoch_has_every_window_once_in_a_new_order():
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


def test_windows_that_make_no_batch_are_refused():
    error = "batch_size=8 with drop_last=True leaves no batch: there are 7 windows. Set batch_size <= 7"
    with pytest.raises(ValueError, match=error):
        loader_over(29, batch_size=8, tail="drop")


def test_sizes_out_of_range_are_refused():
    with pytest.raises(ValueError, match="batch_size must be an integer ≥ 1, got 0"):
        create_dataloader(TEXT, batch_size=0)
    with pytest.raises(ValueError, match="num_workers must be an integer ≥ 0, got -1"):
        create_dataloader(TEXT, num_workers=-1)


def test_create_dataloader_without_shuffle_gives_the_text_in_order():
    options = {"max_length": 8, "stride": 8, "shuffle": False, "drop_last": False}
    loader = create_dataloader(TEXT, batch_size=2, **options)
    ids = torch.cat([inputs.flatten() for inputs, _ in loader]).tolist()
    expected = Tokenizer("gpt2").encode(TEXT)
    assert ids == expected[: len(ids)]
    assert len(ids) == (len(expected) - 1) // 8 * 8


def test_create_dataloader_shuffles_each_epoch_and_repeats_under_manual_seed():
    def epochs(seed: int) -> list[list[int]]:
        torch.manual_seed(seed)
        loader = create_dataloader(TEXT, batch_size=2, max_length=8, stride=8, drop_last=False)
        return [[x[:, 0].tolist() for x, _ in loader] for _ in range(2)]

    first, second = epochs(7)
    assert first != second
    assert epochs(7) == [first, second]
    assert epochs(8)[0] != first


def test_a_plain_dataloader_takes_the_dataset_as_in_the_course():
    dataset = WindowDataset(TEXT, "gpt2", max_length=8, stride=8)
    plain = next(iter(DataLoader(dataset, batch_size=4)))
    ours = next(iter(create_dataloader(TEXT, batch_size=4, max_length=8, stride=8, shuffle=False)))
    assert all(map(torch.equal, plain, ours))


def ids_of(batch) -> list:
    """A batch of any format, as windows of max_length + 1 ids."""
    if isinstance(batch, torch.Tensor):
        return batch.tolist()
    if isinstance(batch, dict):
        assert torch.equal(batch["input_ids"], batch["labels"])  # without padding
        batch = batch["input_ids"], batch["shift_labels"]
    inputs, targets = batch
    assert inputs.dtype == targets.dtype == torch.int64
    assert inputs.is_contiguous()
    assert targets.is_contiguous()
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    return torch.cat([inputs, targets[:, -1:]], dim=1).tolist()


@pytest.mark.parametrize("dtype", ["<u2", "<u4"])
@pytest.mark.parametrize("stride", [1, 3, 7])
@pytest.mark.parametrize("n_shards", [1, 2, 40])
def test_every_path_gives_the_same_batches(dtype, stride, n_shards, monkeypatch):
    ids = np.random.default_rng(0).integers(0, np.iinfo(dtype).max, 400).astype(dtype)
    tokens = Tokens(np.array_split(ids, n_shards))
    windows = Windows(tokens, begin=11, end=390, max_length=6, stride=stride)
    steps = Steps(n=len(windows), batch_size=5, tail="share")
    monkeypatch.setattr(sampler_module, "BLOCK", 35)  # gives several blocks, and a partial last one
    order = EpochPermutation(n=len(windows), seed=3, epoch=0).at(np.arange(len(windows)))
    starts = 11 + stride * order
    expected = [ids[s : s + 7].tolist() for s in starts]
    formats = ({}, {"is_compact": True}, {"batch_format": "hf"})
    for batch_format, num_workers in product(formats, (0, 2) if stride == 3 else (0,)):
        options = {"num_workers": num_workers, **batch_format}
        loader = window_loader(windows, steps, seed=3, **options)
        batches = [ids_of(batch) for batch in loader]
        assert [len(batch) for batch in batches[:-1]] == [5] * (len(batches) - 1)
        assert list(chain(*batches)) == expected
        assert len(batches) == len(loader)
    assert [windows[int(i)][0].tolist() for i in order[:9]] == [row[:-1] for row in expected[:9]]


def test_a_batch_can_be_kept_while_others_are_loaded():
    loader = loader_over(401, batch_size=3)
    kept = list(loader)
    loader.sampler.set_epoch(0)
    for batch, again in zip(kept, loader, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(batch, again, strict=True))


def course_loader(**options) -> DataLoader:
    return create_dataloader(TEXT, **{"batch_size": 2, "max_length": 8, "stride": 8} | options)


def test_a_loader_that_is_rebuilt_from_ours_gives_the_same_batches():
    ours = course_loader(shuffle=False)
    dataset, sampler, collate_fn = ours.dataset, ours.batch_sampler, ours.collate_fn
    for rebuilt in (
        DataLoader(dataset, batch_sampler=sampler, collate_fn=collate_fn),
        DataLoader(dataset, batch_sampler=sampler),
        DataLoader(dataset, batch_size=2, drop_last=True),
        DataLoader(dataset, batch_size=2, sampler=ours.sampler, drop_last=True, num_workers=1),
    ):
        for expected, batch in zip(ours, rebuilt, strict=True):
            assert all(map(torch.equal, expected, batch))
    assert [x.tolist() for x in dataset.__getitems__([3])[0]] == [x.tolist() for x in dataset[3]]


def test_several_windows_out_of_range_are_refused():
    windows = Windows(Tokens([np.arange(90)]), begin=0, end=50, max_length=4, stride=4)
    for indices in ([0, -1], [len(windows)]):
        with pytest.raises(IndexError, match=r"windows .* give indices in \[0, 12\)"):
            windows.__getitems__(indices)


def test_a_loader_draws_random_numbers_only_to_shuffle():
    before = torch.get_rng_state()
    list(course_loader(shuffle=False, num_workers=1))
    loader_over(401)
    assert torch.equal(torch.get_rng_state(), before)
    course_loader()
    assert not torch.equal(torch.get_rng_state(), before)


def test_the_iterator_of_a_loader_has_a_length():
    loader = loader_over(29, batch_size=3)
    assert len(loader) == len(iter(loader)) == 3


def test_state_dict_resumes_inside_an_epoch_and_between_epochs():
    for n_read in (0, 1, 50, 73, 100, 110):
        loader, resumed = course_loader(), course_loader()
        n_batches = len(loader)
        epochs = [batch for _ in range(4) for batch in loader]
        loader.sampler.set_epoch(0)
        batches = chain.from_iterable(itertools.repeat(loader))
        for _ in range(n_read):
            next(batches)
        state = json.loads(json.dumps(loader.state_dict()))
        resumed.load_state_dict(state)
        rest = [batch for _ in range(2) for batch in resumed]
        expected = epochs[n_read : (n_read // n_batches + 2) * n_batches]
        assert len(rest) == len(expected)
        for one, two in zip(rest, expected, strict=True):
            assert all(map(torch.equal, one, two))


def test_a_caller_that_counts_epochs_from_0_again_continues_with_the_saved_epoch():
    loader, resumed = course_loader(), course_loader()
    epochs = [first_tokens(loader) for _ in range(4)]
    loader.sampler.set_epoch(2)
    next(iter(loader))
    resumed.load_state_dict(loader.state_dict())
    seen = []
    for epoch in range(2):  # as Fabric does in a new process
        resumed.sampler.set_epoch(epoch)
        seen.append(first_tokens(resumed))
    assert seen == [epochs[2][2:], epochs[3]]


@pytest.mark.parametrize("first", [0, 1, 3])
def test_a_state_saved_at_the_end_of_an_epoch_continues_with_the_following_epochs(first):
    loader, resumed = course_loader(), course_loader()
    epochs = [first_tokens(loader) for _ in range(4)]
    loader.sampler.set_epoch(0)
    batches = iter(loader)
    for _ in range(len(loader)):  # the last batch is taken, and the pass not ended
        next(batches)
    resumed.load_state_dict(loader.state_dict())
    seen = []
    for epoch in range(first, first + 3):
        resumed.sampler.set_epoch(epoch)
        seen.append(first_tokens(resumed))
    assert seen == epochs[1:]


@pytest.mark.parametrize("passes_before", [1, 3])
def test_a_state_holds_in_a_loader_that_was_iterated_before(passes_before):
    loader, resumed = course_loader(), course_loader()
    epochs = [first_tokens(loader) for _ in range(3)]
    loader.sampler.set_epoch(1)
    next(iter(loader))
    for epoch in range(passes_before):  # Fabric numbers the calls of iter()
        resumed.sampler.set_epoch(epoch)
        next(iter(resumed))
    resumed.load_state_dict(loader.state_dict())
    seen = []
    for epoch in range(passes_before, passes_before + 2):
        resumed.sampler.set_epoch(epoch)
        seen.append(first_tokens(resumed))
    assert seen == [epochs[1][2:], epochs[2]]


def test_a_pass_within_an_epoch_of_the_caller_resumes_and_later_epochs_stay_the_same():
    loader, resumed = course_loader(), course_loader()
    loader.sampler.set_epoch(0)
    first_tokens(loader)
    batches = iter(loader)  # a second pass in epoch 0, as in CombinedLoader("max_size_cycle")
    next(batches)
    resumed.load_state_dict(loader.state_dict())
    rest = [inputs[:, 0].tolist() for inputs, _ in batches]
    resumed.sampler.set_epoch(0)
    assert list(chain.from_iterable(rest)) == first_tokens(resumed)
    for each in (loader, resumed):
        each.sampler.set_epoch(1)
    assert first_tokens(loader) == first_tokens(resumed)


def test_the_position_is_not_known_if_workers_read_ahead_in_another_loader():
    loader = loader_over(401, num_workers=2)
    iter(loader.sampler).__next__()  # a DataLoader with the same sampler
    with pytest.raises(RuntimeError, match=r"num_workers=2 read ahead .* set num_workers=0"):
        loader.state_dict()


def test_a_state_of_other_windows_or_another_order_is_refused():
    state = loader_over(401).state_dict()
    with pytest.raises(
        ValueError, match=r"other windows: .* was \[0, 401, 4, 4\], now \[0, 405, 4, 4\]"
    ):
        loader_over(405).load_state_dict(state)
    with pytest.raises(ValueError, match="saved with seed=1, this loader has seed=0"):
        loader_over(401).load_state_dict(state | {"seed": 1})
    with pytest.raises(ValueError, match="the data module keeps the position"):
        loader_over(401).load_state_dict({})


@pytest.mark.parametrize("starts", [[-1], [0, 94], [2**40], [-(2**40)]])
@pytest.mark.parametrize("n_shards", [1, 3])
def test_tokens_outside_the_range_are_never_read(starts, n_shards):
    tokens = Tokens(np.array_split(np.arange(100, dtype="<u2"), n_shards))
    with pytest.raises(IndexError, match="windows of 7 ids reach outside the 100 ids"):
        tokens.gather(np.array(starts), 7)
    with pytest.raises(IndexError, match="reach outside"):
        tokens.gather(np.array([0]), 101)
    assert tokens.gather(np.array([93, 0]), 7).tolist() == [[*range(93, 100)], [*range(7)]]
    assert tokens.gather(np.array([0]), 100).tolist() == [[*range(100)]]
