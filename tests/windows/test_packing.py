"""The index behind packed and documents windows."""

from __future__ import annotations

import numpy as np

from lit_gptdata.tokens.build.local import prepare_store
from lit_gptdata.tokens.tokenizer import Tokenizer
from lit_gptdata.windows.packing import open_index
from tests.conftest import ListCorpus

GPT2 = Tokenizer("gpt2")
KINDS = ("packed", "documents")


def store_of(lengths, folder):
    return prepare_store(ListCorpus(["a" + " a" * (n - 1) if n else "" for n in lengths]), GPT2, folder)


def test_an_index_covers_the_split(tmp_path):
    lengths = [3, 0, 5, 1]
    store = store_of(lengths, tmp_path)
    assert store.n_tokens == sum(lengths) + 3
    for kind in KINDS:
        index = open_index(store, 0, store.n_tokens, 4, kind, tmp_path / "windows")
        assert index.n_targets == store.n_tokens + 1
