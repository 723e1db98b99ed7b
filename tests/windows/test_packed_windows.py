"""Windows of whole documents, compared with the documents themselves."""

from __future__ import annotations

import itertools
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lit_gptdata._lightning import split_on_device
from lit_gptdata.tokens.shards import JoinedTokens, Tokens, join
from lit_gptdata.windows.dataset import IGNORE_INDEX, ChainedWindows, PackedWindows, hf_batch
from lit_gptdata.windows.loader import window_loader
from lit_gptdata.windows.mixture import Mixture, Stage
from lit_gptdata.windows.packing import build_index
from lit_gptdata.windows.steps import Steps

EOT = 60_000


class FakeIndex(SimpleNamespace):
    """A WindowIndex in memory."""

    def pieces(self, windows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        edges = np.append(self.firsts, len(self.starts))
        counts = edges[windows + 1] - edges[windows]
        chosen = [np.arange(edges[w], edges[w + 1]) for w in windows.tolist()]
        chosen = np.concatenate([np.empty(0, np.int64), *chosen])
        return self.starts[chosen], self.lengths[chosen], counts


def documents_of(ids: list[int], begin: int, end: int) -> list[tuple[int, int]]:
    """The documents of ids[begin:end] as token ranges, of which a separator before the first is none."""
    cuts = [i for i in range(begin, end) if ids[i] == EOT]
    starts = [begin, *(cut + 1 for cut in cuts)]
    ends = [*cuts, end]
    found = list(zip(starts, ends, strict=True))
    return found[1:] if cuts and cuts[0] == begin else found


def packed(
    ids: list[int], begin: int, end: int, length: int, kind: str, cuts: list[int]
) -> PackedWindows:
    starts, ends = np.array(documents_of(ids, begin, end)).T
    block = build_index(starts, ends, length, kind)
    index: Any = FakeIndex(**block._asdict())
    index.max_length, index.n_windows = length, len(block.firsts)
    index.n_targets, index.n_documents = int((ends - starts + 1).sum()), len(starts)
    index.n_split = int((ends - starts >= length).sum())
    edges = [0, *sorted(min(cut, len(ids)) for cut in cuts), len(ids)]
    tokens = Tokens([np.array(ids[a:b], "<u2") for a, b in itertools.pairwise(edges)])
    return PackedWindows(tokens, index, kind, EOT, begin=begin, end=end)


def numbered(lengths: list[int]) -> list[int]:
    """Documents of these lengths, whose ids are all different, with separators between them."""
    ids: list[int] = []
    for length in lengths:
        ids += [len(ids) + i for i in range(length)] + [EOT]
    return ids[:-1]


@given(
    lengths=st.lists(st.integers(0, 30), min_size=1, max_size=12),
    max_length=st.integers(1, 12),
    split=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    kind=st.sampled_from(["packed", "documents"]),
    cuts=st.lists(st.integers(0, 300), max_size=4),
)
def test_each_target_of_a_split_comes_once_after_the_token_before_it(
    lengths, max_length, split, kind, cuts
):
    ids = numbered(lengths)
    begin, end = sorted(round(part * len(ids)) for part in split)
    if begin == end:
        return
    windows = packed(ids, begin, end, max_length, kind, cuts)
    n = len(windows)
    inputs, targets = windows.batch(range(n))
    tokens = windows.target_tokens(range(n))
    expected = []
    for first, last in documents_of(ids, begin, end):
        document = [EOT, *ids[first:last], EOT]
        numbers = [*range(first, last), last if last < end else -1]
        expected += zip(numbers, document[:-1], document[1:], strict=True)
    scored = targets != IGNORE_INDEX
    assert (inputs[~scored] == 0).all()
    assert (tokens[~scored.numpy()] == -1).all()
    assert scored.sum() == windows.n_targets
    found = zip(
        tokens[scored.numpy()].tolist(), inputs[scored].tolist(), targets[scored].tolist(), strict=True
    )
    assert sorted(found) == sorted(expected)
    begins, ends = windows.ranges(range(n))
    covered = sorted(token for a, b in zip(begins, ends, strict=True) for token in range(a, b))
    assert covered == sorted(tokens[tokens >= 0].tolist())
    for is_scored in scored.tolist():
        assert is_scored == sorted(is_scored, reverse=True), "padding is at the end"
