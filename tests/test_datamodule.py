"""GPTDataModule on its own and under a Trainer: batches, splits, hyperparameters, messages."""

from __future__ import annotations

import inspect
from enum import Enum
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.tuner import Tuner
from omegaconf import OmegaConf

from lit_gptdata import GPT, EmbeddingStem, GPTDataModule, Throughput, TokenBudget
from lit_gptdata.text.corpus import open_corpus
from lit_gptdata.tokens.build import local as build
from lit_gptdata.training.throughput import TokenBar
from lit_gptdata.training.val_sets import ValSets
from lit_gptdata.windows.dataset import IGNORE_INDEX
from tests.conftest import ListCorpus
from tests.runs import make_trainer, opened

pytestmark = pytest.mark.usefixtures("one_thread")

TEXT = "".join(f"Sentence number {i} of a long, long story. " for i in range(400))


@pytest.fixture
def story(tmp_path):
    (tmp_path / "story.txt").write_text(TEXT)
    return tmp_path / "story.txt"


def ready(corpus, tmp_path, **options) -> GPTDataModule:
    options = {"max_length": 8, "stride": 8, "data_dir": tmp_path / "data"} | options
    return opened(GPTDataModule(corpus, **options))


def tiny_gpt(data: GPTDataModule) -> GPT:
    torch.manual_seed(0)
    stem = EmbeddingStem(data.vocab_size, max_length=8, embedding_dim=8)
    return GPT(stem, n_layers=1, n_heads=2)


def test_train_windows_are_the_course_windows_of_the_train_range(story, tmp_path):
    data = ready(story, tmp_path, stride=5, max_length=8)
    ids = data.tokenizer.encode(TEXT)
    assert data.store.tokens[:].tolist() == ids
    end = data.sources["corpus"].split.train[1]
    starts = range(0, end - 8, 5)
    assert len(data.train_windows) == len(starts)
    for i, start in enumerate(starts):
        assert data.train_windows[i][0].tolist() == ids[start : start + 8]
        assert data.train_windows[i][1].tolist() == ids[start + 1 : start + 9]


def test_validation_is_complete_and_in_text_order(story, tmp_path):
    data = ready(story, tmp_path, val_fraction=0.2, test_fraction=0.1, batch_size=4)
    begin, end = data.sources["corpus"].split.val
    for loader in (data.val_dataloader(), data.predict_dataloader()):
        targets = torch.cat([y.flatten() for _, y in loader])
        assert targets[targets != IGNORE_INDEX].tolist() == data.store.tokens[begin + 1 : end].tolist()
    assert sum(len(x) for x, _ in data.test_dataloader()) == len(data.test_windows) > 0


@pytest.mark.parametrize("kind", ["sliding", "documents"])
def test_rows_of_val_and_test_batches_map_to_the_tokens_of_the_store(story, tmp_path, kind):
    data = ready(story, tmp_path, val_fraction=0.2, test_fraction=0.1, eval_windows=kind)
    for split, windows in (("val", data.val_windows), ("test", data.test_windows)):
        found = []
        for step, (inputs, targets) in enumerate(getattr(data, f"{split}_dataloader")()):
            assert torch.equal(data.batch_at(step, split=split)[0], inputs)
            tokens = windows.target_tokens(data.windows_at(step, split=split))
            ids = [IGNORE_INDEX if t < 0 else int(data.store.tokens[t : t + 1][0]) for t in tokens.flat]
            expected = targets.flatten().tolist()
            pairs = zip(ids, expected, strict=True)
            assert {e for id, e in pairs if id != e} <= {data.tokenizer.end_of_document}
            found += [t for t in tokens.flat if t >= 0]
        begin, end = getattr(data._data.first.split, split)
        assert sorted(found) == list(range(begin + (kind == "sliding"), end))
    shares = [data.windows_at(1, split="val", rank=rank, world_size=2).tolist() for rank in (0, 1)]
    assert shares == [[8, 9, 10, 11], [12, 13, 14, 15]]
    with pytest.raises(ValueError, match="step=999, rank=0 does not exist: there are"):
        data.windows_at(999, split="test")
    with pytest.raises(ValueError, match="split must be one of"):
        data.windows_at(0, split="dev")


def test_empty_splits_give_empty_lists(story, tmp_path):
    data = ready(story, tmp_path, val_fraction=0.0)
    assert data.val_dataloader() == data.test_dataloader() == data.predict_dataloader() == []
    assert data.sources["corpus"].split.train == (0, data.store.n_tokens)


def test_a_change_of_windows_tokenizes_nothing(story, tmp_path, monkeypatch):
    first = ready(story, tmp_path)
    monkeypatch.setattr(build, "_build", lambda *_, **__: pytest.fail("tokenized again"))
    changes = {"max_length": 4, "stride": 3, "batch_size": 2, "val_fraction": 0.3, "seed": 9}
    for name, value in changes.items():
        assert ready(story, tmp_path, **{name: value}).store.fingerprint == first.store.fingerprint


def test_the_order_follows_the_seed(story, tmp_path):
    def first_tokens(**options) -> list[int]:
        loader = ready(story, tmp_path, batch_size=1, **options).train_dataloader()
        return [int(x[0, 3]) for x, _ in loader]

    assert first_tokens(seed=1) == first_tokens(seed=1)
    assert first_tokens(seed=1) != first_tokens(seed=2)
    assert sorted(first_tokens(seed=1)) == sorted(first_tokens(shuffle=False))


@pytest.mark.parametrize("named", [False, True])
def test_drop_padded_leaves_out_eval_windows_that_need_padding(named, story, tmp_path):
    corpus = {"one": story, "two": "sample"} if named else story
    options = {"val_fraction": 0.2, "test_fraction": 0.1, "batch_size": 4}
    padded, data = (ready(corpus, tmp_path, drop_padded=drop, **options) for drop in (False, True))
    for name in ("val", "test"):
        loaders = [getattr(each, f"{name}_dataloader")() for each in (padded, data)]
        expected, targets = (torch.cat([batch[1] for batch in loader]) for loader in loaders)
        is_full = (expected != IGNORE_INDEX).all(dim=1)
        assert not is_full.all()
        assert torch.equal(targets, expected[is_full])


def test_a_trainer_fits_validates_tests_and_predicts(story, tmp_path):
    data = ready(story, tmp_path, test_fraction=0.1)
    model = tiny_gpt(data)
    fitter = make_trainer(max_steps=3, log_every_n_steps=1)
    fitter.fit(model, datamodule=data)
    (val,) = fitter.validate(model, datamodule=data, verbose=False)
    (test,) = fitter.test(model, datamodule=data, verbose=False)
    assert set(val) == {"val_loss", "val_perplexity", "val_bits_per_byte"}
    assert set(test) == {"test_loss", "test_perplexity", "test_bits_per_byte"}
    predicted = fitter.predict(model, datamodule=data)
    assert predicted is not None
    assert sum(p.shape[0] for p in predicted) == len(data.val_windows)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_every_loader_gives_batches_for_transformers(story, tmp_path, num_workers):
    options = {"test_fraction": 0.1, "num_workers": num_workers}
    plain = ready(story, tmp_path, **options)
    data = ready(story, tmp_path, **options, batch_format="hf")
    for name in ("train", "val", "test", "predict")[: 2 if num_workers else 4]:
        loaders = [getattr(each, f"{name}_dataloader")() for each in (plain, data)]
        for (inputs, targets), batch in zip(*loaders, strict=True):
            padding = targets == IGNORE_INDEX
            labels = torch.where(padding, IGNORE_INDEX, inputs)
            expected = {"input_ids": inputs, "labels": labels, "shift_labels": targets}
            assert list(batch) == list(expected)
            assert all(torch.equal(batch[name], value) for name, value in expected.items())
        assert padding.any() == (name != "train")
    assert all(map(torch.equal, data.batch_at(3), plain.batch_at(3)))  # a tuple


def test_gpt_and_callbacks_take_batches_for_transformers(story, tmp_path):
    results = []
    for batch_format in ("tuple", "hf"):
        data = ready(story, tmp_path, batch_format=batch_format)
        model, budget, speed = tiny_gpt(data), TokenBudget(3 * 4 * 8), Throughput()
        fitter = make_trainer(
            max_epochs=-1, callbacks=[budget, speed, ValSets(), TokenBar()], log_every_n_steps=1,
            enable_progress_bar=True,
        )  # fmt: skip
        fitter.fit(model, datamodule=data)
        assert (fitter.global_step, budget.tokens, speed.mean > 0) == (3, 96, True)
        (scores,) = fitter.validate(model, datamodule=data, verbose=False)
        results.append([scores, torch.cat(fitter.predict(model, datamodule=data)).tolist()])
    assert results[0] == results[1]


def test_bits_per_byte_are_nats_over_the_bytes_of_the_scored_targets(tmp_path):
    texts = [TEXT, "ünï 語 " * 200]
    data = ready(ListCorpus(texts), tmp_path, val_fraction=0.1)
    model = tiny_gpt(data)
    (val,) = make_trainer().validate(model, datamodule=data, verbose=False)
    begin, end = data.sources["corpus"].split.val
    scored = data.store.tokens[begin + 1 : end].tolist()
    n_bytes = len(data.tokenizer.decode(scored).replace("<|endoftext|>", "").encode())
    nats = val["val_loss"] * len(scored)
    bits = nats / torch.log(torch.tensor(2.0, dtype=torch.float64)) / n_bytes
    assert val["val_bits_per_byte"] == pytest.approx(float(bits), rel=1e-6)


def test_hparams_are_plain_and_survive_a_weights_only_checkpoint(story, tmp_path):
    corpus = list(OmegaConf.create([str(story)]))
    data = GPTDataModule(corpus, max_length=8, stride=8, data_dir=tmp_path / "data")
    assert data.hparams["corpus"] == [str(story)]
    assert type(data.hparams["data_dir"]) is str
    model = tiny_gpt(data)
    fitter = make_trainer(max_epochs=1, limit_train_batches=2)
    fitter.fit(model, datamodule=data)
    path = tmp_path / "model.ckpt"
    fitter.save_checkpoint(path)
    checkpoint = torch.load(path, weights_only=True)
    assert checkpoint["datamodule_hyper_parameters"]["corpus"] == [str(story)]
    again = GPTDataModule.load_from_checkpoint(path)
    assert again.hparams == data.hparams
    fitter = make_trainer(max_epochs=2, limit_train_batches=2)
    fitter.fit(tiny_gpt(data), datamodule=data, ckpt_path=path, weights_only=True)
    assert fitter.global_step == 4


def test_hparams_are_the_arguments_in_plain_values(tmp_path):
    data = GPTDataModule(tmp_path, store_url=tmp_path, max_length=9)
    assert list(data.hparams) == list(inspect.signature(GPTDataModule).parameters)
    assert data.hparams["corpus"] == data.hparams["store_url"] == str(tmp_path)
    assert data.hparams["max_length"] == data.max_length == 9
    assert isinstance(GPTDataModule("sample").hparams["corpus"], str)
    assert isinstance(GPTDataModule(ListCorpus([TEXT])).hparams["corpus"], str)


class BatchOfAllDevices(GPTDataModule):
    """Changes one argument before it passes it on, and has another that no checkpoint can hold."""

    def __init__(self, batch_size: int, devices: np.ndarray, **options) -> None:
        super().__init__(batch_size=batch_size // len(devices), **options)


class Holder(L.LightningModule):
    """Builds a data module inside another Lightning object's __init__."""

    def __init__(self, batch_size: int, corpus: str) -> None:
        super().__init__()
        self.data = GPTDataModule("sample", batch_size=batch_size // 2)


def test_the_arguments_that_the_constructor_got_decide(story, tmp_path):
    options = {"corpus": story, "max_length": 8, "stride": 8, "data_dir": tmp_path / "data"}
    data = opened(BatchOfAllDevices(8, np.arange(2), **options))
    inputs, _ = next(iter(data.train_dataloader()))
    assert len(inputs) == data.batch_size == data.hparams["batch_size"] == 4
    held = Holder(8, "frankenstein").data
    assert (held.hparams["batch_size"], held.hparams["corpus"]) == (4, "sample")


def test_it_prints_its_corpus_tokens_and_windows(story, tmp_path):
    data = GPTDataModule(story, max_length=8, stride=4, data_dir=tmp_path / "data")
    assert "not prepared yet" in str(data)
    printed = str(opened(data))
    assert "story.txt" in printed
    assert f"{data.store.n_tokens:,}" in printed
    assert data.store.fingerprint[:8] in printed
    assert f"{len(data.train_windows):,} windows of 8 every 4 tokens" in printed
    assert f"{len(data.val_windows):,} windows of 8 every 8 tokens" in printed


def test_it_says_which_files_val_covers_and_warns_if_they_change(tmp_path):
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.txt").write_text(TEXT + name)
    options = {"max_length": 8, "stride": 8, "val_fraction": 0.2, "data_dir": tmp_path / "data"}
    covers = rf"val covers only the end of the corpus: the last 6\d % of {tmp_path}/c.txt"
    with pytest.warns(UserWarning, match=covers):
        data = opened(GPTDataModule(tmp_path / "*.txt", **options))
    assert f"% of {tmp_path}/c.txt" in str(data)
    opened(GPTDataModule(tmp_path / "*.txt", **options))  # the same run again says nothing more
    (tmp_path / "d.txt").write_text(TEXT + "d")
    changed = r"val changed since the last run: it was .*/c.txt, now it is .*/d.txt; val losses"
    with pytest.warns(UserWarning, match=changed):
        GPTDataModule(tmp_path / "*.txt", **options).prepare_data()


def test_setup_before_prepare_data_names_the_missing_call(story, tmp_path):
    data = GPTDataModule(story, data_dir=tmp_path / "data")
    with pytest.raises(RuntimeError, match=r"not tokenized yet under .*: call prepare_data\(\) first"):
        data.setup()
    for use in (lambda: data.store, lambda: data.batch_at(0)):
        with pytest.raises(RuntimeError, match=r"not open yet: call prepare_data\(\) and setup\(\)"):
            use()


@pytest.mark.parametrize("name", ["max_length", "stride", "batch_size"])
def test_sizes_are_checked_when_constructed(name):
    with pytest.raises(ValueError, match=f"{name} must be an integer ≥ 1, got 0"):
        GPTDataModule(**{name: 0})


@pytest.mark.parametrize("name", ["special_tokens", "encoding_errors", "build"])
def test_choices_are_checked_when_constructed(name):
    with pytest.raises(ValueError, match=f"{name} .*'no'"):
        GPTDataModule(**{name: "no"})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": "42"}, "seed must be an integer, got '42'"),
        ({"seed": True}, "seed must be an integer, got True"),
        ({"seed": 0.5}, "seed must be an integer, got 0.5"),
        ({"shuffle": "false"}, "shuffle must be true or false, got 'false'"),
        ({"shuffle": 1}, "shuffle must be true or false, got 1"),
        ({"drop_last": None}, "drop_last must be true or false, got None"),
        ({"stream": "no"}, "stream must be true or false, got 'no'"),
        ({"strip_gutenberg": "yes"}, "strip_gutenberg must be true or false, got 'yes'"),
        ({"batch_size": 4.0}, r"batch_size must be an integer ≥ 1, got 4\.0"),
        ({"build_workers": "2"}, "build_workers must be an integer ≥ 1, got '2'"),
        ({"max_document_bytes": 1e6}, "max_document_bytes must be an integer ≥ 1"),
        ({"text_column": 3}, "text_column must be a string, got 3"),
    ],
)
def test_wrong_types_are_refused_when_constructed(options, message):
    with pytest.raises(TypeError, match=message):
        GPTDataModule(**options)


@pytest.mark.parametrize("data_dir", ["s3://bucket/data", "https://host/data", b"data", None])
def test_a_data_dir_that_is_not_a_folder_is_refused(data_dir):
    with pytest.raises(ValueError, match="data_dir must be a folder on this machine, got"):
        GPTDataModule(data_dir=data_dir)


def test_numbers_and_flags_of_numpy_become_plain_values(story, tmp_path):
    data = ready(
        story, tmp_path, max_length=np.int64(8), stride=np.uint8(8), batch_size=np.int32(4),
        seed=np.int64(3), shuffle=np.bool_(True), build_workers=np.int8(1),
        cache_gb=np.float64(2), num_workers=np.int64(0),
    )  # fmt: skip
    assert len(next(iter(data.train_dataloader()))[0]) == 4
    plain = (str, int, float, bool, type(None), list)
    assert all(type(value) in plain for value in data.hparams.values()), data.hparams


def test_the_data_dir_is_the_folder_that_was_meant_when_constructed(story, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    home = GPTDataModule(story, data_dir="~/data")
    assert home.data_dir == tmp_path / "home" / "data"
    monkeypatch.chdir(tmp_path)
    data = GPTDataModule(story, max_length=8, stride=8, data_dir="tokens")
    data.prepare_data()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    data.setup()
    assert (tmp_path / "tokens" / "tokens").is_dir()
    assert not list((tmp_path / "elsewhere").iterdir())


def test_seed_none_shuffles_with_a_seed_that_a_checkpoint_keeps(story, tmp_path):
    first, other, plain = (
        ready(story, tmp_path, **options)
        for options in ({"seed": None}, {"seed": None}, {"shuffle": False})
    )
    orders = [[x[:, 0].tolist() for x, _ in d.train_dataloader()] for d in (first, other, plain)]
    assert orders[0] != orders[1] != orders[2] != orders[0]
    model, fitter = tiny_gpt(first), make_trainer(max_epochs=1, limit_train_batches=2)
    fitter.fit(model, datamodule=first)
    fitter.save_checkpoint(tmp_path / "model.ckpt")
    resumed = GPTDataModule(story, max_length=8, stride=8, seed=None, data_dir=tmp_path / "data")
    fitter = make_trainer(max_epochs=2, limit_train_batches=2)
    fitter.fit(model, datamodule=resumed, ckpt_path=tmp_path / "model.ckpt", weights_only=True)
    assert resumed.seed == first.seed is not None
    assert all(torch.equal(resumed.batch_at(s)[0], first.batch_at(s)[0]) for s in range(2))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_overfit_batches_trains_on_the_batches_that_batch_at_tells(story, tmp_path, accumulate):
    class Seen(L.Callback):
        def __init__(self) -> None:
            self.inputs: list[torch.Tensor] = []

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
            self.inputs.append(batch[0])

    def fit(max_epochs: int, **options) -> tuple[GPTDataModule, Seen, L.Trainer]:
        data, seen = GPTDataModule(story, max_length=8, stride=8, data_dir=tmp_path / "data"), Seen()
        trainer = make_trainer(
            overfit_batches=3, max_epochs=max_epochs, callbacks=[seen], limit_val_batches=0,
            accumulate_grad_batches=accumulate,
        )  # fmt: skip
        trainer.fit(tiny_gpt(data), datamodule=data, **options)
        return data, seen, trainer

    data, whole, _ = fit(max_epochs=4)
    in_text_order = torch.stack([data.train_windows[i][0] for i in range(12)])
    assert torch.equal(torch.cat(whole.inputs), in_text_order.repeat(4, 1))
    assert all(torch.equal(data.batch_at(step)[0], x) for step, x in enumerate(whole.inputs))
    _, first, trainer = fit(max_epochs=2)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    data, rest, _ = fit(max_epochs=4, ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    assert torch.equal(torch.cat(first.inputs + rest.inputs), torch.cat(whole.inputs))
    assert all(torch.equal(data.batch_at(step)[0], x) for step, x in enumerate(whole.inputs))
    loaded = opened(GPTDataModule.load_from_checkpoint(tmp_path / "half.ckpt"))
    assert torch.equal(loaded.batch_at(5)[0], whole.inputs[5])


def test_a_folder_around_the_data_dir_does_not_contain_its_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data" / "downloads").mkdir(parents=True)
    (tmp_path / "data" / "downloads" / "book-1.txt").write_text("not asked for")
    (tmp_path / "data" / "mine.txt").write_text(TEXT)
    for corpus in ("data/", ".", "**/*.txt"):
        for _ in range(2):
            data = opened(GPTDataModule(corpus, max_length=8, stride=8))
        assert [Path(s.path).name for s in data.store.manifest.sources] == ["mine.txt"]
    named = opened(GPTDataModule("data/downloads", max_length=2, stride=2, val_fraction=0))
    assert named.store.n_bytes == len("not asked for")


def test_a_text_that_changed_is_read_by_the_next_fit(story, tmp_path):
    data = GPTDataModule(story, max_length=8, stride=8, val_fraction=0.0, data_dir=tmp_path / "data")
    fits = []
    for text in (TEXT, "Another text. " * 300):
        story.write_text(text)
        make_trainer(max_steps=1).fit(tiny_gpt(data), datamodule=data)
        fits.append((data.store.n_bytes, len(data.train_windows)))
    assert [n_bytes for n_bytes, _ in fits] == [len(TEXT), 14 * 300]
    assert fits[0][1] != fits[1][1]


def test_options_that_change_after_setup_change_the_windows(story, tmp_path):
    data = ready(story, tmp_path)
    data.max_length = 4
    assert next(iter(data.train_dataloader()))[0].shape == (4, 4)
    assert data.state_dict()["data"]["max_length"] == 4


def test_a_batch_size_that_changes_between_epochs_is_a_new_run_segment(story, tmp_path):
    class Grows(L.Callback):
        def on_train_epoch_end(self, trainer, pl_module) -> None:
            trainer.datamodule.batch_size += 2

    class Seen(L.Callback):
        def __init__(self) -> None:
            self.inputs: list[torch.Tensor] = []

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
            self.inputs.append(batch[0])

    data, seen = GPTDataModule(story, max_length=8, stride=64, data_dir=tmp_path / "data"), Seen()
    trainer = make_trainer(
        max_epochs=3, limit_val_batches=0, callbacks=[seen, Grows()], reload_dataloaders_every_n_epochs=1
    )
    trainer.fit(tiny_gpt(data), datamodule=data)
    assert {len(inputs) for inputs in seen.inputs} == {4, 6, 8}
    assert all(torch.equal(data.batch_at(step)[0], x) for step, x in enumerate(seen.inputs))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cache_gb": "no"}, r"cache_gb must be a number in \[0, 1e\+12\), got 'no': .* None: no limit"),
        ({"store_url": 5}, "store_url must be a URL or a folder of a published store, got 5"),
        ({"batch_format": "dict"}, r"batch_format must be one of \('tuple', 'hf'\), got 'dict'"),
        ({"store_url": ""}, "store_url must be a URL or a folder of a published store"),
        ({"data_dir": ""}, "data_dir must be a folder on this machine, got ''"),
        ({"data_dir": Path("s3://bucket/x")}, "data_dir must be a folder on this machine"),
    ],
)
def test_values_that_cannot_work_are_refused_when_constructed(options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        GPTDataModule(**options)


@pytest.mark.parametrize("corpus", [None, 5, "", [], b"a.txt", {"a.txt"}, ["a", None]])
def test_a_corpus_of_another_type_is_refused_by_the_constructor(corpus):
    with pytest.raises((TypeError, ValueError), match=r"corpus.*(expected the name|is an empty)"):
        GPTDataModule(corpus)
    GPTDataModule(corpus, store_url="store")  # which needs no corpus


@pytest.mark.parametrize("name", ["corpus", "data_dir", "text_column"])
def test_a_number_as_a_name_gets_the_quotes_to_type(name):
    with pytest.raises((TypeError, ValueError), match=f"""quote it for Hydra: 'data.{name}="2024"'"""):
        GPTDataModule(**{name: 2024})


def test_strings_of_numpy_and_enums_become_plain(tmp_path):
    class Key(str, Enum):
        TEXT = "text"
        FOLDER = "folder"

    Path("text").write_text("hello world")
    for kind in (np.str_, lambda name: Key(name)):
        data = GPTDataModule(kind("text"), data_dir=kind("folder"), ray_address=kind("text"))
        assert data.data_dir == Path("folder").absolute()
        assert {type(data.hparams[name]) for name in ("corpus", "data_dir", "ray_address")} == {str}
        assert (data.hparams.corpus, data.hparams.data_dir) == ("text", "folder")
        store_url = GPTDataModule(store_url=kind("folder")).hparams.store_url
        assert (type(store_url), store_url) == (str, "folder")
        assert [file.name for file in open_corpus([kind("text")]).files] == ["text"]
    data = GPTDataModule(
        text_column=Key.TEXT, engine=np.str_("tiktoken"), encoding_errors=np.str_("strict"),
        build=np.str_("processes"), special_tokens=np.str_("allow"), cache_gb=float("inf"),
    )  # fmt: skip
    torch.save(dict(data.hparams), tmp_path / "hparams.pt")
    hparams = torch.load(tmp_path / "hparams.pt", weights_only=True)
    assert (hparams["text_column"], hparams["engine"]) == ("text", "tiktoken")


def test_a_trainer_of_pytorch_lightning_is_named():
    trainer = type("Trainer", (), {"__module__": "pytorch_lightning.trainer.trainer"})()
    with pytest.raises(TypeError, match=r"pytorch_lightning, .* Write `import lightning as L`"):
        GPTDataModule().trainer = trainer


@pytest.mark.filterwarnings("ignore:Total length of")  # also for a plain DataLoader
def test_the_search_for_a_batch_size_ends_at_the_number_of_windows(tmp_path):
    (tmp_path / "short.txt").write_text("".join(f"{i} words. " for i in range(60)))
    data = ready(tmp_path / "short.txt", tmp_path, val_fraction=0.0)
    tuner = Tuner(make_trainer(max_steps=3, default_root_dir=tmp_path))
    options = {"max_trials": 8, "steps_per_trial": 1, "init_val": 4}
    size = tuner.scale_batch_size(tiny_gpt(data), datamodule=data, **options)
    assert len(data.train_windows) <= size < 4 * len(data.train_windows)
    assert not list(tmp_path.glob(".scale_batch_size*"))


def test_the_constructor_writes_no_files():
    GPTDataModule()
    assert list(Path().iterdir()) == []


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("shuffle", "false", r"shuffle must be true or false, got 'false'"),
        ("batch_size", "8", r"batch_size must be an integer ≥ 1, got '8'"),
        ("batch_size", 0, r"batch_size must be an integer ≥ 1, got 0"),
        ("val_fraction", 2, r"val_fraction must be a number in \[0, 1\)"),
    ],
)
def test_options_that_are_set_later_are_checked_as_well(name, value, error):
    with pytest.raises((TypeError, ValueError), match=error):
        setattr(GPTDataModule(), name, value)


def test_numbers_of_numpy_that_are_set_later_become_plain():
    data = GPTDataModule()
    data.batch_size, data.seed, data.max_length = np.int64(8), np.int64(7), np.int32(9)
    assert [type(v) for v in (data.batch_size, data.seed, data.max_length)] == [int, int, int]


def test_a_val_fraction_that_is_set_later_cuts_again(tmp_path):
    (tmp_path / "a.txt").write_text("word " * 2000)
    data = ready(tmp_path / "a.txt", tmp_path, val_fraction=0.1)
    before = data.sources["corpus"].split
    data.val_fraction = 0.4
    data.setup("fit")
    assert data.sources["corpus"].split.train[1] < before.train[1]
    assert len(data.train_windows) == len(
        ready(tmp_path / "a.txt", tmp_path, val_fraction=0.4).train_windows
    )


def test_running_on_a_split_that_is_empty_warns(tmp_path):
    (tmp_path / "a.txt").write_text("word " * 2000)
    data = ready(tmp_path / "a.txt", tmp_path)
    with pytest.warns(UserWarning, match=r"no test split to run on: set data.test_fraction"):
        make_trainer(default_root_dir=tmp_path).test(tiny_gpt(data), datamodule=data, verbose=False)
