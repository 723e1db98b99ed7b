"""Where a store is cut into train, val and test."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_gptdata import GPT, EmbeddingStem, GPTDataModule
from lit_gptdata.tokens.build.local import prepare_store
from lit_gptdata.tokens.tokenizer import Tokenizer
from lit_gptdata.windows.dataset import IGNORE_INDEX
from lit_gptdata.windows.split import check_fractions, scored_bytes, split_tokens
from tests.conftest import ListCorpus
from tests.runs import make_trainer, opened
from tests.tokens.test_tokenizer import wide_encoding

GPT2 = Tokenizer("gpt2")
PARAGRAPH = "I had worked hard for nearly two years, for the sole purpose of infusing life. "


def store_of(texts, tmp_path, tokenizer=GPT2):
    return prepare_store(ListCorpus(texts), tokenizer, tmp_path)


def module_over(texts: list[str], tmp_path, **options) -> GPTDataModule:
    return opened(GPTDataModule(ListCorpus(texts), data_dir=tmp_path, **options))


@settings(deadline=None, max_examples=12)
@given(
    texts=st.lists(st.integers(0, 40).map(lambda k: PARAGRAPH * k), min_size=1, max_size=8),
    val=st.sampled_from([0.0, 0.05, 0.1, 0.3]),
    test=st.sampled_from([0.0, 0.05, 0.2]),
    max_length=st.integers(1, 40),
    stride=st.integers(1, 50),
)
def test_no_token_of_val_or_test_is_in_a_train_window(
    tmp_path_factory, texts, val, test, max_length, stride
):
    texts, folder = [*texts, PARAGRAPH * 50], tmp_path_factory.mktemp("s")
    lengths = {"max_length": max_length, "stride": stride}
    data = module_over(texts, folder, val_fraction=val, test_fraction=test, **lengths)
    split, n = data.sources["corpus"].split, data.store.n_tokens
    assert split.train[0] == 0
    assert split.train[1] == split.val[0] <= split.val[1] == split.test[0] <= split.test[1] == n
    spans = data.train_windows.spans
    last = (len(spans) - 1) * stride + max_length  # the last token that a train window reads
    assert last < split.train[1]
    for name, windows in (("val", data.val_windows), ("test", data.test_windows)):
        begin, end = getattr(split, name)
        length = end - begin
        assert len(windows) == max(0, -(-(length - 1) // max_length))
        scored = [t for i in range(len(windows)) for t in windows[i][1].tolist()]
        scored = [t for t in scored if t != IGNORE_INDEX]
        assert scored == data.store.tokens[begin + 1 : end].tolist() if length else not scored
    assert bool(len(data.val_windows)) == (val > 0)
    assert bool(len(data.test_windows)) == (test > 0)


def test_a_cut_moves_to_a_document_boundary_within_one_percent(tmp_path):
    texts = ["a" * 895, "b" * 105]  # the target is byte 900; the boundary is 5 bytes from it
    split = split_tokens(store_of(texts, tmp_path), 0.1, 0.0)
    assert split.train[1] == len(GPT2.encode(texts[0]))  # the val range starts with the separator


def test_a_cut_without_a_near_boundary_moves_to_the_start_of_a_word(tmp_path):
    text = PARAGRAPH * 100
    store = store_of([text], tmp_path)
    begin = split_tokens(store, 0.1, 0.0).val[0]
    left, right = (GPT2.decode(ids) for ids in (store.tokens[:begin], store.tokens[begin:]))
    assert left + right == text
    assert 0 <= len(left) - 0.9 * len(text) < 20
    assert left[-1] not in " \n"
    assert right[0] == " "
    assert right[1].isalpha()


def test_every_tokenizer_gets_the_same_val_text(tmp_path):
    texts = [PARAGRAPH * 37 + "12345678 … ünï語 " * 9, PARAGRAPH * 5]
    bytewise = tiktoken.Encoding(  # one token per byte
        "bytes",
        pat_str=GPT2.reference.rule,
        mergeable_ranks={bytes([b]): b for b in range(256)},
        special_tokens={"<|endoftext|>": 256},
    )
    rights = set()
    for tokenizer in (GPT2, Tokenizer(wide_encoding()), Tokenizer(bytewise)):
        store = store_of(texts, tmp_path, tokenizer)
        begin = split_tokens(store, 0.3, 0.0).val[0]
        rights.add(tokenizer.decode(store.tokens[begin:]))
    assert len(rights) == 1


@pytest.mark.parametrize("limit", [1.0, 2])
@pytest.mark.parametrize("policy", ["allow", "text"])
def test_bits_per_byte_count_a_literal_end_of_text_but_no_separator(tmp_path, policy, limit):
    texts = [("A cat went home. <|endoftext|>" * 40), "<|endoftext|>", "One story. " * 9] * 3
    options = {"max_length": 8, "batch_size": 4, "special_tokens": policy, "val_fraction": 0.4}
    data = module_over(texts, tmp_path, **options)
    begin, end = data.sources["corpus"].split.val
    model = GPT(EmbeddingStem(data.vocab_size, max_length=8, embedding_dim=8), n_layers=0, n_heads=1)
    trainer = make_trainer(limit_val_batches=limit)
    (val,) = trainer.validate(model, datamodule=data, verbose=False)
    end = end if limit == 1.0 else begin + 1 + 2 * 4 * 8
    lengths = []
    for text in texts:
        ids = data.tokenizer.encode(text)
        lengths += [*map(len, data.tokenizer.reference.encoding.decode_tokens_bytes(ids)), 0]
    nats = val["val_loss"] * (end - begin - 1)
    bits = nats / math.log(2) / sum(lengths[begin + 1 : end])
    assert val["val_bits_per_byte"] == pytest.approx(bits, rel=1e-6)


def test_bytes_of_targets_that_are_not_the_splits_first_ones_come_from_their_ids(tmp_path):
    store = store_of(["one<|endoftext|> two", "three"], tmp_path)  # 1 + 1 + 1, separator, 1 token
    assert scored_bytes(store, (0, 5), 4, ordinary=9, special=2) == 9 + 13
    assert scored_bytes(store, (1, 5), 3, ordinary=9, special=1) == 9
    for counts in ((4, 8, 2), (4, 10, 2), (4, 9, 0), (3, 9, 1), (99, 9, 2)):
        assert scored_bytes(store, (0, 5), *counts) == counts[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"val_fraction": 1.0}, r"val_fraction must be a number in \[0, 1\), got 1\.0"),
        ({"test_fraction": -0.1}, r"test_fraction must be .*, got -0\.1"),
        ({"val_fraction": "0.1"}, r"val_fraction must be .* got '0\.1'"),
        ({"val_fraction": 0.5, "test_fraction": 0.5}, r"sum to 1: they must sum to less than 1"),
        ({"val_fraction": float("nan")}, r"val_fraction must be .* got nan"),
        ({"val_fraction": True}, r"val_fraction must be .* got True"),
        ({"test_fraction": np.bool_(0)}, r"test_fraction must be .* got (np\.)?False"),
        ({"test_fraction": None}, r"test_fraction must be .* got None"),
    ],
)
def test_fractions_out_of_range_are_refused(options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        GPTDataModule(**options)


@pytest.mark.parametrize("number", [np.float32, np.float64, np.float16, Fraction])
def test_numbers_of_other_libraries_become_plain_floats(number):
    fractions = check_fractions(number(0.25), number(0))
    assert fractions == (0.25, 0.0)
    assert [type(fraction) for fraction in fractions] == [float, float]


def test_two_cuts_near_one_document_leave_both_splits_their_text(tmp_path):
    # both cuts are within 1 % of the start of the second document
    store = store_of([PARAGRAPH * 985, PARAGRAPH * 15], tmp_path)
    split = split_tokens(store, 0.01, 0.01)
    assert all(end - begin > 50 for begin, end in (split.val, split.test))


def test_a_document_without_text_is_no_place_for_a_cut(tmp_path):
    store = store_of(["", "", PARAGRAPH * 20, "", "", ""], tmp_path)
    begin, end = split_tokens(store, 0.01, 0.0).val
    assert store.byte_at(end) - store.byte_at(begin) > 0
    begin, end = split_tokens(store, 0.99, 0.0).train
    assert store.byte_at(end) > 0


@pytest.mark.parametrize("fraction", [1e-9, 1e-300])
def test_a_fraction_of_less_than_a_token_is_refused(tmp_path, fraction):
    store = store_of([PARAGRAPH], tmp_path)
    message = rf"val_fraction={fraction} leaves 0 of \d+ tokens for the val split.* Raise val_fraction"
    with pytest.raises(ValueError, match=message):
        split_tokens(store, fraction, 0.0)


def test_a_store_of_one_token_has_only_a_train_split(tmp_path):
    store = store_of(["a"], tmp_path)
    assert split_tokens(store, 0, 0).train == (0, 1)
    with pytest.raises(ValueError, match=r"leaves [01] of 1 tokens for the val split"):
        split_tokens(store, 0.5, 0)


def test_a_split_without_a_window_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"the train split of .* has \d+ tokens, too few .* Give more"):
        module_over([PARAGRAPH * 2], tmp_path, max_length=64)
    message = r"val_fraction=0.001 leaves [01] of .* tokens for the val split.* Raise val_fraction"
    with pytest.raises(ValueError, match=message):
        module_over([PARAGRAPH], tmp_path, val_fraction=0.001, max_length=2)
