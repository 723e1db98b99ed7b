"""Windows compared with an oracle written from the course's loop."""

from __future__ import annotations

import itertools
import pickle
import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lit_gptdata.tokens.libraries.vocabularies import load_encoding
from lit_gptdata.tokens.shards import Tokens
from lit_gptdata.windows.dataset import IGNORE_INDEX, Spans, WindowDataset, Windows


def course_windows(ids: list[int], max_length: int, stride: int) -> list[tuple[list[int], list[int]]]:
    """The course's loop, slow and plain."""
    starts = range(0, len(ids) - max_length, stride)
    return [(ids[i : i + max_length], ids[i + 1 : i + max_length + 1]) for i in starts]


def padded_windows(ids: list[int], max_length: int) -> list[tuple[list[int], list[int]]]:
    """Every token with a predecessor is a target once; the last window is padded."""
    pairs = []
    for i in range(0, len(ids) - 1, max_length):
        targets = ids[i + 1 : i + 1 + max_length]
        missing = max_length - len(targets)
        pairs.append((ids[i : i + len(targets)] + [0] * missing, targets + [IGNORE_INDEX] * missing))
    return pairs


def shards_of(ids: list[int], cuts: list[int]) -> Tokens:
    """The ids in shards that end at `cuts`."""
    edges = [0, *sorted(cuts), len(ids)]
    return Tokens([np.array(ids[a:b], "<u2") for a, b in itertools.pairwise(edges)])


def as_lists(windows: Windows) -> list[tuple[list[int], list[int]]]:
    return [(x.tolist(), y.tolist()) for x, y in (windows[i] for i in range(len(windows)))]


def test_every_small_case_equals_the_course_loop():
    for n, max_length, stride in itertools.product(range(61), range(1, 9), range(1, 10)):
        ids = list(range(100, 100 + n))
        expected = course_windows(ids, max_length, stride)
        spans = Spans(n_tokens=n, max_length=max_length, stride=stride)
        assert len(spans) == len(range(0, n - max_length, stride))
        assert len(spans) == len(expected) == max(0, (n - max_length - 1) // stride + 1)
        if expected:
            tokens = Tokens([np.array(ids, "<u2")])
            windows = Windows(tokens, begin=0, end=n, max_length=max_length, stride=stride)
            inputs, targets = windows.batch(range(len(expected)))
            assert inputs.tolist() == [x for x, _ in expected]
            assert targets.tolist() == [y for _, y in expected]


@given(
    ids=st.lists(st.integers(0, 50_256), max_size=300),
    max_length=st.integers(1, 320),
    stride=st.integers(1, 330),
    cuts=st.lists(st.integers(0, 300), max_size=5),
)
def test_shards_of_any_size_give_the_course_windows(ids, max_length, stride, cuts):
    tokens = shards_of(ids, [min(cut, len(ids)) for cut in cuts])
    windows = Windows(tokens, begin=0, end=len(ids), max_length=max_length, stride=stride)
    assert as_lists(windows) == course_windows(ids, max_length, stride)


@given(
    n=st.integers(0, 200),
    max_length=st.integers(1, 60),
    begin=st.integers(0, 50),
    cuts=st.lists(st.integers(0, 250), max_size=4),
)
def test_padded_windows_score_every_token_with_a_predecessor_once(n, max_length, begin, cuts):
    ids = list(range(1000, 1000 + begin + n + 7))  # later tokens must not leak in
    tokens = shards_of(ids, [min(cut, len(ids)) for cut in cuts])
    lengths = {"max_length": max_length, "stride": max_length}
    windows = Windows(tokens, begin=begin, end=begin + n, **lengths, pad=True)
    expected = padded_windows(ids[begin : begin + n], max_length)
    assert as_lists(windows) == expected
    assert len(windows) == max(0, -(-(n - 1) // max_length))
    if expected:
        inputs, targets = windows.batch(range(len(expected)))
        scored = targets[targets != IGNORE_INDEX].tolist()
        assert scored == ids[begin + 1 : begin + n]
        assert (inputs[targets == IGNORE_INDEX] == 0).all()


@pytest.mark.parametrize("n", [20, 21, 22, 25])
@pytest.mark.parametrize("cuts", [[], [3, 9, 17, 30]], ids=["one array", "shards"])
def test_windows_after_the_last_are_all_padding(n, cuts):
    tokens = shards_of(list(range(1000, 1040)), cuts)  # later tokens must not leak in
    windows = Windows(tokens, begin=2, end=2 + n, max_length=4, stride=4, pad=True)
    length = len(windows)
    padding = ([0] * 4, [IGNORE_INDEX] * 4)
    for indices in ([length], [length, length + 1, length + 99], [0, length, length - 1, length + 7]):
        inputs, targets = windows.batch(indices)
        expected = [as_lists(windows)[i] if i < length else padding for i in indices]
        assert inputs.tolist() == [x for x, _ in expected]
        assert targets.tolist() == [y for _, y in expected]


def test_batches_are_contiguous_int64_pairs():
    windows = Windows(Tokens([np.arange(50, dtype="<u2")]), begin=0, end=50, max_length=8, stride=3)
    inputs, targets = windows.batch([2, 0])
    for tensor in (inputs, targets):
        assert tensor.shape == (2, 8)
        assert tensor.dtype == torch.int64
        assert tensor.is_contiguous()
    assert inputs.tolist() == [list(range(6, 14)), list(range(8))]
    assert (targets == inputs + 1).all()


def test_wide_ids_survive():
    ids = np.array([70_000, 2**32 - 1, 5, 6], "<u4")
    inputs, targets = Windows(Tokens([ids]), begin=0, end=4, max_length=3, stride=1)[0]
    assert inputs.tolist() == [70_000, 2**32 - 1, 5]
    assert targets.tolist() == [2**32 - 1, 5, 6]


def test_negative_indices_count_from_the_end():
    windows = Windows(Tokens([np.arange(10, dtype="<u2")]), begin=0, end=10, max_length=4, stride=2)
    assert windows[-1][0].tolist() == windows[len(windows) - 1][0].tolist()
    with pytest.raises(IndexError, match=r"window 3 of 3: give an index in \[-3, 3\)"):
        windows[3]


def test_the_course_dataset_takes_text_and_a_tiktoken_encoding():
    encoding = load_encoding("gpt2")
    text = "It was on a dreary night of November.<|endoftext|>Chapter 5"
    dataset = WindowDataset(text, encoding, max_length=4, stride=2)
    ids = encoding.encode(text, allowed_special={"<|endoftext|>"})
    assert 50256 in ids
    assert as_lists(dataset) == course_windows(ids, 4, 2)
    assert as_lists(WindowDataset(text, "gpt2", 4, 2)) == as_lists(dataset)


def test_a_worker_maps_the_files_instead_of_copying_them(tmp_path):
    path = tmp_path / "0.bin"
    np.arange(100_000, dtype="<u2").tofile(path)
    tokens = Tokens.from_files([path], np.dtype("<u2"))
    pickled = pickle.dumps(tokens)
    assert len(pickled) < 1000
    assert pickle.loads(pickled)[5:8].tolist() == [5, 6, 7]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"max_length": 0}, ValueError, "max_length must be an integer ≥ 1, got 0: it is the window"),
        ({"stride": -3}, ValueError, "stride must be an integer ≥ 1, got -3"),
        *(
            ({"max_length": value}, TypeError, "max_length must be an integer ≥ 1, got")
            for value in (4.0, "4", None, True)
        ),
    ],
)
def test_lengths_that_are_not_positive_integers_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        WindowDataset("some text", "gpt2", **options)


def test_a_text_too_short_for_one_window_is_refused():
    message = r"has 2 tokens, too few for one window: max_length=256 needs 257, .* max_length <= 1"
    with pytest.raises(ValueError, match=message):
        WindowDataset("hello world", "gpt2")


def test_text_that_is_not_a_string_is_refused():
    with pytest.raises(TypeError, match="text is a bytes: give the text itself as a str"):
        WindowDataset(b"hello", "gpt2")


def test_a_million_spaces_are_tokenized():
    text = "a" + " " * 1_000_001 + "b" + " " * 10
    dataset = WindowDataset(text, "gpt2", max_length=4, stride=4)
    ids = dataset.tokens[:].tolist()
    assert dataset.tokenizer.decode(ids) == text
    assert ids[-3:] == dataset.tokenizer.encode(" b" + " " * 10)[-3:]


@pytest.mark.parametrize("n_shards", [1, 3])
def test_ranges_of_very_different_lengths_take_little_memory(n_shards):
    """A long document among many short ones: each would be copied with the length of the longest one."""
    tokens = Tokens(np.array_split(np.arange(60_000, dtype="<u2"), n_shards))
    lengths = np.array([0, *[3] * 5_000, 40_000, *[2] * 5_000, 45_000, 1])
    starts = np.random.default_rng(0).integers(0, len(tokens) - lengths + 1)
    tracemalloc.start()
    found = tokens.ranges(starts, lengths)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 10_000_000
    expected = [np.arange(s, s + n) for s, n in zip(starts, lengths, strict=True)]
    assert np.array_equal(found, np.concatenate(expected))
