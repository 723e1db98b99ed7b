"""Windows of whole documents, compared with the documents themselves."""

from __future__ import annotations

import itertools
import json
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
from lit_gptdata.tokens.shards import Tokens
from lit_gptdata.windows.dataset import IGNORE_INDEX, PackedWindows
from lit_gptdata.windows.loader import window_loader
from lit_gptdata.windows.mixture import ChainedWindows, Mixture, Stage
from lit_gptdata.windows.packing import build_index
from lit_gptdata.windows.steps import Steps
from tests.runs import make_data, opened, write_documents

EOT = 60_000


class FakeIndex(SimpleNamespace):
    """A WindowIndex in memory."""

    def pieces(self, windows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        edges = np.append(self.firsts, [len(self.starts)] * (2 + max(windows, default=0)))
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


@pytest.mark.parametrize("kind", ["packed", "documents"])
def test_batches_are_the_same_inline_from_workers_and_compact(kind):
    lengths = np.random.default_rng(0).integers(0, 40, 120).tolist()
    windows = packed(numbered(lengths), 5, 2000, 16, kind, cuts=[3, 500, 501, 1700])
    steps = Steps(n=len(windows), batch_size=7, tail="pad")
    expected = [windows.batch(range(i, min(i + 7, len(windows)))) for i in range(0, len(windows), 7)]
    assert {row.dtype for row in windows.ids(np.arange(len(windows)), 7)} >= {np.dtype(np.int32)}
    for workers, compact in ((0, False), (0, True), (1, True)):
        loader = window_loader(windows, steps, seed=None, num_workers=workers, is_compact=compact)
        batches = [split_on_device(batch, 0) for batch in loader]
        assert len(batches) == len(expected)
        for batch, same in zip(batches, expected, strict=True):
            assert all(map(torch.equal, batch, same))
    inputs, targets = windows.batch([len(windows), 3, len(windows) + 5])
    assert (inputs[::2] == 0).all()
    assert (targets[::2] == IGNORE_INDEX).all()
    assert torch.equal(inputs[1], windows[3][0])


def test_rows_without_padding_have_the_dtype_of_the_tokens():
    windows = packed(numbered([7, 3, 3, 2]), 0, 18, 8, "packed", cuts=[])
    assert [windows.rows([i]).dtype for i in range(3)] == ["<u2", "<u2", np.int32]
    assert windows.rows([]).shape == (0, 9)
    assert str(windows) == (
        "3 windows of 8 tokens of packed documents, 20.83 % padding, 0 of 4 documents split, "
        "over tokens [0, 18)"
    )


def two_sources(weights: tuple[float, float]) -> Mixture:
    rng = np.random.default_rng(1)
    short = packed(numbered(rng.integers(1, 4, 200).tolist()), 0, 300, 16, "documents", [])
    long = packed(numbered(rng.integers(30, 90, 40).tolist()), 0, 1000, 16, "documents", [])
    sources = {"short": short, "long": long}
    shares = [w / (1 - s.padding) for w, s in zip(weights, sources.values(), strict=True)]
    return Mixture(sources, [Stage(0, tuple(shares))], seed=0)


def test_the_windows_of_a_mixture_are_the_windows_of_its_sources():
    mixture = two_sources((0.5, 0.5))
    n = len(mixture)
    names, indices = mixture.locate(np.arange(n))
    inputs, targets = mixture.batch(np.arange(n))
    tokens = mixture.target_tokens(np.arange(n))
    for row, (name, index) in enumerate(zip(names, indices.tolist(), strict=True)):
        source = mixture.sources[name]
        assert torch.equal(inputs[row], source[index][0])
        assert torch.equal(targets[row], source[index][1])
        assert np.array_equal(tokens[row], source.target_tokens([index])[0])
    again = pickle.loads(pickle.dumps(mixture))
    assert torch.equal(again.batch(np.arange(n))[1], targets)
    assert identities(mixture) == identities(again)
    with pytest.raises(TypeError, match="locate_parts"):
        mixture.ranges([0])


def identities(windows: Any) -> Any:
    return windows.identity(), windows.padding, str(windows)


@pytest.mark.parametrize("weights", [(0.5, 0.5), (0.9, 0.1)])
def test_weights_of_a_mixture_count_targets_that_are_not_padding(weights):
    mixture = two_sources(weights)
    positions = np.arange(4000)
    names, _ = mixture.locate(positions)
    scored = (mixture.batch(positions)[1] != IGNORE_INDEX).sum(1).numpy()
    share = scored[names == "short"].sum() / scored.sum()
    assert share == pytest.approx(weights[0], abs=0.01)
    assert (names == "short").mean() > weights[0] + 0.03


def test_chained_sets_keep_their_own_token_numbers():
    sets = [packed(numbered([5, 9, 2]), 0, 17, 6, "packed", []) for _ in range(2)]
    chained = ChainedWindows(sets)
    n = len(sets[0])
    assert len(chained) == 2 * n
    assert chained.n_targets == 2 * sets[0].n_targets
    numbers, local = chained.locate_parts([n - 1, n, 2 * n + 3])
    assert numbers.tolist() == [0, 1, 1]
    assert local.tolist() == [n - 1, 0, n + 3]
    inputs, targets = chained.batch(range(2 * n + 1))
    assert torch.equal(inputs[:n], inputs[n : 2 * n])
    assert (targets[-1] == IGNORE_INDEX).all()
    assert np.array_equal(chained.target_tokens([n]), sets[0].target_tokens([0]))


# with a store


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("packed")


def with_documents(folder: Path, **options: Any) -> Any:
    corpus = write_documents(folder)["all"]
    return opened(make_data(folder, **({"corpus": corpus, "windows": "packed"} | options)))


@pytest.mark.parametrize("options", [{}, {"eval_windows": "documents"}, {"tokenizer": "o200k_base"}])
def test_targets_of_all_splits_are_the_documents_of_the_text(folder, options):
    if "tokenizer" in options:
        pytest.importorskip("bpe_openai")
    data = with_documents(folder, test_fraction=0.2, **({"eval_windows": "packed"} | options))
    assert data.store.dtype == ("<u4" if "tokenizer" in options else "<u2")
    assert data.eot == data.tokenizer.end_of_document
    lines = Path(data.hparams["corpus"]).read_text().splitlines()
    texts = [json.loads(line)["text"] for line in lines]
    encoded = [[*data.tokenizer.encode(text), data.eot] for text in texts]
    splits = (data.train_windows, data.val_windows, data.test_windows)
    found: list[list[int]] = []
    for windows in splits:
        inputs, targets = windows.batch(range(len(windows)))
        order = np.argsort(windows.ranges(range(len(windows)))[0], kind="stable")
        pieces = []
        for row, row_inputs in zip(targets.tolist(), inputs.tolist(), strict=True):
            row = [id for id in row if id != IGNORE_INDEX]
            starts = [i for i, id in enumerate(row_inputs[: len(row)]) if i and id == data.eot]
            pieces += [row[a:b] for a, b in itertools.pairwise([0, *starts, len(row)])]
        ids = list(itertools.chain(*(pieces[i] for i in order)))
        found += [
            [*group, data.eot] for is_end, group in itertools.groupby(ids, data.eot.__eq__) if not is_end
        ]
        assert ids[-1] == data.eot
    assert list(itertools.chain(*found)) == list(itertools.chain(*encoded))
    step = data.windows_at(3)
    assert all(map(torch.equal, data.batch_at(3), data.train_windows.batch(step)))


def test_val_bits_per_byte_count_the_same_bytes_whatever_the_windows(folder):
    counts = {}
    for kind in ("sliding", "packed", "documents"):
        data = with_documents(folder, eval_windows=kind, val_fraction=0.3)
        windows = data.val_windows
        targets = windows.batch(range(len(windows)))[1]
        targets = targets[targets != IGNORE_INDEX]
        n_bytes = torch.as_tensor(data.token_bytes)[targets]
        n, special = len(targets), int((n_bytes == 0).sum())
        counts[kind] = n, data.scored_bytes("val", n, int(n_bytes.sum()), special)
        assert data.scored_bytes("val", n - 1, 77, special) in (77, counts[kind][1])
    (n, n_bytes), (n_packed, n_bytes_packed) = counts["sliding"], counts["packed"]
    begin, end = data._data.first.split.val
    first = data.token_bytes[data.store.tokens[begin : begin + 1]][0]
    assert n == end - begin - 1
    assert n_bytes_packed == data.store.byte_at(end) - data.store.byte_at(begin) == n_bytes + first
    assert counts["documents"] == counts["packed"]
    assert n_packed == end - begin + (begin > 0 and data.store.tokens[begin : begin + 1][0] != data.eot)


def test_print_names_padding_and_the_ignored_stride(folder):
    data = with_documents(folder, stride=5, eval_windows="documents")
    printed = str(data)
    assert f"packed documents, {100 * data.train_windows.padding:.2f} % padding, " in printed
    assert " tokens of a document each, " in printed
    assert "\n  windows  packed: stride=5 is ignored\n" in printed
    data.windows = "sliding"
    assert "stride=5 is ignored" not in str(data)
    assert len(data.train_windows) == len(
        with_documents(folder, stride=5, windows="sliding").train_windows
    )
    paths = write_documents(folder)
    corpus = {
        name: {"path": paths[name], "weight": n} for name, n in (("web", 1), ("books", 1), ("code", 0))
    }
    data = with_documents(folder, corpus=corpus)
    sources, table = data._identity["sources"], str(data)
    assert [name for name in sources if "n_windows" in sources[name]] == ["web", "books"], "which train"
    assert table.splitlines()[1].split()[:7] == [
        "source", "tokens", "share", "epochs", "padding", "documents", "split",
    ]  # fmt: skip
    assert table.count(" 50 %") == 2, "weights are shares of targets"


def test_options_that_do_not_go_together_are_refused(folder):
    with pytest.raises(ValueError, match=r"windows must be one of .*'packed'.* got 'best'"):
        with_documents(folder, windows="best")
    with pytest.raises(ValueError, match=r"drop_padded=True .*: set eval_windows=sliding, or drop_pa"):
        with_documents(folder, eval_windows="packed", drop_padded=True)
    data = with_documents(folder, drop_padded=True)
    data.eval_windows = "documents"
    with pytest.raises(ValueError, match="drop_padded=True"):
        data.setup()


def test_a_tokenizer_without_an_end_of_document_is_refused_with_the_source(folder, tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1}, "a"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    (tmp_path / "a.txt").write_text("a b a a b " * 50)
    corpus = {"one": str(tmp_path / "a.txt")}
    options = {"corpus": corpus, "tokenizer": tokenizer, "engine": "auto"}
    data = make_data(tmp_path, windows="packed", **options)
    assert data.eot is None
    with pytest.raises(ValueError, match=r"source one: tokenizer .* does not tell which token ends"):
        data.prepare_data()
    with_documents(tmp_path, windows="sliding", **options)


def test_a_short_text_is_enough_for_windows_of_documents(tmp_path):
    (tmp_path / "a.txt").write_text("a dreary night")
    options = {"corpus": str(tmp_path / "a.txt"), "val_fraction": 0, "max_length": 64}
    targets = with_documents(tmp_path, **options).train_windows[0][1]
    assert (targets != IGNORE_INDEX).sum() == 6, "5 tokens and a separator"
    with pytest.raises(ValueError, match="too few for one window"):
        with_documents(tmp_path, **options, windows="sliding")
