"""The index behind packed and documents windows: which documents share a window, and its files."""

from __future__ import annotations

import errno
import hashlib
import pickle
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lit_gptdata import GPTDataModule
from lit_gptdata.tokens.build.local import prepare_store
from lit_gptdata.tokens.shards import ROW, Tokens
from lit_gptdata.tokens.store import TokenStore
from lit_gptdata.tokens.tokenizer import Tokenizer
from lit_gptdata.windows import packing
from lit_gptdata.windows.dataset import IGNORE_INDEX
from lit_gptdata.windows.packing import WindowIndex, best_fit, build_index, open_index
from lit_gptdata.windows.split import split_tokens
from tests.conftest import ListCorpus
from tests.runs import opened as runs_opened

KINDS = ("packed", "documents")
GPT2 = Tokenizer("gpt2")
EOT = GPT2.end_of_document


@dataclass
class FakeStore:
    """A store whose documents have these lengths, and whose shards end at these tokens."""

    lengths: list[int]
    shard_ends: list[int] = field(default_factory=list)
    fingerprint: str = "f"
    location: str = "a store"

    document_rows = TokenStore.document_rows

    def __post_init__(self) -> None:
        lengths = np.array(self.lengths, np.int64)
        self.starts = np.cumsum(lengths + 1) - lengths - 1
        self.n_documents, self.n_tokens = len(lengths), int(lengths.sum()) + len(lengths) - 1
        ends = [*sorted(min(end, self.n_tokens) for end in self.shard_ends), self.n_tokens]
        self._begins = [0, *ends[:-1]]
        self.shards = [SimpleNamespace(n_tokens=int(n)) for n in np.diff([0, *ends])]
        ids = np.zeros(self.n_tokens, np.uint16)
        ids[self.starts[1:] - 1] = 1
        self.tokens, self.vocab = Tokens([ids]), {"n_bytes": np.array([4, 0])}

    def rows(self, shard: int) -> np.ndarray:
        """A document is in the first shard that does not end before it, as a build may leave it."""
        where = np.searchsorted([*self._begins[1:], self.n_tokens], self.starts, side="left")
        rows = np.zeros((where == shard).sum() + 1, ROW)
        rows["token"] = [self._begins[shard], *self.starts[where == shard]]
        rows["document"] = [0, *[1] * (len(rows) - 1)]
        return rows

    def documents(self, begin: int, end: int) -> list[tuple[int, int]]:
        """The documents of the tokens [begin, end), cut token by token."""
        found = []
        stops = (self.starts + self.lengths).tolist()
        for start, stop in zip(self.starts.tolist(), stops, strict=True):
            inside = [token for token in range(start, stop) if begin <= token < end]
            is_empty = start == stop and begin <= start < max(end, self.n_tokens + 1) and begin < end
            is_empty &= start < end or end == self.n_tokens
            if inside or is_empty:
                found.append((inside[0], inside[-1] + 1) if inside else (start, start))
        return found


def windows_of(index: WindowIndex) -> list[list[tuple[int, int]]]:
    """The pieces of each window as (start, length)."""
    starts, lengths, counts = index.pieces(np.arange(index.n_windows))
    assert starts.dtype == lengths.dtype == counts.dtype == np.int64
    pieces = zip(starts.tolist(), lengths.tolist(), strict=True)
    windows = [[next(pieces) for _ in range(count)] for count in counts.tolist()]
    assert not [*pieces]
    return windows


def slow_best_fit(lengths: list[int], capacity: int) -> list[int]:
    """The space that remains in each window, one piece at a time."""
    spaces: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [i for i, space in enumerate(spaces) if space >= length]
        if fitting:
            spaces[min(fitting, key=lambda i: spaces[i])] -= length
        else:
            spaces.append(capacity - length)
    return sorted(spaces)


LENGTHS = st.lists(st.integers(0, 12) | st.integers(0, 60), min_size=1, max_size=30)


@settings(max_examples=100)
@given(
    lengths=LENGTHS,
    shard_ends=st.lists(st.integers(0, 300), max_size=4),
    cuts=st.tuples(st.integers(0, 300), st.integers(0, 300)),
    max_length=st.integers(1, 24),
    kind=st.sampled_from(KINDS),
    block=st.integers(1, 12),
)
@example([0], [], (0, 1), 4, "packed", 4)
@example([1, 0], [], (0, 2), 1, "packed", 4)
@example([3, 0, 0, 5], [3], (3, 4), 4, "documents", 4)
@example([3, 0, 0, 5], [4, 4], (4, 6), 4, "packed", 1)
@example([60], [7], (5, 50), 8, "packed", 4)
def test_every_token_of_a_split_is_a_target_exactly_once(
    tmp_path_factory, lengths, shard_ends, cuts, max_length, kind, block
):
    store, folder = FakeStore(lengths, shard_ends), tmp_path_factory.mktemp("windows")
    begin, end = sorted(min(cut, store.n_tokens) for cut in cuts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "BLOCK_DOCUMENTS", block)
        index = open_index(store, begin, end, max_length, kind, folder)
    windows, documents = windows_of(index), store.documents(begin, end)

    pieces = [piece for window in windows for piece in window]
    targets = sorted(t for start, n in pieces for t in range(start + 1, start + 1 + n))
    assert targets == [t for s, e in documents for t in range(s, e + 1)]
    leading = end > begin and begin + 1 in store.starts and begin not in store.starts
    trailing = end == documents[-1][1] if documents else False
    assert targets == [*range(begin + leading, end + trailing)] * bool(documents)

    outer = {s - 1 for s, _ in documents} | {e for _, e in documents}
    for window in windows:
        assert sum(n for _, n in window) <= max_length
        edges = [edge for start, n in window for edge in (start, start + n)]
        assert outer.issuperset(edges[1:-1])
    assert [min(window) for window in windows] == sorted(min(window) for window in windows)
    n_full = sum((e - s) // max_length for s, e in documents)
    assert len(pieces) == n_full + len(documents)
    if kind == "documents":
        assert pieces == sorted(pieces)
        assert len(windows) == len(pieces)
    elif block >= len(documents):
        rests = [(e - s) % max_length + 1 for s, e in documents]
        assert len(windows) == n_full + len(slow_best_fit(rests, max_length))

    filled = [sum(n for _, n in window) for window in windows]
    assert index.n_windows == len(windows)
    assert index.n_documents == len(documents)
    assert index.n_split == sum(e - s + 1 > max_length for s, e in documents)
    assert index.n_targets == sum(filled)

    chosen = np.random.default_rng(0).permutation(len(windows))[:7]
    starts, _, counts = index.pieces(chosen)
    assert starts.tolist() == [start for w in chosen for start, _ in windows[w]]
    assert counts.tolist() == [len(windows[w]) for w in chosen]


@settings(max_examples=200)
@given(st.integers(1, 40).flatmap(lambda c: st.tuples(st.lists(st.integers(1, c)), st.just(c))))
def test_pieces_are_packed_like_plain_best_fit_decreasing(problem):
    lengths, capacity = problem
    windows = best_fit(np.array(lengths, np.int64), capacity)
    spaces = capacity - np.bincount(windows, lengths).astype(np.int64)
    assert sorted(spaces.tolist()) == slow_best_fit(lengths, capacity)


@pytest.mark.parametrize("max_length", [256, 1024, 2048])
def test_padding_of_log_normal_documents_is_below_a_tenth_of_a_percent(max_length):
    lengths = np.random.default_rng(1).lognormal(np.log(300), 1.2, 100_000).astype(np.int64)
    ends = np.cumsum(lengths + 1)
    block = build_index(ends - lengths, ends, max_length, "packed")
    assert block.lengths.sum() == (lengths + 1).sum()
    assert 1 - block.lengths.sum() / (max_length * len(block.firsts)) < 0.0001


def test_the_windows_of_a_text_never_change():
    lengths = np.arange(5_000) ** 3 % 677  # without a generator, which a library may change
    ends = np.cumsum(lengths + 1)
    block = build_index(ends - lengths, ends, 256, "packed")
    digest = hashlib.sha256(b"".join(a.astype("<i8").tobytes() for a in block)).hexdigest()
    assert digest[:16] == "795a28add6f5a1b9", "checkpoints rely on them: increase packing.VERSION"


def test_the_pieces_of_a_window_come_from_one_block_of_documents(tmp_path, monkeypatch):
    monkeypatch.setattr(packing, "BLOCK_DOCUMENTS", 8)
    store = FakeStore([3] * 100)
    index = open_index(store, 0, store.n_tokens, 16, "packed", tmp_path)
    blocks = [{min((start + 1) // 32, 11) for start, _ in window} for window in windows_of(index)]
    assert all(len(block) == 1 for block in blocks)
    assert index.n_windows == 25


def test_pieces_in_a_window_of_a_real_store_meet_at_separators(tmp_path):
    texts = ["one two three " * n for n in (3, 0, 40, 1, 0, 0, 9, 25, 0)]
    store = prepare_store(ListCorpus(texts), GPT2, tmp_path / "tokens")
    ids, split = store.tokens[0 : store.n_tokens], split_tokens(store, 0.2, 0.1)
    for begin, end in (split.train, split.val, split.test):
        assert end - begin > 1
        index = open_index(store, begin, end, 8, "packed", tmp_path / "windows")
        for window in windows_of(index):
            edges = [edge for start, n in window for edge in (start, start + n)]
            inner = [edge for edge in edges[1:-1] if begin <= edge < end]
            assert all(ids[edge] == EOT for edge in inner)


def opened(folder, kind="packed", n=50):
    store = FakeStore([n % 9 for n in range(n)])
    return open_index(store, 0, store.n_tokens, 8, kind, folder)


@pytest.fixture
def builds(monkeypatch):
    """Count how often an index is built."""
    numbers, write = [], packing._write
    monkeypatch.setattr(packing, "_write", lambda *arguments: (numbers.append(1), write(*arguments)))
    return numbers


@pytest.mark.parametrize("kind", KINDS)
def test_an_index_is_built_once_and_is_the_same_after_pickling(tmp_path, builds, kind):
    first, second = opened(tmp_path, kind), opened(tmp_path, kind)
    assert windows_of(first) == windows_of(second) == windows_of(pickle.loads(pickle.dumps(first)))
    assert len(builds) == 1
    assert len(pickle.dumps(first)) < 1_000
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_finished_index_opens_in_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    windows = windows_of(opened(tmp_path))
    monkeypatch.setattr(packing, "locked", None)
    assert windows_of(opened(tmp_path)) == windows


def damage(path, content):
    path.unlink()  # another process has the old file
    if content is not None:
        path.write_bytes(content)


@pytest.mark.parametrize("name", ["starts.bin", "lengths.bin", "firsts.bin", "index.json"])
@pytest.mark.parametrize(
    "change",
    [lambda old: old[:-2], lambda old: b"[]", lambda old: None],
    ids=["truncated", "other", "missing"],
)
def test_a_damaged_index_is_built_again(tmp_path, builds, name, change):
    index = opened(tmp_path)
    windows = windows_of(index)
    damage(index.folder / name, change((index.folder / name).read_bytes()))
    assert windows_of(opened(tmp_path)) == windows
    assert windows_of(index) == windows
    assert len(builds) == 2


def test_what_a_killed_build_left_is_removed(tmp_path):
    folder = opened(tmp_path).folder
    (folder / "index.json").unlink()
    (folder / ".starts.bin.0.tmp").write_bytes(b"half")
    opened(tmp_path)
    assert sorted(p.name for p in folder.iterdir()) == [
        "firsts.bin", "index.json", "lengths.bin", "starts.bin",
    ]  # fmt: skip


def test_of_several_processes_one_builds(tmp_path, monkeypatch, builds, caplog):
    find = packing.document_blocks
    monkeypatch.setattr(packing, "document_blocks", lambda *a: (time.sleep(0.2), find(*a))[1])
    with ThreadPoolExecutor(4) as pool:
        indexes = [*pool.map(lambda _: opened(tmp_path), range(4))]
    assert len(builds) == 1
    assert all(windows_of(index) == windows_of(indexes[0]) for index in indexes)
    assert "waiting for another process that builds the index" in caplog.text


def test_a_full_disk_is_named_with_the_remedy_and_leaves_nothing(tmp_path, monkeypatch):
    def full(file, data):
        raise OSError(errno.ENOSPC, "No space left on device", str(file.path))

    with monkeypatch.context() as patch:
        patch.setattr(packing.AtomicFile, "write", full)
        message = "the index of the windows cannot be written. Free some space, or set data_dir"
        with pytest.raises(OSError, match=message):
            opened(tmp_path)
    assert not list(tmp_path.rglob("*.bin*"))
    assert opened(tmp_path).n_windows


def test_a_folder_that_cannot_be_made_is_named_with_the_remedy(tmp_path):
    (tmp_path / "windows").write_text("a file")
    with pytest.raises(OSError, match=r"the index of the windows cannot be written.*windows"):
        opened(tmp_path / "windows")


@pytest.mark.parametrize("shard_ends", [[], [2]], ids=["one shard", "a first shard with one document"])
def test_documents_without_separators_are_refused(tmp_path, shard_ends):
    store = FakeStore([4, 4, 4], shard_ends)
    store.vocab["n_bytes"][1] = 3
    with pytest.raises(ValueError, match=r"token 4 of a store is .* and it is text\. .* --separate"):
        open_index(store, 0, store.n_tokens, 8, "packed", tmp_path)
    shutil.rmtree(tmp_path / ".locks")


def test_a_split_of_other_programs_may_end_without_a_separator(tmp_path):
    store = FakeStore([4, 3, 5])
    store.tokens = Tokens([np.where(np.arange(store.n_tokens) == 4, 1, 0)])  # none before token 9
    index = open_index(store, 0, 9, 8, "documents", tmp_path)
    assert windows_of(index) == [[(-1, 5)], [(4, 5)]]


@settings(max_examples=8)
@given(
    texts=st.lists(
        st.sampled_from(["", "one", "two words", "<|endoftext|>", "a b c d e f g " * 6]), min_size=4
    ),
    kind=st.sampled_from(KINDS),
    max_length=st.integers(1, 12),
    val=st.sampled_from([0.0, 0.2, 0.5]),
)
@example(["", "one", "", "a b c d e f g " * 6, "", ""], "packed", 4, 0.5)
def test_windows_of_texts_are_their_documents_after_a_separator(
    tmp_path_factory, texts, kind, max_length, val
):
    corpus, folder = (
        ListCorpus([*texts, "The last text is long enough. " * 3]),
        tmp_path_factory.mktemp("d"),
    )
    options = {"windows": kind, "eval_windows": kind, "max_length": max_length, "val_fraction": val}
    data = runs_opened(GPTDataModule(corpus, data_dir=folder, batch_size=1, **options))
    ids, split = data.store.tokens[0 : data.store.n_tokens].tolist(), data.sources["corpus"].split
    rows, n_targets = data.store.rows(0), 0
    starts = rows["token"][rows["document"] == 1]
    for windows, (begin, end) in ((data.train_windows, split.train), (data.val_windows, split.val)):
        known = dict(zip(range(begin, end), ids[begin:end], strict=True))
        scored = []
        for number in range(len(windows)):
            inputs, targets = (ids.tolist() for ids in windows[number])
            for token, before, target in zip(
                windows.target_tokens([number])[0].tolist(), inputs, targets, strict=True
            ):
                assert target == (IGNORE_INDEX if token < 0 and target < 0 else known.get(token, EOT))
                if target >= 0 and token >= 0:
                    assert before in (known.get(token - 1, EOT), EOT)
                    scored.append(token)
                n_targets += target >= 0
        leading = end > begin and begin + 1 in starts and begin not in starts  # a separator
        assert sorted(scored) == [*range(begin + leading, end)]
    assert n_targets == data.train_windows.n_targets + data.val_windows.n_targets * bool(val)
