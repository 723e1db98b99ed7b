"""Named sources: what a user may give, which stores are built, and loaders without a Trainer."""

from __future__ import annotations

import itertools
import math
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from lit_gptdata import GPTDataModule
from lit_gptdata._lightning import split_on_device
from lit_gptdata.tokens.options import Source
from lit_gptdata.tokens.shards import Tokens
from lit_gptdata.windows.loader import window_loader
from tests.conftest import ListCorpus
from tests.runs import LENGTH, SOURCES, make_data, opened, windows_of, words, write_sources

pytestmark = pytest.mark.usefixtures("one_thread")

WEIGHTS = {"web": 0.6, "code": 0.3, "books": 0.1}


def stages(tokens: int = 5 * 4 * LENGTH) -> list[dict[str, Any]]:
    later = {"web": 0.1, "code": 0.2, "books": 0.7}
    return [{"tokens": tokens, "weights": WEIGHTS}, {"weights": later}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Three texts, and their stores under `data`."""
    folder = tmp_path_factory.mktemp("sources")
    write_sources(folder)
    opened(mixture(folder))
    return folder


def sources(folder: Path, weights: dict[str, float] | None = WEIGHTS) -> dict[str, Any]:
    paths = {name: str(folder / f"{name}.txt") for name in SOURCES}
    if weights is None:
        return paths
    return {name: {"path": paths[name], "weight": weight} for name, weight in weights.items()}


def mixture(folder: Path, weights: dict[str, float] | None = WEIGHTS, **options) -> GPTDataModule:
    return make_data(folder, **{"corpus": sources(folder, weights)} | options)


def rows(loader, n: int = 10**6) -> list[int]:
    """The windows of the next batches, in one list."""
    return [window for inputs, _ in itertools.islice(loader, n) for window in windows_of(inputs)]


def at(data: GPTDataModule, begin: int, end: int) -> list[int]:
    return windows_of(data.train_windows.batch(np.arange(begin, end))[0])


def stores(folder: Path) -> dict[str, int]:
    found = (folder / "data" / "tokens").glob("*/manifest.json")
    return {path.parent.name: path.stat().st_mtime_ns for path in found}


def test_a_loader_reads_the_positions_of_each_epoch_in_order(folder):
    data = opened(mixture(folder))
    n = len(data.train_windows)
    assert n == sum(len(source.train_windows) for source in data.sources.values())
    loader = data.train_dataloader()
    full = n // 4 * 4
    assert rows(loader) == at(data, 0, full)
    assert rows(loader) == at(data, n, n + full)
    names, windows = data.train_windows.locate(np.arange(n))
    first = {name: begin // LENGTH for name, (begin, _) in SOURCES.items()}
    expected = [first[name] + window for name, window in zip(names, windows, strict=True)]
    assert at(data, 0, n) == expected
    assert windows_of(data.batch_at(3)[0]) == at(data, 12, 16)
    assert windows_of(data.batch_at(2, epoch=1)[0]) == at(data, n + 8, n + 12)


def test_without_weights_sources_count_by_their_size(folder):
    data = opened(mixture(folder, None))
    n = len(data.train_windows)
    sizes = {name: len(source.train_windows) for name, source in data.sources.items()}
    assert data.train_windows.count(n) == sizes, "each window once per epoch"
    assert len(set(at(data, 0, n))) == n


def test_a_source_of_weight_0_only_validates(folder):
    data = opened(mixture(folder, {"web": 3, "code": 1, "books": 0}))
    names, _ = data.train_windows.locate(np.arange(1000))
    assert set(names) == {"web", "code"}
    assert [(found.name, found.trains) for found in data.eval_sets("val")] == [
        ("web", True), ("code", True), ("books", False),
    ]  # fmt: skip


def test_one_named_source_is_a_mixture_of_one(folder):
    data = opened(make_data(folder, corpus={"web": str(folder / "web.txt")}))
    n = len(data.train_windows)
    assert sorted(at(data, 0, n)) == list(range(n))
    assert data.store is data.sources["web"].store


def test_several_sources_have_no_single_store(folder):
    data = opened(mixture(folder))
    with pytest.raises(RuntimeError, match=r"data\.sources\[name\]\.store \(web, code, books\)"):
        data.store  # noqa: B018 the property raises


def test_workers_and_compact_batches_give_the_same_windows(folder):
    plain = opened(mixture(folder, None, stages=stages()))
    expected = at(plain, 0, len(plain.train_windows) // 4 * 4)
    workers = opened(mixture(folder, None, stages=stages(), num_workers=2))
    assert rows(workers.train_dataloader()) == expected
    for n in (0, 2):
        loader = window_loader(
            plain.train_windows, plain.train_steps, seed=0, num_workers=n, is_compact=True
        )
        batches = [split_on_device(ids, 0) for ids in loader]
        assert [window for inputs, _ in batches for window in windows_of(inputs)] == expected


@pytest.mark.parametrize(
    "options", [{}, {"weights": None, "stages": stages()}], ids=["weights", "stages"]
)
@pytest.mark.parametrize("batch_size", [4, 6])
def test_a_loader_state_continues_with_any_batch_size(folder, options, batch_size):
    whole = opened(mixture(folder, **options))
    n = len(whole.train_windows)
    loader = whole.train_dataloader()
    rows(loader)
    rows(loader, 7)
    state = loader.state_dict()
    again = opened(mixture(folder, **options, batch_size=batch_size))
    loader = again.train_dataloader()
    loader.load_state_dict(state)
    first = n + 28
    last = first + (2 * n - first) // batch_size * batch_size
    if batch_size == 4 or not options:  # a stage starts after whole steps of the run that starts it
        assert rows(loader) == at(whole, first, last)


@pytest.mark.parametrize("early", [True, False], ids=["before setup", "after setup"])
@pytest.mark.parametrize("batch_size", [4, 6])
def test_a_data_module_state_continues_with_the_stages_of_its_run(folder, early, batch_size):
    options = {"weights": None, "stages": stages(30 * 4 * LENGTH)}
    whole = opened(mixture(folder, **options))
    loader = whole.train_dataloader()
    rows(loader, 7)
    state = whole.state_dict()
    assert state["index"] == 24, "the last batch counts as unfinished"
    n = len(whole.train_windows)
    again = mixture(folder, **options, batch_size=batch_size)
    again.prepare_data()
    if early:
        again.load_state_dict(state)
    again.setup()
    if not early:
        again.load_state_dict(state)
    loader = again.train_dataloader()
    last = 24 + (n - 24) // batch_size * batch_size
    assert rows(loader) == at(whole, 24, last)
    assert rows(loader, 5) == at(whole, n, n + 5 * batch_size), "also after the stage has changed"
    assert windows_of(again.batch_at(2)[0]) == at(whole, 8, 12)
    assert windows_of(again.batch_at(6)[0]) == at(whole, 24, 28), "the history is the checkpoint's"


def test_the_state_of_a_val_loader_of_several_sets_tells_them_by_their_number_of_windows(folder):
    data = opened(mixture(folder, val_fraction=0.3))
    loader = data.val_dataloader()
    expected = rows(loader)
    rows(loader, 2)
    state = loader.state_dict()
    n = sum(len(found.windows) for found in data.eval_sets("val"))
    assert state["windows"] == [0, n, LENGTH, LENGTH], "states of earlier versions have these, too"
    resumed = data.val_dataloader()
    resumed.load_state_dict(state)
    assert rows(resumed) == expected[2 * 4 :]


def test_a_data_module_refuses_the_state_of_other_weights(folder):
    data = opened(mixture(folder))
    rows(data.train_dataloader(), 3)
    state = data.state_dict()
    other = opened(mixture(folder, WEIGHTS | {"code": 0.5}))
    other.load_state_dict(state)
    with pytest.raises(ValueError, match=r"source code: weight was 0\.3, now 0\.5"):
        other.train_dataloader()


@pytest.mark.parametrize("as_url", [False, True], ids=["folder", "file URL"])
def test_published_stores_are_sources_next_to_local_texts(folder, tmp_path, as_url):
    local = opened(mixture(folder))
    urls = local.publish((tmp_path / "published").as_uri() if as_url else str(tmp_path / "published"))
    assert list(urls) == list(SOURCES)
    corpus = sources(folder)
    corpus["web"] = {"store_url": urls["web"], "weight": 0.6}
    corpus["books"] = {"store_url": urls["books"], "weight": 0.1}
    data = opened(make_data(folder, corpus=corpus, data_dir=str(tmp_path / "data")))
    n = len(local.train_windows)
    assert at(data, 0, 3 * n) == at(local, 0, 3 * n)
    assert rows(data.train_dataloader()) == at(local, 0, n // 4 * 4)
    assert len(stores(tmp_path)) == 1, "only code is tokenized"
    assert data.hparams.corpus["web"] == {"store_url": urls["web"], "weight": 0.6}


def test_remote_prefetch_gets_the_plan_of_each_source(folder, monkeypatch):
    data = opened(mixture(folder))
    plans: dict[str, list[int]] = {name: [] for name in SOURCES}

    class Watched(Tokens):
        name = ""

        def ahead(self, batches, plan):
            for batch, tokens in zip(batches, plan, strict=True):
                plans[self.name] += tokens.tolist()
                yield batch

    for name, source in data.sources.items():
        tokens = Watched(source.store.tokens._arrays)
        tokens.name = name
        monkeypatch.setitem(vars(source.store), "tokens", tokens)
    loader, n = data.train_dataloader(), len(data.train_windows) // 4 * 4
    names, windows = data.train_windows.locate(np.arange(n))
    assert rows(loader) == at(data, 0, n)
    for name in SOURCES:
        starts = windows[names == name] * LENGTH
        edges = [*starts.tolist(), *(starts + LENGTH).tolist()]  # each window's first and last token
        assert sorted(plans[name]) == sorted(edges)


def test_adding_a_source_or_changing_a_weight_builds_only_the_new_store(folder, tmp_path):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "mail.txt").write_text("Dear reader, here is another text. " * 60)
    one = opened(mixture(tmp_path))
    before = stores(tmp_path)
    more = sources(tmp_path) | {"mail": {"path": str(tmp_path / "mail.txt"), "weight": 0.4}}
    other = opened(make_data(tmp_path, corpus={"mail": more.pop("mail"), **more}))
    after = stores(tmp_path)
    assert len(after.items() - before.items()) == 1
    assert before.items() <= after.items(), "no store is built again"
    weighted = opened(mixture(tmp_path, {"web": 1, "code": 1, "books": 1}))
    assert stores(tmp_path) == after
    positions = np.arange(2000)
    names, windows = one.train_windows.locate(positions)
    for data in (other, weighted):
        new_names, new_windows = data.train_windows.locate(positions)
        for name in SOURCES:
            first, second = windows[names == name], new_windows[new_names == name]
            n = min(len(first), len(second))
            assert n > 80
            assert np.array_equal(first[:n], second[:n])
            for a, b in zip(*(d.sources[name].val_windows for d in (one, data)), strict=False):
                assert torch.equal(a[0], b[0])


def test_a_source_has_its_own_reading_options_and_split(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"body": "Some text in a column. ", "n": 1}\n' * 50)
    (tmp_path / "broken.txt").write_bytes(b"Text with a byte \xff that is not UTF-8. " * 50)
    corpus = {
        "rows": {"path": str(tmp_path / "rows.jsonl"), "text_column": "body", "val_fraction": 0.5},
        "broken": Source(
            path=str(tmp_path / "broken.txt"), encoding_errors="replace", test_fraction=0.2
        ),
    }
    data = opened(make_data(tmp_path, corpus=corpus, val_fraction=0.1))
    rows_, broken = data.sources.values()
    assert len(rows_.val_windows) > len(broken.val_windows) > 0
    assert len(broken.test_windows) > 0 == len(rows_.test_windows)
    assert data.hparams.corpus["broken"]["encoding_errors"] == "replace"


def test_hydra_and_argparse_values_are_accepted_and_become_plain(folder):
    given = {name: {"path": [str(folder / f"{name}.txt")], "weight": 1} for name in SOURCES}
    config = OmegaConf.create({"corpus": given, "val": {"extra": given["web"]["path"]}})
    data = make_data(folder, corpus=config.corpus, val_corpus=None)
    expected = {name: {"path": value["path"], "weight": 1.0} for name, value in given.items()}
    assert data.hparams.corpus == expected
    assert type(data.hparams.corpus) is type(data.hparams.corpus["web"]) is dict
    assert type(data.hparams.corpus["web"]["path"]) is list
    config = OmegaConf.create(stages())
    data = make_data(folder, corpus=OmegaConf.create(sources(folder, None)), stages=config)
    assert data.hparams.stages == [{**stages()[0]}, {"tokens": None, **stages()[1]}]
    assert type(data.hparams.stages[0]["weights"]) is dict
    same = {name: Source(path=path) for name, path in sources(folder, None).items()}
    assert at(opened(mixture(folder, None)), 0, 200) == at(
        opened(make_data(folder, corpus=same)), 0, 200
    )


BAD_SOURCES = [
    ({}, "corpus is an empty mapping"),
    ({"web": {"path": "a", "wieght": 1}}, r"corpus\.web has no option 'wieght': choose from path, wei"),
    ({"web": {}}, r"corpus\.web must have either path or store_url, got neither"),
    ({"web": {"weight": 1}}, r"corpus\.web must have either path or store_url, got neither"),
    ({"web": None}, r"corpus\.web must have either path or store_url, got neither"),
    ({"web": {"path": "a", "store_url": "b"}}, r"corpus\.web must have .*path or store_url, got both"),
    ({"1web": "a"}, "name of a source has letters, digits, _ and -.*'1web'"),
    ({"a b": "a"}, "got 'a b'"), ({"a/b": "a"}, "got 'a/b'"), ({"": "a"}, "got ''"), ({1: "a"}, "got 1"),
    ({"web\n": "a"}, "got 'web"), ({"é": "a"}, "got 'é'"),
    ({"web": {"path": "a", "val_fraction": 1.5}}, r"source web: val_fraction.*1\.5"),
    ({"web": {"path": "a", "strip_gutenberg": "no"}}, "source web: strip_gutenberg.*'no'"),
    ({"web": {"path": "a", "text_column": 3}}, "source web: text_column.*3"),
    ({"web": {"path": "a", "max_document_bytes": 0}}, "source web: max_document_bytes.*0"),
    ({"web": {"path": "a", "encoding_errors": "x"}}, "source web: encoding_errors must be one of"),
    ({"web": {"store_url": ""}}, "source web: store_url"),
    ({"a": {"path": "a", "weight": 1}, "b": "b", "c": "c"}, "b, c has no weight, but another"),
    ({"a": {"path": "a", "weight": 0}, "b": {"path": "b", "weight": 0}}, "weights of all sources are 0"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("corpus", "message"), BAD_SOURCES, ids=[str(bad[0])[:60] for bad in BAD_SOURCES]
)
def test_a_bad_source_is_refused_by_name_and_value(corpus, message):
    with pytest.raises((ValueError, TypeError), match=message) as error:
        GPTDataModule(corpus)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "weight", [-1, math.nan, math.inf, "0.5", True, [1], -0.1, np.float32(-2), complex(1)]
)
def test_a_weight_must_be_a_number_from_0_on(weight):
    with pytest.raises(
        (ValueError, TypeError), match=rf"corpus\.web\.weight .*{re.escape(repr(weight))}"
    ):
        GPTDataModule({"web": {"path": "a", "weight": weight}, "code": {"path": "b", "weight": 1}})


def test_weights_of_numpy_become_plain():
    data = GPTDataModule({"web": {"path": "a", "weight": np.float32(0.5)}})
    assert type(data.hparams.corpus["web"]["weight"]) is float


A_B = {"a": "a.txt", "b": "b.txt"}
GOOD = {"a": 1, "b": 1}
BAD_STAGES = [
    ([], "stages must be a list"), ({}, "stages must be a list"), ("x", "stages must be a list"),
    ([3], r"stages\[0\].*3"),
    ([{"tokens": 5}], r"stages\[0\] must have the keys tokens and weights"),
    ([{"weights": GOOD, "token": 4}], r"stages\[0\] must have the keys tokens and weights"),
    ([{"tokens": 0, "weights": GOOD}, {"weights": GOOD}], r"stages\[0\]\.tokens must be .* got 0"),
    ([{"tokens": -5, "weights": GOOD}, {"weights": GOOD}], r"stages\[0\]\.tokens must be .* got -5"),
    ([{"tokens": 1.5, "weights": GOOD}, {"weights": GOOD}], r"stages\[0\]\.tokens must be .* got 1\.5"),
    ([{"tokens": 5, "weights": GOOD}], r"stages\[0\]\.tokens is 5, but only the last one of"),
    ([{"weights": GOOD}, {"weights": GOOD}], r"stages\[0\]\.tokens is None, but only the last"),
    ([{"weights": {"a": 1}}], r"weights must name the sources a, b .*, got \['a'\]"),
    ([{"weights": {**GOOD, "c": 1}}], r"weights must name the sources a, b .*, got \['a', 'b', 'c'\]"),
    ([{"weights": {"a": 0, "b": 0}}], r"stages\[0\]\.weights are all 0"),
    ([{"weights": {"a": -1, "b": 1}}], r"stages\[0\]\.weights\.a must be .* got -1"),
    ([{"weights": {"a": "1", "b": 1}}], r"stages\[0\]\.weights\.a must be .* got '1'"),
    ([{"weights": [1, 2]}], r"stages\[0\]\.weights .*\[1, 2\]"),
    ([{"weights": None}], r"stages\[0\]\.weights .*None"),
]  # fmt: skip


@pytest.mark.parametrize(("given", "message"), BAD_STAGES, ids=[str(bad[0])[:60] for bad in BAD_STAGES])
def test_a_bad_stage_is_refused_by_number_and_value(given, message):
    with pytest.raises((ValueError, TypeError), match=message) as error:
        GPTDataModule(A_B, stages=given)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"corpus": {"a": {"path": "a", "weight": 1}}, "stages": [{"weights": {"a": 1}}]},
            "replace.*weight",
        ),
        ({"corpus": "a.txt", "stages": [{"weights": {"a": 1}}]}, "stages need named sources"),
        ({"corpus": A_B, "store_url": "x"}, "store_url replaces a single corpus"),
        ({"corpus": A_B, "val_corpus": {"a": "c"}}, r"val_corpus\.a is in corpus, too"),
        (
            {"corpus": A_B, "val_corpus": {"c": {"path": "c", "weight": 1}}},
            r"val_corpus\.c has weight=1",
        ),
        ({"corpus": A_B, "val_corpus": {}}, "val_corpus is an empty mapping"),
        ({"corpus": A_B, "val_corpus": "c.txt"}, "val_corpus.*'c.txt'"),
        ({"corpus": A_B, "val_corpus": ["c.txt"]}, "val_corpus.*c.txt"),
        (
            {"corpus": A_B, "val_corpus": {"c": {"path": "c", "val_fraction": 0.1}}},
            r"c has val_fraction=0\.1",
        ),
        ({"corpus": A_B, "on_change": "ignore"}, "on_change must be one of"),
    ],
)
def test_options_that_contradict_each_other_are_refused(options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        GPTDataModule(**options)


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        (None, FileNotFoundError, r"source web: .*missing\.txt|missing\.txt.*source web"),
        ("", ValueError, "source web: .*"),
        (
            "Three short words",
            ValueError,
            r"source web: .* \d tokens, too few for one window: max_length=8",
        ),
    ],
    ids=["missing", "empty", "short"],
)
def test_a_text_that_cannot_train_names_its_source(folder, tmp_path, text, error, message):
    path = tmp_path / "missing.txt"
    if text is not None:
        path.write_text(text)
    corpus = {"web": {"path": str(path), "val_fraction": 0}, "code": str(folder / "code.txt")}
    with pytest.raises(error, match=message):
        opened(make_data(tmp_path, corpus=corpus))


@pytest.mark.parametrize("path", [5, [], {"x": "y"}, [None]])
def test_a_path_that_names_no_text_is_refused_with_its_source(path):
    with pytest.raises((TypeError, ValueError), match=r"source web: .*(corpus=|an empty list)"):
        GPTDataModule({"web": {"path": path}})


def test_a_val_set_may_have_the_name_that_a_single_corpus_has_in_sources(folder):
    corpus, val_corpus = str(folder / "web.txt"), {"corpus": str(folder / "code.txt")}
    data = opened(make_data(folder, corpus=corpus, val_corpus=val_corpus))
    assert [(found.name, found.trains) for found in data.eval_sets("val")] == [
        ("", True),
        ("corpus", False),
    ]
    assert data._data.named("corpus").store.n_tokens == 280


def test_a_short_source_of_weight_0_is_fine(folder, tmp_path):
    (tmp_path / "short.txt").write_text("A few words that are too short.")
    short = {"path": str(tmp_path / "short.txt"), "weight": 0, "val_fraction": 0.5}
    code = {"path": str(folder / "code.txt"), "weight": 1}
    data = opened(make_data(tmp_path, corpus={"short": short, "code": code}))
    assert [found.name for found in data.eval_sets("val")] == ["short", "code"]
    never = [{"weights": {"short": 0, "code": 1}}]
    corpus = {"short": short | {"weight": None}, "code": code["path"]}
    assert len(opened(make_data(tmp_path, corpus=corpus, stages=never)).train_windows) > 20


def test_a_text_of_val_corpus_must_not_train(folder, tmp_path):
    copy = tmp_path / "another name.txt"
    shutil.copy(folder / "books.txt", copy)
    data = mixture(folder, val_corpus={"held_out": str(copy)})
    data.prepare_data()
    with pytest.raises(
        ValueError, match=r"val_corpus\.held_out .*another name\.txt.* source books trains"
    ):
        data.setup()
    weights = {"web": 1, "code": 1, "books": 0}
    assert (
        len(opened(mixture(folder, weights, val_corpus={"held_out": str(copy)})).eval_sets("val")) == 4
    )


def test_a_text_of_val_corpus_must_not_train_in_a_folder_or_as_the_only_corpus(folder, tmp_path):
    shutil.copy(folder / "books.txt", tmp_path / "a.txt")
    shutil.copy(folder / "web.txt", tmp_path / "b.txt")
    for options in ({"corpus": {"all": str(tmp_path)}}, {"corpus": str(tmp_path)}):
        data = make_data(folder, **options, val_corpus={"held_out": str(folder / "web.txt")})
        data.prepare_data()
        with pytest.raises(ValueError, match=r"val_corpus\.held_out .*web\.txt"):
            data.setup()


def test_another_tokenizer_of_a_published_source_is_refused_by_name(folder, tmp_path):
    local = opened(make_data(folder, corpus=str(folder / "web.txt"), special_tokens="text"))
    url = local.publish(str(tmp_path / "published"))
    corpus = {"web": {"store_url": url}, "code": str(folder / "code.txt")}
    data = make_data(tmp_path, corpus=corpus)
    with pytest.raises(ValueError, match=r"source web: .* special_tokens='text' .* has Tokenizer\("):
        data.prepare_data()


def test_custom_corpora_are_sources(tmp_path):
    texts = {"a": ["One text of words. " * 20], "b": ["More text. " * 30] * 2}
    data = opened(make_data(tmp_path, corpus={name: ListCorpus(list(t)) for name, t in texts.items()}))
    assert list(data.sources) == ["a", "b"]
    assert data.hparams.corpus["a"] == {"path": "ListCorpus(1 texts)"}
    assert words()  # the other tests read these
